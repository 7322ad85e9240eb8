"""COSE_Key (RFC 9052, 7; RFC 9053, 7): public keys that sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor
from pyenclave.formats.cose import ALGORITHMS, PublicKey

__all__ = ["algorithms_of", "read_key", "write_key"]

_KTY, _ALG, _KEY_OPS = 1, 3, 4
_CRV, _X, _Y, _D = -1, -2, -3, -4
_OKP, _EC2, _ED25519, _VERIFY = 1, 2, 6, 2
_MAX_SIZE: Final = 1024
_CURVES: Final[Mapping[int, tuple[ec.EllipticCurve, int, str]]] = {
    1: (ec.SECP256R1(), 32, "ES256"),
    2: (ec.SECP384R1(), 48, "ES384"),
    3: (ec.SECP521R1(), 66, "ES512"),
}


def algorithms_of(key: object) -> frozenset[str]:
    """Return the names of the algorithms that belong to *key*; none for an unknown key."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return frozenset(
            name for curve, _, name in _CURVES.values() if curve.name == key.curve.name
        )
    return frozenset(("EdDSA",) if isinstance(key, ed25519.Ed25519PublicKey) else ())


def _wrong(what: str, expected: str, found: object) -> EvidenceFormatError:
    shown = f"{len(found)} bytes" if isinstance(found, bytes) else f"{found!r:.40}"
    return EvidenceFormatError(f"{what}: not a usable COSE_Key", expected=expected, found=shown)


def read_key(data: bytes, what: str = "COSE_Key") -> tuple[PublicKey, frozenset[str]]:
    """
    Read a public key that verifies signatures.

    Args:
        data: One CBOR map; numbers may be in any width.
        what: What it is, for errors.

    Returns:
        The key, and the algorithms that it may be used with.

    Raises:
        EvidenceFormatError: Malformed, a secret key, or of no use here.

    """
    fields = cbor.loads(data, what, form="definite", max_size=_MAX_SIZE)
    if not isinstance(fields, dict):
        raise _wrong(what, "a map", type(fields).__name__)
    if _D in fields:
        raise _wrong(what, "a public key", "a secret one")
    operations = fields.get(_KEY_OPS, [_VERIFY])
    if not isinstance(operations, list) or not any(
        type(item) is int and item == _VERIFY for item in operations
    ):
        raise _wrong(what, "key_ops with verify", operations)
    key = _key(fields, what)
    algorithms = algorithms_of(key)
    if _ALG in fields:
        number = fields[_ALG]
        named = ALGORITHMS.get(number) if type(number) is int else None
        if named not in algorithms:
            raise _wrong(what, f"alg {' or '.join(sorted(algorithms))}", number)
    return key, algorithms


def _coordinate(fields: Mapping[Any, Any], label: int, size: int, what: str) -> bytes:
    value = fields.get(label)
    if not isinstance(value, bytes) or len(value) != size:
        raise _wrong(what, f"{size} bytes as {'x' if label == _X else 'y'}", value)
    return value


def _key(fields: Mapping[Any, Any], what: str) -> PublicKey:
    kind, curve = fields.get(_KTY), fields.get(_CRV)
    if type(kind) is not int or type(curve) is not int:
        raise _wrong(what, "kty and crv", (kind, curve))
    if kind == _EC2 and curve in _CURVES:
        named, size, _ = _CURVES[curve]
        point = _coordinate(fields, _X, size, what) + _coordinate(fields, _Y, size, what)
        try:
            return ec.EllipticCurvePublicKey.from_encoded_point(named, b"\x04" + point)
        except ValueError:
            raise _wrong(what, f"a point of {named.name}", "another") from None
    if kind == _OKP and curve == _ED25519:
        return ed25519.Ed25519PublicKey.from_public_bytes(_coordinate(fields, _X, 32, what))
    raise _wrong(what, "EC2 on P-256, P-384 or P-521, or Ed25519", (kind, curve))


def write_key(key: PublicKey) -> bytes:
    """
    Write *key*.

    Raises:
        ValueError: A curve that has no number here.

    """
    if isinstance(key, ed25519.Ed25519PublicKey):
        return cbor.dumps({_KTY: _OKP, _CRV: _ED25519, _X: key.public_bytes_raw()})
    for number, (curve, size, _) in _CURVES.items():
        if curve.name == key.curve.name:
            numbers = key.public_numbers()
            x, y = numbers.x.to_bytes(size, "big"), numbers.y.to_bytes(size, "big")
            return cbor.dumps({_KTY: _EC2, _CRV: number, _X: x, _Y: y})
    raise ValueError(f"{key.curve.name} has no number here")
