/* The forward that a thread is in, and the quick way of its layers to their slots. */
#include "native.h"
#include <time.h>

/* One that is not over yet; another model's may be called in the midst of it. */
typedef struct Forward {
    struct Forward *outer;
    PyObject *owner, *record, *slots; /* the record weakly: it is over, or was given up, when nobody has that any more */
    long long turn, taken;
    int timed;
    double spent;
} Forward;

static _Thread_local Forward *current;

typedef struct {
    PyObject_HEAD
    PyObject *owner;
    Py_ssize_t index;
    uint32_t ranks;
} Glance;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void leave(Forward **place)
{
    Forward *forward = *place;
    *place = forward->outer;
    Py_DECREF(forward->owner);
    Py_DECREF(forward->record);
    Py_DECREF(forward->slots);
    PyMem_Free(forward);
}

static int is_given_up(const Forward *forward) { return PyWeakref_GetObject(forward->record) == Py_None; }

static PyObject *begin(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 5 || !PyList_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "begin() takes an owner, a record, a list of slots, a turn, and whether to time it");
        return NULL;
    }
    long long turn = PyLong_AsLongLong(arguments[3]);
    int timed = PyObject_IsTrue(arguments[4]);
    if (timed < 0 || turn < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "turns are counted from 0");
        return NULL;
    }
    for (Forward **place = &current; *place;)
        if (is_given_up(*place) || (*place)->owner == arguments[0])
            leave(place);
        else
            place = &(*place)->outer;
    PyObject *record = PyWeakref_NewRef(arguments[1], NULL);
    Forward *forward = record ? PyMem_Malloc(sizeof(Forward)) : NULL;
    if (!forward) {
        Py_XDECREF(record);
        return record ? PyErr_NoMemory() : NULL;
    }
    Py_INCREF(arguments[0]);
    Py_INCREF(arguments[2]);
    *forward = (Forward){current, arguments[0], record, arguments[2], turn, 0, timed, 0};
    current = forward;
    Py_RETURN_NONE;
}

static PyObject *end(PyObject *module, PyObject *owner)
{
    (void)module;
    Forward **place = &current; /* those before it may have been given up */
    while (*place && (*place)->owner != owner)
        place = &(*place)->outer;
    if (!*place)
        return Py_BuildValue("id", 0, 0.0);
    PyObject *seen = Py_BuildValue("Ld", (*place)->taken, (*place)->spent);
    leave(place);
    return seen;
}

static PyObject *Glance_at(Glance *glance, PyObject *x)
{
    Forward *forward = current;
    if (!forward || forward->owner != glance->owner || is_given_up(forward) ||
        glance->index >= PyList_Size(forward->slots))
        return PyBool_FromLong(0);
    PyObject *slot = PyList_GetItem(forward->slots, glance->index);
    if (!slot || !is_slot(slot))
        return slot ? PyBool_FromLong(0) : NULL;
    const double began = forward->timed ? seconds() : 0;
    Py_INCREF(slot);
    const int taken = slot_take((Slot *)slot, x, forward->turn, glance->ranks);
    Py_DECREF(slot);
    if (current == forward) { /* code of others may have run, as where a mode of torch's is on */
        forward->taken += taken;
        if (forward->timed)
            forward->spent += seconds() - began;
    }
    return PyBool_FromLong(taken);
}

static int Glance_init(Glance *glance, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"owner", "index", "ranks", NULL};
    PyObject *owner, *ranks = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "On|O!", names, &owner, &glance->index, &PyTuple_Type, &ranks))
        return -1;
    glance->ranks = ranks ? 0 : ANY_RANK;
    for (Py_ssize_t i = 0; ranks && i < PyTuple_Size(ranks); i++) {
        const long rank = PyLong_AsLong(PyTuple_GetItem(ranks, i));
        if (PyErr_Occurred())
            return -1;
        glance->ranks |= rank >= 0 && rank <= MOST_AXES ? 1u << rank : 0;
    }
    Py_INCREF(owner);
    Py_XDECREF(glance->owner);
    glance->owner = owner;
    return 0;
}

static void Glance_dealloc(Glance *glance)
{
    Py_XDECREF(glance->owner);
    free_object((PyObject *)glance);
}

static const char Glance_doc[] =
    "Looks at what enters a layer in the forward that the thread is in, if it is one of the owner's.\n\n"
    "Args:\n"
    "    owner: What has to have begun the forward.\n"
    "    index: Which of the forward's slots the layer has.\n"
    "    ranks: Numbers of axes that its input may have; any, if not given.";

static PyMethodDef Glance_methods[] = {
    {"at", (PyCFunction)Glance_at, METH_O, "Take an input down in its slot; tell whether that could be done."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Glance_slots[] = {{Py_tp_init, Glance_init},
                                     {Py_tp_dealloc, Glance_dealloc},
                                     {Py_tp_methods, Glance_methods},
                                     {Py_tp_doc, (void *)Glance_doc},
                                     {0, NULL}};

static PyType_Spec Glance_spec = {"guardserve.native.Glance", sizeof(Glance), 0, Py_TPFLAGS_DEFAULT, Glance_slots};

PyMethodDef forward_methods[] = {
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL,
     "Begin a forward in this thread: its owner, its record, the slots of its layers, its turn, and whether to time it."},
    {"end", end, METH_O, "End one of an owner's; return how many of its layers were looked at, and the seconds it took."},
    {NULL, NULL, 0, NULL},
};

int init_forwards(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&Glance_spec);
    return type ? PyModule_AddObject(module, "Glance", type) : -1;
}
