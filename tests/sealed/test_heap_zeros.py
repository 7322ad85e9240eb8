"""Threads that read the same page of a poisoned heap at once: each is told, once (x86-64)."""

from __future__ import annotations

import functools
import operator
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pyenclave.errors import EnclaveClosedError, SealingError
from pyenclave.sealed.heap import SealedHeap

pytestmark = [
    pytest.mark.no_asan,  # the sanitizer has handlers of its own before ours
    pytest.mark.skipif(platform.machine() != "x86_64", reason="no trap flag on this CPU"),
]
PAGE = 4096
THREADS = 5
TRIES = 20

READS: dict[str, Callable[[np.ndarray], Any]] = {
    "item": lambda a: a.item(0),
    "copy of a slice": lambda a: a[8:72].copy(),
    "copy over a page's end": lambda a: a[500:530].copy(),
    "bytes": lambda a: a[3:9].tobytes(),
    "fancy": lambda a: a[np.array([0, 600, 1200])],
    "equal": lambda a: a[:2] == 3,
}


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads switch as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def tamper(heap: SealedHeap, array: np.ndarray) -> None:
    heap.evict()
    heap._pages._cipher((array.ctypes.data - heap._pages.address) // PAGE)[100] ^= 1


def readers(array: np.ndarray, read: Callable[[np.ndarray], Any]) -> list[list[str]]:
    """Have threads read at once; return what each was told."""
    start = threading.Barrier(THREADS)
    told: list[list[str]] = [[] for _ in range(THREADS)]

    def work(mine: list[str]) -> None:
        start.wait()
        try:
            read(array)
            for _ in range(1000):  # on a busy machine the error may come late
                time.sleep(0.01)
        except (SealingError, EnclaveClosedError) as error:
            mine.append(type(error).__name__)
        try:
            for _ in range(20):
                sum(range(100))
                time.sleep(0)
        except BaseException as error:
            mine.append(f"again: {type(error).__name__}")

    threads = [threading.Thread(target=work, args=(mine,)) for mine in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.mark.parametrize("name", READS)
@pytest.mark.usefixtures("switching")
def test_every_reader_with_the_interpreter_is_told_once(name):
    for _ in range(TRIES):
        with SealedHeap("1 MiB", "256 KiB") as heap:
            array = heap.array(np.arange(4096, dtype=np.float64) + 1)
            tamper(heap, array)
            assert readers(array, READS[name]) == [["SealingError"]] * THREADS


@pytest.mark.parametrize("interval", [0.005, 1e-6])
def test_readers_of_many_pages_without_the_interpreter_are_told_once(interval):
    """
    Each comes upon a closed page: eight at most stay open (tests/native/test_heap_steps.py).

    Nothing but chance keeps the scheduler from having one follow the others' eight from the first
    page to the last, and that one is not told. So one of all may be that; twice it is no chance.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    told: list[list[str]] = []
    try:
        for _ in range(TRIES):
            with SealedHeap("1 MiB", "256 KiB") as heap:
                array = heap.array(np.arange(32 * 512, dtype=np.float64) + 1)
                tamper(heap, array)
                told += readers(array, lambda a: a.sum())
            assert all(one in (["SealingError"], []) for one in told), told
            assert told.count([]) <= 1
    finally:
        sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_every_reader_of_a_closed_heap_is_told_once():
    for _ in range(TRIES):
        with SealedHeap("1 MiB", "256 KiB") as heap:
            array = heap.array(np.arange(4096, dtype=np.float64) + 1)
            heap.close()
            told = readers(array, READS["item"])
            assert told == [["EnclaveClosedError"]] * THREADS


@pytest.mark.usefixtures("switching")
def test_who_was_told_after_a_long_loop_leaves_no_page_to_others():
    """A loop over more than is stepped through leaves a page, which goes as its thread is told."""
    with SealedHeap("64 MiB", "1 MiB") as heap:
        array = heap.array(np.ones(1 << 20))
        tamper(heap, array)
        for _ in range(3):
            with pytest.raises(SealingError):
                array.sum()
            for place in (-1, -600, 0):
                told = readers(array, lambda a, place=place: a.item(place))
                assert told == [["SealingError"]] * THREADS


def read_then_write(array: np.ndarray) -> int:
    """
    Read an element, and have the kernel read it before the next bytecode; return what it found.

    The error comes before the next bytecode, and hides all pages: so no Python code runs meanwhile.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    calls = [functools.partial(array.item, 0), functools.partial(os.write, writer, array[:8])]

    def both() -> None:
        list(map(operator.call, calls))

    with pytest.raises((SealingError, OSError)):
        both()
    os.close(writer)
    try:
        return len(os.read(reader, 64))
    finally:
        os.close(reader)


def test_who_was_told_is_stepped_as_long_as_ever():
    """Of a loop that was too long to step through nothing is left once its thread was told."""
    with SealedHeap("1 MiB", "256 KiB") as heap:
        array = heap.array(np.ones(1 << 16))
        tamper(heap, array)
        for _ in range(5):
            with pytest.raises(SealingError):
                array.tolist()  # with the GIL: more instructions than are stepped through
            assert read_then_write(array) == 0
