"""
Where the bytes of sealed files are: files, file objects, or anything with a few methods.

A store is not trusted: what it returns is authenticated, and what it does not return, or does not
write, is an error here and never a short success.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
from typing import Any, Final, Protocol

from pyenclave._locks import Lock
from pyenclave.errors import FileBusyError, UnsealError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileBusyError", "FileStore", "ObjectStore", "Store", "behind", "is_store", "read_fully"]

_LOCKS: Final = fcntl is not None
_LINUX: Final = sys.platform.startswith("linux")
_MAX_NAMED: Final = 1024  # processes looked at to name who holds a file


class Store(Protocol):
    """
    What a sealed file is kept in. Offsets and sizes are bytes.

    ``pread`` and ``pwrite`` may do less than they were asked for and return how much they did; 0
    from ``pread`` is the end. ``fsync`` returns when everything written is durable. Failures are
    ``OSError``.
    """

    def pread(self, into: memoryview, offset: int) -> int:
        """Read to *into* from *offset*; return the number of bytes."""

    def pwrite(self, data: memoryview, offset: int) -> int:
        """Write *data* at *offset*; return the number of bytes."""

    def truncate(self, size: int) -> None:
        """Make the store *size* bytes long."""

    def fsync(self) -> None:
        """Make everything written durable."""

    def size(self) -> int:
        """Return the length."""

    def lock(self, *, exclusive: bool) -> None:
        """Take the one lock of a writer or one of readers, or raise `FileBusyError`."""

    def close(self) -> None:
        """Give lock and resources back. May be called twice."""


_METHODS: Final = ("pread", "pwrite", "truncate", "fsync", "size", "lock", "close")


def is_store(value: object) -> bool:
    """Tell whether *value* has the methods of a `Store`."""
    return all(callable(getattr(value, name, None)) for name in _METHODS)


def read_fully(store: Store, into: memoryview, offset: int, what: str) -> None:
    """
    Fill *into* from *offset*.

    Raises:
        UnsealError: The store ends before.

    """
    done, size = 0, len(into)
    while done < size:
        got = store.pread(into[done:], offset + done)
        if got <= 0 or got > size - done:
            raise UnsealError(
                f"the file ends within {what}",
                expected=f"{size} bytes at {offset}",
                found=done,
                advice="It was cut off; bring the whole file.",
            )
        done += got


def write_fully(store: Store, data: memoryview, offset: int) -> None:
    """
    Write all of *data* at *offset*.

    Raises:
        OSError: The store does not take it.

    """
    done, size = 0, len(data)
    while done < size:
        put = store.pwrite(data[done:], offset + done)
        if put <= 0 or put > size - done:
            raise OSError(f"the store took {put} of {size - done} bytes")
        done += put


def _holders(device: int, inode: int) -> str:
    """Name who has the file open, as far as this user may see; locks themselves name nobody."""
    found = []
    own = os.getpid()
    with contextlib.suppress(OSError):
        for pid in sorted(filter(str.isdigit, os.listdir("/proc")), key=int)[-_MAX_NAMED:]:
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{pid}/fd"):
                    path = f"/proc/{pid}/fd/{number}"
                    try:
                        there = os.stat(path)
                    except OSError:
                        continue
                    if (there.st_dev, there.st_ino) != (device, inode):
                        continue
                    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as info:
                        if "lock:" not in info.read():
                            continue
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                        name = comm.read(64).strip()
                    found.append("this process" if int(pid) == own else f"process {pid} ({name})")
                    break
    return ", ".join(found) or "a process that this user cannot see"


class FileStore:
    """
    A file of the file system, with an open file description lock where the system has them.

    Args:
        path: Path of the file.
        write: Open for writing too.
        create: Make the file if it is not there.
        exclusive: Refuse a file that is there.
        follow: Open what a link as the last name leads to, as `open` does.

    Attributes:
        start: Where in the file the store begins: what lies before is another's.

    """

    def __init__(
        self,
        path: Any,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        follow: bool = True,
    ) -> None:
        self.path = os.fspath(path)
        self.start = 0
        flags = os.O_RDWR if write else os.O_RDONLY
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
        self.created = False
        self._fd = -1
        if create or exclusive:
            try:
                self._fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                self.created = True
            except FileExistsError:
                if exclusive:
                    raise
        if self._fd < 0:
            self._fd = os.open(self.path, flags)
        self._seek = Lock()

    if hasattr(os, "preadv"):

        def pread(self, into: memoryview, offset: int) -> int:
            """Read to *into* from *offset*; return the number of bytes."""
            return os.preadv(self._fd, [into], self.start + offset)

        def pwrite(self, data: memoryview, offset: int) -> int:
            """Write *data* at *offset*; return the number of bytes."""
            return os.pwrite(self._fd, data, self.start + offset)

    else:  # pragma: no cover - Windows

        def pread(self, into: memoryview, offset: int) -> int:
            """Read to *into* from *offset*; return the number of bytes."""
            with self._seek:
                os.lseek(self._fd, self.start + offset, os.SEEK_SET)
                data = os.read(self._fd, len(into))
            into[: len(data)] = data
            return len(data)

        def pwrite(self, data: memoryview, offset: int) -> int:
            """Write *data* at *offset*; return the number of bytes."""
            with self._seek:
                os.lseek(self._fd, self.start + offset, os.SEEK_SET)
                return os.write(self._fd, data)

    @property
    def descriptor(self) -> int:
        """The file's descriptor, for the native core; -1 when it is closed."""
        return self._fd

    def truncate(self, size: int) -> None:
        """Make the file *size* bytes long."""
        os.ftruncate(self._fd, self.start + size)

    def fsync(self) -> None:
        """Make everything written durable; of a new file its name too."""
        os.fsync(self._fd)
        if self.created and _LINUX:
            parent = os.open(
                os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY | os.O_DIRECTORY
            )
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def size(self) -> int:
        """Return the length."""
        return max(0, os.fstat(self._fd).st_size - self.start)

    def lock(self, *, exclusive: bool) -> None:
        """Take the lock of the one writer or of one of many readers."""
        if not _LOCKS:  # pragma: no cover
            return
        try:
            if _LINUX:
                kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, 0, 0, 0, 0))
            else:  # pragma: no cover
                kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
                fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            there = os.fstat(self._fd)
            raise FileBusyError(
                f"the sealed file {self.path!r} is locked",
                expected="one writer, or readers only",
                found=f"held by {_holders(there.st_dev, there.st_ino)}",
                advice="Close it there first.",
            ) from None

    def close(self) -> None:
        """Close the descriptor, which releases the lock. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<FileStore {self.path!r}>"


class ObjectStore:
    """
    A file object: read and seek, and for writing also write and truncate.

    It has no lock, and its ``flush`` stands for ``fsync``: how durable a commit is depends on it.

    Args:
        file: The object; it is not closed.
        write: It will be written.

    """

    def __init__(self, file: Any, *, write: bool = False) -> None:
        needed = ("read", "seek", *(("write", "truncate") if write else ()))
        missing = [name for name in needed if not callable(getattr(file, name, None))]
        if missing:
            raise TypeError(f"path: a path, store or file object is needed; no {missing[0]}()")
        self._file = file
        self._lock = Lock()

    def pread(self, into: memoryview, offset: int) -> int:
        """Read to *into* from *offset*; return the number of bytes."""
        with self._lock:
            self._file.seek(offset)
            if callable(getattr(self._file, "readinto", None)):
                return self._file.readinto(into) or 0
            data = self._file.read(len(into))
        if len(data) > len(into):
            raise OSError("the file object returned more than was asked for")
        into[: len(data)] = data
        return len(data)

    def pwrite(self, data: memoryview, offset: int) -> int:
        """Write *data* at *offset*; return the number of bytes."""
        with self._lock:
            self._file.seek(offset)
            return self._file.write(data) or 0

    def truncate(self, size: int) -> None:
        """Make the object *size* bytes long."""
        with self._lock:
            self._file.truncate(size)

    def fsync(self) -> None:
        """Flush the object."""
        if callable(getattr(self._file, "flush", None)):
            self._file.flush()

    def size(self) -> int:
        """Return the length."""
        with self._lock:
            return int(self._file.seek(0, io.SEEK_END) or self._file.tell())

    def lock(self, *, exclusive: bool) -> None:
        """Do nothing: a file object is one user's."""

    def close(self) -> None:
        """Leave the object open."""


class Behind:
    """
    What lies in a store behind its first bytes. Whoever makes this has the store's lock.

    Args:
        store: The whole; it is closed with this.
        start: How many bytes lie before.

    """

    def __init__(self, store: Store, start: int) -> None:
        self._store = store
        self._start = start

    def pread(self, into: memoryview, offset: int) -> int:
        """Read to *into* from *offset*; return the number of bytes."""
        return self._store.pread(into, self._start + offset)

    def pwrite(self, data: memoryview, offset: int) -> int:
        """Write *data* at *offset*; return the number of bytes."""
        return self._store.pwrite(data, self._start + offset)

    def truncate(self, size: int) -> None:
        """Make what lies behind *size* bytes long."""
        self._store.truncate(self._start + size)

    def fsync(self) -> None:
        """Make all of it durable."""
        self._store.fsync()

    def size(self) -> int:
        """Return the length of what lies behind."""
        return max(0, self._store.size() - self._start)

    def lock(self, *, exclusive: bool) -> None:
        """Nothing: whoever made this has the lock."""

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def behind(store: Store, start: int) -> Store:
    """Return what lies in *store*, which is locked, behind its first *start* bytes."""
    if isinstance(store, FileStore):
        store.start += start  # the native core goes on reading and writing its descriptor
        return store
    return Behind(store, start)
