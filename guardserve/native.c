/* What is done for every forward, or every layer of one, in the place of torch's operations.
 *
 * Each of these takes tens of microseconds where caches hold other things, as they do between the layers of a model and
 * behind its last one, however little it does.
 */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <structmember.h>

/* glibc chooses among these when the module is loaded */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define CHANNELS_AT_ONCE 128  /* their sums stay in the first cache */
#define POSITIONS_AT_ONCE 256 /* added up in float32, and then in float64 */
#define FEWEST_AT_ONCE 8      /* fewer are as fast one by one */
#define LONG (1 << 16)        /* values from which on other threads may run meanwhile */

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, KINDS };

typedef struct {
    PyObject_HEAD
    PyObject *shape, *stride, *starts, *begins, *memory;
    const int64_t *strip;
    const float *anchor;
    float *mean, *variance;
    int64_t samples, channels, apart, strips, length, step, row;
    double share;
    long long turn;
} Slot;

static PyObject *Tensor, *strided, *dtypes[KINDS];
static PyObject *name_data_ptr, *name_dtype, *name_is_contiguous, *name_is_cpu, *name_is_neg, *name_layout, *name_numel,
    *name_shape, *name_storage_offset, *name_stride;

static inline float from_float(float value) { return value; }

static inline float from_bfloat16(uint16_t value)
{
    union { uint32_t bits; float value; } wide = {(uint32_t)value << 16};
    return wide.value;
}

static inline float from_half(uint16_t value)
{
    uint32_t magnitude = value & 0x7fff, exponent = value & 0x7c00;
    union { uint32_t bits; float value; } wide = {magnitude << 13};
    if (exponent == 0) /* subnormal, but no float32 on the way is: some programs have those flushed to 0 */
        wide.value = (float)magnitude * 0x1p-24f;
    else
        wide.bits += exponent == 0x7c00 ? 0x70000000 : 0x38000000;
    wide.bits |= (uint32_t)(value & 0x8000) << 16;
    return wide.value;
}

/* Sums are of deviations from a channel's first value. */
static void finish(const Slot *slot, int64_t channel, double first, double sum, double squares, float *mean,
                   float *variance)
{
    double average = sum * slot->share, spread = squares * slot->share - average * average;
    mean[channel] = (float)(first - slot->anchor[channel] + average);
    if (variance)
        variance[channel] = spread < 0 ? 0 : (float)spread;
}

/* Sums up one sample: with channels side by side in memory, or strips of positions, or neither. */
#define DEFINE_SUMS(TYPE, LOAD)                                                                                        \
    FOR_EACH_PROCESSOR static void channels_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)      \
    {                                                                                                                  \
        double origin[CHANNELS_AT_ONCE], sum[CHANNELS_AT_ONCE], squares[CHANNELS_AT_ONCE];                             \
        for (int64_t first = 0; first < slot->channels; first += CHANNELS_AT_ONCE) {                                   \
            int64_t left = slot->channels - first, width = left < CHANNELS_AT_ONCE ? left : CHANNELS_AT_ONCE;          \
            for (int64_t c = 0; c < width; c++) {                                                                      \
                origin[c] = LOAD(x[first + c]);                                                                        \
                sum[c] = squares[c] = 0;                                                                               \
            }                                                                                                          \
            for (const int64_t *strip = slot->strip; strip < slot->strip + slot->strips; strip++)                      \
                for (int64_t i = 0; i < slot->length; i++) {                                                           \
                    const TYPE *here = x + *strip + i * slot->step + first;                                            \
                    for (int64_t c = 0; c < width; c++) {                                                              \
                        double deviation = LOAD(here[c]) - origin[c];                                                  \
                        sum[c] += deviation;                                                                           \
                        squares[c] += deviation * deviation;                                                           \
                    }                                                                                                  \
                }                                                                                                      \
            for (int64_t c = 0; c < width; c++)                                                                        \
                finish(slot, first + c, origin[c], sum[c], squares[c], mean, variance);                                \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    FOR_EACH_PROCESSOR static void strips_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)        \
    {                                                                                                                  \
        for (int64_t c = 0; c < slot->channels; c++, x += slot->apart) {                                               \
            float origin = LOAD(*x);                                                                                   \
            double sum = 0, squares = 0;                                                                               \
            for (const int64_t *strip = slot->strip; strip < slot->strip + slot->strips; strip++)                      \
                for (int64_t first = 0; first < slot->length; first += POSITIONS_AT_ONCE) {                            \
                    int64_t left = slot->length - first, count = left < POSITIONS_AT_ONCE ? left : POSITIONS_AT_ONCE;  \
                    const TYPE *here = x + *strip + first;                                                             \
                    float few = 0, few_squares = 0;                                                                    \
                    _Pragma("omp simd reduction(+ : few)")                                                             \
                    for (int64_t i = 0; i < count; i++)                                                                \
                        few += LOAD(here[i]) - origin;                                                                 \
                    float middle = few / (float)count; /* the origin may be far off, and float32 is short */           \
                    _Pragma("omp simd reduction(+ : few_squares)")                                                     \
                    for (int64_t i = 0; i < count; i++) {                                                              \
                        float deviation = LOAD(here[i]) - origin - middle;                                             \
                        few_squares += deviation * deviation;                                                          \
                    }                                                                                                  \
                    sum += few;                                                                                        \
                    squares += few_squares + (double)middle * (2 * (double)few - (double)count * middle);              \
                }                                                                                                      \
            finish(slot, c, origin, sum, squares, mean, variance);                                                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void positions_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)                        \
    {                                                                                                                  \
        for (int64_t c = 0; c < slot->channels; c++, x += slot->apart) {                                               \
            double origin = LOAD(*x), sum = 0, squares = 0;                                                            \
            for (const int64_t *strip = slot->strip; strip < slot->strip + slot->strips; strip++)                      \
                for (int64_t i = 0; i < slot->length; i++) {                                                           \
                    double deviation = LOAD(x[*strip + i * slot->step]) - origin;                                      \
                    sum += deviation;                                                                                  \
                    squares += deviation * deviation;                                                                  \
                }                                                                                                      \
            finish(slot, c, origin, sum, squares, mean, variance);                                                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void samples_##LOAD(const Slot *slot, const TYPE *x, const int64_t *starts)                                 \
    {                                                                                                                  \
        int strips = slot->step == 1 && slot->length >= FEWEST_AT_ONCE;                                                \
        for (int64_t n = 0; n < slot->samples; n++) {                                                                  \
            float *mean = slot->mean + n * slot->row;                                                                  \
            float *variance = slot->variance ? slot->variance + n * slot->row : NULL;                                  \
            (slot->apart == 1 ? channels_##LOAD : strips ? strips_##LOAD : positions_##LOAD)(slot, x + starts[n], mean,\
                                                                                               variance);              \
        }                                                                                                              \
    }

DEFINE_SUMS(float, from_float)
DEFINE_SUMS(uint16_t, from_bfloat16)
DEFINE_SUMS(uint16_t, from_half)

/* Tells whether an attribute is a given object, or what a method returns equals it; -1 on an error. */
static int is(PyObject *x, PyObject *name, PyObject *expected)
{
    PyObject *found = PyObject_GetAttr(x, name);
    Py_XDECREF(found); /* a singleton */
    return found ? found == expected : -1;
}

static int equals(PyObject *found, PyObject *expected)
{
    int equal = found ? PyObject_RichCompareBool(found, expected, Py_EQ) : -1;
    Py_XDECREF(found);
    return equal;
}

/* Tells of which kind a tensor's values are, if of any; -1 on an error. */
static int kind_of(PyObject *x, int *kind)
{
    PyObject *dtype = PyObject_GetAttr(x, name_dtype);
    Py_XDECREF(dtype);
    if (!dtype)
        return -1;
    for (*kind = 0; *kind < KINDS && dtypes[*kind] != dtype; ++*kind)
        ;
    return *kind < KINDS;
}

/* Returns where a tensor's values begin; NULL on an error, or if they are in no memory, or out of step with it. */
static const void *address_of(PyObject *x, int kind)
{
    uintptr_t size = kind == FLOAT64 ? 8 : kind == FLOAT32 ? 4 : 2;
    PyObject *offset = PyObject_CallMethodObjArgs(x, name_storage_offset, NULL);
    PyObject *address = offset ? PyObject_CallMethodObjArgs(x, name_data_ptr, NULL) : NULL;
    uintptr_t before = offset ? (uintptr_t)PyLong_AsLongLong(offset) * size : 0;
    uintptr_t values = address ? (uintptr_t)PyLong_AsVoidPtr(address) : 0;
    Py_XDECREF(offset);
    Py_XDECREF(address);
    return values == before || values % size ? NULL : (const void *)values;
}

/* Tells whether the slot takes a tensor, and of which kind its values are; -1 on an error. */
static int fits(const Slot *slot, PyObject *x, int *kind)
{
    if ((PyObject *)Py_TYPE(x) != Tensor)
        return 0;
    int fit = kind_of(x, kind);
    if (fit > 0 && *kind == FLOAT64)
        fit = 0;
    if (fit > 0)
        fit = equals(PyObject_GetAttr(x, name_shape), slot->shape);
    if (fit > 0)
        fit = is(x, name_is_cpu, Py_True);
    if (fit > 0)
        fit = equals(PyObject_CallMethodObjArgs(x, name_stride, NULL), slot->stride);
    if (fit > 0)
        fit = equals(PyObject_CallMethodObjArgs(x, name_is_neg, NULL), Py_False);
    return fit;
}

static PyObject *Slot_take(Slot *slot, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "take() takes a tensor and a turn");
        return NULL;
    }
    long long turn = PyLong_AsLongLong(arguments[1]);
    if (turn == -1 && PyErr_Occurred())
        return NULL;
    int kind = 0, fit = turn == slot->turn ? 0 : fits(slot, arguments[0], &kind);
    if (fit <= 0)
        return fit ? NULL : PyBool_FromLong(0);
    const void *x = address_of(arguments[0], kind);
    if (!x)
        return PyErr_Occurred() ? NULL : PyBool_FromLong(0);
    const int64_t *starts = (const int64_t *)PyBytes_AsString(slot->starts);
    PyThreadState *state = slot->samples * slot->channels * slot->strips * slot->length >= LONG ? PyEval_SaveThread() : NULL;
    if (kind == FLOAT32)
        samples_from_float(slot, x, starts);
    else if (kind == BFLOAT16)
        samples_from_bfloat16(slot, x, starts);
    else
        samples_from_half(slot, x, starts);
    if (state)
        PyEval_RestoreThread(state);
    slot->turn = turn;
    return PyBool_FromLong(1);
}

static int set_starts(Slot *slot, PyObject *starts, void *closure)
{
    (void)closure;
    if (!starts || !PyBytes_Check(starts) || PyBytes_Size(starts) != slot->samples * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "starts has to be the bytes of one int64 for each sample");
        return -1;
    }
    Py_INCREF(starts);
    Py_XDECREF(slot->starts);
    slot->starts = starts;
    return 0;
}

static int Slot_init(Slot *slot, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"shape", "stride", "starts",  "strips", "length",   "step", "apart",
                            "samples", "anchor", "channels", "mean", "variance", "row",  "memory", NULL};
    PyObject *shape, *stride, *starts, *strips, *memory;
    long long length, step, apart, samples, channels, row;
    unsigned long long anchor, mean, variance;
    if (slot->memory) {
        PyErr_SetString(PyExc_TypeError, "a slot is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOSLLLLKLKKLO", names, &shape, &stride, &starts, &strips,
                                     &length, &step, &apart, &samples, &anchor, &channels, &mean, &variance, &row,
                                     &memory))
        return -1;
    slot->samples = samples;
    if (set_starts(slot, starts, NULL) < 0)
        return -1;
    slot->channels = channels;
    slot->apart = apart;
    slot->length = length;
    slot->step = step;
    slot->strips = PyBytes_Size(strips) / (Py_ssize_t)sizeof(int64_t);
    slot->share = 1.0 / (double)(slot->strips * length);
    slot->row = row;
    slot->strip = (const int64_t *)PyBytes_AsString(strips);
    slot->anchor = (const float *)(uintptr_t)anchor;
    slot->mean = (float *)(uintptr_t)mean;
    slot->variance = (float *)(uintptr_t)variance;
    slot->turn = -1;
    Py_INCREF(shape);
    Py_INCREF(stride);
    Py_INCREF(strips);
    Py_INCREF(memory);
    slot->shape = shape;
    slot->stride = stride;
    slot->begins = strips;
    slot->memory = memory;
    return 0;
}

static void Slot_dealloc(Slot *slot)
{
    PyTypeObject *type = Py_TYPE(slot);
    Py_XDECREF(slot->shape);
    Py_XDECREF(slot->stride);
    Py_XDECREF(slot->begins);
    Py_XDECREF(slot->starts);
    Py_XDECREF(slot->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(slot);
    Py_DECREF(type);
}

static const char Slot_doc[] =
    "Where a layer of a forward writes down what it shows.\n\n"
    "Args:\n"
    "    shape: Shape of the activations that it takes.\n"
    "    stride: Their strides.\n"
    "    starts: Where each sample's positions begin, N int64, in values from the activation's first.\n"
    "    strips: Where strips of positions begin behind that, likewise, the first at 0.\n"
    "    length: Positions of each strip.\n"
    "    step: How far they are from each other.\n"
    "    apart: How far channels are.\n"
    "    samples: N.\n"
    "    anchor: Address of what is taken off, C values of float32.\n"
    "    channels: C.\n"
    "    mean: Address of where the first sample's means over positions go, float32.\n"
    "    variance: Likewise of the variances; 0 for none.\n"
    "    row: How far behind these the next sample's are.\n"
    "    memory: What the addresses are of, to keep.\n\n"
    "Attributes:\n"
    "    starts: See above; others may take their place. It is only written.\n"
    "    turn: The forward that it has last taken something of; -1 before the first.\n";

static const char take_doc[] =
    "Sum up what an activation shows in a forward; tell whether it was one that this takes, and the first of it.";

static PyMethodDef Slot_methods[] = {
    {"take", (PyCFunction)(void (*)(void))Slot_take, METH_FASTCALL, take_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Slot_members[] = {
    {"turn", T_LONGLONG, offsetof(Slot, turn), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef Slot_properties[] = {
    {"starts", NULL, (setter)set_starts, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Slot_slots[] = {
    {Py_tp_init, Slot_init},       {Py_tp_dealloc, Slot_dealloc},     {Py_tp_methods, Slot_methods},
    {Py_tp_members, Slot_members}, {Py_tp_getset, Slot_properties},   {Py_tp_doc, (void *)Slot_doc},
    {0, NULL},
};

static PyType_Spec Slot_spec = {"guardserve.native.Slot", sizeof(Slot), 0, Py_TPFLAGS_DEFAULT, Slot_slots};

#define VALUES_AT_ONCE 4096 /* so many are looked at before it is asked whether one was not finite */

#define DEFINE_ARE_FINITE(TYPE)                                                                                        \
    FOR_EACH_PROCESSOR static int are_finite_##TYPE(const TYPE *values, int64_t count, TYPE exponent)                  \
    {                                                                                                                  \
        for (int64_t first = 0; first < count; first += VALUES_AT_ONCE) {                                              \
            int64_t left = count - first, some = left < VALUES_AT_ONCE ? left : VALUES_AT_ONCE;                        \
            TYPE bad = 0;                                                                                              \
            for (int64_t i = 0; i < some; i++)                                                                         \
                bad |= (values[first + i] & exponent) == exponent;                                                     \
            if (bad)                                                                                                   \
                return 0;                                                                                              \
        }                                                                                                              \
        return 1;                                                                                                      \
    }

DEFINE_ARE_FINITE(uint16_t)
DEFINE_ARE_FINITE(uint32_t)
DEFINE_ARE_FINITE(uint64_t)

/* Tells whether a tensor's values lie one after the other in memory, and of which kind and how many they are. */
static const void *values_of(PyObject *x, int *kind, int64_t *count)
{
    if ((PyObject *)Py_TYPE(x) != Tensor || kind_of(x, kind) <= 0 || is(x, name_layout, strided) <= 0 ||
        is(x, name_is_cpu, Py_True) <= 0 || equals(PyObject_CallMethodObjArgs(x, name_is_contiguous, NULL), Py_True) <= 0)
        return NULL;
    PyObject *number = PyObject_CallMethodObjArgs(x, name_numel, NULL);
    *count = number ? PyLong_AsLongLong(number) : 0;
    Py_XDECREF(number);
    return number ? address_of(x, *kind) : NULL;
}

static PyObject *is_finite(PyObject *module, PyObject *x)
{
    (void)module;
    int kind = 0;
    int64_t count = 0;
    const void *values = values_of(x, &kind, &count);
    PyErr_Clear();
    if (!values)
        Py_RETURN_NONE;
    PyThreadState *state = count >= LONG ? PyEval_SaveThread() : NULL;
    int finite;
    if (kind == FLOAT32)
        finite = are_finite_uint32_t(values, count, 0x7f800000);
    else if (kind == FLOAT64)
        finite = are_finite_uint64_t(values, count, 0x7ff0000000000000);
    else
        finite = are_finite_uint16_t(values, count, kind == FLOAT16 ? 0x7c00 : 0x7f80);
    if (state)
        PyEval_RestoreThread(state);
    return PyBool_FromLong(finite);
}

static PyMethodDef functions[] = {
    {"is_finite", is_finite, METH_O,
     "Tell whether a tensor holds neither NaN nor infinity; None if it is not one of floats side by side on the CPU."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "guardserve.native", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_native(void)
{
    static const char *dtype_names[KINDS] = {"float32", "bfloat16", "float16", "float64"};
    PyObject *torch = PyImport_ImportModule("torch");
    if (!torch)
        return NULL;
    Tensor = PyObject_GetAttrString(torch, "Tensor");
    strided = PyObject_GetAttrString(torch, "strided");
    for (int i = 0; i < KINDS; i++)
        dtypes[i] = PyObject_GetAttrString(torch, dtype_names[i]);
    Py_DECREF(torch);
    name_layout = PyUnicode_InternFromString("layout");
    name_is_contiguous = PyUnicode_InternFromString("is_contiguous");
    name_numel = PyUnicode_InternFromString("numel");
    name_shape = PyUnicode_InternFromString("shape");
    name_stride = PyUnicode_InternFromString("stride");
    name_dtype = PyUnicode_InternFromString("dtype");
    name_is_cpu = PyUnicode_InternFromString("is_cpu");
    name_is_neg = PyUnicode_InternFromString("is_neg");
    name_storage_offset = PyUnicode_InternFromString("storage_offset");
    name_data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject *type = PyType_FromSpec(&Slot_spec), *module = PyModule_Create(&definition);
    if (PyErr_Occurred() || !type || !module || PyModule_AddObject(module, "Slot", type) < 0)
        return NULL;
    return module;
}
