"""
Which algorithm goes with which key, and what it is given.

Azure Key Vault, "Key types, algorithms, and operations"; Managed HSM for symmetric keys. The
arithmetic is the backend's; here a request that cannot be right is refused before it gets there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.services.vault.backends.base import Operation
from pyenclave.services.vault.fields import Fields, bad_parameter
from pyenclave.services.vault.records import KeyRecord

__all__ = ["OPERATION_NAMES", "SHA1_ALGORITHMS", "CryptoRequest", "algorithms_of"]

# The last part of the address, and the operation as key_ops spells it.
OPERATION_NAMES: Final[Mapping[str, Operation]] = {
    "encrypt": "encrypt",
    "decrypt": "decrypt",
    "sign": "sign",
    "verify": "verify",
    "wrapkey": "wrapKey",
    "unwrapkey": "unwrapKey",
}
# Refused unless the service's owner allows them: SHA-1, and padding that is an oracle.
SHA1_ALGORITHMS: Final = frozenset({"RSA-OAEP", "RSA1_5"})

_RSA_CIPHERS: Final = ("RSA-OAEP-256", "RSA-OAEP", "RSA1_5")
_DIGESTS: Final = {
    **{f"{family}{bits}": bits // 8 for family in ("RS", "PS") for bits in (256, 384, 512)},
    "ES256": 32,
    "ES256K": 32,
    "ES384": 48,
    "ES512": 64,
}
_MACS: Final = ("HS256", "HS384", "HS512")
_CURVE_OF: Final = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "ES256K": "P-256K"}
_SIGNATURE_OF: Final = {"ES256": 64, "ES384": 96, "ES512": 132, "ES256K": 64}
_AES: Final = {
    f"A{bits}{mode}": bits for bits in (128, 192, 256) for mode in ("GCM", "CBC", "CBCPAD")
}
_WRAP: Final = {f"A{bits}KW": bits for bits in (128, 192, 256)}
_ANY_WRAP: Final = ("CKM_AES_KEY_WRAP", "CKM_AES_KEY_WRAP_PAD")
_MAX_VALUE: Final = 32 << 10  # bytes of one symmetric operation
_MAX_WRAPPED: Final = 8 << 10  # bytes of a key that is wrapped
_BLOCK: Final = 16
_GCM_IV: Final = 12


@dataclass(frozen=True, slots=True)
class CryptoRequest:
    """A request to use a key; its form is right, its key is not known yet."""

    operation: Operation
    algorithm: str
    fields: Mapping[str, bytes]

    @classmethod
    def read(cls, operation: Operation, body: Mapping[str, Any], *, sha1: bool) -> CryptoRequest:
        """
        Read the body of an operation.

        Args:
            operation: Which one, as key_ops spells it.
            body: The JSON.
            sha1: `SHA1_ALGORITHMS` are allowed.

        Raises:
            ServiceError: 400.

        """
        fields = Fields(body)
        algorithm = fields.text("alg", longest=32, shortest=1)
        if algorithm is None:
            raise bad_parameter("Property alg is missing.")
        if algorithm not in algorithms_of(operation):
            raise bad_parameter(
                f"Property alg has invalid value: {algorithm!a} is not an algorithm of {operation}."
            )
        if algorithm in SHA1_ALGORITHMS and not sha1:
            raise bad_parameter(
                f"Property alg has invalid value: {algorithm} is switched off in this vault; "
                "RSA-OAEP-256 is on. The setting allow_sha1 switches on the others."
            )
        given = {"value": fields.need_data("value", longest=_longest(operation, algorithm))}
        if operation == "verify":
            given["digest"] = fields.need_data("digest", longest=_longest_digest(algorithm))
        if operation in ("sign", "verify"):
            _check_digest(operation, algorithm, given)
        elif algorithm in _AES:
            _read_cipher(fields, operation, algorithm, given)
        elif fields.has("iv") or fields.has("tag") or fields.has("aad"):
            raise bad_parameter(f"Algorithm {algorithm} takes neither iv nor aad nor tag.")
        return cls(operation, algorithm, given)

    def check_key(self, record: KeyRecord) -> None:
        """Refuse an algorithm that is not the key's."""
        kind = record.kty.removesuffix("-HSM")
        name = self.algorithm
        if kind == "RSA":
            fits = name in _RSA_CIPHERS or name[:2] in ("RS", "PS")
        elif kind == "EC":
            fits = _CURVE_OF.get(name) == record.public.get("crv")
        else:
            bits = _AES.get(name) or _WRAP.get(name)
            fits = name in _ANY_WRAP or name in _MACS or bits == record.size
        if not fits:
            raise bad_parameter(f"Key and algorithm do not fit: {record.kty} and {name}.")

    def hopeless(self, record: KeyRecord) -> bool:
        """Tell that a signature to be verified has not even the size of one."""
        if self.operation != "verify":
            return False
        if self.algorithm in _MACS:
            size = int(self.algorithm[2:]) // 8
        else:
            size = _SIGNATURE_OF.get(self.algorithm, (record.size or 0) // 8)
        return len(self.fields["value"]) != size


def algorithms_of(operation: Operation) -> tuple[str, ...]:
    """Return the algorithms that some key has for *operation*."""
    if operation in ("sign", "verify"):
        return (*_DIGESTS, *_MACS)
    if operation in ("encrypt", "decrypt"):
        return (*_RSA_CIPHERS, *_AES)
    return (*_RSA_CIPHERS, *_WRAP, *_ANY_WRAP)


def _longest_digest(algorithm: str) -> int:
    # What a MAC is made over is the message itself.
    return _MAX_VALUE if algorithm in _MACS else 64


def _longest(operation: Operation, algorithm: str) -> int:
    if operation == "sign" and algorithm in _MACS:
        return _MAX_VALUE
    if algorithm in _RSA_CIPHERS or operation in ("sign", "verify"):
        return 512
    return _MAX_VALUE + _BLOCK if algorithm in _AES else _MAX_WRAPPED


def _check_digest(operation: Operation, algorithm: str, given: Mapping[str, bytes]) -> None:
    name = "digest" if operation == "verify" else "value"
    if algorithm in _MACS:
        return
    if len(given[name]) != _DIGESTS[algorithm]:
        raise bad_parameter(
            f"Property {name} has invalid value: {algorithm} takes a digest of "
            f"{_DIGESTS[algorithm]} bytes."
        )


def _read_cipher(
    fields: Fields, operation: Operation, algorithm: str, given: dict[str, bytes]
) -> None:
    """Read what AES takes beside the value."""
    if algorithm.endswith("GCM"):
        if operation == "encrypt":
            # A nonce that the caller chooses could come twice, which would give the key away.
            if fields.has("iv"):
                raise fields.error("iv", "none, as the service chooses it,")
        else:
            given["iv"] = fields.need_data("iv", longest=_GCM_IV, shortest=_GCM_IV)
            given["tag"] = fields.need_data("tag", longest=_BLOCK, shortest=_BLOCK)
        aad = fields.data("aad", longest=_MAX_VALUE)
        if aad:
            given["aad"] = aad
        return
    if operation == "decrypt" or fields.has("iv"):
        given["iv"] = fields.need_data("iv", longest=_BLOCK, shortest=_BLOCK)
    if fields.has("tag") or fields.has("aad"):
        raise bad_parameter(f"Algorithm {algorithm} takes neither aad nor tag.")
    whole = len(given["value"]) % _BLOCK == 0
    if not whole and (operation == "decrypt" or not algorithm.endswith("PAD")):
        raise fields.error("value", "whole blocks of 16 bytes")
