"""
COSE_Sign1 (RFC 9052, 4.2): one signature over a payload.

The algorithm comes from the protected header and must be one that the caller allows and that
belongs to the type and curve of the key. What is not understood and critical is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import _ecdsa, cbor
from pyenclave.formats.cbor import Tag

__all__ = ["ALGORITHMS", "TAG", "Sign1"]

TAG: Final = 18
ALGORITHMS: Final = {-7: "ES256", -35: "ES384", -36: "ES512", -8: "EdDSA"}  # RFC 9053, table 1
_ALG: Final = 1
_CRIT: Final = 2
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign1:
    """
    A signed message.

    Attributes:
        protected: The protected header as it was signed, encoded; empty for an empty one.
        header: The same, decoded.
        unprotected: The header that nobody signed.
        payload: What was signed.
        signature: R ‖ S, or the signature of Ed25519.
        tagged: Whether tag 18 was there.
    """

    protected: bytes
    header: Mapping[Any, Any]
    unprotected: Mapping[Any, Any]
    payload: bytes
    signature: bytes
    tagged: bool = False

    @classmethod
    def from_bytes(
        cls, data: bytes, what: str = "COSE_Sign1", *, max_size: int = cbor.MAX_SIZE
    ) -> Self:
        """
        Read a message, with or without tag 18; everything is in its shortest form.

        Raises:
            EvidenceFormatError: Malformed, critical headers, or a header given twice.

        """
        value = cbor.loads(data, what, max_size=max_size)
        tagged = isinstance(value, Tag)
        if isinstance(value, Tag):
            if value.number != TAG:
                raise EvidenceFormatError(
                    f"{what}: wrong tag", expected=f"{TAG} or none", found=value.number
                )
            value = value.value
        return cls._from_item(value, what, tagged=tagged)

    @classmethod
    def from_item(cls, value: object, what: str = "COSE_Sign1") -> Self:
        """Take a message that a CBOR reader has read already; errors as in `from_bytes`."""
        if isinstance(value, Tag) and value.number == TAG:
            return cls._from_item(value.value, what, tagged=True)
        return cls._from_item(value, what, tagged=False)

    @classmethod
    def _from_item(cls, value: object, what: str, *, tagged: bool) -> Self:
        shape = [bytes, dict, bytes, bytes]
        if not isinstance(value, list) or [type(item) for item in value] != shape:
            raise EvidenceFormatError(
                f"{what}: not four parts", expected="bytes, map, bytes, bytes", found=_shape(value)
            )
        protected, unprotected, payload, signature = value
        header = cbor.loads(protected, f"{what}: protected header") if protected else {}
        if not isinstance(header, dict):
            raise EvidenceFormatError(
                f"{what}: protected header", expected="a map", found=type(header).__name__
            )
        if protected and not header:
            # An empty header has two encodings that sign alike (RFC 9052, 3); one is read.
            raise EvidenceFormatError(
                f"{what}: protected header", expected="no bytes for an empty one", found="a0"
            )
        if _CRIT in header or _CRIT in unprotected:
            raise EvidenceFormatError(
                f"{what}: a critical header", expected="none", found=header.get(_CRIT)
            )
        double = header.keys() & unprotected.keys()
        if double or _ALG in unprotected:
            raise EvidenceFormatError(
                f"{what}: unprotected header",
                expected="no algorithm, nothing that is protected too",
                found=sorted(map(str, double or {_ALG})),
            )
        return cls(
            protected=protected,
            header=header,
            unprotected=unprotected,
            payload=payload,
            signature=signature,
            tagged=tagged,
        )

    @property
    def algorithm(self) -> str:
        """Name of the algorithm in the protected header; empty if it is no known one."""
        number = self.header.get(_ALG)
        return ALGORITHMS.get(number, "") if type(number) is int else ""

    def signed_bytes(self, external: bytes = b"") -> bytes:
        """Return the Sig_structure (RFC 9052, 4.4); *external* is bound but not in the message."""
        return cbor.dumps(["Signature1", self.protected, external, self.payload])

    def verify(self, key: object, *, allowed: Collection[str], external: bytes = b"") -> bool:
        """
        Whether the signature holds.

        Args:
            key: A public key (EC, Ed25519).
            allowed: Names of the algorithms that may be used.
            external: Externally supplied data.

        """
        name = self.algorithm
        if name not in allowed:
            return False
        if name in _ecdsa.CURVES and isinstance(key, ec.EllipticCurvePublicKey):
            return _ecdsa.verify(key, name, self.signature, self.signed_bytes(external))
        if name == "EdDSA" and isinstance(key, ed25519.Ed25519PublicKey):
            try:
                key.verify(self.signature, self.signed_bytes(external))
            except InvalidSignature:
                return False
            return True
        return False

    @classmethod
    def sign(
        cls,
        payload: bytes,
        *,
        key: PrivateKey,
        algorithm: str,
        unprotected: Mapping[Any, Any] | None = None,
        external: bytes = b"",
        tagged: bool = False,
    ) -> Self:
        """
        Sign *payload*.

        Raises:
            ValueError: The algorithm is unknown or does not belong to the key.

        """
        numbers = {name: number for number, name in ALGORITHMS.items()}
        if algorithm not in numbers:
            raise ValueError(f"{algorithm!r} is none of {', '.join(numbers)}")
        header = {_ALG: numbers[algorithm]}
        unsigned = cls(
            protected=cbor.dumps(header),
            header=header,
            unprotected=dict(unprotected or {}),
            payload=payload,
            signature=b"",
            tagged=tagged,
        )
        data = unsigned.signed_bytes(external)
        if isinstance(key, ec.EllipticCurvePrivateKey) and algorithm in _ecdsa.CURVES:
            signature = _ecdsa.sign(key, algorithm, data)
        elif isinstance(key, ed25519.Ed25519PrivateKey) and algorithm == "EdDSA":
            signature = key.sign(data)
        else:
            raise ValueError(f"{algorithm} does not belong to a {type(key).__name__}")
        return cls(
            protected=unsigned.protected,
            header=header,
            unprotected=unsigned.unprotected,
            payload=payload,
            signature=signature,
            tagged=tagged,
        )

    def to_bytes(self) -> bytes:
        """Write the message."""
        value = [self.protected, dict(self.unprotected), self.payload, self.signature]
        return cbor.dumps(Tag(TAG, value) if self.tagged else value)


def _shape(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(type(item).__name__ for item in value[:6]) or "nothing"
    return type(value).__name__
