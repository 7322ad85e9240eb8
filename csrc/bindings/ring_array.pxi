# An array result read from the ring straight into the caller's own array: `out=` without a copy.

cdef enum:
    ARRAY_HEAD = 384  # more than the head of one array of MAX_NDIM dimensions, and its padding


cdef object read_into(HostLanes lanes, int number, pye_lane_header *header, Plan plan, object out,
                      double deadline):
    """
    Read the announced result into the array `out` and return it.

    None, and nothing is read: it has another size, or `out` is no place for it. The elements are
    written before the head can be judged: where it names another type or shape, `out` is zeroed.
    """
    cdef uint8_t[ARRAY_HEAD] head
    cdef uint8_t[ARRAY_HEAD] want
    cdef Py_buffer view
    cdef pye_lane *lane = lanes.lanes[number]
    cdef pye_status status = PYE_E_TIMEOUT
    cdef uint32_t wait_ms = lanes.slice(deadline)
    cdef uint32_t length
    cdef size_t tail
    cdef uint64_t size
    cdef int code
    cdef int i
    cdef int ndim
    if plan.num != 1 or plan.codes[0] != c"A" or plan.optional or not out.flags.c_contiguous:
        return None
    code = code_of_dtype.get(out.dtype, 0)
    ndim = out.ndim
    if code == 0 or code >= DATES or ndim > MAX_NDIM or (plan.wanted[0] and code != plan.wanted[0]):
        return None
    length = <uint32_t>(6 + 8 * ndim)
    tail = (length + ALIGN - 1) // ALIGN * ALIGN
    memcpy(want, &length, 4)
    want[4] = <uint8_t>code
    want[5] = <uint8_t>ndim
    for i in range(ndim):
        size = out.shape[i]
        memcpy(want + 6 + 8 * i, &size, 8)
    PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
    try:
        if header.total != tail + <uint64_t>view.len:
            return None
        while status == PYE_E_TIMEOUT:
            with nogil:
                status = pye_lane_read_split(lane, head, tail, <uint8_t *>view.buf,
                                             <size_t>view.len, wait_ms)
            if status == PYE_E_TIMEOUT:
                lanes.look(deadline, True)
                wait_ms = lanes.slice(deadline)
        if status != PYE_OK:
            lanes.give_up(lane, status)
        if memcmp(head, want, length) != 0 or (
                code == BOOLS and not only_bools(<const uint8_t *>view.buf, <size_t>view.len)):
            memset(view.buf, 0, <size_t>view.len)
            raise argument_error(
                "out", "an array of the result's type and shape", f"{out.dtype} of shape {out.shape}")
    finally:
        PyBuffer_Release(&view)
    return out


# ---- shared memory -----------------------------------------------------------------------------

cdef uint8_t *shared_part(Py_buffer *memory, uint32_t lanes, uint32_t slot_size,
                          uint64_t shared) except? NULL:
    """Where the shared memory behind the lanes is; NULL if there is none."""
    cdef size_t ring = pye_ring_size(lanes, slot_size)
    if ring == 0 or <size_t>memory.len < ring or <size_t>memory.len - ring != shared:
        fail(PYE_E_LENGTH if ring else PYE_E_ARGUMENT, "ring")
    return <uint8_t *>memory.buf + ring if shared else NULL


cdef bint has_place(Plan result, bint streams) noexcept:
    """Whether calls of a function say where its result goes. Both sides must find the same."""
    return not streams and result.num == 1 and result.codes[0] == c"A"


cdef object plain_bytes(object out):
    """`out` as something that lends its buffer: NumPy lends none of dates."""
    return out.view(np_int64) if code_of_dtype[out.dtype] >= DATES else out


cdef int place_result(HostLanes lanes, Plan result, object out, Shared *shared) except -1:
    """Say that the result's elements go to `out`, if that lies in the shared memory."""
    cdef Py_buffer view
    cdef uint64_t place
    need_numpy()
    if not isinstance(out, np_ndarray) or not out.flags.c_contiguous:
        return 0
    code = code_of_dtype.get(out.dtype, 0)
    if code == BOOLS:
        return 0  # checked where the enclave cannot change them afterwards
    if code == 0 or out.ndim > MAX_NDIM or (result.wanted[0] and code != result.wanted[0]):
        return 0
    PyObject_GetBuffer(plain_bytes(out), &view, PyBUF_WRITABLE)
    place = <uint64_t>(<size_t>view.buf - <size_t>lanes.shared_data)
    if view.len and is_within(place, <uint64_t>view.len, lanes.shared_size):
        shared.place = place
        shared.room = <uint64_t>view.len
    PyBuffer_Release(&view)
    return 0


cdef bint answer_is_there(const uint8_t *data, size_t total, object out,
                          uint64_t place) except -1:
    """
    Whether an answer says that the result's elements are in `out`, which has been named as `place`.

    Nothing that the answer says is followed: it is compared with what it must be. False: it has the
    elements itself. ArgumentError: the result is of another type or shape; `out` is zeroed.
    """
    cdef uint8_t[ARRAY_HEAD] want
    cdef Py_buffer view
    cdef uint32_t length
    cdef uint64_t size
    cdef int ndim = out.ndim
    cdef int code = code_of_dtype.get(out.dtype, 0)
    cdef bint same
    cdef int i
    if total < 6 or not data[5] & SHARED:
        return False
    if code == 0 or ndim > MAX_NDIM:  # it was changed since the call began
        raise argument_error("out", "an array that stays as it was during the call",
                             f"{out.dtype} of shape {out.shape}")
    length = <uint32_t>(6 + 8 * ndim + 8)
    memcpy(want, &length, 4)
    want[4] = <uint8_t>code
    want[5] = <uint8_t>(ndim | SHARED)
    for i in range(ndim):
        size = out.shape[i]
        memcpy(want + 6 + 8 * i, &size, 8)
    memcpy(want + length - 8, &place, 8)
    same = total == length and memcmp(data, want, length) == 0
    if not same:
        PyObject_GetBuffer(plain_bytes(out), &view, PyBUF_WRITABLE)
        memset(view.buf, 0, <size_t>view.len)
        PyBuffer_Release(&view)
        raise argument_error(
            "out", "an array of the result's type and shape", f"{out.dtype} of shape {out.shape}")
    return True


cdef tuple named_arrays(Message *m, object out):
    """The arrays in shared memory that a message names; None if there is none."""
    cdef int i
    if not m.far and not m.shared.room:
        return None
    found = [<object>m.views[i].obj for i in range(m.num_views) if (m.far >> i) & 1]
    if m.shared.room:
        found.append(out)
    return tuple(found)
