/* Walks through what a guard watches of each module, whose memory a forward has driven from the caches. */
#include "native.h"

static PyObject *name_training;

static PyObject *is_training(PyObject *module, PyObject *attributes)
{
    (void)module;
    Py_ssize_t count = PyList_Size(attributes);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *owner = PyList_GetItem(attributes, i), *flag;
        if (!owner)
            return NULL;
        if (PyDict_CheckExact(owner)) {
            flag = PyDict_GetItemWithError(owner, name_training);
            if (flag == Py_False)
                continue;
            if (!flag && !PyErr_Occurred())
                PyErr_SetObject(PyExc_KeyError, name_training);
            Py_XINCREF(flag);
        }
        else {
            Py_INCREF(owner); /* code of others runs */
            flag = PyObject_GetItem(owner, name_training);
            Py_DECREF(owner);
        }
        int training = flag ? PyObject_IsTrue(flag) : -1;
        Py_XDECREF(flag);
        if (training)
            return training < 0 ? NULL : PyBool_FromLong(1);
        count = PyList_Size(attributes);
    }
    return count < 0 ? NULL : PyBool_FromLong(0);
}

static PyObject *hold_only(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    (void)module;
    if (given != 2 || !PyList_Check(arguments[0]) || !PyTuple_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "hold_only() takes a list of dicts and a tuple");
        return NULL;
    }
    PyObject *dicts = arguments[0], *values = arguments[1], *key, *value;
    Py_ssize_t count = PyList_Size(dicts), expected = PyTuple_Size(values), found = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *dict = PyList_GetItem(dicts, i);
        Py_ssize_t place = 0;
        while (PyDict_Next(dict, &place, &key, &value))
            if (found == expected || PyTuple_GetItem(values, found++) != value)
                return PyBool_FromLong(0);
    }
    return PyBool_FromLong(found == expected);
}

PyMethodDef modes_methods[] = {
    {"is_training", is_training, METH_O, "Tell whether any of a list of mappings has a true \"training\"."},
    {"hold_only", (PyCFunction)(void (*)(void))hold_only, METH_FASTCALL,
     "Tell whether the values of dicts are those of a tuple, in order, and no others."},
    {NULL, NULL, 0, NULL},
};

int init_modes(void)
{
    name_training = PyUnicode_InternFromString("training");
    return name_training ? 0 : -1;
}
