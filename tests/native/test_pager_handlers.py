"""The process's fault handler: heaps' faults are served, all others go where they went before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from pyenclave._core import Pages

pytestmark = pytest.mark.no_asan  # the sanitizer has handlers of its own before ours

PAGE = 4096
WORDS = PAGE // 8


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a Python of its own, with a heap that is cold in ``array``."""
    begin = """
        import ctypes, faulthandler, os, resource, signal, sys
        import numpy as np
        from pyenclave._core import Pages
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        PAGE = 4096
        def make():
            pages = Pages(256 * PAGE, 64 * PAGE)
            array = np.frombuffer(pages, dtype=np.uint64)
            array[:] = np.arange(array.size)
            pages.evict()
            return pages, array
    """
    source = textwrap.dedent(begin) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGBUS"])
def test_a_fault_that_is_no_heaps_ends_the_process_as_ever(number: str) -> None:
    how = {
        "SIGSEGV": "ctypes.string_at(8)",
        "SIGBUS": """
import mmap, tempfile
file = tempfile.TemporaryFile(); file.truncate(PAGE)
area = mmap.mmap(file.fileno(), PAGE); file.truncate(0); area[0]
""",
    }[number]
    done = run("pages, array = make()\nassert array[5] == 5\n" + textwrap.dedent(how))
    assert done.returncode == -getattr(signal, number)


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGBUS"])
def test_a_signal_that_was_sent_ends_the_process_as_ever(number: str) -> None:
    done = run(f"pages, array = make()\nos.kill(os.getpid(), signal.{number})\nprint('on')")
    assert done.returncode == -getattr(signal, number)
    assert "on" not in done.stdout


def test_a_signal_that_was_ignored_is_ignored() -> None:
    done = run("""
        signal.signal(signal.SIGSEGV, signal.SIG_IGN)
        pages, array = make()
        os.kill(os.getpid(), signal.SIGSEGV)
        print(array[5])
    """)
    assert (done.returncode, done.stdout) == (0, "5\n")


def test_faulthandler_that_was_enabled_before_reports_real_faults_only() -> None:
    done = run("""
        faulthandler.enable()
        pages, array = make()
        assert array.sum() > 0
        print("served", file=sys.stderr, flush=True)
        ctypes.string_at(8)
    """)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith("served")
    assert done.stderr.count("Fatal Python error") == 1


def test_faulthandler_that_is_enabled_later_is_put_behind_ours_by_any_call() -> None:
    done = run("""
        pages, array = make()
        faulthandler.enable()
        pages.evict()
        assert array.sum() > 0
        print("served", file=sys.stderr, flush=True)
        ctypes.string_at(8)
    """)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith("served")
    assert done.stderr.count("Fatal Python error") == 1


def test_a_handler_of_python_is_called_for_what_is_sent() -> None:
    done = run("""
        seen = []
        signal.signal(signal.SIGBUS, lambda number, frame: seen.append(number))
        pages, array = make()
        assert array[5] == 5
        os.kill(os.getpid(), signal.SIGBUS)
        print(seen == [signal.SIGBUS], array[600])
    """)
    assert (done.returncode, done.stdout) == (0, "True 600\n")


def test_signals_that_come_meanwhile_lose_nothing() -> None:
    done = run("""
        seen = [0]
        def on(number, frame):
            seen[0] += int(array[seen[0] % array.size] == seen[0] % array.size)
        signal.signal(signal.SIGALRM, on)
        pages, array = make()
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        total = array.size * (array.size - 1) // 2
        while seen[0] < 200:
            assert array.sum() == total
            pages.evict()
        signal.setitimer(signal.ITIMER_REAL, 0)
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_mappings_of_a_child_are_left_alone() -> None:
    """In the child the range is free; what it maps there itself is its own."""
    pages = Pages(256 * PAGE, 64 * PAGE)
    array = np.frombuffer(pages, dtype=np.uint64)
    array[:] = 1
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if array[: 2 * WORDS].sum() == 0 else 2
            array[5] = 7
            status = status if array[5] == 7 else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (array == 1).all()


def test_a_child_has_none_of_the_descriptors() -> None:
    kept = set(os.listdir("/proc/self/fd"))
    pages = Pages(256 * PAGE, 64 * PAGE, mechanism="userfaultfd")
    assert len(set(os.listdir("/proc/self/fd")) - kept) >= 1
    pid = os.fork()
    if pid == 0:
        os._exit(len(set(os.listdir("/proc/self/fd")) - kept))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pages.poisoned is None
    del pages
    assert set(os.listdir("/proc/self/fd")) <= kept


def test_a_page_that_the_program_protected_itself_does_not_fault_for_ever() -> None:
    done = run("""
        pages, array = make()
        assert array[0] == 0
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(pages.address), ctypes.c_size_t(PAGE), 1) == 0
        signal.alarm(20)
        array[0] = 1
        print('on')
    """)
    assert done.returncode == (0 if "on" in done.stdout else -signal.SIGSEGV)


def test_a_frame_that_the_machine_lost_is_not_shown_again() -> None:
    done = run("""
        import threading
        pages, array = make()
        class Info(ctypes.Structure):
            _fields_ = [("signo", ctypes.c_int), ("errno", ctypes.c_int), ("code", ctypes.c_int),
                        ("address", ctypes.c_void_p), ("rest", ctypes.c_char * 104)]
        info = Info(signal.SIGBUS, 0, 4, pages.address)  # BUS_MCEERR_AR
        libc = ctypes.CDLL(None)
        number = {"x86_64": 297, "aarch64": 240}[os.uname().machine]  # rt_tgsigqueueinfo
        assert libc.syscall(number, os.getpid(), threading.get_native_id(), signal.SIGBUS,
                            ctypes.byref(info)) == 0
        assert array[1] == 1  # the kernel would have it fault again
        print('on')
    """)
    assert "on" not in done.stdout
    assert done.returncode == -signal.SIGBUS
