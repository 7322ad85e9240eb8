# The host's side of a ring for an event loop: nothing here blocks. A call is written and looked for
# at once, for a short time; then a watcher thread (csrc/src/linux/watch.c) makes an eventfd readable
# when the worker answered, and the loop calls ``ready``. All of it runs on the loop's thread.
from collections import OrderedDict as _OrderedDict

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_LANE_TICKS
    ctypedef struct pye_watch:
        pass
    int pye_lane_look(pye_lane *lane, uint64_t *ticks)
    int pye_lane_arm(pye_lane *lane, uint32_t **word, uint32_t *seen)
    void pye_lane_disarm(pye_lane *lane)
    pye_status pye_watch_new(pye_watch **out, uint32_t num, int event_fd)
    void pye_watch_set(pye_watch *watch, uint32_t slot, uint32_t *word, uint32_t expected)
    void pye_watch_kick(pye_watch *watch)
    void pye_watch_free(pye_watch *watch)

cdef enum:
    QUEUED = 0              # stages of a call
    SENDING = 1
    WAITING = 2
    READING = 3
    HELD = 4                # its lane waits for the host: an ocall or an item is to be answered
    DROPPED = 5             # given up; the lane waits until the worker has done with it
    DONE = 6

cdef enum:
    LONGEST_US = 50         # for a call in all
    USUAL_US = 20           # functions that take longer are left to the watcher: a switch is cheaper
    LEAST_US = 3
    HOT_US = 12             # for a call that waited: the worker answered just now, so it is awake
    PROBE = 64              # of the calls that are not looked for, every so many-th is
    TURN_US = 1000          # then the loop gets its turn

cdef double POLL_S = 0.005  # between two looks where nothing can be watched


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
    cdef object out
    cdef Shared shared             # its place is that of `out`, if the call named it
    cdef tuple arrays              # in shared memory, that the worker may still look at
    cdef Message *message          # until all of it is sent
    cdef int stage
    cdef int lane
    cdef bint armed
    cdef bint counted
    cdef bint begun                # before it was given up
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
        return self.lanes.value(self)

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

    def give_up(self) -> int:
        """
        Stop waiting. A queued call never starts; else its lane is free when the worker has done.

        Returns the number of the lane that is still busy with it, or -1.
        """
        return self.lanes.drop(self)

    def expired(self) -> None:
        """Count that this call's deadline passed."""
        pye_stats_event(self.lanes.host.counts, PYE_STATS_TIMEOUT)


@cython.final
cdef class AsyncFunction:
    """A trusted function as it is called from a loop: ``begin`` is a call's first half."""

    cdef AsyncLanes lanes
    cdef HostCall call
    cdef uint64_t patience         # ticks that a call is looked for
    cdef uint32_t skipped

    def __init__(self, AsyncLanes lanes, HostCall call):
        self.lanes = lanes
        self.call = call
        self.patience = lanes.longest
        self.skipped = 0

    @property
    def patient(self) -> bool:
        """Whether answers are looked for before the loop gets its turn (tests)."""
        return self.patience != 0

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


@cython.final
@cython.no_gc_clear  # the ring must stay mapped until the watcher has ended; lists break the cycles
cdef class AsyncLanes:
    """
    The lanes of a ring for callers on one event loop, the one that runs when this is made.

    ``attach()`` is called once, when the first call is not answered at once: it returns an eventfd
    and has the loop call ``ready()`` when that is readable. ``broken(check)``: the worker broke the
    protocol; returns the exception to raise, and may not block. ``get_loop()`` returns the running
    loop, or raises RuntimeError. `inline`: whether answers are looked for before the loop gets its turn.
    """

    cdef HostLanes host
    cdef object loop
    cdef object get_loop
    cdef object attach
    cdef object broken
    cdef object queue
    cdef int queue_limit
    cdef list calls
    cdef int active                # calls that hold a lane
    cdef Message *spare
    cdef pye_watch *watch
    cdef int event_fd
    cdef uint64_t longest
    cdef uint64_t turn             # since when the loop had no turn, as far as is known; ns
    cdef uint64_t last
    cdef bint pumping
    cdef bint has_thread
    cdef bint coming               # the loop was asked to call ``ready``
    cdef object __weakref__

    def __cinit__(self):
        self.spare = NULL
        self.watch = NULL
        self.event_fd = -1

    def __init__(self, HostLanes host not None, int queue_limit, loop, get_loop, attach, broken,
                 bint inline):
        self.host = host
        self.queue_limit = queue_limit
        self.loop = loop
        self.get_loop = get_loop
        self.has_thread = hasattr(loop, "_thread_id")
        self.attach = attach
        self.broken = broken
        self.queue = _OrderedDict()
        self.calls = [None] * <Py_ssize_t>host.num
        self.longest = LONGEST_US * PYE_LANE_TICKS if inline else 0

    def __dealloc__(self):
        if self.spare != NULL:
            message_clear(self.spare)
            free(self.spare)
        # A forked child has no such thread; what it copied of it is left as it is.
        if self.watch != NULL and (<uint8_t *>self.host.token.buf)[0] == 1:
            with nogil:
                pye_watch_free(self.watch)

    def __reduce__(self):
        raise TypeError("a ring cannot be pickled or copied")

    @property
    def busy(self) -> int:
        """How many lanes have a call under way, given up ones included."""
        return self.active

    @property
    def queued(self) -> int:
        """How many calls wait for a lane."""
        return len(self.queue)

    def close(self) -> None:
        """End the watcher. May be called twice; calls are to be failed before."""
        cdef pye_watch *watch = self.watch
        self.watch = NULL
        if watch != NULL and (<uint8_t *>self.host.token.buf)[0] == 1:
            with nogil:
                pye_watch_free(watch)

    def fail_all(self, make) -> None:
        """End every call that waits: ``make(started)`` returns its error."""
        cdef AsyncCall call
        cdef uint32_t i
        calls = list(self.queue)
        self.queue.clear()
        self.host.waiting = 0
        for i in range(self.host.num):
            call = self.calls[i]
            self.calls[i] = None
            while call is not None:
                calls.append(call)
                call = call.parent
        self.active = 0
        for call in calls:
            if call.stage != DROPPED:
                call.error = make(self.may_have_begun(call))
                self.count_end(call.error)
                call.forget()
                self.end(call)
            call.stage = DONE
            self.vacate(call)

    cdef bint may_have_begun(self, AsyncCall call):
        """Whether the function may have begun, when the worker is gone."""
        if call.stage == WAITING and call.kind == call.first_kind:
            lane = self.host.lanes[call.lane]
            # A call that the worker never took did not begin.
            return bool(pye_lane_taken(lane, pye_lane_sequence(lane)))
        return call.started

    cdef int count_end(self, error) except -1:
        if isinstance(error, _errors.EnclaveLostError):
            pye_stats_event(self.host.counts, PYE_STATS_LOST)
        elif isinstance(error, _errors.EnclavePoisonedError):
            pye_stats_event(self.host.counts, PYE_STATS_POISONED)
        return 0

    cdef int check(self) except -1:
        self.host.check()
        if self.has_thread:
            # asyncio's own loops know their thread while they run. get_running_loop() asks for the
            # process's id each time, a system call that costs a tenth of a short call.
            owner = self.loop._thread_id
            if owner is not None and <unsigned long>owner == PyThread_get_thread_ident():
                return 0
        try:
            loop = self.get_loop()
        except RuntimeError:
            raise _errors.EnclaveStateError(
                "no asyncio event loop runs here",
                advice="Use AsyncEnclave in a coroutine under asyncio; Enclave is for threads."
            ) from None
        if loop is not self.loop:
            raise _errors.EnclaveStateError(
                "this handle belongs to another event loop",
                expected="the loop that first used it", found="another one",
                advice="Make an AsyncEnclave in each loop.")
        return 0

    cdef Message *new_message(self) except NULL:
        cdef Message *m = self.spare
        self.spare = NULL
        if m == NULL:
            m = <Message *>malloc(sizeof(Message))
            if m == NULL:
                raise MemoryError()
        message_init(m)
        return m

    cdef void old_message(self, Message *m) noexcept:
        message_clear(m)
        if self.spare == NULL:
            self.spare = m
        else:
            free(m)

    def request(self, uint16_t kind, data):
        """Send a control frame (PING, ATTEST): return its answer, or an AsyncCall."""
        cdef Message *m
        self.check()
        m = self.new_message()
        try:
            put_buffer(m, data)
        except BaseException:
            self.old_message(m)
            raise
        return self.submit(None, m, kind, 0, None, None, None, None)

    def send_batch(self, BatchCall function not None, Batch batch not None):
        """Send a batch: return its answer, a bytearray, or an AsyncCall."""
        cdef Message *m
        self.check()
        m = self.new_message()
        m.segments[0] = batch.segments[0]
        m.segments[1] = batch.segments[1]
        m.num_segments = 2
        return self.submit(None, m, <uint16_t>PYE_FRAME_BATCH, function.call.index, None, function,
                           batch, None)

    cdef int free_lane(self) noexcept:
        cdef uint32_t i
        if self.active >= <int>self.host.num:
            return -1
        for i in range(self.host.num):
            if PYE_SWAP(&self.host.states[i], FREE, BUSY):
                self.host.epochs[i] += 1
                return <int>i
        return -1

    cdef object submit(self, AsyncFunction function, Message *m, uint16_t kind, uint16_t index,
                       object out, BatchCall batched, Batch batch, AsyncCall parent):
        """Take over `m`: return the answer, or the call."""
        cdef AsyncCall call
        cdef pye_lane_header header
        cdef pye_status status
        cdef Shared shared
        cdef uint64_t ticks
        cdef uint64_t given
        cdef int lane = -1
        cdef int stage = QUEUED
        cdef uint32_t level = 0
        cdef bint turn_over = False
        cdef bint asleep = False
        if parent is not None:
            try:
                lane = self.nested_lane(parent)
            except BaseException:
                self.old_message(m)
                raise
            level = pye_lane_depth(self.host.lanes[lane])
        elif not self.queue:
            lane = self.free_lane()
        shared = m.shared
        arrays = named_arrays(m, out)
        given = ticks = function.look() if function is not None else self.longest
        if lane >= 0 and function is not None:
            # The whole of a short call, without an object for it.
            if function.call.note is not None:
                self.host.show(lane, function.call.note)
            pye_stats_time(self.host.counts, <uint32_t>lane, index)
            status = pye_lane_write(self.host.lanes[lane], kind, index, m.segments,
                                    m.num_segments, 0)
            pye_stats_begin(self.host.counts, <uint32_t>lane, index, m.segments, m.num_segments)
            stage = SENDING
            if status == PYE_OK:
                stage = WAITING
                self.old_message(m)
                m = NULL
                asleep = pye_lane_peer_asleep(self.host.lanes[lane]) != 0
                if not asleep and pye_lane_look(self.host.lanes[lane], &ticks):
                    status = pye_lane_wait(self.host.lanes[lane], &header, 0)
                    if (status == PYE_OK and header.kind == PYE_FRAME_RESULT
                            and header.length == header.total and parent is None and out is None
                            and not function.call.streams):
                        turn_over = not self.has_turn()
                        if not turn_over:
                            function.learn(given, ticks)
                            return self.quick(function, lane, index, <size_t>header.total)
        call = AsyncCall.__new__(AsyncCall)
        call.lanes = self
        call.function = function
        call.out = out
        call.shared = shared
        call.arrays = arrays
        call.message = m
        call.kind = call.first_kind = kind
        call.index = call.first_index = index
        call.batched = batched
        call.batch = batch
        if lane < 0:
            if len(self.queue) >= self.queue_limit:
                pye_stats_event(self.host.counts, PYE_STATS_BUSY)
                raise _errors.BusyError(
                    "too many calls wait for this enclave", expected=f"at most {self.queue_limit}",
                    advice="Give the image more threads, or make fewer calls at a time.")
            call.future = self.loop.create_future()
            self.queue[call] = None
            self.host.waiting = <int>len(self.queue)
            pye_stats_depth(self.host.counts, <uint64_t>self.host.waiting)
            return call
        call.parent = parent
        if stage != QUEUED:
            call.counted = True
        call.level = level
        self.put(call, lane)
        if stage != QUEUED:
            call.stage = stage
        call.ticks = ticks
        call.given = given
        if asleep:  # it wakes up while the loop goes on; then its answer is looked for
            call.future = self.loop.create_future()
            self.soon()
            return call
        finished = self.step(call)
        if call.error is not None:
            if not finished:
                self.soon()  # its lane is free only when the worker has done with it
            return call.take()
        if finished:
            if call.stage == DONE and not turn_over and self.has_turn():
                return self.value(call)
            # The loop gets its turn now, and then the caller its answer.
            call.future = self.loop.create_future()
            call.future.set_result(None)
            return call
        call.future = self.loop.create_future()
        self.soon()
        return call

    cdef bint has_turn(self) noexcept:
        """Whether one more answer may be given before the loop gets its turn."""
        cdef uint64_t now = pye_clock_ns()
        if now - self.last > TURN_US * 1000:
            self.turn = now  # no long run of them
        self.last = now
        if now - self.turn < TURN_US * 1000:
            return True
        self.turn = now
        return False

    cdef object quick(self, AsyncFunction function, int lane, uint16_t index, size_t total):
        """Read and decode an answer of one fragment; its lane is free then."""
        cdef HostCall c = function.call
        cdef pye_lane *this = self.host.lanes[lane]
        cdef pye_status status
        cdef uint8_t[SMALL] small
        cdef uint8_t *data = small
        cdef object owner = None
        try:
            if c.native:
                owner = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
                data = <uint8_t *><char *>owner
            elif c.result.arrays or total > SMALL:
                owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
                data = <uint8_t *>PyByteArray_AsString(owner)
        except MemoryError:
            status = pye_lane_drain(this, 0)
            self.let_go(lane)
            raise
        status = pye_lane_read(this, data, total, 0)
        if status == PYE_OK:
            pye_stats_answer(self.host.counts, <uint32_t>lane, index, total)
        self.let_go(lane)
        if status != PYE_OK:
            raise self.broken(pye_lane_broken(this).decode())
        if c.native:
            return owner if c.element is None else native_array(owner, c.element)
        return self.host.decode(c.result, data, total, owner)

    cdef int let_go(self, int lane) except -1:
        pye_stats_finish(self.host.counts, <uint32_t>lane)
        if pye_lane_idle(self.host.lanes[lane]):
            if self.host.notes[lane] is not None:
                self.host.show(lane, None)
            PYE_SET(&self.host.states[lane], FREE)
        return 0

    cdef int put(self, AsyncCall call, int lane) except -1:
        self.calls[lane] = call
        if call.parent is None:
            self.active += 1
        call.lane = lane
        call.stage = SENDING
        if call.function is not None and call.function.call.note is not None and not call.counted:
            self.host.show(lane, call.function.call.note)
        if call.kind == PYE_FRAME_CALL and not call.counted:
            pye_stats_time(self.host.counts, <uint32_t>lane, call.index)
        call.given = call.ticks = (
            call.function.look() if call.function is not None and not call.counted
            else self.longest)
        return 0

    cdef int nested_lane(self, AsyncCall parent) except -1:
        if self.calls[parent.lane] is not parent:
            raise _errors.BusyError(
                "another nested call has the lane of this ocall", expected="one at a time",
                advice="Await one before the next.")
        if pye_lane_depth(self.host.lanes[parent.lane]) >= PYE_LANE_MAX_DEPTH:
            raise _errors.CallError(
                "calls are nested too deep", expected=f"at most {PYE_LANE_MAX_DEPTH}")
        return parent.lane

    cdef int go_on(self, AsyncCall call, Message *m, uint16_t kind, uint16_t index) except -1:
        """Send a held call's answer, taking over `m`."""
        if self.calls[call.lane] is not call:
            self.old_message(m)
            raise _errors.EnclaveStateError("a nested call still has the lane")
        call.message = m
        call.kind = kind
        call.index = index
        call.owner = None
        call.stage = SENDING
        call.ticks = self.longest
        call.given = 0
        call.future = self.loop.create_future()
        if self.step(call):
            self.finish(call)
            if self.queue:
                self.soon()
        else:
            self.settle(call)
            self.soon()
        return 0

    cdef int settle(self, AsyncCall call) except -1:
        """A call that failed is over for who waits, even where its lane is not free yet."""
        if call.error is not None:
            self.finish(call)
        return 0

    cdef bint step(self, AsyncCall call) except -1:
        """
        Go on with a call as far as that is possible now; True when it needs nothing more.

        What goes wrong is the call's error and not raised here.
        """
        cdef pye_lane *lane = self.host.lanes[call.lane]
        cdef pye_status status = PYE_OK
        cdef uint64_t given = call.given
        if call.stage == HELD:
            return True
        while True:
            if call.stage == SENDING:
                status = pye_lane_write(lane, call.kind, call.index, call.message.segments,
                                        call.message.num_segments, 0)
                if not call.counted:
                    call.counted = True
                    if call.first_kind == PYE_FRAME_CALL:
                        pye_stats_begin(self.host.counts, <uint32_t>call.lane, call.index,
                                        call.message.segments, call.message.num_segments)
                if status == PYE_OK:
                    self.old_message(call.message)
                    call.message = NULL
                    call.stage = WAITING
            if call.stage == WAITING:
                status = pye_lane_wait(lane, &call.header, 0)
                if status == PYE_OK:
                    status = self.judge(call, lane)
                if status == PYE_OK:
                    try:
                        self.make_room(call)
                        call.stage = READING
                    except MemoryError as error:
                        call.error = error
                        call.stage = DROPPED
                    if call.function is not None and call.kind == PYE_FRAME_CALL:
                        call.function.learn(given, call.ticks)
                        call.given = given = 0
            if call.stage == READING:
                status = pye_lane_read(lane, call.data, <size_t>call.header.total, 0)
                if status == PYE_OK:
                    call.length += call.header.total
                    if call.header.kind == PYE_FRAME_OCALL or call.header.kind == PYE_FRAME_ITEM:
                        call.stage = HELD
                        call.serial += 1
                    else:
                        call.begun = True
                        call.stage = DONE
                        try:
                            self.answered(call)
                        except Exception as error:  # of a logging filter, say: the caller's to see
                            call.error = error
                        self.give_back(call)
                    return True
            if call.stage == DROPPED:
                status = pye_lane_drain_to(lane, call.level, 0)
                if status == PYE_OK:
                    call.stage = DONE
                    self.give_back(call)
                    return True
            if status == PYE_OK:
                continue
            if status != PYE_E_TIMEOUT:
                break
            if call.stage == DROPPED or not pye_lane_look(lane, &call.ticks):
                if (call.stage == WAITING and call.function is not None
                        and call.kind == PYE_FRAME_CALL):
                    call.function.learn(given, 0)
                call.ticks = call.given = 0
                return False
        if status == PYE_E_PROTOCOL:
            call.error = self.broken(pye_lane_broken(lane).decode())
            self.count_end(call.error)
        else:
            try:
                fail(status, "call")
            except Exception as error:
                call.error = error
        call.begun = True
        call.stage = DONE
        self.give_back(call)
        return True

    cdef pye_status judge(self, AsyncCall call, pye_lane *lane) except? -1:
        """Whether what came is what may answer this call."""
        cdef bint streams = call.function is not None and call.function.call.streams
        if call.header.kind == PYE_FRAME_OCALL:
            if call.first_kind != PYE_FRAME_CALL and call.first_kind != PYE_FRAME_BATCH:
                return pye_lane_refuse(lane, "turn")
            if self.host.ocalls is None or call.header.index >= self.host.ocalls.num:
                return pye_lane_refuse(lane, "ocall")
        elif call.header.kind == PYE_FRAME_ITEM:
            if not streams:
                return pye_lane_refuse(lane, "turn")
        elif call.header.kind == PYE_FRAME_RESULT and streams and call.header.total:
            return pye_lane_refuse(lane, "stream")
        return PYE_OK

    cdef int make_room(self, AsyncCall call) except -1:
        """Make what the announced message is read into; its size is below the message limit."""
        cdef Py_ssize_t total = <Py_ssize_t>call.header.total
        cdef bint plain = call.batched is None and (
            call.function is None or call.function.call.native)
        if (call.header.kind == PYE_FRAME_ERROR
                or (call.header.kind == PYE_FRAME_RESULT and plain)):
            call.owner = PyBytes_FromStringAndSize(NULL, total)
            call.data = <uint8_t *><char *>call.owner
        else:
            call.owner = PyByteArray_FromStringAndSize(NULL, total)
            call.data = <uint8_t *>PyByteArray_AsString(call.owner)
        return 0

    cdef int answered(self, AsyncCall call) except -1:
        if call.first_kind == PYE_FRAME_CALL:
            pye_stats_answer(self.host.counts, <uint32_t>call.lane, call.first_index, call.length)
        if call.header.kind == PYE_FRAME_ERROR:
            call.error = self.host.failure(
                call.lane, call.first_kind, call.first_index, call.owner, call.cause)
            call.owner = None
        elif call.batched is not None:
            call.batched.count(call.batch, call.owner, call.lane)
        call.cause = None
        return 0

    cdef int give_back(self, AsyncCall call) except -1:
        """A call's lane is free again, unless it is broken."""
        cdef int lane = call.lane
        if lane < 0 or self.calls[lane] is not call:
            return 0
        self.disarm(call)
        call.arrays = None
        self.calls[lane] = call.parent
        if call.parent is not None:
            self.vacate(call.parent)
            return 0
        self.active -= 1
        self.let_go(lane)
        return 0

    cdef void disarm(self, AsyncCall call) noexcept:
        if call.armed:
            pye_lane_disarm(self.host.lanes[call.lane])
            if self.watch != NULL:
                pye_watch_set(self.watch, <uint32_t>call.lane, NULL, 0)
            call.armed = False

    cdef int vacate(self, AsyncCall call) except -1:
        """Tell who waits that no nested call has the lane any more."""
        future = call.vacated
        call.vacated = None
        if future is not None and not future.done():
            try:
                future.set_result(None)
            except RuntimeError:
                pass
        return 0

    cdef int end(self, AsyncCall call) except -1:
        """A call is over because of `error`."""
        if call.future is None or call.future.done():
            call.future = self.loop.create_future()
        return self.finish(call)

    cdef int finish(self, AsyncCall call) except -1:
        future = call.future
        if future is not None and not future.done():
            try:
                future.set_result(None)
            except RuntimeError:
                pass  # its loop was closed: nobody waits any more
        return 0

    cdef object value(self, AsyncCall call):
        """Decode an answer that was read."""
        cdef HostCall c
        cdef object owner = call.owner
        call.owner = None
        if owner is None:
            raise _errors.EnclaveStateError("the call has no answer")
        if call.function is None:
            return owner
        c = call.function.call
        if c.streams:
            return None
        if c.native:
            value = owner
            if c.element is not None:
                value = native_array(value, c.element)
        elif call.out is not None and call.shared.room and answer_is_there(
                call.data, <size_t>call.header.total, call.out, call.shared.place):
            return call.out
        else:
            value = self.host.decode(c.result, call.data, <size_t>call.header.total, owner)
        return value if call.out is None else fill_out(call.out, value)

    cdef int drop(self, AsyncCall call) except? -2:
        cdef Message *m
        if not self.host.ours():
            call.stage = DONE  # in a forked child: the lane is the parent's call's
        if call.stage == DONE or call.stage == DROPPED:
            call.forget()
            return -1
        m = call.message
        call.message = NULL
        if m != NULL:
            self.old_message(m)
        if call.stage == QUEUED:
            self.queue.pop(call, None)
            self.host.waiting = <int>len(self.queue)
            call.stage = DONE
            return -1
        self.end_nested(call)
        call.begun = call.started
        call.stage = DROPPED
        call.out = None
        call.forget()
        self.disarm(call)
        finished = self.step(call)
        if not self.loop.is_closed():  # else nobody waits any more
            self.soon()
        return -1 if finished else call.lane

    cdef int end_nested(self, AsyncCall call) except -1:
        """Calls nested in one that is given up have nothing to wait for."""
        cdef AsyncCall inner = <AsyncCall>self.calls[call.lane]
        while inner is not None and inner is not call:
            self.disarm(inner)
            if inner.stage != DROPPED:
                inner.error = _errors.CallError("the call that this one was nested in was given up")
                self.end(inner)
            if inner.arrays is not None:  # the worker may still write there
                call.arrays = inner.arrays if call.arrays is None else call.arrays + inner.arrays
            inner.stage = DONE
            inner = inner.parent
        self.calls[call.lane] = call
        return 0

    cdef int wait(self) except -1:
        """Have the loop told when the worker goes on with one of the calls."""
        cdef AsyncCall call
        cdef uint32_t i
        cdef uint32_t *word
        cdef uint32_t seen
        cdef bint again = False
        cdef bint kick = False
        if not self.has_watch():
            # No descriptor or thread is to be had now. A call must not wait for ever because of it.
            self.loop.call_later(POLL_S, self.ready)
            return 0
        for i in range(self.host.num):
            call = <AsyncCall>self.calls[i]
            if call is None or call.armed or call.stage == HELD:
                continue
            if pye_lane_arm(self.host.lanes[i], &word, &seen):
                again = True
                continue
            call.armed = True
            pye_watch_set(self.watch, i, word, seen)
            kick = True
        if kick:
            pye_watch_kick(self.watch)
        if again:
            self.soon()
        return 0

    cdef bint has_watch(self) except? False:
        cdef pye_watch *watch = NULL
        if self.event_fd < 0:
            try:
                self.event_fd = self.attach()
            except OSError:
                return False
        if self.watch == NULL:
            if pye_watch_new(&watch, self.host.num, self.event_fd) != PYE_OK:
                return False
            self.watch = watch
        return True

    cdef int soon(self) except -1:
        """
        Have every lane looked at when the loop had its turn, and watched if nothing came by then.

        A worker that is woken needs longer than the loop does for what else is ready; so in a busy
        program answers are mostly there, and the watcher is not troubled.
        """
        if not self.coming:
            self.loop.call_soon(self.ready)
            self.coming = True
        return 0

    def ready(self) -> None:
        """Look at every lane: one of them has something, or the loop's turn is over."""
        self.coming = False
        if (self.active or self.queue) and self.host.ours():
            self.turn = self.last = pye_clock_ns()
            try:
                self.pump()
            except BaseException:
                self.loop.call_later(POLL_S, self.ready)  # who waits does so still
                raise

    cdef int pump(self) except -1:
        cdef AsyncCall call
        cdef uint32_t i
        cdef int lane
        cdef uint64_t start
        cdef bint moved = True
        if self.pumping:
            return 0
        self.pumping = True
        try:
            start = pye_clock_ns()
            while moved:
                moved = False
                for i in range(self.host.num):
                    call = <AsyncCall>self.calls[i]
                    if call is None or call.stage == HELD:
                        continue
                    if call.armed and not self.came(i):
                        continue
                    call.armed = False
                    if self.step(call):
                        self.finish(call)
                        moved = True
                    else:
                        self.settle(call)
                while self.queue:
                    lane = self.free_lane()
                    if lane < 0:
                        break
                    call = <AsyncCall>self.queue.popitem(last=False)[0]
                    self.host.waiting = <int>len(self.queue)
                    self.put(call, lane)
                    if call.ticks < HOT_US * PYE_LANE_TICKS and self.longest != 0:
                        call.ticks = call.given = HOT_US * PYE_LANE_TICKS
                    if self.step(call):
                        self.finish(call)
                        moved = True
                    else:
                        self.settle(call)
                    if pye_clock_ns() - start > TURN_US * 1000:
                        self.soon()
                        moved = False
                        break
        finally:
            self.pumping = False
        if self.active:
            self.wait()
        return 0

    cdef bint came(self, uint32_t lane) noexcept:
        """Whether a frame came on an armed lane, which then is armed no more."""
        cdef uint64_t none = 0
        if not pye_lane_look(self.host.lanes[lane], &none):
            return False
        pye_lane_disarm(self.host.lanes[lane])
        return True

    def still(self, int lane, call) -> bool:
        """Whether `lane` is still busy with a call that was given up."""
        return 0 <= lane < <int>self.host.num and self.calls[lane] is call
