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
    UNSEEN_US = 500         # what took longer is not looked for when it could be
    TURNS_US = 30           # a short call is looked for in each turn, before a watcher is told

cdef double POLL_S = 0.005  # between two looks where nothing can be watched


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
    cdef dict habits               # of functions, by index
    cdef uint32_t joined           # calls of this turn that were not answered at once
    cdef uint32_t crowd            # of the turns before, in sixteenths
    cdef uint64_t deferred         # since when calls wait for the turn's end though a lane is free
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
        self.habits = {}
        self.joined = 0
        self.crowd = 0
        self.deferred = 0

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
        carriers = []
        self.queue.clear()
        self.host.waiting = 0
        for i in range(self.host.num):
            call = self.calls[i]
            self.calls[i] = None
            while call is not None:
                if call.members is None:
                    calls.append(call)
                else:
                    calls += [member for member in call.members
                              if (<AsyncCall>member).stage != DONE]
                    carriers.append(call)
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
        for call in carriers:
            call.forget()
            call.stage = DONE
            end_carried(self, call)

    cdef bint may_have_begun(self, AsyncCall call):
        """Whether the function may have begun, when the worker is gone."""
        if call.carrier is not None:
            call = call.carrier
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
        else:
            try:
                lane = lane_now(self, function, m, out)
            except BaseException:
                self.old_message(m)
                raise
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
                            function.habit.short = True
                            return read_now(self, function, lane, index, <size_t>header.total)
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
            count_joined(self, function)
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
            call.ticks = call.given = 0
            call.unseen = True
            count_joined(self, function)
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
                return call.value()
            # The loop gets its turn now, and then the caller its answer.
            call.future = self.loop.create_future()
            call.future.set_result(None)
            return call
        count_joined(self, function)
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
        call.since = pye_clock_ns()
        if ((call.kind == PYE_FRAME_CALL and not call.counted)
                or (call.members is not None and not (<AsyncCall>call.members[0]).counted)):
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
                    elif call.members is not None:
                        count_sent(self, call)
                if status == PYE_OK:
                    self.old_message(call.message)
                    call.message = NULL
                    call.stage = WAITING
            if call.stage == WAITING:
                status = pye_lane_wait(lane, &call.header, 0)
                if status == PYE_OK:
                    status = call.judge(lane)
                if status == PYE_OK:
                    try:
                        call.make_room()
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

    cdef int answered(self, AsyncCall call) except -1:
        cdef uint64_t took
        if call.members is not None:
            return hand_out(self, call)
        if call.function is not None and call.serial == 0:
            took = pye_clock_ns() - call.since
            call.function.habit.saw(took, call.header.total)
            if call.unseen and took > UNSEEN_US * 1000:
                call.function.learn(self.longest, 0)
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
        if call.members is not None:
            return end_carried(self, call)
        future = call.future
        if future is not None and not future.done():
            try:
                future.set_result(None)
            except RuntimeError:
                pass  # its loop was closed: nobody waits any more
        return 0

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
        if self.joined:
            self.crowd = (3 * self.crowd + 16 * min(self.joined, 256) + 2) // 4
            self.joined = 0
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
            self.deferred = 0
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
                    try:
                        call = next_of(self)
                    except BaseException:
                        PYE_SET(&self.host.states[lane], FREE)
                        raise
                    self.host.waiting = <int>len(self.queue)
                    if call is None:
                        PYE_SET(&self.host.states[lane], FREE)
                        continue
                    self.put(call, lane)
                    if call.members is not None or pye_lane_peer_asleep(self.host.lanes[lane]):
                        call.ticks = call.given = 0  # the loop goes on meanwhile
                    elif call.ticks < HOT_US * PYE_LANE_TICKS and self.longest != 0:
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
            tell_watch(self)
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
        if not 0 <= lane < <int>self.host.num:
            return False
        carrier = (<AsyncCall?>call).carrier
        return self.calls[lane] is call or (carrier is not None and self.calls[lane] is carrier)
