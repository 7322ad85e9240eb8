"""The file that a heap with ``path`` keeps its ciphertext in (docs/formats/heap.md)."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pyenclave.errors import SealingError

__all__ = ["HEADER_SIZE", "MAGIC", "create_file", "header"]

MAGIC: Final = b"pyenclave heap\r\n"
HEADER_SIZE: Final = 4096
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<16sIIQ")  # magic, version, page size, pages


def header(capacity: int) -> bytes:
    """Return the first 4096 bytes of the file of a heap of *capacity* bytes."""
    return _FIELDS.pack(MAGIC, _VERSION, 4096, capacity // 4096).ljust(HEADER_SIZE, b"\0")


def _is_ours(fd: int) -> bool:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    start = os.pread(fd, HEADER_SIZE, 0)
    return len(start) == HEADER_SIZE and start[:16] == MAGIC


def _remove_old(path: str) -> None:
    """Remove the file of a heap that has ended; refuse any other."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SealingError(
            "the heap's file: the path is taken", found=f"{path!r}: {error.strerror}"
        ) from error
    try:
        if not _is_ours(fd):
            raise SealingError(
                "the heap's file: there is another file",
                expected="no file, or one of a heap that has ended",
                found=repr(path),
                advice="Remove it, or name another path.",
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SealingError(
                "the heap's file: a heap of a running process uses it", found=repr(path)
            ) from None
        # Between opening and locking somebody may have put another file there.
        if os.path.lexists(path) and os.path.samestat(os.fstat(fd), os.lstat(path)):
            os.unlink(path)
    finally:
        os.close(fd)


@contextmanager
def create_file(path: str | os.PathLike[str], capacity: int) -> Iterator[int]:
    """
    Make the file of a heap; the context's end removes it.

    It is created exclusively with mode 0600 and locked. A file of a heap whose process has ended is
    replaced.

    Args:
        path: Where.
        capacity: Bytes of the heap.

    Raises:
        SealingError: There is another file, or a heap that is in use.
        OSError: The file cannot be made.

    """
    name = os.fspath(path)
    _remove_old(name)
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise SealingError("the heap's file: somebody else was faster", found=repr(name)) from None
    made = os.getpid()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first = header(capacity)
        if os.pwrite(fd, first, 0) != len(first):
            raise OSError("the heap's file: its header was not written whole")
        yield fd
    finally:
        if os.getpid() == made:
            _remove_ours(fd, name)
        os.close(fd)


def _remove_ours(fd: int, name: str) -> None:
    try:
        if os.path.samestat(os.fstat(fd), os.lstat(name)):
            os.unlink(name)
    except FileNotFoundError:
        pass
