/* host_call.h - the type of objects that stand for a HostCall and are called without a tuple.
 *
 * Under the limited API of CPython 3.11 Cython gives every callable object tp_call: a tuple and a
 * dictionary a call. The flag and the member that say "call me by vector" are honoured by every
 * interpreter from 3.9 on and in the limited API from 3.12 on, which has the same values. */
#ifndef PYE_BINDINGS_HOST_CALL_H
#define PYE_BINDINGS_HOST_CALL_H

#include <Python.h>
#include <stddef.h>
#include <structmember.h>

#define HOST_CALL_VECTOR (1UL << 11)                                   /* Py_TPFLAGS_HAVE_VECTORCALL */
#define HOST_CALL_OFFSET ((size_t)1 << (8 * sizeof(size_t) - 1)) /* PY_VECTORCALL_ARGUMENTS_OFFSET */

/* `call`, `nargs` arguments, then the values of the names in the tuple `kwnames`, or NULL. */
typedef PyObject *(*host_call_function)(PyObject *call, PyObject *const *args, Py_ssize_t nargs,
                                        PyObject *kwnames);
typedef PyObject *(*host_call_vector)(PyObject *self, PyObject *const *args, size_t nargsf,
                                      PyObject *kwnames);

typedef struct {
    PyObject_HEAD
    host_call_vector vector;
    PyObject *call;
} host_call;

static host_call_function host_call_made;

static PyObject *host_call_by_vector(PyObject *self, PyObject *const *args, size_t nargsf,
                                     PyObject *kwnames)
{
    return host_call_made(((host_call *)(void *)self)->call, args,
                          (Py_ssize_t)(nargsf & ~HOST_CALL_OFFSET), kwnames);
}

static PyObject *host_call_by_tuple(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return PyObject_Call(((host_call *)(void *)self)->call, args, kwargs);
}

static PyObject *host_call_repr(PyObject *self)
{
    return PyObject_Repr(((host_call *)(void *)self)->call);
}

static PyObject *host_call_reduce(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyObject_CallMethod(((host_call *)(void *)self)->call, "__reduce__", NULL);
}

static PyObject *host_call_get(PyObject *self, void *name)
{
    return PyObject_GetAttrString(((host_call *)(void *)self)->call, (const char *)name);
}

static int host_call_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((host_call *)(void *)self)->call);
    return 0;
}

static void host_call_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    const freefunc give = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    Py_CLEAR(((host_call *)(void *)self)->call);
    give(self);
    Py_DECREF(type);
}

/* Once, for all. */
static PyObject *host_call_type(host_call_function function)
{
    static PyMethodDef methods[] = {
        {"__reduce__", host_call_reduce, METH_NOARGS, NULL},
        {NULL, NULL, 0, NULL},
    };
    static PyMemberDef members[] = {
        {"__vectorcalloffset__", T_PYSSIZET, offsetof(host_call, vector), READONLY, NULL},
        {NULL, 0, 0, 0, NULL},
    };
    static char name[] = "__name__";
    static char doc[] = "__doc__";
    static PyGetSetDef attributes[] = {
        {name, host_call_get, NULL, NULL, name},
        {doc, host_call_get, NULL, NULL, doc},
        {NULL, NULL, NULL, NULL, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_call, (void *)host_call_by_tuple},
        {Py_tp_repr, (void *)host_call_repr},
        {Py_tp_traverse, (void *)host_call_traverse},
        {Py_tp_dealloc, (void *)host_call_dealloc},
        {Py_tp_methods, (void *)methods},
        {Py_tp_members, (void *)members},
        {Py_tp_getset, (void *)attributes},
        {0, NULL},
    };
    static PyType_Spec spec = {
        "pyenclave._core.TrustedFunction", sizeof(host_call), 0,
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
            Py_TPFLAGS_DISALLOW_INSTANTIATION | HOST_CALL_VECTOR,
        slots,
    };

    host_call_made = function;
    return PyType_FromSpec(&spec);
}

/* A new object that is called as `call` is. */
static PyObject *host_call_new(PyObject *type, PyObject *call)
{
    host_call *self = (host_call *)(void *)PyType_GenericAlloc((PyTypeObject *)(void *)type, 0);

    if (self != NULL) {
        self->vector = host_call_by_vector;
        Py_INCREF(call);
        self->call = call;
    }
    return (PyObject *)self;
}

#endif
