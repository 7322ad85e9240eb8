"""Sealed memory: pages come when touched, go when there is no room, and cannot be forged."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyenclave import errors
from pyenclave._core import Pages

PAGE = 4096
WORDS = PAGE // 8
RESIDENT = 64 * PAGE
CAPACITY = 1024 * PAGE


@pytest.fixture(params=["userfaultfd", "mprotect"])
def mechanism(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pages(mechanism: str) -> Iterator[Pages]:
    with Pages(CAPACITY, RESIDENT, mechanism=mechanism) as made:
        yield made


def words(pages: Pages) -> NDArray[np.uint64]:
    return np.frombuffer(pages, dtype=np.uint64)


def filled(pages: Pages) -> NDArray[np.uint64]:
    """Return the heap as an array in which each word has its own number, all of it evicted."""
    array = words(pages)
    array[:] = np.arange(array.size, dtype=np.uint64) + 1
    pages.evict()
    return array


# -- hostile input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "resident"),
    [(0, RESIDENT), (1, RESIDENT), (CAPACITY, 63 * PAGE), (CAPACITY, RESIDENT + 1),
     (-PAGE, RESIDENT), ((1 << 31) * PAGE + PAGE, RESIDENT), (1 << 80, RESIDENT)],
)  # fmt: skip
def test_impossible_sizes_are_refused(capacity: int, resident: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Pages(capacity, resident)


def test_an_unknown_mechanism_and_window_are_refused() -> None:
    with pytest.raises(ValueError, match="mechanism"):
        Pages(CAPACITY, RESIDENT, mechanism="magic")
    with pytest.raises(ValueError, match="read_ahead"):
        Pages(CAPACITY, RESIDENT, read_ahead=257)


@pytest.mark.parametrize("name", ["prefetch", "evict", "pin", "unpin", "discard"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, PAGE), (0, 1), (CAPACITY, PAGE), (0, CAPACITY + PAGE), (-PAGE, PAGE), (PAGE, CAPACITY)],
)
def test_ranges_beyond_the_heap_or_of_parts_of_pages_are_refused(
    pages: Pages, name: str, offset: int, length: int
) -> None:
    with pytest.raises((ValueError, OverflowError)):
        getattr(pages, name)(offset, length)


def test_core_dumps_and_children_have_none_of_its_mappings(pages: Pages) -> None:
    """The kernel's own flags of view and alias: "dd" (not dumped), "dc" (not copied by a fork)."""
    pages.prefetch(0, PAGE)
    view = alias = 0
    for entry in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(part, 16) for part in entry.split(maxsplit=1)[0].split("-"))
        inside = pages.address <= start < pages.address + pages.capacity
        other = "/memfd:" in entry.splitlines()[0] and end - start == pages.capacity
        if inside or other:
            flags = entry.rpartition("VmFlags:")[2].split()
            assert "dd" in flags
            assert "dc" in flags
            view += inside
            alias += other and not inside
    assert view >= 1
    assert alias >= 1


@pytest.mark.parametrize("where", ["body", "tag", "version"])
def test_a_changed_page_poisons_the_heap_and_reads_as_zeros(pages: Pages, where: str) -> None:
    array = filled(pages)
    version, tag = pages._meta(7)
    if where == "body":
        pages._cipher(7)[100] ^= 1
    elif where == "tag":
        pages._set_meta(7, version, bytes([tag[0] ^ 1]) + tag[1:])
    else:
        pages._set_meta(7, version - 1, tag)
    assert array[0] == 1  # another page is still good
    assert array[7 * WORDS] == 0
    assert "PYE_E_AUTH" in (pages.poisoned or "")
    assert array[0] == 0
    assert not array[:: WORDS // 2].any()
    for action in (pages.prefetch, pages.evict, pages.pin, pages.unpin, pages.discard):
        with pytest.raises(errors.SealingError, match="poisoned"):
            action(0, PAGE)
    with pytest.raises(ValueError, match="frame"):
        pages._cipher(7)


def test_pag_01_an_older_version_of_a_page_is_refused(pages: Pages) -> None:
    array = filled(pages)
    old, meta = bytes(pages._cipher(3)), pages._meta(3)
    array[3 * WORDS] = 99
    pages.evict()
    assert pages._meta(3)[0] > meta[0]
    pages._cipher(3)[:] = old
    assert array[3 * WORDS] == 0
    assert pages.poisoned


def test_pag_02_two_pages_cannot_change_places(pages: Pages) -> None:
    array = filled(pages)
    one, other = bytes(pages._cipher(3)), bytes(pages._cipher(4))
    pages._cipher(3)[:], pages._cipher(4)[:] = other, one
    meta = pages._meta(3), pages._meta(4)
    pages._set_meta(3, *meta[1])
    pages._set_meta(4, *meta[0])
    assert array[3 * WORDS] == 0
    assert pages.poisoned


def test_pag_03_a_page_of_another_heap_is_refused(pages: Pages, mechanism: str) -> None:
    array = filled(pages)
    with Pages(CAPACITY, RESIDENT, mechanism=mechanism) as other:
        filled(other)
        pages._cipher(3)[:] = other._cipher(3)
        pages._set_meta(3, *other._meta(3))
        assert array[3 * WORDS] == 0
        assert pages.poisoned
        assert not other.poisoned


# -- what a user does ------------------------------------------------------------------------------


def test_it_begins_as_zeros_and_keeps_what_is_written(pages: Pages) -> None:
    array = words(pages)
    assert not array.any()
    array[:] = np.arange(array.size)
    assert np.array_equal(array, np.arange(array.size, dtype=np.uint64))


def test_no_more_than_the_limit_is_ever_plaintext(pages: Pages) -> None:
    array = filled(pages)
    for _ in range(3):
        array += np.uint64(1)
    pages.prefetch(0, CAPACITY)
    stats = pages.stats()
    assert 0 < stats["resident"] <= stats["resident_peak"] <= stats["resident_limit"] == 64
    plain = sum(
        int.from_bytes(pages._cipher(page)[:8], "little") == page * WORDS + 4
        for page in range(CAPACITY // PAGE)
    )
    assert 0 < plain == stats["resident"]


def test_evicted_pages_are_ciphertext_in_their_frames(pages: Pages) -> None:
    filled(pages)
    assert pages.stats()["resident"] == 0
    for page in (0, 5, 1023):
        start = page * WORDS + 1
        assert bytes(pages._cipher(page)) != np.arange(start, start + WORDS, dtype="u8").tobytes()
        assert len(set(pages._cipher(page))) > 200


def test_every_eviction_takes_a_new_version(pages: Pages) -> None:
    array = filled(pages)
    seen = {pages._meta(page)[0] for page in range(1024)}
    for _ in range(3):
        assert array[0] == 1
        pages.evict()
        assert pages._meta(0)[0] not in seen
        seen.add(pages._meta(0)[0])


def test_a_sequence_is_read_ahead_and_random_accesses_are_not(mechanism: str) -> None:
    for step in (1, -1):
        with Pages(CAPACITY, CAPACITY, mechanism=mechanism) as pages:
            array = filled(pages)
            assert int(array[::step][::WORDS].sum()) > 0
            stats = pages.stats()
            assert stats["read_ahead"] > 900
            assert stats["read_ahead_hits"] > 700
            pages.evict()
            before = pages.stats()["faults"]
            for page in np.random.default_rng(5).permutation(512) * 2:
                array[page * WORDS]
            assert pages.stats()["faults"] - before > 450


def test_without_read_ahead_each_page_is_a_fault(mechanism: str) -> None:
    with Pages(CAPACITY, CAPACITY, mechanism=mechanism, read_ahead=1) as pages:
        array = filled(pages)
        before = pages.stats()["faults"]
        array.sum()
        assert pages.stats()["faults"] - before == 1024


def test_prefetched_pages_do_not_fault(pages: Pages) -> None:
    array = filled(pages)
    assert pages.prefetch(0, RESIDENT) == 64
    before = pages.stats()["faults"]
    assert array[: 64 * WORDS].sum() > 0
    assert pages.stats()["faults"] == before
    assert pages.prefetch(0, CAPACITY) <= 64  # what is there is not pushed out by what comes


def test_pinned_pages_stay_and_system_calls_can_use_them(pages: Pages) -> None:
    array = filled(pages)
    pages.pin(PAGE, 2 * PAGE)
    pages.pin(PAGE, PAGE)
    array.sum()
    pages.evict()
    assert pages.stats()["resident"] == pages.stats()["pinned"] == 2
    out, into = os.pipe()
    assert os.write(into, array[WORDS : WORDS + 8]) == 64
    assert os.read(out, 64) == array[WORDS : WORDS + 8].tobytes()
    with pytest.raises(errors.BusyError):
        pages.discard(0, CAPACITY)
    pages.unpin(PAGE, 2 * PAGE)
    with pytest.raises(errors.EnclaveStateError):
        pages.unpin(PAGE, 2 * PAGE)
    pages.unpin(PAGE, PAGE)
    assert pages.evict() == 2
    os.close(out)
    os.close(into)


def test_not_everything_can_be_pinned(pages: Pages) -> None:
    array = filled(pages)
    with pytest.raises(errors.SealLimitError):
        pages.pin(0, 33 * PAGE)
    assert pages.stats()["pinned"] == 0
    pages.pin(0, 32 * PAGE)
    with pytest.raises(errors.SealLimitError):
        pages.pin(40 * PAGE, PAGE)
    assert np.array_equal(array, np.arange(array.size, dtype=np.uint64) + 1)


def test_a_system_call_on_a_cold_page_fails_and_never_sees_ciphertext(pages: Pages) -> None:
    array = filled(pages)
    out, into = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(into, array[:8])
    with pytest.raises(OSError, match="Bad address"), open("/dev/zero", "rb", buffering=0) as file:
        file.readinto(array[:8])
    assert array[0] == 1
    os.close(out)
    os.close(into)


def test_discarded_pages_are_zeros_again(pages: Pages) -> None:
    array = filled(pages)
    assert array[4 * WORDS] != 0  # resident and cold ones
    pages.discard(2 * PAGE, 8 * PAGE)
    assert not array[2 * WORDS : 10 * WORDS].any()
    assert array[2 * WORDS - 1] == 2 * WORDS
    assert array[10 * WORDS] == 10 * WORDS + 1
    array[3 * WORDS] = 5
    pages.evict()
    assert array[3 * WORDS] == 5


def test_copies_from_heap_to_heap_fault_in_both(mechanism: str) -> None:
    with (
        Pages(CAPACITY, RESIDENT, mechanism=mechanism) as one,
        Pages(CAPACITY, RESIDENT, mechanism=mechanism) as other,
    ):
        a, b = filled(one), words(other)
        b[:] = a
        np.add(a, b, out=b)
        assert np.array_equal(b, 2 * (np.arange(a.size, dtype=np.uint64) + 1))


def test_several_threads_lose_no_write(mechanism: str) -> None:
    """The threads' words lie side by side in every page, and pages leave all the time."""
    threads, rounds = 4, 6
    with Pages(512 * PAGE, RESIDENT, mechanism=mechanism) as pages:
        array = words(pages)

        def work(me: int) -> None:
            for _ in range(rounds):
                array[me::threads] += np.uint64(me + 1)

        running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            pages.evict()
        for thread in running:
            thread.join()
        for me in range(threads):
            assert (array[me::threads] == rounds * (me + 1)).all()


def test_a_closed_heap_reads_as_zeros_and_keeps_its_range(pages: Pages) -> None:
    array = filled(pages)
    address = pages.address
    pages.close()
    pages.close()
    assert not array[: 100 * WORDS].any()
    array[5] = 9  # nowhere to go, and no harm
    assert pages.poisoned is None
    assert pages.address == address
    with pytest.raises(errors.EnclaveClosedError):
        pages.prefetch(0, PAGE)


def test_only_a_few_zero_pages_of_a_closed_heap_are_there_at_a_time(pages: Pages) -> None:
    array = filled(pages)
    pages.close()
    array[:] = 7  # goes through the whole range
    assert (array[: 900 * WORDS] == 0).all()


def test_a_forked_child_sees_zeros_and_the_parent_goes_on(pages: Pages) -> None:
    array = filled(pages)
    assert array[0] == 1
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ended = False
            try:
                pages.prefetch(0, PAGE)
            except errors.EnclaveStateError:
                ended = True
            status = 0 if ended and not array[: 8 * WORDS].any() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(array, np.arange(array.size, dtype=np.uint64) + 1)


def test_views_keep_the_heap_and_its_end_frees_it(mechanism: str) -> None:
    array = words(Pages(CAPACITY, RESIDENT, mechanism=mechanism))
    gc.collect()
    array[:] = 3
    assert (array == 3).all()
    del array
    for _ in range(70):  # there are 64 places
        Pages(CAPACITY, RESIDENT, mechanism=mechanism)


def test_more_heaps_than_places_are_refused(mechanism: str) -> None:
    kept: list[Pages] = []

    def fill() -> None:
        for _ in range(65):
            kept.append(Pages(CAPACITY, RESIDENT, mechanism=mechanism))

    with pytest.raises(errors.SealLimitError):
        fill()
    assert words(kept[-1])[5] == 0


def test_heaps_cannot_be_pickled(pages: Pages) -> None:
    import pickle

    with pytest.raises(TypeError):
        pickle.dumps(pages)
