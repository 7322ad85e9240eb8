"""Which pages of a heap go first: a scan pushes out its own, unless somebody comes back to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from pyenclave._core import Pages

PAGE = 4096
WORDS = PAGE // 8
CAPACITY = 8192
RESIDENT = 1024
# Pages that are far from each other, so that no sequence of accesses goes through them.
HOT = np.random.default_rng(6).permutation(CAPACITY // 16)[:200] * 16


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(CAPACITY * PAGE, RESIDENT * PAGE) as made:
        np.frombuffer(made, dtype=np.uint64)[::WORDS] = np.arange(CAPACITY)
        made.evict()
        yield made


@pytest.fixture
def first(pages: Pages) -> NDArray[np.uint64]:
    """Return the first word of each page."""
    words: NDArray[np.uint64] = np.frombuffer(pages, dtype=np.uint64)[::WORDS]
    return words


def scan(first: NDArray[np.uint64], begin: int, end: int) -> None:
    """Read pages in order, and see that they hold what was put there."""
    assert int(first[begin:end].sum()) == (begin + end - 1) * (end - begin) // 2


def opened(pages: Pages, work: Callable[[], object]) -> int:
    """Return how many pages *work* had opened."""
    before = pages.stats()["pages_in"]
    work()
    return int(pages.stats()["pages_in"] - before)


def touch(first: NDArray[np.uint64]) -> None:
    for page in HOT.tolist():
        assert first[page] == page


def test_a_scan_pushes_out_no_page_but_its_own(pages: Pages, first: NDArray[np.uint64]) -> None:
    assert opened(pages, lambda: touch(first)) == len(HOT)
    assert opened(pages, lambda: scan(first, 0, CAPACITY)) <= CAPACITY - len(HOT)
    assert opened(pages, lambda: touch(first)) == 0


def test_a_scan_of_writes_pushes_out_no_page_but_its_own(
    pages: Pages, first: NDArray[np.uint64]
) -> None:
    touch(first)
    first[:] = np.arange(CAPACITY)
    assert opened(pages, lambda: touch(first)) == 0


def test_what_is_used_again_stays_after_the_second_time(
    pages: Pages, first: NDArray[np.uint64]
) -> None:
    scan(first, 2000, 8000)
    for _ in range(2):
        scan(first, 0, 700)
    assert opened(pages, lambda: scan(first, 0, 700)) == 0


def test_blocks_that_are_each_used_twice_are_soon_opened_once(
    pages: Pages, first: NDArray[np.uint64]
) -> None:
    def blocks() -> None:
        for _ in range(4):
            for begin in range(0, CAPACITY - 700, 700):
                scan(first, begin, begin + 700)
                scan(first, begin, begin + 700)

    once = 4 * len(range(0, CAPACITY - 700, 700)) * 700
    assert opened(pages, blocks) < 1.2 * once


def test_an_order_that_was_wrong_is_forgotten_again(
    pages: Pages, first: NDArray[np.uint64]
) -> None:
    scan(first, 2000, 8000)
    for _ in range(3):
        scan(first, 0, 700)  # now everything is kept
    for _ in range(3):
        scan(first, 0, CAPACITY)
    touch(first)
    scan(first, 0, CAPACITY)
    assert opened(pages, lambda: touch(first)) < len(HOT) / 10


def test_what_comes_ahead_of_many_sequences_is_not_pushed_out(
    pages: Pages, first: NDArray[np.uint64]
) -> None:
    streams = first[: CAPACITY // 3 * 3].reshape(3, -1)  # a quarter of the room each, read ahead

    def together() -> None:
        for at in range(streams.shape[1]):
            assert streams[:, at].tolist() == [at + n * streams.shape[1] for n in range(3)]

    scan(first, 0, CAPACITY)
    assert opened(pages, together) < 1.1 * CAPACITY


def test_pages_that_were_sent_away_by_hand_tell_nothing(
    pages: Pages, first: NDArray[np.uint64]
) -> None:
    scan(first, 0, CAPACITY)
    touch(first)
    for _ in range(4):
        scan(first, 4001, 4701)
        pages.evict(4001 * PAGE, 700 * PAGE)
    touch(first)
    scan(first, 0, CAPACITY)
    assert opened(pages, lambda: touch(first)) == 0


def test_pages_that_were_pinned_stay(pages: Pages, first: NDArray[np.uint64]) -> None:
    scan(first, 0, 300)
    pages.pin(0, 200 * PAGE)
    pages.unpin(0, 200 * PAGE)
    scan(first, 1000, CAPACITY)
    assert opened(pages, lambda: scan(first, 0, 200)) == 0


def test_pages_that_were_asked_for_stay(pages: Pages, first: NDArray[np.uint64]) -> None:
    scan(first, 0, 300)
    scan(first, 1000, 3000)
    pages.prefetch(0, 500 * PAGE)
    scan(first, 3000, CAPACITY)
    assert opened(pages, lambda: scan(first, 0, 500)) == 0
