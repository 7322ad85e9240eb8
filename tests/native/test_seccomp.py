"""The allow-list of system calls: what it refuses, what it kills, what goes on working."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time

import pytest

from pyenclave._core import SecretMemory, futex_wait, futex_wake
from pyenclave._ffi import ffi, lib

X86 = os.uname().machine == "x86_64"
pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and X86), reason="numbers are those of x86-64 Linux"
)

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# What must be refused, by class. Each fails with another errno, or works, without the filter.
DENIED = {
    "open": 2,
    "creat": 85,
    "openat": 257,
    "openat2": 437,
    "open_by_handle_at": 304,
    "name_to_handle_at": 303,
    "open_tree": 428,
    "execve": 59,
    "execveat": 322,
    "fork": 57,
    "vfork": 58,
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "process_madvise": 440,
    "process_mrelease": 448,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "pidfd_send_signal": 424,
    "kcmp": 312,
    "kill": 62,
    "tkill": 200,
    "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297,
    "socket": 41,
    "socketpair": 53,
    "connect": 42,
    "bind": 49,
    "listen": 50,
    "accept": 43,
    "accept4": 288,
    "sendmmsg": 307,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "io_setup": 206,
    "userfaultfd": 323,
    "bpf": 321,
    "perf_event_open": 298,
    "unshare": 272,
    "setns": 308,
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "fsopen": 430,
    "move_mount": 429,
    "mount_setattr": 442,
    "keyctl": 250,
    "add_key": 248,
    "request_key": 249,
    "memfd_create": 319,
    "shmget": 29,
    "shmat": 30,
    "mq_open": 240,
    "pkey_mprotect": 329,
    "pkey_alloc": 330,
    "modify_ldt": 154,
    "arch_prctl": 158,
    "personality": 135,
    "setuid": 105,
    "setresuid": 117,
    "capset": 126,
    "setgroups": 116,
    "init_module": 175,
    "finit_module": 313,
    "kexec_load": 246,
    "reboot": 169,
    "iopl": 172,
    "ioperm": 173,
    "sched_setaffinity": 203,
    "sched_setscheduler": 144,
    "setpriority": 141,
    "setrlimit": 160,
    "dup": 32,
    "dup2": 33,
    "dup3": 292,
    "pipe": 22,
    "pipe2": 293,
    "eventfd2": 290,
    "timerfd_create": 283,
    "signalfd4": 289,
    "inotify_init1": 294,
    "fanotify_init": 300,
    "splice": 275,
    "vmsplice": 278,
    "tee": 276,
    "sendfile": 40,
    "copy_file_range": 326,
    "stat": 4,
    "lstat": 6,
    "statx": 332,
    "access": 21,
    "readlink": 89,
    "getdents64": 217,
    "unlink": 87,
    "rename": 82,
    "mkdir": 83,
    "chmod": 90,
    "chown": 92,
    "utimensat": 280,
    "truncate": 76,
    "fchmod": 91,
    "chdir": 80,
    "fchdir": 81,
    "setsid": 112,
    "setpgid": 109,
    "wait4": 61,
    "seccomp": 317,
    "landlock_create_ruleset": 444,
    "landlock_restrict_self": 446,
    "mlockall": 151,
    "mincore": 27,
    "remap_file_pages": 216,
    "get_robust_list": 274,
    "set_tid_address": 218,
    "syslog": 103,
    "quotactl": 179,
    "getpgid": 121,
    "futex_waitv": 449,
    "one of the future": 1000,
}


def close_in(flags: int = 0) -> None:
    assert lib.pye_harden_no_new_privs() == lib.PYE_OK
    assert lib.pye_sandbox_seccomp(flags) == lib.PYE_OK


def call(number: int, *arguments: int) -> int:
    """0 or more: the result; below: the negated errno."""
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    return result if result >= 0 else -ctypes.get_errno()


# Arguments that let the call do nothing harmful in the run without the filter.
BAD = (-1, -1, -1, -1, -1, -1)
# These would end or change the baseline child, or wait, whatever the arguments.
NO_BASELINE = {"vfork", "fork", "reboot", "pipe", "setsid", "sched_setaffinity", "wait4", "syslog"}


def test_PRC_08_every_other_class_of_calls_is_refused(in_child):
    def try_all() -> dict[str, int]:
        return {
            name: call(number, *BAD)
            for name, number in DENIED.items()
            if name not in {"fork", "vfork"}
        }

    def closed() -> dict[str, int]:
        close_in()
        return try_all()

    found = in_child(closed).result()
    wrong = {name: result for name, result in found.items() if result != -errno.EPERM}
    assert wrong == {}


def test_PRC_08_the_same_calls_answer_otherwise_without_the_filter(in_child):
    """So that the EPERM above is the filter's. (As nobody: root's EPERMs are rarer still.)"""

    def open_try() -> dict[str, int]:
        return {
            name: call(number, *BAD) for name, number in DENIED.items() if name not in NO_BASELINE
        }

    found = in_child(open_try, uid=65534).result()
    others = {name for name, result in found.items() if result != -errno.EPERM}
    # What an ordinary user may not do at all says EPERM by itself; the rest must not.
    assert len(others) >= 80
    for name in ("openat", "execve", "socket", "ptrace", "io_uring_setup", "memfd_create", "dup"):
        assert name in others, name


def test_PRC_06_no_process_can_be_made(in_child):
    def fork_in_vain() -> list[int]:
        close_in()
        tries = [call(57), call(58), call(56, 17, 0, 0, 0, 0), call(435, 0, 0)]
        try:
            os.fork()
        except OSError as error:
            tries.append(-error.errno)
        return tries

    assert in_child(lambda: (os.fork() or os._exit(0)) > 0).result() is True
    refused = in_child(fork_in_vain).result()
    assert refused == [-errno.EPERM] * 3 + [-errno.ENOSYS, -errno.EPERM]


@pytest.mark.parametrize(
    "flags",
    [
        0x3D0F00 | 0x10000000,  # a thread with a new user namespace
        0x3D0F00 | 0x40000000,
        0x3D0F00 & ~0x10000,  # all but CLONE_THREAD
        0x3D0F00 | 0x1000,  # with a pidfd
        0x3D0F00 | 0x2000,  # traced
        0x100,
        0x10000000 | 17,
        (1 << 32) | 17,
    ],
)
def test_PRC_08_clone_makes_threads_and_nothing_else(in_child, flags):
    def clone() -> int:
        close_in()
        return call(56, flags, 0, 0, 0, 0)

    assert in_child(clone).result() == -errno.EPERM


def machine_code(code: bytes):
    """Make a function of *code*; must be done before closing."""
    memory = libc.mmap(None, 4096, 7, 0x22, -1, 0)
    ctypes.memmove(memory, code, len(code))
    return ctypes.CFUNCTYPE(ctypes.c_long)(memory)


def test_PRC_08_calls_of_another_architecture_kill(in_child):
    """int 0x80 with eax = 20: getpid of i386."""

    def use(closed: bool) -> int:
        function = machine_code(b"\xb8\x14\x00\x00\x00\xcd\x80\x48\x98\xc3")
        if closed:
            close_in()
        return function()

    without = in_child(use, False)
    if without.signal:
        pytest.skip("this kernel has no 32-bit calls")
    assert in_child(use, True).signal == signal.SIGSYS


def test_PRC_08_x32_calls_kill(in_child):
    def use(closed: bool, number: int) -> int:
        if closed:
            close_in()
        return call(number)

    for number in (0x40000000 | 39, 0x40000000 | 512, 0x7FFFFFFF, 0xFFFFFFFF):
        assert in_child(use, False, number).signal == 0
        assert in_child(use, True, number).signal == signal.SIGSYS


@pytest.mark.parametrize("way", ["mmap", "mprotect", "memfd", "remap"])
@pytest.mark.parametrize("jit", [False, True])
def test_PRC_08_executable_memory_needs_the_jit_flag(in_child, way, jit):
    def make() -> bool:
        fd = os.memfd_create("code")
        os.ftruncate(fd, 4096)
        plain = libc.mmap(None, 4096, 3, 0x22, -1, 0)
        close_in(lib.PYE_SECCOMP_JIT if jit else 0)
        failed = ctypes.c_void_p(-1).value
        if way == "mmap":
            return libc.mmap(None, 4096, 7, 0x22, -1, 0) != failed
        if way == "memfd":
            return libc.mmap(None, 4096, 5, 0x02, fd, 0) != failed
        if way == "remap":
            return libc.mmap(plain, 4096, 5, 0x32, -1, 0) != failed
        return libc.mprotect(plain, 4096, 5) == 0

    assert in_child(make).result() is jit


def test_PRC_08_every_thread_is_under_the_filter(in_child):
    def run() -> list[int]:
        go, seen = threading.Event(), []
        thread = threading.Thread(target=lambda: (go.wait(), seen.append(call(257, *BAD))))
        thread.start()
        before = call(257, *BAD)
        close_in()
        go.set()
        thread.join()
        return [before, *seen, call(257, *BAD)]

    assert in_child(run).result() == [-errno.EFAULT, -errno.EPERM, -errno.EPERM]


def test_PRC_08_signals_go_only_to_oneself(in_child):
    def run() -> list[int]:
        close_in()
        parent = os.getppid()
        return [call(234, parent, parent, 0), call(62, parent, 0), call(234, os.getpid(), -1, 0)]

    refused, killed, own = in_child(run).result()
    assert refused == killed == -errno.EPERM
    assert own == -errno.EINVAL


@pytest.mark.parametrize("request_", [0x5412, 0x5401, 0x8914, 0xC020F509])
def test_PRC_08_ioctl_is_for_blocking_mode_only(in_child, request_):
    """TIOCSTI and TCGETS, SIOCSIFFLAGS, and a device's own."""

    def run() -> list[int]:
        value = ctypes.c_int(1)
        left, _right = socket.socketpair()
        close_in()
        allowed = call(16, left.fileno(), 0x5421, ctypes.addressof(value))
        return [allowed, call(16, 0, request_, ctypes.addressof(value))]

    assert in_child(run).result() == [0, -errno.EPERM]


def test_PRC_08_limits_can_be_read_and_not_set(in_child):
    def run() -> list[int]:
        out = ctypes.create_string_buffer(16)
        at = ctypes.addressof(out)
        # A pointer whose low half is zero must not look like none.
        low_zero = libc.mmap(0x7_0000_0000, 4096, 3, 0x32, -1, 0)
        assert low_zero == 0x7_0000_0000
        close_in()
        return [
            call(302, 0, 7, 0, at),
            call(302, 0, 7, at, 0),
            call(302, 0, 7, low_zero, 0),
            call(302, os.getppid(), 7, 0, at),
        ]

    assert in_child(run).result() == [0, *[-errno.EPERM] * 3]


@pytest.mark.parametrize("option", [1, 4, 8, 22, 24, 28, 31, 33, 38, 47, 53, 65, 0x59616D61])
def test_PRC_08_prctl_changes_nothing_that_matters(in_child, option):
    def run() -> int:
        close_in()
        return call(157, option, 0, 0, 0, 0)

    assert in_child(run).result() == -errno.EPERM


@pytest.mark.parametrize("command", [0, 1024, 1026, 8, 10, 5, 1031, 1033])
def test_PRC_08_fcntl_changes_no_ownership_lock_or_seal(in_child, command):
    def run() -> int:
        close_in()
        return call(72, 0, command, 0)

    assert in_child(run).result() == -errno.EPERM


def test_python_goes_on_working(in_child):
    """What a worker does in its lanes, on descriptors and memory that it has."""

    def run() -> dict[str, object]:
        import numpy as np

        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ring = os.memfd_create("ring")
        os.ftruncate(ring, 8192)
        np.linalg.inv(np.random.default_rng(0).random((8, 8)))  # loads what is loaded lazily
        close_in()
        results: dict[str, object] = {}
        left.setblocking(False)
        left.settimeout(1)
        left.sendmsg([b"ping"], [], socket.MSG_NOSIGNAL)
        poll = select.poll()
        poll.register(right, select.POLLIN)
        results["poll"] = len(poll.poll(1000))
        results["message"] = right.recvmsg(100, socket.CMSG_SPACE(32))[0].decode()
        results["select"] = len(select.select([], [left], [], 1)[1])
        memory = mmap.mmap(ring, 8192)
        memory[0:4] = struct.pack("<I", 7)
        results["futex"] = futex_wait(memory, 0, 7, 10)
        futex_wake(memory, 0)
        results["size"] = os.fstat(ring).st_size
        with SecretMemory(10_000) as secret:
            secret.write(5, b"abc")
            results["secret"] = [secret.kind, secret.read(5, 3).decode()]
        results["random"] = len(os.urandom(32))
        big = np.random.default_rng(1).random((600, 600))
        results["matrix"] = bool(np.allclose(big @ np.linalg.inv(big), np.eye(600)))
        seen: list[int] = []
        threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results["threads"] = sorted(seen)
        start = time.monotonic()
        time.sleep(0.01)
        results["slept"] = time.monotonic() - start >= 0.01
        results["file"] = os.path.exists("/etc/passwd")
        try:
            os.close(os.open("/etc/passwd", os.O_RDONLY))
        except PermissionError:
            results["open"] = "refused"
        results["identity"] = [os.getpid() > 0, os.getuid() >= 0, bool(os.uname().sysname)]
        signal.signal(signal.SIGUSR1, lambda *_: seen.append(100))
        signal.raise_signal(signal.SIGUSR1)
        results["signal"] = seen[-1]
        return results

    found = in_child(run).result()
    kind = found.pop("secret")
    assert kind[1] == "abc"
    assert kind[0] == SecretMemory(1).kind
    assert found == {
        "poll": 1,
        "message": "ping",
        "select": 1,
        "futex": False,
        "size": 8192,
        "random": 32,
        "matrix": True,
        "threads": list(range(8)),
        "slept": True,
        "file": False,
        "open": "refused",
        "identity": [True, True, True],
        "signal": 100,
    }


def test_PRC_08_sealed_memory_needs_its_flag(in_child):
    """Without it there is no memory file, no userfaultfd, and no advice to any process."""

    def run(flags: int) -> list[bool]:
        close_in(flags)
        made = [call(323, 0x80001), call(319, address, 3), call(434, os.getpid(), 0)]
        others = [
            call(323, 0x80000),  # faults of the kernel as well
            call(319, address, 7),  # huge pages
            call(434, os.getppid(), 0),
            call(440, -1, 0, 0, 21, 0),  # MADV_PAGEOUT
        ]
        return [*(result >= 0 for result in made), *(result != -errno.EPERM for result in others)]

    name = ctypes.create_string_buffer(b"heap")
    address = ctypes.addressof(name)
    assert in_child(run, 0).result() == [False] * 7
    assert in_child(run, lib.PYE_SECCOMP_SEALED).result() == [True] * 3 + [False] * 4


def test_an_abort_still_ends_the_process(in_child):
    def run() -> None:
        close_in()
        os.abort()

    assert in_child(run).signal == signal.SIGABRT


def test_unknown_flags_are_refused_and_nothing_is_closed(in_child):
    def careful() -> list[int]:
        return [lib.pye_sandbox_seccomp(4), lib.pye_sandbox_seccomp(2**31), call(41, 1, 1, 0) > 0]

    assert in_child(careful).result() == [lib.PYE_E_ARGUMENT, lib.PYE_E_ARGUMENT, True]


def test_without_no_new_privs_an_ordinary_user_gets_no_filter(in_child):
    """And is told so, rather than left without."""

    def run() -> list[int]:
        inherited = call(157, 39, 0, 0, 0, 0)  # PR_GET_NO_NEW_PRIVS
        return [inherited, lib.pye_sandbox_seccomp(0)]

    inherited, status = in_child(run, uid=65534).result()
    if inherited:
        pytest.skip("no_new_privs is set for the whole test run")
    assert status == lib.PYE_E_DENIED


@pytest.mark.parametrize(("count", "error"), [(201, 1), (1, 0), (1, -1), (1, 4096)])
def test_impossible_denials_are_refused(count, error):
    numbers = ffi.new("int[]", [447] * count)
    assert lib.pye_seccomp_deny(numbers, count, error) == lib.PYE_E_ARGUMENT


def test_denied_calls_answer_as_asked(in_child):
    def run() -> list[int]:
        numbers = ffi.new("int[]", [447, 444])
        assert lib.pye_seccomp_deny(numbers, 2, errno.ENOSYS) == lib.PYE_OK
        return [call(447, 0), call(444, 0, 0, 1), call(446, -1, 0) != -errno.ENOSYS]

    assert in_child(run).result() == [-errno.ENOSYS, -errno.ENOSYS, True]
