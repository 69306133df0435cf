/* What is done for every forward, or every layer of one, in the place of Python's operations or torch's.
 *
 * Each of these takes tens of microseconds where caches hold other things, as they do between the layers of a model and
 * behind its last one, however little it does.
 */
#include "native.h"

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "guardserve.native", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (!module || init_tensors() < 0 || init_modes() < 0 || init_rows() < 0 || init_slots(module) < 0 ||
        init_forwards(module) < 0)
        return NULL;
    PyMethodDef *const methods[] = {contents_methods, finite_methods, modes_methods, forward_methods, rows_methods};
    for (size_t i = 0; i < sizeof(methods) / sizeof(*methods); i++)
        if (PyModule_AddFunctions(module, methods[i]) < 0)
            return NULL;
    return module;
}
