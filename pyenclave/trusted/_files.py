"""Sealed files inside: the host keeps the bytes, the enclave the key."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.calls import files
from pyenclave.errors import FileBusyError, OcallError, SealingError, UnsealError
from pyenclave.sealed.policy import SealPolicy
from pyenclave.trusted import _state

__all__ = ["open_sealed"]

_LABEL: Final = b"pyenclave/file-key/1\0"  # the additional data of the key's blob, before the name
_MAGIC: Final = b"PYEFKEY\x01"
_PAGE: Final = 4096  # in front of the sealed file
_KEY_SIZE: Final = 32
_BLOB_SIZE: Final = 224 + _KEY_SIZE + 16
_CHUNK: Final = 4 << 20  # bytes that cross at once, where messages may be so long
_WINDOW: Final = 128 << 10  # bytes of a first read ahead, before it is doubled
_NEAR: Final = 1 << 20
_STREAMS: Final = 3
_OVERHEAD: Final = 1024  # of a message, at most
_KINDS: Final = {
    kind.__name__: kind
    for kind in (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
}


@dataclass(slots=True)
class _Stream:
    """What was read for a reader that goes on: the data of a file are one, its nodes another."""

    at: int
    data: bytes
    window: int


class _HostFile:
    """
    A file that the host lends: a store, as sealed files want one.

    A crossing costs as much as a few hundred kilobytes. So neighbouring writes are joined until
    something needs them there, and who reads on where it stopped is given more than it asked for.
    What is kept meanwhile is ciphertext, no better and no worse than what the host has.
    """

    def __init__(self, name: str, *, write: bool, create: bool, exclusive: bool) -> None:
        self._name = name
        self._chunk = max(_PAGE, min(_CHUNK, _state.current().message_limit // 2 - _OVERHEAD))
        self._streams: list[_Stream] = []
        self._behind = bytearray()  # what was written and not handed on, and where it belongs
        self._behind_at = 0
        self._lost = False  # a read found that the host does not take what was kept back
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._handle = self._ask("pyenclave_file_open", name, write, create, exclusive)

    def _ask(self, function: str, *values: Any) -> Any:
        from pyenclave.trusted._ocall import call_host

        try:
            return call_host(function, *values)
        except OcallError as error:
            if error.type == "FileBusyError":
                raise FileBusyError(f"the sealed file {self._name!r} is locked") from None
            kind = _KINDS.get(error.type or "", OSError)
            raise kind(5, f"the host: {error.type or error}", self._name) from None

    def pread(self, into: memoryview, offset: int) -> int:
        """Read to *into*; as much as is at hand, or crosses at once."""
        with self._lock:
            try:
                self._hand_on()
            except BaseException:
                # Who reads is told, but who wrote was told that it is written.
                self._lost = True
                raise
            stream = self._stream(len(into), offset)
            begin = offset - stream.at
            data = memoryview(stream.data)[begin : begin + len(into)]
            into[: len(data)] = data
            return len(data)

    def _stream(self, size: int, offset: int) -> _Stream:
        """Have at hand what is at *offset*, and more if a reader goes on there."""
        for stream in self._streams:
            if stream.at <= offset < stream.at + len(stream.data):
                return stream
        for stream in self._streams:
            end = stream.at + len(stream.data)
            if 0 <= offset - end <= _NEAR and offset - end + size <= self._chunk:
                stream.window = min(2 * stream.window, self._chunk)
                data = self._fetch(max(offset - end + size, stream.window), end)
                stream.at, stream.data = end, data
                break
        else:
            stream = _Stream(offset, self._fetch(size, offset), _WINDOW)
            self._streams.append(stream)
            del self._streams[:-_STREAMS]
        return stream

    def _fetch(self, size: int, offset: int) -> bytes:
        wanted = min(size, self._chunk)
        data: bytes = self._ask("pyenclave_file_read", self._handle, offset, wanted)
        if len(data) > wanted:
            raise OSError(5, "the host returned more than was asked for", self._name)
        return data

    def pwrite(self, data: memoryview, offset: int) -> int:
        """Write as much of *data* as crosses at once; together with what was written before it."""
        with self._lock:
            self._streams.clear()
            joins = offset == self._behind_at + len(self._behind)
            if not joins or len(self._behind) >= self._chunk:
                self._hand_on()
            if not self._behind:
                self._behind_at = offset
            part = data[: self._chunk - len(self._behind)]
            self._behind += part
            return len(part)

    def _hand_on(self) -> None:
        """Write what was kept back. What fails is lost, as with any cache of a disk; see fsync."""
        data, self._behind = bytes(self._behind), bytearray()
        at = self._behind_at
        while data:
            count: int = self._ask("pyenclave_file_write", self._handle, at, data)
            if not 0 < count <= len(data):
                raise OSError(5, "the host wrote more or less than was given", self._name)
            data, at = data[count:], at + count

    def _control(self, what: int, value: int = 0) -> int:
        with self._lock:
            self._streams.clear()
            self._hand_on()
            answer: int = self._ask("pyenclave_file_control", self._handle, what, value)
            return answer

    def truncate(self, size: int) -> None:
        """Make it *size* bytes long."""
        self._control(files.TRUNCATE, size)

    def fsync(self) -> None:
        """Ask the host to make it durable; that it did is its word."""
        lost, self._lost = self._lost, False
        if lost:
            raise OSError(5, "the host did not take what was written before", self._name)
        self._control(files.SYNC)

    def size(self) -> int:
        """Return the length that the host says."""
        size = self._control(files.SIZE)
        if not 0 <= size < 1 << 63:
            raise OSError(5, "the host says an impossible size", self._name)
        return size

    def lock(self, *, exclusive: bool) -> None:
        """Ask the host for the lock."""
        self._control(files.LOCK_WRITER if exclusive else files.LOCK_SHARED)

    def close(self) -> None:
        """Let the host close it."""
        if self._handle is not None:
            try:
                self._control(files.CLOSE)
            finally:
                self._handle = None


def _letters(mode: str) -> str:
    """Return the mode without ``b`` and ``t``: what the file must be opened for."""
    letters = str(mode).replace("b", "", 1).replace("t", "", 1)
    if letters.replace("+", "", 1) not in ("r", "w", "x", "a"):
        raise ValueError(f"mode: expected one of r, w, x, a with +, b or t, found {mode!r}")
    return letters[letters[0] == "+" :] + letters[: letters[0] == "+"]


def _page_of(blob: bytes) -> bytes:
    return (_MAGIC + blob).ljust(_PAGE, b"\0")


def _open_page(store: Any, name: bytes) -> bytes:
    """Return the file's key, from the page in front of it."""
    from pyenclave.sealed.file_store import read_fully
    from pyenclave.trusted._api import unseal

    page = bytearray(_PAGE)
    read_fully(store, memoryview(page), 0, "the page of its key")
    if page[: len(_MAGIC)] != _MAGIC:
        raise UnsealError(
            "the file has no key of an enclave",
            expected=_MAGIC.hex(),
            found=bytes(page[: len(_MAGIC)]).hex(),
            advice="A file that was sealed under a key of its own is opened with key=.",
        )
    end = len(_MAGIC) + _BLOB_SIZE
    if any(page[end:]):
        raise UnsealError("the page of the file's key has more than a key")
    key = unseal(bytes(page[len(_MAGIC) : end]), aad=_LABEL + name)
    if len(key) != _KEY_SIZE:
        raise UnsealError("the file's key has another size", expected=_KEY_SIZE)
    return key


def _make_page(store: Any, policy: SealPolicy | None, name: bytes) -> bytes:
    """Make a key for a new file, and store it durably before anything is sealed under it."""
    import hmac

    from pyenclave.sealed.file_store import write_fully
    from pyenclave.trusted._api import seal

    # Two sources, as for every secret of a launch: a generator that repeats is not enough.
    key = hmac.digest(_state.current().secret, _LABEL + os.urandom(_KEY_SIZE), "sha256")
    blob = seal(key, policy=policy, aad=_LABEL + name)
    store.truncate(0)
    write_fully(store, memoryview(_page_of(blob)), 0)
    store.fsync()
    return key


def open_sealed(
    path: Any,
    mode: str = "rb",
    *,
    key: SealPolicy | bytes | Any = None,
    name: bytes = b"",
    **options: Any,
) -> Any:
    """
    Open a sealed file from inside, as `pyenclave.open_sealed` does outside.

    The bytes lie with the host, which sees ciphertext, sizes, and which pages are used when. It
    can only keep them back, or, without a counter, put an older copy of the whole file in place.
    Works in a thread that serves a call, like every use of the host.

    Args:
        path: A name of ``[seal] files``, or ``"name/file"`` where a folder is lent for it; or a
            store (`pyenclave.sealed.file_store.Store`).
        mode: As for `open`.
        key: Who may open the file: a policy, by default the image's ``[seal]`` policy. The file
            then has a key of its own, sealed in front of it. Or 32 bytes, or a key object.
        name: What the file is called; it opens under the same name only.
        options: ``counter=`` (`trusted.Counter`) and others, as for `pyenclave.open_sealed`.

    Raises:
        NotInEnclaveError: Outside an enclave.
        UnsealError: Not authentic, or sealed for another enclave or a newer version.
        RollbackError: Not the file that the counter names.
        SealingError: The image names no such file.
        OSError: What the host answers.

    """
    runtime = _state.current()
    try:
        from pyenclave.sealed.file_store import is_store
    except ModuleNotFoundError:
        raise SealingError(
            "the image has no sealed files",
            advice='Name them in the manifest: [seal] files = ["data"].',
        ) from None
    base = _letters(mode)
    if isinstance(path, str):
        top = path.partition("/")[0]
        if top not in runtime.files:
            raise SealingError(
                f"the image names no sealed file {top!r}",
                expected=", ".join(runtime.files) or "none",
                advice='Name it in the manifest: [seal] files = ["data"].',
            )
        store: Any = _HostFile(
            path,
            write=base != "r",
            create=base[0] in "wa",
            exclusive=base.startswith("x"),
        )
    elif is_store(path):
        store = path
    else:
        raise TypeError(f"path: a name of [seal] files, or a store, not {type(path).__name__}")
    if key is not None and not isinstance(key, SealPolicy):
        return _opened(store, store, mode, key, name, options)
    try:
        store.lock(exclusive=base != "r")
        size = store.size()
        if base.startswith("x") and size:
            raise FileExistsError(17, "the file is there", str(path))
        secret = None
        if size > _PAGE or base[0] == "r":
            try:
                secret = _open_page(store, name)
            except UnsealError:
                if base[0] != "w":
                    raise  # as `open`, "w" takes whatever is there away
        if secret is None:
            secret = _make_page(store, key, name)
    except BaseException:
        store.close()
        raise
    from pyenclave.sealed.file_store import behind

    return _opened(behind(store, _PAGE), store, mode, secret, name, options)


def _opened(
    store: Any, inner: Any, mode: str, key: Any, name: bytes, options: dict[str, Any]
) -> Any:
    from pyenclave.sealed.file import open_sealed as open_file

    try:
        return open_file(store, mode, key=key, name=name, **options)
    except BaseException:
        inner.close()
        raise
