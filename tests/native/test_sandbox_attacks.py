"""Each attack from outside works on an open process and fails on a closed one."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
import time

import pytest
from closing import NOBODY, PTRACE_SEIZE, ROOT, close_whole, libc, succeeds

from pyenclave import _native
from pyenclave._core import SecretMemory
from pyenclave._ffi import ffi, lib

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

OTHER = 65533
CANARY = b"canary-of-the-worker"
PTRACE_INTERRUPT, PTRACE_DETACH = 0x4207, 17
SIZE = 64

# At the same address in every child of this process.
page = ctypes.create_string_buffer(b"unwritten", SIZE)


def fill_page() -> None:
    libc.prctl(4, 1, 0, 0, 0)  # changing uid made it undumpable; as after an execve
    ctypes.memmove(page, CANARY, len(CANARY))


def attack(pid: int) -> list[str]:
    """Everything that a program of the same user can try; returns what worked."""

    def read_file(name: str) -> bytes:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read(100)

    def read_memory_file() -> bool:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            file.seek(ctypes.addressof(page))
            return file.read(len(CANARY)) == CANARY

    def write_memory_file() -> bool:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
            file.seek(ctypes.addressof(page) + SIZE - 1)
            return file.write(b"\1") == 1

    def steal() -> bool:
        fd = _native.pidfd_open(pid)
        try:
            os.close(_native.pidfd_steal(fd, 0))
        finally:
            os.close(fd)
        return True

    def trace() -> bool:
        if libc.ptrace(PTRACE_SEIZE, pid, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        libc.ptrace(PTRACE_INTERRUPT, pid, 0, 0)
        os.waitpid(pid, 0x40000000)  # __WALL
        libc.ptrace(PTRACE_DETACH, pid, 0, 0)
        return True

    tries = {
        "process_vm_readv": lambda: (
            _native.process_read(pid, ctypes.addressof(page), len(CANARY)) == CANARY
        ),
        "mem": read_memory_file,
        "mem for writing": write_memory_file,
        "maps": lambda: read_file("maps"),
        "environ": lambda: read_file("environ"),
        "fd": lambda: os.readlink(f"/proc/{pid}/fd/0"),
        "list of fd": lambda: os.listdir(f"/proc/{pid}/fd"),
        "exe": lambda: os.readlink(f"/proc/{pid}/exe"),
        "pidfd_getfd": steal,
        "ptrace": trace,
    }
    return [name for name, attempt in tries.items() if succeeds(attempt)]


ALL_ATTACKS = [
    "process_vm_readv",
    "mem",
    "mem for writing",
    "maps",
    "environ",
    "fd",
    "list of fd",
    "exe",
    "pidfd_getfd",
    "ptrace",
]


def attack_without_capabilities(pid: int) -> list[str]:
    _native.drop_capabilities()
    libc.prctl(4, 1, 0, 0, 0)
    return attack(pid)


@pytest.mark.attack
def test_PRC_01_the_same_user_reads_an_open_process_and_not_a_hardened_one(start_target, in_child):
    def prepare(harden: bool) -> None:
        fill_page()
        if harden:
            _native.harden_early()

    open_target = start_target(lambda: prepare(False))
    assert in_child(attack, open_target.pid, uid=NOBODY).result() == ALL_ATTACKS
    hard_target = start_target(lambda: prepare(True))
    assert in_child(attack, hard_target.pid, uid=NOBODY).result() == []
    open_target.end()
    hard_target.end().result()


@pytest.mark.attack
@pytest.mark.skipif(not ROOT, reason="needs a second user")
def test_PRC_01_another_user_reads_neither(start_target, in_child):
    open_target = start_target(fill_page)
    assert in_child(attack, open_target.pid, uid=OTHER).result() == []
    open_target.end()


@pytest.mark.attack
@pytest.mark.skipif(not ROOT, reason="needs root")
def test_PRC_01_root_without_capabilities_is_an_ordinary_user(start_target, in_child):
    """And with them it reads everything: SECURITY.md says so."""

    def prepare(harden: bool) -> None:
        fill_page()
        if harden:
            _native.harden_early()
        _native.drop_capabilities()

    open_target = start_target(lambda: prepare(False), uid=0)
    hard_target = start_target(lambda: prepare(True), uid=0)
    assert in_child(attack_without_capabilities, open_target.pid).result() == ALL_ATTACKS
    # uid 0 owns /proc/PID/fd of every undumpable process: it sees the numbers, not what they are.
    assert in_child(attack_without_capabilities, hard_target.pid).result() in ([], ["list of fd"])
    assert "process_vm_readv" in in_child(attack, hard_target.pid).result()
    open_target.end()
    hard_target.end().result()


@pytest.mark.attack
def test_PRC_01_root_too_cannot_read_secret_memory_from_outside(start_target, in_child):
    if SecretMemory(1).kind != lib.PYE_SECMEM_SECRET:
        pytest.skip("the kernel offers no memfd_secret")
    reader, writer = os.pipe()

    def prepare() -> None:
        fill_page()
        out, kind = ffi.new("void **"), ffi.new("uint32_t *")
        assert lib.pye_secmem_new(out, 4096, kind) == lib.PYE_OK
        ctypes.memmove(int(ffi.cast("uintptr_t", out[0])), CANARY, len(CANARY))
        os.write(writer, struct.pack("<Q", int(ffi.cast("uintptr_t", out[0]))))

    target = start_target(prepare)
    (address,) = struct.unpack("<Q", os.read(reader, 8))

    def read() -> list[str]:
        found = []
        for name, at in (("ordinary", ctypes.addressof(page)), ("secret", address)):
            try:
                if _native.process_read(target.pid, at, len(CANARY)) == CANARY:
                    found.append(name)
            except OSError as error:
                found.append(errno.errorcode[error.errno])
            with open(f"/proc/{target.pid}/mem", "rb", buffering=0) as file:
                file.seek(at)
                try:
                    found.append(str(file.read(len(CANARY)) == CANARY))
                except OSError as error:
                    found.append(errno.errorcode[error.errno])
        return found

    assert in_child(read).result() == ["ordinary", "True", "EFAULT", "EIO"]
    target.end()
    os.close(reader)
    os.close(writer)


@pytest.mark.attack
def test_PRC_02_a_worker_in_its_own_user_namespace_is_unreadable_to_its_maker_s_user(in_child):
    """A.4(7): unshare without a later execve does not undo dumpable 0."""

    def run() -> list[list[str]]:
        found = []
        for harden in (False, True):
            libc.prctl(4, 1, 0, 0, 0)
            ready, say = os.pipe()
            spawned = _native.spawn()
            if spawned.pid == 0:
                fill_page()
                if harden:
                    close_whole()
                os.write(say, b"r")
                while True:
                    time.sleep(1)
            os.read(ready, 1)
            found.append(attack(spawned.pid))
            _native.pidfd_kill(spawned.pidfd, signal.SIGKILL)
            os.waitpid(spawned.pid, 0)
        return found

    unprotected, closed = in_child(run, uid=NOBODY).result()
    assert "process_vm_readv" in unprotected
    assert closed == []


def test_the_outside_probe_agrees_with_the_attacks(start_target, in_child):
    def prepare(close: bool) -> None:
        fill_page()
        if close:
            close_whole()

    open_target = start_target(lambda: prepare(False))
    found = in_child(_native.probe_outside, open_target.pid, uid=NOBODY).result()
    assert found == dict.fromkeys(found, False) | {"untraced": True}
    closed_target = start_target(lambda: prepare(True))
    found = in_child(_native.probe_outside, closed_target.pid, uid=NOBODY).result()
    # No namespaces here (a plain fork), and no secret memory is held at this moment.
    assert found == dict.fromkeys(found, True) | {"pidns": False, "locked": False}
    if ROOT:  # whoever may trace everything must not be told that it is unreadable
        assert _native.probe_outside(closed_target.pid)["dumpable_off"] is False
    open_target.end()
    closed_target.child.kill()


def test_the_outside_probe_sees_namespace_and_locked_memory(in_child):
    def run() -> dict[str, bool]:
        ready, say = os.pipe()
        spawned = _native.spawn()
        if spawned.pid == 0:
            memory = SecretMemory(4096)
            close_whole()
            os.write(say, b"r")
            while len(memory):
                time.sleep(1)
        os.read(ready, 1)
        try:
            return _native.probe_outside(spawned.pid)
        finally:
            _native.pidfd_kill(spawned.pidfd, signal.SIGKILL)

    found = in_child(run, uid=NOBODY).result()
    assert found == dict.fromkeys(found, True)


def test_the_outside_probe_of_nobody_is_an_error(in_child):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(FileNotFoundError, match="status"):
        _native.probe_outside(pid)
