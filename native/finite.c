/* Whether values are numbers. */
#include "native.h"

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

static PyObject *is_finite(PyObject *module, PyObject *x)
{
    (void)module;
    View view;
    int64_t count = view_of(x, &view) ? count_of(&view) : -1;
    if (count < 0)
        Py_RETURN_NONE;
    PyThreadState *state = count >= LONG ? PyEval_SaveThread() : NULL;
    int finite;
    if (view.kind == FLOAT32)
        finite = are_finite_uint32_t(view.values, count, 0x7f800000);
    else if (view.kind == FLOAT64)
        finite = are_finite_uint64_t(view.values, count, 0x7ff0000000000000);
    else
        finite = are_finite_uint16_t(view.values, count, view.kind == FLOAT16 ? 0x7c00 : 0x7f80);
    if (state)
        PyEval_RestoreThread(state);
    return PyBool_FromLong(finite);
}

PyMethodDef finite_methods[] = {
    {"is_finite", is_finite, METH_O,
     "Tell whether a tensor holds neither NaN nor infinity; None if it is not one of floats side by side on the CPU."},
    {NULL, NULL, 0, NULL},
};
