"""Zeros of a heap that has ended: which pages are shown, to whom, and for how long (heap.h)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from failing import needs_the_test_build
from heap_ends import MPROTECT, NUM, PAGE, Heap, Kind, heap_of, steered

from pyenclave._ffi import ffi, lib

STEPS = 64  # pages that are shown for an instruction, of all threads: PAGER_STEPS
STAY = 8  # pages that stay: PAGER_ZEROS


@pytest.fixture(params=[Kind(), Kind(MPROTECT), Kind(file=True)], ids=str)
def ended(request: pytest.FixtureRequest) -> Iterator[Heap]:
    with heap_of(request.param) as heap:
        heap.fill(0, 8)
        assert lib.pye_heap_set_meta(heap.raw, 5, 77, bytes(16)) == lib.PYE_OK
        assert heap.fault(5, lib.PYE_FAULT_TELL) == lib.PYE_E_POISONED
        yield heap


def shown(heap: Heap) -> list[int]:
    """Return the pages that can be read now."""
    found: list[int] = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if line.split()[1].startswith("r"):
                first = max((begin - heap.base) // PAGE, 0)
                found += range(first, min((end - heap.base) // PAGE, NUM))
    return found


def zeros(heap: Heap, page: int, owner: int) -> int:
    return int(lib.pye_heap_zeros(heap.raw, heap.base + page * PAGE + 8, owner))


def stepped(heap: Heap, owner: int, stay: int = 0) -> None:
    lib.pye_heap_stepped(heap.raw, owner, stay)


def test_who_only_wants_to_be_told_is_shown_nothing(ended: Heap) -> None:
    assert shown(ended) == []
    assert ended.fault(5, lib.PYE_FAULT_TELL) == lib.PYE_E_POISONED
    assert shown(ended) == []
    assert ended.fault(5) == lib.PYE_E_POISONED
    assert shown(ended) == [5]


def test_a_page_is_shown_until_the_instruction_has_run(ended: Heap) -> None:
    for page in (0, 7, NUM - 1):
        assert zeros(ended, page, 1) == lib.PYE_OK
        assert shown(ended) == [page]
        at = ffi.cast("uint8_t *", ended.base + page * PAGE)
        assert not any(bytes(ffi.buffer(at, PAGE)))
        ffi.memmove(at, b"secret", 6)
        stepped(ended, 1)
        assert shown(ended) == []
    assert zeros(ended, 7, 1) == lib.PYE_OK
    assert not any(bytes(ffi.buffer(ffi.cast("uint8_t *", ended.base + 7 * PAGE), PAGE)))


def test_an_instruction_touches_several_pages(ended: Heap) -> None:
    for page in (3, 4, 900, 3):
        assert zeros(ended, page, 1) == lib.PYE_OK
    assert shown(ended) == [3, 4, 900]
    stepped(ended, 1)
    assert shown(ended) == []


def test_a_page_that_two_touch_goes_with_the_second(ended: Heap) -> None:
    assert zeros(ended, 3, 1) == zeros(ended, 4, 1) == zeros(ended, 3, 2) == lib.PYE_OK
    stepped(ended, 1)
    assert shown(ended) == [3]
    stepped(ended, 3)  # who has none
    assert shown(ended) == [3]
    stepped(ended, 2)
    assert shown(ended) == []


def test_beyond_the_room_for_instructions_pages_stay(ended: Heap) -> None:
    for page in range(STEPS):
        assert zeros(ended, 2 * page, 1 + page % 3) == lib.PYE_OK
    for page in range(STEPS, STEPS + STAY + 2):
        assert zeros(ended, 2 * page, 1) == lib.PYE_E_LIMIT
    for owner in (1, 2, 3):
        stepped(ended, owner)
    assert shown(ended) == [2 * page for page in range(STEPS + 2, STEPS + STAY + 2)]
    assert zeros(ended, 1, 1) == lib.PYE_OK
    stepped(ended, 1)
    assert 1 not in shown(ended)


def test_without_an_owner_pages_stay_and_the_oldest_goes(ended: Heap) -> None:
    for page in range(STAY):
        assert zeros(ended, page, 0) == lib.PYE_E_LIMIT
    assert shown(ended) == list(range(STAY))
    assert zeros(ended, 100, 0) == zeros(ended, 3, 0) == lib.PYE_E_LIMIT
    assert shown(ended) == [*range(1, STAY), 100]
    assert zeros(ended, 101, 0) == lib.PYE_E_LIMIT
    assert shown(ended) == [*range(2, STAY), 100, 101]


@pytest.mark.parametrize("step", [1, -1])
def test_who_goes_through_an_array_and_is_not_hidden_leaves_one_page(
    ended: Heap, step: int
) -> None:
    """Two at once, each in an array of its own."""
    for page in range(10, 10 + 20 * step, step):
        for first in (300, 600):
            assert zeros(ended, first + page, 1) == lib.PYE_OK
            stepped(ended, 1, 1)
    assert shown(ended) == [300 + page, 600 + page]
    for page in range(STAY):
        assert zeros(ended, 10 * page, 1) == lib.PYE_OK
        stepped(ended, 1, 1)
    assert shown(ended) == [10 * page for page in range(STAY)]


def test_a_page_that_stays_is_not_hidden_with_an_instruction(ended: Heap) -> None:
    assert zeros(ended, 3, 0) == lib.PYE_E_LIMIT
    assert zeros(ended, 3, 1) == lib.PYE_OK
    stepped(ended, 1)
    assert shown(ended) == [3]
    assert zeros(ended, 3, 1) == lib.PYE_OK
    for page in range(10, 10 + STAY):
        assert zeros(ended, 2 * page, 0) == lib.PYE_E_LIMIT
    assert 3 in shown(ended)  # it does not stay any more, but the instruction has not run
    stepped(ended, 1)
    assert shown(ended) == [2 * page for page in range(10, 10 + STAY)]


def test_concealing_hides_every_page(ended: Heap) -> None:
    assert zeros(ended, 3, 1) == zeros(ended, 4, 2) == zeros(ended, 4, 1) == lib.PYE_OK
    assert zeros(ended, 9, 0) == lib.PYE_E_LIMIT
    lib.pye_heap_conceal(ended.raw)
    assert shown(ended) == []
    stepped(ended, 1)
    assert zeros(ended, 4, 2) == lib.PYE_OK
    stepped(ended, 1)
    assert shown(ended) == [4]


def test_a_closed_heap_shows_zeros_in_the_same_way() -> None:
    with heap_of(Kind()) as heap:
        assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
        assert heap.fault(5, lib.PYE_FAULT_TELL) == lib.PYE_E_CLOSED
        assert zeros(heap, 5, 1) == lib.PYE_OK
        assert shown(heap) == [5]
        stepped(heap, 1)
        assert shown(heap) == []


def test_what_is_asked_of_a_heap_that_goes_on_or_of_no_page_of_it_is_refused(in_child: Any) -> None:
    with heap_of(Kind(MPROTECT)) as heap:
        heap.fill(0, 4)
        for owner in (0, 1):
            assert zeros(heap, 0, owner) == lib.PYE_E_STATE
        assert shown(heap) == []
        assert heap.right(0, 4)
        assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
        for address in (heap.base - 1, heap.base + NUM * PAGE, 0, (1 << 64) - 1):
            assert lib.pye_heap_zeros(heap.raw, address, 1) == lib.PYE_E_ARGUMENT
        assert shown(heap) == []

        def child() -> int:
            status = zeros(heap, 0, 1)
            stepped(heap, 1)
            return status

        assert in_child(child).result() == lib.PYE_E_FORKED


def test_many_threads_hide_what_they_were_shown(ended: Heap) -> None:
    failures: list[int] = []

    def work(owner: int) -> None:
        for page in range(200):
            status = zeros(ended, page % 7, owner)
            if status != lib.PYE_OK:
                failures.append(status)
            stepped(ended, owner)

    threads = [threading.Thread(target=work, args=(1 + n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert shown(ended) == []


@needs_the_test_build
@pytest.mark.parametrize("owner", [0, 1])
def test_a_page_that_cannot_be_shown_is_no_fault_of_the_heap(owner: int) -> None:
    with heap_of(Kind()) as heap:
        assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
        with steered().failing(1, errno.ENOMEM) as failure:
            status = zeros(heap, 5, owner)
        assert failure.name == "mprotect"
        assert status == lib.PYE_E_ARGUMENT


@needs_the_test_build
def test_memory_that_is_no_page_of_the_heap_is_left_alone() -> None:
    with heap_of(Kind()) as heap:
        assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
        for page in (-1, NUM):
            with steered().failing(1, errno.EIO) as failure:
                assert zeros(heap, page, 1) == lib.PYE_E_ARGUMENT
            assert not failure.name
