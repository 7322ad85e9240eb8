"""
A service's own secret: what protects keys that lie in the database.

A text file of mode 0600: a first line that names the format, then one 256-bit key a line in
hexadecimal, the newest first. The newest protects, every one opens. Instances that share a
database share this file. Who can read it can open what it protects; keep it off the database's
backups, or in a TEE's memory by `Secrets.ephemeral`.
"""

from __future__ import annotations

import contextlib
import os
import stat
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
        self._keys = _read(self.path) or _create(self.path)

    @classmethod
    def ephemeral(cls) -> Self:
        """Return secrets that live in this process only; what they protect is lost with it."""
        self = cls.__new__(cls)
        self.path = None
        self._keys = (os.urandom(_KEY),)
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
        salt = os.urandom(_SALT)
        header = _MAGIC + _key_id(self._keys[0]) + salt
        key = _derive(self._keys[0], salt, b"secrets-v1", _KEY)
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
        for key in self._keys:
            if _key_id(key) == wanted:
                inner = _derive(key, header[-_SALT:], b"secrets-v1", _KEY)
                try:
                    return AESGCM(inner).decrypt(bytes(12), blob[_HEADER:], header + context)
                except InvalidTag:
                    raise UnsealError("a protected secret: changed, or for another use") from None
        raise UnsealError(
            "a protected secret: of another service key",
            expected=" or ".join(_key_id(key).hex() for key in self._keys),
            found=wanted.hex(),
            advice="Give this instance the secrets file of the one that wrote it.",
        )

    def rotate(self) -> None:
        """Put a fresh key before the others, on disk first; older blobs still open."""
        if len(self._keys) >= _MAX_KEYS:
            raise StorageError("the secrets file has no room for a key", expected=_MAX_KEYS)
        keys = (os.urandom(_KEY), *self._keys)
        if self.path is not None:
            temporary = _write_beside(self.path, keys)
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)
        self._keys = keys


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
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
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
