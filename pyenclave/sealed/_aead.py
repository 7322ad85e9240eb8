"""
AES-256-GCM for blobs, under a key that seals exactly one message.

The nonce is therefore fixed. This is the only place of the package that chooses an implementation.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["decrypt", "encrypt"]

_NONCE = bytes(12)


def encrypt(key: bytes, data: bytes | memoryview, aad: bytes) -> bytes:
    """Return ciphertext and 16-byte tag. *key* is 32 bytes and must never be used again."""
    return AESGCM(key).encrypt(_NONCE, data, aad)


def decrypt(key: bytes, sealed: bytes | memoryview, aad: bytes) -> bytes | None:
    """Return the plaintext, or None if the tag does not hold (nothing is released then)."""
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, aad)
    except InvalidTag:
        return None
