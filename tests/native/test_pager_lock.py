"""Which plaintext of a heap cannot reach swap: as far as the limit goes, and reported."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyenclave._core import Pages

pytestmark = pytest.mark.no_asan  # the sanitizer makes locking do nothing

PAGE = 4096
RESIDENT = 64 * PAGE
MECHANISMS = ("userfaultfd", "mprotect")


def locked(pages: Pages, base: int | None = None) -> int:
    """Return how many pages of the range (or of one at *base*) lie in locked mappings."""
    total, size = 0, 0
    base = pages.address if base is None else base
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(found[1], 16), int(found[2], 16)
            size = end - start if 0 <= start - base < pages.capacity else 0
        elif line.startswith("VmFlags:") and " lo" in line:
            total += size // PAGE
    return total


def as_user(limit: int, work: Callable[[], bool]) -> bool:
    """Run *work* in a child without privileges that may lock *limit* bytes."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
            if os.getuid() == 0:
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def use(pages: Pages) -> bool:
    array = np.frombuffer(pages, dtype=np.uint64)
    array[:] = np.arange(array.size)
    return bool(np.array_equal(array, np.arange(array.size, dtype=np.uint64)))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_where_nothing_may_be_locked_a_heap_that_must_be_is_refused(mechanism: str) -> None:
    def work() -> bool:
        try:
            Pages(1024 * PAGE, RESIDENT, require_locked=True, mechanism=mechanism)
        except PermissionError:
            return True
        return False

    assert as_user(0, work)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_where_nothing_may_be_locked_it_is_said(mechanism: str) -> None:
    def work() -> bool:
        pages = Pages(1024 * PAGE, RESIDENT, mechanism=mechanism)
        return pages.lock == "none" and use(pages) and pages.stats()["locked"] == 0

    assert as_user(0, work)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_with_room_for_the_capacity_the_whole_view_is_locked(mechanism: str) -> None:
    def work() -> bool:
        pages = Pages(1024 * PAGE, RESIDENT, mechanism=mechanism)
        done = pages.lock == "all" and use(pages)
        return done and pages.stats()["locked"] == pages.stats()["resident"] > 0

    assert as_user(1100 * PAGE, work)


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_lock_is_of_the_frames_where_ciphertext_has_nowhere_to_go(
    mechanism: str, file: bool, tmp_path: Path
) -> None:
    """Nothing of a heap is swapped without swap: then the lock that costs less is taken."""
    swap = int(re.findall(r"SwapTotal: +(\d+)", Path("/proc/meminfo").read_text())[0])
    fd = os.open(tmp_path / "heap", os.O_RDWR | os.O_CREAT) if file else -1

    def work() -> bool:
        pages = Pages(1024 * PAGE, RESIDENT, mechanism=mechanism, fd=fd)
        if not (pages.lock == "all" and use(pages)):
            return False
        alias = np.frombuffer(pages._cipher(0), np.uint8).ctypes.data
        pages.discard(0, 8 * PAGE)  # through the mapping that is not locked
        array = np.frombuffer(pages, dtype=np.uint64)
        kept = np.arange(8 * PAGE // 8, array.size, dtype=np.uint64)
        if array[: 8 * PAGE // 8].any() or not np.array_equal(array[8 * PAGE // 8 :], kept):
            return False
        frames = mechanism == "userfaultfd" and not swap
        return (locked(pages), locked(pages, alias)) == ((0, 1024) if frames else (1024, 0))

    assert as_user(1100 * PAGE, work)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_with_room_for_the_resident_pages_each_is_locked_while_it_is_shown(mechanism: str) -> None:
    def work() -> bool:
        pages = Pages(1024 * PAGE, RESIDENT, require_locked=True, mechanism=mechanism)
        if pages.lock != "shown" or not use(pages):
            return False
        pages.evict()
        pages.pin(0, 4 * PAGE)
        shown = locked(pages)
        pages.unpin(0, 4 * PAGE)
        pages.evict()
        return shown == 4 and locked(pages) == 0 and use(pages)

    assert as_user(100 * PAGE, work)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("file", [False, True])
def test_a_program_that_locks_all_its_memory_loses_nothing(
    mechanism: str, file: bool, tmp_path: Path
) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            fd = os.open(tmp_path / "heap", os.O_RDWR | os.O_CREAT) if file else -1
            pages = Pages(256 * PAGE, RESIDENT, mechanism=mechanism, fd=fd)
            array = np.frombuffer(pages, dtype=np.uint8)
            array[::PAGE] = range(256)
            if ctypes.CDLL(None).mlockall(5) != 0:  # MCL_CURRENT | MCL_ONFAULT
                status = 77
            else:
                for _ in range(2):
                    assert (array[::PAGE] == np.arange(256)).all()
                    array[::PAGE] = range(256)
                pages.discard(0, 8 * PAGE)
                assert not array[: 8 * PAGE].any()
                assert (array[8 * PAGE :: PAGE] == np.arange(8, 256)).all()
                status = 0 if pages.poisoned is None else 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 77:
        pytest.skip("this user may not lock so much")
    assert status == 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_more_locked_pages_than_the_process_may_have_mappings_lose_nothing(mechanism: str) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 1 << 17:
        pytest.skip(f"vm.max_map_count is {most}: not filled in a test")
    if 0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] < 8 << 20:
        pytest.skip("RLIMIT_MEMLOCK is below 8 MiB")
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p

    def scattered() -> bool:
        pages = Pages(64 << 20, 6 << 20, mechanism=mechanism, require_locked=True)
        array = np.frombuffer(pages, dtype=np.uint64)
        spare = most - len(Path("/proc/self/maps").read_text().splitlines()) - 1500
        size = ctypes.c_size_t(spare * PAGE)
        start = libc.mmap(None, size, 3, 0x22, -1, ctypes.c_long(0))
        for i in range(0, spare, 2):
            libc.mprotect(ctypes.c_void_p(start + i * PAGE), ctypes.c_size_t(PAGE), 1)
        step = 2 * PAGE // 8
        array[::step] = np.arange(array.size // step)
        whole = bool((array[::step] == np.arange(array.size // step)).all())
        return whole and pages.lock == "shown" and pages.poisoned is None

    assert as_user(8 << 20, scattered)
