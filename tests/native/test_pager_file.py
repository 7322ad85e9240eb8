"""Sealed memory with a file: cold pages are in it and nowhere else, and it may be hostile."""

from __future__ import annotations

import os
import tempfile
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
NUM = 512
RESIDENT = 64 * PAGE


@pytest.fixture(params=["userfaultfd", "mprotect"])
def mechanism(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as made:
        yield made.fileno()


@pytest.fixture
def pages(file: int, mechanism: str) -> Iterator[Pages]:
    with Pages(NUM * PAGE, RESIDENT, fd=file, mechanism=mechanism) as made:
        yield made


def place(page: int) -> int:
    return PAGE * (1 + page)


def numbers() -> NDArray[np.uint64]:
    return np.arange(NUM * WORDS, dtype=np.uint64) + np.uint64(1)


def filled(pages: Pages) -> NDArray[np.uint64]:
    array = np.frombuffer(pages, dtype=np.uint64)
    array[:] = numbers()
    pages.evict()
    return array


# -- the file is hostile ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 15, 16, 2047, 4080, 4095])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_changed_byte_of_the_file_poisons_the_heap(
    pages: Pages, file: int, at: int, bit: int
) -> None:
    array = filled(pages)
    old = os.pread(file, 1, place(7) + at)[0]
    os.pwrite(file, bytes([old ^ 1 << bit]), place(7) + at)
    assert array[9 * WORDS] == 9 * WORDS + 1
    assert not array[7 * WORDS : 8 * WORDS].any()
    assert "PYE_E_AUTH" in (pages.poisoned or "")
    assert array[9 * WORDS] == 0


def test_pag_01_an_older_page_of_the_file_is_refused(pages: Pages, file: int) -> None:
    array = filled(pages)
    old = os.pread(file, PAGE, place(3))
    array[3 * WORDS] += np.uint64(1)
    pages.evict()
    os.pwrite(file, old, place(3))
    assert array[3 * WORDS] == 0
    assert pages.poisoned


def test_pag_02_pages_of_the_file_cannot_change_places(pages: Pages, file: int) -> None:
    array = filled(pages)
    one, other = (os.pread(file, PAGE, place(page)) for page in (3, 4))
    os.pwrite(file, other + one, place(3))
    assert array[3 * WORDS] == 0
    assert pages.poisoned


@pytest.mark.parametrize("length", [0, 1, PAGE, place(7) + 1, place(8) - 1])
def test_pag_05_and_10_a_file_that_was_cut_short_poisons_the_heap(
    pages: Pages, file: int, length: int
) -> None:
    array = filled(pages)
    os.ftruncate(file, length)
    assert array[7 * WORDS] == 0
    assert "PYE_E_AUTH" in (pages.poisoned or "")


def test_pag_05_a_file_that_was_made_longer_is_as_it_was(pages: Pages, file: int) -> None:
    array = filled(pages)
    os.pwrite(file, b"more", place(NUM) + 1)
    assert np.array_equal(array, numbers())


def test_pag_10_nothing_of_a_window_with_a_bad_page_is_visible(file: int, mechanism: str) -> None:
    with Pages(NUM * PAGE, NUM * PAGE, fd=file, mechanism=mechanism) as pages:
        array = filled(pages)
        os.pwrite(file, b"\0" * 16, place(100))
        total = sum(int(array[page * WORDS]) for page in range(60))
        assert total == sum(page * WORDS + 1 for page in range(60))
        assert not pages.poisoned
        for page in range(60, 110):
            value = int(array[page * WORDS])
            assert value == (0 if pages.poisoned else page * WORDS + 1)
        assert pages.poisoned


@pytest.mark.parametrize("device", ["/dev/full", "/proc/self/mem"])
def test_pag_10_a_file_that_cannot_be_written_poisons_the_heap(device: str, mechanism: str) -> None:
    """ENOSPC of the one, EIO of the other."""
    fd = os.open(device, os.O_RDWR)
    try:
        with Pages(NUM * PAGE, RESIDENT, fd=fd, mechanism=mechanism) as pages:
            array = np.frombuffer(pages, dtype=np.uint64)
            array[0] = 5
            with pytest.raises(errors.SealingError, match=r"poisoned.*PYE_E_OS"):
                pages.evict()
            words = {"/dev/full": "No space left", "/proc/self/mem": "Input/output error"}
            assert words[device] in (pages.poisoned or "")
            assert array[0] == 0
    finally:
        os.close(fd)


def test_pag_10_a_file_that_cannot_be_read_poisons_the_heap(tmp_path: Path, mechanism: str) -> None:
    """EBADF: the descriptor was opened for writing only."""
    fd = os.open(tmp_path / "heap", os.O_WRONLY | os.O_CREAT)
    try:
        with Pages(NUM * PAGE, RESIDENT, fd=fd, mechanism=mechanism) as pages:
            array = np.frombuffer(pages, dtype=np.uint64)
            array[0] = 5
            pages.evict()
            assert array[0] == 0
            assert "Bad file descriptor" in (pages.poisoned or "")
    finally:
        os.close(fd)


def test_pag_10_a_file_that_changes_all_the_time_never_gives_wrong_data(
    pages: Pages, file: int
) -> None:
    array = filled(pages)
    good = [os.pread(file, PAGE, place(page)) for page in range(8)]
    stop = threading.Event()

    def tamper() -> None:
        turn = 0
        while not stop.is_set():
            page = turn % 8
            os.pwrite(file, good[page][:8] if turn % 3 else b"\xff" * 8, place(page))
            turn += 1

    thread = threading.Thread(target=tamper)
    thread.start()
    try:
        for turn in range(20_000):
            page = turn * 5 % 8
            value = int(array[page * WORDS])
            if pages.poisoned:
                break
            assert value == page * WORDS + 1
            pages.evict()
    finally:
        stop.set()
        thread.join()
    assert pages.poisoned
    assert array[0] == 0


def test_a_descriptor_that_is_none_is_refused() -> None:
    with pytest.raises(OSError, match="Errno 9"):
        Pages(NUM * PAGE, RESIDENT, fd=9999)
    with pytest.raises((ValueError, OverflowError)):
        Pages(NUM * PAGE, RESIDENT, fd=-2)


# -- what a user does ------------------------------------------------------------------------------


def test_what_was_written_comes_back(pages: Pages) -> None:
    array = filled(pages)
    assert np.array_equal(array, numbers())
    array += np.uint64(1)
    assert np.array_equal(array, numbers() + np.uint64(1))
    assert pages.stats()["resident_peak"] <= 64


def test_random_reads_and_writes_are_as_in_ordinary_memory(pages: Pages) -> None:
    array, model = filled(pages), numbers()
    random = np.random.default_rng(11)
    for where in random.integers(0, array.size, 4000):
        if where % 3:
            assert array[where] == model[where]
        else:
            array[where] += where
            model[where] += where
    assert np.array_equal(array, model)


def test_cold_pages_are_in_the_file_and_not_in_memory(pages: Pages, file: int) -> None:
    filled(pages)
    assert os.fstat(file).st_size == place(NUM)
    for page in (0, 100, NUM - 1):
        sealed = os.pread(file, PAGE, place(page))
        assert len(set(sealed)) > 200
        start = page * WORDS + 1
        assert sealed != np.arange(start, start + WORDS, dtype=np.uint64).tobytes()
        assert not any(pages._cipher(page))


def test_unchanged_pages_are_not_sealed_again(pages: Pages, file: int) -> None:
    array = filled(pages)
    before, stored = pages.stats(), os.pread(file, place(NUM), 0)
    assert np.array_equal(array, numbers())
    pages.evict()
    after = pages.stats()
    assert after["pages_out"] == before["pages_out"]
    assert after["clean_drops"] - before["clean_drops"] == NUM
    assert os.pread(file, place(NUM), 0) == stored
    array[5 * WORDS] = 1
    pages.evict()
    assert pages.stats()["pages_out"] == before["pages_out"] + 1
    assert array[5 * WORDS] == 1


def test_pages_that_were_only_read_take_no_place(pages: Pages, file: int) -> None:
    array = np.frombuffer(pages, dtype=np.uint64)
    assert not array.any()
    pages.evict()
    assert os.fstat(file).st_size == 0
    assert pages.stats()["pages_out"] == 0


def test_a_sequence_of_writes_does_not_fault_twice_a_page(pages: Pages) -> None:
    array = filled(pages)
    before = pages.stats()["faults"]
    array += np.uint64(1)
    assert pages.stats()["faults"] - before < NUM // 2


def test_discarded_pages_leave_the_file(pages: Pages, file: int) -> None:
    array = filled(pages)
    blocks = os.fstat(file).st_blocks
    pages.discard(0, 256 * PAGE)
    assert os.fstat(file).st_blocks < blocks
    assert not array[: 256 * WORDS].any()
    assert array[256 * WORDS] == 256 * WORDS + 1


def test_the_heap_has_a_descriptor_of_its_own(mechanism: str, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "heap", os.O_RDWR | os.O_CREAT)
    pages = Pages(NUM * PAGE, RESIDENT, fd=fd, mechanism=mechanism)
    os.close(fd)
    array = filled(pages)
    assert np.array_equal(array, numbers())
    pages.close()
    assert not array.any()


def test_pinned_pages_can_be_written_by_the_system(pages: Pages) -> None:
    array = filled(pages)
    assert array[0] == 1  # shown for reading
    pages.pin(0, PAGE)
    out, into = os.pipe()
    os.write(into, b"\x09" + b"\0" * 7)
    assert os.readv(out, [array[:1]]) == 8
    pages.unpin(0, PAGE)
    pages.evict()
    assert array[0] == 9
    os.close(out)
    os.close(into)


def test_several_threads_lose_no_write_to_pages_that_were_shown_for_reading(
    pages: Pages,
) -> None:
    array = np.frombuffer(pages, dtype=np.uint64)

    def work(me: int) -> None:
        for _ in range(3):
            array[me::4] += np.uint64(me + 1)

    running = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    while any(thread.is_alive() for thread in running):
        pages.evict()
    for thread in running:
        thread.join()
    for me in range(4):
        assert (array[me::4] == 3 * (me + 1)).all()
