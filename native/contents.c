/* What tensors hold, in a number each. */
#include "native.h"

#define DEFINE_SUM(TYPE)                                                                                               \
    FOR_EACH_PROCESSOR static int64_t sum_##TYPE(const TYPE *values, int64_t count)                                    \
    {                                                                                                                  \
        uint64_t sum = 0;                                                                                              \
        for (int64_t i = 0; i < count; i++)                                                                            \
            sum += (uint64_t)values[i];                                                                                \
        return (int64_t)sum;                                                                                           \
    }

DEFINE_SUM(int16_t)
DEFINE_SUM(int32_t)
DEFINE_SUM(int64_t)

static int64_t sum_of(const View *view, int64_t count)
{
    if (view->kind == FLOAT32)
        return sum_int32_t(view->values, count);
    if (view->kind == FLOAT64 || view->kind == INT64)
        return sum_int64_t(view->values, count);
    return sum_int16_t(view->values, count);
}

static PyObject *bit_sum(PyObject *module, PyObject *x)
{
    (void)module;
    View view;
    int64_t count = memory_of(x, &view) ? count_of(&view) : -1;
    if (count < 0)
        Py_RETURN_NONE;
    PyThreadState *state = count >= LONG ? PyEval_SaveThread() : NULL;
    int64_t sum = sum_of(&view, count);
    if (state)
        PyEval_RestoreThread(state);
    return PyLong_FromLongLong(sum);
}

PyMethodDef contents_methods[] = {
    {"bit_sum", bit_sum, METH_O,
     "Sum a tensor's bit patterns; None if it is not one of usual values side by side on the CPU."},
    {NULL, NULL, 0, NULL},
};
