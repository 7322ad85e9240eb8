"""Which mappings a zygote and a worker accept."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from pyenclave._worker.mappings import foreign_mappings

SEALED = (os.makedev(0, 1), 77)
LIBC = (os.makedev(0xFE, 0), 500)
RING = (os.makedev(0, 1), 78)
LOCKED = SimpleNamespace(sealed={SEALED}, files={LIBC: "/usr/lib/libc.so.6"}, accepted=set())


def line(rights: str, device: str, inode: int, path: str = "") -> bytes:
    return f"7f0000000000-7f0000001000 {rights} 00000000 {device} {inode}   {path}".encode()


@pytest.mark.parametrize(
    "mapping",
    [
        line("r-xp", "fe:00", 500, "/usr/lib/libc.so.6"),
        line("rw-p", "fe:00", 500, "/usr/lib/libc.so.6"),
        # An overlay may show another device than stat does; then the path decides.
        line("r-xp", "00:2a", 9, "/usr/lib/libc.so.6"),
        line("r-xp", "00:01", 77, "/memfd:pyenclave-object (deleted)"),
        line("rw-s", "00:01", 78, "/memfd:pyenclave-ring (deleted)"),
        line("rw-p", "00:00", 0),
        line("rw-p", "00:00", 0, "[heap]"),
        line("rw-p", "00:00", 0, "[stack]"),
        line("r-xp", "00:00", 0, "[vdso]"),
        line("--xp", "00:00", 0, "[vsyscall]"),
        line("rw-s", "00:01", 90, "/secretmem (deleted)"),
        line("rw-p", "00:00", 0, "[anon:libc_malloc]"),
    ],
)
def test_what_is_locked_or_sealed_or_plain_memory_is_accepted(mapping: bytes) -> None:
    """Bootstrap files, sealed memfds, data, the kernel's own."""
    assert foreign_mappings([mapping], LOCKED, data={RING}) == []


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        (line("r--p", "fe:00", 501, "/usr/lib/libevil.so"), "not in the lock"),
        (line("r--p", "fe:00", 502, "/home/user/data.bin"), "not in the lock"),
        (line("r-xp", "fe:00", 501, "/usr/lib/libc.so.6"), "not the file"),
        (line("r-xp", "fe:00", 500, "/usr/lib/libc.so.6 (deleted)"), "not in the lock"),
        (line("r-xp", "00:01", 79, "/memfd:pyenclave-object (deleted)"), "not in the lock"),
        (line("r-xs", "00:01", 78, "/memfd:pyenclave-ring (deleted)"), "executable data"),
        (line("r-xs", "00:01", 90, "/secretmem (deleted)"), "executable data"),
        (line("r-xp", "00:00", 0), "executable without a file"),
        (line("r-xp", "00:00", 0, "[heap]"), "executable without a file"),
        (line("r-xp", "00:00", 0, "[anon:x]"), "executable without a file"),
        (line("rwxp", "00:00", 0), "writable and executable"),
        (line("rwxp", "00:01", 77, "/memfd:pyenclave-object (deleted)"), "writable and exec"),
        (line("rw-s", "00:01", 95, "/dev/zero (deleted)"), "not in the lock"),
        (line("rw-s", "00:01", 96, "/SYSV00000000 (deleted)"), "not in the lock"),
        (line("r--p", "fe:00", 500, "/usr/lib/libc.so.6\\012x"), "not in the lock"),
    ],
)
def test_everything_else_is_named_with_its_reason(mapping: bytes, reason: str) -> None:
    """Files, foreign memfds, replaced files, memory made executable, shared memory."""
    (found,) = foreign_mappings([mapping], LOCKED, data={RING})
    assert reason in found


def test_code_made_at_run_time_needs_the_image_to_say_so() -> None:
    """`[runtime] jit`: executable memory without a file, and nothing else."""
    memory = line("rwxp", "00:00", 0)
    assert foreign_mappings([memory], LOCKED, jit=True) == []
    library = line("r-xp", "fe:00", 501, "/usr/lib/libevil.so")
    assert foreign_mappings([library], LOCKED, jit=True)
