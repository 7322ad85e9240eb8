"""
JSON Web Keys and sets of them (RFC 7517): public keys that sign.

A set with a private or shared key is refused whole. A key that cannot sign here (another use, a
weak or unknown kind) is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose, jsonstrict
from pyenclave.formats.x509 import Certificate

__all__ = ["MAX_KEYS", "Jwk", "Jwks", "public_members"]

MAX_KEYS: Final = 64
_CURVES: Final[dict[str, tuple[ec.EllipticCurve, int]]] = {
    "P-256": (ec.SECP256R1(), 32),
    "P-384": (ec.SECP384R1(), 48),
    "P-521": (ec.SECP521R1(), 66),
}
_PRIVATE: Final = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")


class _UnusableError(Exception):
    """The key is well-formed and of no use here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jwk:
    """
    A public key that verifies signatures.

    Attributes:
        kid: Its name, if it has one.
        key: The key, an object of ``cryptography``.
        algorithms: What it may be used with: what belongs to the key, narrowed by ``alg``.
        x5c: Certificates that came with it; the first has this key. They prove nothing.
    """

    kid: str | None
    key: jose.PublicKey
    algorithms: frozenset[str]
    x5c: tuple[Certificate, ...] = field(default=(), repr=False)

    @classmethod
    def from_json(cls, value: object, what: str = "key") -> Self:
        """
        Read a key.

        Raises:
            EvidenceFormatError: A private or shared key, malformed, or not usable here.

        """
        try:
            return cls._read(value, what)
        except _UnusableError as error:
            raise EvidenceFormatError(f"{what}: not usable", found=str(error)) from None

    @classmethod
    def _read(cls, value: object, what: str) -> Self:
        if not isinstance(value, Mapping):
            raise EvidenceFormatError(f"{what}: not an object", found=type(value).__name__)
        for name in _PRIVATE:
            if name in value:
                raise EvidenceFormatError(
                    f"{what}: a secret key", expected="a public key", found=f"member {name!r}"
                )
        kid = value.get("kid")
        if kid is not None and (not isinstance(kid, str) or not 0 < len(kid) <= 1024):
            raise EvidenceFormatError(f"{what}: kid", expected="1 to 1,024 characters")
        if value.get("use", "sig") != "sig":
            raise _UnusableError(f"use {value['use']!r:.20}")
        operations = value.get("key_ops", ["verify"])
        if not isinstance(operations, list) or "verify" not in operations:
            raise _UnusableError("key_ops without verify")
        chain: tuple[Certificate, ...] = ()
        if "x5c" in value:
            raw = jose.x5c_of(value["x5c"], f"{what}: x5c")
            chain = tuple(Certificate.from_der(item) for item in raw)
        key = _key(value, chain, what)
        algorithms = jose.algorithms_of(key)
        if "alg" in value:
            algorithms &= {value["alg"]} if isinstance(value["alg"], str) else set()
        if not algorithms:
            raise _UnusableError(f"weak, or alg {value.get('alg')!r:.20} does not belong to it")
        return cls(kid=kid, key=key, algorithms=algorithms, x5c=chain)

    def verify(self, token: jose.Jws, *, allowed: frozenset[str]) -> bool:
        """Whether this key signed *token* by one of its own and the caller's algorithms."""
        return token.verify(self.key, allowed=self.algorithms & allowed)


def _number(value: Mapping[str, Any], name: str, what: str) -> int:
    raw = jose.b64url_decode(value.get(name, ""), f"{what}: {name}")
    if not raw or raw[0] == 0:
        raise EvidenceFormatError(f"{what}: {name}", expected="a number without leading zeros")
    return int.from_bytes(raw, "big")


def _key(value: Mapping[str, Any], chain: tuple[Certificate, ...], what: str) -> jose.PublicKey:
    kind = value.get("kty")
    own = _members(value, kind, what)
    if not chain:
        if own is None:
            raise EvidenceFormatError(f"{what}: no key", expected="its members or x5c")
        return own
    certified: jose.PublicKey = chain[0].public_key()
    if own is not None and own != certified:
        raise EvidenceFormatError(f"{what}: its certificate has another key")
    kinds = {"RSA": rsa.RSAPublicKey, "EC": ec.EllipticCurvePublicKey}
    if not isinstance(kind, str) or not isinstance(
        certified, kinds.get(kind, ed25519.Ed25519PublicKey)
    ):
        raise EvidenceFormatError(f"{what}: its certificate has a key of another kind")
    return certified


def _members(value: Mapping[str, Any], kind: object, what: str) -> jose.PublicKey | None:
    """Return the key of the members; None if there are none (MAA has certificates only)."""
    try:
        if kind == "RSA":
            if "n" not in value and "e" not in value:
                return None
            modulus, exponent = _number(value, "n", what), _number(value, "e", what)
            if not jose.MIN_RSA_BITS <= modulus.bit_length() <= jose.MAX_RSA_BITS:
                raise _UnusableError(f"RSA of {modulus.bit_length()} bits")
            if exponent < 3 or exponent.bit_length() > 64:
                raise _UnusableError("an RSA exponent below 3 or beyond 64 bits")
            return rsa.RSAPublicNumbers(exponent, modulus).public_key()
        if kind == "EC":
            if "x" not in value and "y" not in value:
                return None
            curve, size = _CURVES.get(str(value.get("crv")), (None, 0))
            if curve is None:
                raise _UnusableError(f"curve {value.get('crv')!r:.20}")
            parts = [jose.b64url_decode(value.get(n, ""), f"{what}: {n}") for n in ("x", "y")]
            if [len(part) for part in parts] != [size, size]:
                raise EvidenceFormatError(f"{what}: coordinates", expected=f"{size} bytes each")
            point = b"\x04" + b"".join(parts)
            return ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
        if kind == "OKP" and value.get("crv") == "Ed25519":
            raw = jose.b64url_decode(value.get("x", ""), f"{what}: x")
            return ed25519.Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise EvidenceFormatError(f"{what}: not a key", found=str(error)) from None
    raise _UnusableError(f"kty {kind!r:.20}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Jwks:
    """
    A set of public keys.

    Attributes:
        keys: Those that can verify signatures.
        ignored: The others: ``kid`` (or place) and the reason.
    """

    keys: tuple[Jwk, ...]
    ignored: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "key set") -> Self:
        """
        Read a set.

        Raises:
            EvidenceFormatError: Malformed, a secret key, two keys of one name, or too many.

        """
        listed = jsonstrict.object_of(data, what).get("keys")
        if not isinstance(listed, list) or len(listed) > MAX_KEYS:
            raise EvidenceFormatError(f"{what}: keys", expected=f"a list of at most {MAX_KEYS}")
        keys: list[Jwk] = []
        ignored: list[tuple[str, str]] = []
        names: set[str] = set()
        for place, item in enumerate(listed):
            try:
                key = Jwk._read(item, f"{what}: key {place}")  # noqa: SLF001 - its own module
            except _UnusableError as reason:
                ignored.append((str(item.get("kid", place)), str(reason)))
                continue
            if key.kid is not None and key.kid in names:
                raise EvidenceFormatError(f"{what}: two keys of one name", found=key.kid[:60])
            names.add(key.kid or "")
            keys.append(key)
        return cls(keys=tuple(keys), ignored=tuple(ignored))

    def find(self, kid: str | None) -> Jwk | None:
        """Return the key of that name; without a name, the only key there is."""
        if kid is None:
            return self.keys[0] if len(self.keys) == 1 else None
        return next((key for key in self.keys if key.kid == kid), None)


def public_members(key: jose.PublicKey) -> dict[str, str]:
    """Return the members of a JWK for *key*."""
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return {
            "kty": "RSA",
            "n": jose.b64url_encode(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")),
            "e": jose.b64url_encode(numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")),
        }
    if isinstance(key, ec.EllipticCurvePublicKey):
        for name, (curve, size) in _CURVES.items():
            if curve.name == key.curve.name:
                point = key.public_numbers()
                return {
                    "kty": "EC",
                    "crv": name,
                    "x": jose.b64url_encode(point.x.to_bytes(size, "big")),
                    "y": jose.b64url_encode(point.y.to_bytes(size, "big")),
                }
    if isinstance(key, ed25519.Ed25519PublicKey):
        raw = key.public_bytes_raw()
        return {"kty": "OKP", "crv": "Ed25519", "x": jose.b64url_encode(raw)}
    raise ValueError(f"a {type(key).__name__} has no form here")
