"""
A whole issuer of evidence, so that every mutation is reachable.

Its keys are fixed, so the same calls give evidence that differs only where it is asked to. Nothing
of it is in the package.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import dcap
from pyenclave.formats.evidence import Evidence, bound_report_data
from pyenclave.formats.record import (
    QE_MRENCLAVE,
    QE_MRSIGNER,
    QE_VENDOR_ID,
    ProtectionBit,
    ProtectionRecord,
)
from pyenclave.formats.sgx import Attributes, ReportBody
from pyenclave.sealed.provision import RuntimeKey

PLACES = ("leaf", "intermediate", "root")
CPU_SVN = (2).to_bytes(2, "little") + bytes(14)


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


class Issuer:
    """Makes evidence; every part can be replaced by name."""

    AT = datetime(2026, 7, 1, tzinfo=UTC)
    START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    NONCE = bytes(range(32))
    MRENCLAVE, MRSIGNER = b"\x11" * 32, b"\x22" * 32

    def __init__(self) -> None:
        self.runtime = RuntimeKey()
        self.root = self.certificate("root")

    @staticmethod
    def key(name: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
        secret = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
        return ec.derive_private_key(secret % (1 << 250) + 1, curve or ec.SECP256R1())

    @staticmethod
    def sign(signer: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        r, s = decode_dss_signature(signer.sign(data, algorithm))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    @staticmethod
    def raw_public(private: ec.EllipticCurvePrivateKey) -> bytes:
        numbers = private.public_key().public_numbers()
        return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")

    @staticmethod
    def key_usage(*, sign_data: bool, sign_certificates: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=sign_data,
            key_cert_sign=sign_certificates,
            crl_sign=sign_certificates,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )

    def certificate(self, place: str, **changes: Any) -> x509.Certificate:
        above = {"leaf": "intermediate"}.get(place, "root")
        is_ca = place != "leaf"
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(changes.get("subject", place)))
            .issuer_name(name_of(changes.get("issuer", above)))
            .public_key(changes.get("key", self.key(place)).public_key())
            .serial_number(PLACES.index(place) + 1)
            .not_valid_before(changes.get("start", self.START))
            .not_valid_after(changes.get("end", self.END))
        )
        length = {"leaf": None, "intermediate": 0, "root": 1}[place]
        constraints = changes.get("constraints", x509.BasicConstraints(is_ca, length))
        if constraints is not None:
            builder = builder.add_extension(constraints, changes.get("critical", True))
        usage = changes.get("usage", self.key_usage(sign_data=not is_ca, sign_certificates=is_ca))
        if usage is not None:
            builder = builder.add_extension(usage, True)
        for extension in changes.get("extensions", ()):
            builder = builder.add_extension(extension, True)
        signer = changes.get("signer", self.key(above))
        return builder.sign(signer, changes.get("hash", hashes.SHA256()), ecdsa_deterministic=True)

    def chain(self, **changes: dict[str, Any]) -> tuple[x509.Certificate, ...]:
        return tuple(self.certificate(place, **changes.get(place, {})) for place in PLACES)

    def evidence(self, **changes: Any) -> bytes:
        return self.parts(**changes).to_bytes()

    def record(self, changes: dict[str, Any], signer: ec.EllipticCurvePrivateKey) -> bytes:
        fields = {
            "level": "embedded",
            "tee": "none",
            "platform_svn": 2,
            "ephemeral": False,
            "debug": False,
            "jit": False,
            "enclave_id": "0f" * 16,
            "bits": {
                "seccomp": ProtectionBit(value=True, by="outside"),
                "landlock": ProtectionBit(value=7, by="inside"),
                "mdwe": ProtectionBit(value=False, by="inside"),
            },
        } | changes
        unsigned = ProtectionRecord(**fields)
        signature = self.sign(signer, unsigned.signed_bytes())
        return ProtectionRecord(**fields, signature=signature).to_bytes()

    def parts(self, **changes: Any) -> Evidence:
        """Make evidence. Each name replaces one part; what depends on it is made to fit."""
        get = changes.get
        debug = get("debug", False)
        attestation = self.key("attestation")
        record = get("record_bytes") or self.record(
            {"debug": debug} | get("record", {}), get("record_key", attestation)
        )
        nonce, user_data = get("nonce", self.NONCE), get("user_data", b"user data")
        runtime_key = get("runtime_key", self.runtime.public)
        body = {
            "cpu_svn": CPU_SVN,
            "attributes": Attributes(flags=0x7 if debug else 0x5, xfrm=3),
            "mrenclave": self.MRENCLAVE,
            "mrsigner": self.MRSIGNER,
            "isv_prod_id": 7,
            "isv_svn": 3,
            "config_id": hashlib.sha256(record).digest() + bytes(32),
            "report_data": bound_report_data(
                nonce=nonce, runtime_key=runtime_key, user_data=user_data
            ),
        } | get("body", {})
        auth = get("auth", b"auth data of the quoting enclave")
        attested = get("attestation_public", self.raw_public(attestation))
        qe = {
            "cpu_svn": CPU_SVN,
            "attributes": Attributes(flags=5, xfrm=3),
            "mrenclave": QE_MRENCLAVE,
            "mrsigner": QE_MRSIGNER,
            "report_data": hashlib.sha256(attested + auth).digest() + bytes(32),
        } | get("qe", {})
        qe_report = ReportBody(**qe)
        chain = get("chain") or self.chain()
        quote = dcap.Quote(
            qe_vendor_id=get("vendor", QE_VENDOR_ID),
            report_body=ReportBody(**body),
            signature=bytes(64),
            attestation_key=attested,
            qe_report=qe_report,
            qe_report_signature=self.sign(get("qe_key", self.key("leaf")), qe_report.to_bytes()),
            qe_auth_data=auth,
            certification_type=get("certification_type", dcap.CERTIFICATION_PCK_CHAIN),
            certification_data=get(
                "pem", b"".join(item.public_bytes(Encoding.PEM) for item in chain)
            ),
        )
        signature = self.sign(get("quote_key", attestation), quote.signed_bytes)
        quote = replace(quote, **({"signature": signature} | get("quote", {})))
        raw = get("raw", False)
        return Evidence(
            quote=quote.to_bytes() + get("padding", b""),
            record=record,
            runtime_key=None if raw else runtime_key,
            user_data=None if raw else user_data,
            nonce=None if raw else nonce,
        )

    def policy(self, **options: Any) -> AppraisalPolicy:
        """The policy of a relying party that knows this enclave, on a software platform."""
        values: dict[str, Any] = {
            "mrenclave": self.MRENCLAVE,
            "mrsigner": self.MRSIGNER,
            "product_id": 7,
            "min_security_version": 3,
            "dangerous_allow_software": True,
        }
        return AppraisalPolicy(**(values | options))

    def appraise(self, evidence: bytes, **options: Any) -> AttestationResult:
        if "policy" not in options:
            options["policy"] = self.policy()
        options.setdefault("roots", [self.root])
        options.setdefault("at", self.AT)
        if options.get("freshness") != "not_checked":
            options.setdefault("nonce", self.NONCE)
        return appraise(evidence, **options)
