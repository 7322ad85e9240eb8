"""Makes Nitro documents as the hypervisor does, under a root of our own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats.cose import Sign1
from pyenclave.formats.nitro import NitroPayload

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
NONCE = bytes(range(20))
PCR0 = b"\x11" * 48
PLACES = ("leaf", "instance", "region", "root")


@cache
def key_of(name: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    secret = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return ec.derive_private_key(secret >> 8, curve or ec.SECP384R1())


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Issuer:
    """Makes documents as the hypervisor does; every part can be replaced by name."""

    def certificate(self, place: str, **changes: Any) -> x509.Certificate:
        """Return the certificate of *place*; options: ca, start, end, issuer, signer, key, usage,
        hash, path_length, critical."""
        index = PLACES.index(place)
        above = PLACES[min(index + 1, 3)]
        ca = changes.get("ca", index > 0)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(place))
            .issuer_name(name_of(changes.get("issuer", above)))
            .public_key(changes.get("key", key_of(place)).public_key())
            .serial_number(index + 1)
            .not_valid_before(changes.get("start", AT - timedelta(hours=1)))
            .not_valid_after(changes.get("end", AT + timedelta(hours=2)))
            .add_extension(
                x509.BasicConstraints(ca=ca, path_length=changes.get("path_length")),
                critical=changes.get("critical", True),
            )
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
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        if "extension" in changes:
            builder = builder.add_extension(changes["extension"], critical=True)
        signer = changes.get("signer", key_of(above))
        return builder.sign(signer, changes.get("hash", hashes.SHA384()))

    def document(self, **changes: Any) -> bytes:
        """Return a document; options: names of the payload's fields, ``leaf`` … ``root`` as
        options of certificates, ``chain``, ``key``, ``algorithm``, ``message``, ``fields``."""
        made = {
            place: self.certificate(place, **changes.get(place, {})).public_bytes(Encoding.DER)
            for place in PLACES
        }
        payload = NitroPayload(
            module_id=changes.get("module_id", "i-1-enc2"),
            digest=changes.get("digest", "SHA384"),
            timestamp=changes.get("timestamp", int(AT.timestamp() * 1000) - 5000),
            pcrs=changes.get("pcrs", {0: PCR0} | {index: bytes(48) for index in range(1, 16)}),
            certificate=changes.get("certificate", made["leaf"]),
            cabundle=changes.get("cabundle", (made["root"], made["region"], made["instance"])),
            public_key=changes.get("public_key", b"key"),
            user_data=changes.get("user_data", b"data"),
            nonce=changes.get("nonce", NONCE),
        )
        message = Sign1.sign(
            payload.to_bytes(),
            key=changes.get("key", key_of("leaf")),
            algorithm=changes.get("algorithm", "ES384"),
        )
        return replace(message, **changes.get("message", {})).to_bytes()

    def root(self) -> bytes:
        return self.certificate("root").public_bytes(Encoding.DER)


ISSUER = Issuer()
ROOT = ISSUER.root()
POLICY = AppraisalPolicy(pcrs={0: PCR0})


def judge(data: bytes, **changes: Any) -> AttestationResult:
    options: dict[str, Any] = {
        "policy": POLICY,
        "nonce": NONCE,
        "roots": [ROOT],
        "at": AT,
    }
    return appraise(data, **(options | changes))
