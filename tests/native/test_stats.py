"""Counters of calls: what is counted, what is timed, and where durations fall."""

from __future__ import annotations

import itertools
import threading

import pytest

from pyenclave import _core
from pyenclave._ffi import ffi, lib

NANOSECONDS = [0, 1, 127, 128, 159, 160, 255, 256, 319, 320, 1000, 10**6, 10**9, 2**36, 2**37 - 1]


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 1000
        self.asked = 0
        self.callback = ffi.callback("uint64_t(void)", self.read)

    def read(self) -> int:
        self.asked += 1
        return self.now


class Stats:
    def __init__(self, lanes: int = 1, functions: int = 2) -> None:
        self.clock = Clock()
        out = ffi.new("pye_stats **")
        assert lib.pye_stats_new(out, lanes, functions, self.clock.callback) == 0
        self.handle = ffi.gc(out[0], lib.pye_stats_free)

    def call(self, *, lane: int = 0, function: int = 0, length: int = 10, took: int = 0) -> None:
        segment = ffi.new("pye_segment[2]")
        segment[0].len = length
        segment[1].len = 1
        lib.pye_stats_time(self.handle, lane, function)
        lib.pye_stats_begin(self.handle, lane, function, segment, 2)
        self.clock.now += took
        lib.pye_stats_answer(self.handle, lane, function, 7)
        lib.pye_stats_finish(self.handle, lane)

    def read(self, function: int = 0):
        out = ffi.new("pye_stats_counts *")
        assert lib.pye_stats_read(self.handle, function, out) == 0
        return out


def test_impossible_counters_are_refused() -> None:
    """No lanes, too many lanes, no clock."""
    out = ffi.new("pye_stats **")
    clock = Clock()
    for lanes, callback in ((0, clock.callback), (1025, clock.callback), (1, ffi.NULL)):
        assert lib.pye_stats_new(out, lanes, 1, callback) == lib.PYE_E_ARGUMENT
        assert out[0] == ffi.NULL
    with pytest.raises(ValueError, match="stats"):
        _core.CallStats(1, 1).read(2)


def test_no_handle_is_no_counting() -> None:
    """Every function takes NULL."""
    out = ffi.new("pye_stats_counts *")
    events = ffi.new("uint64_t[]", [9] * lib.PYE_STATS_EVENTS)
    lib.pye_stats_time(ffi.NULL, 0, 0)
    lib.pye_stats_begin(ffi.NULL, 0, 0, ffi.NULL, 0)
    lib.pye_stats_answer(ffi.NULL, 0, 0, 1)
    lib.pye_stats_batch(ffi.NULL, 0, 0, 1, 1, 1, 1)
    lib.pye_stats_failed(ffi.NULL, 0, 0, 1)
    lib.pye_stats_finish(ffi.NULL, 0)
    lib.pye_stats_event(ffi.NULL, 0)
    lib.pye_stats_depth(ffi.NULL, 1)
    lib.pye_stats_enable(ffi.NULL, 1)
    lib.pye_stats_events(ffi.NULL, events)
    assert list(events) == [0] * lib.PYE_STATS_EVENTS
    assert lib.pye_stats_read(ffi.NULL, 0, out) == lib.PYE_E_ARGUMENT
    assert lib.pye_stats_functions(ffi.NULL) == 0
    lib.pye_stats_free(ffi.NULL)


@pytest.mark.parametrize("value", NANOSECONDS)
def test_a_duration_lies_in_its_bucket(value: int) -> None:
    """Not below the bucket's lower bound, and below its upper one."""
    bucket = lib.pye_stats_bucket(value)
    assert value < lib.pye_stats_bound(bucket)
    assert bucket == 0 or value >= lib.pye_stats_bound(bucket - 1)


def test_buckets_are_narrow_and_end() -> None:
    """Each is at most a quarter of its lower bound wide; the last takes everything."""
    bounds = [lib.pye_stats_bound(i) for i in range(lib.PYE_STATS_BUCKETS)]
    assert bounds == sorted(set(bounds))
    for low, high in itertools.pairwise(bounds[:-1]):
        assert high - low <= low / 4
    assert bounds[-1] == 2**64 - 1
    for huge in (2**37, 2**63, 2**64 - 1):
        assert lib.pye_stats_bucket(huge) == lib.PYE_STATS_BUCKETS - 1
    assert lib.pye_stats_bound(10**6) == 2**64 - 1
    assert bounds[:-1] == list(_core.STATS_BOUNDS)


def test_calls_and_bytes_are_counted_exactly() -> None:
    """Every call; the length is that of all segments."""
    stats = Stats()
    for _ in range(1000):
        stats.call(length=10)
    found = stats.read()
    assert (found.calls, found.bytes_in, found.bytes_out) == (1000, 11_000, 7000)
    assert stats.read(1).calls == 0


def test_one_call_in_sixty_four_is_timed_and_the_first_always() -> None:
    """The clock is read twice for a timed call and for no other."""
    stats = Stats()
    stats.call(took=300)
    assert stats.clock.asked == 2
    assert stats.read().buckets[lib.pye_stats_bucket(300)] == 1
    for _ in range(63_999):
        stats.call()
    found = stats.read()
    assert 990 <= found.samples <= 1010
    assert stats.clock.asked == 2 * found.samples
    assert sum(found.buckets) == found.samples
    assert found.nanoseconds == 300


def test_timed_calls_have_no_short_period() -> None:
    """A program that does something special every n-th call must not be timed there always."""
    stats = Stats()
    timed = []
    for number in range(20_000):
        before = stats.clock.asked
        stats.call()
        if stats.clock.asked != before:
            timed.append(number)
    for period in (2, 3, 4, 5, 8, 10, 16, 32, 64, 100):
        assert len({number % period for number in timed}) == period


def test_an_inner_call_leaves_the_outer_ones_time() -> None:
    """An ocall's handler calls back in, on the same lane."""
    stats = Stats()
    none = ffi.new("pye_segment[1]")
    lib.pye_stats_time(stats.handle, 0, 0)
    lib.pye_stats_begin(stats.handle, 0, 0, none, 0)
    stats.clock.now += 1000
    lib.pye_stats_time(stats.handle, 0, 1)
    lib.pye_stats_begin(stats.handle, 0, 1, none, 0)
    stats.clock.now += 5000
    lib.pye_stats_answer(stats.handle, 0, 1, 1)
    stats.clock.now += 100
    lib.pye_stats_answer(stats.handle, 0, 0, 1)
    lib.pye_stats_finish(stats.handle, 0)
    assert (stats.read(0).samples, stats.read(0).nanoseconds) == (1, 6100)
    assert (stats.read(1).calls, stats.read(1).samples) == (1, 0)


def test_a_call_without_an_answer_is_not_timed_with_the_next() -> None:
    """Its lane is let go; the next call on it begins anew."""
    stats = Stats()
    lib.pye_stats_time(stats.handle, 0, 0)
    lib.pye_stats_begin(stats.handle, 0, 0, ffi.NULL, 0)
    lib.pye_stats_finish(stats.handle, 0)
    stats.clock.now += 10**9
    stats.call(function=1, took=200)
    assert stats.read(0).samples == 0
    assert (stats.read(1).samples, stats.read(1).nanoseconds) == (1, 200)


def test_an_index_beyond_the_table_is_one_of_the_others() -> None:
    """An index is 16 bits of the caller's; lanes that are none count nothing."""
    stats = Stats(functions=2)
    for function in (2, 3, 65535, 2**32 - 1):
        stats.call(function=function)
    assert stats.read(2).calls == 4
    assert stats.read(0).calls == stats.read(1).calls == 0
    stats.call(lane=1)
    stats.call(lane=2**32 - 1)
    assert stats.read(0).calls == 0


def test_the_table_is_bounded_however_many_lanes_there_are() -> None:
    """65,536 cells at most."""
    for lanes in (1, 2, 64, 1024):
        stats = Stats(lanes=lanes, functions=65535)
        own = lib.pye_stats_functions(stats.handle)
        assert (own + 1) * lanes <= lib.PYE_STATS_MAX_CELLS
        assert own >= 63
        stats.call(lane=lanes - 1, function=own - 1)
        stats.call(lane=lanes - 1, function=own + 1)
        assert stats.read(own - 1).calls == 1
        assert stats.read(own).calls == 1


def test_lanes_are_summed() -> None:
    """A reader sees one function, whichever lanes its calls took."""
    stats = Stats(lanes=3)
    for lane in range(3):
        stats.call(lane=lane, function=1)
    assert stats.read(1).calls == 3


def test_failures_batches_and_events_are_counted() -> None:
    """What has no answer, or a bad one."""
    stats = Stats()
    stats.call()
    lib.pye_stats_failed(stats.handle, 0, 0, lib.PYE_STATS_RAISED)
    lib.pye_stats_failed(stats.handle, 0, 0, lib.PYE_STATS_REFUSED)
    lib.pye_stats_batch(stats.handle, 0, 0, 256, 3, 4096, 2048)
    found = stats.read()
    assert (found.calls, found.raised, found.refused) == (257, 4, 1)
    assert found.bytes_in == 11 + 4096
    events = ffi.new("uint64_t[]", lib.PYE_STATS_EVENTS)
    lib.pye_stats_event(stats.handle, lib.PYE_STATS_BUSY)
    lib.pye_stats_event(stats.handle, 99)
    for waiting in (3, 7, 5):
        lib.pye_stats_depth(stats.handle, waiting)
    lib.pye_stats_events(stats.handle, events)
    assert list(events) == [0, 1, 0, 0, 0, 7]


def test_counting_can_be_turned_off() -> None:
    """The switch of the benchmark; turned on in the middle of a call it does no harm."""
    stats = Stats()
    lib.pye_stats_enable(stats.handle, 0)
    stats.call()
    lib.pye_stats_enable(stats.handle, 1)
    lib.pye_stats_answer(stats.handle, 0, 0, 5)
    stats.call()
    assert stats.read().calls == 1
    assert stats.read().bytes_out == 12


def test_threads_lose_no_event() -> None:
    """Events of a handle are added to by any thread."""
    stats = _core.CallStats(1, 1)
    threads = [
        threading.Thread(target=lambda: [stats.refused() for _ in range(5000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.events()[0] == 20_000
