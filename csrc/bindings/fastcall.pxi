# Methods without an argument tuple, for the hot paths.
#
# Under the limited API of CPython 3.11 Cython gives every method METH_VARARGS: a tuple, and for
# keywords a dictionary, a call; 50 to 100 ns. METH_FASTCALL is in that API, so the few methods where
# it counts are put into their type by hand, over the ordinary ones, which serve where that fails.
from cpython.object cimport PyObject

cdef extern from "Python.h":
    ctypedef struct PyMethodDef:
        const char *ml_name
        void *ml_meth
        int ml_flags
        const char *ml_doc
    enum:
        METH_FASTCALL
        METH_KEYWORDS
    object PyDescr_NewMethod(type owner, PyMethodDef *method)
    Py_ssize_t tuple_size "PyTuple_Size"(PyObject *values) noexcept
    PyObject *tuple_item "PyTuple_GetItem"(PyObject *values, Py_ssize_t i) noexcept

cdef enum:
    FAST_MAX = 6

# Signatures, made once: the names are interned, as those of every call site are.
cdef class _Names:
    cdef tuple names
    cdef Py_ssize_t required
    cdef Py_ssize_t positional
    cdef str function

    def __cinit__(self, str function, tuple names, Py_ssize_t required, Py_ssize_t positional):
        from sys import intern
        self.function = function
        self.names = tuple(intern(name) for name in names)
        self.required = required
        self.positional = positional


cdef int take_arguments(_Names n, PyObject **values, PyObject *const *args, Py_ssize_t nargs,
                        PyObject *kwnames) except -1:
    """Spread a call's arguments (borrowed) over `values`, NULL where one is absent."""
    cdef Py_ssize_t i, j, total
    cdef PyObject *name
    if nargs > n.positional:
        raise TypeError(f"{n.function}() takes at most {n.positional} positional arguments, "
                        f"found {nargs}")
    for i in range(FAST_MAX):
        values[i] = args[i] if i < nargs else NULL
    if kwnames != NULL:
        total = tuple_size(<PyObject *>n.names)
        for j in range(tuple_size(kwnames)):
            name = tuple_item(kwnames, j)
            for i in range(total):
                if tuple_item(<PyObject *>n.names, i) == name:
                    break
            else:
                i = total
            if i == total:
                i = slow_index(n, <object>name)
            if values[i] != NULL:
                raise TypeError(f"{n.function}() got multiple values for {<object>name!r}")
            values[i] = args[nargs + j]
    for i in range(n.required):
        if values[i] == NULL:
            raise TypeError(f"{n.function}() misses argument {n.names[i]!r}")
    return 0


cdef Py_ssize_t slow_index(_Names n, name) except -1:
    """A name that is not interned, or not one of ours."""
    for i, known in enumerate(n.names):
        if known == name:
            return i
    raise TypeError(f"{n.function}() got an unexpected keyword argument {name!r}")


cdef int put_method(type owner, PyMethodDef *method, const char *name, void *function,
                    const char *doc) except -1:
    method.ml_name = name
    method.ml_meth = function
    method.ml_flags = METH_FASTCALL | METH_KEYWORDS
    method.ml_doc = doc
    try:
        setattr(owner, name.decode(), PyDescr_NewMethod(owner, method))
    except TypeError:
        pass  # an immutable type: it keeps its ordinary method
    return 0
