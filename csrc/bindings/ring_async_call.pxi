# One call from an event loop, and the function it is of. All of it runs on the loop's thread.

@cython.final
cdef class AsyncCall:
    """
    A call that was not answered at once.

    Its ``future`` is done when ``take()`` has something: the answer, or the call itself, held by
    an ocall (then ``request`` and ``respond``) or an item of a stream (``item`` and ``more``).
    """

    cdef AsyncLanes lanes
    cdef AsyncFunction function    # None: a control frame, or a batch
    cdef AsyncCall parent          # in whose ocall this call is nested
    cdef BatchCall batched
    cdef Batch batch
    cdef AsyncCall carrier         # the call that this one crosses in, with others
    cdef list members              # the calls that cross in this one
    cdef _Habit habit               # of their function
    cdef object out
    cdef Shared shared             # its place is that of `out`, if the call named it
    cdef tuple arrays              # in shared memory, that the worker may still look at
    cdef Message *message          # until all of it is sent
    cdef int stage
    cdef int lane
    cdef bint armed
    cdef bint counted
    cdef bint begun                # before it was given up
    cdef bint unseen               # its worker slept: it was not looked for
    cdef uint16_t kind             # of the message that is sent
    cdef uint16_t index
    cdef uint16_t first_kind       # of the call itself
    cdef uint16_t first_index
    cdef uint32_t level            # calls under way on the lane before this one
    cdef readonly uint32_t serial  # how often it was held
    cdef uint64_t length           # of a stream's items
    cdef object cause
    cdef object vacated
    cdef pye_lane_header header
    cdef object owner
    cdef uint8_t *data
    cdef object error
    cdef uint64_t ticks            # left to look for it, of those that were given
    cdef uint64_t given
    cdef uint64_t since            # when it was sent; ns
    cdef readonly object future

    def __cinit__(self):
        self.message = NULL
        self.lane = -1
        self.stage = QUEUED
        self.armed = False
        self.counted = False

    def __dealloc__(self):
        if self.message != NULL:
            message_clear(self.message)
            free(self.message)

    def __reduce__(self):
        raise TypeError("a call cannot be pickled or copied")

    @property
    def done(self) -> bool:
        """Whether nothing more comes of this call."""
        return self.stage == DONE

    @property
    def started(self) -> bool:
        """Whether the trusted function may have begun."""
        if self.stage == DROPPED or self.stage == DONE:
            return self.begun
        # What is sent after the call itself (an ocall's answer, MORE) is sent to one that began.
        return self.stage >= WAITING or self.kind != self.first_kind

    @property
    def held(self) -> int:
        """The kind of frame that the host has to answer (OCALL, ITEM), or 0."""
        return self.header.kind if self.stage == HELD else 0

    def take(self):
        """Return the answer, raise the call's error, or return this call if it is held."""
        if self.error is not None:
            error = self.error
            self.error = None
            raise error
        if self.stage == HELD:
            return self
        return self.value()

    def request(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the ocall's handler and its arguments. ArgumentError: they do not fit."""
        self.need(<uint16_t>PYE_FRAME_OCALL)
        owner = self.owner
        self.owner = None
        if owner is None:
            raise _errors.EnclaveStateError("the ocall was read already")
        return self.lanes.host.ocalls.request(self.header.index, owner)

    def respond(self, value, error) -> None:
        """Answer the ocall by what its handler returned or raised; ``future`` is another then."""
        cdef Message *m
        cdef uint16_t kind = PYE_FRAME_OCALL_RESULT
        cdef uint16_t index = self.header.index
        self.need(<uint16_t>PYE_FRAME_OCALL)
        m = self.lanes.new_message()
        try:
            if error is None:
                try:
                    self.lanes.host.ocalls.response(m, index, value)
                except (_errors.ArgumentError, TypeError) as refused:
                    error = refused
            if error is not None:
                message_clear(m)
                put_buffer(m, ocall_failure(error))
                kind = PYE_FRAME_OCALL_ERROR
        except BaseException:
            self.lanes.old_message(m)
            raise
        self.cause = error
        self.lanes.go_on(self, m, kind, index)

    cdef void forget(self) noexcept:
        """Wipe what was read and will not be asked for."""
        if self.owner is not None:
            pye_wipe(self.data, <size_t>self.header.total)
            self.owner = None

    def item(self):
        """Return the item of the stream that came."""
        cdef HostCall c = self.function.call
        self.need(<uint16_t>PYE_FRAME_ITEM)
        owner = self.owner
        self.owner = None
        return self.lanes.host.decode(c.result, self.data, <size_t>self.header.total, owner)

    def more(self, bint stop) -> None:
        """Ask for the stream's next item, or for its end; ``future`` is another then."""
        self.need(<uint16_t>PYE_FRAME_ITEM)
        self.lanes.go_on(self, self.lanes.new_message(),
                         <uint16_t>(PYE_FRAME_STOP if stop else PYE_FRAME_MORE), 0)

    def hold(self):
        """A future that is done if the call ends while its ocall is answered."""
        self.need(<uint16_t>PYE_FRAME_OCALL)
        if not has_watch(self.lanes):
            # An ocall that came at once was watched for by nobody: the worker's end has to be.
            self.lanes.loop.call_later(POLL_S, self.lanes.ready)
        self.future = self.lanes.loop.create_future()
        return self.future

    def vacant(self):
        """None if the lane is this call's own again, else a future for a nested call's end."""
        if self.stage != HELD or self.lanes.calls[self.lane] is self:
            return None
        if self.vacated is None or self.vacated.done():
            self.vacated = self.lanes.loop.create_future()
        return self.vacated

    cdef int need(self, uint16_t kind) except -1:
        if self.error is not None:
            self.take()  # the enclave ended since: that is what to say
        if self.stage != HELD or self.header.kind != kind:
            raise _errors.EnclaveStateError("the call does not wait for the host")
        self.lanes.check()
        return 0

    cdef pye_status judge(self, pye_lane *lane) except? -1:
        """Whether what came is what may answer this self."""
        cdef bint streams = self.function is not None and self.function.call.streams
        if self.header.kind == PYE_FRAME_OCALL:
            if self.first_kind != PYE_FRAME_CALL and self.first_kind != PYE_FRAME_BATCH:
                return pye_lane_refuse(lane, "turn")
            if self.lanes.host.ocalls is None or self.header.index >= self.lanes.host.ocalls.num:
                return pye_lane_refuse(lane, "ocall")
        elif self.header.kind == PYE_FRAME_ITEM:
            if not streams:
                return pye_lane_refuse(lane, "turn")
        elif self.header.kind == PYE_FRAME_RESULT and streams and self.header.total:
            return pye_lane_refuse(lane, "stream")
        return PYE_OK

    cdef int make_room(self) except -1:
        """Make what the announced message is read into; its size is below the message limit."""
        cdef Py_ssize_t total = <Py_ssize_t>self.header.total
        cdef bint plain = self.batched is None and (
            self.function is None or self.function.call.native)
        if (self.header.kind == PYE_FRAME_ERROR
                or (self.header.kind == PYE_FRAME_RESULT and plain)):
            self.owner = PyBytes_FromStringAndSize(NULL, total)
            self.data = <uint8_t *><char *>self.owner
        else:
            self.owner = PyByteArray_FromStringAndSize(NULL, total)
            self.data = <uint8_t *>PyByteArray_AsString(self.owner)
        return 0

    cdef object value(self):
        """Decode an answer that was read."""
        cdef HostCall c
        cdef object owner = self.owner
        self.owner = None
        if owner is None:
            raise _errors.EnclaveStateError("the call has no answer")
        if self.function is None:
            return owner
        c = self.function.call
        if c.streams:
            return None
        if c.native:
            value = owner
            if c.element is not None:
                value = native_array(value, c.element)
        elif self.out is not None and self.shared.room and answer_is_there(
                self.data, <size_t>self.header.total, self.out, self.shared.place):
            return self.out
        else:
            value = self.lanes.host.decode(c.result, self.data, <size_t>self.header.total, owner)
        return value if self.out is None else fill_out(self.out, value)

    def give_up(self) -> int:
        """
        Stop waiting. A queued call never starts; else its lane is free when the worker has done.

        Returns the number of the lane that is still busy with it, or -1.
        """
        return drop(self.lanes, self)

    def expired(self) -> None:
        """Count that this call's deadline passed."""
        pye_stats_event(self.lanes.host.counts, PYE_STATS_TIMEOUT)


@cython.final
cdef class AsyncFunction:
    """A trusted function as it is called from a loop: ``begin`` is a call's first half."""

    cdef AsyncLanes lanes
    cdef HostCall call
    cdef _Habit habit
    cdef uint64_t patience         # ticks that a call is looked for
    cdef uint32_t skipped

    def __init__(self, AsyncLanes lanes, HostCall call):
        self.lanes = lanes
        self.call = call
        self.habit = habit_of(lanes, call)
        self.patience = lanes.longest
        self.skipped = 0

    @property
    def patient(self) -> bool:
        """Whether answers are looked for before the loop gets its turn (tests)."""
        return self.patience != 0

    @property
    def together(self) -> bool:
        """Whether calls that wait for a lane would cross together now (tests)."""
        return self.habit.packs()

    def begin(self, tuple args, dict kwargs):
        """Make a call: return its answer if that came at once, else an AsyncCall."""
        return self.make(args, kwargs, None)

    def nest(self, tuple args, dict kwargs, AsyncCall held not None):
        """The same from the handler of an ocall, on the lane of the call that it answers."""
        held.need(<uint16_t>PYE_FRAME_OCALL)
        return self.make(args, kwargs, held)

    cdef object make(self, tuple args, dict kwargs, AsyncCall parent):
        cdef HostCall c = self.call
        cdef object out = None
        cdef Message *m
        self.lanes.check()
        if self.habit.barred:
            self.habit.barred -= 1
        if kwargs:
            if c.has_out:
                out = kwargs.pop("out", None)
            args = c.bind(args, kwargs)
        elif PyTuple_Size(args) != c.arguments.num:
            args = c.bind(args, kwargs)
        if out is not None:
            check_out(out)
        m = self.lanes.new_message()
        try:
            # All of the caller's code (buffers, __index__) runs here, before a lane is taken.
            if c.native:
                value = <object>PyTuple_GetItem(args, 0)
                if c.wanted:
                    value = native_argument(value, c.wanted)
                put_buffer(m, value)
            else:
                c.prepare(m, args, out)
        except BaseException:
            self.lanes.old_message(m)
            pye_stats_event(self.lanes.host.counts, PYE_STATS_ARGUMENT)
            raise
        return self.lanes.submit(self, m, <uint16_t>PYE_FRAME_CALL, c.index, out, None, None,
                                 parent)

    cdef uint64_t look(self) noexcept:
        """How long the call that begins now is looked for."""
        if self.patience == 0:
            self.skipped += 1
            if self.skipped >= PROBE:
                self.skipped = 0
                return self.lanes.longest
        return self.patience

    cdef void learn(self, uint64_t given, uint64_t left) noexcept:
        """A call was looked for: was it worth it?"""
        if given == 0 or left == given:
            return  # the first look found it: how long it took is not known
        if left != 0 and given - left <= USUAL_US * PYE_LANE_TICKS:
            self.patience = self.lanes.longest
        else:
            self.patience //= 2
            if self.patience < LEAST_US * PYE_LANE_TICKS:
                self.patience = 0


cdef _Names _begin_names = _Names("begin", ("args", "kwargs"), 2, 2)


cdef object fast_begin(AsyncFunction self, PyObject *const *args, Py_ssize_t nargs,
                       PyObject *kwnames):
    cdef PyObject *v[FAST_MAX]
    take_arguments(_begin_names, v, args, nargs, kwnames)
    return self.make(<tuple?><object>v[0], <dict?><object>v[1], None)


cdef PyMethodDef _begin_method
put_method(AsyncFunction, &_begin_method, "begin", <void *>fast_begin,
           b"begin($self, args, kwargs)\n--\n\n"
           b"Make a call: return its answer if that came at once, else an AsyncCall.")

cdef int put_buffer(Message *m, value) except -1:
    """The whole message is the bytes of `value`."""
    if not PyObject_CheckBuffer(value):
        raise argument_error("argument data", "bytes or a contiguous buffer", type_name(value))
    try:
        PyObject_GetBuffer(value, &m.views[0], PyBUF_SIMPLE)
    except (BufferError, ValueError) as error:
        raise argument_error(
            "argument data", "contiguous bytes", str(error),
            "Use numpy.ascontiguousarray(...) on it.") from None
    m.num_views = 1
    m.segments[0].data = <const uint8_t *>m.views[0].buf
    m.segments[0].len = <size_t>m.views[0].len
    m.num_segments = 1
    return 0
