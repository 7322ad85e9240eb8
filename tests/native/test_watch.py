"""The thread that watches words for an event loop."""

from __future__ import annotations

import os
import select

import pytest

from pyenclave._ffi import ffi, lib

COUNT = 200  # more than futex_waitv takes at once


@pytest.fixture
def event():
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def watch(event):
    made = ffi.new("pye_watch **")
    assert lib.pye_watch_new(made, COUNT, event) == 0
    yield made[0]
    lib.pye_watch_free(made[0])


def fired(event: int, seconds: float) -> bool:
    ready, _, _ = select.select([event], [], [], seconds)
    if ready:
        os.eventfd_read(event)
    return bool(ready)


def test_impossible_watches_are_refused_and_freeing_none_is_nothing(event):
    made = ffi.new("pye_watch **")
    for count in (0, lib.PYE_WATCH_MAX + 1):
        assert lib.pye_watch_new(made, count, event) == lib.PYE_E_ARGUMENT
        assert made[0] == ffi.NULL
    assert lib.pye_watch_new(made, 1, -1) == lib.PYE_E_OS
    assert made[0] == ffi.NULL
    lib.pye_watch_free(ffi.NULL)


def test_a_slot_out_of_range_is_ignored(watch, event):
    word = ffi.new("uint32_t *", 1)
    lib.pye_watch_set(watch, COUNT, word, 0)
    lib.pye_watch_kick(watch)
    assert not fired(event, 0.05)


def test_a_word_that_differs_already_is_told_at_once_and_once(watch, event):
    word = ffi.new("uint32_t *", 1)
    lib.pye_watch_set(watch, 0, word, 0)
    lib.pye_watch_kick(watch)
    assert fired(event, 5)
    lib.pye_watch_kick(watch)
    assert not fired(event, 0.15)


@pytest.mark.parametrize("woken", [True, False])
def test_a_change_is_told_even_if_nobody_wakes(watch, event, woken):
    word = ffi.new("uint32_t *", 7)
    lib.pye_watch_set(watch, 3, word, 7)
    lib.pye_watch_kick(watch)
    assert not fired(event, 0.02)
    word[0] = 8
    if woken:
        assert lib.pye_wake_futex(word) == 0
    assert fired(event, 5)


def test_more_words_than_the_kernel_takes_at_once_are_watched(watch, event):
    words = ffi.new(f"uint32_t[{COUNT}]")
    for i in range(COUNT):
        lib.pye_watch_set(watch, i, words + i, 0)
    lib.pye_watch_kick(watch)
    assert not fired(event, 0.02)
    for i in (0, COUNT // 2, COUNT - 1):
        words[i] = 1
        assert fired(event, 5)


def test_an_emptied_slot_is_not_told(watch, event):
    word = ffi.new("uint32_t *", 7)
    lib.pye_watch_set(watch, 3, word, 7)
    lib.pye_watch_set(watch, 3, ffi.NULL, 0)
    lib.pye_watch_kick(watch)
    word[0] = 8
    assert lib.pye_wake_futex(word) == 0
    assert not fired(event, 0.15)


def test_many_watches_leave_no_thread_or_descriptor(event):
    before = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        made = ffi.new("pye_watch **")
        assert lib.pye_watch_new(made, 4, event) == 0
        lib.pye_watch_free(made[0])
    assert (len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))) == before
