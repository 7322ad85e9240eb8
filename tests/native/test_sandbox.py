"""Closing a process in: what it proves from inside, single switches, kernels that lack some."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import signal
import socket
import sys
import threading

import pytest
from closing import (
    NOBODY,
    PTRACE_SEIZE,
    ROOT,
    X86,
    close_whole,
    everything,
    libc,
    spawn_and,
    succeeds,
)

from pyenclave import _native, errors
from pyenclave._core import SecretMemory
from pyenclave._ffi import ffi, lib

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

# ---- from inside ------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [None, NOBODY])
def test_a_closed_worker_proves_every_bit(in_child, uid):
    found = in_child(lambda: spawn_and(close_whole), uid=uid).result()
    abi = found.pop("landlock_abi")
    missing = {name for name, value in found.items() if not value}
    if SecretMemory(1).kind != lib.PYE_SECMEM_SECRET:
        missing.discard("secretmem")
    if abi == 0:
        missing.discard("landlock")
    assert set(found) == everything
    assert missing == set()


def test_a_process_that_is_not_closed_proves_nothing(in_child):
    def run() -> dict[str, bool | int]:
        _native._closing.sandbox.step = 2  # as if closed
        return _native.probe_inside()

    found = in_child(run).result()
    assert not any(found.values()), found


def test_a_plain_fork_proves_no_namespace(in_child):
    found = in_child(close_whole, uid=NOBODY).result()
    spaces = {"userns", "netns", "pidns", "mountns", "ipcns", "utsns", "cgroupns"}
    assert {name for name in spaces if found[name]} == set()
    assert found["seccomp"] is found["mdwe"] is found["no_capabilities"] is True


@pytest.mark.parametrize("left_out", _native.NAMESPACES)
def test_a_namespace_left_out_is_the_only_bit_missing(in_child, left_out):
    """As root, who needs no user namespace for the others."""
    if not ROOT and left_out == "user":
        pytest.skip("needs root")
    names = tuple(name for name in _native.NAMESPACES if name != left_out)
    found = in_child(lambda: spawn_and(close_whole, names=names)).result()
    missing = {name for name, value in found.items() if not value}
    missing -= {"secretmem"} if SecretMemory(1).kind != lib.PYE_SECMEM_SECRET else set()
    assert missing == {f"{left_out}ns"}


def test_capabilities_that_stay_show(in_child):
    def run() -> dict[str, bool | int]:
        _native.harden_early()
        return _native.sandbox_before_threads()

    # The user namespace gives its first process all capabilities in it.
    assert in_child(lambda: spawn_and(run)).result()["no_capabilities"] is False


def test_steps_out_of_order_are_refused(in_child):
    def run() -> list[str]:
        seen = []

        def attempt(step) -> None:
            try:
                step()
                seen.append("accepted")
            except errors.EnclaveStateError:
                seen.append("refused")

        attempt(_native.probe_inside)
        attempt(_native.sandbox_after_threads)
        attempt(_native.sandbox_before_threads)
        attempt(_native.sandbox_before_threads)
        attempt(_native.probe_inside)
        attempt(_native.sandbox_after_threads)
        attempt(_native.sandbox_after_threads)
        attempt(_native.probe_inside)
        return seen

    order = ["refused", "refused", "accepted", "refused", "refused", "accepted", "refused"]
    assert in_child(run).result() == [*order, "accepted"]


def test_PRC_08_threads_that_exist_already_stop_the_first_step(in_child):
    """They would stay outside Landlock."""

    def run() -> str:
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            _native.sandbox_before_threads()
        except errors.EnclaveStateError:
            return "refused"
        finally:
            stop.set()
            thread.join()
        return "accepted"

    assert in_child(run).result() == "refused"


def test_landlock_alone_refuses_files_network_and_signals(in_child):
    """Each works before, from the main thread and from a thread made later."""

    def tries(listener: int, abstract: bytes, other: int) -> list[str]:
        def opens() -> bool:
            os.close(os.open("/etc/hosts", os.O_RDONLY))
            return True

        def lists() -> bool:
            return bool(os.listdir("/"))

        def makes() -> bool:
            path = f"/tmp/pyenclave-landlock-{os.getpid()}"
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            os.unlink(path)
            return True

        def connects() -> bool:
            with socket.create_connection(("127.0.0.1", listener), 2):
                return True

        def binds() -> bool:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                return True

        def reaches_abstract() -> bool:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(abstract)
                return True

        def signals() -> bool:
            os.kill(other, 0)
            return True

        named = (opens, lists, makes, connects, binds, reaches_abstract, signals)
        return [attempt.__name__ for attempt in named if succeeds(attempt)]

    def run() -> list[object]:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.socket(socket.AF_UNIX) as local,
        ):
            name = f"\0pyenclave-{os.getpid()}".encode()
            local.bind(name)
            local.listen()
            arguments = (server.getsockname()[1], name, os.getppid())
            before = tries(*arguments)
            abi = _native.sandbox_before_threads()["landlock_abi"]
            later: list[str] = []
            thread = threading.Thread(target=lambda: later.extend(tries(*arguments)))
            thread.start()
            thread.join()
            return [abi, before, tries(*arguments), later]

    abi, before, after, later = in_child(run).result()
    if abi == 0:
        pytest.skip("the kernel offers no Landlock")
    names = ["opens", "lists", "makes", "connects", "binds", "reaches_abstract", "signals"]
    assert before == names
    expected = names[3:] if abi < 4 else names[5:] if abi < 6 else []
    assert after == later == expected


def test_mdwe_alone_refuses_new_executable_memory(in_child):
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    failed = ctypes.c_void_p(-1).value

    def tries() -> list[bool]:
        written = libc.mmap(None, 4096, 3, 0x22, -1, 0)
        return [
            libc.mmap(None, 4096, 7, 0x22, -1, 0) != failed,
            libc.mprotect(written, 4096, 5) == 0,
        ]

    def run() -> list[object]:
        before = tries()
        return [before, lib.pye_harden_mdwe(), tries()]

    before, status, after = in_child(run).result()
    if status == lib.PYE_E_UNSUPPORTED:
        pytest.skip("the kernel offers no MDWE")
    assert before == [True, True]
    assert after == [False, False]


def test_jit_shows_as_a_missing_bit(in_child):
    found = in_child(lambda: close_whole(jit=True)).result()
    assert found["mdwe"] is False
    assert found["seccomp"] is True


def test_losing_a_protection_shows_in_the_next_probe(in_child):
    """Dumpable could be set again by code inside if the filter let it; here it is, before."""

    def run() -> list[bool]:
        numbers = ffi.new("int[]", [317])
        _native.harden_early()
        first = _native.sandbox_before_threads()["dumpable_off"]
        assert lib.pye_seccomp_deny(numbers, 1, errno.ENOSYS) == lib.PYE_OK  # no seccomp now
        second = _native.sandbox_after_threads()
        libc.prctl(4, 1, 0, 0, 0)
        third = _native.probe_inside()
        libc.prctl(4, 0, 0, 0, 0)
        fourth = _native.probe_inside()
        return [
            first,
            second["dumpable_off"],
            second["seccomp"],
            third["dumpable_off"],
            fourth["nodump"],
        ]

    if not X86:
        pytest.skip("numbers are those of x86-64")
    # Once lost, a bit stays lost: the memory was readable meanwhile.
    assert in_child(run).result() == [True, True, False, False, False]


# ---- single switches --------------------------------------------------------------------------


def test_PRC_05_a_tracer_that_was_there_first_shows(start_child):
    ready, say = os.pipe()
    go, release = os.pipe()

    def run() -> list[object]:
        os.write(say, b"r")
        os.read(go, 1)
        traced = [_native.harden_early()["untraced"], _native.tracer()]
        return [*traced, _native.sandbox_before_threads()["untraced"]]

    child = start_child(run)
    os.read(ready, 1)
    assert libc.ptrace(PTRACE_SEIZE, child.pid, 0, 0) == 0
    os.write(release, b"g")
    assert child.wait().result() == [False, os.getpid(), False]
    for fd in (ready, say, go, release):
        os.close(fd)


def test_PRC_07_a_crash_leaves_no_core_file(in_child, tmp_path):
    def crash(harden: bool) -> None:
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        if harden:
            _native.harden_early()
        os.abort()

    hardened = in_child(crash, True)
    assert hardened.signal == signal.SIGABRT
    assert hardened.core is False
    if not in_child(crash, False).core:
        pytest.skip("this system writes no core files at all")


def test_core_limit_and_dumpable_each_show_in_the_bits(in_child):
    def run(undo) -> list[bool]:
        _native.harden_early()
        undo()
        found = _native.sandbox_before_threads()
        return [found["dumpable_off"], found["nodump"]]

    assert in_child(run, lambda: None).result() == [True, True]
    assert in_child(run, lambda: libc.prctl(4, 1, 0, 0, 0)).result() == [False, False]


def test_PRC_09_odd_signal_state_is_set_right(in_child):
    def run() -> list[object]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        _native.reset_signals()
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return [int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")]

    blocked, ignored, caught = in_child(run).result()
    expected = sum(1 << (n - 1) for n in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT))
    # The C library keeps 32 and 33 to itself.
    assert blocked == 0
    assert ignored == expected
    assert caught & ~(3 << 31) == 0


def test_PRC_13_a_file_size_limit_does_not_kill(in_child, tmp_path):
    def run(reset: bool) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        if reset:
            _native.reset_signals()
        assert lib.pye_harden_limit(resource.RLIMIT_FSIZE, 0) == lib.PYE_OK
        try:
            (tmp_path / "out").write_text("x")
        except OSError as error:
            return errno.errorcode[error.errno]
        return "written"

    assert in_child(run, False).signal == signal.SIGXFSZ
    assert in_child(run, True).result() == "EFBIG"


def test_an_impossible_limit_is_refused(in_child):
    assert in_child(lambda: lib.pye_harden_limit(9999, 0)).result() == lib.PYE_E_OS


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_dropped_capabilities_stay_dropped_for_root(in_child, tmp_path):
    """Root gives files away and regains every capability by execve; afterwards neither."""
    file = tmp_path / "file"
    file.write_bytes(b"")

    def capabilities() -> list[int]:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return [int(fields[n], 16) for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]

    def run() -> list[object]:
        before = capabilities()
        could = succeeds(lambda: os.chown(file, 0, 0) is None)
        _native.drop_capabilities()
        owner = succeeds(lambda: os.chown(file, NOBODY, NOBODY) is None)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writer, 1)
            os.execv("/bin/cat", ["cat", "/proc/self/status"])
        os.close(writer)
        text = b""
        while piece := os.read(reader, 65536):
            text += piece
        os.waitpid(pid, 0)
        executed = [
            int(line.split()[1], 16) for line in text.decode().splitlines() if line[:3] == "Cap"
        ]
        return [could, any(before), capabilities(), os.getuid(), owner, executed]

    could, had, after, uid, owner, executed = in_child(run).result()
    assert had
    assert after == [0] * 5
    assert uid == 0
    assert could is True
    assert owner is False
    assert executed == [0] * 5


def test_dropping_capabilities_twice_and_as_nobody_is_fine(in_child):
    def run() -> bool:
        _native.drop_capabilities()
        _native.drop_capabilities()
        return True

    assert in_child(run).result() is True
    assert in_child(run, uid=NOBODY).result() is True


# ---- kernels without a mechanism --------------------------------------------------------------


def without(numbers: list[int], error: int, limit: int | None = None):
    """Close in a worker on a kernel that answers *error* to the calls *numbers*."""

    def run() -> dict[str, object]:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        if numbers:
            denied = ffi.new("int[]", numbers)
            assert lib.pye_seccomp_deny(denied, len(numbers), error) == lib.PYE_OK
        found: dict[str, object] = dict(close_whole())
        found["kind"] = _native.secret_memory_kind()
        found["made later"] = SecretMemory(10).kind
        return found

    return lambda: spawn_and(run)


def missing(found: dict[str, object]) -> set[str]:
    return {name for name in everything if not found[name]}


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_PRC_10_without_memfd_secret(in_child, error):
    found = in_child(without([447], error)).result()
    assert found["kind"] == "locked"
    assert found["made later"] == lib.PYE_SECMEM_LOCKED
    assert missing(found) == {"secretmem"}


def test_PRC_10_with_little_lockable_memory(in_child):
    """memfd_secret counts against the same limit, so both fail for an ordinary user."""
    found = in_child(without([], 0, limit=0), uid=NOBODY).result()
    assert found["kind"] == "unlocked"
    assert missing(found) == {"secretmem", "locked"}


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_PRC_10_without_landlock(in_child, error):
    found = in_child(without([444], error)).result()
    assert found["landlock_abi"] == 0
    assert missing(found) - {"secretmem"} == {"landlock"}


def test_PRC_10_without_seccomp(in_child):
    if not X86:
        pytest.skip("numbers are those of x86-64")
    found = in_child(without([317], errno.ENOSYS)).result()
    assert missing(found) - {"secretmem"} == {"seccomp"}


def test_PRC_10_without_mdwe(in_child):
    """Refused by the filter afterwards, but not by the mechanism that the bit names."""
    if not X86:
        pytest.skip("numbers are those of x86-64")

    def run() -> dict[str, bool | int]:
        _native.harden_early()
        _native.sandbox_before_threads()
        assert lib.pye_seccomp_deny(ffi.new("int[]", [157]), 1, errno.EINVAL) == lib.PYE_OK
        return _native.sandbox_after_threads()

    assert in_child(run).result()["mdwe"] is False


def test_PRC_11_secret_memory_counts_as_locked(in_child):
    def run() -> list[int]:
        def locked() -> int:
            with open("/proc/self/status", encoding="ascii") as file:
                return int(dict(line.split(":", 1) for line in file)["VmLck"].split()[0])

        before = locked()
        memory = SecretMemory(1 << 20)
        held = locked() - before
        memory.close()
        return [held, locked() - before]

    assert in_child(run).result() == [1024, 0]


def test_the_lock_limit_is_read_back(in_child):
    def run() -> list[int | None]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 8192))
        return list(_native.memory_lock_limit())

    assert in_child(run).result() == [4096, 8192]
    gc.collect()
