"""ECDSA signatures in the fixed form R ‖ S, which COSE and JOSE share."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

__all__ = ["CURVES", "sign", "verify"]

_SCHEMES: Final = {
    "ES256": ec.ECDSA(hashes.SHA256()),
    "ES384": ec.ECDSA(hashes.SHA384()),
    "ES512": ec.ECDSA(hashes.SHA512()),
}
# Curve and hash belong together: RFC 7518, 3.4 and RFC 9053, 2.1.
CURVES: Final[dict[str, tuple[str, int, hashes.HashAlgorithm]]] = {
    "ES256": ("secp256r1", 32, hashes.SHA256()),
    "ES384": ("secp384r1", 48, hashes.SHA384()),
    "ES512": ("secp521r1", 66, hashes.SHA512()),
}


def verify(key: ec.EllipticCurvePublicKey, name: str, signature: bytes, data: bytes) -> bool:
    """Whether *signature* is that of *key* over *data* by algorithm *name* (ES256…ES512)."""
    curve, size, digest = CURVES[name]
    if key.curve.name != curve or len(signature) != 2 * size:
        return False
    r = int.from_bytes(signature[:size], "big")
    s = int.from_bytes(signature[size:], "big")
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(digest))
    except InvalidSignature:
        return False
    return True


def sign(key: ec.EllipticCurvePrivateKey, name: str, data: bytes) -> bytes:
    """Return the signature R ‖ S; the curve of *key* is the one of algorithm *name*."""
    curve, size, _ = CURVES[name]
    if key.curve.name != curve:
        raise ValueError(f"{name} needs a key on {curve}, not {key.curve.name}")
    r, s = decode_dss_signature(key.sign(data, _SCHEMES[name]))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")
