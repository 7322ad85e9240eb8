"""Making the worker's process: namespaces, thread ids, lifetimes, and every way of fallback."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pyenclave import _native, errors
from pyenclave._ffi import ffi, lib

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

ONE_CLONE, NO_CLONE, NO_TID_PRCTL = 0, 1, 2
libc = ctypes.CDLL(None, use_errno=True)
libc.pthread_self.restype = ctypes.c_ulong
libc.pthread_getcpuclockid.argtypes = [ctypes.c_ulong, ctypes.c_void_p]


def cached_thread_id() -> int:
    """The thread id that the C library believes in: it is part of the thread's clock id."""
    clock = ctypes.c_int()
    assert libc.pthread_getcpuclockid(libc.pthread_self(), ctypes.byref(clock)) == 0
    return ~(clock.value >> 3)


def in_worker(function, *, names=_native.NAMESPACES, flags=0):
    """Spawn in this process; return what *function* wrote there, and how the worker ended."""
    reader, writer = os.pipe()
    spawned = _native.spawn(names, flags=flags)
    if spawned.pid == 0:
        code = 1
        try:
            os.write(writer, str(function()).encode())
            code = 0
        except BaseException as error:
            os.write(writer, f"failed: {error!r}".encode())
        finally:
            os._exit(code)
    os.close(writer)
    text = b""
    while piece := os.read(reader, 4096):
        text += piece
    os.close(reader)
    assert _native.pidfd_wait(spawned.pidfd, 10)
    os.close(spawned.pidfd)
    pid, status = os.waitpid(spawned.pid, 0)
    assert pid == spawned.pid
    return {
        "text": text.decode(),
        "namespaces": list(spawned.namespaces),
        "way": spawned.way,
        "code": os.waitstatus_to_exitcode(status),
    }


def namespace_ids() -> list[int]:
    kinds = ("user", "net", "pid", "mnt", "ipc", "uts", "cgroup")
    return [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in kinds]


@pytest.mark.parametrize("names", [("users",), ("net", "")])
def test_an_unknown_namespace_is_refused(names):
    with pytest.raises(ValueError, match="not in tuple"):
        _native.spawn(names)


@pytest.mark.parametrize(("namespaces", "flags"), [(128, 0), (2**32 - 1, 0), (0, 4), (0, 2**31)])
def test_unknown_bits_are_refused(namespaces, flags):
    out = ffi.new("pye_spawned *")
    assert lib.pye_spawn_worker(out, namespaces, flags) == lib.PYE_E_ARGUMENT
    assert out.pid == 0
    assert out.pidfd == -1


def test_a_process_with_two_threads_is_refused(in_child):
    def try_it() -> str:
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            _native.spawn()
        except errors.EnclaveStateError as error:
            return str(error)
        finally:
            stop.set()
            thread.join()
        return "spawned"

    assert "PYE_E_STATE" in in_child(try_it).result()


def test_the_thread_count_sees_threads_of_c(in_child):
    def count() -> list[int]:
        seen = [_native.thread_count()]
        stop = threading.Event()
        threads = [threading.Thread(target=stop.wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        seen.append(_native.thread_count())
        stop.set()
        for thread in threads:
            thread.join()
        return seen

    assert in_child(count).result() == [1, 4]


@pytest.mark.parametrize(
    ("flags", "way"),
    [(ONE_CLONE, "clone"), (NO_TID_PRCTL, "clone"), (NO_CLONE, "double_fork")],
)
@pytest.mark.parametrize("uid", [None, 65534])
def test_the_worker_is_alone_in_all_namespaces(in_child, flags, way, uid):
    outside = namespace_ids()

    def run():
        return in_worker(lambda: [os.getpid(), *namespace_ids()], flags=flags)

    found = in_child(run, uid=uid).result()
    if found["way"] == "fork":
        pytest.skip("this kernel refuses namespaces to this user")
    assert found["code"] == 0, found
    assert found["way"] == way
    assert found["namespaces"] == list(_native.NAMESPACES)
    pid, *inside = [int(part) for part in found["text"].strip("[]").split(",")]
    assert pid == 1
    assert all(a != b for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("flags", [ONE_CLONE, NO_TID_PRCTL, NO_CLONE])
def test_the_c_library_knows_its_thread_id_in_the_worker(in_child, flags):
    def check() -> str:
        assert cached_thread_id() == threading.get_native_id(), "main thread"
        seen = []
        thread = threading.Thread(
            target=lambda: seen.append(cached_thread_id() == threading.get_native_id())
        )
        thread.start()
        thread.join()
        assert seen == [True]
        pid = os.fork()  # an ordinary fork of the worker is right too
        if pid == 0:
            os._exit(0 if cached_thread_id() == os.getpid() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return "right"

    found = in_child(lambda: in_worker(check, flags=flags)).result()
    assert found["text"] == "right"


def test_a_bare_clone_would_leave_the_thread_id_wrong(in_child):
    """The attack on ourselves that CLONE_CHILD_SETTID prevents."""
    if os.uname().machine != "x86_64":
        pytest.skip("the order of clone's arguments is that of x86-64")

    def run() -> list[int]:
        reader, writer = os.pipe()
        pid = libc.syscall(56, 17, 0, 0, 0, 0)  # clone(SIGCHLD), nothing else
        if pid == 0:
            os.write(writer, f"{cached_thread_id()} {os.getpid()}".encode())
            os._exit(0)
        os.waitpid(pid, 0)
        return [int(part) for part in os.read(reader, 100).split()]

    cached, real = in_child(run).result()
    assert cached != real


def test_a_worker_can_spawn_again(in_child):
    def again():
        return in_worker(lambda: cached_thread_id() == threading.get_native_id() == 1)["text"]

    assert in_child(lambda: in_worker(again)).result()["text"] == "True"


def test_python_runs_its_fork_hooks_on_both_sides(in_child):
    def run() -> list[str]:
        seen: list[str] = []
        os.register_at_fork(
            before=lambda: seen.append("before"),
            after_in_parent=lambda: seen.append("parent"),
            after_in_child=lambda: seen.append("child"),
        )
        inside = in_worker(lambda: " ".join(seen))["text"]
        return [inside, " ".join(seen)]

    assert in_child(run).result() == ["before child", "before parent"]


def test_python_works_in_the_worker(in_child):
    def work() -> str:
        lock = threading.Lock()
        total = []

        def add(number: int) -> None:
            with lock:
                total.append(number)

        threads = [threading.Thread(target=add, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        import decimal

        return f"{sum(total)} {decimal.Decimal(2).sqrt():.4f} {len(os.urandom(16))}"

    assert in_child(lambda: in_worker(work)).result()["text"] == "190 1.4142 16"


def test_workers_do_not_share_randomness_by_their_number(in_child):
    """Every worker is process 1: whatever is seeded by pid would repeat. os.urandom does not."""

    def run() -> list[str]:
        return [in_worker(lambda: os.urandom(16).hex())["text"] for _ in range(3)]

    assert len(set(in_child(run).result())) == 3


def test_PRC_10_without_namespaces_the_rest_is_a_plain_fork(in_child):
    """Limits of 0 in an own user namespace: what a hardened distribution does."""

    def run():
        if libc.unshare(0x10000000) != 0:
            return None
        try:
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
        except OSError:
            return None
        with_caps = in_worker(os.getpid)
        _native.drop_capabilities()
        return [with_caps, in_worker(os.getpid), in_worker(os.getpid, flags=NO_CLONE)]

    found = in_child(run).result()
    if found is None:
        pytest.skip("no user namespace to simulate the limit in")
    with_caps, without, double = found
    # Privileged in its namespace: everything but a user namespace.
    assert with_caps["namespaces"] == [name for name in _native.NAMESPACES if name != "user"]
    assert with_caps["text"] == "1"
    for plain in (without, double):
        assert plain["namespaces"] == []
        assert plain["text"].isdigit()
        assert plain["text"] != "1"
    assert without["way"] == "fork"


def test_PRC_10_without_user_namespaces_unshare_alone_is_not_called_obtained(in_child):
    def run():
        denied = ffi.new("int[]", [272 if os.uname().machine == "x86_64" else 97])  # unshare
        assert lib.pye_seccomp_deny(denied, 1, 1) == lib.PYE_OK
        return in_worker(os.getpid, flags=NO_CLONE)

    found = in_child(run).result()
    assert found["namespaces"] == []
    assert found["text"] != "1"


@pytest.mark.parametrize("flags", [ONE_CLONE, NO_CLONE])
def test_PRC_12_a_worker_does_not_outlive_its_maker(start_child, flags):
    """The same process made by os.fork does."""
    reader, writer = os.pipe()

    def make() -> None:
        spawned = _native.spawn(flags=flags)
        if spawned.pid == 0:
            time.sleep(60)
            os._exit(0)
        plain = os.fork()
        if plain == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, f"{spawned.pid} {plain}".encode())
        time.sleep(60)

    maker = start_child(make)
    worker, plain = [int(part) for part in os.read(reader, 100).split()]
    worker_fd, plain_fd = _native.pidfd_open(worker), _native.pidfd_open(plain)
    try:
        assert not _native.pidfd_wait(worker_fd, 0.05)
        os.kill(maker.pid, signal.SIGKILL)
        assert _native.pidfd_wait(worker_fd, 30.0)
        assert not _native.pidfd_wait(plain_fd, 0.1)
    finally:
        _native.pidfd_kill(plain_fd, signal.SIGKILL)
        for fd in (worker_fd, plain_fd, reader, writer):
            os.close(fd)


def test_a_parent_that_is_gone_already_is_noticed(in_child):
    """The death signal is set too late; only the descriptor tells."""

    def run() -> list[int]:
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            fd = _native.pidfd_open(os.getpid())
            if os.fork() == 0:
                while not _native.pidfd_wait(fd, 5):
                    pass
                late = lib.pye_harden_parent_death(9, fd)
                blind = lib.pye_harden_parent_death(9, -1)
                os.write(writer, f"{late} {blind}".encode())
            os._exit(0)
        os.waitpid(middle, 0)
        return [int(part) for part in os.read(reader, 100).split()]

    assert in_child(run).result() == [lib.PYE_E_PEER_LOST, lib.PYE_OK]


def test_PRC_12_the_wrong_parent_is_refused(in_child):
    def run() -> str:
        try:
            _native.harden_early(parent=os.getppid() + 1)
        except errors.EnclaveLostError as error:
            return str(error)
        return "accepted"

    assert "parent" in in_child(run).result()
    assert in_child(lambda: _native.harden_early(parent=os.getppid())["nodump"]).result() is True


def test_no_descriptor_leaks_into_either_side(in_child):
    def run() -> list[int]:
        before = len(os.listdir("/proc/self/fd"))
        counts = [before]
        for flags in (ONE_CLONE, NO_CLONE, NO_TID_PRCTL):
            reader, writer = os.pipe()
            spawned = _native.spawn(flags=flags)
            if spawned.pid == 0:
                os.write(writer, str(len(os.listdir("/proc/self/fd"))).encode())
                os._exit(0)
            os.waitpid(spawned.pid, 0)
            counts.append(int(os.read(reader, 20)) - 2)
            for fd in (spawned.pidfd, reader, writer):
                os.close(fd)
            counts.append(len(os.listdir("/proc/self/fd")))
        return counts

    assert len(set(in_child(run).result())) == 1


def test_the_pidfd_is_that_of_the_worker(in_child):
    def run() -> bool:
        spawned = _native.spawn()
        if spawned.pid == 0:
            time.sleep(60)
        with open(f"/proc/self/fdinfo/{spawned.pidfd}", encoding="ascii") as file:
            says = dict(line.split(":", 1) for line in file)
        same = int(says["Pid"]) == spawned.pid
        _native.pidfd_kill(spawned.pidfd, signal.SIGKILL)
        _, status = os.waitpid(spawned.pid, 0)
        return same and os.WTERMSIG(status) == signal.SIGKILL

    assert in_child(run).result() is True


def test_the_state_of_python_s_random_is_shared_unless_reseeded(in_child):
    """Why the worker must reseed: two children of one maker draw the same numbers... unless
    Python's own hook reseeds, which it does for the random module."""

    def run() -> list[str]:
        random.seed(1)
        return [in_worker(random.random)["text"] for _ in range(2)]

    first, second = in_child(run).result()
    assert first != second
