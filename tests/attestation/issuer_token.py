"""Makes tokens of every kind, with keys and certificates of our own."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import jose
from pyenclave.formats.jwk import public_members

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
NOW = int(AT.timestamp())
NONCE = bytes(range(200, 232))
EAR_KEY = ec.derive_private_key(7, ec.SECP256R1())
FORGED = ec.derive_private_key(8, ec.SECP256R1())
ISSUER = "https://shared.eus.attest.azure.net"
MRENCLAVE = b"\x11" * 32
GONE = object()


def without(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not GONE}


def ear_claims(**changes: Any) -> dict[str, Any]:
    """Return the claims of an attestation result; GONE removes one."""
    return without(
        {
            "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
            "iat": NOW - 10,
            "exp": NOW + 300,
            "iss": "https://verifier.example",
            "eat_nonce": NONCE.hex(),
            "submods": {
                "cpu0": {
                    "ear.status": "affirming",
                    "ear.trustworthiness-vector": {"hardware": 2, "executables": 3},
                    "ear.appraisal-policy-id": "default",
                }
            },
        }
        | changes
    )


def maa_claims(**changes: Any) -> dict[str, Any]:
    return without(
        {
            "iss": ISSUER,
            "iat": NOW - 10,
            "nbf": NOW - 10,
            "exp": NOW + 300,
            "nonce": NONCE.hex(),
            "x-ms-ver": "1.0",
            "x-ms-attestation-type": "sgx",
            "x-ms-sgx-is-debuggable": False,
            "x-ms-sgx-mrenclave": MRENCLAVE.hex(),
            "x-ms-sgx-product-id": 1,
            "x-ms-sgx-svn": 3,
        }
        | changes
    )


def keys_of(key: Any = EAR_KEY, **members: Any) -> dict[str, bytes]:
    found = without({"kid": "one", **public_members(key.public_key())} | members)
    return {"jwks.json": json.dumps({"keys": [found]}).encode()}


def token(
    claims: dict[str, Any], key: Any = EAR_KEY, kid: str | None = "one", **header: Any
) -> bytes:
    algorithm = header.pop("algorithm", None)
    return jose.sign(claims, key=key, kid=kid, algorithm=algorithm, header=header).encode()


def judge(data: bytes, **changes: Any) -> AttestationResult:
    options: dict[str, Any] = {
        "policy": AppraisalPolicy.any_code(),
        "nonce": NONCE,
        "at": AT,
        "endorsements": keys_of(),
    }
    return appraise(data, **(options | changes))


def make_certificate(
    name: str,
    key: Any,
    *,
    issuer: str | None = None,
    signer: Any = None,
    ca: bool = False,
    signs: bool | None = None,
    end: datetime = AT + timedelta(days=1),
) -> x509.Certificate:
    """Return a certificate; *signs* says whether its key usage lets it sign certificates."""

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer or name))
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(AT - timedelta(days=1))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    signs = ca if signs is None else signs
    builder = builder.add_extension(
        x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, **usage), critical=True
    )
    return builder.sign(signer or key, hashes.SHA256())
