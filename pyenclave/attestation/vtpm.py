"""
The checks of a vTPM's quote and of its attestation key's certificate.

TPM 2.0 Library, parts 1 to 3; the project's notes on evidence providers, 1.6. The attestation key
(AK) is bound to hardware by what is around it; its certificate, if it is given, says the same once
more and is no substitute. Only PCRs that the quote selects are believed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from pyenclave.attestation import pki
from pyenclave.attestation.case import CaseBase, judge_registers
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    failed,
    not_asked,
)
from pyenclave.errors import EnclaveError, EvidenceFormatError
from pyenclave.formats import der, tpm
from pyenclave.formats.der import Der
from pyenclave.formats.eventlog import EventLog
from pyenclave.formats.hcl import RsaKey
from pyenclave.formats.tpm import TpmQuote, TpmSignature
from pyenclave.formats.x509 import Certificate
from pyenclave.measurement.replay import Replay, replay

__all__ = ["VtpmCase", "ak_claims", "quote_claims", "register_vtpm", "signature_of"]

_HASHES: Final = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
_NO_QUOTE: Final = not_asked("no vTPM quote was given (tpm-quote.msg): PCRs and nonce are unknown")
_NO_VALUES: Final = not_asked("give the PCR values (tpm-pcrs.json) to have them believed")
_NO_CERTIFICATE: Final = not_asked("no certificate of the attestation key was given (ak-cert.pem)")
_NO_ISSUER: Final = not_asked(
    "the certificate came without its issuers and adds nothing; the hardware report binds the key"
)
_NO_LOG: Final = not_asked("give the event log (tpm-eventlog.bin) to have the PCRs explained")
# Firmware measures into these; later ones are extended by software that may keep no log.
_FIRMWARE_PCRS: Final = range(8)
_AK_USAGE: Final = "2.23.133.8.3"  # tcg-kp-AIKCertificate
_OID_EXT_KEY_USAGE: Final = "2.5.29.37"
_PROFILE: Final = pki.Profile(
    keys=frozenset(("rsa",)),
    algorithms=frozenset(("rsa-pkcs1-sha256", "rsa-pkcs1-sha384", "rsa-pkcs1-sha512")),
    shortest=2,
    longest=4,
    critical=frozenset(("2.5.29.15", "2.5.29.19", _OID_EXT_KEY_USAGE)),
    leaf_bare=True,
)


@dataclass(slots=True, kw_only=True)
class VtpmCase(CaseBase):
    """A case with a vTPM in it."""

    @property
    def ak(self) -> RsaKey:
        """The attestation key, as other evidence binds it."""
        raise NotImplementedError

    def read_quote(self) -> TpmQuote | None:
        """Read the quote, if one was given."""
        message = self.endorsements.get("tpm-quote.msg")
        if message is None:
            return None
        return self._part("vtpm quote", lambda: TpmQuote.from_bytes(message))

    @property
    def quote(self) -> TpmQuote | None:
        """The quote, for other checks; None if there is none."""
        return self.need("quote.format", self.read_quote)

    def read_signature(self) -> TpmSignature:
        """Read the signature of the quote."""
        data = self.endorsements.get("tpm-quote.sig")
        if data is None:
            raise EvidenceFormatError(
                "signature of the vTPM quote",
                expected="tpm-quote.sig",
                found="absent",
                advice="tpm2_quote writes it with --signature.",
            )
        return self._part(
            "vtpm signature", lambda: TpmSignature.from_bytes(data, raw_size=self.ak.size)
        )

    def read_values(self) -> Mapping[str, Mapping[int, bytes]] | None:
        """Read the PCR values, if they were given."""
        data = self.endorsements.get("tpm-pcrs.json")
        if data is None:
            return None
        return self._part("pcr values", lambda: tpm.read_pcr_values(data))

    @property
    def signature(self) -> TpmSignature:
        """The signature, for other checks."""
        return self.need("quote.signature", self.read_signature)

    def signature_holds(self) -> bool:
        """Whether the attestation key signed the quote."""
        signature, key = self.read_signature(), self.ak
        message = self.endorsements.get("tpm-quote.msg") or b""
        return self._part("vtpm verified", lambda: signature_of(key, signature, message))

    def digest_holds(self) -> bool | None:
        """Whether the given PCR values are the quoted ones; None if there is one or both not."""
        values, quote = self.read_values(), self.quote
        if values is None or quote is None:
            return None
        found = tpm.pcr_digest(values, quote.selections, self.signature.hash)
        return found is not None and hmac.compare_digest(found, quote.pcr_digest)

    def proven(self, bank: str = "sha256") -> dict[int, bytes]:
        """Return the PCR values of a bank that the quote covers; none if its digest is another."""
        values, quote = self.read_values(), self.quote
        if values is None or quote is None or not self.digest_holds():
            return {}
        indices = {i for item in quote.selections if item.bank == bank for i in item.indices}
        return {index: values[bank][index] for index in sorted(indices)}

    def read_certificates(self) -> tuple[Certificate, ...] | None:
        """Read the AK's certificate and its issuers, if they were given."""
        return self._part("ak certificate", self._certificates)

    def _certificates(self) -> tuple[Certificate, ...] | None:
        pem, nv = self.endorsements.get("ak-cert.pem"), self.endorsements.get("ak-cert-nv.der")
        if nv is not None:
            # The index of the vTPM is larger than the certificate: zero bytes follow it.
            bare = Certificate.from_der(_without_padding(nv))
            if pem is None:
                return (bare,)
        if pem is None:
            return None
        is_pem = pem[:16].lstrip().startswith(b"-----")
        chain = Certificate.from_pem_chain(pem, limit=4) if is_pem else (Certificate.from_der(pem),)
        if nv is not None and chain[0] != bare:
            raise EvidenceFormatError(
                "two certificates of the attestation key were given",
                expected=f"ak-cert.pem: {bare.subject_text}, as in ak-cert-nv.der",
                found=chain[0].subject_text,
            )
        return chain

    @property
    def certificates(self) -> tuple[Certificate, ...] | None:
        """The AK's certificate and its issuers, for other checks."""
        return self.need("ak.format", self.read_certificates)

    def ak_chain(self) -> tuple[Certificate, ...] | None:
        """Return the chain up to a root; None without one."""
        given = self.certificates
        if given is None:
            return None
        chain = tuple(pki.completed(given, self.anchors("azure-vtpm")))
        ended = chain[-1].issuer == chain[-1].subject
        return chain if ended and len(chain) > 1 else None


def _without_padding(data: bytes) -> bytes:
    """Cut an element of DER out of what follows it, which must be zero."""
    cursor = Der(data, "certificate of the attestation key")
    found = cursor.element(der.SEQUENCE)
    if any(data[len(found) :]):
        raise cursor.fail("bytes that are not zero follow the end")
    return found


def signature_of(key: RsaKey, signature: TpmSignature, message: bytes) -> bool:
    """Whether *key* signed *message*."""
    digest = _HASHES.get(signature.hash)
    if digest is None or len(signature.value) != key.size:
        return False
    scheme: padding.AsymmetricPadding
    if signature.scheme == tpm.ALG_RSASSA:
        scheme = padding.PKCS1v15()
    elif signature.scheme == tpm.ALG_RSAPSS:
        scheme = padding.PSS(mgf=padding.MGF1(digest), salt_length=padding.PSS.AUTO)
    else:
        return False
    try:
        public = rsa.RSAPublicNumbers(key.exponent, key.modulus).public_key()
        public.verify(signature.value, message, scheme, digest)
    except (InvalidSignature, ValueError):  # ValueError: no RSA key
        return False
    return True


# ---- the checks --------------------------------------------------------------------------------


def register_vtpm(registry: Registry[Any]) -> None:
    """Register the checks of quote, certificate and event log, and of the policy's PCRs."""
    for name, function in _EVIDENCE.items():
        registry.evidence(name)(function)
    registry.policy("code.pcrs")(_pcrs)


def _format(case: VtpmCase) -> Verdict:
    """The vTPM's quote can be read, and nothing of it is there without it."""
    if case.read_quote() is not None:
        return PASSED
    alone = [name for name in ("tpm-quote.sig", "tpm-eventlog.bin") if name in case.endorsements]
    if "tpm-pcrs.json" in case.endorsements:
        alone.append("tpm-pcrs.json")
    if alone:
        return failed(
            expected="tpm-quote.msg",
            found=f"absent, but {', '.join(alone)}",
            advice="PCR values and event logs prove nothing without the quote: give it too.",
        )
    return _NO_QUOTE


def _signature(case: VtpmCase) -> Verdict:
    """The attestation key in the runtime claims signed the vTPM's quote."""
    if case.quote is None:
        return _NO_QUOTE
    case.read_signature()
    if case.signature_holds():
        return PASSED
    return failed(
        expected="a quote signed by HCLAkPub of the runtime claims",
        found="an invalid signature",
        advice="The quote is another machine's, or older than the report: make both again.",
    )


def _selection(case: VtpmCase) -> Verdict:
    """The quote says something: PCRs of a bank whose hash is not broken."""
    quote = case.quote
    if quote is None:
        return _NO_QUOTE
    if any(item.indices and item.bank != "sha1" for item in quote.selections):
        return PASSED
    return failed(
        expected="selected PCRs of the SHA-256 bank (or a longer one)",
        found=[f"{item.bank}: {len(item.indices)} PCRs" for item in quote.selections],
        advice="Quote sha256:0,1,2,… (all that the policy names).",
    )


def _digest(case: VtpmCase) -> Verdict:
    """The PCR values that were given are those that were quoted."""
    if case.quote is None:
        return _NO_QUOTE
    case.read_values()
    holds = case.digest_holds()
    if holds is None:
        return _NO_VALUES
    if holds:
        return PASSED
    return failed(
        expected=f"PCR values with digest {case.quote.pcr_digest.hex()}",
        found="other or missing values",
        advice="Read the PCRs and the quote without an event between them: do both again.",
    )


def _event_log(case: VtpmCase) -> Verdict:
    """What the log says of the firmware's PCRs is what was quoted."""
    data = case.endorsements.get("tpm-eventlog.bin")
    if data is None:
        return _NO_LOG
    found: Replay = case._part("event log", lambda: replay(EventLog.from_bytes(data)))  # noqa: SLF001
    proven = case.proven()
    if not proven or "sha256" not in found.registers:
        return failed(expected="quoted PCR values and a log of the same bank", found="not both")
    said = [i for i in _FIRMWARE_PCRS if i in found.registers["sha256"]]
    unquoted = [i for i in said if i not in proven]
    if unquoted or not said:
        return failed(
            expected="a quote of every PCR of the firmware that the log has events of",
            found=f"PCR {', '.join(map(str, unquoted)) or '0 to 7'} not among both",
            advice="Quote sha256:0,1,2,3,4,5,6,7 and what else the policy names.",
        )
    wrong = [i for i in _FIRMWARE_PCRS if i in proven and found.value("sha256", i) != proven[i]]
    if not wrong:
        return PASSED
    return failed(
        expected=f"PCR{wrong[0]} = {proven[wrong[0]].hex()}",
        found=found.value("sha256", wrong[0]),
        advice=f"The log does not explain PCR {', '.join(map(str, wrong))}: it is another boot's, "
        "or was changed.",
    )


def _ak_format(case: VtpmCase) -> Verdict:
    """The certificate of the attestation key can be read."""
    return PASSED if case.read_certificates() is not None else _NO_CERTIFICATE


def _ak_key(case: VtpmCase) -> Verdict:
    """The certificate is of the key that the hardware report binds."""
    found = case.certificates
    if found is None:
        return _NO_CERTIFICATE
    if _same_key(found[0], case.ak):
        return PASSED
    return failed(
        expected="the key HCLAkPub of the runtime claims",
        found=f"another key, SHA-256 {found[0].spki_sha256.hex()}",
        advice="The certificate is another machine's: read NV index 0x01C101D0 again.",
    )


def _same_key(certificate: Certificate, ak: RsaKey) -> bool:
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return False
    numbers = key.public_numbers()
    return (numbers.n, numbers.e) == (ak.modulus, ak.exponent)


def _ak_validity(case: VtpmCase) -> Verdict:
    """The certificate of the attestation key is valid at the time of judging."""
    found = case.certificates
    if found is None:
        return _NO_CERTIFICATE
    return pki.check_validity(case.ak_chain() or found[:1], case.at)


def _ak_usage(case: VtpmCase) -> Verdict:
    """The certificate is for attestation keys."""
    found = case.certificates
    if found is None:
        return _NO_CERTIFICATE
    extension = found[0].extensions.get(_OID_EXT_KEY_USAGE)
    usages: list[str] = []
    if extension is not None:
        outer = Der(extension.value, "extended key usage")
        body = outer.sequence()
        outer.end()
        while body.more:
            usages.append(body.oid())
    if _AK_USAGE in usages:
        return PASSED
    return failed(expected=f"extended key usage {_AK_USAGE} (attestation key)", found=usages)


def _ak_chain(case: VtpmCase) -> Verdict:
    """The certificate leads to the pinned root, if its issuers were given."""
    if case.certificates is None:
        return _NO_CERTIFICATE
    chain = case.ak_chain()
    if chain is None:
        return _NO_ISSUER
    return pki.check_chain(chain, case.anchors("azure-vtpm"), case.at, _PROFILE)


_EVIDENCE: Final = {
    "quote.format": _format,
    "quote.signature": _signature,
    "quote.selection": _selection,
    "quote.pcr_digest": _digest,
    "eventlog.replay": _event_log,
    "ak.format": _ak_format,
    "ak.key": _ak_key,
    "ak.validity": _ak_validity,
    "ak.usage": _ak_usage,
    "ak.chain": _ak_chain,
}


def _pcrs(case: VtpmCase) -> Verdict:
    """The PCRs that the policy names are quoted and have its values."""
    return judge_registers(
        case,
        "pcrs",
        case.proven(),
        advice="Only quoted PCRs count: give tpm-quote.msg, .sig and tpm-pcrs.json. pyenclave "
        "measure eventlog explains what was measured.",
    )


# ---- what it says ------------------------------------------------------------------------------


def quote_claims(case: VtpmCase) -> dict[str, Any] | None:
    """Return what the quote says; None without one."""
    quote = case.read_quote()
    if quote is None:
        return None
    found: dict[str, Any] = {}
    try:
        found["signature_ok"] = case.signature_holds()
        found["pcr_digest_ok"] = case.digest_holds()
        found["pcrs_sha256"] = {str(i): value.hex() for i, value in case.proven().items()}
    except (EnclaveError, NotReachedError):
        found["signature_ok"] = found.get("signature_ok", False)
    found |= {
        "type": "0x8018",
        "qualified_signer": quote.qualified_signer.hex(),
        "extra_data": quote.extra_data.hex(),
        "clock": quote.clock,
        "reset_count": quote.reset_count,
        "restart_count": quote.restart_count,
        "safe": int(quote.safe),
        "firmware": quote.firmware,
        "pcr_selection": [[item.bank_id, list(item.indices)] for item in quote.selections],
        "pcr_digest": quote.pcr_digest.hex(),
    }
    return found


def ak_claims(case: VtpmCase) -> dict[str, Any]:
    """Return what the AK's certificate says, if there is one."""
    given = case.read_certificates()
    if given is None:
        return {}
    found: dict[str, Any] = {
        "ak_cert_path": [certificate.common_name for certificate in given],
        "ak_cert_sha256": hashlib.sha256(given[0].der).hexdigest(),
        "ak_cert_chain_to_root": _ak_chain(case) is PASSED,
        "ak_cert_key_equals_hcl_ak": _same_key(given[0], case.ak),
    }
    raw = case.endorsements.get("ak-cert-nv.der")
    if raw is not None:
        found["ak_cert_trailing_zero_bytes_in_source"] = len(raw) - len(given[0].der)
    return found
