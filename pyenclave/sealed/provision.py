"""
Secrets sent to an enclave: HPKE (RFC 9180) with the hybrid KEM ML-KEM-768 + X25519.

An attacker who records ciphertext today and breaks X25519 later still faces ML-KEM. Both sides
live here, so that they cannot drift apart: the relying party's `encrypt` and the worker's
`RuntimeKey`.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from pyenclave.errors import UnsealError
from pyenclave.formats.evidence import RUNTIME_KEY_SIZE

__all__ = ["RuntimeKey", "encrypt"]

_MLKEM_SIZE: Final = 1184  # FIPS 203, ML-KEM-768 encapsulation key


def _suite() -> hpke.Suite:
    return hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def encrypt(secret: bytes, *, public_key: bytes, info: bytes) -> bytes:
    """
    Encrypt *secret* to a runtime public key.

    Args:
        secret: Any length; the ciphertext is 1,136 bytes longer.
        public_key: 1,216 bytes, ML-KEM-768 key then X25519 key.
        info: Bound: decryption needs the same bytes.

    Raises:
        ValueError: *public_key* is not a usable key.

    """
    if len(public_key) != RUNTIME_KEY_SIZE:
        raise ValueError(f"a runtime key has {RUNTIME_KEY_SIZE} bytes, not {len(public_key)}")
    recipient = hpke.MLKEM768X25519PublicKey(
        mlkem.MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_SIZE]),
        x25519.X25519PublicKey.from_public_bytes(public_key[_MLKEM_SIZE:]),
    )
    return _suite().encrypt(secret, recipient, info=info)


class RuntimeKey:
    """The runtime key of one launch: not copied out, not pickled, gone with the worker."""

    def __init__(self) -> None:
        post_quantum = mlkem.MLKEM768PrivateKey.generate()
        classic = x25519.X25519PrivateKey.generate()
        self._key: hpke.MLKEM768X25519PrivateKey | None = hpke.MLKEM768X25519PrivateKey(
            post_quantum, classic
        )
        self.public: Final = (
            post_quantum.public_key().public_bytes_raw() + classic.public_key().public_bytes_raw()
        )

    def decrypt(self, ciphertext: bytes, *, info: bytes) -> bytes:
        """
        Return the secret.

        Raises:
            UnsealError: Not encrypted to this key with this *info* (not told apart).

        """
        if self._key is None:
            raise UnsealError("the runtime key was wiped")
        try:
            return _suite().decrypt(ciphertext, self._key, info=info)
        except (InvalidTag, ValueError):
            raise UnsealError(
                "the secret does not open",
                advice="It was changed, or encrypted to another launch or another context.",
            ) from None

    def wipe(self) -> None:
        """Drop the private key; OpenSSL clears it when it frees it."""
        self._key = None

    def __repr__(self) -> str:
        return f"RuntimeKey({self.public[:8].hex()}…)"

    def __reduce__(self) -> str:
        raise TypeError("a runtime key cannot be pickled")
