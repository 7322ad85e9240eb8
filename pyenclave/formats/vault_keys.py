"""
The keys of a vault: made, read from JWKs (RFC 7517, 7518), written as public members and material.

Used wherever private halves are: in the enclave that keeps them, and before a PKCS #11 token takes
one that somebody else made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pyenclave.formats import jose
from pyenclave.formats.jwa import CURVES, OCT_SIZES, RSA_SIZES, AlgorithmError, Key

__all__ = ["EXPONENT", "check_spec", "from_jwk", "make", "material_of", "public_of"]

EXPONENT: Final = 65537
_MAX_MEMBER: Final = 1024  # bytes


def check_spec(kind: str, size: int, crv: str) -> tuple[int, str]:
    """
    Return size and curve of a key that is to be made.

    Args:
        kind: ``RSA``, ``EC`` or ``oct``.
        size: Bits; 0: the default.
        crv: Name of a curve; empty: the default.

    Raises:
        AlgorithmError: There are no such keys.

    """
    if kind == "EC":
        if size:
            raise AlgorithmError("an EC key has a curve, not a size")
        crv = crv or "P-256"
        if crv not in CURVES:
            raise AlgorithmError(f"no such curve; there are {', '.join(CURVES)}")
        return 0, crv
    if crv:
        raise AlgorithmError("only EC keys have a curve")
    sizes = RSA_SIZES if kind == "RSA" else OCT_SIZES
    size = size or (2048 if kind == "RSA" else 256)
    if size not in sizes:
        raise AlgorithmError(f"the key's size is one of {', '.join(map(str, sizes))} bits")
    return size, ""


def make(kind: str, size: int, crv: str) -> Key:
    """Make a key; the arguments and errors are those of `check_spec`."""
    size, crv = check_spec(kind, size, crv)
    if kind == "EC":
        return ec.generate_private_key(CURVES[crv])
    if kind == "oct":
        return os.urandom(size // 8)
    return rsa.generate_private_key(public_exponent=EXPONENT, key_size=size)


def _number(jwk: Mapping[str, str], name: str) -> int:
    raw = jose.b64url_decode(jwk.get(name, ""), name)
    if not 0 < len(raw) <= _MAX_MEMBER:
        raise AlgorithmError(f"the key's member {name} is missing or too long")
    return int.from_bytes(raw, "big")


def from_jwk(jwk: Mapping[str, str], kind: str) -> Key:
    """
    Read a private or shared key; members that follow from others may be missing.

    Args:
        jwk: Its members, texts in base64url.
        kind: ``RSA``, ``EC`` or ``oct``.

    Raises:
        AlgorithmError: Too small, no curve of ours, or the members do not belong together.
        EvidenceFormatError: A member is no base64url.

    """
    if kind == "oct":
        secret = jose.b64url_decode(jwk.get("k", ""), "k")
        if len(secret) * 8 not in OCT_SIZES:
            raise AlgorithmError(f"the key has {', '.join(map(str, OCT_SIZES))} bits")
        return secret
    return _rsa(jwk) if kind == "RSA" else _ec(jwk)


def _rsa(jwk: Mapping[str, str]) -> rsa.RSAPrivateKey:
    n, e, d, p, q = (_number(jwk, name) for name in ("n", "e", "d", "p", "q"))
    if n.bit_length() not in RSA_SIZES or not EXPONENT <= e < 1 << 64:
        sizes = ", ".join(map(str, RSA_SIZES))
        raise AlgorithmError(
            f"an RSA key of {sizes} bits and an exponent from {EXPONENT} is needed"
        )
    try:
        return rsa.RSAPrivateNumbers(
            p=p,
            q=q,
            d=d,
            dmp1=_number(jwk, "dp") if "dp" in jwk else rsa.rsa_crt_dmp1(d, p),
            dmq1=_number(jwk, "dq") if "dq" in jwk else rsa.rsa_crt_dmq1(d, q),
            iqmp=_number(jwk, "qi") if "qi" in jwk else rsa.rsa_crt_iqmp(p, q),
            public_numbers=rsa.RSAPublicNumbers(e, n),
        ).private_key()
    except (ValueError, ZeroDivisionError):
        raise AlgorithmError("the RSA key's members do not belong together") from None


def _ec(jwk: Mapping[str, str]) -> ec.EllipticCurvePrivateKey:
    curve = CURVES.get(jwk.get("crv", ""))
    if curve is None:
        raise AlgorithmError(f"no such curve; there are {', '.join(CURVES)}")
    x, y, d = (_number(jwk, name) for name in ("x", "y", "d"))
    try:
        public = ec.EllipticCurvePublicNumbers(x, y, curve)
        return ec.EllipticCurvePrivateNumbers(d, public).private_key()
    except ValueError:
        raise AlgorithmError("the EC key's members do not belong together") from None


def _text(number: int, size: int = 0) -> str:
    size = size or (number.bit_length() + 7) // 8
    return jose.b64url_encode(number.to_bytes(size, "big"))


def public_of(key: Key | rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> dict[str, str]:
    """Return the public members of a key's JWK, without ``kty``; none of a shared key."""
    if isinstance(key, bytes):
        return {}
    if isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        key = key.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return {"n": _text(numbers.n), "e": _text(numbers.e)}
    point = key.public_numbers()
    size = (key.curve.key_size + 7) // 8
    crv = next(name for name, curve in CURVES.items() if curve.name == key.curve.name)
    return {"crv": crv, "x": _text(point.x, size), "y": _text(point.y, size)}


def material_of(key: Key) -> bytes:
    """Return what is wrapped and released: PKCS #8 in DER, or the bytes of a shared key."""
    if isinstance(key, bytes):
        return key
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
