"""
Sealed streams, for pipes: chunks that are released one by one, and only in their order.

Each chunk is authenticated with its position and whether it is the last, so that a stream that was
cut off, reordered, repeated or added to is refused, at the place where that is noticed. Before that
only what is authentic was released; that it was *all*, only the end of the stream tells.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import itertools
import os
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Final, Literal, overload

from pyenclave._locks import RLock
from pyenclave.errors import SealingError, SealLimitError, UnsealError
from pyenclave.formats.sealed_stream import (
    FRAME_SIZE,
    HEADER_SIZE,
    MAC_SIZE,
    MAX_CHUNK,
    StreamHeader,
    read_frame,
    write_frame,
)
from pyenclave.sealed.file_crypto import SealKey, key_root

try:
    from pyenclave._core import Gcm
except ImportError:  # pragma: no cover - systems without the native core
    from pyenclave.sealed.file_portable import Gcm  # type: ignore[assignment]

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

__all__ = ["StreamReader", "StreamWriter", "open_stream"]

CHUNK_SIZE: Final = 1 << 16
_LABEL: Final = b"pyenclave/stream/1"
_MAX_CHUNKS: Final = 1 << 32
_TAG: Final = 16


def _keys(root: bytearray, salt: bytes) -> tuple[bytes, bytes, bytes]:
    """HKDF-SHA-256: the keys of header, name and chunks."""
    extracted = hmac.digest(salt, root, "sha256")
    header, name, chunks = (
        hmac.digest(extracted, _LABEL + what + b"\x01", "sha256")
        for what in (b"/header", b"/name", b"/chunks")
    )
    return header, name, chunks


def _mac(key: bytes, header: StreamHeader) -> bytes:
    return hmac.digest(key, header.to_bytes()[:-MAC_SIZE], "sha256")


def _nonce(position: int) -> bytes:
    return position.to_bytes(8, "big") + bytes(4)


class StreamWriter(io.BufferedIOBase):
    """
    Seals what is written and hands it on, chunk by chunk.

    Leaving ``with`` by an exception leaves the stream without its end: its reader refuses it.

    Args:
        file: Has ``write``; it is flushed but not closed.
        key: 32 bytes or a key object.
        name: What the stream is called; it opens under the same name only.
        chunk_size: Most bytes of a chunk.
        random: Source of random bytes.

    """

    def __init__(
        self,
        file: IO[bytes],
        *,
        key: SealKey,
        name: bytes = b"",
        chunk_size: int = CHUNK_SIZE,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        super().__init__()
        if not 1 <= chunk_size <= MAX_CHUNK:
            raise ValueError(f"chunk_size: expected 1 … {MAX_CHUNK}, found {chunk_size}")
        self._file = file
        self._size = chunk_size
        self._buffer = bytearray()
        self._out = bytearray(chunk_size + _TAG)
        # Each number is given out once, whatever threads or signal handlers write meanwhile: two
        # chunks under one nonce would give their plaintexts and the key of their tags away.
        self._positions = itertools.count()
        self._lock = RLock()
        self._failed = False
        hedge = f"{time.time_ns()} {time.monotonic_ns()} {os.getpid()} {id(self)}".encode()
        salt = hashlib.sha256(_LABEL + random(32) + os.urandom(16) + hedge).digest()
        root = key_root(key)
        header_key, name_key, chunk_key = _keys(root, salt)
        root[:] = bytes(len(root))
        tag = hmac.digest(name_key, name, "sha256")[:16]
        header = StreamHeader(chunk_size=chunk_size, salt=salt, name_tag=tag)
        self._gcm: Gcm | None = Gcm(chunk_key)
        self._put(header.to_bytes()[:-MAC_SIZE] + _mac(header_key, header))

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            count: int | None = self._file.write(view)
            # A raw pipe may take a part; None is a file object that took all or nothing.
            if count is None or not 0 < count <= len(view):
                raise OSError(f"the stream took {count} of {len(view)} bytes")
            view = view[count:]

    def _chunk(self, data: memoryview, *, final: bool) -> None:
        if self._gcm is None or self._failed:
            raise SealingError("an earlier write to the stream failed; it has no end")
        position = next(self._positions)
        if position >= _MAX_CHUNKS:
            raise SealLimitError("the stream has as many chunks as it may", found=position)
        frame = write_frame(len(data), final=final)
        out = memoryview(self._out)[: len(data) + _TAG]
        self._failed = True
        self._gcm.seal_into(_nonce(position), data, out, frame)
        self._put(frame)
        self._put(out)
        self._failed = False

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Buffer, /) -> int:
        """Seal *data*; what does not fill a chunk waits."""
        with self._lock:
            return self._write(data)

    def _write(self, data: Buffer) -> int:
        if self.closed:
            raise ValueError("write to a closed stream")
        view = memoryview(data).cast("B")
        size, done = self._size, 0
        # The last chunk is marked as such, so a full one waits for what follows.
        while len(self._buffer) + len(view) - done > size:
            if self._buffer:
                take = size - len(self._buffer)
                self._buffer += view[done : done + take]
                done += take
                with memoryview(self._buffer) as whole:
                    self._chunk(whole, final=False)
                self._buffer.clear()
            else:
                self._chunk(view[done : done + size], final=False)
                done += size
        self._buffer += view[done:]
        return len(view)

    def flush(self) -> None:
        """Hand on what waits, as a chunk of its own."""
        with self._lock:
            if self.closed:
                return
            if self._buffer:
                with memoryview(self._buffer) as whole:
                    self._chunk(whole, final=False)
                self._buffer.clear()
            self._file.flush()

    def close(self) -> None:
        """Write the end of the stream. The file stays open."""
        with self._lock:
            if self.closed:
                return
            try:
                if self._gcm is not None and not self._failed:
                    with memoryview(self._buffer) as whole:
                        self._chunk(whole, final=True)
                    self._buffer.clear()
                    self._file.flush()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close without an end: a reader refuses what is missing."""
        if self._gcm is not None:
            self._gcm.close()
            self._gcm = None
        self._buffer[:] = bytes(len(self._buffer))
        self._buffer.clear()
        super().close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abandon()
        super().__exit__(kind, value, trace)

    def __del__(self) -> None:
        # What nobody closed has no end.
        if not self.closed:
            self.abandon()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a sealed stream cannot be pickled")


class StreamReader(io.RawIOBase):
    """
    Opens a sealed stream. A chunk is released when it is authentic and in its place.

    Args:
        file: Has ``read``; it is not closed.
        key: As for the writer.
        name: As for the writer.

    """

    def __init__(self, file: IO[bytes], *, key: SealKey, name: bytes = b"") -> None:
        super().__init__()
        self._file = file
        self._position = 0
        self._ended = False
        self._failure: str | None = None
        self._ready = memoryview(b"")
        self._gcm: Gcm | None = None
        header = StreamHeader.from_bytes(self._take(HEADER_SIZE, "its header"))
        root = key_root(key)
        header_key, name_key, chunk_key = _keys(root, header.salt)
        root[:] = bytes(len(root))
        if not hmac.compare_digest(_mac(header_key, header), header.mac):
            raise UnsealError(
                "the sealed stream is not authentic under this key",
                advice="Give the key that it was written with.",
            )
        if not hmac.compare_digest(hmac.digest(name_key, name, "sha256")[:16], header.name_tag):
            raise UnsealError("the sealed stream has another name", found=repr(name))
        self._size = header.chunk_size
        self._plain = bytearray(self._size)
        self._gcm = Gcm(chunk_key)

    def _take(self, size: int, what: str) -> bytes:
        data = self._file.read(size) or b""
        while len(data) < size:
            more = self._file.read(size - len(data))
            if not more:
                raise UnsealError(
                    f"the sealed stream ends within {what}",
                    expected=f"{size} bytes",
                    found=len(data),
                    advice="It was cut off.",
                )
            data += more
        if len(data) > size:
            raise OSError("the stream returned more than was asked for")
        return data

    def _next(self) -> None:
        if self._gcm is None:
            raise ValueError("read of a closed stream")
        where = f"chunk {self._position}"
        frame = self._take(FRAME_SIZE, where)
        length, final = read_frame(frame, self._size)
        sealed = self._take(length + _TAG, where)
        out = memoryview(self._plain)[:length]
        try:
            self._gcm.open_into(_nonce(self._position), sealed, out, frame)
        except UnsealError:
            raise UnsealError(
                f"{where} of the sealed stream is not authentic",
                expected="what was written at this place",
                found="other bytes",
                advice="Chunks were changed, left out, repeated or reordered.",
            ) from None
        if final:
            if self._file.read(1):
                raise UnsealError(
                    "the sealed stream goes on after its end",
                    expected=f"{self._position + 1} chunks",
                    found="more",
                    advice="Something was added to it.",
                )
            self._ended = True
        self._position += 1
        self._ready = out

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        """
        Read into *buffer*; 0 means that the stream is whole and at its end.

        Raises:
            UnsealError: Not authentic, out of order or cut off; every later read raises it too.

        """
        view = memoryview(buffer).cast("B")
        if self._failure is not None:
            raise UnsealError(f"the sealed stream was refused: {self._failure}")
        try:
            while not self._ready and not self._ended and len(view):
                self._next()
        except UnsealError as error:
            self._failure = str(error)
            raise
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Wipe key and plaintext. The file stays open."""
        if not self.closed:
            if self._gcm is not None:
                self._gcm.close()
                self._gcm = None
                self._ready = memoryview(b"")
                self._plain[:] = bytes(len(self._plain))
            super().close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a sealed stream cannot be pickled")


@overload
def open_stream(
    file: IO[bytes], mode: Literal["rb"] = "rb", *, key: SealKey, name: bytes = b""
) -> io.BufferedReader: ...


@overload
def open_stream(
    file: IO[bytes],
    mode: Literal["wb"],
    *,
    key: SealKey,
    name: bytes = b"",
    chunk_size: int = CHUNK_SIZE,
) -> StreamWriter: ...


def open_stream(
    file: IO[bytes],
    mode: str = "rb",
    *,
    key: SealKey,
    name: bytes = b"",
    chunk_size: int = CHUNK_SIZE,
) -> io.BufferedReader | StreamWriter:
    """
    Open a sealed stream over a pipe, a socket's file or any file object; it is not closed with it.

    Args:
        file: Read from or written to, in order only.
        mode: ``rb`` or ``wb``.
        key: 32 bytes or a key object.
        name: What the stream is called.
        chunk_size: Of a stream that is written: most bytes that are sealed, and released, at once.

    """
    if mode == "wb":
        return StreamWriter(file, key=key, name=name, chunk_size=chunk_size)
    if mode != "rb":
        raise ValueError(f"mode: expected rb or wb, found {mode!r}")
    return io.BufferedReader(StreamReader(file, key=key, name=name), CHUNK_SIZE)
