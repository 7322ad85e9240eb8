# Batches: many calls of one function in one message. docs/formats/ring.md, "Batches". What both
# sides use is here; each side has a file of its own, included at the end.

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_BATCH_HEADER_SIZE
        PYE_BATCH_MAX_ITEMS
        PYE_BATCH_EVEN
        PYE_BATCH_TABLE
        PYE_BATCH_ITEM
        PYE_BATCH_ERROR
        PYE_BATCH_STATUS
        PYE_BATCH_NOT_RUN
    ctypedef struct pye_batch:
        const uint8_t *data
        size_t at
        uint64_t size
        uint32_t form
        uint32_t count
        uint32_t place
        uint32_t align
        uint32_t budget_ms
    size_t pye_batch_start(uint32_t form, uint32_t count)
    pye_status pye_batch_open(pye_batch *out, const uint8_t *data, size_t length, uint32_t align,
                              int reply)
    int pye_batch_next(pye_batch *batch, const uint8_t **item, size_t *item_len, uint32_t *tag)
    void pye_batch_head(uint8_t *out, uint32_t form, uint32_t count, uint64_t size,
                        uint32_t budget_ms)
    void pye_batch_set(uint8_t *out, uint32_t place, uint32_t tag, uint64_t length)
    pye_status pye_batch_native(void *function, const uint8_t **reply, size_t *reply_len,
                                size_t *used, uint8_t *arena, size_t arena_cap, const uint8_t *in_,
                                size_t in_len, void (*forget)(uint8_t *, size_t) noexcept nogil)
    pye_status pye_batch_gather(pye_batch *batch, uint8_t *out, size_t out_len, uint64_t size)

cdef enum:
    MIN_BATCH_LIMIT = 65536  # of a message limit: room for a table and for any error
    NATIVE_ALIGN = 64        # what pyenclave_trusted.h promises
    PLAIN_ALIGN = 8
    NO_GIL_BATCH = 32768     # bytes of a message, more is copied without the GIL


cdef uint32_t align_of(bint native, Plan plan):
    return NATIVE_ALIGN if native or plan.arrays else PLAIN_ALIGN


cdef int append(Message *m, const void *data, size_t length, uint32_t align) except -1:
    """Put bytes at the end of the head, and zeroes up to a multiple of `align`."""
    cdef size_t pad = (align - (m.length + length) % align) % align
    cdef uint8_t *at
    if length > <size_t>PY_SSIZE_T_MAX - NATIVE_ALIGN:
        raise MemoryError()
    at = room(m, length + pad)
    if length:
        memcpy(at, data, length)
    memset(at + length, 0, pad)
    return 0


cdef uint64_t append_values(Message *m, Plan plan, tuple values) except? 0xffffffffffffffff:
    """Encode the values at the end of the head and return their length; on failure nothing is."""
    cdef Message one
    cdef size_t before = m.length
    cdef size_t i
    if not plan.arrays:
        try:
            plan.put(m, values)
        except BaseException:
            m.length = before
            raise
        return m.length - before
    message_init(&one)  # a plan with arrays writes the length of its head at the very start
    try:
        plan.put(&one, values)
        plan.finish(&one)
        for i in range(one.num_segments):
            append(m, one.segments[i].data, one.segments[i].len, 1)
    except BaseException:
        m.length = before
        raise
    finally:
        message_clear(&one)
    return m.length - before


@cython.final
cdef class Batch:
    """
    Calls that are packed to be sent together.

    ``places`` counts the items, those refused before sending among them, whose errors are in
    ``errors`` by place; ``count`` the calls that are sent.
    """

    cdef uint8_t *head
    cdef uint8_t *body
    cdef object rows         # whose buffer is the body
    cdef pye_segment[2] segments
    cdef uint32_t align
    cdef readonly uint32_t count
    cdef readonly uint32_t places
    cdef readonly dict errors

    def __cinit__(self):
        self.head = NULL
        self.body = NULL
        self.count = 0
        self.places = 0

    def __dealloc__(self):
        free(self.head)
        free(self.body)

    @property
    def size(self) -> int:
        """Bytes of the message."""
        return self.segments[0].len + self.segments[1].len if self.count else 0

    cdef int make_head(self, uint32_t form, uint64_t size, uint32_t budget_ms,
                       const uint64_t *lengths, uint64_t length=0) except -1:
        """Write header and table: the items' lengths, or one for all of them."""
        cdef size_t start = pye_batch_start(form, self.count)
        cdef uint32_t i
        self.head = <uint8_t *>malloc(start)
        if self.head == NULL:
            raise MemoryError()
        pye_batch_head(self.head, form, self.count, size, budget_ms)
        if form == PYE_BATCH_TABLE:
            for i in range(self.count):
                pye_batch_set(self.head, i, PYE_BATCH_ITEM,
                              lengths[i] if lengths != NULL else length)
        self.segments[0].data = self.head
        self.segments[0].len = start
        return 0

    cdef int take_body(self, Message *m) except -1:
        """Make the head of a message this batch's items."""
        if m.data == m.small or m.length == 0:
            self.body = <uint8_t *>malloc(m.length + 1)
            if self.body == NULL:
                raise MemoryError()
            memcpy(self.body, m.data, m.length)
        else:
            self.body = m.data
            m.data = m.small
            m.capacity = SMALL
        self.segments[1].data = self.body
        self.segments[1].len = m.length
        m.length = 0
        return 0

    def rest(self, uint32_t done, uint32_t covered, uint32_t budget_ms=0) -> Batch:
        """
        The batch of what the enclave did not come to.

        Args:
            done: Calls that it made.
            covered: Places that have their results.
            budget_ms: As for packing.

        """
        cdef Batch other = Batch.__new__(Batch)
        cdef Message m
        cdef uint64_t *lengths
        cdef size_t at = 0
        cdef uint64_t word
        cdef uint64_t size
        cdef uint32_t form
        cdef uint32_t i
        cdef size_t header = PYE_BATCH_HEADER_SIZE
        if done >= self.count or not done <= covered <= self.places:
            raise ValueError("nothing is left")
        memcpy(&form, self.head + 4, 4)
        memcpy(&size, self.head + 8, 8)
        lengths = <uint64_t *>malloc(<size_t>self.count * sizeof(uint64_t))
        if lengths == NULL:
            raise MemoryError()
        message_init(&m)
        try:
            for i in range(self.count):
                word = size
                if form == PYE_BATCH_TABLE:
                    memcpy(&word, self.head + header + <size_t>i * 8, 8)
                if i < done:
                    at += <size_t>word
                    at += (self.align - at % self.align) % self.align
                else:
                    lengths[i - done] = word
            append(&m, self.segments[1].data + at, self.segments[1].len - at, 1)
            other.align = self.align
            other.count = self.count - done
            other.places = self.places - covered
            other.errors = {
                place - covered: error for place, error in self.errors.items() if place >= covered}
            other.take_body(&m)
            other.make_head(form, size, budget_ms, lengths)
        finally:
            free(lengths)
            message_clear(&m)
        return other


def batch_items(data, uint32_t align, bint reply) -> list[tuple[int, int, int]]:
    """
    Check a batch and return offset, length and tag of each item (tests, and tools).

    Raises:
        ArgumentError: It is not a batch.

    """
    cdef Py_buffer view
    cdef pye_batch reader
    cdef const uint8_t *item
    cdef size_t length
    cdef uint32_t tag
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if pye_batch_open(&reader, <const uint8_t *>view.buf, <size_t>view.len, align,
                          reply) != PYE_OK:
            raise _errors.ArgumentError("malformed batch")
        found = []
        while pye_batch_next(&reader, &item, &length, &tag):
            found.append((item - <const uint8_t *>view.buf, length, tag))
        return found
    finally:
        PyBuffer_Release(&view)


include "ring_batch_call.pxi"
include "ring_batch_worker.pxi"
