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
            why = dlerror().decode("utf-8", "replace")
            raise _errors.ImageError(f"the native library cannot be loaded: {why}")
        self.path = path

    def address(self, str name) -> int:
        """Address of ``pye_ecall_<name>``, or 0."""
        return <size_t>dlsym(self.handle, f"pye_ecall_{name}".encode())


# A Python function that anybody may call, whose parameters are positional and all given, and that
# gives one value: scalars, text and bytes only. References are the entries'; NULL: another kind.
cdef struct PlainFunction:
    PyObject *function
    PyObject *arguments
    PyObject *result


cdef bint plain_plan(object plan) except -1:
    return isinstance(plan, Plan) and (<Plan>plan).plain


@cython.final
cdef class FunctionTable:
    """
    The functions of an enclave by index: ``(address, function, arguments, result, missing,
    keywords)`` each; address 0 for Python functions; ``missing`` the defaults by position;
    ``keywords`` the names of the parameters given by keyword, which come last. ``flags`` has a byte
    for each: FUNCTION_PRIVATE, FUNCTION_STREAMS.
    """

    cdef readonly tuple entries
    cdef PlainFunction *plains
    cdef bytes flags_object
    cdef const uint8_t *flags
    cdef void **natives
    cdef uint32_t num

    def __cinit__(self, tuple entries not None, bytes flags not None=b""):
        if len(entries) > 65536:
            raise ValueError("at most 65536 functions")
        if flags and len(flags) != len(entries):
            raise ValueError("a flag for each function")
        self.flags_object = flags or bytes(len(entries))
        self.flags = <const uint8_t *><char *>self.flags_object
        self.entries = entries
        self.num = <uint32_t>len(entries)
        self.natives = <void **>calloc(len(entries) + 1, sizeof(void *))
        if self.natives == NULL:
            raise MemoryError()
        self.plains = <PlainFunction *>calloc(len(entries) + 1, sizeof(PlainFunction))
        if self.plains == NULL:
            raise MemoryError()
        for i, entry in enumerate(entries):
            self.natives[i] = <void *><size_t>entry[0]
            if entry[0] == 0 and not self.flags[i] and not entry[5] and plain_plan(entry[2]) \
                    and plain_plan(entry[3]) and (<Plan>entry[3]).num == 1:
                self.plains[i].function = <PyObject *>entry[1]
                self.plains[i].arguments = <PyObject *>entry[2]
                self.plains[i].result = <PyObject *>entry[3]

    def __dealloc__(self):
        free(self.natives)
        free(self.plains)

    def __len__(self):
        return <Py_ssize_t>self.num


cdef enum:
    PRIVATE = 1             # callable only nested in an ocall that allows it
    STREAMS = 2             # gives its result in items

FUNCTION_PRIVATE = PRIVATE
FUNCTION_STREAMS = STREAMS

cdef enum:
    QUIET_LOOKS = 20        # slices without a call before they grow

cdef enum:
    EVENT_NONE = 0
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
    cdef FunctionTable table
    cdef tuple ocalls
    cdef object attest
    cdef object describe
    cdef object idle
    cdef object large       # a message that is longer than a slot
    cdef bint running       # trusted code of a call runs in this thread: it may call the host
    cdef bint ending        # idle() wants to end
    cdef bint too_long      # the message that next_message announced is beyond the limit
    cdef uint32_t patience  # milliseconds of the longest wait for a call
    cdef uint32_t quiet     # waits that ended without one, in a row
    cdef uint8_t *shared_data
    cdef uint64_t shared_size
    cdef Scratch scratch

    def __cinit__(self):
        self.held = False
        self.lane = NULL
        self.in_raw = NULL
        self.out_held = False
        self.out_data = NULL
        self.out_used = 0

    def __init__(self, memory, uint32_t lanes, uint32_t slot_size, uint32_t number,
                 uint64_t limit, uint64_t shared=0):
        if self.held:
            raise TypeError("WorkerLane is made once")
        if limit > <uint64_t>PY_SSIZE_T_MAX // 2:
            raise ValueError("the message limit is too large")
        PyObject_GetBuffer(memory, &self.memory, PyBUF_WRITABLE)
        self.held = True
        self.shared_data = shared_part(&self.memory, lanes, slot_size, shared)
        self.shared_size = shared
        self.scratch = Scratch()
        status = pye_lane_new(&self.lane, self.memory.buf,
                              <size_t>self.memory.len - <size_t>shared, lanes,
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

    def note(self) -> str:
        """What the host says that the call under way is for: its word, only to be printed."""
        cdef uint8_t[64] data
        cdef size_t length = pye_lane_note_get(self.lane, data)
        return PyUnicode_DecodeUTF8(<const char *>data, <Py_ssize_t>length, NULL)

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

    cdef uint32_t slice(self) noexcept nogil:
        """
        How long to wait for the next call before looking around, in milliseconds.

        After two seconds without one the waits double up to `patience`. A call ends any of them.
        """
        cdef uint32_t wait = SLICE_MS
        cdef uint32_t looks = QUIET_LOOKS
        while looks < self.quiet and wait < self.patience:
            wait *= 2
            looks += 1
        return wait if wait < self.patience else self.patience

    cdef int run(self, void **natives, uint32_t num) noexcept nogil:
        """Serve native functions and echoes until there is something for Python."""
        cdef pye_status status
        cdef uint32_t index
        cdef size_t length
        while True:
            status = pye_lane_wait(self.lane, &self.header, self.slice())
            if status == PYE_E_TIMEOUT:
                if self.quiet < 2 * QUIET_LOOKS:
                    self.quiet += 1
                return EVENT_LOOK
            self.quiet = 0
            if status == PYE_E_LIMIT:
                return EVENT_LIMIT
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
            elif self.header.kind == PYE_FRAME_BATCH and self.header.index < num:
                index = pye_index_mask(self.header.index, num)
                if natives[index] == NULL or not batch_native(
                        self, natives[index], self.in_data, <size_t>self.header.total):
                    return EVENT_MESSAGE
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

    cdef bint send(self, uint16_t kind, uint16_t index, pye_segment *segments,
                   size_t num) except -1:
        """Send a message; False if `idle` wants to end."""
        cdef pye_status status = PYE_E_TIMEOUT
        while True:
            with nogil:
                status = pye_lane_write(self.lane, kind, index, segments, num, SLICE_MS)
            if status == PYE_OK or status == PYE_E_CLOSED:
                return True
            if status != PYE_E_TIMEOUT:
                self.poison()
            if not self.idle():
                self.ending = True
                return False

    cdef bint send_bytes(self, uint16_t kind, uint16_t index, bytes data) except -1:
        cdef pye_segment segment
        segment.data = <const uint8_t *><char *>data
        segment.len = <size_t>len(data)
        return self.send(kind, index, &segment, 1)

    cdef bint refuse_long(self) except -1:
        """Answer a call that is longer than the limit; its header is in `header`."""
        error = _errors.ArgumentError(
            "the message is too long", expected=f"at most {self.limit} bytes",
            found=self.header.total, advice="Raise [memory] message in enclave.toml.")
        return self.send_bytes(<uint16_t>PYE_FRAME_ERROR, self.header.index,
                               self.describe(error, "request"))

    def serve(self, FunctionTable table not None, attest, describe, idle,
              tuple ocalls not None=(), *, uint32_t patience=SLICE_MS) -> None:
        """
        Serve until ``idle()`` returns False, which is called every 100 ms of waiting; after two
        seconds without a call less and less often, at least every `patience` milliseconds.

        ``attest(nonce)`` returns evidence; ``describe(exception, stage)`` the bytes of an error
        frame, where stage is "request" (the call was not made), "native" or "function".
        ``ocalls`` are the host functions: ``(name, arguments, result, allowed)`` each, ``allowed``
        the set of indices of functions that the host may call before it answers.
        EnclavePoisonedError: the host broke the protocol, or trusted code found a broken MAC.
        """
        cdef int event
        cdef void **natives = table.natives
        cdef uint32_t num = table.num
        cdef uint32_t i
        cdef bint more
        self.table = table
        self.ocalls = ocalls
        self.attest = attest
        self.describe = describe
        self.idle = idle
        self.patience = patience if patience > SLICE_MS else SLICE_MS
        self.quiet = 0
        for i in range(num):
            if natives[i] != NULL:
                self.make_room()
                break
        event = EVENT_NONE
        while True:
            event = self.early() if event == EVENT_MESSAGE else EVENT_NONE
            if event == EVENT_NONE:
                with nogil:
                    event = self.run(natives, num)
            if event == EVENT_LOOK:
                self.scratch.rest()
                PyErr_CheckSignals()
                if not idle():
                    return
            elif event == EVENT_MESSAGE:
                if not (self.answer_plain() if self.is_plain() else self.answer(None)):
                    return
            elif event == EVENT_STATUS:
                if not self.send_bytes(<uint16_t>PYE_FRAME_ERROR, self.header.index,
                                       describe(self.native_error(), "native")):
                    return
            elif event == EVENT_REPLY:
                if not idle():
                    return
                more = self.send(<uint16_t>PYE_FRAME_RESULT, self.header.index, &self.reply, 1)
                self.forget()
                if not more:
                    return
            elif event == EVENT_LIMIT:
                if not self.refuse_long():
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

    cdef const uint8_t *receive(self) except? NULL:
        """
        Copy the message that `header` announces and return where it is.

        A long one is in a bytearray, `large`, which is the caller's to take. NULL: the host dropped
        the message, or `idle` wants to end (`ending`).
        """
        cdef pye_status status
        cdef size_t total = <size_t>self.header.total
        cdef uint8_t *data = self.in_data
        if total > self.in_size:
            self.large = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
            data = <uint8_t *>PyByteArray_AsString(self.large)
        while True:
            with nogil:
                status = pye_lane_read(self.lane, data, total, SLICE_MS)
            if status == PYE_OK:
                return data
            if status == PYE_E_CLOSED:
                return NULL
            if status != PYE_E_TIMEOUT:
                self.poison()
            if not self.idle():
                self.ending = True
                return NULL

    cdef int early(self) except -1:
        """The event of a frame that comes while the GIL is still kept, or EVENT_NONE."""
        cdef pye_status status
        if not glance(self.lane):
            return EVENT_NONE
        status = pye_lane_wait(self.lane, &self.header, 0)
        self.quiet = 0
        if status == PYE_E_LIMIT:
            return EVENT_LIMIT
        if status != PYE_OK:
            return EVENT_BROKEN
        if not self.is_plain():
            return EVENT_NONE  # `run` gets the same header, and reads
        status = pye_lane_read(self.lane, self.in_data, <size_t>self.header.total, 0)
        return EVENT_MESSAGE if status == PYE_OK else EVENT_BROKEN

    cdef bint send_answer(self, uint16_t number, Message *m) except -1:
        """
        Send a result; False if `idle` wants to end.

        A short one is one copy: the GIL is kept for it, unless the host sleeps and has to be woken.
        """
        cdef pye_status status
        if is_short(m.segments, m.num_segments) and not pye_lane_peer_asleep(self.lane):
            status = pye_lane_write(
                self.lane, <uint16_t>PYE_FRAME_RESULT, number, m.segments, m.num_segments, 0)
            if status == PYE_OK or status == PYE_E_CLOSED:
                return True
            if status != PYE_E_TIMEOUT:
                self.poison()
        return self.send(<uint16_t>PYE_FRAME_RESULT, number, m.segments, m.num_segments)

    cdef bint refused(self, object error, uint16_t number, str stage) except -1:
        """Answer a call by what it raised; False if `idle` wants to end."""
        self.running = False
        if self.ending:
            return False
        if isinstance(error, KeyboardInterrupt) and stage == "request":
            raise error
        return self.send_bytes(<uint16_t>PYE_FRAME_ERROR, number, self.describe(error, stage))

    cdef bint is_plain(self) noexcept:
        """Whether the message that `header` announces is a short call of a plain function."""
        cdef uint32_t number = self.header.index
        return (self.header.kind == PYE_FRAME_CALL and number < self.table.num
                and self.header.total <= self.in_size
                and self.table.plains[pye_index_mask(number, self.table.num)].function != NULL)

    cdef bint answer_plain(self) except -1:
        """What `answer` does, where `is_plain` says so; the message is in `in_data` already."""
        cdef Message m
        cdef FunctionTable table = self.table
        cdef uint16_t number = self.header.index
        cdef bint called = False
        message_init(&m)
        try:
            try:
                self.call_plain(&m, &table.plains[pye_index_mask(number, table.num)], &called)
            except _errors.EnclavePoisonedError:
                raise
            except BaseException as error:
                message_clear(&m)
                return self.refused(error, number, "function" if called else "request")
            return False if self.ending else self.send_answer(number, &m)
        finally:
            message_clear(&m)
            self.forget()

    cdef int call_plain(self, Message *m, PlainFunction *plain, bint *called) except -1:
        values = (<Plan>plain.arguments).get_tuple(self.in_data, <size_t>self.header.total)
        called[0] = True
        self.running = True
        value = (<object>plain.function)(*values)
        values = None
        self.pack(m, <Plan>plain.result, value, "the result")
        self.running = False
        return 0

    cdef bint answer(self, object allowed) except -1:
        """
        Handle the message that `header` announces; False if `idle` wants to end.

        ``allowed``: None for a call of its own, whose short message is in `in_data` already; else
        the indices that a nested one may have, and nothing is read yet.
        """
        cdef Message m
        cdef FunctionTable table = self.table
        cdef size_t total = <size_t>self.header.total
        cdef uint16_t number = self.header.index
        cdef uint16_t kind = self.header.kind
        cdef const uint8_t *data = self.in_data
        cdef uint32_t index
        cdef Plan plan
        cdef Shared shared
        cdef object owner = None
        cdef str stage = "request"
        if allowed is not None or total > self.in_size:
            data = self.receive()
            owner, self.large = self.large, None
            if data == NULL:
                return not self.ending
        message_init(&m)
        try:
            try:
                if kind == PYE_FRAME_CALL:
                    index = self.callee(number, allowed)
                    if table.natives[index] != NULL:  # nested, or longer than a slot
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
                        shared_init(
                            &shared, self.shared_data, self.shared_size,
                            self.shared_size and has_place(result, table.flags[index] & STREAMS))
                        values = plan.get(data, total, owner, &shared, self.scratch)
                        owner = None
                        if plan.optional:
                            values = fill_missing(values, missing)
                        stage = "function"
                        self.running = True
                        if keywords:
                            count = len(values) - len(keywords)
                            value = function(
                                *values[:count], **dict(zip(keywords, values[count:])))
                        else:
                            value = function(*values)
                        values = None
                        if table.flags[index] & STREAMS:
                            self.stream(value, result, number)
                        else:
                            if shared.room:
                                m.shared = shared
                                m.fills = True
                            self.pack(&m, result, value, "the result")
                        self.running = False
                elif kind == PYE_FRAME_BATCH:
                    batch_answer(self, self.callee(number, allowed), &m, data, total, owner)
                elif kind == PYE_FRAME_ATTEST:
                    if total > 1024:
                        raise _errors.ArgumentError(
                            "the nonce is too long", expected="at most 1024 bytes", found=total)
                    stage = "function"
                    answer = self.attest(PyBytes_FromStringAndSize(<char *>data, <Py_ssize_t>total))
                    m.segments[0].data = <const uint8_t *><char *>answer
                    m.segments[0].len = <size_t>len(answer)
                    m.num_segments = 1
                elif kind == PYE_FRAME_PING:  # longer than a slot
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
                return self.refused(error, number, stage)
            return False if self.ending else self.send_answer(number, &m)
        finally:
            message_clear(&m)
            self.forget()

    cdef uint32_t callee(self, uint16_t number, object allowed) except? 0xffffffff:
        """Return the index of a function that may be called here, checked against the table."""
        cdef uint32_t index
        if number >= self.table.num:
            raise _errors.UnknownFunctionError(
                "no function has this number", expected=f"below {self.table.num}", found=number)
        index = pye_index_mask(number, self.table.num)
        if allowed is None:
            if self.table.flags[index] & PRIVATE:
                raise _errors.CallError(
                    "this function is private: it is called only from the handler of an ocall that "
                    "allows it")
        elif index not in allowed:
            raise _errors.CallError("the ocall does not allow calls of this function")
        elif pye_lane_depth(self.lane) > PYE_LANE_MAX_DEPTH:
            raise _errors.CallError(
                "calls are nested too deep", expected=f"at most {PYE_LANE_MAX_DEPTH}")
        return index

    cdef int pack(self, Message *m, Plan plan, object value, str what) except -1:
        """Encode a result or an item. A value that does not fit is the function's TypeError."""
        if not plan.plain or plan.num != 1 or not put_exact(m, plan.codes[0], value):
            try:
                plan.put(m, (value,))
            except _errors.ArgumentError as error:
                raise TypeError(str(error)) from None
        plan.finish(m)
        if m.total > self.limit:
            raise _errors.ArgumentError(
                f"{what} is too long", expected=f"at most {self.limit} bytes", found=m.total,
                advice="Raise [memory] message in enclave.toml.")
        return 0

    # ---- what goes on within a call --------------------------------------------------------

    cdef uint16_t next_message(self) except? 0:
        """
        Wait for the host within a call; its header is in `header`. 0: `idle` wants to end.

        The lane refuses every kind that is out of turn.
        """
        cdef pye_status status
        while True:
            with nogil:
                status = pye_lane_wait(self.lane, &self.header, SLICE_MS)
            if status == PYE_OK or status == PYE_E_LIMIT:
                self.too_long = status == PYE_E_LIMIT
                return self.header.kind
            if status != PYE_E_TIMEOUT:
                self.poison()
            if not self.idle():
                self.ending = True
                return 0

    cdef int stream(self, object value, Plan plan, uint16_t number) except -1:
        """Give items until there are no more or the host stops; then RESULT follows, or ERROR."""
        cdef Message m
        cdef uint16_t kind
        items = iter(value)
        try:
            while True:
                try:
                    item = next(items)
                except StopIteration:
                    return 0
                message_init(&m)
                try:
                    self.pack(&m, plan, item, "the item")
                    item = None
                    self.running = False
                    self.send(<uint16_t>PYE_FRAME_ITEM, number, m.segments, m.num_segments)
                finally:
                    message_clear(&m)
                kind = 0 if self.ending else self.next_message()
                if kind == 0:
                    return 0
                self.receive()  # nothing is in it
                self.running = True
                if kind == PYE_FRAME_STOP:
                    return 0
        finally:
            close = getattr(items, "close", None)
            if close is not None and not self.ending:
                close()

    def ocall(self, uint32_t number, tuple values not None):
        """
        Call host function `number` and return what it answers, which is not to be trusted.

        Only for the thread of this lane, while trusted code of a call runs in it. ArgumentError: a
        value does not fit. OcallError: the host's function failed, or what it answered does not
        fit. EnclaveStateError: no call is under way here. EnclavePoisonedError: the host broke the
        protocol. EnclaveLostError: the platform ended.
        """
        cdef Message m
        if not self.running:
            raise _errors.EnclaveStateError(
                "the host can be called only while a trusted function runs",
                advice="Not from a finalizer, a thread of its own or before the first call.")
        if number >= <uint32_t>len(self.ocalls):
            raise IndexError(number)
        name, arguments, result, allowed = self.ocalls[number]
        message_init(&m)
        try:
            (<Plan>arguments).put(&m, values)
            (<Plan>arguments).finish(&m)
            if m.total > self.limit:
                raise _errors.ArgumentError(
                    f"the arguments of {name} are too long",
                    expected=f"at most {self.limit} bytes", found=m.total,
                    advice="Raise [memory] message in enclave.toml.")
            # What runs from here on in this thread, a finalizer for instance, is not the function.
            self.running = False
            self.send(<uint16_t>PYE_FRAME_OCALL, <uint16_t>number, m.segments, m.num_segments)
        finally:
            message_clear(&m)
        try:
            return self.await_ocall(name, result, allowed)
        finally:
            self.running = True

    cdef object await_ocall(self, str name, Plan plan, object allowed):
        """Make the nested calls that the host asks for until it answers."""
        cdef uint16_t kind
        cdef const uint8_t *data
        cdef size_t total
        cdef object owner = None
        while not self.ending:
            kind = self.next_message()
            if kind == 0:
                break
            if kind == PYE_FRAME_CALL:
                if self.too_long:
                    self.refuse_long()
                else:
                    self.answer(allowed)
                continue
            if self.too_long:
                raise ocall_error(
                    f"what the host function {name} returned is too long: "
                    f"{self.header.total} bytes, at most {self.limit}")
            data = self.receive()
            owner, self.large = self.large, None
            if data == NULL:  # dropped: another answer comes
                continue
            total = <size_t>self.header.total
            if kind == PYE_FRAME_OCALL_ERROR:
                raise failed_ocall(name, data, total)
            if plan.arrays and owner is None:
                owner = PyByteArray_FromStringAndSize(<char *>data, <Py_ssize_t>total)
                data = <const uint8_t *>PyByteArray_AsString(owner)
            try:
                return plan.get_one(data, total, owner)
            except _errors.ArgumentError as error:
                raise ocall_error(
                    f"what the host function {name} returned does not fit its signature: "
                    f"{error.message}") from None
        raise _errors.EnclaveLostError("the platform ended")


cdef object ocall_error(str message, str kind=""):
    """An OcallError whose text says nothing but what the host knows: it may cross as it is."""
    error = _errors.OcallError(message, type=kind)
    error.from_host = True
    return error


cdef object failed_ocall(str name, const uint8_t *data, size_t total):
    """The error that OCALL_ERROR describes: the name of a class, or nothing."""
    cdef str kind = ""
    if total == 0:
        return ocall_error(f"the host gave up the call of {name}")
    if total <= 128:
        try:
            kind = PyUnicode_DecodeUTF8(<char *>data, <Py_ssize_t>total, NULL)
        except UnicodeDecodeError:
            pass
    if not kind.isidentifier():
        return ocall_error(f"the host function {name} failed")
    return ocall_error(f"the host function {name} raised {kind}", kind)


cdef tuple fill_missing(tuple values, dict missing):
    filled = list(values)
    for i in range(len(filled)):
        if filled[i] is MISSING:
            if i not in missing:
                raise _errors.ArgumentError(f"argument {i + 1} is missing")
            filled[i] = missing[i]
    return tuple(filled)
