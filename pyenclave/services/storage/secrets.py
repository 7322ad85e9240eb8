"""
A service's own secret: what protects keys that lie in the database.

A text file of mode 0600: a first line that names the format, then one 256-bit key a line in
hexadecimal, the newest first. The newest protects, every one opens. Instances that share a
database share this file, and read it again when it was replaced: what is protected after another
process put a fresh key there is protected by that key. Who can read it can open what it protects;
keep it off the database's backups, or in a TEE's memory by `Secrets.ephemeral`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pyenclave.errors import StorageError, UnsealError

__all__ = ["Secrets"]

_FIRST_LINE: Final = b"pyenclave-secrets 1"
_MAGIC: Final = b"PYESEC1\0"
_KEY: Final = 32
_ID: Final = 8
_SALT: Final = 32
_TAG: Final = 16
_MAX_KEYS: Final = 64
_MAX_FILE: Final = 64 + _MAX_KEYS * (2 * _KEY + 1)
_HEADER: Final = len(_MAGIC) + _ID + _SALT


def _derive(key: bytes, salt: bytes, purpose: bytes, length: int) -> bytes:
    kdf = HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=b"pyenclave-" + purpose)
    return kdf.derive(key)


class Secrets:
    """
    Protects small secrets of a service under a key in a file.

    Each blob has a key of its own (HKDF-SHA-256 over 32 random bytes), so that AES-256-GCM never
    sees a nonce twice.

    Args:
        path: The file; it is made with a fresh key if there is none.

    Raises:
        StorageError: The file is a link, of somebody else, open to others, or malformed.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path | None = Path(path)
        self._seen = _stamp(self.path)  # before it is read: newer content is looked at again
        self._keys = _named(_read(self.path) or _create(self.path))

    @classmethod
    def ephemeral(cls) -> Self:
        """Return secrets that live in this process only; what they protect is lost with it."""
        self = cls.__new__(cls)
        self.path = None
        self._seen = None
        self._keys = _named((os.urandom(_KEY),))
        return self

    def __repr__(self) -> str:
        return f"Secrets({str(self.path) if self.path else 'ephemeral'})"

    def protect(self, data: bytes, context: bytes) -> bytes:
        """
        Encrypt and authenticate *data*.

        Args:
            data: The secret.
            context: What it is for; `open` must be given the same.

        """
        name, newest = next(iter(self._current().items()))
        salt = os.urandom(_SALT)
        header = _MAGIC + name + salt
        key = _derive(newest, salt, b"secrets-v1", _KEY)
        return header + AESGCM(key).encrypt(bytes(12), data, header + context)

    def open(self, blob: bytes, context: bytes) -> bytes:
        """
        Return what `protect` was given.

        Raises:
            UnsealError: Not of these secrets or this context, or changed.

        """
        blob = bytes(blob)
        if len(blob) < _HEADER + _TAG or not blob.startswith(_MAGIC):
            raise UnsealError("a protected secret: not its format")
        wanted = blob[len(_MAGIC) : len(_MAGIC) + _ID]
        header = blob[:_HEADER]
        key = self._keys.get(wanted) or self._current().get(wanted)
        if key is None:
            raise UnsealError(
                "a protected secret: of another service key",
                expected=" or ".join(name.hex() for name in self._keys),
                found=wanted.hex(),
                advice="Give this instance the secrets file of the one that wrote it.",
            )
        inner = _derive(key, header[-_SALT:], b"secrets-v1", _KEY)
        try:
            return AESGCM(inner).decrypt(bytes(12), blob[_HEADER:], header + context)
        except InvalidTag:
            raise UnsealError("a protected secret: changed, or for another use") from None

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The names of the keys, as blobs have them; the newest first."""
        return tuple(self._current())

    def is_newest(self, blob: bytes) -> bool:
        """Whether *blob* says that the newest key protects it; nothing is verified."""
        return bytes(blob).startswith(_MAGIC + self.ids[0])

    def knows(self, blob: bytes) -> bool:
        """Whether *blob* names one of these keys; nothing is verified."""
        name = bytes(blob)[len(_MAGIC) : len(_MAGIC) + _ID]
        return bytes(blob).startswith(_MAGIC) and name in self._current()

    def _current(self) -> dict[bytes, bytes]:
        """Return the keys; those of the file, if somebody replaced it."""
        if self.path is not None and (stamp := _stamp(self.path)) != self._seen:
            # A file that is away or wrong now is no reason to lose what this process knows.
            with contextlib.suppress(StorageError):
                keys = _read(self.path)
                self._keys = self._keys if keys is None else _named(keys)
                self._seen = stamp
        return self._keys

    def rotate(self) -> None:
        """
        Put a fresh key before the others, on disk first; older blobs still open.

        Raises:
            StorageError: There is no room, or the file cannot be written.

        """
        with self._writing():
            if len(self._keys) >= _MAX_KEYS:
                raise StorageError("the secrets file has no room for a key", expected=_MAX_KEYS)
            self._write((os.urandom(_KEY), *self._keys.values()))

    def forget(self, ids: Collection[bytes], *, newest: bytes) -> None:
        """
        Take keys out of the file, for ever; those that are not there are no error.

        Args:
            ids: Which, as `ids` names them.
            newest: The one that must be the newest now: of a rotation meanwhile nobody asked
                whether it needs these.

        Raises:
            StorageError: Another one is the newest, or the file cannot be written.

        """
        with self._writing():
            found = next(iter(self._keys))
            if found != newest or newest in ids:
                raise StorageError(
                    "the secrets file has another newest key",
                    expected=newest.hex(),
                    found=found.hex(),
                    advice="Somebody rotates it at the same time; run it again.",
                )
            self._write(tuple(key for name, key in self._keys.items() if name not in ids))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Have the file alone, and as it is now: two processes may rotate at once."""
        if self.path is None:
            yield
            return
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            keys = _read(self.path)
            if keys is None:
                raise StorageError("the secrets file vanished")
            self._keys = _named(keys)
            for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.{'[0-9a-f]' * 16}"):
                left.unlink(missing_ok=True)  # of a process that was killed: it has keys in it
            yield
        finally:
            os.close(folder)

    def _write(self, keys: tuple[bytes, ...]) -> None:
        if self.path is not None:
            temporary = _write_beside(self.path, keys)
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)
            self._seen = _stamp(self.path)
        self._keys = _named(keys)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from the one that replaces it; None: it is not there."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _named(keys: Sequence[bytes]) -> dict[bytes, bytes]:
    return {_key_id(key): key for key in keys}


def _key_id(key: bytes) -> bytes:
    return _derive(key, b"", b"secrets-id-v1", _ID)


def _read(path: Path) -> tuple[bytes, ...] | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("the secrets file cannot be read", found=error.strerror) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StorageError("the secrets file is no ordinary file")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise StorageError(
                "the secrets file is open to others",
                expected=f"owner {os.geteuid()}, mode 0600",
                found=f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}",
            )
        data = os.read(descriptor, _MAX_FILE + 1)
    finally:
        os.close(descriptor)
    lines = data.splitlines()
    try:
        keys = tuple(bytes.fromhex(line.decode("ascii")) for line in lines[1:])
    except ValueError:
        keys = ()
    good = lines[:1] == [_FIRST_LINE] and 1 <= len(keys) <= _MAX_KEYS
    if not good or len(data) > _MAX_FILE or any(len(key) != _KEY for key in keys):
        raise StorageError("the secrets file is malformed", expected=_FIRST_LINE.decode())
    return keys


def _create(path: Path) -> tuple[bytes, ...]:
    """Make the file whole or not at all; of two instances at once, both read the first one's."""
    temporary = _write_beside(path, (os.urandom(_KEY),))
    try:
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    keys = _read(path)
    if keys is None:
        raise StorageError("the secrets file vanished")
    return keys


def _write_beside(path: Path, keys: tuple[bytes, ...]) -> Path:
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o600)
        try:
            lines = (_FIRST_LINE, *(key.hex().encode() for key in keys), b"")
            os.write(descriptor, b"\n".join(lines))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError("the secrets file cannot be written", found=error.strerror) from None
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
