# What an event loop's lanes do besides: an answer that is there at once, watching, giving up.

cdef object read_now(AsyncLanes lanes, AsyncFunction function, int lane, uint16_t index,
                     size_t total):
    """Read and decode an answer of one fragment; its lane is free then."""
    cdef HostCall c = function.call
    cdef pye_lane *this = lanes.host.lanes[lane]
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
        lanes.let_go(lane)
        raise
    status = pye_lane_read(this, data, total, 0)
    if status == PYE_OK:
        pye_stats_answer(lanes.host.counts, <uint32_t>lane, index, total)
    lanes.let_go(lane)
    if status != PYE_OK:
        raise lanes.broken(pye_lane_broken(this).decode())
    if c.native:
        return owner if c.element is None else native_array(owner, c.element)
    return lanes.host.decode(c.result, data, total, owner)


cdef int tell_watch(AsyncLanes lanes) except -1:
    """Have the loop told when the worker goes on with one of the calls."""
    cdef AsyncCall call
    cdef uint32_t i
    cdef uint32_t *word
    cdef uint32_t seen
    cdef bint again = False
    cdef bint kick = False
    if not has_watch(lanes):
        # No descriptor or thread is to be had now. A call must not wait for ever because of it.
        lanes.loop.call_later(POLL_S, lanes.ready)
        return 0
    for i in range(lanes.host.num):
        call = <AsyncCall>lanes.calls[i]
        if call is None or call.armed or call.stage == HELD:
            continue
        if comes_soon(lanes, call):
            again = True
            continue
        if pye_lane_arm(lanes.host.lanes[i], &word, &seen):
            again = True
            continue
        call.armed = True
        pye_watch_set(lanes.watch, i, word, seen)
        kick = True
    if kick:
        pye_watch_kick(lanes.watch)
    if again:
        lanes.soon()
    return 0


cdef bint comes_soon(AsyncLanes lanes, AsyncCall call) noexcept:
    """
    Whether a call is looked for in the next turn before the watcher is told.

    To tell it costs two threads a switch each, more than some turns of an idle loop.
    """
    cdef _Habit habit = call.habit
    if call.function is not None:
        habit = call.function.habit
    return (habit is not None and habit.short and lanes.longest != 0 and call.stage == WAITING
            and pye_clock_ns() - call.since < TURNS_US * 1000)


cdef bint has_watch(AsyncLanes lanes) except? False:
    cdef pye_watch *watch = NULL
    if lanes.event_fd < 0:
        try:
            lanes.event_fd = lanes.attach()
        except OSError:
            return False
    if lanes.watch == NULL:
        if pye_watch_new(&watch, lanes.host.num, lanes.event_fd) != PYE_OK:
            return False
        lanes.watch = watch
    return True


cdef int drop(AsyncLanes lanes, AsyncCall call) except? -2:
    cdef Message *m
    if not lanes.host.ours():
        call.stage = DONE  # in a forked child: the lane is the parent's call's
    if call.stage == DONE or call.stage == DROPPED:
        call.forget()
        return -1
    m = call.message
    call.message = NULL
    if m != NULL:
        lanes.old_message(m)
    if call.carrier is not None:  # those that it crosses with go on
        call.begun = True
        call.stage = DONE
        return call.carrier.lane if lanes.still(call.carrier.lane, call) else -1
    if call.stage == QUEUED:
        lanes.queue.pop(call, None)
        lanes.host.waiting = <int>len(lanes.queue)
        call.stage = DONE
        return -1
    end_nested(lanes, call)
    call.begun = call.started
    call.stage = DROPPED
    call.out = None
    call.forget()
    lanes.disarm(call)
    finished = lanes.step(call)
    if not lanes.loop.is_closed():  # else nobody waits any more
        lanes.soon()
    return -1 if finished else call.lane


cdef int end_nested(AsyncLanes lanes, AsyncCall call) except -1:
    """Calls nested in one that is given up have nothing to wait for."""
    cdef AsyncCall inner = <AsyncCall>lanes.calls[call.lane]
    while inner is not None and inner is not call:
        lanes.disarm(inner)
        if inner.stage != DROPPED:
            inner.error = _errors.CallError("the call that this one was nested in was given up")
            lanes.end(inner)
        if inner.arrays is not None:  # the worker may still write there
            call.arrays = inner.arrays if call.arrays is None else call.arrays + inner.arrays
        inner.stage = DONE
        inner = inner.parent
    lanes.calls[call.lane] = call
    return 0
