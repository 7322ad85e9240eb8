"""
AES-256-GCM for blobs, under a key that seals exactly one message.

The nonce is therefore fixed. This is the only place of the package that chooses an implementation:
the core's, which wipes its copy of the key.
"""

from __future__ import annotations

from typing import Final

from pyenclave._core import Gcm
from pyenclave.errors import UnsealError

__all__ = ["decrypt", "encrypt"]

_NONCE: Final = bytes(12)


def encrypt(key: bytes, data: bytes | memoryview, aad: bytes) -> bytes:
    """Return ciphertext and 16-byte tag. *key* is 32 bytes and must never be used again."""
    with Gcm(key) as gcm:
        return gcm.seal(_NONCE, data, aad)


def decrypt(key: bytes, sealed: bytes | memoryview, aad: bytes) -> bytes | None:
    """Return the plaintext, or None if the tag does not hold (nothing is released then)."""
    with Gcm(key) as gcm:
        try:
            return gcm.open(_NONCE, sealed, aad)
        except UnsealError:
            return None
