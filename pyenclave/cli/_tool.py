"""
The tool enclave: built when it is first needed, kept in the state directory.

It seals files that it asks the host for, slice by slice; `HostFiles` answers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyenclave._files import open_file, read_file
from pyenclave._locks import Lock
from pyenclave._platform.state import State
from pyenclave.cli import output
from pyenclave.errors import ArgumentError, ImageError, PlatformUnavailableError, RuntimeLockError
from pyenclave.formats.image import MAX_IMAGE, Image
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest
from pyenclave.measurement.image import verify_image
from pyenclave.measurement.sgx import mrsigner

__all__ = [
    "LIMIT",
    "THREADS",
    "Exchange",
    "HostFiles",
    "check_key",
    "identity",
    "tool_enclave",
    "write_file",
]

LIMIT: Final = 1 << 30  # bytes of one blob
THREADS: Final = 4  # files at a time
_MESSAGE: Final = LIMIT + (1 << 16)  # bytes of one call: a blob and what is beside it
_PRODUCT: Final = 0x5045
_VERSION: Final = 1
_MAX_KEY: Final = 64 << 10
_KEY: Final = "tool-signing-key.pem"
_IMAGE: Final = "tool.enclave"
_ENTRY: Final = Path(__file__).with_name("_tool_enclave.py")


def _build(key: bytes) -> bytes:
    manifest = Manifest(
        name="pyenclave-tool",
        entry=_ENTRY,
        product_id=_PRODUCT,
        security_version=_VERSION,
        threads=THREADS,
        message=_MESSAGE,
    )
    return sign.sign(build.build_manifest(manifest), key)


def _key(path: Path) -> bytes:
    if not path.exists():
        keys.write_new(path, keys.keygen())
    return read_file(path, limit=_MAX_KEY)


def _signer(key: bytes) -> bytes:
    modulus = keys.load_private(key).public_key().public_numbers().n
    return mrsigner(modulus.to_bytes(keys.KEY_BITS // 8, "little"))


def check_key(path: str) -> None:
    """
    Refuse a file that is no signing key, before anything is built or launched.

    A pipe of the shell is left to who uses the key: what is read of it is gone.

    Raises:
        ImageError: It is none.
        OSError: It cannot be read.

    """
    fd = open_file(path, pipes=True)
    try:
        piped = not stat.S_ISREG(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
    if not piped:
        _signer(read_file(path, limit=_MAX_KEY))


def _usable(path: Path, key: bytes) -> bytes | None:
    """Return the kept image if it is this version's and signed with *key*."""
    try:
        data = read_file(path, limit=MAX_IMAGE)
        image = Image.parse(data)
        signed = verify_image(image)
    except (OSError, ImageError):
        return None
    wanted = (_signer(key), _PRODUCT, _VERSION)
    same = (
        (signed.mrsigner, signed.product_id, signed.security_version) == wanted
        and bytes(image.files.get(f"entry/{_ENTRY.name}", b"")) == _ENTRY.read_bytes()
        and image.info.message_limit == _MESSAGE
        and image.info.threads == THREADS
    )
    return data if same else None


def _image(*, rebuild: bool, quiet: bool, signing_key: str | None = None) -> bytes:
    progress = output.Progress(quiet=quiet)
    with State.open() as state:
        if not state.writable:
            raise PlatformUnavailableError(
                f"state directory {state.path} is not writable",
                advice="The tool enclave's key is kept there; set PYENCLAVE_STATE.",
            )
        with state.lock("tool.lock"):
            if signing_key is None:
                key = _key(Path(state.path, _KEY))
                path = Path(state.path, _IMAGE)
            else:
                key = read_file(signing_key, limit=_MAX_KEY)
                path = Path(state.path, f"tool-{_signer(key).hex()[:32]}.enclave")
            data = None if rebuild else _usable(path, key)
            if data is None:
                progress.step("building the tool enclave for this runtime (once)")
                data = _build(key)
                build.write_image(path, data)
                progress.done()
            return data


@dataclass(frozen=True, slots=True)
class Exchange:
    """
    What the enclave may do for one file.

    Attributes:
        fd: Descriptor of the sealed file.
        start: Where in it the sealed file begins; what lies before is out of reach.
        take: Returns the next plaintext, at most so many bytes.
        give: Is given the next plaintext.

    """

    fd: int
    start: int
    take: Callable[[int], bytes] | None = None
    give: Callable[[bytes], None] | None = None


class HostFiles:
    """Answers the tool enclave's ocalls, for the files that are open to it and no others."""

    def __init__(self) -> None:
        self._open: dict[int, Exchange] = {}
        self._numbers = itertools.count(1)
        self._lock = Lock()

    @contextlib.contextmanager
    def opened(self, exchange: Exchange) -> Iterator[int]:
        """Let the enclave have *exchange* under the number that is returned."""
        with self._lock:
            number = next(self._numbers)
            self._open[number] = exchange
        try:
            yield number
        finally:
            with self._lock:
                del self._open[number]

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return a handler for each ocall."""
        return {
            "file_read": self._read,
            "file_write": self._write,
            "file_truncate": self._truncate,
            "file_sync": lambda handle: os.fsync(self._open[handle].fd),
            "file_size": self._size,
            "take": self._take,
            "give": self._give,
        }

    def _read(self, handle: int, offset: int, length: int) -> bytes:
        exchange = self._open[handle]
        return os.pread(exchange.fd, length, exchange.start + offset)

    def _write(self, handle: int, offset: int, data: bytes) -> None:
        exchange = self._open[handle]
        view, at = memoryview(data), exchange.start + offset
        while view:
            done = os.pwrite(exchange.fd, view, at)
            view, at = view[done:], at + done

    def _truncate(self, handle: int, size: int) -> None:
        exchange = self._open[handle]
        os.ftruncate(exchange.fd, exchange.start + size)

    def _size(self, handle: int) -> int:
        exchange = self._open[handle]
        return max(0, os.fstat(exchange.fd).st_size - exchange.start)

    def _take(self, handle: int, length: int) -> bytes:
        take = self._open[handle].take
        if take is None:
            raise ArgumentError("this file is being opened, not sealed")
        return take(length)

    def _give(self, handle: int, data: bytes) -> None:
        give = self._open[handle].give
        if give is None:
            raise ArgumentError("this file is being sealed, not opened")
        give(data)


def identity(signing_key: str | None = None) -> tuple[bytes, bytes, int, int]:
    """Return measurement, signer, product and security version of the tool enclave."""
    signed = verify_image(Image.parse(_image(rebuild=False, quiet=True, signing_key=signing_key)))
    return signed.mrenclave, signed.mrsigner, signed.product_id, signed.security_version


@contextlib.contextmanager
def tool_enclave(
    *, quiet: bool = False, files: HostFiles | None = None, signing_key: str | None = None
) -> Iterator[Enclave]:
    """
    Launch the tool enclave; it is built anew if the runtime changed since.

    Args:
        quiet: Say nothing about that.
        files: Answers its ocalls; without, it has no files.
        signing_key: File of another signing key than the state directory's.

    """
    handlers = (files or HostFiles()).handlers()
    enclave = Enclave(_image(rebuild=False, quiet=quiet, signing_key=signing_key), ocalls=handlers)
    try:
        enclave.start()
    except RuntimeLockError:
        enclave.close()
        enclave = Enclave(
            _image(rebuild=True, quiet=quiet, signing_key=signing_key), ocalls=handlers
        )
        enclave.start()
    try:
        yield enclave
    finally:
        enclave.close()


def write_file(path: str | os.PathLike[str], data: bytes, *, force: bool) -> None:
    """
    Write a file of mode 0600 as a whole: nobody ever sees a part of it.

    Raises:
        FileExistsError: It is there and *force* is not given.

    """
    target = Path(path)
    if not force and os.path.lexists(target):
        raise FileExistsError(17, "the file exists (--force replaces it)", str(target))
    build.check_replaceable(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise  # it is somebody else's, and named
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if force:
            os.replace(aside, target)
        else:
            os.link(aside, target)  # fails if somebody made it meanwhile
            os.unlink(aside)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        if isinstance(error, OSError):  # the caller named this file, not the one beside it
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise
