# The host's side of a ring: lanes shared by threads.

cdef class HostStream


@cython.final
@cython.no_gc_clear  # the collector may not take the ring from who still looks at it
cdef class HostLanes:
    """
    All lanes of a ring, for callers of several threads.

    ``memory`` is the mapped ring; ``token`` one byte of memory that a fork wipes. ``guard()`` is
    called at least every 100 ms of waiting and raises when there is nothing to wait for any more;
    ``broken(check)`` when the worker broke the protocol, and returns the exception to raise;
    ``error(data)`` returns the exception that an error frame describes. ``late(lane, epoch,
    seconds)``: a call was given up whose worker is to be ended unless it returns in time, which
    ``still_late(lane, epoch)`` then tells.
    """

    cdef object __weakref__
    cdef public uint32_t slice_ms   # of waiting, until `guard` is asked; at most SLICE_MS
    cdef public object report
    cdef list notes
    cdef Py_buffer memory_view
    cdef Py_buffer token
    cdef bint held
    cdef pye_lane **lanes
    cdef int *states
    cdef uint64_t *epochs   # how many calls each lane had; written by who holds the lane
    cdef uint32_t num
    cdef uint32_t slot_size
    cdef uint64_t limit
    cdef int closed
    cdef int waiting
    cdef int queue_limit
    cdef object guard
    cdef object broken
    cdef object error
    cdef object condition
    cdef object late
    cdef readonly CallStats stats
    cdef pye_stats *counts
    cdef Handling *handling  # of each lane
    cdef int handlers        # how many ocalls are being answered
    cdef uint64_t streams    # nested ones that were ever opened
    cdef OcallTable ocalls
    cdef object submit
    cdef uint8_t *shared_data
    cdef uint64_t shared_size
    cdef list pins           # of each lane: a dict of arrays that the worker may still look at
    cdef uint64_t pinned

    def __cinit__(self):
        self.held = False
        self.lanes = NULL
        self.states = NULL
        self.epochs = NULL
        self.handling = NULL
        self.num = 0

    def __init__(self, memory, token, uint32_t lanes, uint32_t slot_size, uint64_t limit,
                 guard, broken, error, condition, int queue_limit, late=None,
                 uint32_t functions=0, uint64_t shared=0):
        cdef uint32_t i
        if self.held:
            raise TypeError("HostLanes is made once")
        if limit > <uint64_t>PY_SSIZE_T_MAX // 2:
            raise ValueError("the message limit is too large")
        PyObject_GetBuffer(memory, &self.memory_view, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(token, &self.token, PyBUF_WRITABLE)
        except BaseException:
            PyBuffer_Release(&self.memory_view)
            raise
        self.held = True
        if self.token.len < 1:
            raise ValueError("the token is empty")
        (<uint8_t *>self.token.buf)[0] = 1
        self.shared_data = shared_part(&self.memory_view, lanes, slot_size, shared)
        self.shared_size = shared
        self.guard = guard
        self.broken = broken
        self.error = error
        self.condition = condition
        self.queue_limit = queue_limit
        self.late = late
        self.slice_ms = SLICE_MS
        self.slot_size = slot_size
        self.limit = limit
        self.lanes = <pye_lane **>calloc(lanes if lanes else 1, sizeof(pye_lane *))
        self.states = <int *>calloc(lanes if lanes else 1, sizeof(int))
        self.epochs = <uint64_t *>calloc(lanes if lanes else 1, sizeof(uint64_t))
        self.handling = <Handling *>calloc(lanes if lanes else 1, sizeof(Handling))
        if self.lanes == NULL or self.states == NULL or self.epochs == NULL \
                or self.handling == NULL:
            raise MemoryError()
        for i in range(lanes):
            status = pye_lane_new(&self.lanes[i], self.memory_view.buf,
                                  <size_t>self.memory_view.len - <size_t>shared, lanes,
                                  slot_size, i, PYE_SIDE_HOST, limit, &WAIT_OPS)
            if status != PYE_OK:
                fail(status, "ring")
            self.num = i + 1
        if lanes == 0:
            fail(PYE_E_ARGUMENT, "ring")
        self.notes = [None] * lanes
        self.pins = [None] * lanes
        self.stats = CallStats(lanes, functions)
        self.counts = self.stats.counts

    def __dealloc__(self):
        cdef uint32_t i
        if self.lanes != NULL:
            for i in range(self.num):
                pye_lane_free(self.lanes[i])
        free(self.lanes)
        free(self.states)
        free(self.epochs)
        free(self.handling)
        if self.held:
            PyBuffer_Release(&self.memory_view)
            PyBuffer_Release(&self.token)

    def __reduce__(self):
        raise TypeError("a ring cannot be pickled or copied")

    def close(self) -> None:
        """Refuse new calls and let waiting ones look around. May be called twice."""
        cdef uint32_t i
        PYE_SET(&self.closed, 1)
        if (<uint8_t *>self.token.buf)[0] == 1:
            for i in range(self.num):
                pye_lane_wake(self.lanes[i])

    def rest(self) -> None:
        """Sleep for each lane's next answer at once: there is no enclave yet that could give it."""
        cdef uint32_t i
        for i in range(self.num):
            pye_lane_rest(self.lanes[i])

    @property
    def busy(self) -> int:
        """How many lanes have a call under way, given up ones included."""
        self.reclaim()
        return sum(PYE_GET(&self.states[i]) != FREE for i in range(self.num))

    def still_late(self, uint32_t lane, uint64_t epoch) -> bool:
        """Whether call `epoch` of a lane, given up by its caller, has still not returned."""
        if lane >= self.num:
            raise IndexError(lane)
        self.check()
        self.reclaim()
        return self.epochs[lane] == epoch and PYE_GET(&self.states[lane]) != FREE

    @property
    def late_lanes(self) -> int:
        """How many lanes still run a call whose caller gave up."""
        return sum(PYE_GET(&self.states[i]) == LATE for i in range(self.num))

    @property
    def queued(self) -> int:
        """How many calls wait for a lane."""
        return self.waiting

    @property
    def memory(self):
        """The mapped ring, as the host has it: all of it may be written (tests)."""
        return <object>self.memory_view.obj

    def asleep(self, uint32_t lane) -> bool:
        """Whether the worker's thread of a lane says that it sleeps (benchmarks)."""
        if lane >= self.num:
            raise IndexError(lane)
        return pye_lane_peer_asleep(self.lanes[lane]) != 0

    cdef bint ours(self) noexcept:
        """Whether this is the process that made the ring, and not a forked child."""
        return (<uint8_t *>self.token.buf)[0] == 1

    cdef int check_process(self) except -1:
        if (<uint8_t *>self.token.buf)[0] != 1:
            raise _errors.EnclaveStateError(
                "this handle belongs to the process that started it, not to a forked child",
                advice="Start an enclave in each process, after the fork; docs/deploying.md shows "
                "how.")
        return 0

    cdef int check(self) except -1:
        self.check_process()
        if PYE_GET(&self.closed):
            self.guard_unsent()
            raise _errors.EnclaveClosedError("the enclave was closed")
        return 0

    cdef int guard_unsent(self) except -1:
        """Raise if the worker is gone; the caller's call was not sent."""
        try:
            self.guard()
        except _errors.EnclaveLostError as error:
            error.started = False
            raise
        return 0

    cdef int reclaim(self) except -1:
        """Free the lanes whose given-up calls have returned."""
        cdef uint32_t i
        cdef pye_status status
        for i in range(self.num):
            if PYE_SWAP(&self.states[i], LATE, BUSY):
                status = pye_lane_drain(self.lanes[i], 0)
                if status == PYE_OK and self.notes[i] is not None:
                    self.show(<int>i, None)
                if status == PYE_OK:
                    self.pins[i] = None
                PYE_SET(&self.states[i], FREE if status == PYE_OK else LATE)
                if status == PYE_E_PROTOCOL:
                    raise self.broken(pye_lane_broken(self.lanes[i]).decode())
        return 0

    cdef int acquire(self, double deadline) except -1:
        """Return the number of a lane that is now the caller's."""
        cdef uint32_t i
        for i in range(self.num):
            if PYE_SWAP(&self.states[i], FREE, BUSY):
                return self.take_lane(i)
        return self.queue(deadline)

    cdef int take_lane(self, uint32_t i) noexcept:
        self.epochs[i] += 1
        self.handling[i].owner = PyThread_get_thread_ident()
        return <int>i

    cdef bint held_by_me(self) noexcept:
        """Whether this very thread has every lane: to wait for one would be for ever."""
        cdef uint32_t i
        cdef unsigned long me = PyThread_get_thread_ident()
        for i in range(self.num):
            if PYE_GET(&self.states[i]) != BUSY or (
                    self.handling[i].owner != me and not level_of(&self.handling[i], me)):
                return False
        return True

    cdef int queue(self, double deadline) except -1:
        cdef uint32_t i
        cdef double left
        condition = self.condition
        with condition:
            if self.waiting >= self.queue_limit:
                pye_stats_event(self.counts, PYE_STATS_BUSY)
                raise _errors.BusyError(
                    "too many calls wait for this enclave", expected=f"at most {self.queue_limit}",
                    advice="Give the image more threads, or call from fewer.")
            self.waiting += 1
            pye_stats_depth(self.counts, <uint64_t>self.waiting)
            try:
                while True:
                    self.check()
                    self.reclaim()
                    for i in range(self.num):
                        if PYE_SWAP(&self.states[i], FREE, BUSY):
                            return self.take_lane(i)
                    if self.held_by_me():
                        raise _errors.BusyError(
                            "this thread itself has every lane of the enclave: it waits in a call, "
                            "or has a stream open",
                            advice="End the stream first, or give the image more threads.")
                    left = SLICE_MS / 1000.0
                    if deadline >= 0:
                        left = min(left, deadline - <double>_monotonic())
                        if left <= 0:
                            pye_stats_event(self.counts, PYE_STATS_TIMEOUT)
                            raise _errors.CallTimeoutError(
                                "the deadline passed before the call could begin")
                    # A given-up call is noticed by looking only: look sooner.
                    for i in range(self.num):
                        if PYE_GET(&self.states[i]) == LATE:
                            left = min(left, 0.002)
                    condition.wait(left)
                    self.guard_unsent()
            finally:
                self.waiting -= 1

    cdef int release(self, int lane, double kill_after=-1) except -1:
        cdef pye_lane *this = self.lanes[lane]
        pye_stats_finish(self.counts, <uint32_t>lane)
        cdef uint64_t epoch = self.epochs[lane]
        if PYE_GET(&self.handling[lane].more) and PYE_ADD(&self.handling[lane].more, -1) >= 0:
            # The handler of an ocall still runs: its thread releases the lane in the end.
            if self.handling[lane].owner == PyThread_get_thread_ident():
                self.handling[lane].owner = 0
            if kill_after >= 0 and not PYE_GET(&self.closed) and self.late is not None:
                self.late(lane, epoch, kill_after)
            return 0
        PYE_SET(&self.handling[lane].more, 0)
        self.handling[lane].owner = 0
        if pye_lane_idle(this):
            if PyList_GetItem(self.notes, lane) != <PyObject *>None:
                self.show(lane, None)
            if PyList_GetItem(self.pins, lane) != <PyObject *>None:
                self.pins[lane] = None
            PYE_SET(&self.states[lane], FREE)
        else:
            PYE_SET(&self.states[lane], LATE)
            if kill_after >= 0 and not PYE_GET(&self.closed) and self.late is not None:
                self.late(lane, epoch, kill_after)
        if self.waiting:
            with self.condition:
                self.condition.notify()
        return 0

    cdef int look(self, double deadline, bint started) except -1:
        """Between two slices of waiting: is there still something to wait for?"""
        PyErr_CheckSignals()
        try:
            self.guard()
            if PYE_GET(&self.closed):
                self.check()
        except _errors.EnclaveLostError as error:
            error.started = started
            pye_stats_event(self.counts, PYE_STATS_LOST)
            raise
        except _errors.EnclavePoisonedError:
            pye_stats_event(self.counts, PYE_STATS_POISONED)
            raise
        if deadline >= 0 and <double>_monotonic() >= deadline:
            pye_stats_event(self.counts, PYE_STATS_TIMEOUT)
            raise _errors.CallTimeoutError(
                "the deadline passed" if started else "the deadline passed while sending",
                advice="The call may still run; its lane is free again when it returns.")
        return 0

    cdef uint32_t slice(self, double deadline) except? 0xffffffff:
        cdef double left
        cdef uint32_t longest = self.slice_ms if self.slice_ms < SLICE_MS else SLICE_MS
        if deadline < 0:
            return longest
        left = (deadline - <double>_monotonic()) * 1000
        if left >= longest:
            return longest
        return 1 if left < 1 else <uint32_t>left

    cdef object exchange(self, int number, uint16_t kind, uint16_t index, pye_segment *segments,
                         size_t num, double deadline, int want, Plan plan, object out=None,
                         Shared *shared=NULL):
        """
        Send a message and return the answer: as bytes (want 0) or decoded by `plan` (want 1).

        An array result goes into the array `out`, and is that, if it fits there as it is; `shared`
        says whether the message gave it a place.

        The caller owns the lane. If this raises while the worker still has the call, the lane
        stays late until the call returns (see `release`).
        """
        cdef pye_lane *lane = self.lanes[number]
        cdef pye_lane_header header
        cdef pye_status status
        cdef uint32_t wait_ms
        cdef uint8_t[SMALL] small
        cdef uint8_t *data
        cdef size_t total
        cdef object owner
        cdef object cause = None
        wait_ms = self.post(number, kind, index, segments, num, &header, deadline)
        while header.kind == PYE_FRAME_OCALL and kind == PYE_FRAME_CALL:
            cause = self.answer_ocall(number, &header, deadline)
        if header.kind != PYE_FRAME_RESULT and header.kind != PYE_FRAME_ERROR:
            self.give_up(lane, pye_lane_refuse(lane, "turn"))
        total = <size_t>header.total
        cdef bint placed = shared != NULL and shared.room
        if out is not None and header.kind == PYE_FRAME_RESULT and not placed:
            owner = read_into(self, number, &header, plan, out, deadline)
            if owner is not None:
                if kind == PYE_FRAME_CALL:
                    pye_stats_answer(self.counts, <uint32_t>number, index, total)
                return owner
        if header.kind == PYE_FRAME_RESULT and want == 1 and not plan.arrays and total <= SMALL:
            status = pye_lane_read(lane, small, total, wait_ms)
            if status == PYE_OK:
                if kind == PYE_FRAME_CALL:
                    pye_stats_answer(self.counts, <uint32_t>number, index, total)
                return self.decode(plan, small, total, None)
            self.give_up(lane, status)
        if header.kind == PYE_FRAME_RESULT and want == 1:
            owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
            data = <uint8_t *>PyByteArray_AsString(owner)
        else:
            owner = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
            data = <uint8_t *><char *>owner
        if header.length == header.total and total <= 4096:
            status = pye_lane_read(lane, data, total, wait_ms)
        else:
            status = PYE_E_TIMEOUT
            while status == PYE_E_TIMEOUT:
                with nogil:
                    status = pye_lane_read(lane, data, total, wait_ms)
                if status == PYE_E_TIMEOUT:
                    self.look(deadline, True)
                    wait_ms = self.slice(deadline)
        if status != PYE_OK:
            self.give_up(lane, status)
        if kind == PYE_FRAME_CALL:
            pye_stats_answer(self.counts, <uint32_t>number, index, total)
        if header.kind == PYE_FRAME_ERROR:
            raise self.failure(number, kind, index, owner, cause)
        if want == 0:
            return owner
        if placed and answer_is_there(data, total, out, shared.place):
            return out
        return self.decode(plan, data, total, owner)

    cdef object pin(self, int number, Message *m, object out):
        """
        Keep the arrays in shared memory that a message names for as long as the worker may look.

        That is until the lane is free: a call whose caller gave up still reads and writes them.
        """
        arrays = named_arrays(m, out)
        if arrays is None:
            return None
        pye_lane_names(self.lanes[number], m.shared.size - m.shared.left + m.shared.room)
        self.pinned += 1
        if self.pins[number] is None:
            self.pins[number] = {}
        (<dict>self.pins[number])[self.pinned] = arrays
        return self.pinned

    cdef int unpin(self, int number, object pin) except -1:
        """A nested call has ended, and the worker has done with its arrays."""
        if pin is not None and self.pins[number] is not None:
            (<dict>self.pins[number]).pop(pin, None)
        return 0

    cdef int show(self, int number, str note) except -1:
        """Say what the next call on a lane is for, or (None) that nothing is said."""
        cdef bytes data
        data = b"" if note is None else note.encode()
        status = pye_lane_note_set(
            self.lanes[number], <const uint8_t *><char *>data, <size_t>len(data))
        if status != PYE_OK:
            fail(status, "note")
        self.notes[number] = note
        return 0

    cdef object failure(self, int number, uint16_t kind, uint16_t index, object data,
                        object cause):
        """
        Return the exception that an error frame describes, and count it.

        `cause` is what the handler of the call's last ocall raised, or None.
        """
        cdef int how
        note = self.notes[number]
        error = self.error(data) if note is None else self.error(data, note)
        if kind == PYE_FRAME_CALL:
            if self.report is not None:
                self.report(index, error)
            how = PYE_STATS_REFUSED
            if isinstance(error, (_errors.EcallError, _errors.OcallError)):
                how = PYE_STATS_RAISED
            pye_stats_failed(self.counts, <uint32_t>number, index, how)
        if cause is not None and isinstance(error, _errors.OcallError):
            error.__cause__ = cause
        return error

    cdef pye_status write(self, int number, uint16_t kind, uint16_t index, pye_segment *segments,
                          size_t num, uint32_t wait_ms) noexcept nogil:
        """Begin to send a message, and count a call."""
        cdef pye_status status = pye_lane_write(
            self.lanes[number], kind, index, segments, num, wait_ms)
        if kind == PYE_FRAME_CALL:
            pye_stats_begin(self.counts, <uint32_t>number, index, segments, num)
        return status

    cdef uint32_t post(self, int number, uint16_t kind, uint16_t index, pye_segment *segments,
                       size_t num, pye_lane_header *header,
                       double deadline) except? 0xffffffff:
        """
        Send a message and wait for what answers it; return how long to wait for the rest of that.

        The lane is this thread's. If this raises, the lane is at some point of the exchange.
        """
        cdef pye_lane *lane = self.lanes[number]
        cdef pye_status status
        cdef uint32_t wait_ms = self.slice(deadline)
        cdef bint sent = False
        cdef uint32_t sequence = 0
        # What goes on with a call (OCALL_RESULT, MORE, ...) is sent when that has long begun.
        cdef bint first = kind <= PYE_FRAME_ATTEST or kind == PYE_FRAME_BATCH
        if kind == PYE_FRAME_CALL:
            pye_stats_time(self.counts, <uint32_t>number, index)
        if is_short(segments, num) and not pye_lane_peer_asleep(lane):
            # One copy: the GIL is given up while the message crosses, and not before.
            status = self.write(number, kind, index, segments, num, 0)
            sent = status == PYE_OK
            if sent:
                sequence = pye_lane_sequence(lane)
                if glance(lane):
                    # It is there. A worker that takes it back holds up nobody who wants the GIL.
                    status = pye_lane_wait(lane, header, 0)
                else:
                    with nogil:
                        status = pye_lane_wait(lane, header, wait_ms)
        else:
            with nogil:
                status = self.write(number, kind, index, segments, num, wait_ms)
                sent = status == PYE_OK
                if sent:
                    sequence = pye_lane_sequence(lane)
                    status = pye_lane_wait(lane, header, wait_ms)
        while status == PYE_E_TIMEOUT:
            try:
                self.look(deadline, sent or not first)
            except _errors.EnclaveLostError as error:
                # A call that the worker never took did not begin.
                if sent and first:
                    error.started = bool(pye_lane_taken(lane, sequence))
                raise
            except _errors.LaunchError as error:
                # It was sent ahead of the enclave, which is refused: nobody took it, most likely.
                if sent and first and pye_lane_taken(lane, sequence):
                    lost = _errors.EnclaveLostError(f"the enclave was lost: {error}")
                    lost.started = True
                    raise lost from error
                raise
            wait_ms = self.slice(deadline)
            with nogil:
                if not sent:
                    status = pye_lane_write(lane, kind, index, segments, num, wait_ms)
                    if status == PYE_OK:
                        sent = True
                        sequence = pye_lane_sequence(lane)
                if sent:
                    status = pye_lane_wait(lane, header, wait_ms)
        if status != PYE_OK:
            self.give_up(lane, status)
        return wait_ms

    cdef object take(self, pye_lane *lane, pye_lane_header *header, double deadline):
        """Read the message that `header` announces, as a bytearray."""
        cdef size_t total = <size_t>header.total
        cdef pye_status status = PYE_E_TIMEOUT
        cdef uint32_t wait_ms = self.slice(deadline)
        owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>total)
        cdef uint8_t *data = <uint8_t *>PyByteArray_AsString(owner)
        while status == PYE_E_TIMEOUT:
            with nogil:
                status = pye_lane_read(lane, data, total, wait_ms)
            if status == PYE_E_TIMEOUT:
                self.look(deadline, True)
                wait_ms = self.slice(deadline)
        if status != PYE_OK:
            self.give_up(lane, status)
        return owner

    cdef object decode(self, Plan plan, const uint8_t *data, size_t total, object owner):
        try:
            return plan.get_one(data, total, owner)
        except _errors.ArgumentError as error:
            raise _errors.CallError(
                f"the enclave's answer does not fit the signature: {error.message}") from None

    cdef int give_up(self, pye_lane *lane, pye_status status) except -1:
        if status == PYE_E_PROTOCOL:
            pye_stats_event(self.counts, PYE_STATS_POISONED)
            raise self.broken(pye_lane_broken(lane).decode())
        fail(status, "call")
        return 0

    # ---- ocalls ----------------------------------------------------------------------------

    def set_ocalls(self, OcallTable ocalls not None, submit) -> None:
        """
        Answer ocalls by `ocalls`. ``submit(run)`` has a thread of its own call ``run()`` soon.

        A handler runs in the thread that waits for the call, or, if that has a deadline, in one of
        its own, so that the deadline holds however long the handler takes.
        """
        self.ocalls = ocalls
        self.submit = submit

    cdef object answer_ocall(self, int number, pye_lane_header *header, double deadline):
        """
        Answer the ocall that `header` announces and wait for what comes then, again in `header`.

        Returns the exception that the handler raised, or None.
        """
        cdef pye_lane *lane = self.lanes[number]
        cdef OcallTable table = self.ocalls
        cdef Message m
        cdef uint32_t index = header.index
        cdef uint32_t level
        cdef int users = PYE_GET(&self.handling[number].more)
        cdef uint16_t kind = PYE_FRAME_OCALL_RESULT
        cdef object value = None
        cdef object error = None
        if table is None or index >= table.num:
            self.give_up(lane, pye_lane_refuse(lane, "ocall"))
        if deadline >= 0 and <double>_monotonic() >= deadline:
            self.look(deadline, True)  # a function that asks on and on meets its deadline too
        index = pye_index_mask(index, table.num)
        level = pye_lane_depth(lane)
        data = self.take(lane, header, deadline)
        try:
            handler, args, kwargs = table.request(index, data)
        except _errors.ArgumentError as refused:
            error = refused
        else:
            if deadline < 0:
                value, error = self.run_handler(number, level, handler, args, kwargs)
            else:
                value, error = self.run_apart(number, level, handler, args, kwargs, deadline)
            self.settle(number, level, users, deadline)
        message_init(&m)
        try:
            if error is None:
                try:
                    table.response(&m, index, value)
                except (_errors.ArgumentError, TypeError) as refused:
                    error = refused
            if error is not None:
                message_clear(&m)
                failure = ocall_failure(error)
                kind = PYE_FRAME_OCALL_ERROR
                m.segments[0].data = <const uint8_t *><char *>failure
                m.segments[0].len = <size_t>len(failure)
                m.num_segments = 1
            self.post(number, kind, <uint16_t>index, m.segments, m.num_segments, header, deadline)
        finally:
            message_clear(&m)
        return error

    cdef tuple run_handler(self, int number, uint32_t level, handler, tuple args, dict kwargs):
        """Call a handler in this thread; return what it returned, and the Exception it raised."""
        cdef Handler *now
        if not 0 < level < LEVELS:
            raise AssertionError(level)
        now = &self.handling[number].levels[level]
        now.users = PYE_GET(&self.handling[number].more)
        now.stream = 0
        now.thread = PyThread_get_thread_ident()
        PYE_ADD(&self.handlers, 1)
        try:
            return handler(*args, **kwargs), None
        except Exception as error:
            return None, error
        finally:
            PYE_ADD(&self.handlers, -1)
            now.thread = 0
            now.stream = 0

    cdef tuple run_apart(self, int number, uint32_t level, handler, tuple args, dict kwargs,
                         double deadline):
        """Have another thread call a handler, and wait for it no longer than the deadline."""
        run = HandlerRun(self, number, level, handler, args, kwargs)
        PYE_ADD(&self.handling[number].more, 1)
        try:
            self.submit(run)
        except BaseException:
            PYE_ADD(&self.handling[number].more, -1)
            raise
        done = run.done
        while not done.wait(self.slice(deadline) / 1000.0):
            self.look(deadline, True)
        if run.fatal is not None:
            raise run.fatal
        return run.result

    cdef int settle(self, int number, uint32_t level, int users, double deadline) except -1:
        """
        End what is open on the lane beyond `level` calls: those given up, streams.

        Handlers that still run for such calls are waited for, until `users` threads have the lane
        besides its caller.
        """
        cdef pye_lane *lane = self.lanes[number]
        cdef pye_status status = PYE_E_TIMEOUT
        cdef uint32_t wait_ms = 0
        while True:
            if PYE_GET(&self.handling[number].more) <= users:
                with nogil:
                    status = pye_lane_drain_to(lane, level, wait_ms)
                if status == PYE_OK:
                    return 0
                if status != PYE_E_TIMEOUT:
                    self.give_up(lane, status)
            elif wait_ms:
                _sleep(0.005)
            self.look(deadline, True)
            wait_ms = 10

    cdef int nested(self, double deadline) except -2:
        """
        The lane on which this thread's handler of an ocall calls, made ready; or -1 for no handler.

        CallError: the depth is used up. BusyError: a nested stream is open.
        """
        cdef uint32_t i
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef uint32_t level
        cdef Handler *now
        for i in range(self.num):
            level = level_of(&self.handling[i], me)
            if level == 0:
                continue
            now = &self.handling[i].levels[level]
            if now.stream:
                raise _errors.BusyError(
                    "the handler has a stream open, which takes its lane",
                    advice="Read it to the end, or close it.")
            if level >= PYE_LANE_MAX_DEPTH:
                raise _errors.CallError(
                    "calls are nested too deep", expected=f"at most {PYE_LANE_MAX_DEPTH}")
            self.settle(<int>i, level, now.users, deadline)
            return <int>i
        return -1

    # ---- streams ---------------------------------------------------------------------------

    cdef int send(self, pye_lane *lane, uint16_t kind, uint16_t index, pye_segment *segments,
                  size_t num, double deadline) except -1:
        """Send a message without waiting for what answers it."""
        cdef pye_status status
        cdef uint32_t wait_ms
        while True:
            wait_ms = self.slice(deadline)
            with nogil:
                status = pye_lane_write(lane, kind, index, segments, num, wait_ms)
            if status == PYE_OK:
                return 0
            if status != PYE_E_TIMEOUT:
                self.give_up(lane, status)
            self.look(deadline, False)

    cdef int await_header(self, pye_lane *lane, pye_lane_header *header,
                          double deadline) except -1:
        """Wait for the answer to what was sent."""
        cdef pye_status status
        cdef uint32_t wait_ms
        while True:
            wait_ms = self.slice(deadline)
            with nogil:
                status = pye_lane_wait(lane, header, wait_ms)
            if status == PYE_OK:
                return 0
            if status != PYE_E_TIMEOUT:
                self.give_up(lane, status)
            self.look(deadline, True)

    def request(self, uint16_t kind, data, double timeout=-1, double kill_after=-1) -> bytes:
        """Send a control frame (PING, ATTEST) or a raw call and return the raw answer."""
        return self.raw_call(kind, 0, data, timeout, kill_after)

    def raw_call(self, uint16_t kind, uint16_t index, data, double timeout=-1,
                 double kill_after=-1) -> bytes:
        """Call by number with bytes, whatever the signature (control frames, tests)."""
        cdef Py_buffer view
        cdef pye_segment segment
        cdef int number
        cdef double deadline = -1
        if timeout >= 0:
            deadline = <double>_monotonic() + timeout
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            segment.data = <const uint8_t *>view.buf
            segment.len = <size_t>view.len
            self.check()
            number = self.acquire(deadline)
            try:
                return self.exchange(number, kind, index, &segment, 1, deadline, 0, None)
            finally:
                self.release(number, kill_after)
        finally:
            PyBuffer_Release(&view)


@cython.final
cdef class HandlerRun:
    """One call of a handler in a thread of its own; that thread, too, uses the lane until then."""

    cdef HostLanes lanes
    cdef int number
    cdef uint32_t level
    cdef tuple call
    cdef readonly object done
    cdef readonly tuple result
    cdef readonly object fatal

    def __init__(self, HostLanes lanes, int number, uint32_t level, handler, tuple args,
                 dict kwargs):
        from threading import Event
        self.lanes = lanes
        self.number = number
        self.level = level
        self.call = (handler, args, kwargs)
        self.done = Event()

    def __call__(self):
        handler, args, kwargs = self.call
        self.call = None
        try:
            self.result = self.lanes.run_handler(self.number, self.level, handler, args, kwargs)
        except BaseException as error:
            self.fatal = error
        finally:
            self.lanes.release(self.number)
            self.done.set()
