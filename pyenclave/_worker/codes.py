"""
Compiled code on its way from a zygote to the platform, which keeps it for the next zygote.

A zygote of the same lock, in the same mode, compiles the same sources again. So it hands over
what it compiled; the platform puts a MAC on it (``_platform/codecache.py``), and the next zygote
is given it back. Nothing here runs code, and nothing that runs an enclave's code is ever asked.

One packet with one byte, and a write-sealed memfd::

    size of the table   4 bytes, little-endian
    table               lines: module, SHA-256 of its source, offset, size; size 0: it has no code
    code                marshalled code objects, one after the other
"""

from __future__ import annotations

import contextlib
import marshal
import os
import socket
from typing import TYPE_CHECKING, Final

from pyenclave._memfd import seal

if TYPE_CHECKING:
    from pyenclave._worker.importer import Entry, Locked

__all__ = ["MAX_CODE", "CodeWriter", "compile_ahead", "sources_of"]

#: Bytes of code, and of its table, at most. NumPy's lock list has 10 MiB, PyTorch's 50 MiB.
MAX_CODE: Final = 60 << 20


def sources_of(locked: Locked) -> list[Entry]:
    """Return the modules that are sources."""
    return [entry for entry in locked.modules.values() if entry.kind in ("module", "package")]


def compile_ahead(locked: Locked, entry: Entry) -> None:
    """Compile a source, so that workers need only run it; what is no Python stays as it is."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        entry.code = locked.code(entry)  # else whoever imports it hears why


class CodeWriter:
    """
    Collects compiled code and hands it over. If anything fails, nothing more is handed over.

    Args:
        locked: What this zygote verified.
        wanted: Descriptor of the socket to the platform; owned.

    """

    def __init__(self, locked: Locked, wanted: int) -> None:
        self._locked = locked
        self._socket = socket.socket(fileno=wanted)
        self._socket.setblocking(False)
        self._code = -1
        self._size = 0
        self._rows: dict[str, bytes] = {}
        self._fresh = False  # whether anything was compiled that the platform did not have
        if all(entry.compiled is not None for entry in sources_of(locked)):
            self.close()  # it had everything
            return
        with contextlib.suppress(OSError):
            self._code = os.memfd_create("pyenclave-code", os.MFD_CLOEXEC)

    def add(self, entry: Entry) -> None:
        """Take the code of a source, or that it has none; what is too much is left out."""
        if self._code < 0 or entry.name in self._rows:
            return
        try:
            self._add(entry)
        except (OSError, ValueError, MemoryError):
            self.close()

    def _add(self, entry: Entry) -> None:
        data = b""
        if entry.compiled is not None:
            offset, size = entry.compiled
            data = os.pread(self._locked.sources, size, offset)
        else:
            self._fresh = True
            if entry.code is not None:
                data = marshal.dumps(entry.code)
        if self._size + len(data) > MAX_CODE:
            data = b""
        _write(self._code, data)
        row = f"{entry.name}\t{entry.sha256}\t{self._size}\t{len(data)}\n"
        self._rows[entry.name] = row.encode("utf-8", "surrogateescape")
        self._size += len(data)

    def send(self) -> None:
        """Hand over what was taken so far, if any of it is new."""
        if self._code < 0 or not self._fresh:
            return
        try:
            self._send()
        except OSError:
            self.close()
        self._fresh = False

    def _send(self) -> None:
        fd = os.memfd_create("pyenclave-code", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            table = b"".join(self._rows.values())
            _write(fd, len(table).to_bytes(4, "little") + table)
            os.lseek(self._code, 0, os.SEEK_SET)
            while os.sendfile(fd, self._code, None, MAX_CODE):
                pass
            seal(fd)
            socket.send_fds(self._socket, [b"K"], [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give everything back; the platform learns that no more comes. May be called twice."""
        self._socket.close()
        code, self._code = self._code, -1
        if code >= 0:
            os.close(code)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
