"""
Signing keys: RSA with 3072 bits and exponent 3, the one kind that SIGSTRUCT knows.

A key lives in a PEM file of its owner, mode 0600; an HSM's key never comes here (``sign.py``).
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.errors import SignatureError

__all__ = [
    "EXPONENT",
    "KEY_BITS",
    "keygen",
    "load_private",
    "load_public",
    "public_pem",
    "write_new",
]

KEY_BITS = 3072
EXPONENT = 3


def keygen(passphrase: bytes | None = None) -> bytes:
    """
    Make a signing key.

    Args:
        passphrase: Encrypts the PEM text, if given.

    Returns:
        The private key as PKCS #8 PEM.

    Raises:
        ValueError: The passphrase is empty.

    """
    if passphrase is not None and not passphrase:
        raise ValueError("the passphrase is empty")
    key = rsa.generate_private_key(public_exponent=EXPONENT, key_size=KEY_BITS)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def load_private(pem: bytes, passphrase: bytes | None = None) -> rsa.RSAPrivateKey:
    """
    Read a signing key.

    Args:
        pem: The private key.
        passphrase: If it is encrypted.

    Raises:
        SignatureError: It is not a key that can sign images, or the passphrase is wrong.

    """
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError as error:  # a passphrase is missing, or too many
        raise SignatureError(f"signing key cannot be read: {error}") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if b"PRIVATE KEY-----" in pem:
            raise SignatureError(f"signing key cannot be read: {error}") from None
        raise SignatureError(
            "signing key cannot be read",
            expected="a private key in PEM form",
            found=f"{len(pem)} bytes without one",
            advice="`pyenclave keygen -o FILE` makes one.",
        ) from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise _other_kind(type(key).__name__)
    _check(key.public_key())
    return key


def load_public(pem: bytes) -> rsa.RSAPublicKey:
    """
    Read the public half of a signing key.

    Raises:
        SignatureError: It is not the key of an image's signer.

    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"public key cannot be read: {error}") from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise _other_kind(type(key).__name__)
    _check(key)
    return key


def public_pem(private_pem: bytes, passphrase: bytes | None = None) -> bytes:
    """Return the public half of a private key as PEM."""
    key = load_private(private_pem, passphrase).public_key()
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def write_new(path: str | Path, pem: bytes) -> None:
    """
    Write a private key into a new file of mode 0600, whatever the umask, whole or not at all.

    It has no name until it is whole: a full disk or a kill leaves no part of a key that would be
    taken for one. Where the file system knows no files without names, a failure removes it.

    Args:
        path: Where; nothing may be there.
        pem: The key.

    Raises:
        FileExistsError: Something is there. A key is never overwritten.
        OSError: It cannot be written.

    """
    path = Path(path)
    try:
        if os.path.lexists(path):  # `link` and O_EXCL look again
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if not _write_nameless(path, pem):
            _write_named(path, pem)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_nameless(path: Path, pem: bytes) -> bool:
    """Write the key and then name it; False where that cannot be done."""
    if not os.path.isdir("/proc/self/fd"):  # without it no name can be given
        return False
    # Not for reading: who may write to a folder may not be allowed to list it.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            _fill(file, pem)
            # With a folder's descriptor `link` follows the link that /proc has.
            os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder)
    except OSError as error:
        # EISDIR is what kernels and file systems say that do not know the flag.
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return False
        raise
    finally:
        os.close(folder)
    return True


def _write_named(path: Path, pem: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            _fill(file, pem)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _fill(file: BinaryIO, data: bytes) -> None:
    os.fchmod(file.fileno(), 0o600)
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _check(key: rsa.RSAPublicKey) -> None:
    exponent = key.public_numbers().e
    if key.key_size != KEY_BITS or exponent != EXPONENT:
        raise _other_kind(f"RSA-{key.key_size}, e = {exponent}")


def _other_kind(found: str) -> SignatureError:
    return SignatureError(
        "this key cannot sign images",
        expected=f"RSA-{KEY_BITS}, e = {EXPONENT}",
        found=found,
        advice="Make one with `pyenclave keygen`.",
    )
