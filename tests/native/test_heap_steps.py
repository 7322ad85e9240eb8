"""Zeros are shown for one instruction: whatever that touches, and whoever else wants SIGTRAP."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from core_build import ROOT, compiler

pytestmark = [
    pytest.mark.no_asan,  # the sanitizer has handlers of its own before ours
    pytest.mark.skipif(platform.machine() != "x86_64", reason="no trap flag on this CPU"),
]
HERE = Path(__file__).resolve().parent
CPU = Path("/proc/cpuinfo")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("steps") / "heap_steps.so"
    command = [compiler(), "-O1", "-shared", "-fPIC", "-o", str(target), str(HERE / "heap_steps.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


BEGIN = """
    import ctypes, mmap, os, resource, signal, sys, threading
    from pyenclave._core import Pages
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    PAGE, NUM = 4096, 128
    lib = ctypes.CDLL(sys.argv[1])
    lib.read_words.restype = lib.straddle.restype = lib.step_by_myself.restype = ctypes.c_uint64

    def poisoned(mechanism="auto"):
        pages = Pages(NUM * PAGE, 64 * PAGE, mechanism=mechanism)
        memory = memoryview(pages).cast("B")
        for page in range(NUM):
            memory[page * PAGE] = 255
        pages.evict()
        pages._cipher(0)[100] ^= 1
        return pages

    def at(pages, offset=0):
        return ctypes.c_void_p(pages.address + offset)

    def words(pages, num, first=0):
        return lib.read_words(at(pages, first * PAGE), ctypes.c_size_t(num))

    def shown(pages):
        return lib.open_pages(at(pages), NUM)

    def in_a_thread(work):
        found = []
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join()
        return found[0]
"""


def run(library: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a Python of its own."""
    source = textwrap.dedent(BEGIN) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source, str(library)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
    )


def passes(library: Path, code: str) -> None:
    done = run(library, code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("mechanism", ["userfaultfd", "mprotect"])
def test_after_an_instruction_no_page_is_shown(library: Path, mechanism: str) -> None:
    passes(
        library,
        f"""
        pages = poisoned("{mechanism}")
        assert words(pages, 1) == 0
        assert pages.poisoned
        assert shown(pages) == 0
        assert words(pages, 1024) == 0
        assert bytes(memoryview(pages)[:100]) == bytes(100)
        memoryview(pages).cast("B")[5 * PAGE : 5 * PAGE + 3] = b"abc"
        assert shown(pages) == 0
        assert bytes(memoryview(pages)[5 * PAGE : 5 * PAGE + 3]) == bytes(3)
        assert shown(pages) == 0
    """,
    )


def test_an_instruction_may_touch_several_pages(library: Path) -> None:
    passes(
        library,
        """
        pages = poisoned()
        assert lib.straddle(at(pages, PAGE)) == 0
        assert shown(pages) == 0
        other = poisoned()
        lib.copy(at(other, 3 * PAGE), at(pages, 7 * PAGE), ctypes.c_size_t(100))
        assert words(other, 1) == 0
        lib.copy(at(pages, 4 * PAGE - 3), at(other, 9 * PAGE - 1), ctypes.c_size_t(100))
        lib.copy(at(pages, 1), at(pages, 5 * PAGE - 5), ctypes.c_size_t(10))
        assert shown(pages) == shown(other) == 0
        other.close()
        lib.copy(at(pages, 1), at(other, 5 * PAGE - 5), ctypes.c_size_t(10))
        assert shown(pages) == shown(other) == 0
    """,
    )


@pytest.mark.skipif(
    not CPU.exists() or "avx2" not in CPU.read_text("utf-8"), reason="a CPU without AVX2"
)
def test_one_instruction_gathers_from_eight_pages(library: Path) -> None:
    passes(
        library,
        """
        pages = poisoned()
        index = (ctypes.c_int32 * 8)(*(1024 * page + 1023 for page in (1, 5, 9, 2, 77, 3, 4, 0)))
        for _ in range(3):
            assert lib.gather(at(pages), index) == 0
            assert shown(pages) == 0
        index = (ctypes.c_int32 * 8)(*(1024 * page for page in range(8)))
        assert lib.gather(at(pages, 2 * PAGE - 2), index) == 0  # each in two pages
        assert shown(pages) == 0
    """,
    )


def test_a_long_loop_leaves_one_page_an_array_and_ends_soon(library: Path) -> None:
    """Each thread has instructions of its own to run so."""
    passes(
        library,
        """
        pages, other = poisoned(), poisoned()
        assert in_a_thread(lambda: (words(pages, 16 * 512), shown(pages))) == (0, 0)
        assert in_a_thread(lambda: (words(pages, 64 * 512), shown(pages))) == (0, 1)
        assert lib.open_pages(at(pages, 63 * PAGE), 1) == 1
        pages.conceal()
        assert in_a_thread(lambda: (words(pages, 16 * 512), shown(pages))) == (0, 0)

        def copies():
            words(pages, 64 * 512)
            pages.conceal()
            lib.copy(at(other), at(pages), ctypes.c_size_t(NUM * PAGE))
            return shown(pages), shown(other)

        assert in_a_thread(copies) == (1, 1)
    """,
    )


def test_a_thread_without_the_interpreter_leaves_few_pages_to_others(library: Path) -> None:
    """Whoever reads behind it comes upon one that is closed, and is told."""
    passes(
        library,
        """
        import time
        import numpy as np
        from pyenclave.errors import SealingError
        from pyenclave.sealed.heap import SealedHeap

        def left_open():
            with SealedHeap("1 MiB", "256 KiB") as heap:
                array = heap.array(np.ones(32 * 512))
                heap.evict()
                heap._pages._cipher((array.ctypes.data - heap._pages.address) // PAGE)[100] ^= 1
                left, told = ctypes.c_int(-1), False
                memory, num = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.size)
                try:
                    lib.read_and_look(memory, num, ctypes.byref(left))
                    for _ in range(3000):
                        time.sleep(0.01)
                except SealingError:
                    told = True
                assert told
                return left.value

        # Meanwhile what stays open may be hidden.
        assert max(left_open() for _ in range(4)) in range(9)
    """,
    )


def test_threads_at_once_leave_no_page(library: Path) -> None:
    passes(
        library,
        """
        pages = poisoned()
        threads = [threading.Thread(target=words, args=(pages, 4 * 512)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shown(pages) == 0
    """,
    )


def test_with_the_signal_blocked_a_page_stays(library: Path) -> None:
    """The kernel would end the process: a trap cannot wait."""
    passes(
        library,
        """
        pages = poisoned()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTRAP])
        assert words(pages, 600) == 0
        assert shown(pages) == 2
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTRAP])
        pages.conceal()
        assert words(pages, 600) == 0
        assert shown(pages) == 0
    """,
    )


@pytest.mark.parametrize(
    "action", ["signal.SIG_IGN", "signal.SIG_DFL", "lambda *_: seen.append(1)"]
)
def test_where_the_signal_is_somebody_elses_a_page_stays(library: Path, action: str) -> None:
    passes(
        library,
        f"""
        pages, seen = poisoned(), []
        signal.signal(signal.SIGTRAP, {action})
        assert words(pages, 600) == 0
        assert shown(pages) == 2
        pages.conceal()
        another = poisoned()  # puts our handler in front again
        assert words(pages, 600) == 0
        assert (shown(pages), seen) == (0, [])
    """,
    )


def test_what_is_not_ours_goes_to_the_handler_that_was_there(library: Path) -> None:
    mine = "signal.signal(signal.SIGTRAP, on)"
    for before, after in ((mine, ""), ("", f"{mine}; another = poisoned()")):
        passes(
            library,
            f"""
            seen = []
            def on(number, frame):
                seen.append(number)
            {before}
            pages = poisoned()
            {after}
            assert words(pages, 600) == 0
            assert (shown(pages), seen) == (0, [])
            lib.breakpoint_here()
            assert seen == [signal.SIGTRAP]
            os.kill(os.getpid(), signal.SIGTRAP)
            assert seen == [signal.SIGTRAP] * 2
            assert words(pages, 600) == 0
            assert (shown(pages), seen) == (0, [signal.SIGTRAP] * 2)
        """,
        )
    passes(
        library,
        """
        lib.count_traps()
        pages = poisoned()
        assert words(pages, 600) == 0
        traps, sent = (ctypes.c_uint64.in_dll(lib, name) for name in ("traps", "flags_seen"))
        assert (traps.value, sent.value) == (0, 0)
        os.kill(os.getpid(), signal.SIGTRAP)
        assert (traps.value, sent.value) == (0, 1)
    """,
    )


def test_without_a_handler_before_it_a_trap_ends_the_process(library: Path) -> None:
    for how in ("lib.breakpoint_here()", "os.kill(os.getpid(), signal.SIGTRAP)"):
        done = run(library, f"pages = poisoned()\nwords(pages, 600)\n{how}\nprint('on')")
        assert (done.returncode, done.stdout) == (-5, "")
        done = run(
            library, f"signal.signal(5, signal.SIG_IGN)\npages = poisoned()\n{how}\nprint('on')"
        )
        sent = "kill" in how
        assert (done.returncode, done.stdout) == ((0, "on\n") if sent else (-5, ""))


def test_who_steps_through_himself_has_his_own_traps_and_no_other(library: Path) -> None:
    passes(
        library,
        """
        lib.count_traps()
        plain = mmap.mmap(-1, 2 * PAGE)
        expected = lib.step_by_myself(ctypes.byref(ctypes.c_char.from_buffer(plain)))
        assert expected > 5
        pages = poisoned()
        for _ in range(3):
            assert lib.step_by_myself(at(pages)) == expected
            assert shown(pages) == 0
        assert words(pages, 600) == 0
        assert ctypes.c_uint64.in_dll(lib, "traps").value == expected
    """,
    )


def test_other_signals_come_meanwhile_and_read_too(library: Path) -> None:
    passes(
        library,
        """
        pages = poisoned()
        lib.read_in_signals(at(pages, 9 * PAGE))
        signals = ctypes.c_uint64.in_dll(lib, "signals")
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        while signals.value < 300:
            assert words(pages, 512) == 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert words(pages, 1) == 0
        assert shown(pages) <= 1
    """,
    )


@pytest.mark.parametrize("hands_on", [False, True], ids=["debugger", "strace"])
def test_under_a_tracer_nobody_is_stepped(library: Path, hands_on: bool) -> None:
    """A debugger keeps SIGTRAP to itself; the flag would stay, and it would stop for ever."""
    code = textwrap.dedent(BEGIN) + textwrap.dedent("""
        pages = poisoned()
        assert words(pages, 20 * 512) == 0
        assert shown(pages) == 8
        os._exit(42)
    """)
    tracer = textwrap.dedent("""
        import ctypes, sys
        words = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
        arguments = (ctypes.c_char_p * 5)(*(word.encode() for word in words), None)
        sys.exit(ctypes.CDLL(sys.argv[1]).trace(arguments, int(sys.argv[3])))
    """)
    done = subprocess.run(
        [sys.executable, "-c", tracer, str(library), code, str(int(hands_on))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (42, "")


def test_a_forked_child_goes_on(library: Path) -> None:
    passes(
        library,
        """
        pages = poisoned()
        assert words(pages, 600) == 0
        there = at(pages, 7 * PAGE)
        pid = os.fork()
        if pid == 0:
            good = lib.read_words(there, ctypes.c_size_t(600)) == 0
            own = poisoned()
            good = good and words(own, 600) == 0 and shown(own) == 0
            os._exit(0 if good else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert shown(pages) == 0
    """,
    )
