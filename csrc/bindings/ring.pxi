# Rings: the two ends of a lane, and the loops around them. What is decided from shared memory is
# decided in csrc/src/call; here buffers are held, the GIL is dropped, and Python is called.

cdef extern from "<sched.h>" nogil:
    int sched_getcpu()

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)
    int MADV_DONTNEED

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    char *dlerror()
    int RTLD_NOW
    int RTLD_LOCAL

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_SIDE_HOST
        PYE_SIDE_WORKER
        PYE_FRAME_CALL
        PYE_FRAME_PING
        PYE_FRAME_ATTEST
        PYE_FRAME_RESULT
        PYE_FRAME_ERROR
        PYE_FRAME_BATCH
        PYE_FRAME_OCALL_RESULT
        PYE_FRAME_OCALL_ERROR
        PYE_FRAME_MORE
        PYE_FRAME_STOP
        PYE_FRAME_OCALL
        PYE_FRAME_ITEM
        PYE_LANE_MAX_DEPTH
    ctypedef struct pye_lane_header:
        uint32_t sequence
        uint16_t kind
        uint16_t index
        uint32_t length
        uint32_t lane
        uint64_t total
        uint64_t offset
    ctypedef struct pye_wait_ops:
        pye_status (*wait)(uint32_t *word, uint32_t expected, uint32_t timeout_ms) noexcept
        pye_status (*wake)(uint32_t *word) noexcept
        void (*yield_ "yield")() noexcept
        int (*cpu)() noexcept
    ctypedef struct pye_lane:
        pass
    size_t pye_ring_size(uint32_t lanes, uint32_t slot_size)
    pye_status pye_lane_new(pye_lane **out, void *memory, size_t memory_len, uint32_t lanes,
                            uint32_t slot_size, uint32_t number, uint32_t side, uint64_t limit,
                            const pye_wait_ops *ops)
    void pye_lane_free(pye_lane *lane)
    void pye_lane_rest(pye_lane *lane)
    void pye_lane_names(pye_lane *lane, uint64_t length)
    pye_status pye_lane_write(pye_lane *lane, uint16_t kind, uint16_t index,
                              const pye_segment *segments, size_t num, uint32_t slice_ms)
    pye_status pye_lane_wait(pye_lane *lane, pye_lane_header *out, uint32_t slice_ms)
    pye_status pye_lane_read(pye_lane *lane, uint8_t *out, size_t out_len, uint32_t slice_ms)
    pye_status pye_lane_read_split(pye_lane *lane, uint8_t *head, size_t head_len, uint8_t *body,
                                   size_t body_len, uint32_t slice_ms)
    pye_status pye_lane_drain(pye_lane *lane, uint32_t slice_ms)
    pye_status pye_lane_drain_to(pye_lane *lane, uint32_t depth, uint32_t slice_ms)
    uint32_t pye_lane_depth(const pye_lane *lane)
    uint16_t pye_lane_held(const pye_lane *lane)
    pye_status pye_lane_refuse(pye_lane *lane, const char *check)
    const char *pye_lane_broken(const pye_lane *lane)
    uint32_t pye_lane_sequence(const pye_lane *lane)
    int pye_lane_taken(const pye_lane *lane, uint32_t sequence)
    int pye_lane_idle(const pye_lane *lane)
    void pye_lane_wake(pye_lane *lane)
    int pye_lane_peer_asleep(const pye_lane *lane)
    pye_status pye_lane_note_set(pye_lane *lane, const uint8_t *note, size_t length)
    size_t pye_lane_note_get(const pye_lane *lane, uint8_t *out)
    pye_status pye_native_call(void *function, uint8_t *out, size_t out_cap, size_t *out_len,
                               const uint8_t *in_, size_t in_len)

cdef extern from *:
    """
    #include <pthread.h>
    /* Held only around a few instructions; free-threaded builds need it, others hardly notice. */
    #define PYE_SET(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define PYE_GET(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define PYE_ADD(p, v) __atomic_add_fetch((p), (v), __ATOMIC_ACQ_REL)
    #define PYE_SWAP(p, from, to) __extension__ ({ int from_ = (from); \
        __atomic_compare_exchange_n((p), &from_, (to), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); })
    """
    void PYE_SET(int *p, int v) noexcept nogil
    int PYE_GET(int *p) noexcept nogil
    int PYE_ADD(int *p, int v) noexcept nogil
    bint PYE_SWAP(int *p, int before, int after) noexcept nogil

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    unsigned long PyThread_get_thread_ident() noexcept

from time import monotonic as _monotonic, sleep as _sleep

cdef enum:
    SLICE_MS = 100          # no wait is longer, so that no peer's death hangs the other
    FREE = 0                # states of a lane of the host
    BUSY = 1
    LATE = 2                # its caller gave up; the call still runs
    GLANCE = 5000           # ticks for which the GIL is kept, where nobody else can want it

cdef pye_wait_ops WAIT_OPS
WAIT_OPS.wait = pye_wait_futex
WAIT_OPS.wake = pye_wake_futex
WAIT_OPS.yield_ = pye_wait_yield
WAIT_OPS.cpu = sched_getcpu


# How many threads Python started; a thread of C that takes the GIL waits for a glance at most.
import _thread
cdef object num_threads = getattr(_thread, "_count", None)
del _thread


cdef bint glance(pye_lane *lane) except -1:
    """
    Look for the other side's next frame without giving up the GIL: True, it is there.

    Giving it up and taking it again costs a third of what crossing does. Only the one thread of a
    process does so, and not for long.
    """
    cdef uint64_t ticks = GLANCE
    if num_threads is None or num_threads() != 0:
        return False
    return pye_lane_look(lane, &ticks) != 0


cdef bint is_short(const pye_segment *segments, size_t num) noexcept:
    """Whether a message is so short that writing it takes less than giving up the GIL for it."""
    return num == 1 and segments[0].len <= SMALL


def ring_size(uint32_t lanes, uint32_t slot_size) -> int:
    """Size in bytes of a ring, or 0 if there is no such ring."""
    return pye_ring_size(lanes, slot_size)


include "ring_stats.pxi"
include "ring_ocall.pxi"
include "ring_host.pxi"
include "ring_stream.pxi"
include "ring_call.pxi"
include "ring_async.pxi"
include "ring_async_call.pxi"
include "ring_async_watch.pxi"
include "ring_together.pxi"
include "ring_worker.pxi"
include "ring_batch.pxi"
include "ring_array.pxi"


# ---- measuring ---------------------------------------------------------------------------------

def ring_round_trips(HostLanes lanes not None, uint16_t kind, uint16_t index, data,
                     uint32_t count) -> float:
    """
    Make `count` calls on lane 0 from C and return the seconds taken: the ring without Python.

    The same lane functions as a call from Python; nothing is decoded, the answer is copied out.
    """
    cdef Py_buffer view
    cdef pye_segment segment
    cdef pye_lane_header header
    cdef pye_lane *lane
    cdef pye_status status = PYE_OK
    cdef uint8_t[SMALL] answer
    cdef uint32_t i
    lanes.check()
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not PYE_SWAP(&lanes.states[0], FREE, BUSY):
            raise _errors.BusyError("lane 0 is in use")
        lane = lanes.lanes[0]
        segment.data = <const uint8_t *>view.buf
        segment.len = <size_t>view.len
        start = _monotonic()
        with nogil:
            for i in range(count):
                status = pye_lane_write(lane, kind, index, &segment, 1, SLICE_MS)
                if status != PYE_OK:
                    break
                status = pye_lane_wait(lane, &header, 1000)
                if status != PYE_OK:
                    break
                if header.total > SMALL:
                    status = PYE_E_LENGTH
                    break
                status = pye_lane_read(lane, answer, <size_t>header.total, SLICE_MS)
                if status != PYE_OK:
                    break
        seconds = _monotonic() - start
        lanes.release(0)
        if status != PYE_OK:
            lanes.give_up(lane, status)
        return seconds
    finally:
        PyBuffer_Release(&view)


def raw_spin(memory, bint first, uint32_t count) -> float:
    """
    Exchange one line with a peer `count` times and return the seconds: how near two cores are.

    Both sides map the same zero page; one is `first`. For benchmarks only.
    """
    cdef Py_buffer view
    cdef int *mine
    cdef int *theirs
    cdef uint32_t i
    cdef uint32_t low
    cdef uint32_t high
    cdef uint64_t spins
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    try:
        if view.len < 256:
            raise ValueError("256 bytes wanted")
        mine = <int *>view.buf
        theirs = <int *>(<uint8_t *>view.buf + 128)
        if not first:
            mine, theirs = theirs, mine
        start = 0.0
        for part in range(2):  # the first exchange waits until the other side is there
            low = 1 if part == 0 else 2
            high = 1 if part == 0 else count
            start = _monotonic()
            with nogil:
                for i in range(low, high + 1):
                    if first:
                        PYE_SET(mine, <int>i)
                    spins = 0
                    while PYE_GET(theirs) != <int>i and spins < 1000000000:
                        spins += 1
                    if not first:
                        PYE_SET(mine, <int>i)
        return _monotonic() - start
    finally:
        PyBuffer_Release(&view)
