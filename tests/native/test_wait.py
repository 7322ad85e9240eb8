"""Waiting on a word of shared memory."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time

import pytest

from pyenclave._core import futex_wait, futex_wake
from pyenclave._ffi import ffi, lib


@pytest.fixture
def shared():
    fd = os.memfd_create("ring", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    with mmap.mmap(fd, 4096) as memory:
        yield memory
    os.close(fd)


@pytest.mark.parametrize("offset", [-4, -1, 4093, 4096, 2**63 - 1])
def test_BND_01_a_word_outside_the_buffer_is_refused(shared, offset):
    with pytest.raises(ValueError, match="word"):
        futex_wait(shared, offset, 0, 1)
    with pytest.raises(ValueError, match="word"):
        futex_wake(shared, offset)


def test_a_word_that_is_not_aligned_is_refused(shared):
    with pytest.raises(ValueError, match="aligned"):
        futex_wait(shared, 2, 0, 1)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_value_beyond_32_bits_is_refused(shared, value):
    with pytest.raises(OverflowError):
        futex_wait(shared, 0, value, 1)
    with pytest.raises(OverflowError):
        futex_wait(shared, 0, 0, value)


def test_read_only_memory_is_refused():
    with pytest.raises((BufferError, TypeError)):
        futex_wait(bytes(8), 0, 0, 1)


def test_secret_memory_cannot_hold_the_word():
    """Shared futexes on it fail with EFAULT; the failure is reported, not spun on."""
    out, kind = ffi.new("void **"), ffi.new("uint32_t *")
    assert lib.pye_secmem_new(out, 4096, kind) == lib.PYE_OK
    try:
        if kind[0] != lib.PYE_SECMEM_SECRET:
            pytest.skip("the kernel offers no memfd_secret")
        assert lib.pye_wait_futex(ffi.cast("uint32_t *", out[0]), 0, 1) == lib.PYE_E_OS
    finally:
        lib.pye_secmem_free(out[0], 4096)


def test_it_times_out_when_nobody_wakes(shared):
    start = time.monotonic()
    assert futex_wait(shared, 0, 0, 30) is False
    assert time.monotonic() - start >= 0.029


def test_it_returns_at_once_when_the_word_differs(shared):
    shared[0:4] = struct.pack("<I", 0xFFFFFFFF)
    assert futex_wait(shared, 0, 0, 60_000) is True


def test_a_wake_from_another_process_ends_it(shared, start_child):
    def wake() -> None:
        time.sleep(0.05)
        shared[8:12] = struct.pack("<I", 1)
        futex_wake(shared, 8)

    child = start_child(wake)
    assert futex_wait(shared, 8, 0, 20_000) is True
    child.wait().result()


def test_a_signal_ends_it_early(shared):
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    main = threading.main_thread()
    assert threading.current_thread() is main
    timer.start()
    try:
        start = time.monotonic()
        # Either this thread was interrupted, or the timer's thread took the signal.
        futex_wait(shared, 0, 0, 20_000)
        assert time.monotonic() - start < 30
        assert seen
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, old)


def test_waking_where_nobody_waits_is_nothing(shared):
    futex_wake(shared, 0)
    lib.pye_wait_yield()
