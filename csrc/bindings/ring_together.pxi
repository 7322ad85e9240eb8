# Calls of one function that wait for a lane at the same time cross together, as one BATCH. Each stays
# a call of its own: with its error, its deadline, its place in the counters.
#
# Only short functions cross together, since an answer comes when all of them are done: functions in
# Python (the enclave may stop between two of those, after BUDGET_MS) that were seen to answer soon,
# whose arguments and results are small and lie in the message, in an image without ocalls. Only
# neighbours in the queue do, so that no call overtakes one that was made before it.

cdef enum:
    TOGETHER = 64           # calls in one crossing at most
    SMALL_BYTES = 4096      # of a call's arguments or its result; else it crosses alone
    BUDGET_MS = 1           # then the enclave answers what it has; the others are sent again
    SHORT_NS = 2000000      # a call that was answered so soon was a short one; the loop's turn is in it
    LONG_NS = 20000000
    MANY = 8                # calls of one budget: fewer are not worth a crossing together
    BAR_LEAST = 64          # calls that then go alone; twice as many each time
    BAR_MOST = 8192
    CROWD = 24              # calls of a turn, in sixteenths, from which on they wait for its end
    DEFER_NS = 2000000      # but not for longer than this


@cython.final
cdef class _Habit:
    """What was seen of one function's calls, for all who call it on this loop."""

    cdef bint eligible      # by its signature, and by what it returned so far
    cdef bint short
    cdef uint32_t barred    # calls that go alone, because calls together proved slow
    cdef uint32_t bar
    cdef uint32_t most      # calls in one crossing

    def __cinit__(self, bint eligible):
        self.eligible = eligible
        self.short = False
        self.barred = 0
        self.bar = 0
        self.most = TOGETHER

    cdef bint packs(self) noexcept:
        return self.eligible and self.short and self.barred == 0

    cdef void saw(self, uint64_t ns, uint64_t length) noexcept:
        """A call that crossed alone was answered after `ns`, by so many bytes."""
        if ns <= SHORT_NS:
            self.short = True
        elif ns > LONG_NS:
            self.short = False
        if length > SMALL_BYTES:
            self.eligible = False

    cdef void saw_many(self, uint32_t count, uint32_t done, uint64_t ns) noexcept:
        """Of `count` calls that crossed together `done` were made; their answer took `ns`."""
        if ns > LONG_NS or (done < count and done < MANY):
            self.bar = min(max(self.bar * 2, BAR_LEAST), BAR_MOST)
            self.barred = self.bar
            self.short = False
        elif done < count:
            self.most = done
        else:
            self.most = min(max(self.most, 2 * count), TOGETHER)
            self.bar = 0


cdef bint may_be_together(AsyncLanes lanes, HostCall c):
    """Whether calls of a function may cross together, as far as its signature and image say."""
    return (not c.native and not c.streams and c.note is None and not c.arguments.arrays
            and not c.result.arrays and lanes.host.ocalls is None
            and lanes.host.limit >= MIN_BATCH_LIMIT)


cdef _Habit habit_of(AsyncLanes lanes, HostCall call):
    # With an id for its calls it is the same function; its calls are not those that join others.
    key = (call.index, call.note is None)
    habit = lanes.habits.get(key)
    if habit is None:
        habit = lanes.habits[key] = _Habit(may_be_together(lanes, call))
    return habit


cdef bint is_small(AsyncCall call) noexcept:
    """Whether a call that is queued may cross with others; its function's habit says the rest."""
    return (call.stage == QUEUED and call.message != NULL and call.message.num_segments == 1
            and call.message.segments[0].len <= SMALL_BYTES and call.out is None)


cdef int lane_now(AsyncLanes lanes, AsyncFunction function, Message *m, object out) except -2:
    """
    The lane that a new call has now, or -1: it waits.

    For a lane; or, where several calls were made in one turn lately and the worker sleeps, for
    the end of the turn, so that it is woken once for all of them.
    """
    cdef uint32_t i
    if lanes.queue:
        if lanes.deferred and (pye_clock_ns() - lanes.deferred > DEFER_NS
                              or len(lanes.queue) >= lanes.queue_limit):
            lanes.pump()
        return lanes.free_lane() if not lanes.queue else -1
    if (lanes.crowd < CROWD or lanes.queue_limit == 0 or function is None or out is not None
            or not function.habit.packs() or m.num_segments != 1
            or m.segments[0].len > SMALL_BYTES):
        return lanes.free_lane()
    for i in range(lanes.host.num):
        if PYE_GET(&lanes.host.states[i]) == FREE:
            if not pye_lane_peer_asleep(lanes.host.lanes[i]):
                break
            lanes.deferred = pye_clock_ns()
            lanes.soon()
            return -1
    return lanes.free_lane()


cdef void count_joined(AsyncLanes lanes, AsyncFunction function) noexcept:
    if function is not None and function.habit.short:
        lanes.joined += 1


cdef AsyncCall next_of(AsyncLanes lanes):
    """
    Take the next call off the queue: one of its own, or one that carries several.

    None if there is none any more. What is allocated can run a collection, and that a finalizer
    which gives up calls: so all of it is before the first look at a call, and who was taken is
    marked before the queue is changed.
    """
    cdef AsyncCall call
    cdef AsyncCall other
    cdef AsyncCall all = None
    cdef AsyncFunction function
    cdef size_t size = 0
    cdef size_t most = min(<size_t>lanes.host.slot_size, <size_t>lanes.host.limit)
    most -= pye_batch_start(PYE_BATCH_TABLE, TOGETHER)
    members = []
    if len(lanes.queue) > 1:
        all = AsyncCall.__new__(AsyncCall)
    queued = iter(lanes.queue)
    call = <AsyncCall>next(queued, None)
    if call is None:
        return None
    function = call.function
    if (all is not None and function is not None and function.habit.packs() and is_small(call)):
        try:  # nothing leaves the queue before there is memory for all
            size = call.message.segments[0].len + PLAIN_ALIGN
            members.append(call)
            for other in queued:
                if <uint32_t>len(members) >= function.habit.most or not is_small(other):
                    break
                if other.function is None or other.function.habit is not function.habit:
                    break
                size += other.message.segments[0].len + PLAIN_ALIGN
                if size > most:
                    break
                members.append(other)
            if len(members) > 1:
                carry(lanes, all, members)
                call = all
        except MemoryError:
            pass
    if call is all:
        for other in members:
            other.carrier = all
            other.stage = WAITING
        for other in members:
            lanes.queue.pop(other, None)
        return all
    lanes.queue.pop(call, None)
    return call if call.stage == QUEUED else None


cdef int carry(AsyncLanes lanes, AsyncCall all, list members) except -1:
    """Pack calls of one function, which are queued, into one: nothing of Python's is allocated."""
    cdef AsyncCall first = <AsyncCall>members[0]
    cdef AsyncCall member
    cdef Message *m
    cdef uint32_t count = <uint32_t>len(members)
    cdef uint32_t i
    cdef size_t start = pye_batch_start(PYE_BATCH_TABLE, count)
    m = lanes.new_message()
    try:
        memset(room(m, start), 0, start)
        for i in range(count):
            member = <AsyncCall>members[i]
            append(m, member.message.segments[0].data, member.message.segments[0].len, PLAIN_ALIGN)
        pye_batch_head(m.data, PYE_BATCH_TABLE, count, 0, BUDGET_MS)
        for i in range(count):
            member = <AsyncCall>members[i]
            pye_batch_set(m.data, i, PYE_BATCH_ITEM, member.message.segments[0].len)
    except MemoryError:
        lanes.old_message(m)
        raise
    m.total = m.length
    m.segments[0].data = m.data
    m.segments[0].len = m.length
    m.num_segments = 1
    all.lanes = lanes
    all.message = m
    all.members = members
    all.habit = first.function.habit
    all.kind = all.first_kind = <uint16_t>PYE_FRAME_BATCH
    all.index = all.first_index = first.first_index
    return 0


cdef int put_first(AsyncLanes lanes, AsyncCall call) except -1:
    """A call waits again, before all others."""
    call.carrier = None
    call.stage = QUEUED
    lanes.queue[call] = None
    lanes.queue.move_to_end(call, last=False)
    return 0


cdef int count_sent(AsyncLanes lanes, AsyncCall all) except -1:
    """Count the calls that crossed together: the time of the first stands for that of all."""
    cdef AsyncCall member
    cdef pye_segment *segment
    cdef uint64_t others = 0
    cdef uint64_t length = 0
    cdef bint begun = False
    for member in all.members:
        if member.counted or member.message == NULL:  # sent before, or given up since
            continue
        segment = &member.message.segments[0]
        member.counted = True
        if not begun:
            begun = True
            pye_stats_begin(lanes.host.counts, <uint32_t>all.lane, all.index, segment, 1)
        else:
            others += 1
            length += segment.len
    pye_stats_batch(lanes.host.counts, <uint32_t>all.lane, all.index, others, 0, length, 0)
    return 0


cdef int hand_out(AsyncLanes lanes, AsyncCall all) except -1:
    """Give each call its part of the answer; what the enclave did not come to waits again."""
    cdef pye_batch reader
    cdef AsyncCall member
    cdef const uint8_t *item
    cdef size_t length
    cdef uint32_t tag
    cdef uint32_t done = 0
    cdef uint32_t count = <uint32_t>len(all.members)
    cdef uint64_t size = 0
    cdef size_t total = <size_t>all.header.total
    left = []
    if (all.header.kind != PYE_FRAME_RESULT
            or pye_batch_open(&reader, all.data, total, PLAIN_ALIGN, 1) != PYE_OK
            or reader.count != count):
        pye_stats_answer(lanes.host.counts, <uint32_t>all.lane, all.index, 0)
        all.habit.eligible = False
        for member in all.members:
            refuse(lanes, all, member)
        all.forget()
        return 0
    for member in all.members:
        pye_batch_next(&reader, &item, &length, &tag)
        if tag == PYE_BATCH_NOT_RUN:
            left.append(member)
            continue
        done += 1
        size += length
        if member.stage == DONE:  # given up: nobody will ask for it
            pye_wipe(<uint8_t *>item, length)
            continue
        member.begun = True
        if tag == PYE_BATCH_ITEM:
            member.header = all.header
            member.header.total = length
            member.owner = all.owner
            member.data = <uint8_t *>item
        else:
            member.error = failed(lanes, all, item, length, tag)
            if isinstance(member.error, _errors.ArgumentError):
                all.habit.eligible = False  # its result had no room beside the others': alone it has
        member.stage = DONE
    pye_stats_answer(lanes.host.counts, <uint32_t>all.lane, all.index, size)
    if size > <uint64_t>SMALL_BYTES * done:
        all.habit.eligible = False
    all.habit.saw_many(count, done, pye_clock_ns() - all.since)
    for member in reversed(left):
        if member.stage != DONE:
            put_first(lanes, member)
    lanes.host.waiting = <int>len(lanes.queue)
    all.owner = None
    return 0


cdef object failed(AsyncLanes lanes, AsyncCall all, const uint8_t *item, size_t length,
                   uint32_t tag):
    """The error of one call among others."""
    if tag != PYE_BATCH_ERROR:
        return _errors.CallError("the enclave's answer is not one of this function")
    try:
        return lanes.host.failure(
            all.lane, <uint16_t>PYE_FRAME_CALL, all.index,
            PyBytes_FromStringAndSize(<char *>item, <Py_ssize_t>length), None)
    except Exception as error:  # of a logging filter, say: the caller's to see
        return error


cdef int refuse(AsyncLanes lanes, AsyncCall all, AsyncCall member) except -1:
    """The crossing failed as a whole: the error of one of its calls."""
    if member.stage == DONE:
        return 0
    if all.header.kind == PYE_FRAME_ERROR:
        member.error = failed(lanes, all, all.data, <size_t>all.header.total, PYE_BATCH_ERROR)
    else:
        member.error = _errors.CallError("the enclave's answer is not that of calls together")
    member.begun = True
    member.stage = DONE
    return 0


cdef int end_carried(AsyncLanes lanes, AsyncCall all) except -1:
    """Tell those who wait for calls that crossed together what came of them."""
    cdef AsyncCall member
    cdef bint counted = False
    error = all.error
    for member in all.members:
        if error is not None and member.carrier is all and member.stage != DONE:
            member.error = error
            if isinstance(error, _errors.EnclaveError):  # each has its own: they get a traceback
                member.error = type(error)(error.message, expected=error.expected,
                                           found=error.found, advice=error.advice)
            if counted:  # the first was, when it went wrong
                lanes.count_end(error)
            counted = True
            member.begun = True
            member.stage = DONE
        if member.carrier is all and member.stage == DONE:
            lanes.finish(member)
    if all.stage == DONE:
        for member in all.members:
            if member.carrier is all:
                member.carrier = None
        all.members = []
    return 0
