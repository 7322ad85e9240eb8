"""
Rows ``scan_open``, ``prefetch``, ``scan_evicting`` and ``evict``: sealed memory in bulk.

What is compared with is the same work without any fault: pages in ordinary memory, opened and
sealed by calls of the core that take many. That is the least that any way of paging could take, so
the ratio is the share of the limit, below 1 with one thread. The ways ``/helper`` are with a second
one (``heap.helper()``), its beginning and end included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any, Final

import numpy as np

from pyenclave import SealedHeap
from pyenclave.benchmarks.paging_peers import MIB, PAGE, SealedPages, Words, need_memory, plain
from pyenclave.benchmarks.rows import Row, figures

__all__ = ["evict", "prefetch", "scan_evicting", "scan_open"]

_SIZE: Final = 1024 * MIB
_RESIDENT: Final = 64 * MIB
_ROUNDS: Final = 5
_WORDS: Final = PAGE // 8
_OPENED: Final = "opening as many pages in one call, no fault"


def _words(size: int) -> Words:
    words = plain(size)
    words[:] = np.arange(len(words), dtype=np.uint64)
    return words


@contextlib.contextmanager
def _sealed(words: Words, resident: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Give a heap, and an array in it that holds *words*."""
    with SealedHeap(words.nbytes + MIB, resident + MIB, **options) as heap:
        yield heap, heap.array(words)


def _rates(size: int, *works: tuple[Callable[[], object], Callable[[], object]]) -> list[Any]:
    """
    Do each of *works* in turns.

    Args:
        size: Bytes of one.
        works: Each a preparation, and what is timed.

    Returns:
        GB/s of each; the first round warms up.
    """
    rates: list[list[float]] = [[] for _ in works]
    for number in range(_ROUNDS + 1):
        for (prepare, work), found in zip(works, rates, strict=True):
            prepare()
            start = perf_counter_ns()
            work()
            if number:
                found.append(size / (perf_counter_ns() - start))
    return rates


def _nothing() -> None:
    pass


def _helped(heap: SealedHeap, work: Callable[[], object]) -> Callable[[], None]:
    """Return *work* as it is done with a second thread."""

    def both() -> None:
        with heap.helper():
            work()

    return both


def _compare(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError("the pages were not what was sealed")


def scan_open() -> list[Row]:
    """Read a word of each page of 1 GiB, all sealed, with room for all of them."""
    size = _SIZE
    need_memory(4 * size)
    words = _words(size)
    want = int(words[::_WORDS].sum())
    with SealedPages(words) as pages, _sealed(words, size) as (heap, array):
        out = plain(size)
        pages.open()

        def scan() -> None:
            _compare(int(array[::_WORDS].sum()), want)

        def copy() -> None:
            np.copyto(out, words)

        ours, helped, theirs, copied = _rates(
            size,
            (lambda: heap.evict(array), scan),
            (lambda: heap.evict(array), _helped(heap, scan)),
            (pages.seal, pages.open),
            (_nothing, copy),
        )
        _compare(bool(np.array_equal(pages.sealed, array)), True)
    rate: Any = {"unit": "GB/s", "more": True}
    return [
        figures("scan_open", ours, theirs, peer=_OPENED, **rate),
        figures("scan_open/helper", helped, theirs, peer=_OPENED, **rate),
        figures("scan_open/copy", ours, copied, peer="copying as many bytes", **rate),
    ]


def prefetch() -> list[Row]:
    """Ask for 1 GiB, all sealed, in one call."""
    size = _SIZE
    need_memory(3 * size)
    words = _words(size)
    with SealedPages(words) as pages, _sealed(words, size) as (heap, array):
        pages.open()
        ours, helped, theirs = _rates(
            size,
            (lambda: heap.evict(array), lambda: heap.prefetch(array)),
            (lambda: heap.evict(array), _helped(heap, lambda: heap.prefetch(array))),
            (pages.seal, pages.open),
        )
        _compare(bool(np.array_equal(pages.sealed, array)), True)
    rate: Any = {"unit": "GB/s", "more": True}
    return [
        figures("prefetch", ours, theirs, peer=_OPENED, **rate),
        figures("prefetch/helper", helped, theirs, peer=_OPENED, **rate),
    ]


def scan_evicting() -> list[Row]:
    """Read a word of each page of 1 GiB through 64 MiB: every page is opened and sealed again."""
    size = _SIZE
    need_memory(3 * size)
    words = _words(size)
    want = int(words[::_WORDS].sum())
    with SealedPages(words) as pages, _sealed(words, _RESIDENT) as (_, array):
        room = plain(64 * PAGE)

        def scan() -> None:
            _compare(int(array[::_WORDS].sum()), want)

        ours, theirs = _rates(
            size,
            (_nothing, scan),
            (_nothing, lambda: _compare(pages.through(room), want)),
        )
    peer = "opening and sealing as many pages, 64 a call, no fault"
    return [figures("scan_evicting", ours, theirs, peer=peer, unit="GB/s", more=True)]


def evict() -> Row:
    """Seal and drop 64 MiB of open pages, written since they were opened."""
    size = _RESIDENT
    need_memory(8 * size)
    words = _words(size)
    with _sealed(words, size) as (heap, array), SealedPages(words) as pages:

        def write() -> None:
            array[::_WORDS] += 1

        def write_theirs() -> None:
            pages.open_in_batches()
            pages.sealed[::_WORDS] += 1

        ours, theirs = _rates(
            size, (write, lambda: heap.evict(array)), (write_theirs, pages.seal_in_batches)
        )
        pages.open_in_batches()
        _compare(bool(np.array_equal(pages.sealed, array)), True)
    times, peer_times = ([PAGE / rate for rate in rates] for rates in (ours, theirs))
    return figures("evict", times, peer_times, peer="sealing as many pages, 64 a call, and no more")
