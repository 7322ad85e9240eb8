"""
Encrypted parts of an image: code and data that open inside only, after the data key is there.

The byte-exact description is ``docs/formats/encrypted-part.md``. Encryption is deterministic, so
that an image is a function of its inputs, the data key among them: the key of a part comes from
what is in it, so no two contents ever share one.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final

from pyenclave.errors import UnsealError
from pyenclave.sealed import _aead

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["KEY_SIZE", "MAGIC", "OVERHEAD", "check_value", "decrypt", "encrypt", "root_of"]

MAGIC: Final = b"PYEPART\x01"
KEY_SIZE: Final = 32
_SALT: Final = 32
_HEAD: Final = len(MAGIC) + _SALT
OVERHEAD: Final = _HEAD + 16
_LABEL: Final = b"pyenclave/part/1"


def root_of(data_key: Buffer) -> bytes:
    """
    Return the secret that all keys of an image's parts derive from.

    Raises:
        ValueError: *data_key* has not 32 bytes.

    """
    key = bytes(data_key)
    if len(key) != KEY_SIZE:
        raise ValueError(f"a data key has {KEY_SIZE} bytes, not {len(key)}")
    return hmac.digest(_LABEL, key, "sha256")


def check_value(root: bytes) -> bytes:
    """Return 32 bytes that commit to the data key and say nothing of it: they are in the image."""
    return hmac.digest(root, _LABEL + b"/check\x01", "sha256")


def _named(name: str) -> bytes:
    data = name.encode()
    return len(data).to_bytes(2, "little") + data


def _salt(root: bytes, name: str, data: Buffer) -> bytes:
    secret = hmac.digest(root, _LABEL + b"/salt\x01", "sha256")
    made = hmac.new(secret, _named(name), "sha256")
    made.update(data)
    return made.digest()


def _key(root: bytes, name: str, salt: bytes) -> bytes:
    return hmac.digest(root, _LABEL + b"/key" + salt + _named(name) + b"\x01", "sha256")


def encrypt(root: bytes, name: str, data: bytes) -> bytes:
    """
    Encrypt a part.

    Args:
        root: What `root_of` gave.
        name: The part's name in the image; it opens under the same name only.
        data: Its content.

    Returns:
        56 bytes more; the same for the same arguments.

    """
    salt = _salt(root, name, data)
    return MAGIC + salt + _aead.encrypt(_key(root, name, salt), data, MAGIC + salt + _named(name))


def decrypt(root: bytes, name: str, part: Buffer) -> bytes:
    """
    Open what `encrypt` made.

    Raises:
        UnsealError: Not authentic under this key and name.

    """
    view = memoryview(part)
    salt = bytes(view[len(MAGIC) : _HEAD])
    data = None
    if len(view) >= OVERHEAD and bytes(view[: len(MAGIC)]) == MAGIC:
        aad = MAGIC + salt + _named(name)
        data = _aead.decrypt(_key(root, name, salt), view[_HEAD:], aad)
    # The salt is a MAC of the content too: a part opens under one key and as one content.
    if data is None or not hmac.compare_digest(_salt(root, name, data), salt):
        raise UnsealError("the encrypted part does not open", found=name)
    return data
