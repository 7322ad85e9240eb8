# The worker's side of batches: all calls of one message, each with its answer or its error.

cdef void forget_memory(uint8_t *memory, size_t length) noexcept nogil:
    """Zero memory of which little was touched, most likely: whole pages are given back."""
    cdef size_t skip = (PAGE - <size_t>memory % PAGE) % PAGE
    cdef size_t whole = (length - skip) // PAGE * PAGE if length > skip else 0
    if whole == 0 or madvise(memory + skip, whole, MADV_DONTNEED) != 0:
        memset(memory, 0, length)
        return
    memset(memory, 0, skip)
    memset(memory + skip + whole, 0, length - skip - whole)


cdef bint batch_native(WorkerLane lane, void *function, const uint8_t *data,
                       size_t total) noexcept nogil:
    """Run a batch of native calls into `lane.reply`; False if it is none, for Python to say so."""
    cdef size_t cap = <size_t>lane.limit if lane.limit < lane.out_size else lane.out_size
    if lane.limit < MIN_BATCH_LIMIT:
        return False
    return pye_batch_native(function, &lane.reply.data, &lane.reply.len, &lane.out_used,
                            lane.out_data, cap, data, total, forget_memory) == PYE_OK


cdef int batch_answer(WorkerLane lane, uint32_t index, Message *m, const uint8_t *data,
                      size_t total, object owner) except -1:
    """Make all calls of a batch of function `index`; the answer is `m`'s segment."""
    cdef FunctionTable table = lane.table
    if lane.limit < MIN_BATCH_LIMIT:
        raise _errors.ArgumentError(
            "the image's messages are too small for batches",
            expected=f"message_limit of at least {MIN_BATCH_LIMIT}", found=lane.limit)
    if table.flags[index] & STREAMS:
        raise _errors.ArgumentError("a function that gives its result in items has no batches")
    if table.natives[index] != NULL:
        with nogil:
            done = batch_native(lane, table.natives[index], data, total)
        if not done:
            raise _errors.ArgumentError("malformed batch")
        m.segments[0] = lane.reply
    else:
        batch_python(lane, table.entries[index], m, data, total, owner)
        m.segments[0].data = m.data
        m.segments[0].len = m.length
    m.num_segments = 1
    return 0


cdef int batch_python(WorkerLane lane, tuple entry, Message *m, const uint8_t *data, size_t total,
                      object owner) except -1:
    cdef pye_batch reader
    cdef const uint8_t *item
    cdef size_t length
    cdef size_t start
    cdef size_t at
    cdef size_t before
    cdef uint64_t size
    cdef uint32_t tag
    cdef uint32_t place = 0
    cdef uint32_t align
    cdef double end = -1
    cdef Plan arguments = entry[2]
    cdef Plan result = entry[3]
    function = entry[1]
    missing = entry[4]
    keywords = entry[5]
    if owner is None and (arguments.arrays or lane.ocalls):
        # Arrays keep the bytes; and what the host answers to an ocall comes where `data` is.
        owner = PyByteArray_FromStringAndSize(<char *>data, <Py_ssize_t>total)
        data = <const uint8_t *>PyByteArray_AsString(owner)
    if pye_batch_open(&reader, data, total, align_of(False, arguments), 0) != PYE_OK:
        raise _errors.ArgumentError("malformed batch")
    start = pye_batch_start(PYE_BATCH_TABLE, reader.count)
    if start > lane.limit // 4:
        raise _errors.ArgumentError("the batch has too many items for its answer",
                                    advice="Raise [memory] message in enclave.toml.")
    if arguments.arrays:
        owner = memoryview(owner)
    if reader.budget_ms:
        end = <double>_monotonic() + reader.budget_ms / 1000.0
    align = align_of(False, result)
    memset(room(m, start), 0, start)
    # An item's answer has nearly the other half of the limit, whatever came before.
    while m.length <= lane.limit // 2 and pye_batch_next(&reader, &item, &length, &tag):
        before = m.length
        stage = "request"
        try:
            if arguments.arrays:
                at = <size_t>(item - reader.data)
                values = arguments.get(item, length, owner[at:at + length])
            else:
                values = arguments.get(item, length, None)
            if arguments.optional:
                values = fill_missing(values, missing)
            stage = "function"
            lane.running = True
            if keywords:
                count = len(values) - len(keywords)
                value = function(*values[:count], **dict(zip(keywords, values[count:])))
            else:
                value = function(*values)
            lane.running = False
            values = None
            try:
                size = append_values(m, result, (value,))
            except _errors.ArgumentError as error:
                raise TypeError(str(error)) from None
            if m.length > lane.limit - NATIVE_ALIGN:
                stage = "request"
                raise _errors.ArgumentError(
                    "the result is too long in a batch", found=size,
                    expected=f"at most {lane.limit - NATIVE_ALIGN - before} bytes",
                    advice="Call the function singly, or raise [memory] message in enclave.toml.")
            tag = PYE_BATCH_ITEM
        except _errors.EnclavePoisonedError:
            raise
        except BaseException as error:
            lane.running = False
            if lane.ending or (isinstance(error, KeyboardInterrupt) and stage == "request"):
                raise
            m.length = before
            frame = lane.describe(error, stage)
            size = <uint64_t>len(frame)
            append(m, <const char *>frame, <size_t>size, 1)
            tag = PYE_BATCH_ERROR
        append(m, NULL, 0, align)
        pye_batch_set(m.data, place, tag, size)
        place += 1
        if lane.ending or (end >= 0 and <double>_monotonic() >= end):
            break
    for place in range(place, reader.count):
        pye_batch_set(m.data, place, PYE_BATCH_NOT_RUN, 0)
    pye_batch_head(m.data, PYE_BATCH_TABLE, reader.count, 0, 0)
    return 0
