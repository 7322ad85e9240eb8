"""
Compiled code kept between starts: a zygote that finds it need not compile its lock's sources.

Half of a zygote's start is compiling. What a zygote compiled it hands over (``_worker/codes.py``);
here it gets a MAC under a key of the platform's root and a place in the state directory, and the
next zygote of the same lock and mode is given it in a write-sealed memfd. ``docs/formats/state.md``
has the layout.

Nothing of it is executed unless the MAC holds, and only for the source with the very hash that it
was compiled from. Whatever is wrong with a file removes the file and nothing else: sources are
compiled as before. Who holds the root key could forge all of it, and evidence too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import mmap
import os
import re
import socket
import struct
import sys
import threading
from importlib.util import MAGIC_NUMBER
from typing import TYPE_CHECKING, Final

import pyenclave
from pyenclave._core import hmac_sha256
from pyenclave._memfd import ALL_SEALS, seal
from pyenclave.calls.channel import close_all
from pyenclave.errors import EnclaveError
from pyenclave.formats.lock import MAX_LOCK, START_FLAGS

if TYPE_CHECKING:
    from pyenclave._platform.state import State

__all__ = ["CodeCache", "binding_of"]

_MAGIC: Final = b"PYECODE\x01"
_HEADER: Final = struct.Struct("<8s32sII")  # magic, binding, size of the lock, size of the table
_MAC_SIZE: Final = 32
_MAX_CODE: Final = 64 << 20  # bytes that a zygote may hand over
_MAX_FILE: Final = _HEADER.size + MAX_LOCK + _MAX_CODE + _MAC_SIZE
_MAX_TOTAL: Final = 256 << 20  # bytes of all files
_MAX_FILES: Final = 8
_WRITING_SECONDS: Final = 5.0  # how long closing waits for a file that is being written
_MAX_STORED: Final = 2  # times that one zygote hands over: what it imported, and all
_NAME: Final = re.compile(r"code-[0-9a-f]{16}")


def binding_of(table: bytes, *, debug: bool) -> bytes:
    """
    Return what compiled code is bound to besides its lock.

    Args:
        table: The lock with this machine's paths.
        debug: Whether the zygote serves debug enclaves.

    """
    parts = (
        b"pyenclave compiled code 1",
        pyenclave.__version__.encode(),
        sys.version.encode(),
        MAGIC_NUMBER,
        "\0".join(START_FLAGS).encode(),
        bytes([debug]),
        table,
    )
    joined = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hashlib.sha256(joined).digest()


class CodeCache:
    """
    The compiled code in a state directory. Any thread may use it.

    Args:
        state: A directory that can be written.
        key: 32 bytes, derived from a root that is kept.
        runtime: Names the platform's runtime; others do not share files with it.

    """

    def __init__(self, state: State, key: bytes, runtime: str) -> None:
        self._state = state
        self._key = key
        self._runtime = runtime
        self._lock = threading.Lock()
        self._found: dict[str, int] = {}  # by name: memfds that were read for their lock
        self._written = threading.Condition()  # guards the two below
        self._writers = 0
        self._closed = False

    def _name(self, digest: bytes, *, debug: bool) -> str:
        whole = self._runtime.encode() + bytes([debug]) + digest
        return f"code-{hashlib.sha256(whole).hexdigest()[:16]}"

    # ---- reading ------------------------------------------------------------------------------

    def lock_of(self, digest: bytes, *, debug: bool) -> bytes | None:
        """Return the lock with this digest if its code is here."""
        name = self._name(digest, debug=debug)
        fd = self._read(name)
        if fd is None:
            return None
        size = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))[2]
        lock = os.pread(fd, size, _HEADER.size)
        if hashlib.sha256(lock).digest() != digest:
            os.close(fd)
            return None
        with self._lock:
            held, self._found[name] = self._found.get(name, -1), fd
        if held >= 0:
            os.close(held)
        return lock

    def load(self, digest: bytes, *, debug: bool, binding: bytes) -> int:
        """
        Return the code of a lock, for a zygote.

        Args:
            digest: The lock's.
            debug: Whether the zygote serves debug enclaves.
            binding: From :func:`binding_of`.

        Returns:
            Descriptor of a write-sealed memfd whose MAC was checked, the caller's; -1: none.

        """
        name = self._name(digest, debug=debug)
        with self._lock:
            fd = self._found.pop(name, None)
        if fd is None:
            fd = self._read(name)
        if fd is None:
            return -1
        if _HEADER.unpack(os.pread(fd, _HEADER.size, 0))[1] != binding:
            os.close(fd)
            self._state.unlink(name)
            return -1
        return fd

    def _read(self, name: str) -> int | None:
        """Return a sealed copy of a file, or None; one that is not as it must be is removed."""
        try:
            file = self._state.open_file(name, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except (PermissionError, EnclaveError):
            self._state.unlink(name)
            return None
        except OSError:
            return None
        try:
            fd = os.memfd_create("pyenclave-code", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            os.close(file)
            return None
        good = False
        try:
            good = self._copy(file, fd)
            if good:
                os.utime(file)  # when it was used last
        except OSError:
            pass
        finally:
            os.close(file)
            if not good:
                os.close(fd)
                self._state.unlink(name)
        return fd if good else None

    def _copy(self, file: int, fd: int) -> bool:
        """Copy the file, seal the copy, and only then check it."""
        size = os.fstat(file).st_size
        if not _HEADER.size + _MAC_SIZE <= size <= _MAX_FILE:
            return False
        left = size
        while left and (sent := os.sendfile(fd, file, None, left)):
            left -= sent
        seal(fd)
        if left:
            return False
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
            with data[:-_MAC_SIZE] as body:
                mac = hmac_sha256(self._key, body)
            if not hmac.compare_digest(mac, bytes(data[-_MAC_SIZE:])):
                return False
            magic, _, lock_size, table_size = _HEADER.unpack(data[: _HEADER.size])
        room = size - _HEADER.size - _MAC_SIZE
        return bool(magic == _MAGIC and lock_size + table_size <= room)

    # ---- writing ------------------------------------------------------------------------------

    def expect(self, lock: bytes, *, debug: bool, binding: bytes) -> int:
        """
        Keep what a zygote will hand over, in a thread that ends with the zygote's interest.

        Args:
            lock: The lock's canonical bytes.
            debug: Whether the zygote serves debug enclaves.
            binding: From :func:`binding_of`.

        Returns:
            Descriptor of the zygote's end of a socket, the caller's; -1: there is none to be had.

        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return -1
        thread = threading.Thread(
            target=self._receive, args=(ours, lock, debug, binding), name="codes", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            ours.close()
            theirs.close()
            return -1
        return theirs.detach()

    def _receive(self, sock: socket.socket, lock: bytes, debug: bool, binding: bytes) -> None:
        with sock:
            for _ in range(_MAX_STORED):
                try:
                    data, fds, _, _ = socket.recv_fds(sock, 16, 1, socket.MSG_CMSG_CLOEXEC)
                except OSError:
                    return
                try:
                    if not data or len(fds) != 1:
                        return
                    with contextlib.suppress(OSError, ValueError, EnclaveError, MemoryError):
                        self.store(lock, fds[0], debug=debug, binding=binding)
                finally:
                    close_all(fds)

    def store(self, lock: bytes, fd: int, *, debug: bool, binding: bytes) -> None:
        """
        Keep what a zygote handed over, durably and all or nothing.

        Args:
            lock: The lock's canonical bytes.
            fd: A memfd as ``_worker/codes.py`` describes it; stays the caller's.
            debug: Whether the zygote serves debug enclaves.
            binding: From :func:`binding_of`.

        Raises:
            ValueError: The memfd is not of this form.
            OSError: There is no room, or it cannot be written; nothing is, once this is closed.

        """
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ALL_SEALS != ALL_SEALS:
            raise ValueError("compiled code that could still be changed")
        size = os.fstat(fd).st_size
        table = int.from_bytes(os.pread(fd, 4, 0), "little")
        if not 4 <= size <= _MAX_CODE or table > size - 4:
            raise ValueError("compiled code of another size")
        data = bytearray(_HEADER.pack(_MAGIC, binding, len(lock), table))
        data += lock
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            data += view[4:]
        data += hmac_sha256(self._key, data)
        name = self._name(hashlib.sha256(lock).digest(), debug=debug)
        with self._written:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "closed: no compiled code is written any more")
            self._writers += 1
        try:
            self._prune(name, len(data))
            self._state.replace_file(name, bytes(data))
        finally:
            with self._written:
                self._writers -= 1
                self._written.notify_all()

    def forget(self, lock: bytes, *, debug: bool) -> None:
        """Remove the code of a lock."""
        with contextlib.suppress(OSError, EnclaveError):
            self._state.unlink(self._name(hashlib.sha256(lock).digest(), debug=debug))

    def _prune(self, name: str, size: int) -> None:
        """Make room for *name*: of all files those stay that were used last."""
        found = []
        with contextlib.suppress(OSError):
            for other in os.listdir(self._state.fd):
                if _NAME.fullmatch(other) is not None and other != name:
                    with contextlib.suppress(OSError):
                        status = os.stat(other, dir_fd=self._state.fd, follow_symlinks=False)
                        found.append((status.st_mtime, status.st_size, other))
        kept = 1
        for _, other_size, other in sorted(found, reverse=True):
            size += other_size
            kept += 1
            if kept > _MAX_FILES or size > _MAX_TOTAL:
                self._state.unlink(other)

    def close(self) -> None:
        """Close what was read and not used, and let no write be cut off. May be called twice."""
        # Its thread would end with the process, and leave half a file aside.
        with self._written:
            self._closed = True
            self._written.wait_for(lambda: not self._writers, timeout=_WRITING_SECONDS)
        with self._lock:
            close_all(list(self._found.values()))
            self._found.clear()
