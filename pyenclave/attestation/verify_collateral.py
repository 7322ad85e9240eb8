"""The checks of a document of Intel's collateral by itself: a TCB info or a QE identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation.cache import Known, known
from pyenclave.attestation.case import CaseBase, gathered, judged_at
from pyenclave.attestation.checks import PASSED, Registry, Verdict, absent, failed, not_asked
from pyenclave.attestation.intel import Chain, read_chain
from pyenclave.attestation.intel_collateral import (
    check_document_signature,
    check_signer_chain,
    check_window,
)
from pyenclave.attestation.pki import check_root
from pyenclave.errors import CollateralError
from pyenclave.formats import jsonstrict
from pyenclave.formats.tcb import QeIdentity, TcbInfo

__all__ = ["CHECKS", "Case", "claims"]

_CHAINS: Final = {
    True: ("tcb-info-issuer-chain.pem", "issuer-chain.pem"),
    False: ("qe-identity-issuer-chain.pem", "issuer-chain.pem"),
}
_NOT_HERE: Final = not_asked("a document of the vendor's has no report data, nonce or code")


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A document, and what it is judged by."""

    def read_document(self) -> Known[TcbInfo] | Known[QeIdentity]:
        """Read the document."""

        def read() -> Known[TcbInfo] | Known[QeIdentity]:
            outer = jsonstrict.object_of(self.data, "collateral", CollateralError)
            if "tcbInfo" in outer:
                return known(TcbInfo.from_bytes.__qualname__, self.data, TcbInfo.from_bytes)
            return known(QeIdentity.from_bytes.__qualname__, self.data, QeIdentity.from_bytes)

        return self._part("document", read)

    @property
    def entry(self) -> Known[TcbInfo] | Known[QeIdentity]:
        """The document with its facts, for other checks."""
        return self.need("document.format", self.read_document)

    @property
    def document(self) -> TcbInfo | QeIdentity:
        """The document, for other checks."""
        return self.entry.value

    def read_chain(self) -> Chain:
        """Read the chain of its signer."""
        names = _CHAINS[isinstance(self.document, TcbInfo)]

        def read() -> Chain:
            for name in names:
                data = self.endorsements.get(name)
                if data is not None:
                    return read_chain("pem", data)
            raise CollateralError(f"{names[0]} is absent")

        return self._part("chain", read)

    @property
    def chain(self) -> Chain:
        """The chain of its signer, for other checks."""
        return self.need("chain", self.read_chain)


CHECKS: Final[Registry[Case]] = Registry()


@CHECKS.evidence("document.format")
def _format(case: Case) -> Verdict:
    """The document is TCB info or QE identity, each member once."""
    case.read_document()
    return PASSED


@CHECKS.evidence("chain")
def _chain(case: Case) -> Verdict:
    """Its signer leads to a pinned root."""
    names = _CHAINS[isinstance(case.document, TcbInfo)]
    if not any(name in case.endorsements for name in names):
        return absent(names[0], advice="The service sends it in a header along with the document.")
    chain = case.read_chain()
    verdict = check_signer_chain(chain, case.at)
    if verdict.outcome == "passed":
        verdict = check_root(chain.value, case.anchors("intel"))
    return verdict


@CHECKS.evidence("signature")
def _signature(case: Case) -> Verdict:
    """It is signed, over the bytes as they were served."""
    return check_document_signature(case.entry, case.chain.value[0])


@CHECKS.evidence("validity")
def _validity(case: Case) -> Verdict:
    """It is in force."""
    document = case.document
    return check_window("the document", document.issue_date, document.next_update, case.at)


def _unfit(case: Case, value: bytes | None) -> Verdict:
    if value is None:
        return _NOT_HERE
    return failed(expected=value, found=None, advice="A document of collateral has none.")


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """No nonce is expected of a document."""
    return _unfit(case, case.nonce)


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """No report data is expected of a document."""
    return _unfit(case, case.report_data)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """No user data is expected of a document."""
    return _unfit(case, case.user_data)


@CHECKS.policy("code.kind")
def _code_kind(case: Case) -> Verdict:
    """A policy that names code is not met by a document."""
    if case.policy.accept_any_code:
        return _NOT_HERE
    return failed(expected="code that the policy names", found="a document of the vendor's")


def _document_claims(case: Case) -> dict[str, Any]:
    document = case.document
    found: dict[str, Any] = {
        "id": document.id,
        "version": document.version,
        "issue_date": document.issue_date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "next_update": document.next_update.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tcb_evaluation_number": document.evaluation_number,
    }
    if isinstance(document, TcbInfo):
        found |= {"fmspc": document.fmspc.hex(), "pceid": document.pce_id.hex()}
    return found


def _signature_claims(case: Case) -> dict[str, Any]:
    verdict = check_document_signature(case.entry, case.chain.value[0])
    return {"signature_ok": verdict.outcome == "passed"}


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the document says, as far as it can be read."""
    return gathered(case, judged_at, _document_claims, _signature_claims)
