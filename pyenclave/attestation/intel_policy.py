"""What a relying party demands of quotes of SGX and TDX alike, and what they claim."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from pyenclave.attestation import tcb
from pyenclave.attestation.case import judge_nonce, judge_reference, judge_report_data
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed, not_asked
from pyenclave.attestation.intel import IntelCase, qe_signature_holds, quote_signature_holds
from pyenclave.attestation.intel_collateral import (
    NAMES,
    evaluations,
    outcome,
    qe_fits,
    qe_identity,
    tcb_info,
    window,
)
from pyenclave.attestation.pki import check_not_revoked, check_signatures
from pyenclave.formats.x509 import Crl

__all__ = ["NAME", "POLICY", "base_claims", "judge_code_kind", "tcb_claims"]

POLICY: Final[Registry[IntelCase]] = Registry()

_NAMED: Final[dict[str, Verdict]] = {}


def NAME(name: str) -> Verdict:  # noqa: N802
    """Return what is said of a field that the policy does not name; always the same object."""
    found = _NAMED.get(name)
    if found is None:
        found = _NAMED[name] = not_asked(f"name {name} in the policy to have it compared")
    return found


_NO_NONCE: Final = not_asked("give the nonce that was sent, or the evidence may be an old one")
_NO_REPORT_DATA: Final = not_asked("give the expected report data to have it compared")
_NO_USER_DATA: Final = not_asked("a quote has no user data of its own")
_NO_COLLATERAL: Final = not_asked("the policy does not ask for all of the collateral")
_NO_TCB: Final = not_asked("give Intel's collateral to have the TCB judged")
_COMPARED: Final = not_asked("what the policy names of code is compared one by one")

_WAYS_OUT: Final = {
    tcb.SW_HARDENING: "The code must be hardened against these advisories by itself",
    tcb.CONFIGURATION: "Change the machine's BIOS settings as the advisories say",
    tcb.CONFIGURATION_AND_SW: "Change the machine's BIOS settings and harden the code",
    tcb.OUT_OF_DATE: "Update BIOS and microcode, TDX module and quoting enclave of the machine",
    tcb.OUT_OF_DATE_CONFIGURATION: "Update BIOS and microcode of the machine and its settings",
    tcb.RELAUNCH: "The TDX module was updated: start the TD again",
    tcb.RELAUNCH_CONFIGURATION: "Start the TD again, and change the machine's BIOS settings",
}


@POLICY.policy("nonce")
def _nonce(case: IntelCase) -> Verdict:
    """The report data is the nonce, or the bytes that the caller says it became."""
    return _NO_NONCE if case.nonce is None else judge_nonce(case, case.quoted_data)


@POLICY.policy("report_data")
def _report_data(case: IntelCase) -> Verdict:
    """The report data is the expected one."""
    if case.report_data is None:
        return _NO_REPORT_DATA
    return judge_report_data(case, case.quoted_data)


@POLICY.policy("user_data")
def _user_data(case: IntelCase) -> Verdict:
    """Nothing is expected that a quote does not have."""
    if case.user_data is None:
        return _NO_USER_DATA
    return failed(
        expected=case.user_data,
        found=None,
        advice="A quote has only report data: give report_data, as the measured code makes it.",
    )


@POLICY.policy("collateral.complete")
def _complete(case: IntelCase) -> Verdict:
    """All of Intel's collateral was given, if the policy asks for it."""
    if not case.policy.require_collateral:
        return _NO_COLLATERAL
    missing = [name for name in NAMES if name not in case.endorsements]
    if not missing:
        return PASSED
    return failed(
        expected="all of Intel's collateral",
        found=f"without {', '.join(missing)}",
        advice="Fetch it for this platform's FMSPC and give it (--endorsements).",
    )


@POLICY.policy("platform.ppid")
def _ppid(case: IntelCase) -> Verdict:
    """The platform is one that the policy names."""
    if not case.policy.reference("ppid"):
        return NAME("ppid")
    return judge_reference(case, "ppid", case.pck.ppid, advice="Another machine quoted it.")


@POLICY.policy("platform.fmspc")
def _fmspc(case: IntelCase) -> Verdict:
    """The platform is of a family that the policy names."""
    if not case.policy.reference("fmspc"):
        return NAME("fmspc")
    return judge_reference(
        case, "fmspc", case.pck.fmspc, advice="A machine of another family quoted it."
    )


@POLICY.policy("tcb.evaluation")
def _evaluation_number(case: IntelCase) -> Verdict:
    """The collateral is not older than what the relying party has seen before."""
    wanted = case.policy.min_tcb_evaluation_number
    if wanted is None:
        return NAME("min_tcb_evaluation_number")
    found = _lowest_number(case)
    if found is not None and found >= wanted:
        return PASSED
    return failed(
        expected=f"tcbEvaluationDataNumber {wanted} or more",
        found="no collateral" if found is None else found,
        advice="Somebody kept old collateral: fetch it again.",
    )


def _lowest_number(case: IntelCase) -> int | None:
    documents = (tcb_info(case), qe_identity(case))
    numbers = [item.evaluation_number for item in documents if item is not None]
    return min(numbers, default=None)


@POLICY.policy("tcb.status")
def _status(case: IntelCase) -> Verdict:
    """The status of the TCB is an accepted one, and so are its advisories."""
    found = outcome(case)
    if found is None:
        return _NO_TCB
    status, advisories = found
    if status in case.policy.tcb_statuses:
        refused = case.policy.unaccepted_advisories(advisories)
        if status == tcb.UP_TO_DATE or not refused:
            return PASSED
        return failed(
            expected=f"{status} with advisories among {_list(case.policy.accepted_advisories)}",
            found=f"{status} with {_list(refused)}",
            advice=f"If these do no harm to what runs there, add {_list(refused)} to "
            "accepted_advisories.",
        )
    way = _WAYS_OUT.get(status)
    if way is None:
        return failed(expected=case.policy.tcb_statuses, found=status)
    date = evaluations(case)[0].date
    when = f" of {date.date().isoformat()}" if date else ""
    why = f" has {_list(advisories)}" if advisories else f" is {status}"
    return failed(
        expected=case.policy.tcb_statuses,
        found=f"{status}, {_list(advisories)}" if advisories else status,
        advice=f"The TCB level{when}{why}. {way}; or accept {status} (tcb_statuses)"
        + (" with these advisories (accepted_advisories)." if advisories else "."),
    )


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def judge_code_kind(case: IntelCase, *fields: str) -> Verdict:
    """Judge whether a policy that names code names it by one of *fields*, which this kind has."""
    policy = case.policy
    if policy.accept_any_code or any(policy.reference(name) for name in fields):
        return _COMPARED
    return failed(
        expected=f"{' or '.join(fields)} in the policy, or any_code()",
        found="identities of other kinds of evidence",
        advice="Name what this kind of evidence is known by.",
    )


# ---- what it says -------------------------------------------------------------------------------


def base_claims(case: IntelCase) -> dict[str, Any]:
    """Return what a quote says of itself and of the enclave that made it."""
    quote = case.any_quote
    return {
        "quote_version": quote.version,
        "att_key_type": 2,
        "tee_type": case.tee,
        "body_type": quote.body_type,
        "cert_data_type": quote.certification_type,
        "report_data": case.quoted_data.hex(),
        "qe_isv_svn": quote.qe_report.isv_svn,
        "qe_mrsigner": quote.qe_report.mrsigner.hex(),
        "qe_mrenclave": quote.qe_report.mrenclave.hex(),
    }


def signature_claims(case: IntelCase) -> dict[str, Any]:
    """Return which signatures hold."""
    entry = case.chain_entry
    chain = entry.fact("signatures", lambda: check_signatures(entry.value))
    return {
        "quote_signature_ok": quote_signature_holds(case),
        "qe_report_signature_ok": qe_signature_holds(case),
        "pck_chain_ok": chain.outcome == "passed",
    }


def pck_claims(case: IntelCase) -> dict[str, Any]:
    """Return what the PCK certificate says of the platform."""
    pck = case.pck
    configuration = pck.configuration
    authority = case.chain[0].issuer_name.common_name or ""
    return {
        "pck": {
            "fmspc": pck.fmspc.hex(),
            "pceid": pck.pce_id.hex(),
            "pcesvn": pck.pce_svn,
            "tcb_components": list(pck.components),
            "cpusvn": pck.cpu_svn.hex(),
            "ca": "platform" if "Platform" in authority else "processor",
            "config": None
            if configuration is None
            else {str(number): value for number, value in configuration.items()},
        }
    }


def revocation_claims(case: IntelCase) -> dict[str, Any]:
    """Return whether the PCK certificate is revoked, if the list was given."""
    entry = case.endorsement("crl.pck", "pck-crl.der", Crl.from_bytes)
    if entry is None:
        return {}
    return {"pck_revoked": check_not_revoked(entry.value, case.chain[0]).outcome != "passed"}


@lru_cache(maxsize=256)
def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def tcb_claims(case: IntelCase) -> dict[str, Any]:
    """Return how the platform stands by its collateral."""
    found, merged = evaluations(case), outcome(case)
    if merged is None:
        return {"tcb_status": "not evaluated (no matching collateral)"}
    launch, (status, advisories) = found[0], merged
    fits = qe_fits(case)
    claims: dict[str, Any] = {
        "tcb_status": "none" if status == tcb.NO_MATCH else status,
        "platform_tcb_status": launch.platform_status,
        "tcb_date": _text(None if launch.platform is None else launch.platform.date),
        "tcb_date_earliest": _text(launch.date),
        "advisory_ids": list(advisories),
        "tcb_evaluation_number": _lowest_number(case),
    }
    if fits is not None:
        claims |= {
            "qe_match": fits,
            "qe_status": tcb.NO_MATCH if launch.qe is None else launch.qe.status,
        }
    if len(found) > 1:
        claims |= {
            "tcb_status_launch": launch.status,
            "tcb_status_current": found[1].status,
        }
    return claims


def window_claims(case: IntelCase) -> dict[str, Any]:
    """Return from when until when all of the collateral is in force."""
    found = window(case)
    return {} if found is None else {"valid_window": [_text(moment) for moment in found]}


#: The parts that both kinds have.
SHARED_CLAIMS: Final = (
    base_claims,
    pck_claims,
    revocation_claims,
    tcb_claims,
    window_claims,
    signature_claims,
)
