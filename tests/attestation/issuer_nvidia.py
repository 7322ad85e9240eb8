"""Makes reports as an NVIDIA GPU does, under a root of our own."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import der
from pyenclave.formats.spdm import FWID, GpuReport, Measurement

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
NONCE = bytes(range(32))
DIGEST = b"\x61" * 48
FIRMWARE = b"\x62" * 48
PLACES = ("leaf", "brom", "product", "root")
_OID_DEVICE_ID = x509.ObjectIdentifier("2.23.133.5.4.1")
_OID_DEVICE_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")
_SHA384 = "2.16.840.1.101.3.4.2.2"


@cache
def key_of(name: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    secret = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return ec.derive_private_key(secret >> 8, curve or ec.SECP384R1())


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def device_identity(fwid: bytes, *, version: int = 1) -> bytes:
    """Return DICE's composite device identity."""
    spki = key_of("brom").public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der.encode_sequence(
        der.encode_integer(version),
        spki,
        der.encode_sequence(der.encode_oid(_SHA384), der.encode_octet_string(fwid)),
    )


def certificate(place: str, **changes: Any) -> x509.Certificate:
    """Return the certificate of *place*; options: start, end, issuer, signer, key, hash, serial,
    path_length, cert_sign, identity."""
    index = PLACES.index(place)
    above = PLACES[min(index + 1, 3)]
    builder = (
        x509.CertificateBuilder()
        .subject_name(name_of(place))
        .issuer_name(name_of(changes.get("issuer", above)))
        .public_key(changes.get("key", key_of(place)).public_key())
        .serial_number(index + 1)
        .not_valid_before(changes.get("start", AT - timedelta(hours=1)))
        .not_valid_after(changes.get("end", datetime(9999, 12, 31, tzinfo=UTC)))
    )
    signs = changes.get("cert_sign", index > 0)
    builder = builder.add_extension(
        x509.KeyUsage(
            digital_signature=not signs,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=signs,
            crl_sign=signs,
            encipher_only=False,
            decipher_only=False,
        ),
        critical=True,
    )
    if index > 0:
        constraints = x509.BasicConstraints(ca=True, path_length=changes.get("path_length"))
        builder = builder.add_extension(constraints, critical=True)
    else:
        identity = changes.get("identity", device_identity(FIRMWARE))
        if identity is not None:
            extension = x509.UnrecognizedExtension(_OID_DEVICE_ID, identity)
            builder = builder.add_extension(extension, critical=False)
        names = [
            x509.DNSName("other.example"),
            x509.OtherName(_OID_DEVICE_INFO, der.encode_text("NVIDIA:GH100:0123")),
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(changes.get("signer", key_of(above)), changes.get("hash", hashes.SHA384()))


def chain(**changes: Any) -> bytes:
    """Return leaf to root in PEM; options: a dict for each place."""
    made = (certificate(place, **changes.get(place, {})) for place in PLACES)
    return b"".join(item.public_bytes(Encoding.PEM) for item in made)


def root() -> bytes:
    return certificate("root").public_bytes(Encoding.DER)


def crl(
    *, revoked: tuple[int, ...] = (), issuer: str = "brom", end: timedelta = timedelta(1)
) -> bytes:
    """Return a revocation list of *issuer*."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name_of(issuer))
        .last_update(AT - timedelta(hours=1))
        .next_update(AT + end)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key_of(issuer).public_key()),
            critical=False,
        )
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(AT)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key_of(issuer), hashes.SHA384()).public_bytes(Encoding.DER)


def report(*, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> bytes:
    """Return a signed report; options: those of `GpuReport.unsigned_bytes`."""
    values: dict[str, Any] = {
        "nonce": NONCE,
        "measurements": {1: Measurement(1, False, DIGEST), 2: Measurement(1, False, bytes(48))},
        "fields": {3: b"570.00\0", 6: b"\0\x9f\0\x96\1\0\0\0", FWID: FIRMWARE},
    }
    data = GpuReport.unsigned_bytes(**(values | changes))
    return data + sign(data, key or key_of("leaf"))


def sign(data: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


CHAIN, ROOT = chain(), root()
POLICY = AppraisalPolicy(gpu_measurements={1: DIGEST})


def judge(data: bytes, **changes: Any) -> AttestationResult:
    """Appraise *data*; options: those of `appraise`, ``chain`` and ``crl``."""
    endorsements = {"cert-chain.pem": changes.pop("chain", None) or CHAIN}
    if "crl" in changes:
        endorsements["crl.der"] = changes.pop("crl")
    options: dict[str, Any] = {
        "policy": POLICY,
        "nonce": NONCE,
        "roots": [ROOT],
        "endorsements": endorsements,
        "at": AT,
    }
    return appraise(data, **(options | changes))
