# Writing a frame: a head of plain values, and the arrays behind it by where they are.

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
