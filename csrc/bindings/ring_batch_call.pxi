# The host's side of batches: packing, waiting and unpacking are apart, so that who waits otherwise
# (asyncio) can use the rest.

@cython.final
cdef class _Kept:
    """What was taken from the iterator and belongs to the next batch: an item, or its error."""
    cdef bytes data
    cdef object error


cdef class BatchRows


@cython.final
cdef class BatchCall:
    """
    A trusted function, called many times in one crossing.

    ``spread``: an item is the tuple of the arguments, else it is the one argument.
    """

    cdef HostCall call
    cdef HostLanes lanes
    cdef bint spread
    cdef tuple missing
    cdef uint32_t align
    cdef uint32_t align_back
    cdef readonly uint64_t most_item   # bytes of one item, encoded
    cdef readonly uint64_t most_items  # calls in one batch; the answer's table stays far below the limit
    cdef readonly uint64_t most_bytes  # of a batch of several items: one slot, so that it crosses in
                                       # one piece

    def __init__(self, HostCall call not None, bint spread=False):
        self.call = call
        self.lanes = call.lanes
        self.spread = spread
        self.missing = (MISSING,) * (call.arguments.num - 1)
        self.align = align_of(call.native, call.arguments)
        self.align_back = align_of(call.native, call.result)
        if self.lanes.limit < MIN_BATCH_LIMIT:
            raise _errors.ArgumentError(
                "the image's messages are too small for batches",
                expected=f"message_limit of at least {MIN_BATCH_LIMIT}", found=self.lanes.limit)
        self.most_item = self.lanes.limit - 256
        self.most_items = min(<uint64_t>PYE_BATCH_MAX_ITEMS, (self.lanes.limit // 4 - 128) // 8)
        self.most_bytes = min(<uint64_t>self.lanes.slot_size, self.lanes.limit)

    @property
    def native(self) -> bool:
        return self.call.native

    @property
    def element(self) -> str | None:
        """Element type of the arrays that a native function answers; None: bytes."""
        return self.call.element

    @property
    def wanted(self) -> str | None:
        """Element type of the arrays that a native function takes; None: bytes."""
        return ARRAY_TYPES[self.call.wanted] if self.call.native and self.call.wanted else None

    @property
    def num_lanes(self) -> int:
        return self.lanes.num

    cdef tuple arguments_of(self, object item):
        if not self.spread:
            return (item,) + self.missing
        if not isinstance(item, tuple):
            raise argument_error(
                "an item", "a tuple of the function's arguments", type_name(item))
        if len(item) == self.call.arguments.num:
            return item
        return self.call.bind(item, {})

    cdef uint64_t put(self, Message *m, object item) except? 0xffffffffffffffff:
        """Encode one item at the end of `m` and return its length; on failure nothing is added."""
        cdef Py_buffer view
        if not self.call.native:
            return append_values(m, self.call.arguments, self.arguments_of(item))
        if self.call.wanted:
            item = native_argument(item, self.call.wanted)
        elif not PyObject_CheckBuffer(item):
            raise argument_error("an item", "bytes or a contiguous buffer", type_name(item))
        try:
            PyObject_GetBuffer(item, &view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:
            raise argument_error("an item", "contiguous bytes", str(error)) from None
        try:
            append(m, view.buf, <size_t>view.len, 1)
            return <uint64_t>view.len
        finally:
            PyBuffer_Release(&view)

    def rows(self, items) -> BatchRows | None:
        """
        Return where the batches of a native function come from if *items* is a plain array of
        bytes in two dimensions, so that there is nothing to convert. A forked child is refused.
        """
        self.lanes.check_process()
        return plain_rows(self, items)

    def pack(self, iterator, list kept, uint32_t most, size_t most_bytes,
             uint32_t budget_ms=0) -> Batch | None:
        """
        Take items from an iterator and pack them, or return None at its end.

        Args:
            iterator: Gives the items. All of the caller's code runs here.
            kept: Where an item that was taken and did not fit waits for the next batch; always
                the same list, empty at first.
            most: Number of items.
            most_bytes: Bytes of the message; one item alone may be longer.
            budget_ms: After so long the enclave may answer what it has; 0: no bound.

        """
        cdef Batch batch = Batch.__new__(Batch)
        cdef Message m
        cdef _Kept late
        cdef uint64_t *lengths
        cdef uint64_t length
        cdef size_t before
        cdef uint32_t places = 0
        cdef uint32_t count = 0
        most = max(1, min(most, <uint32_t>self.most_items))
        lengths = <uint64_t *>malloc(<size_t>most * sizeof(uint64_t))
        if lengths == NULL:
            raise MemoryError()
        batch.errors = {}
        batch.align = self.align
        message_init(&m)
        try:
            while places < most:
                before = m.length
                late = kept.pop() if kept else None
                try:
                    if late is None:
                        item = next(iterator)
                    elif late.error is not None:
                        raise late.error
                except StopIteration:
                    break
                except BaseException as error:
                    if places == 0 or not isinstance(error, Exception):
                        raise
                    late = _Kept()  # raised in its place, when what came before is done
                    late.error = error
                    kept.append(late)
                    break
                try:
                    if late is None:
                        length = self.put(&m, item)
                    else:
                        length = <uint64_t>len(late.data)
                        append(&m, <const char *>late.data, <size_t>length, 1)
                    if length > self.lanes.limit - 256:
                        raise _errors.ArgumentError(
                            "an item is too long", expected=f"at most {self.lanes.limit - 256} bytes",
                            found=length, advice="Raise [memory] message in enclave.toml.")
                except _errors.ArgumentError as error:
                    m.length = before
                    batch.errors[places] = error
                    places += 1
                    continue
                append(&m, NULL, 0, self.align)
                if count and pye_batch_start(PYE_BATCH_TABLE, count + 1) + m.length > most_bytes:
                    late = _Kept()
                    late.data = PyBytes_FromStringAndSize(
                        <char *>m.data + before, <Py_ssize_t>length)
                    kept.append(late)
                    m.length = before
                    break
                lengths[count] = length
                count += 1
                places += 1
            if places == 0:
                return None
            batch.places = places
            batch.count = count
            if count:
                batch.take_body(&m)
                batch.make_head(PYE_BATCH_TABLE, 0, budget_ms, lengths)
            return batch
        finally:
            free(lengths)
            message_clear(&m)

    # ---- waiting: one thread's way; others pack, send and unpack by themselves -------------------

    cdef object cross_one(self, Batch batch):
        """What `cross` does with one batch that has calls."""
        cdef HostLanes lanes = self.lanes
        cdef double deadline = -1
        cdef int number
        if self.call.timeout >= 0:
            deadline = <double>_monotonic() + self.call.timeout
        lanes.check()
        number = lanes.acquire(deadline)
        try:
            batch_send(lanes, number, self.call.index, batch, deadline)
            answer = batch_receive(lanes, number, deadline)
            self.count(batch, answer, number)
            return answer
        finally:
            lanes.release(number, self.call.kill_after)

    def cross(self, list batches, list answers=None) -> list[bytearray | None]:
        """
        Send batches and return their answers in order, using as many lanes as are free.

        They are put into `answers`, where those before one that failed are found, too.

        The function's own deadline is for all of them together. One without calls gets None.
        """
        cdef HostLanes lanes = self.lanes
        cdef double deadline = -1
        cdef Py_ssize_t num = len(batches)
        cdef Py_ssize_t sent = 0
        cdef Py_ssize_t got = 0
        cdef Batch batch
        cdef int *numbers
        if self.call.timeout >= 0:
            deadline = <double>_monotonic() + self.call.timeout
        lanes.check()
        if answers is None:
            answers = []
        numbers = <int *>malloc(<size_t>(num + 1) * sizeof(int))
        if numbers == NULL:
            raise MemoryError()
        try:
            while got < num:
                while sent < num:
                    batch = batches[sent]
                    numbers[sent] = -1
                    if batch.count:
                        # Waiting for a second lane could be for ever: this thread has the first.
                        if sent == got:
                            numbers[sent] = lanes.acquire(deadline)
                        else:
                            numbers[sent] = free_lane(lanes)
                            if numbers[sent] < 0:
                                break
                    sent += 1
                    if batch.count:
                        batch_send(lanes, numbers[sent - 1], self.call.index, batch, deadline)
                if numbers[got] < 0:
                    answers.append(None)
                else:
                    answer = batch_receive(lanes, numbers[got], deadline)
                    self.count(batches[got], answer, numbers[got])
                    answers.append(answer)
                    lanes.release(numbers[got], self.call.kill_after)
                    numbers[got] = -1
                got += 1
            return answers
        finally:
            while got < sent:
                if numbers[got] >= 0:
                    lanes.release(numbers[got], self.call.kill_after)
                got += 1
            free(numbers)

    cdef int count(self, Batch batch, object answer, int number) except -1:
        """Count the calls of a batch, whose answer is judged later; the lane is the caller's."""
        cdef pye_batch reader
        cdef const uint8_t *item
        cdef size_t length
        cdef uint32_t tag
        cdef uint64_t done = 0
        cdef uint64_t raised = 0
        cdef uint64_t size = <uint64_t>PyByteArray_Size(answer)
        if pye_batch_open(&reader, <const uint8_t *>PyByteArray_AsString(answer), <size_t>size,
                          self.align_back, 1) != PYE_OK:
            return 0
        if reader.form == PYE_BATCH_EVEN:
            done = reader.count
        else:
            while pye_batch_next(&reader, &item, &length, &tag) and tag != PYE_BATCH_NOT_RUN:
                done += 1
                if tag != PYE_BATCH_ITEM:
                    raised += 1
        pye_stats_batch(self.lanes.counts, <uint32_t>number, self.call.index, done, raised,
                        batch.segments[0].len + batch.segments[1].len, size)
        return 0

    # ---- unpacking -------------------------------------------------------------------------------

    cdef int open(self, pye_batch *out, Batch batch, object answer) except -1:
        """Check an answer, which is private memory by now."""
        if pye_batch_open(out, <const uint8_t *>PyByteArray_AsString(answer),
                          <size_t>PyByteArray_Size(answer), self.align_back, 1) != PYE_OK:
            raise _errors.CallError("the enclave's answer is not a batch")
        if out.count != batch.count:
            raise _errors.CallError("the enclave's answer is of another batch",
                                    expected=f"{batch.count} items", found=out.count)
        return 0

    def unpack(self, Batch batch not None, answer) -> tuple[list[Any], bool, int]:
        """
        Decode the answer to a batch.

        Args:
            batch: The batch.
            answer: What came (a bytearray that nobody else changes); None if it had no calls.

        Returns:
            The results by place, errors as exceptions; whether there are errors among them; and
            how many of the batch's calls were made: if fewer than ``count``, cross its
            ``rest(made, len(results))``.

        """
        cdef pye_batch reader
        cdef const uint8_t *item
        cdef const uint8_t *data
        cdef size_t length
        cdef size_t at
        cdef uint32_t tag
        cdef uint32_t done = 0
        cdef int status
        cdef Plan plan = self.call.result
        cdef bint native = self.call.native
        cdef bint failed = len(batch.errors) > 0
        results = []
        if batch.count:
            if type(answer) is not bytearray:
                raise TypeError("an answer is a bytearray")
            self.open(&reader, batch, answer)
            data = <const uint8_t *>PyByteArray_AsString(answer)
            view = memoryview(answer) if plan.arrays and not native else None
            while pye_batch_next(&reader, &item, &length, &tag):
                if tag == PYE_BATCH_NOT_RUN:
                    break
                done += 1
                while len(results) in batch.errors:
                    results.append(batch.errors[len(results)])
                try:
                    if tag == PYE_BATCH_ERROR:
                        raise self.lanes.error(
                            PyBytes_FromStringAndSize(<char *>item, <Py_ssize_t>length))
                    if tag == PYE_BATCH_STATUS:
                        memcpy(&status, item, 4)
                        raise status_error(status)
                    if native:
                        value = PyBytes_FromStringAndSize(<char *>item, <Py_ssize_t>length)
                        if self.call.element is not None:
                            value = native_array(value, self.call.element)
                    elif view is not None:
                        at = <size_t>(item - data)
                        value = self.lanes.decode(plan, item, length, view[at:at + length])
                    else:
                        value = self.lanes.decode(plan, item, length, None)
                except _errors.CallError as error:
                    value = error
                    failed = True
                results.append(value)
        if done == batch.count:
            while len(results) in batch.errors:
                results.append(batch.errors[len(results)])
        return results, failed, done

    def unpack_rows(self, Batch batch not None, answer) -> tuple[Any, int]:
        """
        Return the answers of a native function as one array of rows of one size, and how many
        calls were made. An item's error is raised.

        Raises:
            ArgumentError, EcallError: The function refused an item: the first of them.
            CallError: The answers are not all of one length.

        """
        cdef pye_batch reader
        cdef pye_batch again
        cdef const uint8_t *item
        cdef size_t length
        cdef size_t size = 0
        cdef size_t start = 0
        cdef uint32_t tag
        cdef uint32_t done = 0
        cdef int status
        if batch.count == 0:
            return no_rows(self.call.element), 0
        if type(answer) is not bytearray:
            raise TypeError("an answer is a bytearray")
        self.open(&reader, batch, answer)
        again = reader
        if reader.form == PYE_BATCH_EVEN:
            start = pye_batch_start(PYE_BATCH_EVEN, reader.count)
            done = reader.count
            size = <size_t>reader.size
            owner = answer
        else:
            while pye_batch_next(&reader, &item, &length, &tag) and tag != PYE_BATCH_NOT_RUN:
                if tag == PYE_BATCH_ERROR:
                    raise self.lanes.error(
                        PyBytes_FromStringAndSize(<char *>item, <Py_ssize_t>length))
                if tag == PYE_BATCH_STATUS:
                    memcpy(&status, item, 4)
                    raise status_error(status)
                if done and length != size:
                    raise _errors.CallError(
                        "the answers are not all of one length", expected=size, found=length,
                        advice="Iterate over the results instead.")
                size = length
                done += 1
            again.count = done
            owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>(done * size))
            if pye_batch_gather(&again, <uint8_t *>PyByteArray_AsString(owner), done * size,
                                size) != PYE_OK:
                raise _errors.CallError("the answers are not all of one length")
        return rows_of(owner, start, done, size, self.call.element), done


cdef object rows_of(object owner, size_t start, size_t num, size_t size, object element):
    """An array of `num` rows of `size` bytes, or of the elements in them, from `start` on."""
    need_numpy()
    rows = np_ndarray((num, size), dtype_of_code[OCTETS], owner, start)
    if element is not None:
        import numpy
        if size % <size_t>numpy.dtype(element).itemsize:
            raise _errors.CallError(
                f"the enclave's answers of {size} bytes are not whole elements of {element}")
        rows = rows.view(element)
    return rows


cdef object no_rows(object element):
    import numpy
    return numpy.empty((0, 0), element or numpy.uint8)


@cython.final
cdef class BatchRows:
    """
    The rows of an array, as one buffer: where the batches of a native function come from.

    Not copied where rows are whole multiples of 64 bytes, so it must not change before the answers
    are there.
    """

    cdef BatchCall call
    cdef Py_buffer view
    cdef bint viewed
    cdef uint64_t num
    cdef uint64_t size
    cdef uint64_t at
    cdef uint64_t fit

    def __cinit__(self):
        self.viewed = False
        self.at = 0

    def __init__(self, BatchCall call not None, rows):
        if self.viewed:
            raise TypeError("BatchRows is made once")
        PyObject_GetBuffer(rows, &self.view, PyBUF_C_CONTIGUOUS)
        self.viewed = True
        if self.view.ndim != 2 or self.view.itemsize != 1:
            raise ValueError("rows of bytes are wanted")
        self.begin(call)

    def __dealloc__(self):
        if self.viewed:
            PyBuffer_Release(&self.view)

    cdef int begin(self, BatchCall call) except -1:
        """How many rows fit one batch: whole lines cross as they are, others are padded and need a
        word each."""
        cdef uint64_t each
        cdef uint64_t room = call.most_bytes - min(call.most_bytes, <uint64_t>128)
        self.call = call
        self.num = <uint64_t>self.view.shape[0]
        self.size = <uint64_t>self.view.shape[1]
        each = (self.size + NATIVE_ALIGN - 1) // NATIVE_ALIGN * NATIVE_ALIGN
        if each == 0 or each != self.size:
            each += 8
        self.fit = room // each
        self.fit = max(<uint64_t>1, min(self.fit, <uint64_t>call.most_items))
        return 0

    @property
    def done(self) -> bool:
        """Whether there are no more rows."""
        return self.at == self.num

    def take(self, uint64_t most) -> Batch | None:
        """Pack the next rows, at most so many; None: there are no more."""
        cdef uint64_t num = min(self.num - self.at, most, self.fit)
        if num == 0:
            return None
        return self.pack(num)

    def first(self):
        """Cross with as many rows as one batch takes, and wait: all that a small array needs."""
        cdef Batch batch
        if self.call is None:
            raise TypeError("BatchRows was not made")
        batch = self.take(self.fit)
        if batch is None:
            return no_rows(self.call.call.element)
        results, done = self.call.unpack_rows(batch, self.call.cross_one(batch))
        self.at = self.at - batch.count + <uint64_t>done
        return results

    cdef Batch pack(self, uint64_t num):
        cdef Batch batch = Batch.__new__(Batch)
        cdef size_t size = <size_t>self.size
        cdef size_t stride
        cdef size_t i
        cdef const uint8_t *data = <const uint8_t *>self.view.buf + self.at * size
        batch.errors = {}
        batch.align = self.call.align
        batch.count = <uint32_t>num
        batch.places = batch.count
        if size % NATIVE_ALIGN == 0:
            batch.make_head(PYE_BATCH_EVEN, size, 0, NULL)
            batch.rows = self
            batch.segments[1].data = data
            batch.segments[1].len = <size_t>num * size
        else:
            batch.make_head(PYE_BATCH_TABLE, 0, 0, NULL, size)
            stride = (size + NATIVE_ALIGN - 1) // NATIVE_ALIGN * NATIVE_ALIGN
            batch.body = <uint8_t *>calloc(<size_t>num, stride)
            if batch.body == NULL:
                raise MemoryError()
            for i in range(<size_t>num):
                memcpy(batch.body + i * stride, data + i * size, size)
            batch.segments[1].data = batch.body
            batch.segments[1].len = <size_t>num * stride
        self.at += num
        return batch


cdef BatchRows plain_rows(BatchCall call, object items):
    """The rows of a plain array of bytes that a native function takes as it is; None: no such."""
    cdef BatchRows rows
    if np_ndarray is None and hasattr(items, "dtype"):
        need_numpy()
    if np_ndarray is None or not call.call.native or type(items) is not np_ndarray or (
            call.call.wanted and call.call.wanted != OCTETS):
        return None
    rows = BatchRows.__new__(BatchRows)
    try:
        PyObject_GetBuffer(items, &rows.view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except (BufferError, ValueError):
        return None
    rows.viewed = True
    if rows.view.ndim != 2 or rows.view.len == 0 or strcmp(rows.view.format, "B") != 0 or (
            <uint64_t>rows.view.shape[1] > call.most_item):
        return None
    rows.begin(call)
    return rows


cdef object status_error(int status):
    """What a native function's status means to the caller of one item."""
    if status == PYE_E_ARGUMENT:
        return _errors.ArgumentError("the native function refuses its input")
    if status == PYE_E_LENGTH:
        return _errors.ArgumentError("the native function refuses a length")
    return _errors.EcallError(f"the trusted function raised status {status}",
                              type=f"status {status}")


cdef int free_lane(HostLanes lanes) noexcept:
    """A lane that nobody uses or waits for, now the caller's, or -1."""
    cdef uint32_t i
    if lanes.waiting == 0:
        for i in range(lanes.num):
            if PYE_SWAP(&lanes.states[i], FREE, BUSY):
                return lanes.take_lane(i)
    return -1


cdef bint is_brief(HostLanes lanes, uint64_t total) noexcept:
    """Whether a message crosses in one piece, which is copied before the GIL could be given up."""
    return total <= NO_GIL_BATCH and total <= lanes.slot_size


cdef int batch_send(HostLanes lanes, int number, uint16_t index, Batch batch,
                    double deadline) except -1:
    cdef pye_lane *lane = lanes.lanes[number]
    cdef pye_status status
    cdef uint32_t wait_ms = lanes.slice(deadline)
    while True:
        if is_brief(lanes, batch.segments[0].len + batch.segments[1].len):
            status = pye_lane_write(lane, <uint16_t>PYE_FRAME_BATCH, index, batch.segments, 2, 0)
        else:
            with nogil:
                status = pye_lane_write(lane, <uint16_t>PYE_FRAME_BATCH, index, batch.segments, 2,
                                        wait_ms)
        if status == PYE_OK:
            return 0
        if status != PYE_E_TIMEOUT:
            lanes.give_up(lane, status)
        lanes.look(deadline, False)
        wait_ms = lanes.slice(deadline)


cdef object batch_receive(HostLanes lanes, int number, double deadline):
    """Wait for the answer to a batch and return it, or raise what refused all of it."""
    cdef pye_lane *lane = lanes.lanes[number]
    cdef pye_lane_header header
    cdef pye_status status = PYE_E_TIMEOUT
    cdef uint32_t wait_ms = lanes.slice(deadline)
    cdef uint8_t *data
    while True:
        with nogil:
            status = pye_lane_wait(lane, &header, wait_ms)
        if status != PYE_E_TIMEOUT:
            break
        lanes.look(deadline, True)
        wait_ms = lanes.slice(deadline)
    if status != PYE_OK:
        lanes.give_up(lane, status)
    while header.kind == PYE_FRAME_OCALL:
        lanes.answer_ocall(number, &header, deadline)
    if header.kind != PYE_FRAME_RESULT and header.kind != PYE_FRAME_ERROR:
        lanes.give_up(lane, pye_lane_refuse(lane, "turn"))
    owner = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>header.total)
    data = <uint8_t *>PyByteArray_AsString(owner)
    while True:
        if is_brief(lanes, header.total):
            status = pye_lane_read(lane, data, <size_t>header.total, 0)
        else:
            with nogil:
                status = pye_lane_read(lane, data, <size_t>header.total, wait_ms)
        if status != PYE_E_TIMEOUT:
            break
        lanes.look(deadline, True)
        wait_ms = lanes.slice(deadline)
    if status != PYE_OK:
        lanes.give_up(lane, status)
    if header.kind == PYE_FRAME_ERROR:
        raise lanes.error(bytes(owner))
    return owner
