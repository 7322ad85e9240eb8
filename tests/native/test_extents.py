"""Ranges of a sealed heap: what is handed out never overlaps, and what is given back is whole."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyenclave._ffi import ffi, lib

PAGE = 4096
SMALL = lib.PYE_EXTENT_SMALL
CLASSES = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1344, 2048)


class Extents:
    """The metadata of a heap; it checks each answer against what it knows to be taken."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.memory = ffi.new("uint64_t[]", lib.pye_extents_size(pages) // 8 + 1)
        self.memory[len(self.memory) - 1] = 0x5A5A5A5A  # one word past the end
        self.e: Any = ffi.cast("pye_extents *", self.memory)
        assert lib.pye_extents_init(self.e, pages) == lib.PYE_OK
        self.known: dict[int, int] = {}
        self.owner: dict[int, int] = {}  # one for each 64 bytes

    def claim(self, offset: int, length: int) -> None:
        assert offset % 64 == 0
        assert offset + length <= self.pages * PAGE
        assert offset % PAGE == 0 or offset // PAGE == (offset + length - 1) // PAGE
        for at in range(offset, offset + length, 64):
            assert self.owner.setdefault(at, offset) == offset
        self.known[offset] = length

    def drop(self, offset: int, begin: int = 0) -> None:
        length = self.known[offset]
        for at in range(offset + begin, offset + length, 64):
            del self.owner[at]
        if begin:
            self.known[offset] = begin
        else:
            del self.known[offset]

    def take(self, length: int) -> int | None:
        offset, given = ffi.new("uint64_t *"), ffi.new("uint64_t *", 9)
        status = lib.pye_extents_take(self.e, offset, given, length)
        if status == lib.PYE_E_LIMIT:
            assert offset[0] == given[0] == 0
            return None
        assert status == lib.PYE_OK
        assert given[0] >= length
        assert given[0] < length + PAGE if length > SMALL else given[0] in CLASSES
        self.claim(offset[0], given[0])
        return int(offset[0])

    def find(self, offset: int) -> tuple[int, int]:
        length = ffi.new("uint64_t *", 9)
        status = lib.pye_extents_find(self.e, length, offset)
        return status, length[0]

    def give(self, offset: int, *, settle: bool = True) -> tuple[int, int]:
        freed = ffi.new("pye_extent *")
        assert lib.pye_extents_give(self.e, freed, offset) == lib.PYE_OK
        self.drop(offset)
        for at in range(freed.offset, freed.offset + freed.length, 64):
            assert at not in self.owner
        if settle and freed.length:
            self.settle(freed.offset, freed.length)
        return freed.offset, freed.length

    def settle(self, offset: int, length: int) -> None:
        assert self.try_settle(offset, length) == lib.PYE_OK

    def try_settle(self, offset: int, length: int) -> int:
        return lib.pye_extents_settle(self.e, ffi.new("pye_extent *", (offset, length)))

    def resize(self, offset: int, length: int, *, settle: bool = True) -> int:
        given, freed = ffi.new("uint64_t *", 9), ffi.new("pye_extent *")
        status = lib.pye_extents_resize(self.e, given, freed, offset, length)
        if status != lib.PYE_OK:
            assert given[0] == freed.length == 0
            return status
        assert given[0] >= length
        if freed.length:
            assert freed.offset == offset + given[0]
            self.drop(offset, given[0])
            if settle:
                self.settle(freed.offset, freed.length)
        self.claim(offset, given[0])
        return status

    @property
    def taken(self) -> int:
        return lib.pye_extents_taken(self.e)

    @property
    def largest(self) -> int:
        return lib.pye_extents_largest(self.e)

    def finish(self) -> None:
        assert self.memory[len(self.memory) - 1] == 0x5A5A5A5A


@pytest.mark.parametrize("pages", [0, 2**32 - 1, 2**32, 2**64 - 1])
def test_what_is_no_size_of_a_heap_is_refused(pages):
    assert lib.pye_extents_size(pages) == 0
    memory = ffi.new("uint64_t[]", 1000)
    assert lib.pye_extents_init(ffi.cast("pye_extents *", memory), pages) == lib.PYE_E_ARGUMENT


def test_the_metadata_of_the_largest_heap_is_24_bytes_a_page():
    small, large = lib.pye_extents_size(1), lib.pye_extents_size(2**32 - 2)
    assert large - small == 24 * (2**32 - 3)


def test_a_range_of_nothing_is_refused():
    e = Extents(16)
    offset, given = ffi.new("uint64_t *", 9), ffi.new("uint64_t *", 9)
    assert lib.pye_extents_take(e.e, offset, given, 0) == lib.PYE_E_LENGTH
    assert offset[0] == given[0] == 0
    at = e.take(PAGE)
    freed = ffi.new("pye_extent *")
    assert lib.pye_extents_resize(e.e, given, freed, at, 0) == lib.PYE_E_LENGTH
    assert e.find(at) == (lib.PYE_OK, PAGE)


@pytest.mark.parametrize("length", [16 * PAGE + 1, 2**63, 2**64 - PAGE + 1, 2**64 - 1])
def test_more_than_the_heap_has_is_refused(length):
    """Also where rounding up to pages would wrap around to a length that there is."""
    e = Extents(16)
    assert e.take(length) is None
    at = e.take(PAGE)
    assert e.resize(at, length) == lib.PYE_E_LIMIT
    assert e.find(at) == (lib.PYE_OK, PAGE)
    assert e.taken == PAGE


def test_a_heap_can_be_taken_whole_and_again():
    e = Extents(1000)
    for _ in range(3):
        assert e.largest == 1000 * PAGE
        at = e.take(1000 * PAGE)
        assert at == 0
        assert e.largest == 0
        assert e.take(1) is None
        assert e.take(PAGE) is None
        e.give(at)
        assert e.taken == 0


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1344, 1345, 2047, 2048])
def test_small_ranges_fill_a_page_before_the_next(length):
    e = Extents(8)
    size = next(size for size in CLASSES if size >= length)
    taken = [e.take(length) for _ in range(PAGE // size)]
    assert e.taken == PAGE
    assert sorted(taken) == [size * n for n in range(PAGE // size)]
    e.take(length)
    assert e.taken == 2 * PAGE


def test_the_last_empty_page_of_a_class_stays_and_others_go():
    """Temporaries come and go one by one: a page for each would be emptied each time."""
    e = Extents(8)
    at = e.take(100)
    assert e.give(at) == (0, 0)
    assert e.taken == PAGE
    assert e.take(100) == at
    many = [e.take(100) for _ in range(2 * 32 - 1)]
    assert e.taken == 2 * PAGE
    gone = [e.give(offset) for offset in [*many, at]]
    assert sorted(gone)[-2:] == [(0, 0), (PAGE, PAGE)]
    assert e.taken == PAGE


def test_the_one_run_that_is_long_enough_is_found_behind_many_of_its_bin():
    """Runs of 64 to 71 pages share a bin, which is looked through whole only if nothing else is."""
    extents = Extents(12 * 72 + 12)
    runs = []
    for length in (71, *[64] * 11):
        runs.append(extents.take(length * PAGE))
        extents.take(PAGE)  # so that neighbours do not become one
    while extents.take(PAGE) is not None:
        pass
    for run in runs:
        extents.give(run)
    assert extents.take(72 * PAGE) is None
    assert extents.take(71 * PAGE) == runs[0]
    extents.finish()


def test_what_begins_no_taken_range_is_refused():
    """Give, find, resize: insides, free pages, slots that are free, and beyond the end."""
    e = Extents(16)
    run, slot = e.take(3 * PAGE), e.take(64)
    other = e.take(1344)
    wrong = [run + 64, run + PAGE, run + 2 * PAGE, run + 3 * PAGE - 64, slot + 64, slot + 63]
    wrong += [other + 64, other // PAGE * PAGE + 3 * 1344, 10 * PAGE, 15 * PAGE, 16 * PAGE, 2**63]
    wrong += [2**64 - PAGE, 2**64 - 1]
    freed = ffi.new("pye_extent *", (9, 9))
    given = ffi.new("uint64_t *")
    for offset in wrong:
        assert e.find(offset) == (lib.PYE_E_ARGUMENT, 0), offset
        assert lib.pye_extents_give(e.e, freed, offset) == lib.PYE_E_ARGUMENT
        assert freed.offset == freed.length == 0
        assert lib.pye_extents_resize(e.e, given, freed, offset, 64) == lib.PYE_E_ARGUMENT
    e.give(slot)
    assert e.find(slot) == (lib.PYE_E_ARGUMENT, 0)
    e.give(run)
    assert e.find(run) == (lib.PYE_E_ARGUMENT, 0)


def test_pages_that_are_not_settled_belong_to_nobody():
    e = Extents(16)
    at = e.take(16 * PAGE)
    freed = e.give(at, settle=False)
    assert freed == (0, 16 * PAGE)
    assert e.find(at) == (lib.PYE_E_ARGUMENT, 0)
    assert e.take(PAGE) is None
    assert e.taken == 16 * PAGE
    e.settle(*freed)
    assert e.taken == 0
    assert e.take(16 * PAGE) == 0


def test_only_what_was_freed_can_be_settled():
    e = Extents(16)
    at, _keep = e.take(4 * PAGE), e.take(PAGE)
    freed = e.give(at, settle=False)
    for wrong in [
        (at + 1, 4 * PAGE),
        (at + PAGE, 3 * PAGE),
        (at, 3 * PAGE),
        (at, 5 * PAGE),
        (4 * PAGE, PAGE),
        (5 * PAGE, 11 * PAGE),
        (16 * PAGE, PAGE),
        (2**44, PAGE),
    ]:
        assert e.try_settle(*wrong) == lib.PYE_E_ARGUMENT, wrong
    e.settle(*freed)
    assert e.try_settle(*freed) == lib.PYE_E_ARGUMENT


def test_free_neighbours_become_one_in_every_order():
    """Three neighbours that are given back in each order: what remains is one run."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        for lengths in ((1, 1, 1), (3, 1, 2), (1, 9, 1), (17, 2, 40)):
            e = Extents(sum(lengths))
            at = [e.take(length * PAGE) for length in lengths]
            assert e.largest == 0
            for which in order:
                e.give(at[which])
            assert e.largest == sum(lengths) * PAGE
            assert e.take(sum(lengths) * PAGE) == 0


def test_a_run_grows_into_what_is_free_behind_it_and_gives_back_its_end():
    e = Extents(16)
    at, wall = e.take(2 * PAGE), e.take(PAGE)
    assert e.resize(at, 3 * PAGE) == lib.PYE_E_LIMIT
    e.give(wall)
    assert e.resize(at, 16 * PAGE + 1) == lib.PYE_E_LIMIT
    assert e.resize(at, 10 * PAGE) == lib.PYE_OK
    assert e.find(at) == (lib.PYE_OK, 10 * PAGE)
    assert e.largest == 6 * PAGE
    assert e.resize(at, 16 * PAGE) == lib.PYE_OK
    assert e.resize(at, 16 * PAGE) == lib.PYE_OK
    assert e.resize(at, 1) == lib.PYE_OK
    assert e.find(at) == (lib.PYE_OK, PAGE)
    assert e.largest == 15 * PAGE
    last = e.take(15 * PAGE)
    assert e.resize(last, 16 * PAGE) == lib.PYE_E_LIMIT


def test_a_run_does_not_grow_beyond_what_is_free_behind_it():
    e = Extents(16)
    at, gap, wall = e.take(2 * PAGE), e.take(2 * PAGE), e.take(PAGE)
    e.give(gap)
    assert e.resize(at, 5 * PAGE) == lib.PYE_E_LIMIT
    assert e.resize(at, 4 * PAGE) == lib.PYE_OK
    assert e.find(wall) == (lib.PYE_OK, PAGE)


def test_a_slot_keeps_its_size():
    e = Extents(16)
    at = e.take(100)
    assert e.resize(at, 128) == lib.PYE_OK
    assert e.resize(at, 1) == lib.PYE_OK
    assert e.resize(at, 129) == lib.PYE_E_LIMIT
    assert e.find(at) == (lib.PYE_OK, 128)


def test_an_end_that_was_cut_off_is_settled_like_any_other():
    e = Extents(16)
    at = e.take(8 * PAGE)
    assert e.resize(at, 2 * PAGE, settle=False) == lib.PYE_OK
    assert e.resize(at, 3 * PAGE) == lib.PYE_E_LIMIT
    assert e.largest == 8 * PAGE
    e.settle(2 * PAGE, 6 * PAGE)
    assert e.largest == 14 * PAGE


@pytest.mark.parametrize("seed", range(6))
def test_random_use_never_overlaps_and_everything_comes_back(seed):
    rng = random.Random(seed)
    e = Extents(rng.choice([64, 500, 3000]))
    freed: list[tuple[int, int]] = []
    for _ in range(4000):
        what = rng.random()
        if what < 0.5 or not e.known:
            top = rng.choice([64, 300, SMALL, 3 * PAGE, 40 * PAGE, e.pages * PAGE])
            wanted = rng.randint(1, top)
            if e.take(wanted) is None:
                # Refused only if there is really no run as long, or no page for a slot.
                assert e.largest < (wanted if wanted > SMALL else PAGE)
        elif what < 0.8:
            later = rng.random() < 0.3
            gone = e.give(rng.choice(list(e.known)), settle=not later)
            if later and gone[1]:
                freed.append(gone)
            if len(freed) > 5:
                e.settle(*freed.pop(rng.randrange(len(freed))))
        else:
            offset = rng.choice(list(e.known))
            e.resize(offset, rng.randint(1, max(1, 2 * e.known[offset])))
    for gone in freed:
        e.settle(*gone)
    for offset in list(e.known):
        assert e.find(offset) == (lib.PYE_OK, e.known[offset])
        e.give(offset)
    # At most one empty page of each class remains.
    assert e.taken <= len(CLASSES) * PAGE
    assert e.largest >= (e.pages - e.taken // PAGE) * PAGE // (len(CLASSES) + 1)
    e.finish()


def test_what_lies_behind_the_metadata_is_not_believed():
    """As if a page followed the last one, free or waiting to be settled."""
    for state, length in ((1, 4), (3, 1)):
        num_pages = 4
        size = lib.pye_extents_size(num_pages)
        memory = ffi.new("uint8_t[]", size + 24)
        e = ffi.cast("pye_extents *", memory)
        assert lib.pye_extents_init(e, num_pages) == lib.PYE_OK
        offset, given = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        for _ in range(2):
            assert lib.pye_extents_take(e, offset, given, 2 * PAGE) == lib.PYE_OK
        behind = length.to_bytes(4, "little") + b"\xff" * 8 + bytes([state]) + bytes(11)
        ffi.buffer(memory)[size:] = behind
        freed = ffi.new("pye_extent *")
        assert lib.pye_extents_resize(e, given, freed, 2 * PAGE, 3 * PAGE) == lib.PYE_E_LIMIT
        wanted = ffi.new("pye_extent *", (4 * PAGE, PAGE))
        assert lib.pye_extents_settle(e, wanted) == lib.PYE_E_ARGUMENT
        assert ffi.buffer(memory)[size:] == behind
