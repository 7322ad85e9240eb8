"""
Rows ``fault_seq`` and ``fault_random``: one page of sealed memory, touched while it is sealed.

A loop in C reads the first word of each page, by the array's address, and times each read: pages of
a ``SealedHeap`` without read-ahead, and pages that a userfaultfd thread opens with the core's own
function, on the same processor or on another. All pages were sealed before, and there is room for
them: what eviction costs is in other rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from pyenclave import SealedHeap
from pyenclave.benchmarks.paging_peers import (
    MIB,
    PAGE,
    HandlerThread,
    SealedPages,
    Touch,
    need_memory,
    on_processor,
    plain,
)
from pyenclave.benchmarks.rows import AbsentError, Row, figures

__all__ = ["fault_random", "fault_seq", "sequence", "shuffled", "touched"]

_SMALL: Final = 64 * MIB
_LARGE: Final = 1024 * MIB
_ROUNDS: Final = 7
_LARGE_ROUNDS: Final = 3

Order = np.ndarray[Any, np.dtype[np.uint32]]


class _Times(NamedTuple):
    """Percentiles of each round, in ns."""

    middle: list[float]
    late: list[float]  # the 99th

    def add(self, times: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        middle, late = np.percentile(times, (50, 99))
        self.middle.append(float(middle))
        self.late.append(float(late))


def sequence(pages: int) -> Order:
    """Return *pages* pages in ascending order."""
    return np.arange(pages, dtype=np.uint32)


def shuffled(pages: int) -> Order:
    """Return *pages* pages in a random order, always the same."""
    return np.random.default_rng(6).permutation(pages).astype(np.uint32)


@contextlib.contextmanager
def _subject(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Iterator[tuple[Any, Any]]:
    """Give a heap without read-ahead with room for everything, and *words* in it."""
    size = words.nbytes
    with SealedHeap(size + MIB, size + MIB, read_ahead=1) as heap:
        yield heap, heap.array(words)


def touched(
    order: Order, *, rounds: int, across: bool = False, beside: Order | None = None
) -> dict[str, _Times]:
    """
    Touch sealed pages in *order*.

    Args:
        order: The pages, each once.
        rounds: How often, all ways in turns.
        across: A thread on another core takes part too.
        beside: Another order of the same pages, for ours only.

    Returns:
        The times of each way; ours has no name, and that in the other order is ``beside``.
    """
    size = PAGE * len(order)
    need_memory(3 * size)
    touch = Touch()
    words = plain(size)
    words[:] = np.arange(len(words), dtype=np.uint64) * 0x9E3779B97F4A7C15
    want = int(words[:: PAGE // 8].sum())
    here, *others = sorted(os.sched_getaffinity(0))
    with (
        SealedPages(words) as pages,
        _subject(words) as (heap, array),
        HandlerThread(pages, touch) as thread,
        on_processor(here),
    ):

        def ours() -> int:
            heap.evict(array)
            return int(array.ctypes.data)

        def theirs(processor: int) -> Callable[[], int]:
            def drop() -> int:
                thread.move(processor)
                thread.drop()
                return thread.base

            return drop

        ways = {"": (ours, order), "same_core": (theirs(here), order)}
        if others and across:
            ways["other_core"] = theirs(others[0]), order
        if beside is not None:
            ways["beside"] = ours, beside
        found = {way: _Times([], []) for way in ways}
        for number in range(rounds + 1):
            for way, (prepare, pages_of) in ways.items():
                total, times = touch(prepare(), pages_of)
                if total != want:
                    raise AssertionError("the pages were not what was sealed")
                if number:  # the first warms up
                    found[way].add(times)
    return found


def _rows(name: str, found: dict[str, _Times]) -> list[Row]:
    """Return the rows of one size: the median and the 99th percentile against each peer."""
    ours, near = found[""], found["same_core"]
    peer = "a userfaultfd handler thread on the same core"
    rows = [
        figures(name, ours.middle, near.middle, peer=peer),
        figures(f"{name}/p99", ours.late, near.late, peer=f"{peer}, p99"),
    ]
    if "other_core" in found:
        far, peer = found["other_core"], "a userfaultfd handler thread on another core"
        rows.append(figures(f"{name}/other_core", ours.middle, far.middle, peer=peer))
    return rows


def _large(name: str, order: Callable[[int], Order]) -> list[Row]:
    """Return the rows of 1 GiB, where there is memory for it."""
    try:
        return _rows(name, touched(order(_LARGE // PAGE), rounds=_LARGE_ROUNDS))
    except AbsentError as absent:
        return [{"name": name, "absent": list(absent.names)}]


def fault_seq() -> list[Row]:
    """Touch sealed pages one after the other, without read-ahead."""
    small = touched(sequence(_SMALL // PAGE), rounds=_ROUNDS, across=True)
    return [*_rows("fault_seq", small), *_large("fault_seq/1gib", sequence)]


def fault_random() -> list[Row]:
    """Touch sealed pages in a random order; also against one after the other."""
    pages = _SMALL // PAGE
    small = touched(shuffled(pages), rounds=_ROUNDS, across=True, beside=sequence(pages))
    ours, ordered = small[""], small["beside"]
    peer = "the same in ascending order"
    return [
        *_rows("fault_random", small),
        figures("fault_random/fault_seq", ours.middle, ordered.middle, peer=peer),
        figures("fault_random/fault_seq/p99", ours.late, ordered.late, peer=f"{peer}, p99"),
        *_large("fault_random/1gib", shuffled),
    ]
