# Reading a frame that the other side wrote: each length and shape is checked before it is used.

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
