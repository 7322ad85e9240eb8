"""
The checks of AWS Nitro attestation documents.

AWS: Verifying the root of trust (attestation_process.md of the NSM API). The signature is ES384
over the payload, by a leaf that lives three hours, under the pinned AWS Nitro root. A document of
a debug enclave has only zeros where the image's measurement (PCR0) belongs.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pyenclave.attestation import pki
from pyenclave.attestation.cache import known
from pyenclave.attestation.case import CaseBase, gathered, judge_registers
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed, not_asked
from pyenclave.formats.nitro import NitroDocument, NitroPayload
from pyenclave.formats.x509 import Certificate

__all__ = ["CHECKS", "Case", "claims"]

CLOCK_SLACK: Final = timedelta(minutes=5)  # of the hypervisor's clock against the verifier's
PROFILE: Final = pki.Profile(
    keys=frozenset(("secp384r1",)),
    algorithms=frozenset(("ecdsa-sha384",)),
    shortest=2,
    longest=17,
)


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A document, and what it is judged by."""

    def read_document(self) -> NitroDocument:
        """Read the document."""
        return self._part("document", lambda: NitroDocument.from_bytes(self.data))

    def read_chain(self) -> tuple[Certificate, ...]:
        """Read the certificates: the leaf, then the bundle from its end, so the root is last."""
        payload = self.payload

        def read() -> tuple[Certificate, ...]:
            leaf = Certificate.from_der(payload.certificate)
            above = [known("certificate", der, Certificate.from_der) for der in payload.cabundle]
            return (leaf, *(entry.value for entry in reversed(above)))

        return self._part("chain", read)

    @property
    def document(self) -> NitroDocument:
        """The document, for other checks."""
        return self.need("document.format", self.read_document)

    @property
    def payload(self) -> NitroPayload:
        """What it says."""
        return self.document.payload

    @property
    def chain(self) -> tuple[Certificate, ...]:
        """The certificates, for other checks."""
        return self.need("chain.format", self.read_chain)

    @property
    def debug(self) -> bool:
        """Whether the enclave runs in debug mode."""
        return not any(self.payload.pcrs.get(0, b""))

    def chain_signatures(self) -> Verdict:
        """Judge the signatures of the chain."""
        return pki.check_signatures(self.chain)

    def signature_holds(self) -> bool:
        """Whether the leaf signed the document."""
        message, leaf = self.document.message, self.chain[0]
        return self._part(
            "document:signature", lambda: message.verify(leaf.public_key(), allowed=("ES384",))
        )


CHECKS: Final[Registry[Case]] = Registry()


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("document.format")
def _document(case: Case) -> Verdict:
    """The bytes are a signed document with every field that one has, and nothing after it."""
    case.read_document()
    return PASSED


@CHECKS.evidence("document.digest")
def _digest(case: Case) -> Verdict:
    """The process document allows SHA384 only, whatever the API's types have."""
    if case.payload.digest != "SHA384":
        return failed(expected="SHA384", found=case.payload.digest)
    return PASSED


@CHECKS.evidence("document.pcrs")
def _pcrs(case: Case) -> Verdict:
    """The image's measurement is there at all."""
    missing = [index for index in (0, 1, 2) if index not in case.payload.pcrs]
    if missing:
        return failed(expected="PCR0, PCR1 and PCR2", found=f"without PCR{missing[0]}")
    return PASSED


@CHECKS.evidence("chain.format")
def _chain(case: Case) -> Verdict:
    """The certificates in the document can be read."""
    chain = case.read_chain()
    return pki.check_length(chain, PROFILE)


@CHECKS.evidence("chain.root")
def _root(case: Case) -> Verdict:
    """The chain ends in the pinned root of AWS, or one that was given."""
    return pki.check_root(case.chain, case.anchors("nitro"))


@CHECKS.evidence("chain.names")
def _names(case: Case) -> Verdict:
    """Each certificate names the next one as its issuer."""
    return pki.check_names(case.chain)


@CHECKS.evidence("chain.algorithms")
def _algorithms(case: Case) -> Verdict:
    """Keys and signatures are ECDSA on P-384 with SHA-384."""
    return pki.check_algorithms(case.chain, PROFILE)


@CHECKS.evidence("chain.constraints")
def _constraints(case: Case) -> Verdict:
    """Only authorities may issue, and no deeper than they are allowed to."""
    return pki.check_constraints(case.chain, PROFILE)


@CHECKS.evidence("chain.key_usage")
def _key_usage(case: Case) -> Verdict:
    """Each key is meant for what it did."""
    return pki.check_key_usage(case.chain, PROFILE)


@CHECKS.evidence("chain.validity")
def _validity(case: Case) -> Verdict:
    """Every certificate is valid at the time of judging."""
    return pki.check_validity(case.chain, case.at)


@CHECKS.evidence("chain.signatures")
def _chain_signatures(case: Case) -> Verdict:
    """Each certificate is signed by the next one."""
    return case.chain_signatures()


@CHECKS.evidence("document.signature")
def _signature(case: Case) -> Verdict:
    """The leaf's key signed the document."""
    if case.signature_holds():
        return PASSED
    return failed(
        expected="an ES384 signature of the leaf's key",
        found=f"{case.document.message.algorithm or 'an unknown algorithm'}, invalid",
        advice="Something was changed on the way.",
    )


@CHECKS.evidence("document.time")
def _time(case: Case) -> Verdict:
    """It was not made after now, nor outside the life of the key that signed it."""
    made, leaf = _moment(case.payload), case.chain[0]
    start, end = leaf.not_before - CLOCK_SLACK, min(leaf.not_after, case.at) + CLOCK_SLACK
    if start <= made <= end:
        return PASSED
    return failed(
        expected=f"made from {start.isoformat()} to {end.isoformat()}",
        found=made.isoformat(),
        advice="Check the time that was given, or the clock.",
    )


def _moment(payload: NitroPayload) -> datetime:
    return datetime.fromtimestamp(payload.timestamp // 1000, UTC)


# ---- is it what I want? -----------------------------------------------------------------------


def _compare(
    name: str, wanted: bytes | None, found: bytes | None, advice: str | None = None
) -> Verdict:
    if wanted is None:
        return not_asked(f"give the expected {name} to have it compared", found=found)
    if found is not None and hmac.compare_digest(wanted, found):
        return PASSED
    return failed(expected=wanted, found=found or "none", advice=advice)


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The document has the nonce."""
    if case.nonce is None:
        return not_asked("give the nonce that was sent, or the document may be an old one")
    advice = "Replayed, or made for another challenge."
    return _compare("nonce", case.nonce, case.payload.nonce, advice)


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """Nothing is expected that a document does not have."""
    if case.report_data is None:
        return not_asked("a Nitro document has user data and a public key instead")
    return failed(
        expected=case.report_data,
        found="none: a Nitro document has user data instead",
        advice="Give it as user_data.",
    )


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """The document has the expected user data."""
    return _compare("user data", case.user_data, case.payload.user_data)


@CHECKS.policy("document.age")
def _age(case: Case) -> Verdict:
    """The document is not older than the policy allows."""
    limit, made = case.policy.max_age, _moment(case.payload)
    if limit is None:
        return not_asked("name max_age to have the document's age compared")
    if case.at <= made + timedelta(seconds=limit):
        return PASSED
    return failed(
        expected=f"at most {limit} seconds old at {case.at.isoformat()}",
        found=made.isoformat(),
        advice="Ask for a new document.",
    )


@CHECKS.policy("debug")
def _debug(case: Case) -> Verdict:
    """The enclave does not run in debug mode, where PCR0 to 2 are zero."""
    if case.debug and not case.policy.allow_debug:
        return failed(
            expected="a production enclave",
            found="PCR0 is zero: debug mode",
            advice="Start the enclave without --debug-mode; allow_debug only for tests.",
        )
    return PASSED


@CHECKS.policy("code.pcrs")
def _code(case: Case) -> Verdict:
    """The PCRs that the policy names have its values."""
    return judge_registers(
        case,
        "pcrs",
        case.payload.pcrs,
        advice="nitro-cli describe-eif, or pyenclave measure eif, tells the PCRs of an image.",
        unnamed="name pcrs (0 is the image, 8 its signer), or any code is accepted",
    )


@CHECKS.policy("code.kind")
def _code_kind(case: Case) -> Verdict:
    """
    The registers that the policy names say which image runs.

    PCR0 is the image and PCR8 its signer; PCR1 (kernel) and PCR2 (application) do so together.
    PCR3 and PCR4 are the role and the instance of the parent, higher ones are the enclave's own.
    """
    named = set(case.policy.registers("pcrs"))
    if not named or named & {0, 8} or named >= {1, 2}:
        return not_asked("the registers that the policy names are compared one by one")
    return failed(
        expected="PCR0 or PCR8, or PCR1 and PCR2, in the policy",
        found=", ".join(f"PCR{index}" for index in named),
        advice="These say where an enclave runs, or a part of it, not which: name PCR0 too.",
    )


# ---- what it says -----------------------------------------------------------------------------


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the document says, as far as it can be read; binary values as hex."""
    return gathered(case, _document_claims, _chain_claims, _signature_claims)


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _document_claims(case: Case) -> dict[str, Any]:
    payload = case.payload
    return {
        "module_id": payload.module_id,
        "digest": payload.digest,
        "timestamp_ms": payload.timestamp,
        "pcrs": {str(index): value.hex() for index, value in payload.pcrs.items()},
        "debug": case.debug,
        "user_data": _hex(payload.user_data),
        "nonce": _hex(payload.nonce),
        "public_key": _hex(payload.public_key),
    }


def _chain_claims(case: Case) -> dict[str, Any]:
    leaf, root = case.chain[0], case.chain[-1]
    return {
        "cert_valid": [
            moment.strftime("%Y-%m-%dT%H:%M:%SZ") for moment in (leaf.not_before, leaf.not_after)
        ],
        "root_sha256": root.sha256.hex(),
        "root_name": root.subject_text,
    }


def _signature_claims(case: Case) -> dict[str, Any]:
    names = pki.check_names(case.chain)
    signatures = case.chain_signatures()
    return {
        "signature_ok": case.signature_holds(),
        "chain_ok": names.outcome == signatures.outcome == "passed",
    }
