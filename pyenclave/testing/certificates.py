"""
Certificates and revocation lists with any field and any flaw.

Written byte by byte, because the libraries that make good certificates refuse to make the bad ones
(and AMD's, whose serial number is 0) that verifiers have to be tried with. RFC 5280.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Final, Literal

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from pyenclave.formats import der, x509
from pyenclave.formats.x509 import encode_pem as pem

__all__ = [
    "DISTANT",
    "LONG_AGO",
    "Authority",
    "Extension",
    "Key",
    "certificate",
    "crl",
    "name",
    "pem",
]

LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)
DISTANT: Final = datetime(2049, 1, 1, tzinfo=UTC)

Algorithm = Literal["ecdsa-sha256", "ecdsa-sha384", "rsa-pss-sha384", "rsa-pkcs1-sha256"]
Curve = Literal["P-256", "P-384"]
Extension = tuple[str, bool, bytes]  # object identifier, critical, DER of the value

_CURVES: Final = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}
_HASHES: Final = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384()}
_NAMES: Final = {
    "C": "2.5.4.6",
    "ST": "2.5.4.8",
    "L": "2.5.4.7",
    "O": "2.5.4.10",
    "OU": "2.5.4.11",
    "CN": "2.5.4.3",
}
_USAGES: Final = {
    "digitalSignature": 0,
    "nonRepudiation": 1,
    "keyEncipherment": 2,
    "keyCertSign": 5,
    "cRLSign": 6,
}
_SHA384_ID: Final = der.encode_sequence(
    der.encode_oid("2.16.840.1.101.3.4.2.2"), der.encode(der.NULL)
)
_PSS: Final = der.encode_sequence(
    der.encode_oid("1.2.840.113549.1.1.10"),
    der.encode_sequence(
        der.encode(der.context(0), _SHA384_ID),
        der.encode(
            der.context(1),
            der.encode_sequence(der.encode_oid("1.2.840.113549.1.1.8"), _SHA384_ID),
        ),
        der.encode(der.context(2), der.encode_integer(48)),
        # AMD writes the trailer field out, although it is the default.
        der.encode(der.context(3), der.encode_integer(1)),
    ),
)
_ALGORITHMS: Final[dict[str, bytes]] = {
    "ecdsa-sha256": der.encode_sequence(der.encode_oid("1.2.840.10045.4.3.2")),
    "ecdsa-sha384": der.encode_sequence(der.encode_oid("1.2.840.10045.4.3.3")),
    "rsa-pss-sha384": _PSS,
    "rsa-pkcs1-sha256": der.encode_sequence(
        der.encode_oid("1.2.840.113549.1.1.11"), der.encode(der.NULL)
    ),
}


@dataclass(frozen=True)
class Key:
    """A private key. RSA keys are slow to make: `rsa` hands out the same few again."""

    private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    @classmethod
    def ec(cls, curve: Curve = "P-256") -> Key:
        """Make a key on *curve*."""
        return cls(ec.generate_private_key(_CURVES[curve]))

    @classmethod
    def rsa(cls, bits: int = 4096, *, index: int = 0) -> Key:
        """Return RSA key number *index* of *bits*, made at its first use in this process."""
        return _rsa_key(bits, index)

    @cached_property
    def spki(self) -> bytes:
        """The public key, DER."""
        return self.private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @cached_property
    def key_id(self) -> bytes:
        """20 bytes that name the key."""
        return hashlib.sha256(self.spki).digest()[:20]

    @cached_property
    def point(self) -> bytes:
        """X ‖ Y of an EC key, big-endian."""
        raw = self.private.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        return raw[1:]

    def sign(self, data: bytes, algorithm: Algorithm) -> bytes:
        """Sign; ECDSA in DER."""
        digest = _HASHES[algorithm.rpartition("-")[2]]
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            return self.private.sign(data, ec.ECDSA(digest))
        if algorithm == "rsa-pss-sha384":
            pss = padding.PSS(mgf=padding.MGF1(digest), salt_length=digest.digest_size)
            return self.private.sign(data, pss, digest)
        return self.private.sign(data, padding.PKCS1v15(), digest)

    def sign_raw(self, data: bytes, *, order: Literal["big", "little"] = "big") -> bytes:
        """Sign with the hash of the curve's size; R ‖ S, each as wide as the curve."""
        width = len(self.point) // 2
        algorithm: Algorithm = "ecdsa-sha256" if width == 32 else "ecdsa-sha384"
        r, s = decode_dss_signature(self.sign(data, algorithm))
        return r.to_bytes(width, order) + s.to_bytes(width, order)


@lru_cache
def _rsa_key(bits: int, index: int) -> Key:
    del index
    return Key(rsa.generate_private_key(65537, bits))


def name(**parts: str) -> bytes:
    """Return a DER name; parts in order, by their short names (C, ST, L, O, OU, CN)."""
    rdns = []
    for short, text in parts.items():
        tag = 0x13 if short == "C" else 0x0C
        rdns.append(
            der.encode(
                der.SET,
                der.encode_sequence(der.encode_oid(_NAMES[short]), der.encode_text(text, tag=tag)),
            )
        )
    return der.encode_sequence(*rdns)


def _extensions(items: Iterable[Extension]) -> bytes:
    return der.encode_sequence(
        *(
            der.encode_sequence(
                der.encode_oid(oid),
                *((der.encode_boolean(True),) if critical else ()),
                der.encode_octet_string(value),
            )
            for oid, critical, value in items
        )
    )


def _usage(usages: Sequence[str]) -> bytes:
    bits = sum(1 << (7 - _USAGES[usage]) for usage in usages)
    unused = (bits & -bits).bit_length() - 1 if bits else 0
    return der.encode_bit_string(bytes([bits]), unused=unused)


def certificate(
    *,
    subject: bytes,
    issuer: bytes,
    key: Key,
    signer: Key,
    algorithm: Algorithm = "ecdsa-sha256",
    serial: int | None = None,
    not_before: datetime = LONG_AGO,
    not_after: datetime = DISTANT,
    ca: bool | None = None,
    path_length: int | None = None,
    usages: Sequence[str] | None = None,
    key_ids: bool = True,
    extensions: Iterable[Extension] = (),
    version: int = 3,
) -> bytes:
    """
    Make a certificate, DER.

    Args:
        subject: DER name.
        issuer: DER name.
        key: Whose it is.
        signer: Who signs.
        algorithm: How; it need not fit the key.
        serial: Default random.
        not_before: Begin of validity.
        not_after: End of validity.
        ca: Basic constraints; None leaves them out.
        path_length: Of basic constraints.
        usages: Key usage by the names of RFC 5280; None leaves it out.
        key_ids: Whether subject and authority key identifier are there.
        extensions: Further ones.
        version: Of the certificate.
    """
    items: list[Extension] = []
    if ca is not None:
        inner = (der.encode_boolean(True),) if ca else ()
        length = () if path_length is None else (der.encode_integer(path_length),)
        items.append((x509.OID_BASIC_CONSTRAINTS, True, der.encode_sequence(*inner, *length)))
    if usages is not None:
        items.append((x509.OID_KEY_USAGE, True, _usage(usages)))
    if key_ids:
        authority = der.encode_sequence(der.encode(0x80, signer.key_id))
        items.append((x509.OID_AUTHORITY_KEY_ID, False, authority))
        items.append((x509.OID_SUBJECT_KEY_ID, False, der.encode_octet_string(key.key_id)))
    items.extend(extensions)
    tbs = der.encode_sequence(
        der.encode(der.context(0), der.encode_integer(version - 1)),
        der.encode_integer(secrets.randbits(120) + 1 if serial is None else serial),
        _ALGORITHMS[algorithm],
        issuer,
        der.encode_sequence(der.encode_time(not_before), der.encode_time(not_after)),
        subject,
        key.spki,
        *((der.encode(der.context(3), _extensions(items)),) if items else ()),
    )
    return der.encode_sequence(
        tbs, _ALGORITHMS[algorithm], der.encode_bit_string(signer.sign(tbs, algorithm))
    )


def crl(
    *,
    issuer: bytes,
    signer: Key,
    algorithm: Algorithm = "ecdsa-sha256",
    this_update: datetime = LONG_AGO,
    next_update: datetime | None = DISTANT,
    revoked: Iterable[int] = (),
    number: int | None = 1,
    key_id: bool = True,
) -> bytes:
    """
    Make a revocation list, DER.

    Args:
        issuer: DER name.
        signer: Who signs.
        algorithm: How.
        this_update: When it was made.
        next_update: When a newer one is due; None leaves it out.
        revoked: Serial numbers.
        number: CRL number; None leaves it out.
        key_id: Whether the authority key identifier is there.
    """
    entries = [
        der.encode_sequence(der.encode_integer(serial), der.encode_time(this_update))
        for serial in revoked
    ]
    items: list[Extension] = []
    if key_id:
        authority = der.encode_sequence(der.encode(0x80, signer.key_id))
        items.append((x509.OID_AUTHORITY_KEY_ID, False, authority))
    if number is not None:
        items.append((x509.OID_CRL_NUMBER, False, der.encode_integer(number)))
    tbs = der.encode_sequence(
        der.encode_integer(1),
        _ALGORITHMS[algorithm],
        issuer,
        der.encode_time(this_update),
        *(() if next_update is None else (der.encode_time(next_update),)),
        *((der.encode_sequence(*entries),) if entries else ()),
        *((der.encode(der.context(0), _extensions(items)),) if items else ()),
    )
    return der.encode_sequence(
        tbs, _ALGORITHMS[algorithm], der.encode_bit_string(signer.sign(tbs, algorithm))
    )


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate authority: its name, key and certificate."""

    subject: bytes
    key: Key
    der: bytes = field(repr=False)

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate, read."""
        return x509.Certificate.from_der(self.der)

    @classmethod
    def root(cls, subject: bytes, key: Key, *, algorithm: Algorithm = "ecdsa-sha256") -> Authority:
        """Make a root that signs itself."""
        made = certificate(
            subject=subject,
            issuer=subject,
            key=key,
            signer=key,
            algorithm=algorithm,
            ca=True,
            usages=("keyCertSign", "cRLSign"),
        )
        return cls(subject=subject, key=key, der=made)

    def issue(
        self,
        subject: bytes,
        key: Key,
        *,
        algorithm: Algorithm = "ecdsa-sha256",
        path_length: int = 0,
    ) -> Authority:
        """Make an authority below this one."""
        made = certificate(
            subject=subject,
            issuer=self.subject,
            key=key,
            signer=self.key,
            algorithm=algorithm,
            ca=True,
            path_length=path_length,
            usages=("keyCertSign", "cRLSign"),
        )
        return Authority(subject=subject, key=key, der=made)
