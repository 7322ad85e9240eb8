"""The threat catalogue's part B.2 (PAG) on whole heaps: versions in arrays, and in the tree.

What a page by itself must withstand is in ``test_page.py``, the tree's nodes in ``test_tree.py``.
Here somebody changes what lies outside of trusted memory while the heap believes in it: then its
reader gets the right data, or zeros and SealingError, and nothing else.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest

from pyenclave import _core
from pyenclave.errors import EnclaveError, SealingError

PAGE = 4096
EPOCH = 1 << 40
LIMIT = 1 << 36
# How a heap keeps its versions. A tree whose cache is trimmed to one node after each batch, so
# that its nodes come from outside, too.
KINDS = {"flat": {}, "tree": {"tree_above": 0, "tree_cache": 1}}


@pytest.fixture(params=list(KINDS))
def make(request: pytest.FixtureRequest) -> Callable[..., _core.Pages]:
    def new(pages: int = 256, resident: int = 64, **options: object) -> _core.Pages:
        return _core.Pages(pages * PAGE, resident * PAGE, **KINDS[request.param], **options)

    return new


def content(page: int, version: int = 0) -> bytes:
    return random.Random(page << 20 | version).randbytes(PAGE)


def write(heap: _core.Pages, page: int, data: bytes) -> None:
    memoryview(heap)[page * PAGE : (page + 1) * PAGE] = data


def read(heap: _core.Pages, page: int) -> bytes | None:
    """What a reader gets: the bytes; None for SealingError."""
    try:
        return bytes(memoryview(heap)[page * PAGE : (page + 1) * PAGE])
    except SealingError:
        return None


def filled(make: Callable[..., _core.Pages], num: int = 8) -> _core.Pages:
    """A heap whose first pages were written and evicted, and nothing else."""
    heap = make(read_ahead=1)
    for page in range(num):
        write(heap, page, content(page))
    assert heap.evict(0, num * PAGE) == num
    return heap


def dead(heap: _core.Pages, page: int) -> None:
    """Reading a page ends the heap: nothing is readable any more, and it says why."""
    assert heap.poisoned is None
    assert read(heap, page) in (None, bytes(PAGE))
    assert heap.poisoned is not None
    assert "PYE_E_AUTH" in heap.poisoned
    for other in range(8):
        assert read(heap, other) in (None, bytes(PAGE))
    for call in (heap.evict, lambda: heap.prefetch(0, PAGE), lambda: heap.pin(0, PAGE)):
        with pytest.raises(SealingError):
            call()


def test_PAG_01_every_older_version_of_a_page_ends_the_heap(make) -> None:
    def run(offer: int | None) -> _core.Pages:
        heap = make()
        kept = []
        for version in range(6):
            write(heap, 3, content(3, version))
            heap.evict()
            kept.append(bytes(heap._cipher(3)))
        if offer is not None:
            heap._cipher(3)[:] = kept[offer]
        return heap

    assert read(run(None), 3) == content(3, 5)
    assert read(run(5), 3) == content(3, 5)
    for offer in range(5):
        dead(run(offer), 3)


def test_PAG_02_any_two_pages_exchanged_end_the_heap(make) -> None:
    for one in range(8):
        for other in range(one):
            heap = filled(make)
            a, b = heap._cipher(one), heap._cipher(other)
            a[:], b[:] = bytes(b), bytes(a)
            dead(heap, one)


def test_PAG_02_with_its_version_and_tag_a_page_is_still_of_its_place(make) -> None:
    heap = filled(make)
    heap._cipher(1)[:] = bytes(heap._cipher(2))
    heap._set_meta(1, *heap._meta(2))
    dead(heap, 1)


def test_PAG_03_pages_of_another_heap_end_the_heap(make) -> None:
    """The same content at the same place, in the same order: another heap, or another start."""
    one, other = filled(make), filled(make)
    assert [one._meta(page)[0] for page in range(8)] == [other._meta(page)[0] for page in range(8)]
    for page in range(8):
        assert bytes(one._cipher(page)) != bytes(other._cipher(page))
    one._cipher(5)[:] = bytes(other._cipher(5))
    dead(one, 5)
    third = filled(make)
    other._cipher(2)[:] = bytes(third._cipher(2))
    other._set_meta(2, *third._meta(2))
    dead(other, 2)


def test_PAG_04_every_bit_of_version_and_tag_is_bound(make) -> None:
    for bit in range(64):
        heap = filled(make)
        version, tag = heap._meta(4)
        heap._set_meta(4, version ^ 1 << bit, tag)
        if version ^ 1 << bit:
            assert read(heap, 4) in (None, bytes(PAGE))
            assert heap.poisoned is not None
    for bit in range(128):
        heap = filled(make)
        version, tag = heap._meta(4)
        changed = (int.from_bytes(tag, "big") ^ 1 << bit).to_bytes(16, "big")
        heap._set_meta(4, version, changed)
        dead(heap, 4)


@pytest.mark.parametrize(
    "step", [37, pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
def test_PAG_04_every_bit_of_a_page_is_bound(make, step: int) -> None:
    for bit in range(0, 8 * PAGE, step):
        heap = filled(make, 1)
        heap._cipher(0)[bit // 8] ^= 1 << bit % 8
        assert read(heap, 0) in (None, bytes(PAGE))
        assert heap.poisoned is not None
        heap.close()


# ---- the nodes of the version tree ---------------------------------------------------------------

TREE_PAGES = 128 * 12


def grown() -> _core.Pages:
    """A heap whose versions are in a tree of 12 leaves, all of them outside but the topmost."""
    heap = _core.Pages(TREE_PAGES * PAGE, 64 * PAGE, read_ahead=1, tree_above=0, tree_cache=1)
    for page in range(0, TREE_PAGES, 100):
        write(heap, page, content(page))
    heap.evict()
    return heap


def node(heap: _core.Pages, number: int) -> memoryview:
    nodes = heap._nodes()
    assert nodes is not None
    assert len(nodes) == 13 * PAGE
    return nodes[number * PAGE : (number + 1) * PAGE]


def test_a_heap_without_a_tree_has_no_nodes_and_small_ones_have_none() -> None:
    heap = _core.Pages(256 * PAGE, 64 * PAGE)
    assert heap._nodes() is None
    assert heap.stats()["tree_levels"] == 0
    assert grown().stats()["tree_levels"] == 2


def bad_node(heap: _core.Pages, page: int, how: str) -> None:
    """The heap looks at the node of `page` for a fault, an eviction, or what a user asks for."""
    assert heap.poisoned is None
    if how == "fault":
        assert read(heap, page) in (None, bytes(PAGE))
    else:
        what = {"prefetch": heap.prefetch, "pin": heap.pin, "discard": heap.discard}[how]
        with pytest.raises(SealingError):
            what(page * PAGE, PAGE)
    assert "PYE_E_AUTH" in str(heap.poisoned)
    assert read(heap, 0) in (None, bytes(PAGE))


HOW = ["fault", "prefetch", "pin", "discard"]


@pytest.mark.parametrize("how", HOW)
def test_PAG_01_an_older_node_ends_the_heap(how: str) -> None:
    heap = grown()
    old = bytes(node(heap, 5))
    write(heap, 5 * 128 + 1, content(1))
    heap.evict()
    assert read(heap, 0) == content(0)  # the leaf of others
    heap.evict()
    assert bytes(node(heap, 5)) != old
    node(heap, 5)[:] = old
    assert read(heap, 100) == content(100)
    bad_node(heap, 5 * 128 + 1, how)


@pytest.mark.parametrize("how", HOW)
def test_PAG_02_exchanged_nodes_end_the_heap(how: str) -> None:
    heap = grown()
    a, b = node(heap, 3), node(heap, 4)
    a[:], b[:] = bytes(b), bytes(a)
    bad_node(heap, 3 * 128, how)


def test_PAG_03_a_node_of_another_heap_ends_the_heap() -> None:
    heap, other = grown(), grown()
    node(heap, 3)[:] = bytes(node(other, 3))
    bad_node(heap, 400, "fault")
    assert read(other, 400) == content(400)


def test_PAG_04_a_changed_byte_of_a_node_ends_the_heap() -> None:
    for at in range(0, PAGE, 111):
        heap = grown()
        node(heap, 7)[at] ^= 0x10
        bad_node(heap, 900, "fault")


def test_PAG_04_a_bad_node_is_met_when_its_page_is_evicted() -> None:
    """It was brought while the node was good."""
    heap = grown()
    assert read(heap, 700) == content(700)
    write(heap, 0, content(0))
    heap.evict(0, PAGE)  # after which only the topmost node is in memory
    node(heap, 5)[9] ^= 1
    with pytest.raises(SealingError):
        heap.evict()
    assert "PYE_E_AUTH" in str(heap.poisoned)
    assert read(heap, 700) in (None, bytes(PAGE))


def test_a_heap_over_a_tree_gives_back_what_it_discards() -> None:
    heap = grown()
    heap.discard(0, TREE_PAGES * PAGE)
    assert all(read(heap, page) == bytes(PAGE) for page in range(0, TREE_PAGES, 100))
    write(heap, 0, content(0))
    heap.evict(0, PAGE)  # after which nodes leave
    assert any(node(heap, 0))
    assert not any(any(node(heap, number)) for number in range(1, 12))
    assert read(heap, 0) == content(0)
    assert heap.poisoned is None


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, -4096, 2**64, 2**63])
def test_PAG_05_sizes_that_are_no_pages_are_refused(make, size: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        _core.Pages(size, 64 * PAGE)
    with pytest.raises((ValueError, OverflowError)):
        _core.Pages(256 * PAGE, size)
    heap = filled(make)
    for call in (heap.evict, heap.prefetch, heap.pin, heap.discard):
        if size != 0:
            with pytest.raises((ValueError, OverflowError)):
                call(size, PAGE)
            with pytest.raises((ValueError, OverflowError)):
                call(0, size)
        with pytest.raises((ValueError, OverflowError)):
            call(255 * PAGE, 2 * PAGE)
    assert [read(heap, page) for page in range(8)] == [content(page) for page in range(8)]


@pytest.mark.parametrize(
    ("threads", "evictions"),
    [
        (64, 60_000),
        pytest.param(64, 10_000_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_PAG_06_no_nonce_is_used_twice_under_a_heaps_key(
    make, threads: int, evictions: int
) -> None:
    """
    Each thread dirties and evicts pages of its own, and keeps every version they ever had.

    A nonce is the version, and the key is the heap's. Nobody evicts but by request (all is
    resident), so the set must be as large as the number of pages that were sealed: none is left
    out, none is there twice.
    """
    own = 16
    heap = make(threads * own, threads * own + 64)
    rounds = -(-evictions // (threads * own))
    versions = np.zeros((threads, rounds, own), np.uint64)
    view = np.frombuffer(heap, np.uint64).reshape(-1, PAGE // 8)
    start = threading.Barrier(threads)

    def work(number: int) -> None:
        first = number * own
        start.wait()
        for turn in range(rounds):
            view[first : first + own, 0] = turn + 1
            heap.evict(first * PAGE, own * PAGE)
            versions[number, turn] = [heap._meta(first + i)[0] for i in range(own)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sealed = heap.stats()["pages_out"]
    assert sealed == versions.size >= evictions
    seen = np.unique(versions)
    assert len(seen) == versions.size
    assert seen[0] == 1
    assert seen[-1] == sealed


def test_PAG_06_at_the_limit_a_heap_moves_to_a_new_epoch(make) -> None:
    heap = filled(make)
    heap._skip(LIMIT - 11)
    for turn in range(4):
        for page in range(8):
            write(heap, 10 + 10 * turn + page, content(page, turn))
        heap.evict()
    epochs = [heap._meta(10 + 10 * turn)[0] >> 40 for turn in range(4)]
    assert epochs == [0, 1, 1, 1]
    for turn in range(4):
        assert [read(heap, 10 + 10 * turn + page) for page in range(8)] == [
            content(page, turn) for page in range(8)
        ]
    assert [read(heap, page) for page in range(8)] == [content(page) for page in range(8)]
    # Pages of several epochs side by side, brought in one step.
    heap.evict()
    for epoch in (5, 9):
        heap._skip(epoch * EPOCH + 1)
        write(heap, epoch, content(epoch, epoch))
        heap.evict()
    assert heap.prefetch(0, 64 * PAGE) > 0
    assert read(heap, 5) == content(5, 5)
    assert read(heap, 9) == content(9, 9)
    assert read(heap, 6) == content(6)
    assert heap.poisoned is None


def test_PAG_06_without_a_further_epoch_the_key_is_destroyed_never_wrapped(make) -> None:
    heap = filled(make)
    heap._skip((2**24 - 1) * EPOCH + LIMIT)
    write(heap, 20, content(20))
    assert heap.evict() == 1
    assert heap._meta(20)[0] == (2**24 - 1) * EPOCH + LIMIT
    assert read(heap, 20) == content(20)
    with pytest.raises(EnclaveError):
        heap.evict()
    assert "PYE_E_LIMIT" in str(heap.poisoned)
    assert read(heap, 20) in (None, bytes(PAGE))
    assert read(heap, 0) in (None, bytes(PAGE))


def test_PAG_07_a_forked_child_can_neither_read_nor_seal(make, in_child) -> None:
    heap = filled(make)
    write(heap, 9, content(9))

    def inside() -> list[object]:
        found: list[object] = []
        for call in (heap.evict, lambda: heap.prefetch(0, PAGE), heap.stats, lambda: heap._meta(1)):
            try:
                call()
                found.append("worked")
            except EnclaveError as error:
                found.append(type(error).__name__)
        return found

    answers = in_child(inside).result()
    assert "worked" not in answers
    assert read(heap, 9) == content(9)
    assert heap.evict() == 1
    assert [read(heap, page) for page in range(8)] == [content(page) for page in range(8)]


def test_PAG_07_every_heap_has_a_key_of_its_own(make) -> None:
    seen = set()
    for _ in range(20):
        heap = filled(make, 1)
        assert heap._meta(0)[0] == 1
        seen.add(bytes(heap._cipher(0)))
    assert len(seen) == 20


@pytest.mark.no_asan  # the shadow is terabytes, and all of it is readable
def test_PAG_09_what_was_evicted_is_nowhere_in_the_process(make, start_target) -> None:
    """
    Another process looks for it in the memory of the heap's.

    The pattern comes to be in the heap only (two halves are added there), and here, afterwards.
    """
    for evicted in (False, True):
        halves = [os.urandom(64), os.urandom(64)]
        kept: list[object] = []

        def prepare(evicted: bool = evicted, kept: list[object] = kept, halves=halves) -> None:
            heap = make()
            page = np.frombuffer(heap, np.uint8)[5 * PAGE : 6 * PAGE].reshape(-1, 64)
            page[:] = np.frombuffer(halves[0], np.uint8)
            page[:] ^= np.frombuffer(halves[1], np.uint8)
            if evicted:
                heap.evict()
            kept.append(heap)

        target = start_target(prepare, os.getuid())
        pattern = bytes(a ^ b for a, b in zip(*halves, strict=True))
        found = count(target.pid, pattern)
        target.end()
        # What is resident is found: the search works.
        assert (found == 0) == evicted


def count(pid: int, pattern: bytes) -> int:
    """Return how often the memory of a process has a pattern."""
    found = 0
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb") as mem:
        for line in maps:
            span, mode, *_ = line.split()
            if not mode.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            for at in range(start, end, 1 << 24):
                try:
                    mem.seek(at)
                    found += mem.read(min(1 << 24, end - at)).count(pattern)
                except (OSError, ValueError):
                    continue
    return found


def test_PAG_07_a_forked_child_has_a_heap_of_its_own_even_where_its_parents_was(
    make, in_child
) -> None:
    """The parent's is not there in the child, so the kernel gives the child the same addresses."""
    heap = filled(make)
    heap.close()
    address = heap.address

    def inside() -> bool:
        own = [make() for _ in range(3)]
        for one in own:
            write(one, 200, content(200))
            one.evict()
            assert read(one, 200) == content(200)
        return address in [one.address for one in own]

    assert in_child(inside).result() in (True, False)
    assert heap.poisoned is None
