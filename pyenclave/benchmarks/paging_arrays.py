"""
Rows ``random_update``, ``numpy_sum``, ``matmul_blocked`` and ``sort``: NumPy on sealed memory.

A gibibyte of data, 64 MiB of it open at any moment, against the same lines on ordinary arrays; the
results are compared. ``random_update`` is also what a programmer would write with `cryptography`.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Final

import numpy as np

from pyenclave import SealedHeap
from pyenclave.benchmarks.paging_peers import MIB, PAGE, LruPages, need_memory, plain
from pyenclave.benchmarks.rows import Row, figures

__all__ = ["matmul_blocked", "numpy_sum", "random_update", "sort"]

_SIZE: Final = 1024 * MIB
_RESIDENT: Final = 64 * MIB
_UPDATES: Final = 30_000  # of a round
_ROUNDS: Final = 5
_WARM: Final = 2  # rounds that fill what may be open
_WIDTH: Final = 2048  # of the lesser matrix: 32 MiB, half of what is resident
_HEIGHT: Final = 512  # rows of a block: 8 MiB in, 8 MiB out


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter_ns()
    work()
    return (perf_counter_ns() - start) / 1e9


def _equal(ours: object, theirs: object) -> None:
    if not np.array_equal(ours, theirs):  # type: ignore[arg-type]
        raise AssertionError("sealed and ordinary memory gave different results")


def _each(update: Callable[[Any], object], places: Any) -> float:
    """Return the ns of one of an update's places."""
    return _seconds(lambda: update(places)) / len(places) * 1e9


def random_update() -> list[Row]:
    """Add to words of 1 GiB, anywhere, one at a time, with 64 MiB open."""
    need_memory(3 * _SIZE)
    words = plain(_SIZE)
    words[:] = np.arange(len(words), dtype=np.uint64)
    source = np.random.default_rng(6)
    one = np.uint64(1)
    with SealedHeap(_SIZE + MIB, _RESIDENT) as heap:
        array = heap.array(words)
        pages = LruPages(words, _RESIDENT // PAGE)
        with array.data.cast("B") as octets, octets.cast("Q") as view:

            def singly(places: list[int]) -> None:
                for place in places:
                    view[place] = view[place] + 1

            def together(places: Any) -> None:
                np.add.at(array, places, one)  # one pass; += would fault for reading and writing

            ours: list[float] = []
            whole: list[float] = []
            theirs: list[float] = []
            for number in range(_ROUNDS + _WARM):
                first, second = source.integers(0, len(words), (2, _UPDATES))
                listed = first.tolist()
                times = _each(singly, listed), _each(pages.add, listed), _each(together, second)
                pages.add(second.tolist())
                np.add.at(words, first, one)
                np.add.at(words, second, one)
                if number >= _WARM:
                    for found, taken in zip((ours, theirs, whole), times, strict=True):
                        found.append(taken)
                _equal(array[first], words[first])
                _equal(pages.read(listed), words[first])
        _equal(array.sum(), words.sum())
    peer = "pages under cryptography AESGCM, the last used 64 MiB open"
    return [
        figures("random_update", ours, theirs, peer=peer),
        figures("random_update/numpy", whole, theirs, peer=f"{peer}, one at a time"),
    ]


def _turns(
    name: str, ours: Callable[[], float], theirs: Callable[[], float], *, peer: str, rounds: int
) -> Row:
    """Do both in turns and return the row, in ms; each gives the seconds that it took."""
    pairs = [(ours() * 1e3, theirs() * 1e3) for _ in range(rounds)]
    return figures(
        name, [pair[0] for pair in pairs], [pair[1] for pair in pairs], peer=peer, unit="ms"
    )


def numpy_sum() -> Row:
    """Add up 1 GiB of float64 through 64 MiB."""
    need_memory(2 * _SIZE)
    numbers = plain(_SIZE).view(np.float64)
    numbers[:] = np.arange(len(numbers)) * 0.5
    with SealedHeap(_SIZE + MIB, _RESIDENT) as heap:
        array = heap.array(numbers)
        results: list[Any] = [None, None]

        def add(place: int, values: Any) -> float:
            def work() -> None:
                results[place] = values.sum()

            return _seconds(work)

        add(0, array), add(1, numbers)
        row = _turns(
            "numpy_sum",
            lambda: add(0, array),
            lambda: add(1, numbers),
            peer="the same on an ordinary array",
            rounds=_ROUNDS,
        )
        _equal(*results)
    return row


def matmul_blocked() -> Row:
    """Multiply 512 MiB of float64, block by block, by 32 MiB; the product is 512 MiB more."""
    height = _SIZE // (16 * _WIDTH)
    need_memory(2 * _SIZE + 2 * 8 * _WIDTH * _WIDTH)
    source = np.random.default_rng(6)
    left = plain(_SIZE // 2).view(np.float64).reshape(height, _WIDTH)
    source.random(out=left)
    right = source.random((_WIDTH, _WIDTH))
    out = plain(_SIZE // 2).view(np.float64).reshape(height, _WIDTH)
    with SealedHeap(_SIZE + 2 * right.nbytes + MIB, _RESIDENT) as heap:
        ours_left, ours_right = heap.array(left), heap.array(right)
        ours_out = heap.zeros(left.shape, np.float64)

        def blocked() -> None:
            with heap.pin(ours_right):
                for row in range(0, height, _HEIGHT):
                    at = slice(row, row + _HEIGHT)
                    np.matmul(ours_left[at], ours_right, out=ours_out[at])

        def whole() -> None:
            np.matmul(left, right, out=out)

        row = _turns(
            "matmul_blocked",
            lambda: _seconds(blocked),
            lambda: _seconds(whole),
            peer="one call on ordinary arrays",
            rounds=2,
        )
        for first in range(0, height, _HEIGHT):  # blocks add up in another order
            at = slice(first, first + _HEIGHT)
            if not np.allclose(ours_out[at], out[at], rtol=1e-12, atol=0):
                raise AssertionError("sealed and ordinary memory gave different products")
    return row


def sort() -> Row:
    """Sort 1 GiB of float64 in place, through 64 MiB."""
    need_memory(3 * _SIZE)
    mixed = plain(_SIZE).view(np.float64)
    np.random.default_rng(6).random(out=mixed)
    numbers = plain(_SIZE).view(np.float64)
    with SealedHeap(_SIZE + MIB, _RESIDENT) as heap:
        array = heap.empty(mixed.shape, np.float64)

        def sorting(values: Any) -> Callable[[], float]:
            def run() -> float:
                values[:] = mixed
                return _seconds(values.sort)

            return run

        peer = "the same on an ordinary array"
        row = _turns("sort", sorting(array), sorting(numbers), peer=peer, rounds=2)
        for first in range(0, len(numbers), 1 << 20):
            _equal(array[first : first + (1 << 20)], numbers[first : first + (1 << 20)])
    return row
