"""How the end of a heap reaches who touches it: any thread, with the GIL or without (design 8)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyenclave
from pyenclave import _core
from pyenclave.errors import EnclaveClosedError, EnclaveStateError, SealingError
from pyenclave.sealed.heap import SealedHeap

MiB = 1 << 20
PAGE = 4096
ROOT = Path(pyenclave.__file__).parents[1]


def tamper(heap: SealedHeap, array: np.ndarray, at: int = 0) -> None:
    """Flip a bit of the ciphertext of the page of an array that has the byte *at*."""
    heap.evict()
    heap._pages._cipher((array.ctypes.data - heap._pages.address + at) // PAGE)[100] ^= 1


@pytest.fixture
def heap() -> Iterator[SealedHeap]:
    with SealedHeap("64 MiB", "1 MiB") as made:
        yield made


@pytest.fixture
def array(heap: SealedHeap) -> np.ndarray:
    return heap.array(np.arange(MiB, dtype=np.float64))


# What reads a whole array: (name, whether the GIL is released meanwhile).
READS: dict[str, Callable[[np.ndarray], Any]] = {
    "one element": lambda a: a[0],
    "a comparison of one": lambda a: a[0] == 1,
    "a short slice": lambda a: a[:9] + 1,
    "a loop in Python": lambda a: list(a[:100]),
    "a copy of bytes": lambda a: bytes(memoryview(a[:512])),
    "sum": lambda a: a.sum(),
    "an operator": lambda a: a + 1,
    "in place": lambda a: a.__iadd__(1),
    "sort": lambda a: a.sort(),
    "matmul": lambda a: a.reshape(1024, 1024) @ np.ones(1024),
    "fancy": lambda a: a[np.arange(0, MiB, 7)],
    "copy to": lambda a: np.empty(MiB).__setitem__(slice(None), a),
}


@pytest.mark.parametrize("name", READS)
def test_the_reader_is_told_where_it_reads(heap, array, name):
    """In the very `try` block, and each time again."""
    tamper(heap, array)
    for _ in range(3):
        value: Any = "nothing yet"
        try:
            value = READS[name](array)
        except SealingError as error:
            told = str(error)
        else:
            told = f"not told, read {value}"
        assert "poisoned" in told
        assert "page" in told


def test_a_statement_without_any_call_is_told(heap, array):
    tamper(heap, array)
    value = 5
    with pytest.raises(SealingError):
        array[0]
    with pytest.raises(SealingError):
        value = array[1] + value
    assert value == 5


def test_writing_is_told_as_reading_is(heap, array):
    tamper(heap, array)
    for where in (3, slice(None)):
        told = "not told"
        try:
            array[where] = 7
            told = "went on"
        except SealingError:
            told = "told"
        assert told == "told"


def test_an_assignment_at_the_end_of_a_try_is_told_outside_of_it(heap, array):
    """As the documents say: its last bytecode is the last one of the `try`."""
    tamper(heap, array)

    def write() -> str:
        try:
            array[3] = 7
        except SealingError:
            return "told"
        return "not told"

    try:
        told = write()
    except SealingError:
        told = "told outside"
    assert told in ("told", "told outside")


def test_plaintext_of_other_pages_is_gone(heap, array):
    other = heap.array(np.full(1000, 77.0))
    tamper(heap, array)
    with heap.pin(other):
        assert other.sum() == 77_000
        with pytest.raises(SealingError):
            array.sum()
    with pytest.raises(SealingError):
        other.sum()
    found = []
    for i in range(1000):
        try:
            found.append(float(other[i]))
        except SealingError:
            found.append(0.0)
    assert not any(found)


def test_what_is_asked_of_a_poisoned_heap_is_refused_with_the_reason(heap, array):
    tamper(heap, array)
    assert heap.poisoned is None
    with pytest.raises(SealingError):
        array.sum()
    assert heap.poisoned is not None
    for use in (
        lambda: heap.empty(3),
        lambda: heap.stats,
        lambda: heap.prefetch(array),
        heap.evict,
    ):
        with pytest.raises(SealingError, match="poisoned"):
            use()


def test_readers_of_one_element_are_all_told_however_often_threads_switch():
    """The first is shown a page of zeros: it is hidden again before another has the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            with SealedHeap("1 MiB", "256 KiB") as heap:
                array = heap.array(np.arange(4096, dtype=np.float64))
                tamper(heap, array)
                over, start = threading.Event(), threading.Barrier(5)
                told: list[bool] = []

                def busy(over: threading.Event = over) -> None:
                    while not over.is_set():
                        sum(range(10))

                def read(
                    array: np.ndarray = array,
                    start: threading.Barrier = start,
                    told: list[bool] = told,
                ) -> None:
                    start.wait()
                    try:
                        array[0]
                    except SealingError:
                        told.append(True)
                    else:
                        told.append(False)

                busybody = threading.Thread(target=busy)
                threads = [threading.Thread(target=read) for _ in range(4)]
                busybody.start()
                for thread in threads:
                    thread.start()
                read()
                for thread in threads:
                    thread.join()
                over.set()
                busybody.join()
                assert told == [True] * 5
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("read", [lambda a: a.item(0), lambda a: a.sum()], ids=["call", "sum"])
def test_who_is_not_told_sees_that_the_heap_is_poisoned(read):
    """Of readers of the same few pages some get zeros and no error; ``poisoned`` says it to all."""
    for _ in range(20):
        with SealedHeap("1 MiB", "256 KiB") as heap:
            array = heap.array(np.arange(4096, dtype=np.float64) + 1)
            tamper(heap, array)
            start = threading.Barrier(4)
            wrong: list[object] = []

            def judge(
                heap: SealedHeap = heap,
                array: np.ndarray = array,
                start: threading.Barrier = start,
                wrong: list[object] = wrong,
            ) -> None:
                start.wait()
                try:
                    found = read(array)
                except SealingError:
                    return
                if heap.poisoned is None:
                    wrong.append(found)

            threads = [threading.Thread(target=judge) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []


@pytest.mark.parametrize("name", ["one element", "sum", "an operator"])
def test_other_threads_are_told_too_while_one_holds_the_interpreter(heap, array, name):
    """A thread of Python code wants the GIL all the time; main thread and workers read."""
    tamper(heap, array)
    over = threading.Event()
    told: list[str] = []

    def busy() -> None:
        while not over.is_set():
            sum(range(100))

    def read() -> None:
        try:
            READS[name](array)
        except SealingError:
            told.append("told")
        else:
            told.append("not told")

    busybody = threading.Thread(target=busy)
    threads = [threading.Thread(target=read) for _ in range(4)]
    busybody.start()
    for thread in threads:
        thread.start()
    read()
    for thread in threads:
        thread.join()
    over.set()
    busybody.join()
    assert told == ["told"] * 5


def test_a_thread_that_does_not_touch_the_heap_is_not_told(heap, array):
    tamper(heap, array)
    finished = []
    thread = threading.Thread(target=lambda: finished.append(sum(x * x for x in range(300_000))))
    thread.start()
    with pytest.raises(SealingError):
        array.sum()
    thread.join()
    assert finished == [sum(x * x for x in range(300_000))]
    assert sum(range(1000)) == 499_500


def test_a_task_of_an_event_loop_is_told(heap, array):
    tamper(heap, array)

    async def read() -> str:
        try:
            array.sum()
        except SealingError:
            return "told"
        return "not told"

    async def both() -> list[Any]:
        return await asyncio.gather(
            read(), asyncio.to_thread(lambda: array[0]), return_exceptions=True
        )

    first, second = asyncio.run(both())
    assert first == "told"
    assert isinstance(second, SealingError)


def test_a_debugger_keeps_its_trace_function(heap, array):
    """`sys.settrace` (pdb, coverage): the error comes, and the function is put back."""
    tamper(heap, array)
    events: list[str] = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        events.append(event)
        return trace

    def read() -> str:
        try:
            array[0]
        except SealingError:
            return "told"
        return "not told"

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        told = [read(), read()]
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert told == ["told", "told"]
    assert after is trace
    assert events.count("return") >= 2
    assert sys.gettrace() is before


def test_a_thread_that_is_not_pythons_is_told_through_those_that_use_the_heap(heap, array):
    """strlen() as the body of a thread reads sealed memory; pthread_join waits without the GIL."""
    tamper(heap, array, at=0)
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    made = False
    try:
        with pytest.raises(SealingError):  # noqa: PT012 - anywhere in it
            made = (
                libc.pthread_create(
                    ctypes.byref(thread),
                    None,
                    ctypes.cast(libc.strlen, ctypes.c_void_p),
                    ctypes.c_void_p(array.ctypes.data),
                )
                == 0
            )
            for _ in range(1000):
                time.sleep(0.01)
    finally:
        if made or thread.value:  # nothing else keeps the heap for it
            libc.pthread_join(thread, None)


def test_after_closing_readers_are_told_that(heap, array):
    heap.close()
    for read in (lambda: array[0], array.sum, lambda: array + 1, lambda: array[5]):
        with pytest.raises(EnclaveClosedError, match="closed"):
            read()
    with pytest.raises(EnclaveClosedError):
        array.__setitem__(7, 1)


def test_two_heaps_are_told_apart(heap, array):
    with SealedHeap("8 MiB", "1 MiB") as other:
        mine = other.array(np.arange(1000))
        tamper(heap, array)
        with pytest.raises(SealingError, match="64"):
            array.sum()
        assert mine.sum() == 499_500
        other.close()
        with pytest.raises(EnclaveClosedError, match=r"8\.0 MiB"):
            mine.sum()
        with pytest.raises(SealingError, match="64"):
            array.sum()


@pytest.mark.parametrize("name", ["one element", "sum", "an operator"])
def test_a_forked_child_is_told_that_the_heap_is_its_parents(heap, array, name):
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            READS[name](array)
        except EnclaveStateError as error:
            code = 0 if "forked" in str(error) else 8
        except BaseException:
            code = 7
        try:
            heap.empty(3)
        except EnclaveStateError:
            pass
        else:
            code = 6
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert array.sum() == MiB * (MiB - 1) / 2


def run(script: str) -> subprocess.CompletedProcess[str]:
    prelude = (
        "import numpy as np, pyenclave, faulthandler, signal, sys\n"
        "heap = pyenclave.SealedHeap('64 MiB', '1 MiB')\n"
        "array = heap.array(np.arange(1 << 20))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script.replace("HEAP\n", prelude)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )


SUM = str(sum(range(1 << 20)))


def test_faulthandler_before_and_after_is_survived():
    before = run("import faulthandler; faulthandler.enable()\nHEAP\nprint(array.sum())")
    assert (before.returncode, before.stdout.strip()) == (0, SUM), before.stderr
    assert before.stderr == ""
    after = run("HEAP\nfaulthandler.enable()\nprint(array.sum()); print(array.sum())")
    assert (after.returncode, after.stdout.split()) == (0, [SUM, SUM]), after.stderr
    assert after.stderr == ""


def test_faulthandler_still_reports_what_is_no_heaps_matter():
    done = run("HEAP\nfaulthandler.enable()\nheap.evict()\nfaulthandler._sigsegv()")
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr


def test_a_blocked_signal_ends_the_process_as_the_documents_say():
    """The kernel kills whoever faults with the signal blocked: nothing wrong is read."""
    done = run(
        "HEAP\nheap.evict()\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS, "
        "signal.SIGSEGV])\nprint(array.sum())"
    )
    assert done.returncode in (-signal.SIGBUS, -signal.SIGSEGV)
    assert done.stdout == ""


def test_the_process_ends_well_with_a_poisoned_heap_and_its_guard():
    done = run(
        "HEAP\nheap.evict()\npage = (array.ctypes.data - heap._pages.address) // 4096\n"
        "heap._pages._cipher(page)[1] ^= 1\ntry:\n    array.sum()\n"
        "except pyenclave.errors.SealingError:\n    print('told')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")


def test_what_the_binding_is_given_is_checked():
    with _core.Pages(MiB, MiB) as pages:
        for wrong in ((), (SealingError,), (SealingError, EnclaveStateError, 3)):
            with pytest.raises(TypeError):
                _core.heap_errors(pages, wrong, set())
        with pytest.raises(TypeError):
            _core.heap_errors(pages, (SealingError,) * 3, [])
        with pytest.raises(TypeError):
            _core.Arena(None)
        for wrong in (3, "x", object()):
            with pytest.raises((TypeError, ValueError)):
                _core.numpy_handler(wrong)
