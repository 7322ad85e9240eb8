# Frames: typed values to bytes and back, by a plan that is made once for each signature
# (pyenclave/calls/signature.py). docs/formats/ring.md gives the bytes; docs/types.md the types.
# What both directions use is here; writing, reading and plans are included at the end.
from cpython.bool cimport PyBool_Check
from cpython.bytearray cimport (
    PyByteArray_AsString, PyByteArray_FromStringAndSize, PyByteArray_Size)
from cpython.float cimport PyFloat_AsDouble, PyFloat_Check
from cpython.long cimport PyLong_Check
from cpython.ref cimport Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_GetItem, PyTuple_Size
from libc.stdlib cimport calloc, free, malloc, realloc

cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX
    int PyIndex_Check(object o)
    object PyNumber_Index(object o)
    long long PyLong_AsLongLongAndOverflow(object o, int *overflow) except? -1
    unsigned long long PyLong_AsUnsignedLongLong(object o) except? 0xffffffffffffffff
    # For exact types, whose conversion cannot fail; and results that go straight into a tuple.
    bint PyLong_CheckExact(object o)
    bint PyFloat_CheckExact(object o)
    long long exact_long "PyLong_AsLongLongAndOverflow"(object o, int *overflow) noexcept
    double exact_float "PyFloat_AsDouble"(object o) noexcept
    PyObject *new_int "PyLong_FromLongLong"(long long value) except NULL
    PyObject *new_big_int "PyLong_FromUnsignedLongLong"(unsigned long long value) except NULL
    PyObject *new_float "PyFloat_FromDouble"(double value) except NULL
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    PyObject *new_text "PyUnicode_DecodeUTF8"(const char *data, Py_ssize_t size,
                                              const char *errors) except NULL
    object new_tuple "PyTuple_New"(Py_ssize_t size)
    int give_item "PyTuple_SetItem"(object values, Py_ssize_t i, PyObject *value) except -1
    void Py_DECREF(PyObject *o) noexcept
    const char *PyUnicode_AsUTF8AndSize(object o, Py_ssize_t *size) except NULL
    Py_ssize_t Py_REFCNT(PyObject *o)
    PyObject *PyList_GetItem(object list, Py_ssize_t i) except NULL
    object PyUnicode_DecodeUTF8(const char *data, Py_ssize_t size, const char *errors)
    int PyObject_CheckBuffer(object o)

cdef extern from "pyenclave.h" nogil:
    ctypedef struct pye_segment:
        const uint8_t *data
        size_t len
    uint64_t MAX_ITEMS "PYE_MSGPACK_MAX_ITEMS"
    pye_status pye_msgpack_check(const uint8_t *data, size_t length, uint32_t max_depth)
    uint32_t pye_index_mask(uint32_t index, uint32_t num)

# Plans with more arrays, or more parameters where some may be left out, are refused.
cdef enum:
    MAX_ARRAYS = 16
    MAX_OPTIONAL = 32
    MAX_NDIM = 32
    MAX_DEPTH = 32
    MAX_ITEM_SIZE = 65536   # bytes of one element
    BOOLS = 1               # code of |b1
    OCTETS = 3              # code of |u1
    DATES = 15              # code of the first date; all from here on have 8 bytes
    NUM_TYPES = 41
    SMALL = 512
    ALIGN = 64
    SHARED = 0x80           # bit of a number of dimensions: the elements are in shared memory
    NO_GIL = 16384          # bytes from which on a copy is made without the GIL

FRAME_MAX_ARRAYS = MAX_ARRAYS
FRAME_MAX_OPTIONAL = MAX_OPTIONAL
FRAME_MAX_ITEM_SIZE = MAX_ITEM_SIZE

# The element types that cross, by the code they have in a frame; native byte order is little.
ARRAY_TYPES = (
    "", "|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8",
    "<c16",
    "<M8[Y]", "<M8[M]", "<M8[W]", "<M8[D]", "<M8[h]", "<M8[m]", "<M8[s]", "<M8[ms]", "<M8[us]",
    "<M8[ns]", "<M8[ps]", "<M8[fs]", "<M8[as]",
    "<m8[Y]", "<m8[M]", "<m8[W]", "<m8[D]", "<m8[h]", "<m8[m]", "<m8[s]", "<m8[ms]", "<m8[us]",
    "<m8[ns]", "<m8[ps]", "<m8[fs]", "<m8[as]")
cdef int *ITEM_SIZES = [0, 1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 4, 8, 8, 16]

cdef uint8_t[ALIGN] ZEROES
memset(ZEROES, 0, ALIGN)

import sys as _sys

# NumPy, when the first array crosses: importing the core must do no work.
cdef object np_ndarray = None
cdef object np_asarray = None
cdef object np_contiguous = None
cdef object np_int64 = None
cdef object np_uint8 = None
cdef dict code_of_dtype = {}
cdef list dtype_of_code = []


cdef int need_numpy() except -1:
    global np_ndarray, np_asarray, np_contiguous, np_int64, np_uint8
    if np_ndarray is not None:
        return 0
    import numpy
    np_asarray = numpy.asarray
    np_contiguous = numpy.ascontiguousarray
    np_int64 = numpy.int64
    np_uint8 = numpy.uint8
    for code, name in enumerate(ARRAY_TYPES):
        dtype = numpy.dtype(name) if name else None
        dtype_of_code.append(dtype)
        if name:
            code_of_dtype[dtype] = code
    np_ndarray = numpy.ndarray
    return 0


cdef bint is_masked(object value) except -1:
    # Naming numpy.ma would import it, and inside an enclave it is not on every lock list; where it
    # was never imported there is no masked array.
    module = _sys.modules.get("numpy.ma")
    return module is not None and isinstance(value, module.MaskedArray)


cdef object argument_error(str name, str expected, object found, object advice=None):
    return _errors.ArgumentError(
        f"{name} does not fit its type", expected=expected, found=found, advice=advice)


cdef str type_name(object value):
    return type(value).__name__


# ---- shared memory -----------------------------------------------------------------------------

cdef struct Shared:         # memory that both sides map, as far as one message may speak of it
    uint8_t *data           # NULL: it may not
    uint64_t size
    uint64_t left           # bytes that references of the message may still name
    bint placed             # its frame says where the elements of the result go:
    uint64_t place          # from `data` on
    uint64_t room           # bytes there; 0: nowhere


cdef void shared_init(Shared *of, uint8_t *data, uint64_t size, bint placed) noexcept:
    of.data = data
    of.size = size
    of.left = size
    of.placed = placed
    of.place = 0
    of.room = 0


cdef bint is_within(uint64_t offset, uint64_t length, uint64_t size) noexcept nogil:
    """Whether `length` bytes from `offset` on are within `size`; no sum is formed (BND-02)."""
    return offset <= size and length <= size - offset


cdef void copy(uint8_t *to, const uint8_t *data, size_t length) noexcept:
    if length < NO_GIL:
        memcpy(to, data, length)
    else:
        with nogil:
            memcpy(to, data, length)


@cython.final
cdef class Scratch:
    """
    Private memory for arrays, used again once nothing refers to it any more.

    Fresh memory costs more than the copy into it: the kernel zeroes each page at its first touch.
    Of one thread; what it gave out may be dropped by any.
    """

    cdef list buffers
    cdef size_t kept
    cdef uint32_t quiet     # slices of waiting since it was used

    def __cinit__(self):
        self.buffers = []
        self.kept = 0
        self.quiet = 0

    cdef object take(self, size_t length):
        """Return a bytearray of at least `length` bytes and one line, whose content is anything."""
        cdef size_t want = length + ALIGN
        cdef size_t have
        cdef Py_ssize_t i
        self.quiet = 0
        for i in range(len(self.buffers)):
            have = <size_t>PyByteArray_Size(self.buffers[i])
            if want <= have <= 2 * want and self.is_free(i):
                return self.buffers[i]
        for i in range(len(self.buffers) - 1, -1, -1):
            if want > MOST_KEPT - self.kept and self.is_free(i):
                self.kept -= <size_t>PyByteArray_Size(self.buffers[i])
                del self.buffers[i]
        made = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>want)
        if want <= MOST_KEPT - self.kept and len(self.buffers) < MOST_BUFFERS:
            self.buffers.append(made)
            self.kept += want
        return made

    cdef bint is_free(self, Py_ssize_t i) except -1:
        """Whether the list has the only reference: no array, no memoryview, nobody reaches it."""
        return Py_REFCNT(PyList_GetItem(self.buffers, i)) == 1

    cdef void rest(self):
        """A slice of waiting is over: after some, unused memory is given back."""
        self.quiet += 1
        if self.quiet > QUIET and self.kept:
            self.buffers = []
            self.kept = 0


cdef enum:
    MOST_KEPT = 67108864    # bytes that a lane keeps
    MOST_BUFFERS = 64       # each is looked at for each array
    QUIET = 10              # slices


include "frame_write.pxi"
include "frame_read.pxi"
include "frame_plan.pxi"
