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
