# The worker's side of a ring: native code, the function table, and the serving loop.

@cython.final
cdef class NativeLibrary:
    """A shared object of trusted code. It stays loaded for the life of the process."""

    cdef void *handle
    cdef readonly str path

    def __cinit__(self, str path not None):
        encoded = path.encode()
        cdef const char *name = encoded
        with nogil:
            self.handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)
        if self.handle == NULL:
            raise _errors.ImageError(f"the native library cannot be loaded: {dlerror().decode()}")
        self.path = path

    def address(self, str name) -> int:
        """Address of ``pye_ecall_<name>``, or 0."""
        return <size_t>dlsym(self.handle, f"pye_ecall_{name}".encode())


@cython.final
cdef class FunctionTable:
    """
    The functions of an enclave by index: ``(address, function, arguments, result, missing,
    keywords)`` each; address 0 for Python functions; ``missing`` the defaults by position;
    ``keywords`` the names of the parameters given by keyword, which come last.
    """

    cdef readonly tuple entries
    cdef void **natives
    cdef uint32_t num

    def __cinit__(self, tuple entries not None):
        if len(entries) > 65536:
            raise ValueError("at most 65536 functions")
        self.entries = entries
        self.num = <uint32_t>len(entries)
        self.natives = <void **>calloc(len(entries) + 1, sizeof(void *))
        if self.natives == NULL:
            raise MemoryError()
        for i, entry in enumerate(entries):
            self.natives[i] = <void *><size_t>entry[0]

    def __dealloc__(self):
        free(self.natives)

    def __len__(self):
        return <Py_ssize_t>self.num


cdef enum:
    EVENT_LOOK = 1          # a slice of waiting is over
    EVENT_MESSAGE = 2       # a message for Python code, header in `header`
    EVENT_STATUS = 3        # a native function answered `native_status`
    EVENT_LIMIT = 4         # a message beyond the limit
    EVENT_BROKEN = 5
    EVENT_REPLY = 6         # the native reply is not yet taken


@cython.final
cdef class WorkerLane:
    """
    One lane, seen from inside.

    The buffers below are private: what the host sent is copied there before anything looks at it.
    """

    cdef Py_buffer memory
    cdef bint held
    cdef pye_lane *lane
    cdef uint8_t *in_raw
    cdef uint8_t *in_data
    cdef Py_buffer out_memory
    cdef bint out_held
    cdef uint8_t *out_data
    cdef size_t in_size
    cdef size_t out_size
    cdef size_t out_used
    cdef uint64_t limit
    cdef pye_lane_header header
    cdef pye_status native_status
    cdef pye_segment reply

    def __cinit__(self):
        self.held = False
        self.lane = NULL
        self.in_raw = NULL
        self.out_held = False
        self.out_data = NULL
        self.out_used = 0

    def __init__(self, memory, uint32_t lanes, uint32_t slot_size, uint32_t number,
                 uint64_t limit):
        if self.held:
            raise TypeError("WorkerLane is made once")
        if limit > <uint64_t>PY_SSIZE_T_MAX // 2:
            raise ValueError("the message limit is too large")
        PyObject_GetBuffer(memory, &self.memory, PyBUF_WRITABLE)
        self.held = True
        status = pye_lane_new(&self.lane, self.memory.buf, <size_t>self.memory.len, lanes,
                              slot_size, number, PYE_SIDE_WORKER, limit, &WAIT_OPS)
        if status != PYE_OK:
            fail(status, "ring")
        self.limit = limit
        self.in_size = slot_size
        self.out_size = <size_t>limit if limit > slot_size else slot_size
        self.in_raw = <uint8_t *>calloc(1, self.in_size + ALIGN)
        if self.in_raw == NULL:
            raise MemoryError()
        self.in_data = self.in_raw + (ALIGN - <size_t>self.in_raw % ALIGN) % ALIGN

    def __dealloc__(self):
        pye_lane_free(self.lane)
        if self.in_raw != NULL:
            pye_wipe(self.in_raw, self.in_size + ALIGN)
        free(self.in_raw)
        if self.out_held:
            pye_wipe(self.out_data, self.out_used)
            PyBuffer_Release(&self.out_memory)
        if self.held:
            PyBuffer_Release(&self.memory)

    cdef int make_room(self) except -1:
        """
        Make room for the longest answer of a native function.

        Mapped, not allocated: pages that nobody touches cost nothing, while the C library zeroes
        what it takes from its heap, milliseconds for the usual limit.
        """
        from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
        if not self.out_held:
            memory = mmap(-1, self.out_size, MAP_PRIVATE | MAP_ANONYMOUS)
            PyObject_GetBuffer(memory, &self.out_memory, PyBUF_WRITABLE)
            self.out_held = True
            self.out_data = <uint8_t *>self.out_memory.buf
        return 0

    cdef int run(self, void **natives, uint32_t num) noexcept nogil:
        """Serve native functions and echoes until there is something for Python."""
        cdef pye_status status
        cdef uint32_t index
        cdef size_t length
        while True:
            status = pye_lane_wait(self.lane, &self.header, SLICE_MS)
            if status == PYE_E_LIMIT:
                return EVENT_LIMIT
            if status == PYE_E_TIMEOUT:
                return EVENT_LOOK
            if status != PYE_OK:
                return EVENT_BROKEN
            if self.header.total > self.in_size:
                return EVENT_MESSAGE
            status = pye_lane_read(self.lane, self.in_data, <size_t>self.header.total, SLICE_MS)
            if status != PYE_OK:  # one fragment: nothing to wait for
                return EVENT_BROKEN
            if self.header.kind == PYE_FRAME_PING:
                self.reply.data = self.in_data
                self.reply.len = <size_t>self.header.total
            elif self.header.kind == PYE_FRAME_CALL and self.header.index < num:
                # BND-08: a processor that guesses the branch above reads entry 0 at worst.
                index = pye_index_mask(self.header.index, num)
                if natives[index] == NULL:
                    return EVENT_MESSAGE
                if not self.native(natives[index], self.in_data, <size_t>self.header.total):
                    return EVENT_STATUS
            else:
                return EVENT_MESSAGE
            status = pye_lane_write(self.lane, <uint16_t>PYE_FRAME_RESULT, self.header.index,
                                    &self.reply, 1, SLICE_MS)
            if status == PYE_OK or status == PYE_E_CLOSED:
                self.forget()
                continue
            return EVENT_REPLY if status == PYE_E_TIMEOUT else EVENT_BROKEN

    cdef bint native(self, void *function, const uint8_t *data, size_t length) noexcept nogil:
        cdef size_t out_len = 0
        self.native_status = pye_native_call(function, self.out_data, self.out_size, &out_len,
                                             data, length)
        self.out_used = out_len
        self.reply.data = self.out_data
        self.reply.len = out_len
        if self.native_status != PYE_OK:
            self.forget_all()
            return False
        return True

    cdef void forget_all(self) noexcept nogil:
        """Zero what a refusing function may have left anywhere in its buffer (BND-07)."""
        cdef size_t skip = (PAGE - <size_t>self.out_data % PAGE) % PAGE
        cdef size_t whole = (self.out_size - skip) // PAGE * PAGE
        # Pages given back are zero when touched again, at a cost for those that were touched only.
        if madvise(self.out_data + skip, whole, MADV_DONTNEED) != 0:
            whole = 0
        memset(self.out_data, 0, skip)
        memset(self.out_data + skip + whole, 0, self.out_size - skip - whole)
        self.out_used = 0

    cdef void forget(self) noexcept nogil:
        """Zero the last native answer, so that no later one can contain it (BND-07)."""
        if self.out_used:
            memset(self.out_data, 0, self.out_used)
            self.out_used = 0

    cdef int poison(self) except -1:
        cdef const char *check = pye_lane_broken(self.lane)
        what = check.decode() if check != NULL else "state"
        raise _errors.EnclavePoisonedError(f"the host broke the call protocol: {what}")

    cdef bint send(self, uint16_t kind, pye_segment *segments, size_t num, object idle) except -1:
        """Send an answer; False if `idle` wants to end."""
        cdef pye_status status = PYE_E_TIMEOUT
        while True:
            with nogil:
                status = pye_lane_write(self.lane, kind, self.header.index, segments, num,
                                        SLICE_MS)
            if status == PYE_OK or status == PYE_E_CLOSED:
                return True
            if status != PYE_E_TIMEOUT:
                self.poison()
            if not idle():
                return False

    cdef bint send_bytes(self, uint16_t kind, bytes data, object idle) except -1:
        cdef pye_segment segment
        segment.data = <const uint8_t *><char *>data
        segment.len = <size_t>len(data)
        return self.send(kind, &segment, 1, idle)

    def serve(self, FunctionTable table not None, attest, describe, idle) -> None:
        """
        Serve until ``idle()``, called at least every 100 ms of waiting, returns False.

        ``attest(nonce)`` returns evidence; ``describe(exception, stage)`` the bytes of an error
        frame, where stage is "request" (the call was not made), "native" or "function".
        EnclavePoisonedError: the host broke the protocol, or trusted code found a broken MAC.
        """
        cdef int event
        cdef void **natives = table.natives
        cdef uint32_t num = table.num
        cdef uint32_t i
        cdef bint more
        for i in range(num):
            if natives[i] != NULL:
                self.make_room()
                break
        while True:
            with nogil:
                event = self.run(natives, num)
            if event == EVENT_LOOK:
                PyErr_CheckSignals()
                if not idle():
                    return
            elif event == EVENT_MESSAGE:
                if not self.answer(table, attest, describe, idle):
                    return
            elif event == EVENT_STATUS:
                if not self.send_bytes(<uint16_t>PYE_FRAME_ERROR,
                                       describe(self.native_error(), "native"), idle):
                    return
            elif event == EVENT_REPLY:
                if not idle():
                    return
                more = self.send(<uint16_t>PYE_FRAME_RESULT, &self.reply, 1, idle)
                self.forget()
                if not more:
                    return
            elif event == EVENT_LIMIT:
                error = _errors.ArgumentError(
                    "the message is too long", expected=f"at most {self.limit} bytes",
                    found=self.header.total, advice="Raise the image's message_limit.")
                if not self.send_bytes(<uint16_t>PYE_FRAME_ERROR, describe(error, "request"), idle):
                    return
            else:
                self.poison()

    cdef object native_error(self):
        if self.native_status == PYE_E_ARGUMENT:
            return _errors.ArgumentError("the native function refuses its input")
        if self.native_status == PYE_E_LENGTH:
            return _errors.ArgumentError(
                "the native function refuses a length", expected=f"an answer of at most {self.out_size}")
        return _errors.EcallError(
            type=f"status {self.native_status}")

    cdef bint answer(self, FunctionTable table, object attest, object describe,
                     object idle) except -1:
        """Handle the message that `header` announces; False if `idle` wants to end."""
        cdef Message m
        cdef pye_status status = PYE_OK
        cdef size_t total = <size_t>self.header.total
        cdef const uint8_t *data = self.in_data
        cdef uint8_t *large
        cdef uint32_t index
        cdef Plan plan
        cdef object owner = None
        cdef str stage = "request"
        if total > self.in_size:
            owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
            large = <uint8_t *>PyByteArray_AsString(owner)
            data = large
            while True:
                with nogil:
                    status = pye_lane_read(self.lane, large, total, SLICE_MS)
                if status != PYE_E_TIMEOUT:
                    break
                if not idle():
                    return False
            if status == PYE_E_CLOSED:
                return True
            if status != PYE_OK:
                self.poison()
        message_init(&m)
        try:
            try:
                if self.header.kind == PYE_FRAME_CALL:
                    if self.header.index >= table.num:
                        raise _errors.UnknownFunctionError(
                            "no function has this number", expected=f"below {table.num}",
                            found=self.header.index)
                    index = pye_index_mask(self.header.index, table.num)
                    if table.natives[index] != NULL:  # only messages longer than a slot
                        with nogil:
                            self.native(table.natives[index], data, total)
                        stage = "native"
                        if self.native_status != PYE_OK:
                            raise self.native_error()
                        m.segments[0] = self.reply
                        m.num_segments = 1
                    else:
                        _, function, arguments, result, missing, keywords = table.entries[index]
                        plan = arguments
                        if plan.arrays and owner is None:
                            owner = PyByteArray_FromStringAndSize(
                                <char *>data, <Py_ssize_t>total)
                            data = <const uint8_t *>PyByteArray_AsString(owner)
                        values = plan.get(data, total, owner)
                        owner = None
                        if plan.optional:
                            values = fill_missing(values, missing)
                        stage = "function"
                        if keywords:
                            count = len(values) - len(keywords)
                            value = function(
                                *values[:count], **dict(zip(keywords, values[count:])))
                        else:
                            value = function(*values)
                        plan = result
                        try:
                            plan.put(&m, (value,))
                        except _errors.ArgumentError as error:
                            raise TypeError(str(error)) from None
                        plan.finish(&m)
                        if m.total > self.limit:
                            raise _errors.ArgumentError(
                                "the result is too long", expected=f"at most {self.limit} bytes",
                                found=m.total, advice="Raise the image's message_limit.")
                elif self.header.kind == PYE_FRAME_ATTEST:
                    if total > 1024:
                        raise _errors.ArgumentError(
                            "the nonce is too long", expected="at most 1024 bytes", found=total)
                    stage = "function"
                    answer = attest(PyBytes_FromStringAndSize(<char *>data, <Py_ssize_t>total))
                    m.segments[0].data = <const uint8_t *><char *>answer
                    m.segments[0].len = <size_t>len(answer)
                    m.num_segments = 1
                elif self.header.kind == PYE_FRAME_BATCH:
                    raise _errors.ArgumentError("this enclave answers no batches")
                elif self.header.kind == PYE_FRAME_PING:  # longer than a slot
                    m.segments[0].data = data
                    m.segments[0].len = total
                    m.num_segments = 1
                else:
                    pye_lane_refuse(self.lane, "turn")
                    self.poison()
            except _errors.EnclavePoisonedError:
                raise
            except BaseException as error:
                message_clear(&m)
                if isinstance(error, KeyboardInterrupt) and stage == "request":
                    raise
                return self.send_bytes(<uint16_t>PYE_FRAME_ERROR, describe(error, stage), idle)
            return self.send(<uint16_t>PYE_FRAME_RESULT, m.segments, m.num_segments, idle)
        finally:
            message_clear(&m)
            self.forget()


cdef tuple fill_missing(tuple values, dict missing):
    filled = list(values)
    for i in range(len(filled)):
        if filled[i] is MISSING:
            if i not in missing:
                raise _errors.ArgumentError(f"argument {i + 1} is missing")
            filled[i] = missing[i]
    return tuple(filled)
