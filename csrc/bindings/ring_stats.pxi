# Counters of the calls of one handle; csrc/include/pyenclave/stats.h says what is counted when.
# Whoever makes calls on a lane counts them: pye_stats_time before and pye_stats_begin right after a
# call is written, pye_stats_answer when its answer is read, pye_stats_finish before the lane is let
# go.

cdef extern from "pyenclave.h" nogil:
    enum:
        PYE_STATS_ARGUMENT
        PYE_STATS_BUSY
        PYE_STATS_TIMEOUT
        PYE_STATS_LOST
        PYE_STATS_POISONED
        PYE_STATS_EVENTS
        PYE_STATS_BUCKETS
        PYE_STATS_SAMPLE
        PYE_STATS_RAISED
        PYE_STATS_REFUSED
    ctypedef struct pye_stats_counts:
        uint64_t calls
        uint64_t raised
        uint64_t refused
        uint64_t bytes_in
        uint64_t bytes_out
        uint64_t samples
        uint64_t nanoseconds
        uint64_t buckets[122]
    ctypedef struct pye_stats:
        pass
    uint64_t pye_clock_ns()
    pye_status pye_stats_new(pye_stats **out, uint32_t lanes, uint32_t functions,
                             uint64_t (*clock)() noexcept)
    void pye_stats_free(pye_stats *stats)
    uint32_t pye_stats_functions(const pye_stats *stats)
    void pye_stats_enable(pye_stats *stats, int on)
    void pye_stats_time(pye_stats *stats, uint32_t lane, uint32_t function)
    void pye_stats_begin(pye_stats *stats, uint32_t lane, uint32_t function,
                         const pye_segment *segments, size_t num)
    void pye_stats_answer(pye_stats *stats, uint32_t lane, uint32_t function, uint64_t length)
    void pye_stats_batch(pye_stats *stats, uint32_t lane, uint32_t function, uint64_t calls,
                         uint64_t raised, uint64_t bytes_in, uint64_t bytes_out)
    void pye_stats_failed(pye_stats *stats, uint32_t lane, uint32_t function, int how)
    void pye_stats_finish(pye_stats *stats, uint32_t lane)
    void pye_stats_event(pye_stats *stats, uint32_t event)
    void pye_stats_depth(pye_stats *stats, uint64_t waiting)
    pye_status pye_stats_read(const pye_stats *stats, uint32_t function, pye_stats_counts *out)
    void pye_stats_events(const pye_stats *stats, uint64_t *out)
    uint64_t pye_stats_bound(uint32_t bucket)

STATS_SAMPLE = PYE_STATS_SAMPLE
# Upper bounds of the buckets of durations in nanoseconds; the last bucket has none.
STATS_BOUNDS = tuple([pye_stats_bound(i) for i in range(PYE_STATS_BUCKETS - 1)])


@cython.final
cdef class CallStats:
    """Counters of one handle's calls. They outlive its lanes for whoever still reads them."""

    cdef pye_stats *counts

    def __cinit__(self, uint32_t lanes, uint32_t functions):
        self.counts = NULL
        status = pye_stats_new(&self.counts, lanes, functions, pye_clock_ns)
        if status != PYE_OK:
            fail(status, "stats")

    def __dealloc__(self):
        pye_stats_free(self.counts)

    def __len__(self):
        # Functions with counters of their own; the index after them is the others'.
        return <Py_ssize_t>pye_stats_functions(self.counts)

    def enable(self, bint on) -> None:
        """Turn counting on or off (to measure what it costs)."""
        pye_stats_enable(self.counts, on)

    def refused(self) -> None:
        """Count a call that did not cross: an argument did not fit."""
        pye_stats_event(self.counts, PYE_STATS_ARGUMENT)

    def events(self) -> tuple:
        """Counters of the handle: argument, busy, timeout, lost, poisoned, queue high-water."""
        cdef uint64_t[6] out
        pye_stats_events(self.counts, out)
        return tuple([out[i] for i in range(PYE_STATS_EVENTS)])

    def read(self, uint32_t function) -> tuple:
        """
        Counters of a function.

        ``(calls, raised, refused, bytes_in, bytes_out, samples, nanoseconds, buckets)``.
        """
        cdef pye_stats_counts out
        status = pye_stats_read(self.counts, function, &out)
        if status != PYE_OK:
            fail(status, "stats")
        return (out.calls, out.raised, out.refused, out.bytes_in, out.bytes_out, out.samples,
                out.nanoseconds, tuple([out.buckets[i] for i in range(PYE_STATS_BUCKETS)]))


def stats_cost(uint32_t count) -> float:
    """Count `count` calls of 64 bytes and their answers; return the seconds taken (benchmarks)."""
    cdef pye_segment segment
    cdef CallStats stats = CallStats(1, 1)
    cdef uint32_t i
    segment.data = NULL
    segment.len = 64
    start = _monotonic()
    with nogil:
        for i in range(count):
            pye_stats_time(stats.counts, 0, 0)
            pye_stats_begin(stats.counts, 0, 0, &segment, 1)
            pye_stats_answer(stats.counts, 0, 0, 64)
            pye_stats_finish(stats.counts, 0)
    return _monotonic() - start
