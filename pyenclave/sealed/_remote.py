"""
Sealed files on file systems that are no local folder: read by ranges, written as a whole.

What lies or passes here is ciphertext only. Nothing that comes from the other side is trusted: a
short, long or changed answer is an error here or does not open in the sealed file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from pyenclave._locks import Lock

__all__ = ["BLOCK", "Outgoing", "RangeReader"]

BLOCK: Final = 1 << 20  # bytes that are asked for at least
_AHEAD: Final = 8  # blocks at most in one request, when they are read in order
_KEPT: Final = 32  # blocks


class RangeReader(io.RawIOBase):
    """
    A file of another file system as a seekable raw file; usable by several threads.

    Args:
        fetch: Returns the bytes from one position up to another.
        size: Length of the file.
        block: Bytes that one request asks for at least.

    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block: int = BLOCK) -> None:
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._block = block
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._window = 1
        self._next = 0
        self._position = 0
        self._lock = Lock()

    def size(self) -> int:
        """Return the length of the file."""
        return self._size

    def _get(self, index: int) -> bytes:
        found = self._blocks.get(index)
        if found is not None:
            self._blocks.move_to_end(index)
            return found
        self._window = min(2 * self._window, _AHEAD) if index == self._next else 1
        start, stop = index * self._block, min((index + self._window) * self._block, self._size)
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            raise OSError(
                errno.EIO, f"{stop - start} bytes were asked for at {start}, {len(data)} came"
            )
        view = memoryview(data)
        for number in range(-(-(stop - start) // self._block)):
            self._blocks[index + number] = bytes(
                view[number * self._block : (number + 1) * self._block]
            )
        self._next = index + self._window
        while len(self._blocks) > _KEPT:
            self._blocks.popitem(last=False)
        return self._blocks[index]

    def pread(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*; fewer at the end of the file only."""
        length = max(0, min(length, self._size - offset))
        if not length:
            return b""
        if length >= _AHEAD * self._block:  # nothing is gained by keeping so much
            data = self._fetch(offset, offset + length)
            if len(data) != length:
                raise OSError(errno.EIO, f"{length} bytes were asked for, {len(data)} came")
            return data
        parts = []
        with self._lock:
            while length:
                index, start = divmod(offset, self._block)
                part = self._get(index)[start : start + length]
                parts.append(part)
                offset += len(part)
                length -= len(part)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.pread(self._position, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "a position before the file's begin")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class Outgoing(io.BufferedIOBase):
    """
    A sealed file that is made aside, as ciphertext, and put into its place when it is complete.

    Args:
        inner: The sealed file, open for writing at *aside*.
        aside: Path of the local file.
        place: Puts that file into its place; called once, after it was closed.
        autocommit: Do so at `close`; else at `commit`, which fsspec's transactions call.

    """

    def __init__(
        self, inner: Any, aside: str, place: Callable[[str], None], *, autocommit: bool
    ) -> None:
        super().__init__()
        self._inner = inner
        self._aside: str | None = aside
        self._place = place
        self._autocommit = autocommit

    def readable(self) -> bool:
        return bool(self._inner.readable())

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        data: bytes = self._inner.read(-1 if size is None else size)
        return data

    def readinto(self, buffer: Any, /) -> int:
        return int(self._inner.readinto(buffer))

    def write(self, data: Any, /) -> int:
        return int(self._inner.write(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return int(self._inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def truncate(self, size: int | None = None, /) -> int:
        return int(self._inner.truncate(size))

    def flush(self) -> None:
        if not self.closed and not self._inner.closed:
            self._inner.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._inner.close()
            if self._autocommit:
                self.commit()
        except BaseException:
            self.discard()
            raise
        finally:
            super().close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; what an exception left half-written is dropped."""
        if kind is not None:
            self._autocommit = False
            self.close()
            self.discard()
        else:
            self.close()

    def commit(self) -> None:
        """Put the file into its place."""
        aside, self._aside = self._aside, None
        if aside is not None:
            try:
                self._place(aside)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(aside)

    def discard(self) -> None:
        """Drop the file."""
        aside, self._aside = self._aside, None
        if aside is not None:
            with contextlib.suppress(OSError):
                os.unlink(aside)
