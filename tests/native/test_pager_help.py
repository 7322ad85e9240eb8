"""A heap's helper opens half of many pages that are brought, and changes nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from numpy.typing import NDArray

from pyenclave._core import Pages
from pyenclave.errors import BusyError, EnclaveStateError, SealingError

PAGE = 4096
WORDS = PAGE // 8
NUM = 512
RESIDENT = 256
MECHANISMS = ("userfaultfd", "mprotect")


@contextmanager
def helped(pages: Pages) -> Iterator[threading.Thread]:
    pages.hire()
    thread = threading.Thread(target=pages.help)
    thread.start()
    try:
        yield thread
    finally:
        pages.dismiss()
        thread.join(60)
        assert not thread.is_alive()


def filled(pages: Pages) -> NDArray[np.uint64]:
    """Return the heap as an array in which each word has its own number, all of it evicted."""
    array = np.frombuffer(pages, dtype=np.uint64)
    array[:] = np.arange(array.size, dtype=np.uint64) + 1
    pages.evict()
    return array


def right(array: NDArray[np.uint64]) -> bool:
    return bool(np.array_equal(array, np.arange(array.size, dtype=np.uint64) + 1))


def made(mechanism: str = "userfaultfd", **options: object) -> Pages:
    return Pages(NUM * PAGE, RESIDENT * PAGE, mechanism=mechanism, **options)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_helper_that_never_comes_takes_nothing(mechanism: str) -> None:
    # What is offered is taken back: the way of the parts, by one thread.
    with made(mechanism) as pages:
        array = filled(pages)
        pages.hire()
        for _ in range(3):
            assert pages.prefetch(0, RESIDENT * PAGE) == RESIDENT
            assert right(array)
            assert pages.evict() > 0
        assert pages.stats()["helped"] == 0
        pages.dismiss()
        pages.help()  # which was dismissed before it came


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("tree", [False, True], ids=["flat", "tree"])
def test_what_is_read_and_written_is_as_without(
    mechanism: str, stored: bool, tree: bool, tmp_path: os.PathLike[str]
) -> None:
    options: dict[str, object] = {"tree_above": 0, "tree_cache": 1} if tree else {}
    fd = os.open(os.path.join(tmp_path, "heap"), os.O_RDWR | os.O_CREAT) if stored else -1
    try:
        with made(mechanism, fd=fd, **options) as pages:
            array = filled(pages)
            with helped(pages):
                for _ in range(5):
                    assert right(array)  # by faults, in order
                    array += 1
                    array -= 1
                    pages.evict()
                    pages.prefetch(0, RESIDENT * PAGE)
            assert right(array)
            assert pages.stats()["resident_peak"] <= RESIDENT
    finally:
        if stored:
            os.close(fd)


def test_a_helper_helps() -> None:
    deadline = time.monotonic() + 120
    with made() as pages:
        array = filled(pages)
        with helped(pages):
            while not pages.stats()["helped"] and time.monotonic() < deadline:
                pages.prefetch(0, RESIDENT * PAGE)
                pages.evict()
        assert pages.stats()["helped"] > 0
        assert right(array)


def test_faults_of_several_threads_are_helped_alike() -> None:
    with made() as pages:
        array = filled(pages)
        wrong: list[int] = []

        def read(seed: int) -> None:
            source = np.random.default_rng(seed)
            for _ in range(40):
                first = int(source.integers(0, NUM - 64)) * WORDS
                part = array[first : first + 64 * WORDS]
                if not np.array_equal(part, np.arange(first + 1, first + 1 + part.size)):
                    wrong.append(first)

        with helped(pages):
            threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong


@pytest.mark.parametrize("present", [False, True], ids=["offered", "taken"])
@pytest.mark.parametrize("page", [3, RESIDENT - 3], ids=["mine", "the helper's"])
def test_a_page_that_was_changed_is_never_shown(page: int, present: bool) -> None:
    with made() as pages:
        array = filled(pages)
        pages._cipher(page)[17] ^= 1

        def ask() -> None:
            with pytest.raises(SealingError):
                pages.prefetch(0, RESIDENT * PAGE)

        if present:
            with helped(pages):
                ask()
        else:
            pages.hire()
            ask()
        assert "PYE_E_AUTH" in str(pages.poisoned)
        seen: list[int] = []
        with suppress(SealingError):
            seen.append(int(array[page * WORDS]))
        assert seen in ([], [0])


def test_a_second_helper_is_refused_until_the_first_has_gone() -> None:
    with made() as pages:
        pages.hire()
        with pytest.raises(BusyError):
            pages.hire()
        pages.dismiss()
        with pytest.raises(BusyError):
            pages.hire()
        pages.help()
        with helped(pages), pytest.raises(BusyError):
            pages.hire()
        with helped(pages):
            pass


def test_who_was_not_hired_does_not_stay() -> None:
    with made() as pages:
        pages.help()
        pages.dismiss()
        pages.help()


def test_a_heap_that_ends_leaves_its_helper_to_be_dismissed() -> None:
    with made() as pages, helped(pages) as thread:
        filled(pages)
        pages.close()
        assert thread.is_alive()


def test_a_forked_child_has_no_helper() -> None:
    with made() as pages:
        filled(pages)
        with helped(pages):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(60)
                    pages.dismiss()
                    pages.help()
                    try:
                        pages.hire()
                    except EnclaveStateError:
                        status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert pages.prefetch(0, RESIDENT * PAGE) == RESIDENT


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_pages_of_two_old_epochs_are_brought_in_one_go(mechanism: str) -> None:
    """Their keys lie at one place, one after the other."""
    half = 32
    with made(mechanism) as pages:
        array = np.frombuffer(pages, dtype=np.uint64)
        for epoch, first in ((1, 0), (2, half)):
            array[first * WORDS : (first + half) * WORDS] = epoch
            pages.evict(first * PAGE, half * PAGE)
            pages._skip((epoch << 40) + 1)
        with helped(pages):
            assert pages.prefetch(0, 2 * half * PAGE) == 2 * half
            assert array[: half * WORDS].tolist() == [1] * (half * WORDS)
            assert array[half * WORDS : 2 * half * WORDS].tolist() == [2] * (half * WORDS)
