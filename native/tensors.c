/* Where a tensor's values are. */
#include "native.h"

/* What a tensor lends by DLPack 1.x (dmlc.github.io/dlpack), of which nothing else is needed. */
typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *older, *allocate, *to_managed, *from_managed;
    int (*lend)(void *tensor, DLTensor *lent);
} DLPackExchangeAPI;

enum { DL_CPU = 1, DL_INT = 0, DL_FLOAT = 2, DL_BFLOAT = 4 };

#define KINDS 5
#define LOW ((uintptr_t)1 << (sizeof(void *) * 5)) /* memory begins lower hardly ever */

static const uintptr_t sizes[KINDS] = {4, 2, 2, 8, 8};
static PyObject *Tensor, *strided, *dtypes[KINDS];
static PyObject *name_data_ptr, *name_dtype, *name_is_cpu, *name_is_neg, *name_layout, *name_shape, *name_storage_offset,
    *name_stride;
static const DLPackExchangeAPI *exchange;

/* Tells whether an attribute is a given object, or what a method returns; 0 on an error too. */
static int is(PyObject *found, PyObject *expected)
{
    Py_XDECREF(found); /* a singleton */
    return found == expected;
}

static int lend(PyObject *x, View *view)
{
    DLTensor lent;
    if (exchange->lend(x, &lent) < 0 || lent.device.type != DL_CPU || lent.dtype.lanes != 1)
        return 0;
    if (lent.dtype.code == DL_FLOAT)
        view->kind = lent.dtype.bits == 32 ? FLOAT32 : lent.dtype.bits == 16 ? FLOAT16 : FLOAT64;
    else
        view->kind = lent.dtype.code == DL_BFLOAT ? BFLOAT16 : INT64;
    view->values = (const char *)lent.data + lent.byte_offset;
    view->axes = lent.ndim;
    view->shape = lent.shape;
    view->stride = lent.strides;
    return lent.dtype.bits == 8 * sizes[view->kind] &&
           (lent.dtype.code == DL_FLOAT || lent.dtype.code == DL_BFLOAT || lent.dtype.code == DL_INT);
}

int read_numbers(PyObject *tuple, int64_t *numbers)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count > MOST_AXES)
        PyErr_Format(PyExc_ValueError, "no more than %d axes can be read", MOST_AXES);
    for (Py_ssize_t i = 0; i < count && i < MOST_AXES; i++)
        numbers[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    return PyErr_Occurred() ? -1 : (int)count;
}

/* Reads those of what was just asked for; -1 if it could not be had either. */
static int numbers_of(PyObject *found, int64_t *numbers)
{
    int count = found ? read_numbers(found, numbers) : -1;
    Py_XDECREF(found);
    return count;
}

static int ask(PyObject *x, View *view)
{
    PyObject *dtype = PyObject_GetAttr(x, name_dtype);
    Py_XDECREF(dtype);
    for (view->kind = 0; view->kind < KINDS && dtypes[view->kind] != dtype; ++view->kind)
        ;
    if (view->kind == KINDS || !is(PyObject_GetAttr(x, name_layout), strided) ||
        !is(PyObject_GetAttr(x, name_is_cpu), Py_True))
        return 0;
    view->shape = view->held;
    view->stride = view->held + MOST_AXES;
    view->axes = numbers_of(PyObject_GetAttr(x, name_shape), view->held);
    if (view->axes < 0 || numbers_of(PyObject_CallMethodObjArgs(x, name_stride, NULL), view->held + MOST_AXES) < 0)
        return 0;
    PyObject *address = PyObject_CallMethodObjArgs(x, name_data_ptr, NULL);
    view->values = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    return view->values != NULL;
}

/* Tells whether an address is only how far into no memory at all a tensor begins. */
static int is_nowhere(PyObject *x, uintptr_t values, uintptr_t size)
{
    if (values >= LOW)
        return 0;
    PyObject *offset = PyObject_CallMethodObjArgs(x, name_storage_offset, NULL);
    int nowhere = !offset || values == (uintptr_t)PyLong_AsLongLong(offset) * size;
    Py_XDECREF(offset);
    return nowhere;
}

int memory_of(PyObject *x, View *view)
{
    if ((PyObject *)Py_TYPE(x) != Tensor)
        return 0;
    int seen = (exchange ? lend : ask)(x, view);
    uintptr_t values = (uintptr_t)view->values;
    seen = seen && values % sizes[view->kind] == 0 && !is_nowhere(x, values, sizes[view->kind]) &&
           is(PyObject_CallMethodObjArgs(x, name_is_neg, NULL), Py_False);
    if (!seen)
        PyErr_Clear();
    return seen;
}

int view_of(PyObject *x, View *view)
{
    return memory_of(x, view) && view->kind != INT64;
}

int64_t count_of(const View *view)
{
    int64_t count = 1;
    for (int axis = view->axes - 1; axis >= 0; axis--) {
        if (view->shape[axis] != 1 && view->stride[axis] != count)
            return -1;
        count *= view->shape[axis];
    }
    return count;
}

int init_tensors(void)
{
    static const char *dtype_names[KINDS] = {"float32", "bfloat16", "float16", "float64", "int64"};
    PyObject *torch = PyImport_ImportModule("torch");
    if (!torch)
        return -1;
    Tensor = PyObject_GetAttrString(torch, "Tensor");
    strided = PyObject_GetAttrString(torch, "strided");
    for (int i = 0; i < KINDS; i++)
        dtypes[i] = PyObject_GetAttrString(torch, dtype_names[i]);
    Py_DECREF(torch);
    name_data_ptr = PyUnicode_InternFromString("data_ptr");
    name_dtype = PyUnicode_InternFromString("dtype");
    name_is_cpu = PyUnicode_InternFromString("is_cpu");
    name_is_neg = PyUnicode_InternFromString("is_neg");
    name_layout = PyUnicode_InternFromString("layout");
    name_shape = PyUnicode_InternFromString("shape");
    name_storage_offset = PyUnicode_InternFromString("storage_offset");
    name_stride = PyUnicode_InternFromString("stride");
    if (PyErr_Occurred())
        return -1;
    PyObject *capsule = PyObject_GetAttrString(Tensor, "__dlpack_c_exchange_api__"); /* torch 2.10 and later */
    exchange = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    if (exchange && (exchange->version.major != 1 || !exchange->lend))
        exchange = NULL;
    PyErr_Clear();
    return 0; /* the capsule is kept */
}
