"""
What seals and opens one file: a raw key in this process, or the tool enclave.

Both make sealed files of the same format; the tool enclave's begin with an envelope, since nobody
but that enclave has the file's key (``pyenclave.formats.wrapped``). Old blobs are opened too.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, runtime_checkable

from pyenclave.cli import _tool
from pyenclave.errors import (
    ArgumentError,
    EcallError,
    OcallError,
    SealingError,
    UnsealError,
)
from pyenclave.formats import sealed as blob_format
from pyenclave.formats import sealed_file, wrapped
from pyenclave.host import Enclave
from pyenclave.sealed._held import HeldKey
from pyenclave.sealed.file import FileStore, open_sealed
from pyenclave.sealed.file_engine import SealedEngine

__all__ = [
    "SLICE",
    "EnclaveSealer",
    "KeySealer",
    "Recognizer",
    "Sealer",
    "as_unseal",
    "check_form",
    "erase_place",
    "form_of",
    "from_descriptor",
    "read_all",
    "write_envelope",
]

SLICE: Final = 1 << 20  # bytes at once
_LIST_LABEL: Final = b"pyenclave/list\0"  # before the name of lists; an argument holds no NUL
_HEAD: Final = 16384

Take = Callable[[int], bytes]
Give = Callable[[bytes], None]


def form_of(fd: int) -> str:
    """
    Return what a file is: ``wrapped``, ``encrypted``, ``file``, ``blob`` or, if none, nothing.

    Only the first bytes are looked at; nothing is verified.
    """
    head = os.pread(fd, _HEAD, 0)
    if head.startswith(blob_format.MAGIC):
        return "blob"
    with contextlib.suppress(UnsealError):
        return "encrypted" if wrapped.newest(head).of_vault else "wrapped"
    if any(head[at : at + 8] == sealed_file.MAGIC for at in sealed_file.HEADER_PLACES):
        return "file"
    return "wrapped" if head.startswith(wrapped.MAGIC) else ""


def read_all(fd: int, limit: int) -> bytes:
    """
    Return the content of a file from its begin.

    Raises:
        ArgumentError: It is longer than *limit* bytes.

    """
    parts, size = [], 0
    while data := os.pread(fd, SLICE, size):
        parts.append(data)
        size += len(data)
        if size > limit:
            raise ArgumentError("the file is too long", expected=f"at most {limit} bytes")
    return b"".join(parts)


class Sealer(Protocol):
    """Seals and opens files; several at a time."""

    jobs: int
    form: str

    def seal(self, take: Take, target: int, *, listing: bool = False) -> bytes:
        """Seal what *take* gives to the empty file *target*, durably; return the file's id."""

    def open(self, source: int, give: Give, *, listing: bool = False) -> bytes:
        """Open *source* and give what is in it; return the file's id."""


@runtime_checkable
class Recognizer(Protocol):
    """A sealer that may not open what it makes."""

    def recognised(
        self, there: int, source: int, tick: Callable[[int], None]
    ) -> tuple[bytes | None, bool]:
        """Return the id of the file that is there if it holds *source*, and if that is a guess."""


class KeySealer:
    """
    Seals with 32 bytes that this process has.

    Args:
        key: The key.
        name: What the files are bound to.

    """

    form = "file"

    def __init__(self, key: HeldKey, name: bytes) -> None:
        self._key = key
        self._name = name
        self.jobs = 2 * (os.cpu_count() or 1)

    def _bound(self, listing: bool) -> bytes:
        return _LIST_LABEL + self._name if listing else self._name

    def _given(self) -> Any:
        """Return what is given as key to open a file."""
        return self._key.reveal()

    def _making(self) -> Any:
        """Return what is given as key to make one."""
        return self._given()

    def _refuse(self, source: int) -> SealingError:
        return _wrong_form(source)

    def seal(self, take: Take, target: int, *, listing: bool = False) -> bytes:
        path, name = f"/proc/self/fd/{target}", self._bound(listing)
        try:
            with open_sealed(path, "wb", key=self._making(), name=name) as file:
                while data := take(SLICE):
                    file.write(data)
                return _id_of(file)
        except SealingError as error:  # what closing says after a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def reader(self, source: int, *, listing: bool = False) -> Any:
        """Return the open sealed file, to be closed."""
        if form_of(source) != self.form:
            raise self._refuse(source)
        path, name = f"/proc/self/fd/{source}", self._bound(listing)
        return open_sealed(path, "rb", key=self._given(), name=name)

    def open(self, source: int, give: Give, *, listing: bool = False) -> bytes:
        with self.reader(source, listing=listing) as file:
            while data := file.read(SLICE):
                give(data)
            return _id_of(file)

    def copy(
        self, old: Any, target: int, tick: Callable[[int], None], *, listing: bool = False
    ) -> None:
        """Seal what is in *old* to the empty file *target*, as a file of the same id and pages."""
        engine = SealedEngine(
            FileStore(f"/proc/self/fd/{target}", write=True),
            key=self._given(),
            name=self._bound(listing),
            write=True,
            create=True,
            truncate=True,
            page_size=old.page_size,
            file_id=_id_of(old),
        )
        at = 0
        try:
            while data := old.read(SLICE):
                at += engine.write(at, memoryview(data))
                tick(len(data))
        except BaseException:
            engine.close(commit=False)
            raise
        engine.close()


def check_form(fd: int, *, by_key: bool) -> None:
    """
    Refuse what the key or the enclave cannot open, whatever is in it.

    Raises:
        UnsealError: It was sealed in another way, or is malformed, or no sealed file.

    """
    form = form_of(fd)
    if by_key != (form == "file") or form == "encrypted":
        raise _wrong_form(fd)
    if form == "blob":
        blob_format.split(read_all(fd, _tool.LIMIT + 4096))
    elif form == "wrapped":
        wrapped.newest(os.pread(fd, wrapped.HEAD_SIZE, 0))
    elif not by_key:
        raise _wrong_form(fd)


def _id_of(file: Any) -> bytes:
    """Return the id of an open sealed file: that of the header which was authenticated."""
    return bytes(file.raw.engine.header.file_id)


def _wrong_form(fd: int) -> SealingError:
    form = form_of(fd)
    if form in ("wrapped", "blob"):
        return UnsealError(
            "the file was sealed by the tool enclave", advice="Leave --key-file out."
        )
    if form == "encrypted":
        return UnsealError(
            "the file is encrypted to a key of a vault",
            advice="pyenclave decrypt opens it; pyenclave encrypt --rewrap changes its key.",
        )
    if form == "file":
        return UnsealError(
            "the file was sealed with a key", advice="Name that key's file with --key-file."
        )
    return UnsealError("this is no sealed file: neither blob, nor sealed file, nor wrapped one")


@contextlib.contextmanager
def as_unseal() -> Iterator[None]:
    """Errors of the enclave as they are named here; those of our own handlers as they were."""
    try:
        yield
    except OcallError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
    except EcallError as error:
        if error.type != "PublicError":
            raise
        raise UnsealError(error.message) from None


class EnclaveSealer:
    """
    Seals in the tool enclave, which alone has the keys.

    Args:
        enclave: The tool enclave.
        files: What answers its ocalls.
        policy: ``signer`` or ``unique``.
        aad: Additional data, or None.

    """

    form = "wrapped"
    jobs = _tool.THREADS

    def __init__(
        self, enclave: Enclave, files: _tool.HostFiles, policy: str, aad: bytes | None
    ) -> None:
        self.enclave = enclave
        self.policy = policy
        self._files = files
        self.bound = (b"", False) if aad is None else (aad, True)

    def seal(self, take: Take, target: int, *, listing: bool = False) -> bytes:
        exchange = _tool.Exchange(target, wrapped.HEAD_SIZE, take=take)
        with self._files.opened(exchange) as number, as_unseal():
            envelope, file_id = self.enclave.call(
                "seal_file", number, self.policy, *self.bound, listing
            )
        write_envelope(target, wrapped.Envelope(2, envelope))
        return bytes(file_id)

    def open(self, source: int, give: Give, *, listing: bool = False) -> bytes:
        form = form_of(source)
        if form == "blob" and not listing:
            return self._open_blob(source, give)
        if form != "wrapped":
            raise _wrong_form(source)
        envelope = wrapped.newest(os.pread(source, wrapped.HEAD_SIZE, 0))
        exchange = _tool.Exchange(source, wrapped.HEAD_SIZE, give=give)
        with self._files.opened(exchange) as number, as_unseal():
            found = self.enclave.call("unseal_file", number, envelope.blob, *self.bound, listing)
        return bytes(found)

    def _open_blob(self, source: int, give: Give) -> bytes:
        blob = read_all(source, _tool.LIMIT + 4096)
        blob_format.split(blob)  # what is no blob is refused without a call
        with as_unseal():
            data = memoryview(self.enclave.call("unseal_blob", blob, *self.bound))
        for at in range(0, len(data), SLICE):
            give(bytes(data[at : at + SLICE]))
        return b""


def write_envelope(fd: int, envelope: wrapped.Envelope) -> None:
    """Write one place of the head, durably; the other place is left as it is."""
    data = memoryview(envelope.to_bytes())
    at = envelope.offset
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done
    os.fsync(fd)


def erase_place(fd: int, envelope: wrapped.Envelope) -> None:
    """Erase the place of an envelope that another one has replaced, durably."""
    os.pwrite(fd, bytes(wrapped.PLACE_SIZE), envelope.offset)
    os.fsync(fd)


def from_descriptor(fd: int, tick: Callable[[int], None]) -> Take:
    """Return what takes the content of a descriptor, from where it stands."""
    file = io.FileIO(fd, "rb", closefd=False)

    def take(length: int) -> bytes:
        data = file.read(length) or b""
        tick(len(data))
        return data

    return take
