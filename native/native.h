/* What the files of this module share. */
#ifndef GUARDSERVE_NATIVE_H
#define GUARDSERVE_NATIVE_H

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

/* glibc chooses among these when the module is loaded, by what the processor can do: of whatever make it is */
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define LONG (1 << 16) /* values from which on other threads may run meanwhile */
#define MOST_AXES 8

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, INT64 };

/* A tensor's values in memory. */
typedef struct {
    const void *values;
    int kind, axes;
    const int64_t *shape, *stride;
    int64_t held[2 * MOST_AXES]; /* these two, where the tensor did not lend them */
} View;

/* Looks at a tensor; tells whether it is a plain one of such values that are in memory, on the CPU. Raises nothing. */
int memory_of(PyObject *x, View *view);

/* Tells whether they are floats too. */
int view_of(PyObject *x, View *view);

/* Returns how many values a tensor has if they lie one after the other, else -1. */
int64_t count_of(const View *view);

/* Reads a tuple of numbers; returns how many they are, -1 on an error: there may be MOST_AXES. */
int read_numbers(PyObject *tuple, int64_t *numbers);

/* What is read of activations of one shape and layout: some of the positions of each sample, others in each turn. */
typedef struct {
    PyObject_HEAD
    PyObject *memory[2]; /* of strip and axis */
    int rank;
    int64_t shape[MOST_AXES], stride[MOST_AXES];
    int64_t samples, outer, channels, apart;
    const int64_t *strip, *axis;
    int64_t strips, length, step, axes, rowed, positions, turning, row, hop, behind;
    double share;
} Cells;

/* Where a layer of a forward writes down what it shows. */
typedef struct {
    PyObject_HEAD
    PyObject *memory;
    Cells *cells;
    const float *anchor;
    float *mean, *variance;
    int64_t row;
    long long turn;
} Slot;

#define ANY_RANK UINT32_MAX /* one bit for each */

/* Takes down what an activation shows in a turn, if it has one of some ranks, is of the slot's kind and is the first that
   is; tells whether. Raises nothing. */
int slot_take(Slot *slot, PyObject *x, long long turn, uint32_t ranks);
int is_slot(PyObject *object);

void sum_up(const Slot *slot, const void *x, int kind, long long turn);

void free_object(PyObject *self); /* of a type that a spec made */

int init_tensors(void);
int init_modes(void);
int init_rows(void);
int init_slots(PyObject *module);
int init_forwards(PyObject *module);

extern PyMethodDef contents_methods[], finite_methods[], modes_methods[], forward_methods[], rows_methods[];

#endif
