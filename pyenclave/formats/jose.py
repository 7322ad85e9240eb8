"""
JSON Web Signatures and keys (RFC 7515, 7517, 7518, 8037), for public keys only.

One serialisation: compact, with exactly one signature. The algorithm must be allowed by the caller
and belong to the key; there is no ``none`` and no HMAC, so a public key can never be a shared
secret. Whatever a token says about keys (``jku``, ``x5u``, ``jwk``, ``x5c``) is handed out and
believed by nobody here.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import _ecdsa, jsonstrict

__all__ = [
    "ALGORITHMS",
    "MAX_TOKEN",
    "Jws",
    "algorithms_of",
    "b64_decode",
    "b64url_decode",
    "b64url_encode",
    "sign",
    "sign_encoded",
    "verify_signature",
    "x5c_of",
]

MAX_TOKEN: Final = 1 << 20  # bytes; a token with annotated evidence has 50 KB
MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_RSA: Final[dict[str, tuple[bool, hashes.HashAlgorithm]]] = {
    "RS256": (False, hashes.SHA256()),
    "RS384": (False, hashes.SHA384()),
    "RS512": (False, hashes.SHA512()),
    "PS256": (True, hashes.SHA256()),
    "PS384": (True, hashes.SHA384()),
    "PS512": (True, hashes.SHA512()),
}
ALGORITHMS: Final = frozenset((*_RSA, *_ecdsa.CURVES, "EdDSA"))
_OF_CURVE: Final = {curve: name for name, (curve, _, _) in _ecdsa.CURVES.items()}

_READ_BASE64: Final = msgspec.json.Decoder(bytes).decode
# Members that make the header say something other than "one signature over these bytes".
_FOREIGN: Final = ("enc", "zip", "epk", "p2c", "p2s", "b64")


def b64url_encode(data: bytes) -> str:
    """Return base64url without padding (RFC 7515, 2)."""
    standard = binascii.b2a_base64(data, newline=False)
    return standard.replace(b"+", b"-").replace(b"/", b"_").rstrip(b"=").decode("ascii")


def b64url_decode(text: str, what: str = "base64url") -> bytes:
    """
    Read base64url: no padding, no white space, no other alphabet, no stray bits.

    Raises:
        EvidenceFormatError: Anything that is not the one encoding of the bytes.

    """
    if not isinstance(text, str):
        raise EvidenceFormatError(f"{what}: not text", found=type(text).__name__)
    try:
        raw = text.encode("ascii")
        if b"+" in raw or b"/" in raw or b"=" in raw or b"\\" in raw:
            raise ValueError
        # Its reader is as strict as binascii's and takes a third of the time. Without a backslash
        # nothing is escaped, and a quote inside leaves something behind the string.
        raw = raw.replace(b"-", b"+").replace(b"_", b"/")
        data = _READ_BASE64(b'"%b%b"' % (raw, b"=" * (-len(raw) % 4)))
    except (msgspec.MsgspecError, ValueError):
        raise EvidenceFormatError(
            f"{what}: not base64url", expected="A-Z a-z 0-9 - _ without padding", found=text[:20]
        ) from None
    # Only the last group can have bits to spare.
    spare = len(text) % 4
    if spare and b64url_encode(data[1 - spare :]) != text[-spare:]:
        raise EvidenceFormatError(f"{what}: not base64url", found="bits after the last byte")
    return data


def b64_decode(text: str, what: str = "base64") -> bytes:
    """
    Read standard base64 with its padding, as ``x5c`` has it (RFC 7515, 4.1.6).

    Raises:
        EvidenceFormatError: Anything that is not the one encoding of the bytes.

    """
    if not isinstance(text, str):
        raise EvidenceFormatError(f"{what}: not text", found=type(text).__name__)
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise EvidenceFormatError(f"{what}: not base64", found=str(error)) from None
    if base64.b64encode(data).decode("ascii") != text:
        raise EvidenceFormatError(f"{what}: not base64", found="bits after the last byte")
    return data


def algorithms_of(key: object) -> frozenset[str]:
    """Return the names of the algorithms that *key* may be used with; none for another kind."""
    if isinstance(key, rsa.RSAPublicKey):
        fits = MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS
        return frozenset(_RSA) if fits else frozenset()
    if isinstance(key, ec.EllipticCurvePublicKey):
        name = _OF_CURVE.get(key.curve.name)
        return frozenset((name,) if name else ())
    if isinstance(key, ed25519.Ed25519PublicKey):
        return frozenset(("EdDSA",))
    return frozenset()


def verify_signature(key: object, algorithm: str, signature: bytes, data: bytes) -> bool:
    """Whether *signature* over *data* holds; *algorithm* must belong to *key*."""
    if algorithm not in algorithms_of(key):
        return False
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _ecdsa.verify(key, algorithm, signature, data)
    try:
        if isinstance(key, rsa.RSAPublicKey):
            pss, digest = _RSA[algorithm]
            if len(signature) != (key.key_size + 7) // 8:
                return False
            key.verify(signature, data, _padding(pss, digest), digest)
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            return False
    except InvalidSignature:
        return False
    return True


def _padding(pss: bool, digest: hashes.HashAlgorithm) -> padding.AsymmetricPadding:
    if not pss:
        return padding.PKCS1v15()
    return padding.PSS(mgf=padding.MGF1(digest), salt_length=digest.digest_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jws:
    """
    A signed token in the compact serialisation.

    Attributes:
        header: The protected header, which is signed.
        payload: What was signed, decoded.
        signature: The signature, decoded.
        signed_bytes: The exact bytes under the signature.
    """

    header: Mapping[str, Any]
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    signed_bytes: bytes = field(repr=False)

    @classmethod
    def from_bytes(
        cls, data: bytes | str, what: str = "token", *, max_size: int = MAX_TOKEN
    ) -> Self:
        """
        Read a token; nothing is verified.

        Raises:
            EvidenceFormatError: Not three parts of base64url, an encrypted token, another
                serialisation, or a header with ``crit`` or without a usable ``alg``.

        """
        if not isinstance(data, bytes | bytearray | memoryview | str):
            raise TypeError(f"{what} is bytes or str, not {type(data).__name__}")
        if len(data) > max_size:
            raise EvidenceFormatError(
                f"{what}: too large", expected=f"at most {max_size}", found=f"{len(data)} bytes"
            )
        try:
            text = data if isinstance(data, str) else bytes(data).decode("ascii")
        except UnicodeDecodeError:
            raise EvidenceFormatError(f"{what}: not ASCII") from None
        parts = text.split(".", 5)
        if len(parts) != 3:
            found = {1: "another serialisation", 5: "five: an encrypted token"}
            raise EvidenceFormatError(
                f"{what}: not a signed token",
                expected="header.payload.signature",
                found=found.get(len(parts), f"{len(parts)} parts"),
            )
        header = jsonstrict.object_of(b64url_decode(parts[0], f"{what}: header"), f"{what}: header")
        _check_header(header, what)
        return cls(
            header=header,
            payload=b64url_decode(parts[1], f"{what}: payload"),
            signature=b64url_decode(parts[2], f"{what}: signature"),
            signed_bytes=f"{parts[0]}.{parts[1]}".encode("ascii"),
        )

    @property
    def algorithm(self) -> str:
        """The algorithm that the header names."""
        name: str = self.header["alg"]
        return name

    @property
    def kid(self) -> str | None:
        """The key that the header names; a hint, and only looked up among keys that are given."""
        return self.header.get("kid")

    def claims(self, what: str = "token") -> dict[str, Any]:
        """
        Read the payload as JSON.

        Raises:
            EvidenceFormatError: Not an object, or ambiguous.

        """
        return jsonstrict.object_of(self.payload, f"{what}: payload")

    def verify(self, key: object, *, allowed: Collection[str]) -> bool:
        """
        Whether the signature holds.

        Args:
            key: A public key of the ``cryptography`` package.
            allowed: Algorithms that the caller accepts; the key must belong to the header's one.

        """
        return self.algorithm in allowed and verify_signature(
            key, self.algorithm, self.signature, self.signed_bytes
        )


def _check_header(header: Mapping[str, Any], what: str) -> None:
    name = header.get("alg")
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise EvidenceFormatError(
            f"{what}: the algorithm", expected=", ".join(sorted(ALGORITHMS)), found=f"{name!r:.40}"
        )
    if "crit" in header:
        raise EvidenceFormatError(
            f"{what}: critical header parameters", expected="none", found=f"{header['crit']!r:.60}"
        )
    for foreign in _FOREIGN:
        if foreign in header:
            raise EvidenceFormatError(
                f"{what}: a header parameter of another kind of token", found=foreign
            )
    kid = header.get("kid")
    if kid is not None and (not isinstance(kid, str) or not 0 < len(kid) <= 1024):
        raise EvidenceFormatError(f"{what}: kid", expected="1 to 1,024 characters")


def sign(
    claims: Mapping[str, Any],
    *,
    key: PrivateKey,
    algorithm: str | None = None,
    kid: str | None = None,
    typ: str = "JWT",
    header: Mapping[str, Any] | None = None,
) -> str:
    """
    Sign *claims* as a token in the compact serialisation.

    Args:
        claims: The payload.
        key: RSA (2,048 bits and more), P-256, P-384, P-521 or Ed25519.
        algorithm: Default: PS256, the one of the curve, or EdDSA.
        kid: Name of the key in the verifier's key set.
        typ: Type of the token.
        header: Further header parameters.

    Raises:
        ValueError: The algorithm does not belong to the key.

    """
    fitting = algorithms_of(key.public_key())
    name = algorithm or (
        "PS256" if isinstance(key, rsa.RSAPrivateKey) else min(fitting, default="")
    )
    if name not in fitting:
        raise ValueError(f"{name or 'no algorithm'} does not belong to a {type(key).__name__}")
    full: dict[str, Any] = {"alg": name, "typ": typ}
    if kid is not None:
        full["kid"] = kid
    full |= dict(header or {})
    return sign_encoded(b64url_encode(_json(full)), _json(claims), key=key, algorithm=name)


def sign_encoded(header: str, payload: bytes, *, key: PrivateKey, algorithm: str) -> str:
    """
    Sign *payload* under a header that is encoded already; `sign` does both.

    Args:
        header: The protected header in base64url; it names *algorithm*.
        payload: The payload's bytes.
        key: The key, to which the algorithm belongs.
        algorithm: A name of `ALGORITHMS`.

    """
    signed = f"{header}.{b64url_encode(payload)}"
    data = signed.encode("ascii")
    if isinstance(key, rsa.RSAPrivateKey):
        pss, digest = _RSA[algorithm]
        signature = key.sign(data, _padding(pss, digest), digest)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        signature = _ecdsa.sign(key, algorithm, data)
    else:
        signature = key.sign(data)
    return f"{signed}.{b64url_encode(signature)}"


_ENCODE: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def _json(value: Mapping[str, Any]) -> bytes:
    return _ENCODE(value).encode()


def x5c_of(value: object, what: str = "x5c", *, limit: int = 10) -> tuple[bytes, ...]:
    """
    Return the certificates (DER, leaf first) of an ``x5c`` member.

    Raises:
        EvidenceFormatError: Not a list of standard base64, empty, or longer than *limit*.

    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not 1 <= len(value) <= limit:
        raise EvidenceFormatError(f"{what}: not a list of 1 to {limit} certificates")
    return tuple(b64_decode(item, what) for item in value)
