"""
Sealed files as ordinary file objects.

`open_sealed` is to sealed files what `open` is to plain ones. What it returns are the buffered
classes of ``io`` over a raw file that seals and opens pages, so that whatever takes a file object
takes them: ``io.TextIOWrapper``, NumPy, pandas, pyarrow, ``zipfile``. Large reads go straight into
the caller's buffer.
"""

from __future__ import annotations

import io
import os
import warnings
from typing import TYPE_CHECKING, Any, Final, Literal, overload

from pyenclave.errors import EnclaveClosedError, FileBusyError, UnsealError
from pyenclave.formats.sealed_file import UNIT, check_page_size
from pyenclave.sealed import envelope, policy
from pyenclave.sealed.file_commits import Rebinding
from pyenclave.sealed.file_crypto import KeyObject, SealKey
from pyenclave.sealed.file_engine import CACHE_SIZE, CommitCounter, SealedEngine
from pyenclave.sealed.file_store import FileStore, ObjectStore, Store, is_store

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

__all__ = [
    "CommitCounter",
    "FileBusyError",
    "FileStore",
    "KeyObject",
    "ObjectStore",
    "Rebinding",
    "SealedRandom",
    "SealedRawFile",
    "SealedReader",
    "SealedText",
    "SealedWriter",
    "Store",
    "open_sealed",
]

FileKey = SealKey | envelope.WrappingKey | envelope.UnwrappingKey
_READ_BUFFER: Final = 1 << 16
_WRITE_BUFFER: Final = 1 << 18
_WINDOW: Final = 2 * UNIT  # what a first read at a new place is given at least


class SealedRawFile(io.RawIOBase):
    """
    The unbuffered file: every call opens or seals pages.

    Args:
        engine: The file.
        mode: ``r``, ``w``, ``x`` or ``a``, with ``+`` where both.
        name: For ``repr`` and the ``name`` attribute: the path.
        buffer_size: Size of the buffer that is put before it.

    """

    def __init__(self, engine: SealedEngine, mode: str, name: object, buffer_size: int) -> None:
        super().__init__()
        self._engine = engine
        self._position = 0
        self._readable = "r" in mode or "+" in mode
        self._writable = "r" not in mode or "+" in mode
        self._append = "a" in mode
        self._buffer_size = buffer_size
        self._expected = 0  # where the next sequential read begins
        self._window = buffer_size
        self.dropping = False  # what is written is forgotten: a buffer before this empties itself
        self.name = name
        self.mode = f"{mode}b"
        if self._append:
            self._position = engine.size

    def readable(self) -> bool:
        """Tell whether the file was opened for reading."""
        return self._readable

    def writable(self) -> bool:
        """Tell whether the file was opened for writing."""
        return self._writable

    def seekable(self) -> bool:
        """Return True: sealed files have random access."""
        return True

    def fileno(self) -> int:
        """Refuse: the descriptor is that of ciphertext."""
        raise io.UnsupportedOperation("a sealed file has no descriptor of its plaintext")

    def _open(self) -> SealedEngine:
        if self._engine.closed and not self.dropping:
            raise EnclaveClosedError("the sealed file is closed")
        return self._engine

    def readinto(self, buffer: Buffer, /) -> int:
        """Read into *buffer*; fewer bytes at the end, or where a reader jumps about."""
        engine = self._open()
        if not self._readable:
            raise io.UnsupportedOperation("not readable")
        view = memoryview(buffer).cast("B")
        size = len(view)
        if size <= self._buffer_size:
            # Who reads here and there is not given a whole buffer each time.
            if self._position == self._expected:
                self._window = min(self._window * 2, self._buffer_size)
            else:
                self._window = _WINDOW
            size = min(size, self._window - self._position % UNIT)
        count = engine.read_into(self._position, view[:size])
        self._position += count
        self._expected = self._position
        return count

    def readall(self) -> bytes:
        """Read to the end."""
        left = self._open().size - self._position
        if left <= 0:
            return b""
        # A buffered reader is what fills a bytes object without a copy.
        reader = io.BufferedReader(self, UNIT)
        try:
            return reader.read(left)
        finally:
            reader.detach()

    def write(self, data: Buffer, /) -> int:
        """Seal *data*; it is committed by `commit` or `close`."""
        if self.dropping:
            return memoryview(data).nbytes
        engine = self._open()
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        if self._append:
            self._position = engine.size
        count = engine.write(self._position, memoryview(data).cast("B"))
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move; beyond the end is allowed, and leaves a hole if something is written there."""
        engine = self._open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: engine.size}.get(whence)
        if base is None:
            raise ValueError(f"whence: expected 0, 1 or 2, found {whence}")
        position = base + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position."""
        self._open()
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """Make the file *size* bytes long (default: up to here)."""
        engine = self._open()
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        return engine.truncate(self._position if size is None else size)

    def commit(self) -> int:
        """Make what was written durable and return the number of the commit."""
        return self._open().commit()

    def discard(self) -> None:
        """Go back to the last commit."""
        self._open().discard()

    @property
    def engine(self) -> SealedEngine:
        """The file at offsets."""
        return self._engine

    def close(self) -> None:
        """Commit and close; the keys are wiped."""
        if not self.closed:
            try:
                self._engine.close()
            finally:
                super().close()

    def abandon(self) -> None:
        """Close without a commit."""
        self.dropping = True
        self._engine.close(commit=False)

    def _dealloc_warn(self, source: object) -> None:
        """Warn as plain files do when they are collected without having been closed."""
        warnings.warn(f"unclosed sealed file {source!r}", ResourceWarning, 2, source=source)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abandon()
        super().__exit__(kind, value, trace)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} mode={self.mode!r}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a sealed file cannot be pickled")


class _Sealed:
    """What the buffered classes have beyond those of ``io``."""

    raw: SealedRawFile
    if TYPE_CHECKING:

        def flush(self) -> None:
            """Hand the buffer on; io's."""

    def commit(self) -> int:
        """
        Make everything written durable, at once or not at all.

        Returns:
            The number of the commit.

        """
        if self.raw.writable():
            self.flush()
        return self.raw.commit()

    def bind(self, counter: CommitCounter | None) -> int:
        """
        Commit, and bind the file to another counter, or to none, from now on.

        The old counter is advanced, so that with it no copy of the file opens any more.

        Returns:
            The number of the commit.

        """
        if self.raw.writable():
            self.flush()
        return self.raw.engine.bind(counter)

    def discard(self) -> None:
        """Go back to the last commit. What was written since, buffered or not, is forgotten."""
        if self.raw.writable():
            self.raw.dropping = True
            try:
                self.flush()
            finally:
                self.raw.dropping = False
        self.raw.discard()

    def close(self) -> None:
        """Commit and close. If what is buffered cannot be handed on, nothing is committed."""
        if not self.raw.closed and self.raw.writable() and not self.raw.dropping:
            try:
                self.flush()
            except BaseException:  # an interruption too: io's close would go on, and commit a part
                self.raw.abandon()
                super().close()  # type: ignore[misc]
                raise
        super().close()  # type: ignore[misc]

    def pread(self, size: int, offset: int) -> bytes:
        """Return up to *size* bytes from *offset*, without moving the position."""
        if self.raw.writable():
            self.flush()
        engine = self.raw.engine
        buffer = bytearray(max(0, min(size, engine.size - offset)))
        engine.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    @property
    def size(self) -> int:
        """Bytes of the file, with what is buffered."""
        if self.raw.writable():
            self.flush()
        return self.raw.engine.size

    @property
    def generation(self) -> int:
        """Number of the last commit."""
        return self.raw.engine.generation

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self.raw.engine.geometry.page_size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.raw.abandon()
        super().__exit__(kind, value, trace)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.raw.name!r}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a sealed file cannot be pickled")


class SealedReader(_Sealed, io.BufferedReader):  # type: ignore[misc]
    """A sealed file that is read."""


class SealedWriter(_Sealed, io.BufferedWriter):  # type: ignore[misc]
    """A sealed file that is written."""


class SealedRandom(_Sealed, io.BufferedRandom):  # type: ignore[misc]
    """A sealed file that is read and written."""


class SealedText(io.TextIOWrapper):
    """A sealed file of text. Leaving ``with`` after an exception commits nothing here either."""

    def commit(self) -> int:
        """Make everything written durable and return the number of the commit."""
        self.flush()
        return self._sealed().commit()

    def _sealed(self) -> SealedReader | SealedWriter | SealedRandom:
        file = self.buffer
        if not isinstance(file, SealedReader | SealedWriter | SealedRandom):
            raise TypeError("the text is not over a sealed file")  # pragma: no cover
        return file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._sealed().raw.abandon()
        super().__exit__(kind, value, trace)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a sealed file cannot be pickled")


SealedFile = SealedReader | SealedWriter | SealedRandom
_MODES: Final = frozenset(
    f"{letter}{plus}{kind}" for letter in "rwxa" for plus in ("", "+") for kind in ("b", "t")
)


def _parse_mode(mode: str) -> tuple[str, bool]:
    """Return the mode without ``b`` and ``t``, and whether it is of text."""
    if not isinstance(mode, str):
        raise TypeError(f"mode: expected a string, found {mode!r}")
    kind = "b" if "b" in mode else "t"
    letters = mode.replace("b", "", 1).replace("t", "", 1)
    form = letters.replace("+", "", 1) + ("+" if "+" in letters else "") + kind
    if form not in _MODES or ("b" in mode and "t" in mode):
        raise ValueError(f"mode: expected one of r, w, x, a with +, b or t, found {mode!r}")
    return form[:-1], kind == "t"


def _open_store(path: Any, base: str, *, create: bool) -> Store:
    write = base != "r"
    if is_store(path):
        if base.startswith("x") and path.size():
            raise FileExistsError("the store holds something")
        return path  # type: ignore[no-any-return]
    if isinstance(path, str | bytes | os.PathLike):
        return FileStore(path, write=write, create=create, exclusive=base.startswith("x"))
    if base.startswith("x"):
        raise ValueError("mode: x needs a path")
    return ObjectStore(path, write=write)


@overload
def open_sealed(
    path: Any,
    mode: Literal["rb"] = "rb",
    *,
    key: FileKey,
    name: bytes = b"",
    page_size: int = UNIT,
    counter: CommitCounter | Rebinding | None = None,
    buffering: int = -1,
    cache_size: int = CACHE_SIZE,
) -> SealedReader: ...


@overload
def open_sealed(
    path: Any,
    mode: Literal["wb", "xb", "ab"],
    *,
    key: FileKey,
    name: bytes = b"",
    page_size: int = UNIT,
    counter: CommitCounter | Rebinding | None = None,
    buffering: int = -1,
    cache_size: int = CACHE_SIZE,
) -> SealedWriter: ...


@overload
def open_sealed(
    path: Any,
    mode: Literal["r+b", "w+b", "x+b", "a+b", "rb+", "wb+", "xb+", "ab+"],
    *,
    key: FileKey,
    name: bytes = b"",
    page_size: int = UNIT,
    counter: CommitCounter | Rebinding | None = None,
    buffering: int = -1,
    cache_size: int = CACHE_SIZE,
) -> SealedRandom: ...


@overload
def open_sealed(
    path: Any,
    mode: str,
    *,
    key: FileKey,
    name: bytes = b"",
    page_size: int = UNIT,
    counter: CommitCounter | Rebinding | None = None,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    cache_size: int = CACHE_SIZE,
) -> Any: ...


def open_sealed(
    path: Any,
    mode: str = "rb",
    *,
    key: object,
    name: bytes = b"",
    page_size: int = UNIT,
    counter: CommitCounter | Rebinding | None = None,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    cache_size: int = CACHE_SIZE,
) -> Any:
    """
    Open a sealed file, as `open` opens a plain one (docs/formats/sealed-file.md).

    What is written becomes the file's content with ``commit()`` or ``close()``: all of it or, after
    a crash or an error, none. Leaving a ``with`` block by an exception commits nothing. ``flush()``
    makes nothing durable.

    Args:
        path: A path; a file object with ``read`` and ``seek`` (and ``write`` and ``truncate``);
            or a `Store`.
        mode: As for `open`: ``r``, ``w``, ``x`` or ``a``, with ``+`` and with ``b`` or, for text,
            without. ``w`` on a sealed file keeps the old content until the first commit.
        key: 32 bytes, or an object with ``derive(context: bytes) -> bytes``. Or what wraps or
            unwraps (`pyenclave.sealed.envelope_keys`, a released key): the file then has a data
            key of its own in front of it, and ``w`` takes away at once what was there.
        name: What the file is called: it opens under the same name only. Never its path.
        page_size: Of a new file, in bytes: a power of two from 4096 to 1 MiB. Larger pages need
            less metadata and more writing for small changes. ``w`` over a sealed file keeps its.
        counter: A monotonic counter with ``read()``, ``advance(to)`` and ``id``. With it an old
            copy of the whole file is refused; without it that opens. Of a file whose `bind` to
            another counter may have been cut off: both, as ``Rebinding(old, new)``.
        buffering: Size of the buffer in bytes; 0 for none (the raw file).
        encoding: Of text, as for `open`.
        errors: Of text, as for `open`.
        newline: Of text, as for `open`.
        cache_size: Bytes of tree nodes that are kept in memory.

    Returns:
        `SealedReader`, `SealedWriter` or `SealedRandom`; for text `SealedText`.

    Raises:
        UnsealError: Not authentic under this key and name.
        RollbackError: Not the file that the counter names.
        FileBusyError: Another opening holds the file: one writer or many readers.
        NotInEnclaveError: A SealPolicy was given as key outside an enclave.
        OSError: As for `open`.

    """
    if isinstance(key, policy.SealPolicy) and policy.opener is not None:
        options = {"page_size": page_size, "counter": counter, "buffering": buffering}
        texts = {"encoding": encoding, "errors": errors, "newline": newline}
        return policy.opener(
            path, mode, key=key, name=name, cache_size=cache_size, **options, **texts
        )
    base, text = _parse_mode(mode)
    check_page_size(page_size)
    if not isinstance(name, bytes):
        raise TypeError(f"name: expected bytes, found {type(name).__name__}")
    if not text and not (encoding is None and errors is None and newline is None):
        raise ValueError("encoding, errors and newline are for text modes")
    if text and buffering == 0:
        raise ValueError("buffering: text needs a buffer")
    default = _READ_BUFFER if base == "r" else _WRITE_BUFFER
    buffer_size = default if buffering in (-1, 1) else buffering
    if buffer_size < 0:
        raise ValueError(f"buffering: expected -1, 0 or a size, found {buffering}")
    if isinstance(counter, Rebinding) and base[0] in "wx":
        raise ValueError("counter: a file that begins anew has one counter")
    store = _open_store(path, base, create=base[0] in "wa" and not isinstance(counter, Rebinding))
    file_id: bytes | None = None
    try:
        if envelope.is_envelope_key(key):
            store, key, file_id = envelope.enter(store, base, key)
        engine = SealedEngine(
            store,
            key=key,
            name=name,
            write=base != "r",
            create=base[0] in "wxa",
            truncate=base[0] in "wx",
            page_size=page_size,
            counter=counter,
            cache_size=cache_size,
            file_id=file_id,
        )
        if file_id is not None and engine.header.file_id != file_id:
            engine.close(commit=False)
            raise UnsealError(
                "the envelope is of another sealed file",
                expected=file_id.hex(),
                found=engine.header.file_id.hex(),
            )
    except BaseException:
        store.close()
        raise
    raw = SealedRawFile(engine, base, path, buffer_size)
    if buffer_size == 0:
        return raw
    file: SealedFile
    if base == "r":
        file = SealedReader(raw, buffer_size)
    elif "+" in base:
        file = SealedRandom(raw, buffer_size)
    else:
        file = SealedWriter(raw, buffer_size)
    if not text:
        return file
    return SealedText(file, encoding=encoding, errors=errors, newline=newline)
