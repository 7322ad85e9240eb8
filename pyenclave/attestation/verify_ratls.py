"""
The checks of RA-TLS certificates: a quote in a certificate, bound to the certificate's key.

Rules: the project's notes on RA-TLS, 7.2. That the peer has the key is shown by the certificate's
own signature and by the TLS handshake. The quote is judged by the checks of its kind, under the
names ``sgx.…`` or ``tdx.…``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation import pki, verify_sgx, verify_tdx
from pyenclave.attestation.case import CaseBase, gathered, judge_report_data
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed, not_asked
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.formats import dcap, ratls
from pyenclave.formats.ratls import RaTlsCertificate
from pyenclave.formats.x509 import OID_BASIC_CONSTRAINTS, OID_KEY_USAGE, Certificate

__all__ = ["CHECKS", "Case", "claims", "legacy_binding", "self_signature"]

_NULL: Final = b"\x05\x00"
_ECDSA_SHA256: Final = "1.2.840.10045.4.3.2"
_CRITICAL: Final = frozenset(
    (
        OID_BASIC_CONSTRAINTS,
        OID_KEY_USAGE,
        ratls.OID_EVIDENCE,
        ratls.OID_ENDORSEMENTS,
        *ratls.OIDS_GRAMINE,
        *ratls.OIDS_OPEN_ENCLAVE,
        *ratls.OIDS_OPEN_ENCLAVE_EVIDENCE,
        "2.5.29.17",  # the host's names: TLS judges them
        "2.5.29.37",  # extended key usage, likewise
    )
)
_DIGEST: Final = 32  # bytes of the report data that a SHA-256 fills; the rest is zero


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A certificate, and what it is judged by."""

    def read_certificate(self) -> RaTlsCertificate:
        """Read the certificate and the evidence in it."""
        return self._part("certificate", lambda: RaTlsCertificate.from_bytes(self.data))

    def read_quote(self) -> dcap.Quote | dcap.TdQuote:
        """Read the quote in it."""
        raw = self.found.quote
        return self._part("quote", lambda: dcap.read_quote(raw))

    @property
    def found(self) -> RaTlsCertificate:
        """The certificate, for other checks."""
        return self.need("certificate.format", self.read_certificate)

    @property
    def quote(self) -> dcap.Quote | dcap.TdQuote:
        """The quote, for other checks."""
        return self.need("certificate.quote", self.read_quote)

    @property
    def quoted(self) -> bytes:
        """The report data of the quote."""
        return self.quote.report_body.report_data

    def collateral(self) -> Endorsements:
        """Return what was given; what the certificate carries counts where nothing was given."""
        carried = self.found.endorsements
        return Endorsements.of({**carried, **self.endorsements.files})


CHECKS: Final[Registry[Case]] = Registry()


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("certificate.format")
def _format(case: Case) -> Verdict:
    """The bytes are one certificate with evidence in it."""
    case.read_certificate()
    return PASSED


@CHECKS.evidence("certificate.quote")
def _quote(case: Case) -> Verdict:
    """The evidence is a quote that can be read."""
    case.read_quote()
    return PASSED


@CHECKS.evidence("certificate.signature")
def _signature(case: Case) -> Verdict:
    """By its own key, or by a root that the relying party gives."""
    certificate = case.found.certificate
    if certificate.issuer == certificate.subject:
        return self_signature(certificate)
    for root in case.anchors():
        if root.subject == certificate.issuer and _signed(certificate, root):
            return PASSED
    return failed(
        expected="signed by its own key or a given root",
        found=f"issued by {certificate.issuer_text}",
        advice="Give the issuer's root (--root).",
    )


def self_signature(certificate: Certificate) -> Verdict:
    """Judge the signature of a self-signed certificate."""
    if _signed(certificate, certificate):
        return PASSED
    return failed(
        expected="a signature of its own key",
        found="an invalid one",
        advice="Whoever made it does not have the key.",
    )


def _signed(certificate: Certificate, issuer: Certificate) -> bool:
    algorithm = certificate.signature_algorithm
    name = pki.algorithm_name(algorithm) or ""
    # mbedTLS, and so Gramine, writes a NULL where ECDSA has no parameters.
    if algorithm.oid == _ECDSA_SHA256 and algorithm.parameters == _NULL:
        name = "ecdsa-sha256"
    return pki.verify_signature(issuer.public_key(), name, certificate.signature, certificate.tbs)


@CHECKS.evidence("certificate.validity")
def _validity(case: Case) -> Verdict:
    """Its dates are its maker's word; one that says it is over is believed."""
    return pki.check_validity((case.found.certificate,), case.at)


@CHECKS.evidence("certificate.extensions")
def _extensions(case: Case) -> Verdict:
    """Nothing is critical that nobody here judges (RFC 5280, 4.2)."""
    for oid, extension in case.found.certificate.extensions.items():
        if extension.critical and oid not in _CRITICAL:
            return failed(expected="no unknown critical extension", found=oid)
    return PASSED


@CHECKS.evidence("binding.claims")
def _claims_binding(case: Case) -> Verdict:
    """The report data is the hash of the claims, and zeros."""
    buffer = case.found.claims_buffer
    if buffer is None:
        return not_asked("a legacy form, without claims")
    wanted = hashlib.sha256(buffer).digest() + bytes(64 - _DIGEST)
    if hmac.compare_digest(wanted, case.quoted):
        return PASSED
    return failed(expected=wanted, found=case.quoted, advice="The quote was made for other claims.")


@CHECKS.evidence("binding.key")
def _key_binding(case: Case) -> Verdict:
    """The key of the certificate is the one that the attested code named."""
    found = case.found
    spki = found.certificate.spki
    buffer = found.claims_buffer
    if found.legacy and buffer is not None:
        if ratls.named_key(buffer, spki) is not None:
            return PASSED
        return failed(
            expected=f"the key SHA-256 {hashlib.sha256(spki).hexdigest()} among the claims",
            found=f"{buffer[:_DIGEST].hex()}…",
            advice="The evidence is of another key.",
        )
    if found.legacy:
        if legacy_binding(spki, case.quoted, found.form):
            return PASSED
        wanted = hashlib.sha256(spki).digest() + bytes(64 - _DIGEST)
    else:
        algorithm, digest = found.key_hash
        wanted = ratls.HASHES[algorithm](spki).digest()
        if hmac.compare_digest(wanted, digest):
            return PASSED
        return failed(expected=wanted, found=digest, advice="The certificate has another key.")
    return failed(expected=wanted, found=case.quoted, advice="The quote is of another key.")


def legacy_binding(spki: bytes, report_data: bytes, form: str) -> tuple[str, ...]:
    """Return how legacy *report_data* names the key *spki*; empty if it does not."""
    if any(report_data[_DIGEST:]):
        return ()
    forms = ratls.key_forms(spki)
    if form == "gramine":
        forms = {"der": forms["der"]}
    return tuple(
        f"sha256({name})"
        for name, data in forms.items()
        if hmac.compare_digest(hashlib.sha256(data).digest(), report_data[:_DIGEST])
    )


def _inner_sgx(case: Case) -> verify_sgx.Case | None:
    if isinstance(case.quote, dcap.TdQuote):
        return None
    return case.derive(verify_sgx.Case, case.found.quote, endorsements=case.collateral())


def _inner_tdx(case: Case) -> verify_tdx.Case | None:
    if isinstance(case.quote, dcap.Quote):
        return None
    return case.derive(verify_tdx.Case, case.found.quote, endorsements=case.collateral())


CHECKS.include("sgx", verify_sgx.CHECKS, _inner_sgx, optional=True)
CHECKS.include("tdx", verify_tdx.CHECKS, _inner_tdx, optional=True)


# ---- is it what I want? -----------------------------------------------------------------------


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The claims beside the quote have the nonce."""
    if case.nonce is None:
        return not_asked("give the nonce that was sent, or the certificate may be an old one")
    found = case.found.nonce
    if found is not None and hmac.compare_digest(case.nonce, found):
        return PASSED
    return failed(
        expected=case.nonce,
        found=found if found is not None else "no nonce among the claims",
        advice="Replayed, made at start-up, or of a form that cannot carry a nonce.",
    )


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """The report data of the quote is the expected one."""
    return judge_report_data(case, case.quoted)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """Nothing is expected that a certificate does not have."""
    if case.user_data is None:
        return not_asked("RA-TLS certificates have claims instead")
    return failed(expected=case.user_data, found="none")


@CHECKS.policy("certificate.form")
def _form(case: Case) -> Verdict:
    """Older forms bind the key as well; that they are old is said and does not refuse."""
    if case.found.legacy:
        return not_asked(
            "a legacy form; the interoperable one has extension " + ratls.OID_EVIDENCE,
            found=case.found.form,
        )
    return PASSED


# ---- what it says -----------------------------------------------------------------------------


def claims(case: Case) -> Mapping[str, Any]:
    """Return what certificate and quote say, as far as they can be read."""
    return gathered(case, _quote_claims, _certificate_claims)


def _certificate_claims(case: Case) -> dict[str, Any]:
    found = case.found
    certificate = found.certificate
    return {
        "form": found.form,
        "legacy": found.legacy,
        "subject": certificate.subject_text,
        "spki_sha256": certificate.spki_sha256.hex(),
        "nonce": found.nonce.hex() if found.nonce is not None else None,
        "claims": sorted(str(name) for name in found.claims),
        "binding": _named(case),
    }


def _named(case: Case) -> list[str]:
    """Return how the evidence names the key."""
    found, spki = case.found, case.found.certificate.spki
    if not found.legacy:
        return ["claims"]
    if found.claims_buffer is None:
        return list(legacy_binding(spki, case.quoted, found.form))
    named = ratls.named_key(found.claims_buffer, spki)
    return [] if named is None else [f"claims: {named}"]


def _quote_claims(case: Case) -> dict[str, Any]:
    inner = _inner_sgx(case)
    if inner is not None:
        return {"tee": "sgx", **verify_sgx.claims(inner)}
    td = _inner_tdx(case)
    return {"tee": "tdx", **verify_tdx.claims(td)} if td is not None else {}
