# Frames: typed values to bytes and back, by a plan that is made once for each signature
# (pyenclave/calls/signature.py). docs/formats/ring.md gives the bytes; docs/types.md the types.
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


# ---- writing -----------------------------------------------------------------------------------

cdef struct Message:
    uint8_t *data           # the head; `small` or allocated
    size_t length
    size_t capacity
    uint64_t total          # of head, padding and arrays
    size_t num_segments
    int num_views
    uint32_t far            # bit i: view i is in shared memory, and only named
    bint fills              # the elements of its one array go to shared.place, if they are as many
    Shared shared
    pye_segment[33] segments         # 1 + 2 * MAX_ARRAYS
    Py_buffer[MAX_ARRAYS] views
    uint8_t[SMALL] small


cdef void message_init(Message *m) noexcept:
    m.data = m.small
    m.length = 0
    m.capacity = SMALL
    m.total = 0
    m.num_segments = 0
    m.num_views = 0
    m.far = 0
    m.fills = False
    shared_init(&m.shared, NULL, 0, False)


cdef void message_clear(Message *m) noexcept:
    cdef int i
    for i in range(m.num_views):
        PyBuffer_Release(&m.views[i])
    m.num_views = 0
    m.far = 0
    if m.data != m.small:
        free(m.data)
        m.data = m.small
    m.length = 0
    m.num_segments = 0


cdef uint8_t *room(Message *m, size_t more) except NULL:
    """Return where `more` bytes go, growing the head where needed."""
    cdef size_t want
    cdef uint8_t *data
    if more > <size_t>PY_SSIZE_T_MAX - m.length:
        raise MemoryError()
    if m.length + more > m.capacity:
        want = m.length + more
        if want < 2 * m.capacity:
            want = 2 * m.capacity
        if m.data == m.small:
            data = <uint8_t *>malloc(want)
            if data == NULL:
                raise MemoryError()
            memcpy(data, m.small, m.length)
        else:
            data = <uint8_t *>realloc(m.data, want)
            if data == NULL:
                raise MemoryError()
        m.data = data
        m.capacity = want
    data = m.data + m.length
    m.length += more
    return data


cdef int put_bytes(Message *m, const void *data, size_t length) except -1:
    cdef uint64_t size = length
    cdef uint8_t *at
    if length > <size_t>PY_SSIZE_T_MAX - 8:
        raise MemoryError()
    at = room(m, 8 + length)
    memcpy(at, &size, 8)
    if length:
        memcpy(at + 8, data, length)
    return 0


cdef int put_int(Message *m, object value, str name) except -1:
    cdef int overflow = 0
    cdef long long small
    cdef unsigned long long big
    cdef uint8_t *at
    if PyBool_Check(value) or not (PyLong_Check(value) or PyIndex_Check(value)):
        raise argument_error(name, "int", type_name(value))
    if not PyLong_Check(value):
        if hasattr(value, "shape") and value.shape != ():
            raise argument_error(name, "int", type_name(value))
        try:
            value = PyNumber_Index(value)
        except TypeError:
            raise argument_error(name, "int", type_name(value)) from None
    small = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow == 0:
        at = room(m, 9)
        at[0] = 0
        memcpy(at + 1, &small, 8)
        return 0
    if overflow > 0:
        try:
            big = PyLong_AsUnsignedLongLong(value)
        except OverflowError:
            pass
        else:
            at = room(m, 9)
            at[0] = 1
            memcpy(at + 1, &big, 8)
            return 0
    raise argument_error(
        name, "an int from -2**63 to 2**64-1", "one beyond", "Send larger numbers as bytes or str.")


cdef bint put_exact(Message *m, char code, object value) except -1:
    """Put a number of the very type that its code names; False: it is something else, or too big."""
    cdef int overflow = 0
    cdef long long small
    cdef double number
    cdef uint8_t *at
    if code == c"f" and PyFloat_CheckExact(value):
        number = exact_float(value)
        memcpy(room(m, 8), &number, 8)
        return True
    if code == c"i" and PyLong_CheckExact(value):
        small = exact_long(value, &overflow)
        if overflow:
            return False
        at = room(m, 9)
        at[0] = 0
        memcpy(at + 1, &small, 8)
        return True
    return False


cdef int put_float(Message *m, object value, str name) except -1:
    cdef double number
    cdef uint8_t *at
    if not PyFloat_Check(value):
        if PyBool_Check(value) or not (PyLong_Check(value) or hasattr(value, "__float__")) \
                or isinstance(value, (str, bytes, complex)) or getattr(value, "shape", ()) != ():
            raise argument_error(name, "float", type_name(value))
    try:
        number = PyFloat_AsDouble(value)
    except TypeError:
        raise argument_error(name, "float", type_name(value)) from None
    except OverflowError:
        raise argument_error(name, "float", "an int too large for one") from None
    at = room(m, 8)
    memcpy(at, &number, 8)
    return 0


cdef int put_array(Message *m, object value, int wanted, str name) except -1:
    """Put type and shape in the head, and keep the elements' buffer for the message's tail."""
    cdef int code
    need_numpy()
    if not isinstance(value, np_ndarray):
        raise argument_error(
            name, "a NumPy array", type_name(value), "Use numpy.asarray(...) on it.")
    if is_masked(value):
        raise argument_error(
            name, "a NumPy array", "a masked array", "Send .data and .mask as two arrays.")
    value = np_asarray(value)
    dtype = value.dtype
    found = code_of_dtype.get(dtype)
    if found is None:
        if code_of_dtype.get(dtype.newbyteorder("<")) is None:
            raise argument_error(
                name, "an array of bools, integers, floats, complex numbers or dates with a unit",
                f"dtype {dtype}",
                "Records and strings need their dtype in the annotation: "
                "Annotated[numpy.ndarray, numpy.dtype(...)].")
        value = value.astype(dtype.newbyteorder("<"))
        found = code_of_dtype[value.dtype]
    code = found
    if wanted and code != wanted:
        raise argument_error(
            name, f"an array of {dtype_of_code[wanted]}", f"one of {value.dtype}",
            f"Convert it: .astype('{dtype_of_code[wanted]}').")
    shape = value.shape
    if len(shape) > MAX_NDIM:
        raise argument_error(name, f"at most {MAX_NDIM} dimensions", len(shape))
    if not value.flags.c_contiguous:
        value = np_contiguous(value)
    if code >= DATES:  # NumPy lends no buffer of dates
        value = value.view(np_int64)
    room(m, 1)[0] = <uint8_t>code
    return put_elements(m, value, shape)


cdef int put_elements(Message *m, object value, tuple shape) except -1:
    """
    Put the shape, and keep the buffer of `value`, which is contiguous, for the message's tail.

    What lies in shared memory already is only named; what has a place there is copied there.
    """
    cdef Py_buffer *view = &m.views[m.num_views]
    cdef uint64_t place
    cdef uint64_t length
    PyObject_GetBuffer(value, view, PyBUF_SIMPLE)
    m.num_views += 1
    if m.shared.data != NULL:
        length = <uint64_t>view.len
        if m.fills:
            if length == m.shared.room:
                copy(m.shared.data + m.shared.place, <const uint8_t *>view.buf, <size_t>length)
                m.num_views -= 1
                PyBuffer_Release(view)
                return put_shape(m, shape, True, m.shared.place)
        else:
            # Of addresses elsewhere this is some number; it is within the size only if they are.
            place = <uint64_t>(<size_t>view.buf - <size_t>m.shared.data)
            if length and length <= m.shared.left and is_within(place, length, m.shared.size):
                m.shared.left -= length
                m.far |= (<uint32_t>1) << (m.num_views - 1)
                return put_shape(m, shape, True, place)
    return put_shape(m, shape, False, 0)


cdef int put_shape(Message *m, tuple shape, bint there, uint64_t place) except -1:
    cdef uint64_t count
    cdef uint8_t *at = room(m, 1 + 8 * <size_t>len(shape) + (8 if there else 0))
    at[0] = <uint8_t>(len(shape) | (SHARED if there else 0))
    at += 1
    for size in shape:
        count = size
        memcpy(at, &count, 8)
        at += 8
    if there:
        memcpy(at, &place, 8)
    return 0


cdef int put_described(Message *m, object value, object detail, str name) except -1:
    """As put_array, of what the signature describes: detail.prepare gives bytes and a shape."""
    need_numpy()
    data, shape = detail.prepare(value, name)
    return put_elements(m, data, shape)


# ---- reading -----------------------------------------------------------------------------------

cdef struct Reader:
    const uint8_t *data
    size_t length           # of the head
    size_t at
    size_t tail             # where the next array's elements are
    size_t total
    Shared *shared          # NULL: no array may be there
    PyObject *scratch       # where such are copied to; borrowed
    bint there              # the array whose shape was taken last is there,
    uint64_t place          # here, with all its elements


cdef void reader_init(Reader *r, const uint8_t *data, size_t length) noexcept:
    """Read private bytes that are all head, and speak of no shared memory."""
    r.data = data
    r.length = length
    r.at = 0
    r.tail = length
    r.total = length
    r.shared = NULL
    r.scratch = NULL


cdef object bad_frame(str what):
    return _errors.ArgumentError(f"malformed frame: {what}")


cdef const uint8_t *take(Reader *r, size_t length) except NULL:
    cdef const uint8_t *at
    if length > r.length - r.at:
        raise bad_frame("it ends early")
    at = r.data + r.at
    r.at += length
    return at


cdef const uint8_t *take_bytes(Reader *r, size_t *length) except NULL:
    cdef uint64_t size
    memcpy(&size, take(r, 8), 8)
    if size > r.length - r.at:
        raise bad_frame("a length goes beyond it")
    length[0] = <size_t>size
    return take(r, <size_t>size)


cdef PyObject *get_int(Reader *r) except NULL:
    cdef const uint8_t *at = take(r, 9)
    cdef long long small
    cdef unsigned long long big
    if at[0] == 0:
        memcpy(&small, at + 1, 8)
        return new_int(small)
    memcpy(&big, at + 1, 8)
    if at[0] != 1 or big >> 63 == 0:
        raise bad_frame("an int is not in its shortest form")
    return new_big_int(big)


cdef PyObject *get_text(Reader *r) except NULL:
    cdef size_t size
    cdef const uint8_t *at = take_bytes(r, &size)
    try:
        return new_text(<char *>at, <Py_ssize_t>size, NULL)
    except UnicodeDecodeError:
        raise bad_frame("a str is not UTF-8") from None


cdef PyObject *get_plain(Reader *r, char code) except NULL:
    """Return a new reference to the next value, whose code is one of nbifsy."""
    cdef const uint8_t *at
    cdef double number
    cdef size_t size
    cdef object value = None
    if code == c"i":
        return get_int(r)
    if code == c"f":
        memcpy(&number, take(r, 8), 8)
        return new_float(number)
    if code == c"s":
        return get_text(r)
    if code == c"y":
        at = take_bytes(r, &size)
        return new_bytes(<char *>at, <Py_ssize_t>size)
    if code == c"b":
        at = take(r, 1)
        if at[0] > 1:
            raise bad_frame("a bool is neither 0 nor 1")
        value = at[0] == 1
    Py_INCREF(value)
    return <PyObject *>value


cdef bint only_bools(const uint8_t *data, size_t length) noexcept nogil:
    """Whether each byte is 0 or 1."""
    cdef uint8_t found = 0
    cdef size_t i
    for i in range(length):
        found |= data[i]
    return found <= 1


cdef object get_array(Reader *r, int wanted, object owner):
    cdef int code = take(r, 1)[0]
    cdef uint64_t count
    cdef size_t at
    cdef const uint8_t *data = r.data
    need_numpy()
    if code == 0 or code >= NUM_TYPES or (wanted and code != wanted):
        raise bad_frame("an array has another element type")
    code = <int>pye_index_mask(<uint32_t>code, <uint32_t>NUM_TYPES)
    shape = get_shape(r, <uint64_t>(8 if code >= DATES else ITEM_SIZES[code]), &count)
    if r.there:
        owner = fetch(r, count, &data, &at)
    else:
        at = r.tail
        r.tail += <size_t>count
    # SER-04: compiled code counts, masks and indexes by such bytes; of others it makes nonsense.
    if code == BOOLS and not only_bools(data + at, <size_t>count):
        raise bad_frame("a bool is neither 0 nor 1")
    return np_ndarray(shape, dtype_of_code[code], owner, at)


cdef object get_described(Reader *r, object detail, object owner):
    cdef uint64_t count
    cdef size_t at
    cdef const uint8_t *data
    need_numpy()
    shape = get_shape(r, detail.item_size, &count)
    if r.there:
        owner = fetch(r, count, &data, &at)
    else:
        at = r.tail
        r.tail += <size_t>count
    return detail.restore(np_ndarray((count,), np_uint8, owner, at), shape)


cdef object fetch(Reader *r, uint64_t count, const uint8_t **out_data, size_t *out_at):
    """
    Copy an array's elements out of shared memory, once, and return what holds them, at `out_at`.

    Place and count are checked. From here on the other side cannot change them (BND-03).
    """
    owner = (<Scratch>r.scratch).take(<size_t>count)
    cdef uint8_t *data = <uint8_t *>PyByteArray_AsString(owner)
    cdef size_t at = (ALIGN - <size_t>data % ALIGN) % ALIGN
    copy(data + at, r.shared.data + r.place, <size_t>count)
    out_data[0] = data
    out_at[0] = at
    return owner


cdef tuple get_shape(Reader *r, uint64_t item, uint64_t *out_len):
    """
    Take a shape; `out_len` is the length of its elements.

    They begin at r.tail, or, if r.there, at r.place of the shared memory.
    """
    cdef int ndim = take(r, 1)[0]
    cdef const uint8_t *at
    cdef uint64_t size
    cdef uint64_t count = 1
    cdef bint empty = False
    cdef int i
    r.there = (ndim & SHARED) != 0
    ndim &= ~SHARED
    if ndim > MAX_NDIM:
        raise bad_frame("an array has too many dimensions")
    at = take(r, 8 * <size_t>ndim)
    shape = []
    for i in range(ndim):
        memcpy(&size, at + 8 * i, 8)
        shape.append(size)
        if size == 0:
            empty = True
        elif count > <uint64_t>PY_SSIZE_T_MAX // MAX_ITEM_SIZE // size:
            raise bad_frame("an array is too large")
        else:
            count *= size
    # NumPy multiplies the sizes of an empty array too; the check above has bounded them.
    if empty:
        count = 0
    count *= item
    out_len[0] = count
    if r.there:
        memcpy(&r.place, take(r, 8), 8)
        if r.shared == NULL or r.shared.data == NULL:
            raise bad_frame("an array is in shared memory, of which there is none here")
        if not is_within(r.place, count, r.shared.size):
            raise bad_frame("an array goes beyond the shared memory")
        if count > r.shared.left:
            raise bad_frame("its arrays are larger than the shared memory")
        r.shared.left -= count
        return tuple(shape)
    r.tail += (ALIGN - r.tail % ALIGN) % ALIGN
    if r.tail > r.total or count > r.total - r.tail:
        raise bad_frame("an array goes beyond it")
    return tuple(shape)


# ---- plans -------------------------------------------------------------------------------------

@cython.final
cdef class Missing:
    """The value of a parameter that the caller left out."""


MISSING = Missing()
# Names of the module are looked up each time; this is the same object at once.
cdef object missing_mark = MISSING


@cython.final
cdef class Plan:
    """How the values of one signature cross: a code for each, decided once.

    ``codes``: n None, b bool, i int, f float, s str, y bytes, A array, D what the signature
    describes (records, Arrow tables), M MessagePack.
    ``details``: for A the element type's code (0 any); for D an object with ``item_size`` (bytes),
    ``prepare(value, name)`` and ``restore(data, shape)``; for M a pair (encode, decode).
    ``optional``: values may be left out (MISSING).
    """

    cdef bytes codes_object
    cdef const char *codes
    cdef int num
    cdef bint arrays
    cdef bint optional
    cdef bint plain         # nbifsy only, and none left out: neither arrays nor any class's code
    cdef tuple names
    cdef tuple details
    cdef int[256] wanted

    def __init__(self, bytes codes, tuple names, tuple details, bint optional=False):
        if len(codes) > 255 or len(names) != len(codes) or len(details) != len(codes):
            raise ValueError("codes, names and details must be of one length, at most 255")
        if optional and len(codes) > MAX_OPTIONAL:
            raise ValueError(f"at most {MAX_OPTIONAL} parameters where some may be left out")
        if codes.count(b"A") + codes.count(b"D") > MAX_ARRAYS:
            raise ValueError(f"at most {MAX_ARRAYS} arrays")
        self.codes_object = codes
        self.codes = <const char *>codes
        self.num = <int>len(codes)
        self.arrays = b"A" in codes or b"D" in codes
        self.optional = optional
        self.plain = not self.arrays and not optional and b"M" not in codes
        self.names = names
        self.details = details
        for i in range(self.num):
            if codes[i] not in b"nbifsyADM":
                raise ValueError(f"unknown code {codes[i:i + 1]!r}")
            if codes[i:i + 1] == b"D" and not 0 < details[i].item_size <= MAX_ITEM_SIZE:
                raise ValueError(f"an element has 1 to {MAX_ITEM_SIZE} bytes")
            self.wanted[i] = details[i] if codes[i:i + 1] == b"A" else 0
            if not 0 <= self.wanted[i] < NUM_TYPES:
                raise ValueError("unknown element type")

    cdef int put(self, Message *m, tuple values) except -1:
        """Encode `values`; on failure the message is cleared by the caller."""
        cdef int i
        cdef uint32_t present = 0
        cdef uint32_t head
        cdef size_t where = 0
        cdef uint8_t *at
        if PyTuple_Size(values) != self.num:
            raise TypeError(f"{self.num} values wanted, {len(values)} given")
        if self.arrays:
            room(m, 4)
        if m.shared.placed and not m.fills:
            at = room(m, 16)
            memcpy(at, &m.shared.place, 8)
            memcpy(at + 8, &m.shared.room, 8)
        if self.optional:
            where = m.length
            room(m, 4)
        for i in range(self.num):
            value = <object>PyTuple_GetItem(values, i)
            if value is missing_mark:
                if not self.optional:
                    raise TypeError(f"{self.names[i]} is missing")
                continue
            present |= (<uint32_t>1) << (i & 31)
            self.put_value(m, i, value)
        if self.optional:
            memcpy(m.data + where, &present, 4)
        if self.arrays:
            if m.length > 0xffffffff:
                raise argument_error(
                    "the arguments", "less than 4 GiB beside the arrays", m.length)
            head = <uint32_t>m.length
            memcpy(m.data, &head, 4)
        return 0

    cdef int put_plain(self, Message *m, PyObject *const *values) except -1:
        """As `put`, of a plain plan: as many values as it has."""
        cdef int i
        for i in range(self.num):
            if values[i] == <PyObject *>missing_mark:
                raise TypeError(f"{self.names[i]} is missing")
            self.put_value(m, i, <object>values[i])
        self.finish(m)
        return 0

    cdef int put_value(self, Message *m, int i, object value) except -1:
        cdef char code = self.codes[i]
        cdef Py_ssize_t size
        cdef const char *text
        cdef Py_buffer view
        cdef uint8_t *at
        if put_exact(m, code, value):
            return 0
        if code == c"i":
            put_int(m, value, self.names[i])
        elif code == c"f":
            put_float(m, value, self.names[i])
        elif code == c"s":
            if not isinstance(value, str):
                raise argument_error(self.names[i], "str", type_name(value))
            try:
                text = PyUnicode_AsUTF8AndSize(value, &size)
            except UnicodeEncodeError:
                raise argument_error(
                    self.names[i], "text", "a lone surrogate",
                    "Send what is not text as bytes.") from None
            put_bytes(m, text, <size_t>size)
        elif code == c"y":
            if not PyObject_CheckBuffer(value):
                raise argument_error(self.names[i], "bytes", type_name(value))
            try:
                PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
            except (BufferError, ValueError) as error:
                raise argument_error(
                    self.names[i], "contiguous bytes", str(error)) from None
            try:
                put_bytes(m, view.buf, <size_t>view.len)
            finally:
                PyBuffer_Release(&view)
        elif code == c"A":
            put_array(m, value, self.wanted[i], self.names[i])
        elif code == c"D":
            put_described(m, value, self.details[i], self.names[i])
        elif code == c"b":
            if value is not True and value is not False:
                raise argument_error(self.names[i], "bool", type_name(value))
            at = room(m, 1)
            at[0] = 1 if value is True else 0
        elif code == c"n":
            if value is not None:
                raise argument_error(self.names[i], "None", type_name(value))
        else:
            try:
                packed = (<tuple>self.details[i])[0](value)
            except _errors.ArgumentError:
                raise
            except OverflowError:
                raise argument_error(
                    self.names[i],
                    "ints from -2**63 to 2**64-1, and times of the years 1 to 9999 in UTC",
                    "one beyond", "Send larger numbers as bytes or str.") from None
            except Exception as error:
                raise argument_error(self.names[i], "a value that crosses", error) from None
            if pye_msgpack_check(<const uint8_t *><char *>packed, <size_t>len(packed),
                                 MAX_DEPTH) != PYE_OK:
                raise argument_error(
                    self.names[i],
                    f"at most {MAX_DEPTH} levels of nesting and {MAX_ITEMS} values", "more",
                    "Send many numbers as a NumPy array.")
            put_bytes(m, <char *>packed, <size_t>len(packed))
        return 0

    cdef void finish(self, Message *m) noexcept:
        """Lay out head, padding and arrays as segments."""
        cdef int i
        cdef size_t pad
        m.segments[0].data = m.data
        m.segments[0].len = m.length
        m.num_segments = 1
        m.total = m.length
        for i in range(m.num_views):
            if (m.far >> i) & 1:
                continue
            pad = <size_t>((ALIGN - m.total % ALIGN) % ALIGN)
            m.segments[m.num_segments].data = ZEROES
            m.segments[m.num_segments].len = pad
            m.segments[m.num_segments + 1].data = <const uint8_t *>m.views[i].buf
            m.segments[m.num_segments + 1].len = <size_t>m.views[i].len
            m.num_segments += 2
            m.total += pad + <size_t>m.views[i].len

    cdef tuple get(self, const uint8_t *data, size_t length, object owner, Shared *shared=NULL,
                   Scratch scratch=None):
        """
        Decode private bytes. `owner` is the bytearray that holds them, where arrays do.

        `shared` says what the frame may name of shared memory; arrays there are copied to `scratch`.
        """
        cdef Reader r
        cdef int i
        cdef char code
        cdef uint32_t present = 0xffffffff
        cdef uint32_t head
        cdef size_t size
        cdef const uint8_t *at
        cdef PyObject *value
        cdef pye_status status
        if self.plain and (shared == NULL or not shared.placed):
            return self.get_tuple(data, length)
        reader_init(&r, data, length)
        r.shared = shared
        r.scratch = <PyObject *>scratch
        if self.arrays:
            memcpy(&head, take(&r, 4), 4)
            if head > length or head < r.at:
                raise bad_frame("its head is longer than it")
            r.length = head
            r.tail = head
        if shared != NULL and shared.placed:
            at = take(&r, 16)
            memcpy(&shared.place, at, 8)
            memcpy(&shared.room, at + 8, 8)
            if not is_within(shared.place, shared.room, shared.size) or (
                    shared.room == 0 and shared.place):
                raise bad_frame("the place of its result is not in the shared memory")
        if self.optional:
            memcpy(&present, take(&r, 4), 4)
            if self.num < 32 and present >> self.num:
                raise bad_frame("it has more values than the signature")
        values = []
        for i in range(self.num):
            if not (present >> (i & 31)) & 1 and self.optional:
                values.append(missing_mark)
                continue
            code = self.codes[i]
            if code == c"A":
                values.append(get_array(&r, self.wanted[i], owner))
            elif code == c"D":
                values.append(get_described(&r, self.details[i], owner))
            elif code != c"M":
                value = get_plain(&r, code)
                try:
                    values.append(<object>value)
                finally:
                    Py_DECREF(value)
            else:
                at = take_bytes(&r, &size)
                status = pye_msgpack_check(at, size, MAX_DEPTH)
                if status == PYE_E_LIMIT:
                    raise bad_frame(f"{self.names[i]} nests deeper than {MAX_DEPTH}, or has more "
                                    f"than {MAX_ITEMS} values")
                if status != PYE_OK:
                    raise bad_frame(f"{self.names[i]} is not one MessagePack value")
                packed = PyBytes_FromStringAndSize(<char *>at, <Py_ssize_t>size)
                try:
                    values.append((<tuple>self.details[i])[1](packed))
                except _errors.ArgumentError:
                    raise
                except Exception as error:
                    # What a class's own check says may hold secrets; what msgspec says is types.
                    said = "its class refuses the value" if error.__cause__ else str(error)
                    raise _errors.ArgumentError(
                        f"{self.names[i]} does not fit its type: {said}") from None
        if r.at != r.length or (r.tail != r.total if self.arrays else False):
            raise bad_frame("bytes are left over")
        return tuple(values)

    cdef tuple get_tuple(self, const uint8_t *data, size_t length):
        """As `get`, for a plain plan: nobody's code runs while the tuple is being filled."""
        cdef Reader r
        cdef int i
        reader_init(&r, data, length)
        values = new_tuple(self.num)
        for i in range(self.num):
            give_item(values, i, get_plain(&r, self.codes[i]))
        if r.at != r.length:
            raise bad_frame("bytes are left over")
        return <tuple>values

    cdef object get_one(self, const uint8_t *data, size_t length, object owner):
        """Decode a frame of one value."""
        cdef Reader r
        cdef PyObject *value
        if not self.plain or self.num != 1:
            return (<tuple>self.get(data, length, owner))[0]
        reader_init(&r, data, length)
        value = get_plain(&r, self.codes[0])
        if r.at != r.length:
            Py_DECREF(value)
            raise bad_frame("bytes are left over")
        result = <object>value
        Py_DECREF(value)
        return result

    def encode(self, tuple values) -> bytes:
        """Return the frame of `values` in one piece (tests, and what is not hot)."""
        cdef Message m
        cdef size_t i
        message_init(&m)
        try:
            self.put(&m, values)
            self.finish(&m)
            return b"".join([
                PyBytes_FromStringAndSize(<char *>m.segments[i].data, <Py_ssize_t>m.segments[i].len)
                for i in range(m.num_segments)])
        finally:
            message_clear(&m)

    def decode(self, data) -> tuple:
        """Return the values in the frame `data`. ArgumentError: it is not such a frame."""
        owner = bytearray(data)
        return self.get(<const uint8_t *>PyByteArray_AsString(owner),
                        <size_t>PyByteArray_Size(owner), owner)


def msgpack_check(data, uint32_t max_depth=MAX_DEPTH) -> bool:
    """Whether `data` is exactly one MessagePack value, not nested deeper than `max_depth`."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return pye_msgpack_check(<const uint8_t *>view.buf, <size_t>view.len, max_depth) == PYE_OK
    finally:
        PyBuffer_Release(&view)
