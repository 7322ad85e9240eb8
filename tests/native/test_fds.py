"""Descriptors: which stay open, which shared memory is accepted; mappings; other processes."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import time

import pytest

from pyenclave import _native, errors
from pyenclave._ffi import lib

SHRINK, GROW, SEAL, WRITE = 2, 4, 1, 8


@pytest.fixture
def make_fd(tmp_path):
    """Make descriptors of every unfitting kind, closed at the end."""
    made = []

    def keep(fd: int) -> int:
        made.append(fd)
        return fd

    def make(kind: str, size: int = 4096, seals: int = SEAL | SHRINK | GROW) -> int:
        if kind == "memfd":
            fd = keep(os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(fd, size)
            if seals:
                import fcntl

                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return fd
        if kind == "memfd without sealing":
            fd = keep(os.memfd_create("ring", os.MFD_CLOEXEC))
            os.ftruncate(fd, size)
            return fd
        if kind == "plain file":
            fd = keep(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
            os.ftruncate(fd, size)
            return fd
        if kind == "unlinked file on tmpfs":
            path = f"/dev/shm/pyenclave-test-{os.getpid()}"
            fd = keep(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            os.unlink(path)
            os.ftruncate(fd, size)
            return fd
        if kind == "pipe":
            reader, writer = os.pipe()
            keep(writer)
            return keep(reader)
        if kind == "socket":
            left, right = socket.socketpair()
            keep(left.detach())
            return keep(right.detach())
        if kind == "folder":
            return keep(os.open(tmp_path, os.O_RDONLY))
        assert kind == "device"
        return keep(os.open("/dev/zero", os.O_RDWR))

    yield make
    for fd in made:
        os.close(fd)


@pytest.mark.parametrize(
    "kind",
    [
        "memfd without sealing",
        "plain file",
        "unlinked file on tmpfs",
        "pipe",
        "socket",
        "folder",
        "device",
    ],
)
def test_BND_19_what_is_no_sealed_memfd_is_refused(make_fd, kind):
    if kind == "unlinked file on tmpfs" and not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    with pytest.raises(errors.EnclaveStateError, match="not a sealed memfd"):
        _native.check_memfd(make_fd(kind), size=4096)


@pytest.mark.parametrize("seals", [0, SEAL, SHRINK, GROW | SEAL, SHRINK | GROW, SHRINK | SEAL])
def test_BND_19_a_missing_seal_is_refused(make_fd, seals):
    with pytest.raises(errors.EnclaveStateError, match="not a sealed memfd"):
        _native.check_memfd(make_fd("memfd", seals=seals), size=4096)


def test_BND_19_code_must_be_write_sealed(make_fd):
    ring = make_fd("memfd")
    assert _native.check_memfd(ring) == 4096
    with pytest.raises(errors.EnclaveStateError):
        _native.check_memfd(ring, seals=_native.SEALED)
    code = make_fd("memfd", seals=SEAL | SHRINK | GROW | WRITE)
    assert _native.check_memfd(code, seals=_native.SEALED) == 4096


@pytest.mark.parametrize("size", [1, 4095, 4097, 8192, 2**63])
def test_BND_19_another_size_is_refused(make_fd, size):
    with pytest.raises(errors.EnclaveStateError, match="wrong size"):
        _native.check_memfd(make_fd("memfd"), size=size)


def test_BND_19_an_empty_memfd_is_refused(make_fd):
    with pytest.raises(errors.EnclaveStateError, match="wrong size"):
        _native.check_memfd(make_fd("memfd", size=0))


def test_a_check_that_does_not_ask_for_the_shrink_seal_is_refused(make_fd):
    with pytest.raises(ValueError, match="argument"):
        _native.check_memfd(make_fd("memfd"), seals=0)


@pytest.mark.parametrize("fd", [-1, 10**6])
def test_what_is_no_descriptor_is_an_os_error(fd):
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.check_memfd(fd)


def test_BND_20_the_seal_is_what_saves_a_reader_from_sigbus(make_fd, in_child):
    """Without it a peer truncates and the reader dies; with it the truncation is refused."""

    def truncate_and_read(fd: int) -> str:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        memory = mmap.mmap(fd, 4096)
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            return f"refused, read {memory[0]}"
        return f"read {memory[0]}"

    assert in_child(truncate_and_read, make_fd("memfd", seals=0)).signal == signal.SIGBUS
    assert in_child(truncate_and_read, make_fd("memfd")).result() == "refused, read 0"


def test_PRC_09_only_the_listed_descriptors_stay_open(in_child):
    # The child's answer goes through a pipe of the harness: keep all that are there before.
    def run() -> list[list[int]]:
        old = tuple(fd for fd in range(512) if _is_open(fd))
        extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
        kept = (extra[30], -5, extra[10], extra[10], *reversed(old))
        _native.close_fds(kept)
        open_now = [fd for fd in range(512) if _is_open(fd)]
        return [sorted({fd for fd in kept if fd >= 0}), open_now]

    wanted, found = in_child(run).result()
    assert found == wanted


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_too_many_to_keep_is_refused():
    with pytest.raises(ValueError, match="argument"):
        _native.close_fds(tuple(range(257)))


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**62])
def test_a_process_number_that_cannot_be_is_refused(pid):
    with pytest.raises(ValueError, match="argument"):
        _native.pidfd_open(pid)
    with pytest.raises(ValueError, match="argument"):
        _native.process_read(pid, 0, 1)


def test_waiting_for_a_process_ends_when_it_does(start_child):
    reader, writer = os.pipe()
    child = start_child(lambda: os.read(reader, 1) and None)
    fd = _native.pidfd_open(child.pid)
    start = time.monotonic()
    assert _native.pidfd_wait(fd, 0.03) is False
    assert time.monotonic() - start >= 0.029
    _native.pidfd_kill(fd, 0)
    _native.pidfd_kill(fd, signal.SIGKILL)
    assert _native.pidfd_wait(fd, 20) is True
    assert child.wait().signal == signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        _native.pidfd_kill(fd, 0)
    assert _native.pidfd_wait(fd, 0) is True
    for end in (fd, reader, writer):
        os.close(end)


@pytest.mark.parametrize("fd", [-1, 10**6])
def test_waiting_on_what_is_no_descriptor_fails_at_once(fd):
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.pidfd_wait(fd, 60)


def test_mappings_are_those_of_the_kernel(make_fd):
    fd = make_fd("memfd", size=mmap.PAGESIZE)
    info = os.fstat(fd)
    with mmap.mmap(fd, mmap.PAGESIZE):
        found = [m for m in _native.mappings() if m.inode == info.st_ino]
        assert len(found) == 1
        assert found[0].permissions == "rw-s"
        assert found[0].end - found[0].start == mmap.PAGESIZE
        assert found[0].path.startswith("/memfd:ring")
        assert found[0].device == (os.major(info.st_dev), os.minor(info.st_dev))
    with open("/proc/self/maps", "rb") as file:
        assert abs(file.read().count(b"\n") - len(_native.mappings())) <= 3
    assert any(m.path == "[stack]" for m in _native.mappings())


def test_a_hostile_file_name_does_not_break_the_list(tmp_path):
    """Line feeds, spaces and look-alikes of a line in a name stay inside the name."""
    path = tmp_path / "a b\n0-ffffffff r-xp 00000000 00:00 7 \x85x\x1cy"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096):
        inode = os.fstat(file.fileno()).st_ino
        found = _native.mappings()
        mine = [m for m in found if m.inode == inode]
        assert len(mine) == 1
        assert mine[0].path.endswith("\\0120-ffffffff r-xp 00000000 00:00 7 \x85x\x1cy")
        assert not any(m.inode == 7 and m.start == 0 for m in found)


def test_mappings_can_be_read_through_a_descriptor_kept_open():
    fd = _native.open_mappings()
    try:
        assert _native.mappings(fd)
        assert _native.mappings(fd)
    finally:
        os.close(fd)


def test_every_bit_has_a_name_and_no_other_number_has():
    names = [lib.pye_bit_name(1 << bit) for bit in range(32)]
    known = [name for name in names if name]
    assert len(known) == 17
    assert not lib.pye_bit_name(0)
    assert not lib.pye_bit_name(3)
