"""What a heap's functions refuse: options, ranges and states, called without Pages between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from heap_ends import EXECUTE, MPROTECT, NUM, PAGE, UNMAPPED, Heap, Kind, heap_of, options_of

from pyenclave._ffi import ffi, lib

TAG = bytes(16)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("capacity_pages", [0, lib.PYE_HEAP_MAX_PAGES + 1, (1 << 64) - 1]),
        ("resident_pages", [0, 63, lib.PYE_HEAP_MAX_PAGES + 1, (1 << 64) - 1]),
        ("mechanism", [lib.PYE_HEAP_MPROTECT + 1, (1 << 32) - 1]),
        ("read_ahead", [lib.PYE_HEAP_MAX_WINDOW + 1, (1 << 32) - 1]),
    ],
)
def test_options_that_cannot_be_are_refused_by_the_core(option: str, values: list[int]) -> None:
    out = ffi.new("pye_heap **")
    for value in values:
        options = options_of(Kind())
        setattr(options, option, value)
        status = lib.pye_heap_new(out, options)
        assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
        lib.pye_heap_free(out[0])
        assert status == lib.PYE_E_ARGUMENT, value


def meta(heap: Heap, page: int) -> int:
    version, tag = ffi.new("uint64_t *"), ffi.new("uint8_t[16]")
    status = lib.pye_heap_meta(heap.raw, version, tag, page)
    assert status == lib.PYE_OK or (version[0], bytes(tag)) == (0, TAG)
    return int(status)


def set_meta(heap: Heap, page: int) -> int:
    return int(lib.pye_heap_set_meta(heap.raw, page, 0, TAG))


# Each with the first page of none.
ON_PAGES: dict[str, Callable[[Heap, int], int]] = {
    "meta": meta,
    "set_meta": set_meta,
    "prefetch": lambda heap, page: heap.prefetch(page, 1),
    "evict": lambda heap, page: heap.evict(page, 1),
    "pin": lambda heap, page: heap.pin(page, 1),
    "unpin": lambda heap, page: heap.unpin(page, 1),
    "discard": lambda heap, page: heap.discard(page, 1),
}


@pytest.mark.parametrize("name", ON_PAGES)
def test_pages_beyond_are_refused_and_all_once_the_heap_has_ended(name: str) -> None:
    for kind in (Kind(), Kind(MPROTECT), Kind(tree=True)):
        with heap_of(kind) as heap:
            for page in (NUM, NUM + 1, 1 << 32, (1 << 64) - 1):
                assert ON_PAGES[name](heap, page) == lib.PYE_E_ARGUMENT, (name, page)
            assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
            assert ON_PAGES[name](heap, 0) == lib.PYE_E_CLOSED, name


def test_a_fault_that_is_not_of_the_heap_is_not_served() -> None:
    with heap_of(Kind()) as heap:
        assert heap.fault(3, EXECUTE) == lib.PYE_E_ARGUMENT
        assert heap.fault(3, lib.PYE_FAULT_FOREIGN) == lib.PYE_E_ARGUMENT
        # Absent pages of this mechanism are SIGBUS.
        assert heap.fault(3, lib.PYE_FAULT_SEGMENT) == lib.PYE_E_ARGUMENT
        assert heap.fault(NUM) == lib.PYE_E_ARGUMENT
        assert heap.fault(-1) == lib.PYE_E_ARGUMENT
        assert heap.stats().faults == 0
        assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
        assert heap.fault(NUM) == lib.PYE_E_ARGUMENT


def test_a_page_whose_tag_is_another_was_brought_for_nobody() -> None:
    for bring in (lambda heap: heap.prefetch(0, 8), lambda heap: heap.fault(5)):
        with heap_of(Kind()) as heap:
            heap.fill(0, 16)
            for page in range(5):  # a sequence, of which the next fault brings more
                assert heap.fault(page) == lib.PYE_OK
            assert heap.evict() == lib.PYE_OK
            before = heap.stats()
            for page in range(16):
                assert lib.pye_heap_set_meta(heap.raw, page, 77, TAG) == lib.PYE_OK
            assert bring(heap) == lib.PYE_E_POISONED
            assert heap.poison()[0] == lib.PYE_E_AUTH
            after = heap.stats()
            assert (after.read_ahead, after.prefetched) == (before.read_ahead, before.prefetched)


def test_a_forked_child_is_told_so_by_every_function(in_child: Any) -> None:
    with heap_of(Kind()) as heap:
        heap.fill(0, 4)

        def child() -> dict[str, int]:
            found = {name: function(heap, 0) for name, function in ON_PAGES.items()}
            found["close"] = lib.pye_heap_close(heap.raw)
            found["skip"] = lib.pye_heap_skip(heap.raw, 1 << 40)
            found["a fault"] = heap.fault(0, UNMAPPED)
            found["the same"] = heap.fault(0, UNMAPPED)
            zeros = ffi.buffer(ffi.cast("uint8_t *", heap.base), PAGE)
            found["zeros"] = lib.PYE_E_FORKED if not any(bytes(zeros)) else lib.PYE_OK
            return found

        found = in_child(child).result()
        assert found == dict.fromkeys(found, lib.PYE_E_FORKED)

        def of_something_else() -> list[int]:
            top = -PAGE % (1 << 64)  # no process has that address
            return [heap.fault(1, 0), lib.pye_heap_fault(heap.raw, top, UNMAPPED)]

        assert in_child(of_something_else).result() == 2 * [lib.PYE_E_ARGUMENT]
        assert heap.right(0, 4)


def test_a_heap_that_is_closed_while_pages_are_fetched_fetches_no_more() -> None:
    """The lock is given up between two steps, and whoever waits for it may close the heap."""
    options, out = options_of(Kind(MPROTECT)), ffi.new("pye_heap **")
    options.capacity_pages = options.resident_pages = options.tree_above = 8192
    stats = ffi.new("pye_heap_stats *")
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert lib.pye_heap_new(out, options) == lib.PYE_OK
        heap = out[0]

        def close(heap: Any = heap) -> None:
            time.sleep(0.001)
            assert lib.pye_heap_close(heap) == lib.PYE_OK

        closers = [threading.Thread(target=close) for _ in range(2)]
        for thread in closers:
            thread.start()
        status = lib.pye_heap_prefetch(heap, ffi.NULL, 0, 8192)
        for thread in closers:
            thread.join()
        assert lib.pye_heap_stats_read(heap, stats) == lib.PYE_OK
        fetched = stats.prefetched
        lib.pye_heap_free(heap)
        assert status in (lib.PYE_OK, lib.PYE_E_CLOSED)
        if status == lib.PYE_E_CLOSED and 0 < fetched < 8192:
            return
    pytest.fail("it was never closed meanwhile")
