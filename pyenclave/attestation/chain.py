"""
The certificate chain of a platform: leaf, intermediate, root.

Written for a profile, not for the web: exactly three certificates, P-256 and SHA-256 throughout,
only the extensions that the profile knows may be critical. X.509: RFC 5280.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from pyenclave.attestation.checks import PASSED, Verdict, failed
from pyenclave.errors import EvidenceFormatError

__all__ = [
    "Root",
    "load_root",
    "parse",
    "public_key_bytes",
    "raw_public_key",
    "verify_raw",
]

Root = x509.Certificate | bytes

_LENGTH: Final = 3
_NAMES: Final = ("leaf", "intermediate", "root")
_KNOWN_CRITICAL: Final = (ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE)


def parse(pem: bytes) -> tuple[x509.Certificate, ...]:
    """
    Read leaf, intermediate and root.

    Raises:
        EvidenceFormatError: Not exactly three certificates in the one canonical PEM form.

    """
    try:
        chain = tuple(x509.load_pem_x509_certificates(pem))
    except (ValueError, x509.InvalidVersion, Warning) as error:  # Warning: under -W error
        raise EvidenceFormatError(f"certificate chain is malformed: {error}") from None
    if len(chain) != _LENGTH:
        raise EvidenceFormatError(
            "certificate chain", expected="leaf, intermediate and root", found=len(chain)
        )
    if b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain) != pem:
        raise EvidenceFormatError("certificate chain is not in the canonical PEM form")
    for name, certificate in zip(_NAMES, chain, strict=True):
        # The count of unused bits in signatureValue is signed by nobody, and DER parsers let
        # values other than zero through.
        if not certificate.public_bytes(Encoding.DER).endswith(b"\0" + certificate.signature):
            raise EvidenceFormatError(f"{name} certificate: its signature is not whole bytes")
    return chain


def public_key_bytes(certificate: x509.Certificate) -> bytes:
    """Return the SubjectPublicKeyInfo of *certificate* in DER."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_root(root: Root) -> x509.Certificate:
    """
    Return a pinned root given as a certificate, or as PEM or DER.

    Raises:
        TypeError: Neither.
        ValueError: The bytes are no certificate.

    """
    if isinstance(root, x509.Certificate):
        return root
    if not isinstance(root, bytes):
        raise TypeError(f"a root is a certificate or bytes, not {type(root).__name__}")
    if root.lstrip().startswith(b"-----BEGIN"):
        return x509.load_pem_x509_certificate(root)
    return x509.load_der_x509_certificate(root)


def raw_public_key(raw: bytes) -> ec.EllipticCurvePublicKey:
    """
    Return the P-256 key of X ‖ Y (64 bytes, big-endian).

    Raises:
        ValueError: Not a point of the curve.

    """
    if len(raw) != 64:
        raise ValueError(f"a raw P-256 key has 64 bytes, not {len(raw)}")
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + raw)


def verify_raw(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> Verdict:
    """Verify a raw ECDSA signature R ‖ S (64 bytes, big-endian) with SHA-256."""
    if len(signature) != 64:
        return failed(expected="64 bytes", found=f"{len(signature)} bytes")
    der = encode_dss_signature(
        int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    )
    try:
        key.verify(der, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return failed(
            expected="a valid signature", found="an invalid one", advice="Something was changed."
        )
    return PASSED


def check_root(chain: Sequence[x509.Certificate], roots: Iterable[x509.Certificate]) -> Verdict:
    """Compare the root's public key with the pinned ones; names and identifiers do not count."""
    pinned = {public_key_bytes(root) for root in roots}
    own = chain[-1]
    if public_key_bytes(own) in pinned:
        return PASSED
    return failed(
        expected=f"one of {len(pinned)} pinned roots",
        found=f"SHA-256 {own.fingerprint(hashes.SHA256()).hex()}",
        advice="Enrol the platform's root out of band and give it as roots= (--root).",
    )


def _extensions(name: str, certificate: x509.Certificate) -> x509.Extensions:
    try:
        return certificate.extensions
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise EvidenceFormatError(f"{name} certificate: its extensions: {error}") from None


def check_names(chain: Sequence[x509.Certificate]) -> Verdict:
    """Each certificate names its issuer; the root names itself."""
    for name, child, issuer in _links(chain):
        if child.issuer != issuer.subject or not list(child.issuer):
            return failed(
                expected=f"{name} issued by {issuer.subject.rfc4514_string()}",
                found=child.issuer.rfc4514_string(),
            )
    return PASSED


def check_algorithms(chain: Sequence[x509.Certificate]) -> Verdict:
    """X.509 version 3, P-256 keys, ECDSA with SHA-256."""
    for name, certificate in zip(_NAMES, chain, strict=True):
        key = certificate.public_key()
        if certificate.version is not x509.Version.v3:
            return failed(expected=f"{name}: X.509 v3", found=certificate.version.name)
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            return failed(expected=f"{name}: a P-256 key", found=type(key).__name__)
        if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
            return failed(
                expected=f"{name}: ECDSA with SHA-256",
                found=certificate.signature_algorithm_oid.dotted_string,
            )
    return PASSED


def check_constraints(chain: Sequence[x509.Certificate]) -> Verdict:
    """The CA bit and the path length as each place demands; no unknown critical extension."""
    for place, (name, certificate) in enumerate(zip(_NAMES, chain, strict=True)):
        extensions = _extensions(name, certificate)
        for extension in extensions:
            if extension.critical and extension.oid not in _KNOWN_CRITICAL:
                return failed(
                    expected=f"{name}: no unknown critical extension",
                    found=extension.oid.dotted_string,
                )
        wanted_ca = place > 0
        try:
            found = extensions.get_extension_for_class(x509.BasicConstraints)
        except x509.ExtensionNotFound:
            return failed(expected=f"{name}: basic constraints", found=None)
        if found.value.ca is not wanted_ca or not found.critical:
            return failed(expected=f"{name}: critical, CA {wanted_ca}", found=found.value)
        limit = found.value.path_length
        # As many intermediates may follow as do follow: none below the intermediate, one below.
        if wanted_ca and limit is not None and limit < place - 1:
            return failed(expected=f"{name}: path length at least {place - 1}", found=limit)
    return PASSED


def check_key_usage(chain: Sequence[x509.Certificate]) -> Verdict:
    """CAs may sign certificates; the leaf may sign data and no certificates."""
    for place, (name, certificate) in enumerate(zip(_NAMES, chain, strict=True)):
        try:
            found = _extensions(name, certificate).get_extension_for_class(x509.KeyUsage)
        except x509.ExtensionNotFound:
            return failed(expected=f"{name}: key usage", found=None)
        usage = found.value
        is_ca = place > 0
        if usage.key_cert_sign is not is_ca or (not is_ca and not usage.digital_signature):
            wanted = "keyCertSign" if is_ca else "digitalSignature without keyCertSign"
            return failed(expected=f"{name}: {wanted}", found=usage)
    return PASSED


def check_validity(chain: Sequence[x509.Certificate], at: datetime) -> Verdict:
    """Every certificate is valid at the given time."""
    for name, certificate in zip(_NAMES, chain, strict=True):
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not start <= at <= end:
            return failed(
                expected=f"{name} valid at {at.isoformat()}",
                found=f"{start.isoformat()} to {end.isoformat()}",
                advice="Check the time that was given, or the clock.",
            )
    return PASSED


def check_signatures(chain: Sequence[x509.Certificate]) -> Verdict:
    """Each certificate is signed by the next one, the root by itself."""
    for name, child, issuer in _links(chain):
        key = issuer.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return failed(expected=f"{name}: an EC issuer", found=type(key).__name__)
        try:
            key.verify(child.signature, child.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return failed(expected=f"{name}: signed by its issuer", found="invalid signature")
    return PASSED


def _links(
    chain: Sequence[x509.Certificate],
) -> list[tuple[str, x509.Certificate, x509.Certificate]]:
    """Return name, certificate and issuer of each certificate; the root issues itself."""
    pairs = [*pairwise(chain), (chain[-1], chain[-1])]
    return [(name, child, issuer) for name, (child, issuer) in zip(_NAMES, pairs, strict=True)]
