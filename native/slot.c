/* What is read of layers, and where it goes. */
#include "native.h"
#include <stddef.h>
#include <string.h>
#include <structmember.h>

static PyTypeObject *cells_type, *slot_type;

void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Tells whether a turn reads of the axes of positions only what they have. */
static int is_in_step(const Cells *cells, Py_ssize_t numbers)
{
    const int64_t *axis = cells->axis, *end = axis + numbers;
    for (int64_t i = 0; i < cells->axes; i++) {
        if (end - axis < 2 || axis[0] < 1 || axis[1] < 1 || end - axis < 2 + axis[0] + axis[1])
            return 0;
        for (int64_t j = 0; j < axis[0]; j++)
            if (axis[2 + j] < 0 || axis[2 + j] >= axis[1])
                return 0;
        axis += 2 + axis[0] + axis[1];
    }
    return axis == end && cells->rowed >= 0 && cells->rowed <= cells->axes;
}

static int Cells_init(Cells *cells, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"shape", "stride",    "samples", "outer", "strips", "length", "step", "axes",
                            "rowed", "positions", "turning", "row",   "hop",    "behind", NULL};
    PyObject *shape, *stride, *strips, *axes;
    long long samples, outer, length, step, rowed, positions, turning, row, hop, behind;
    if (cells->memory[0]) {
        PyErr_SetString(PyExc_TypeError, "cells are made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!O!LLSLLSLLLLLL", names, &PyTuple_Type, &shape, &PyTuple_Type,
                                     &stride, &samples, &outer, &strips, &length, &step, &axes, &rowed, &positions,
                                     &turning, &row, &hop, &behind))
        return -1;
    cells->rank = read_numbers(shape, cells->shape);
    if (cells->rank < 0 || read_numbers(stride, cells->stride) != cells->rank || cells->rank < 2) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "shape and stride need two axes or more, each the same number");
        return -1;
    }
    const int64_t *axis = (const int64_t *)PyBytes_AsString(axes);
    const Py_ssize_t numbers = PyBytes_Size(axes) / (Py_ssize_t)sizeof(int64_t);
    cells->channels = cells->shape[1];
    cells->apart = cells->stride[1];
    cells->samples = samples;
    cells->outer = outer;
    cells->strip = (const int64_t *)PyBytes_AsString(strips);
    cells->strips = PyBytes_Size(strips) / (Py_ssize_t)sizeof(int64_t);
    cells->length = length;
    cells->step = step;
    cells->share = 1.0 / (double)(cells->strips * length);
    cells->axis = axis;
    cells->axes = 0;
    for (Py_ssize_t i = 0; i + 1 < numbers && axis[i] > 0 && axis[i + 1] > 0; i += 2 + axis[i] + axis[i + 1])
        cells->axes++;
    cells->rowed = rowed;
    cells->positions = positions;
    cells->turning = turning;
    cells->row = row;
    cells->hop = hop;
    cells->behind = behind;
    if (positions < 1 || row < 1 || !is_in_step(cells, numbers)) {
        PyErr_SetString(PyExc_ValueError, "axes do not say how positions are shared out");
        return -1;
    }
    Py_INCREF(strips);
    Py_INCREF(axes);
    cells->memory[0] = strips;
    cells->memory[1] = axes;
    return 0;
}

static void Cells_dealloc(Cells *cells)
{
    Py_XDECREF(cells->memory[0]);
    Py_XDECREF(cells->memory[1]);
    free_object((PyObject *)cells);
}

static const char Cells_doc[] =
    "What is read of activations of one shape and layout.\n\n"
    "Args:\n"
    "    shape: Their shape, ``(rows, C, *positions)``.\n"
    "    stride: Their strides.\n"
    "    samples: N.\n"
    "    outer: How far samples are from each other, in values.\n"
    "    strips: Where strips of positions begin in a cell, int64, likewise, the first at 0.\n"
    "    length: Positions of each strip.\n"
    "    step: How far they are from each other.\n"
    "    axes: Of each axis of positions, int64: its size, its number of parts, the part that each index is in, and how\n"
    "        far each part is from the first.\n"
    "    rowed: How many of the last axes the cells of a row share out.\n"
    "    positions: Number of positions.\n"
    "    turning: How far the position that chooses the first sample's cell moves from turn to turn.\n"
    "    row: Cells in a row.\n"
    "    hop: How many of them the next sample's is on.\n"
    "    behind: How far they are from each other.";

static PyType_Slot Cells_slots[] = {
    {Py_tp_init, Cells_init}, {Py_tp_dealloc, Cells_dealloc}, {Py_tp_doc, (void *)Cells_doc}, {0, NULL}};

static PyType_Spec Cells_spec = {"guardserve.native.Cells", sizeof(Cells), 0, Py_TPFLAGS_DEFAULT, Cells_slots};

int is_slot(PyObject *object) { return Py_TYPE(object) == slot_type; }

int slot_take(Slot *slot, PyObject *x, long long turn, uint32_t ranks)
{
    const Cells *cells = slot->cells;
    if (!cells || turn == slot->turn) /* it was never made, or has taken one */
        return 0;
    const size_t size = (size_t)cells->rank * sizeof(int64_t);
    View view;
    if (!(ranks >> cells->rank & 1) || !view_of(x, &view) || view.kind == FLOAT64 ||
        view.axes != cells->rank || memcmp(view.shape, cells->shape, size) || memcmp(view.stride, cells->stride, size))
        return 0;
    const int64_t values = cells->samples * cells->channels * cells->strips * cells->length;
    PyThreadState *state = values >= LONG ? PyEval_SaveThread() : NULL;
    sum_up(slot, view.values, view.kind, turn);
    if (state)
        PyEval_RestoreThread(state);
    slot->turn = turn;
    return 1;
}

static PyObject *Slot_take(Slot *slot, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "take() takes a tensor and a turn");
        return NULL;
    }
    long long turn = PyLong_AsLongLong(arguments[1]);
    if (turn < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "turns are counted from 0");
        return NULL;
    }
    return PyBool_FromLong(slot_take(slot, arguments[0], turn, ANY_RANK));
}

static int Slot_init(Slot *slot, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"cells", "anchor", "mean", "variance", "row", "memory", NULL};
    PyObject *cells, *memory;
    long long row;
    unsigned long long anchor, mean, variance;
    if (slot->memory) {
        PyErr_SetString(PyExc_TypeError, "a slot is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!KKKLO", names, cells_type, &cells, &anchor, &mean, &variance,
                                     &row, &memory))
        return -1;
    if (!((Cells *)cells)->memory[0]) {
        PyErr_SetString(PyExc_ValueError, "these cells are of nothing");
        return -1;
    }
    Py_INCREF(cells);
    Py_INCREF(memory);
    slot->cells = (Cells *)cells;
    slot->memory = memory;
    slot->anchor = (const float *)(uintptr_t)anchor;
    slot->mean = (float *)(uintptr_t)mean;
    slot->variance = (float *)(uintptr_t)variance;
    slot->row = row;
    slot->turn = -1;
    return 0;
}

static void Slot_dealloc(Slot *slot)
{
    Py_XDECREF(slot->cells);
    Py_XDECREF(slot->memory);
    free_object((PyObject *)slot);
}

static const char Slot_doc[] =
    "Where a layer of a forward writes down what it shows.\n\n"
    "Args:\n"
    "    cells: What is read of it.\n"
    "    anchor: Address of what is taken off, C values of float32.\n"
    "    mean: Address of where the first sample's means over positions go, float32.\n"
    "    variance: Likewise of the variances; 0 for none.\n"
    "    row: How far behind these the next sample's are.\n"
    "    memory: What the addresses are of, to keep.\n\n"
    "Attributes:\n"
    "    turn: The forward that it has last taken something of; -1 before the first.";

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

static PyType_Slot Slot_slots[] = {
    {Py_tp_init, Slot_init},       {Py_tp_dealloc, Slot_dealloc},   {Py_tp_methods, Slot_methods},
    {Py_tp_members, Slot_members}, {Py_tp_doc, (void *)Slot_doc}, {0, NULL},
};

static PyType_Spec Slot_spec = {"guardserve.native.Slot", sizeof(Slot), 0, Py_TPFLAGS_DEFAULT, Slot_slots};

int init_slots(PyObject *module)
{
    cells_type = (PyTypeObject *)PyType_FromSpec(&Cells_spec);
    slot_type = (PyTypeObject *)PyType_FromSpec(&Slot_spec);
    if (!cells_type || !slot_type || PyModule_AddObject(module, "Cells", (PyObject *)cells_type) < 0 ||
        PyModule_AddObject(module, "Slot", (PyObject *)slot_type) < 0)
        return -1;
    Py_INCREF(cells_type); /* the module has taken the first */
    Py_INCREF(slot_type);
    return 0;
}
