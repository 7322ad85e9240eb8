"""
Keys that sign tokens: made ahead, shared by the instances, replaced with overlap.

A key is in the key set before it signs (`LEAD`), so that a relying party that keeps the set for a
while knows it, and after its last token (`OVERLAP`), so that a token can be verified as long as it
holds. Private halves lie in the database under the service's secrets.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from pyenclave.formats import jose
from pyenclave.services.attestation.tokens import ALGORITHMS, Algorithm, SigningKey
from pyenclave.services.storage.renewing import renewed
from pyenclave.services.storage.secrets import Secrets

__all__ = ["KeyRow", "Schedule", "key_rows", "key_values", "make_key", "open_key", "renewed_key"]

_BITS: Final = 2048
_COMMON_NAME: Final = 64  # characters (RFC 5280, ub-common-name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """
    When keys are made and how long they live.

    Attributes:
        lifetime: How long a key signs.
        lead: How long it is in the key set before it signs.
        overlap: How long it stays there afterwards: no token holds longer.
    """

    lifetime: timedelta = timedelta(days=30)
    lead: timedelta = timedelta(hours=1)
    overlap: timedelta = timedelta(days=3)

    def __post_init__(self) -> None:
        if not timedelta(0) < self.lead < self.lifetime or self.overlap <= timedelta(0):
            raise ValueError("a key's lead is shorter than its life, and its overlap is positive")

    def next_start(self, starts: Iterable[datetime], now: datetime) -> datetime | None:
        """
        Return when a key that is missing has to start; None if none is missing.

        Args:
            starts: When the keys of one algorithm start that have not expired.
            now: The time.
        """
        last = max(starts, default=None)
        if last is None or last + self.lifetime <= now:
            return now
        if last + self.lifetime - self.lead <= now:
            return max(last + self.lifetime, now + self.lead)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """A key as it lies in the database."""

    kid: str
    algorithm: Algorithm
    chain: bytes
    private: bytes = field(repr=False)
    created: datetime
    starts: datetime
    expires: datetime


def key_rows(rows: Iterable[Any]) -> tuple[KeyRow, ...]:
    """Read the keys, oldest first; those of an algorithm that is not known here are left out."""
    found = (
        KeyRow(
            kid=row.kid,
            algorithm=row.algorithm,
            chain=row.chain.encode("ascii"),
            private=base64.b64decode(row.private),
            created=datetime.fromisoformat(row.created),
            starts=datetime.fromisoformat(row.starts),
            expires=datetime.fromisoformat(row.expires),
        )
        for row in rows
        if row.algorithm in ALGORITHMS
    )
    return tuple(sorted(found, key=lambda row: (row.starts, row.kid)))


def key_values(row: KeyRow) -> dict[str, str]:
    """Return a key's columns."""
    return {
        "kid": row.kid,
        "algorithm": row.algorithm,
        "chain": row.chain.decode("ascii"),
        "private": base64.b64encode(row.private).decode("ascii"),
        "created": row.created.astimezone(UTC).isoformat(),
        "starts": row.starts.astimezone(UTC).isoformat(),
        "expires": row.expires.astimezone(UTC).isoformat(),
    }


def _context(kid: str, algorithm: str) -> bytes:
    return f"attestation-key {kid} {algorithm}".encode("ascii")


def _certificate(private: jose.PrivateKey, url: str, start: datetime, end: datetime) -> bytes:
    # The verifier of Azure's tokens takes a certificate to name the instance that it signs for.
    label = url if len(url) <= _COMMON_NAME else "pyenclave attestation"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    public = private.public_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(minutes=5))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(url)]), critical=False
        )
        .add_extension(identifier, critical=False)
    )
    made = builder.sign(private, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def make_key(
    algorithm: Algorithm,
    *,
    url: str,
    starts: datetime,
    now: datetime,
    schedule: Schedule,
    secrets: Secrets,
) -> KeyRow:
    """Make a key; slow for RSA, so not inside a transaction."""
    private: jose.PrivateKey
    if algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        private = rsa.generate_private_key(65537, _BITS)
    spki = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    kid = jose.b64url_encode(hashlib.sha256(spki).digest())
    expires = starts + schedule.lifetime + schedule.lead + schedule.overlap
    pkcs8 = private.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return KeyRow(
        kid=kid,
        algorithm=algorithm,
        chain=_certificate(private, url, now, expires),
        private=secrets.protect(pkcs8, _context(kid, algorithm)),
        created=now,
        starts=starts,
        expires=expires,
    )


def renewed_key(row: KeyRow, secrets: Secrets) -> KeyRow | None:
    """
    Return *row* under the newest of the secrets; None if it is already.

    Raises:
        UnsealError: As `open_key`.

    """
    private = renewed(secrets, row.private, _context(row.kid, row.algorithm))
    return None if private is None else replace(row, private=private)


def open_key(row: KeyRow, secrets: Secrets) -> SigningKey:
    """
    Return the key of *row*.

    Raises:
        UnsealError: It was protected by other secrets, or changed.

    """
    pkcs8 = secrets.open(row.private, _context(row.kid, row.algorithm))
    private = serialization.load_der_private_key(pkcs8, None)
    if not isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TypeError("a signing key is EC or RSA")
    certificates = x509.load_pem_x509_certificates(row.chain)
    return SigningKey(
        kid=row.kid,
        algorithm=row.algorithm,
        private=private,
        chain=tuple(item.public_bytes(serialization.Encoding.DER) for item in certificates),
        ends=row.expires,
    )


def signing_row(rows: Sequence[KeyRow], algorithm: Algorithm, now: datetime) -> KeyRow | None:
    """Return the key of *algorithm* that signs now."""
    fitting = [
        row for row in rows if row.algorithm == algorithm and row.starts <= now < row.expires
    ]
    return max(fitting, key=lambda row: (row.starts, row.kid), default=None)
