# Streams seen from the host: the items of one call, asked for one by one.

cdef enum:
    CALLED = 0              # the first item was not asked for yet: it comes by itself
    ITEM_TAKEN = 1          # the worker waits for MORE or STOP
    ENDED = 2


@cython.final
@cython.no_gc_clear
cdef class HostStream:
    """
    What a streaming function gives, item by item. Made by calling it.

    It has its lane until it ends: by its last item, by an exception, by ``close()`` or the end of a
    ``with`` block, or when it is dropped. ``timeout`` and ``kill_after`` hold for each item.
    """

    cdef HostLanes lanes
    cdef int number
    cdef bint nested
    cdef uint16_t index
    cdef uint64_t length    # of all items so far
    cdef Plan plan
    cdef str what
    cdef double timeout
    cdef double kill_after
    cdef int state
    cdef int using          # 1 while a thread is in one of the methods
    cdef uint64_t serial    # of a nested one: which it is, and the level of its handler
    cdef uint32_t level
    cdef object cause

    def __init__(self, HostLanes lanes not None, int number, bint nested, uint16_t index,
                 Plan plan not None, str what not None, double timeout, double kill_after):
        self.lanes = lanes
        self.number = number
        self.nested = nested
        self.index = index
        self.plan = plan
        self.what = what
        self.timeout = timeout
        self.kill_after = kill_after
        if nested:
            lanes.streams += 1
            self.serial = lanes.streams
            self.level = level_of(&lanes.handling[number], PyThread_get_thread_ident())
            lanes.handling[number].levels[self.level].stream = self.serial

    def __reduce__(self):
        raise TypeError("a stream cannot be pickled or copied")

    def __repr__(self):
        return f"<stream of {self.what}{', ended' if self.state == ENDED else ''}>"

    @property
    def closed(self) -> bool:
        """Whether the stream has ended."""
        return self.state == ENDED

    def __iter__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback):
        if exc_type is None:
            self.close()
            return
        try:  # what the caller raised matters more than what the function raised at its end
            self.close()
        except _errors.EnclaveError:
            pass

    def __dealloc__(self):
        # In a forked child the lane is the parent's. Not __del__, which the limited API has not;
        # no_gc_clear keeps `lanes` until here.
        if self.lanes is not None and self.state != ENDED and self.lanes.ours():
            self.finish()

    cdef double deadline(self):
        return -1 if self.timeout < 0 else <double>_monotonic() + self.timeout

    cdef int begin(self) except -1:
        """Take the stream for this thread; the caller gives it back by clearing `using`."""
        cdef Handler *now = &self.lanes.handling[self.number].levels[self.level]
        cdef unsigned long me = PyThread_get_thread_ident()
        if not PYE_SWAP(&self.using, 0, 1):
            raise _errors.EnclaveStateError("the stream is in use already")
        try:
            self.lanes.check()
            if not self.nested:
                self.lanes.handling[self.number].owner = me
            elif now.thread != me or now.stream != self.serial:
                raise _errors.EnclaveStateError(
                    "the stream belongs to a handler that has answered its ocall",
                    advice="Read it within the handler that opened it.")
        except _errors.EnclaveLostError as error:
            PYE_SET(&self.using, 0)
            error.started = True  # of the stream's function, not of what is asked for now
            raise
        except BaseException:
            PYE_SET(&self.using, 0)
            raise
        return 0

    cdef int ask(self, pye_lane_header *header, uint16_t kind, double deadline) except -1:
        """Ask for what comes next, answering ocalls meanwhile."""
        cdef pye_lane *lane = self.lanes.lanes[self.number]
        if self.state == CALLED:
            self.lanes.await_header(lane, header, deadline)
        else:
            self.lanes.post(self.number, kind, 0, NULL, 0, header, deadline)
        while header.kind == PYE_FRAME_OCALL:
            self.cause = self.lanes.answer_ocall(self.number, header, deadline)
        return 0

    cdef int end(self, pye_lane_header *header, double deadline) except -1:
        """The function ended: raise what it raised, if it did."""
        cdef pye_lane *lane = self.lanes.lanes[self.number]
        if header.kind != PYE_FRAME_ERROR and (header.kind != PYE_FRAME_RESULT or header.total):
            self.lanes.give_up(lane, pye_lane_refuse(lane, "stream"))
        data = self.lanes.take(lane, header, deadline)
        pye_stats_answer(self.lanes.counts, <uint32_t>self.number, self.index,
                         self.length + header.total)
        error = None
        if header.kind == PYE_FRAME_ERROR:
            cause, self.cause = self.cause, None
            error = self.lanes.failure(
                self.number, <uint16_t>PYE_FRAME_CALL, self.index, bytes(data), cause)
        self.finish()
        if error is not None:
            raise error
        return 0

    def __next__(self):
        cdef pye_lane_header header
        cdef double deadline
        if self.state == ENDED:
            raise StopIteration
        self.begin()
        try:
            deadline = self.deadline()
            self.ask(&header, <uint16_t>PYE_FRAME_MORE, deadline)
            if header.kind == PYE_FRAME_ITEM:
                owner = self.lanes.take(self.lanes.lanes[self.number], &header, deadline)
                self.state = ITEM_TAKEN
                self.length += header.total
                return self.lanes.decode(
                    self.plan, <const uint8_t *>PyByteArray_AsString(owner),
                    <size_t>header.total, owner)
            self.end(&header, deadline)
        except BaseException:
            self.finish()
            raise
        finally:
            PYE_SET(&self.using, 0)
        raise StopIteration

    def close(self) -> None:
        """
        End the stream: the generator inside is closed, and the lane is free again.

        May be called twice. EcallError: what the generator raised when it was closed.
        """
        cdef pye_lane_header header
        cdef double deadline
        if self.state == ENDED:
            return
        if PYE_GET(&self.lanes.closed) or not self.lanes.ours():
            self.state = ENDED
            return
        self.begin()
        try:
            deadline = self.deadline()
            if self.state == CALLED:
                self.ask(&header, <uint16_t>PYE_FRAME_MORE, deadline)
                if header.kind == PYE_FRAME_ITEM:
                    self.lanes.take(self.lanes.lanes[self.number], &header, deadline)
                    self.state = ITEM_TAKEN
                else:
                    self.end(&header, deadline)
            if self.state == ITEM_TAKEN:
                self.ask(&header, <uint16_t>PYE_FRAME_STOP, deadline)
                self.end(&header, deadline)
        except BaseException:
            self.finish()
            raise
        finally:
            PYE_SET(&self.using, 0)

    cdef int finish(self) except -1:
        """Give the lane back, whatever the worker is at: if it waits here, it is told to stop."""
        cdef Handler *now = &self.lanes.handling[self.number].levels[self.level]
        if self.state == ENDED:
            return 0
        self.state = ENDED
        if self.nested:
            if now.stream == self.serial:  # else the handler returned, which ended it
                now.stream = 0
            return 0
        self.lanes.release(self.number, self.kill_after)
        try:
            self.lanes.reclaim()
        except _errors.EnclaveError:
            pass  # whoever calls next hears of it
        return 0
