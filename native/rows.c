/* Adding up what many forwards showed. */
#include "native.h"

#define WIDTH 256 /* columns that are added up together: what that takes stays in the caches */

enum { PLAIN = 0x100 | 0x200, WRITEABLE = 0x400 }; /* flags of the array interface: aligned, and not swapped */

/* What an array lends by numpy's array interface (numpy.org/doc/stable/reference/arrays.interface.html). */
typedef struct {
    int two, axes;
    char kind;
    int size, flags;
    Py_intptr_t *shape, *strides;
    void *data;
    PyObject *description;
} ArrayInterface;

/* Rows of float32, one for each sample. */
typedef struct {
    const float *mean, *variance; /* no variance is 0 everywhere */
    int64_t rows, mean_row, variance_row;
} Part;

/* What a stretch of a stream adds up to, in each column. */
typedef struct {
    int64_t *count;
    double *mean, *squares, *within;
} Moments;

static PyObject *name_array_struct, *name_mean, *name_variance;

/* Returns where an array's values are, if it has two axes and each row lies side by side; raises otherwise. */
static void *read_array(PyObject *array, int size, int flags, int64_t *rows, int64_t *columns, int64_t *row)
{
    PyObject *capsule = array ? PyObject_GetAttr(array, name_array_struct) : NULL;
    const ArrayInterface *lent = capsule ? PyCapsule_GetPointer(capsule, NULL) : NULL;
    void *values = NULL;
    if (lent && (lent->axes != 2 || lent->kind != 'f' || lent->size != size || (lent->flags & flags) != flags ||
                 (lent->shape[0] > 1 && lent->strides[0] % size) ||
                 (lent->shape[0] > 0 && lent->shape[1] > 1 && lent->strides[1] != size)))
        PyErr_Format(PyExc_ValueError, "it takes plain arrays of %d-byte floats, of two axes, rows side by side", size);
    else if (lent) {
        values = lent->data;
        *rows = lent->shape[0];
        *columns = lent->shape[1];
        *row = lent->strides[0] / size;
    }
    Py_XDECREF(capsule); /* who calls holds the array */
    return values;
}

static int read_part(PyObject *rows, int64_t columns, Part *part)
{
    PyObject *mean = PyObject_GetAttr(rows, name_mean), *variance = PyObject_GetAttr(rows, name_variance);
    int64_t width[2] = {columns, columns}, others = 0;
    *part = (Part){0};
    if (mean && variance)
        part->mean = read_array(mean, sizeof(float), PLAIN, &part->rows, &width[0], &part->mean_row);
    others = part->rows;
    if (part->mean && variance != Py_None)
        part->variance = read_array(variance, sizeof(float), PLAIN, &others, &width[1], &part->variance_row);
    if (!PyErr_Occurred() && (width[0] != columns || width[1] != columns || others != part->rows))
        PyErr_SetString(PyExc_ValueError, "there are as many means and variances in all rows");
    Py_XDECREF(mean);
    Py_XDECREF(variance);
    return PyErr_Occurred() ? -1 : 0;
}

FOR_EACH_PROCESSOR static void add_means(const float *restrict values, const double *restrict first,
                                         double *restrict sum, double *restrict squares, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const double apart = values[i] - first[i];
        sum[i] += apart;
        squares[i] += apart * apart;
    }
}

FOR_EACH_PROCESSOR static void add_values(const float *restrict values, double *restrict sum, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        sum[i] += values[i];
}

/* Sums up some columns and standardises them; tells whether all sums are finite.
 *
 * constants: Three rows: whether a column is known, what is added to its mean, and by what all is divided then.
 */
FOR_EACH_PROCESSOR static int add_up_columns(const Part *parts, Py_ssize_t count, int64_t samples,
                                             const double *constants, int64_t row, int64_t start, int64_t width,
                                             Moments to)
{
    double first[WIDTH], sum[WIDTH] = {0}, squares[WIDTH] = {0}, within[WIDTH] = {0}, all = 0;
    for (int64_t i = 0; i < width; i++)
        first[i] = parts[0].mean[start + i];
    for (const Part *part = parts; part < parts + count; part++)
        for (int64_t r = 0; r < part->rows; r++) {
            add_means(part->mean + r * part->mean_row + start, first, sum, squares, width);
            if (part->variance)
                add_values(part->variance + r * part->variance_row + start, within, width);
        }
    const double *known = constants + start, *offset = known + row, *scale = offset + row;
    for (int64_t i = 0; i < width; i++) {
        const double average = sum[i] / (double)samples, apart = squares[i] - sum[i] * average;
        all += first[i] + squares[i] + within[i];
        to.count[start + i] = known[i] ? samples : 0;
        to.mean[start + i] = (first[i] + average + offset[i]) / scale[i];
        to.squares[start + i] = (apart > 0 ? apart : 0) / (scale[i] * scale[i]);
        to.within[start + i] = within[i] / (scale[i] * scale[i]) / (double)samples;
    }
    return all - all == 0;
}

static PyObject *add_up(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    (void)module;
    if (given != 3 || !PyList_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "add_up() takes a list of rows, constants, and where the moments go");
        return NULL;
    }
    int64_t samples = 0, rows[2], columns[2], row[2];
    const double *constants = read_array(arguments[1], sizeof(double), PLAIN, &rows[0], &columns[0], &row[0]);
    double *to = NULL;
    if (constants)
        to = read_array(arguments[2], sizeof(double), PLAIN | WRITEABLE, &rows[1], &columns[1], &row[1]);
    if (to && (rows[0] != 3 || rows[1] != 4 || columns[0] != columns[1] || row[1] < columns[1]))
        PyErr_SetString(PyExc_ValueError, "there are three constants of each column, and four moments");
    const Py_ssize_t count = PyList_Size(arguments[0]);
    Part *parts = PyErr_Occurred() ? NULL : PyMem_Calloc(count + 1, sizeof(Part));
    if (!parts)
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    Py_ssize_t filled = 0;
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++)
        if (read_part(PyList_GetItem(arguments[0], i), columns[0], &parts[filled]) == 0 && parts[filled].rows)
            samples += parts[filled++].rows;
    int finite = filled && !PyErr_Occurred();
    if (finite) {
        const Moments moments = {(int64_t *)to, to + row[1], to + 2 * row[1], to + 3 * row[1]};
        PyThreadState *state = PyEval_SaveThread();
        for (int64_t start = 0; start < columns[0]; start += WIDTH) {
            const int64_t left = columns[0] - start, width = left < WIDTH ? left : WIDTH;
            finite &= add_up_columns(parts, filled, samples, constants, row[0], start, width, moments);
        }
        PyEval_RestoreThread(state);
    }
    PyMem_Free(parts);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(finite);
}

/* Reads where four tensors are that hold moments; they have to be plain ones, all as long. */
static int read_moments(PyObject *tensors, Moments *moments, int64_t *columns)
{
    View view[4];
    if (!PyTuple_Check(tensors) || PyTuple_Size(tensors) != 4)
        return 0;
    for (int i = 0; i < 4; i++)
        if (!memory_of(PyTuple_GetItem(tensors, i), &view[i]) || view[i].axes != 1 || count_of(&view[i]) < 0 ||
            view[i].kind != (i ? FLOAT64 : INT64) || view[i].shape[0] != view[0].shape[0])
            return 0;
    *columns = view[0].shape[0];
    *moments = (Moments){(int64_t *)view[0].values, (double *)view[1].values, (double *)view[2].values,
                         (double *)view[3].values};
    return 1;
}

FOR_EACH_PROCESSOR static void merge_columns(Moments a, Moments b, Moments to, int64_t columns)
{
    for (int64_t i = 0; i < columns; i++) {
        const int64_t count = a.count[i] + b.count[i];
        const double share = (double)b.count[i] / (double)(count ? count : 1), apart = b.mean[i] - a.mean[i];
        to.count[i] = count;
        to.mean[i] = a.mean[i] + apart * share;
        to.squares[i] = a.squares[i] + b.squares[i] + apart * apart * (double)a.count[i] * share;
        to.within[i] = a.within[i] + (b.within[i] - a.within[i]) * share;
    }
}

static PyObject *merge_moments(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    (void)module;
    Moments moments[3];
    int64_t columns[3];
    if (given != 3) {
        PyErr_SetString(PyExc_TypeError, "merge_moments() takes two tuples of moments, and where those of both go");
        return NULL;
    }
    for (int i = 0; i < 3; i++)
        if (!read_moments(arguments[i], &moments[i], &columns[i]) || columns[i] != columns[0])
            return PyBool_FromLong(0);
    merge_columns(moments[0], moments[1], moments[2], columns[0]);
    return PyBool_FromLong(1);
}

PyMethodDef rows_methods[] = {
    {"add_up", (PyCFunction)(void (*)(void))add_up, METH_FASTCALL,
     "Sum rows up and standardise them: count, mean, squared deviations, mean variance. Tell whether all is finite."},
    {"merge_moments", (PyCFunction)(void (*)(void))merge_moments, METH_FASTCALL,
     "Merge count, mean, squared deviations and mean variance of two stretches; tell whether they are plain enough."},
    {NULL, NULL, 0, NULL},
};

int init_rows(void)
{
    name_array_struct = PyUnicode_InternFromString("__array_struct__");
    name_mean = PyUnicode_InternFromString("mean");
    name_variance = PyUnicode_InternFromString("variance");
    return name_array_struct && name_mean && name_variance ? 0 : -1;
}
