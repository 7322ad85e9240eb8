"""
The checks of Intel's collateral: revocation lists, TCB info, QE identity, and the TCB level.

What was not given is not missed here (`collateral.complete` of the policy misses it); what was
given has to be authentic, in force, of this platform, and must not speak against it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any, Final

from pyenclave.attestation import pki, tcb
from pyenclave.attestation.cache import Known
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    absent,
    failed,
    not_asked,
)
from pyenclave.attestation.intel import (
    PCK_ROLES,
    PROFILE,
    SIGNER_ROLES,
    Chain,
    IntelCase,
    check_roles,
    read_chain,
    static_facts,
)
from pyenclave.attestation.memo import Block, Moment
from pyenclave.errors import EnclaveError
from pyenclave.formats.tcb import QeIdentity, QeLevel, TcbInfo
from pyenclave.formats.x509 import Certificate, Crl

__all__ = [
    "COLLATERAL",
    "NAMES",
    "check_document_signature",
    "check_signer_chain",
    "check_window",
    "collateral_block",
    "evaluations",
    "outcome",
    "qe_fits",
    "qe_identity",
    "tcb_info",
    "window",
]

COLLATERAL: Final[Registry[IntelCase]] = Registry()
#: All of the collateral, by file name.
NAMES: Final = ("tcb-info.json", "qe-identity.json", "pck-crl.der", "root-ca-crl.der")

_QE_IDS: Final = {"SGX": "QE", "TDX": "TD_QE"}
_CHAIN_NAMES: Final = {
    "tcb.chain": ("tcb-info-issuer-chain.pem", "issuer-chain.pem"),
    "qe.identity.chain": ("qe-identity-issuer-chain.pem", "issuer-chain.pem"),
}
_GIVE: Final = {
    name: not_asked(f"give {name} to have it judged")
    for name in (*NAMES, "pck-crl-issuer-chain.pem")
}


# ---- revocation lists ---------------------------------------------------------------------------


def _crl(case: IntelCase, check: str, name: str) -> Known[Crl] | None:
    return case.endorsement(check, name, Crl.from_bytes)


def _crl_signature(case: IntelCase, check: str, name: str, issuer: Certificate) -> Verdict:
    entry = case.read_endorsement(check, name, Crl.from_bytes)
    if entry is None:
        return _GIVE[name]
    return entry.fact(
        ("signature", issuer.der),
        lambda: pki.check_crl_signature(entry.value, issuer, PROFILE),
    )


def _crl_time(case: IntelCase, check: str, name: str) -> Verdict:
    entry = _crl(case, check, name)
    return _GIVE[name] if entry is None else pki.check_crl_time(entry.value, case.at)


@COLLATERAL.evidence("crl.root")
def _root_crl(case: IntelCase) -> Verdict:
    """The root signed its revocation list."""
    return _crl_signature(case, "crl.root", "root-ca-crl.der", case.chain[-1])


@COLLATERAL.evidence("crl.root.validity")
def _root_crl_time(case: IntelCase) -> Verdict:
    """The root's revocation list is in force."""
    return _crl_time(case, "crl.root", "root-ca-crl.der")


@COLLATERAL.evidence("crl.pck")
def _pck_crl(case: IntelCase) -> Verdict:
    """The list is of the authority that issued this very PCK certificate."""
    return _crl_signature(case, "crl.pck", "pck-crl.der", case.chain[1])


@COLLATERAL.evidence("crl.pck.validity")
def _pck_crl_time(case: IntelCase) -> Verdict:
    """The revocation list of the PCK authority is in force."""
    return _crl_time(case, "crl.pck", "pck-crl.der")


@COLLATERAL.evidence("crl.chain")
def _crl_chain(case: IntelCase) -> Verdict:
    """The issuers that came with the list are those of the PCK certificate."""
    name = "pck-crl-issuer-chain.pem"
    data = case.endorsements.get(name)
    if data is None:
        return _GIVE[name]
    entry = read_chain("pem", data)
    verdict = entry.fact("roles of issuers", lambda: check_roles(entry.value, PCK_ROLES[1:]))
    if verdict.outcome == "passed" and entry.value[0].spki != case.chain[1].spki:
        verdict = failed(
            expected=f"the key of {case.chain[1].subject_text}",
            found=f"key SHA-256 {entry.value[0].spki_sha256.hex()}",
            advice="The list is of another authority: fetch the one of this certificate's issuer.",
        )
    if verdict.outcome == "passed":
        verdict = entry.fact("issuers", lambda: _issuers(entry.value))
    if verdict.outcome == "passed":
        verdict = case.judge_root(entry.value)
    if verdict.outcome == "passed":
        verdict = pki.check_validity(entry.value, case.at)
    return verdict


def _issuers(chain: tuple[Certificate, ...]) -> Verdict:
    for judge in (pki.check_names, pki.check_signatures):
        verdict = judge(chain)
        if verdict.outcome != "passed":
            return verdict
    return pki.check_algorithms(chain, PROFILE)


@COLLATERAL.evidence("revocation.pck")
def _pck_revoked(case: IntelCase) -> Verdict:
    """The PCK certificate is not revoked."""
    entry = _crl(case, "crl.pck", "pck-crl.der")
    if entry is None:
        return _GIVE["pck-crl.der"]
    return pki.check_not_revoked(entry.value, case.chain[0])


@COLLATERAL.evidence("revocation.ca")
def _ca_revoked(case: IntelCase) -> Verdict:
    """Neither the authority of the PCK nor a signer of the collateral is revoked."""
    entry = _crl(case, "crl.root", "root-ca-crl.der")
    if entry is None:
        return _GIVE["root-ca-crl.der"]
    issued = list(case.chain[1:-1])
    for check in _CHAIN_NAMES:
        chain = _signer_chain(case, check)
        issued += [] if chain is None else chain.value[:-1]
    return pki.check_not_revoked(entry.value, *issued)


# ---- signed documents ---------------------------------------------------------------------------


def _read_signer_chain(case: IntelCase, check: str) -> Chain | None:
    for name in _CHAIN_NAMES[check]:
        data = case.endorsements.get(name)
        if data is not None:
            return case._part(check, lambda found=data: read_chain("pem", found))  # type: ignore[misc] # noqa: SLF001
    return None


def _signer_chain(case: IntelCase, check: str) -> Chain | None:
    try:
        return _read_signer_chain(case, check)
    except EnclaveError:
        raise NotReachedError(check) from None


def check_signer_chain(entry: Chain, at: datetime) -> Verdict:
    """Judge the chain of a signer of TCB info and QE identity, all but its root."""
    verdict = static_facts(entry, SIGNER_ROLES)
    return pki.check_validity(entry.value, at) if verdict.outcome == "passed" else verdict


def _document_chain(case: IntelCase, check: str, name: str) -> Verdict:
    if name not in case.endorsements:
        return _GIVE[name]
    entry = _read_signer_chain(case, check)
    if entry is None:
        wanted = _CHAIN_NAMES[check][0]
        return absent(wanted, advice=f"The service sends it in a header along with {name}.")
    verdict = check_signer_chain(entry, case.at)
    return case.judge_root(entry.value) if verdict.outcome == "passed" else verdict


def check_document_signature(
    entry: Known[TcbInfo] | Known[QeIdentity], signer: Certificate
) -> Verdict:
    """Judge whether *signer* signed a document, over its bytes as they were served."""

    def judge() -> Verdict:
        document = entry.value
        if pki.verify_p256_raw(signer.public_key(), document.signature, document.signed):
            return PASSED
        return failed(
            expected=f"signed by {signer.subject_text}",
            found="an invalid signature",
            advice="It was changed or written anew: keep the bytes exactly as they are served.",
        )

    return entry.fact(("signed", signer.spki), judge)


def _document_signature(case: IntelCase, check: str, entry: Known[Any] | None) -> Verdict:
    chain = _signer_chain(case, check)
    if chain is None or entry is None:
        raise NotReachedError(check)
    return check_document_signature(entry, chain.value[0])


def check_window(what: str, start: datetime, end: datetime, at: datetime) -> Verdict:
    """Judge whether a document is in force."""
    if start <= at <= end:
        return PASSED
    return failed(
        expected=f"{what} in force at {at.isoformat()}",
        found=f"{start.isoformat()} to {end.isoformat()}",
        advice="Fetch the collateral again, or give the time at which it was in force.",
    )


def tcb_info(case: IntelCase) -> TcbInfo | None:
    """Return the TCB info, for other checks."""
    entry = case.endorsement("tcb.format", "tcb-info.json", TcbInfo.from_bytes)
    return None if entry is None else entry.value


def qe_identity(case: IntelCase) -> QeIdentity | None:
    """Return the QE identity, for other checks."""
    entry = case.endorsement("qe.identity.format", "qe-identity.json", QeIdentity.from_bytes)
    return None if entry is None else entry.value


@COLLATERAL.evidence("tcb.format")
def _tcb_format(case: IntelCase) -> Verdict:
    """The TCB info can be read, each member once."""
    entry = case.read_endorsement("tcb.format", "tcb-info.json", TcbInfo.from_bytes)
    return _GIVE["tcb-info.json"] if entry is None else PASSED


@COLLATERAL.evidence("tcb.chain")
def _tcb_chain(case: IntelCase) -> Verdict:
    """The signer of the TCB info leads to a pinned root."""
    return _document_chain(case, "tcb.chain", "tcb-info.json")


@COLLATERAL.evidence("tcb.signature")
def _tcb_signature(case: IntelCase) -> Verdict:
    """The TCB info is signed, over the bytes as they were served."""
    entry = case.endorsement("tcb.format", "tcb-info.json", TcbInfo.from_bytes)
    if entry is None:
        return _GIVE["tcb-info.json"]
    return _document_signature(case, "tcb.chain", entry)


@COLLATERAL.evidence("tcb.validity")
def _tcb_validity(case: IntelCase) -> Verdict:
    """The TCB info is in force."""
    info = tcb_info(case)
    if info is None:
        return _GIVE["tcb-info.json"]
    return check_window("TCB info", info.issue_date, info.next_update, case.at)


@COLLATERAL.evidence("tcb.tee")
def _tcb_tee(case: IntelCase) -> Verdict:
    """The TCB info is of this kind of TEE."""
    info = tcb_info(case)
    if info is None:
        return _GIVE["tcb-info.json"]
    if info.id == case.tee:
        return PASSED
    return failed(expected=f"TCB info of {case.tee}", found=info.id)


@COLLATERAL.evidence("tcb.fmspc")
def _fmspc(case: IntelCase) -> Verdict:
    """The TCB info is of the platform family that the PCK certificate names."""
    info = tcb_info(case)
    if info is None:
        return _GIVE["tcb-info.json"]
    if info.fmspc == case.pck.fmspc:
        return PASSED
    return failed(
        expected=f"TCB info of FMSPC {case.pck.fmspc.hex()}",
        found=info.fmspc,
        advice="It is of another platform family: fetch the one of this FMSPC.",
    )


@COLLATERAL.evidence("tcb.pce_id")
def _pce_id(case: IntelCase) -> Verdict:
    """The TCB info is of the PCE that the PCK certificate names."""
    info = tcb_info(case)
    if info is None:
        return _GIVE["tcb-info.json"]
    if info.pce_id == case.pck.pce_id:
        return PASSED
    return failed(expected=f"TCB info of PCE {case.pck.pce_id.hex()}", found=info.pce_id)


@COLLATERAL.evidence("qe.identity.format")
def _identity_format(case: IntelCase) -> Verdict:
    """The QE identity can be read, each member once."""
    entry = case.read_endorsement("qe.identity.format", "qe-identity.json", QeIdentity.from_bytes)
    return _GIVE["qe-identity.json"] if entry is None else PASSED


@COLLATERAL.evidence("qe.identity.chain")
def _identity_chain(case: IntelCase) -> Verdict:
    """The signer of the QE identity leads to a pinned root."""
    return _document_chain(case, "qe.identity.chain", "qe-identity.json")


@COLLATERAL.evidence("qe.identity.signature")
def _identity_signature(case: IntelCase) -> Verdict:
    """The QE identity is signed, over the bytes as they were served."""
    entry = case.endorsement("qe.identity.format", "qe-identity.json", QeIdentity.from_bytes)
    if entry is None:
        return _GIVE["qe-identity.json"]
    return _document_signature(case, "qe.identity.chain", entry)


@COLLATERAL.evidence("qe.identity.validity")
def _identity_validity(case: IntelCase) -> Verdict:
    """The QE identity is in force."""
    identity = qe_identity(case)
    if identity is None:
        return _GIVE["qe-identity.json"]
    return check_window("QE identity", identity.issue_date, identity.next_update, case.at)


@COLLATERAL.evidence("qe.identity.tee")
def _identity_tee(case: IntelCase) -> Verdict:
    """The QE identity is of this kind of TEE."""
    identity = qe_identity(case)
    if identity is None:
        return _GIVE["qe-identity.json"]
    wanted = _QE_IDS[case.tee]
    if identity.id == wanted:
        return PASSED
    return failed(expected=f"identity of the {wanted}", found=identity.id)


def _wrong_with_qe(case: IntelCase, identity: QeIdentity) -> tuple[str, str] | None:
    """Return what of the quoting enclave is not as its identity says: wanted and found."""
    report = case.any_quote.qe_report
    if report.mrsigner != identity.mrsigner:
        return f"MRSIGNER {identity.mrsigner.hex()}", report.mrsigner.hex()
    if report.isv_prod_id != identity.isv_prod_id:
        return f"ISVPRODID {identity.isv_prod_id}", str(report.isv_prod_id)
    wanted, mask = (
        int.from_bytes(value, "little") for value in (identity.attributes, identity.attributes_mask)
    )
    attributes = report.attributes.flags | report.attributes.xfrm << 64
    if attributes & mask != wanted:
        return f"ATTRIBUTES {wanted:#x} under its mask", f"{attributes & mask:#x}"
    select = report.misc_select & identity.misc_select_mask
    if select != identity.misc_select:
        return f"MISCSELECT {identity.misc_select:#x} under its mask", f"{select:#x}"
    return None


def qe_fits(case: IntelCase) -> bool | None:
    """Whether the quoting enclave is the one of its identity; ``None`` without identity."""
    identity = qe_identity(case)
    if identity is None:
        return None
    return case._part("qe fits", lambda: _wrong_with_qe(case, identity) is None)  # noqa: SLF001


@COLLATERAL.evidence("qe.identity")
def _identity(case: IntelCase) -> Verdict:
    """The quoting enclave is the one of the QE identity: signer, product, attributes."""
    identity = qe_identity(case)
    if identity is None:
        return _GIVE["qe-identity.json"]
    if qe_fits(case):
        return PASSED
    wrong = _wrong_with_qe(case, identity) or ("", "")
    advice = "Another enclave made the quote."
    return failed(expected=wrong[0], found=wrong[1], advice=advice)


# ---- the TCB level ------------------------------------------------------------------------------


def _qe_level(case: IntelCase) -> QeLevel | None:
    identity = qe_identity(case)
    if identity is None:
        return None
    return tcb.match_isv_svn(identity.levels, case.any_quote.qe_report.isv_svn)


def _svns(case: IntelCase) -> Iterator[bytes | None]:
    """Return TEE_TCB_SVN at launch and, if it is known, now; ``None`` for SGX."""
    body: Any = case.any_quote.report_body
    if case.tee != "TDX":
        yield None
        return
    yield body.tee_tcb_svn
    if body.tee_tcb_svn2 is not None:
        yield body.tee_tcb_svn2


def evaluations(case: IntelCase) -> tuple[tcb.Evaluation, ...]:
    """
    Return how the platform stood at launch and, for TDX 1.5, how it stands now.

    Empty without TCB info.

    """
    try:
        return case._part("evaluations", lambda: _evaluations(case))  # noqa: SLF001
    except EnclaveError:
        raise NotReachedError("tcb.level") from None


def _evaluations(case: IntelCase) -> tuple[tcb.Evaluation, ...]:
    entry = case.endorsement("tcb.format", "tcb-info.json", TcbInfo.from_bytes)
    if entry is None:
        return ()
    info, pck, level = entry.value, case.pck, _qe_level(case)
    judged = "qe-identity.json" in case.endorsements
    svns = tuple(_svns(case))

    def evaluate() -> tuple[tcb.Evaluation, ...]:
        return tuple(
            tcb.evaluate(info, level, pck.components, pck.pce_svn, svn, qe_judged=judged)
            for svn in svns
        )

    return entry.fact(("levels", pck.components, pck.pce_svn, svns, level, judged), evaluate)


def outcome(case: IntelCase) -> tuple[str, tuple[str, ...]] | None:
    """
    Return the final status and the advisories of the launch; None without TCB info.

    `tcb.level` asks for it first, so where that check is remembered, this is too.
    """
    found = evaluations(case)
    if not found:
        return None

    def merged() -> tuple[str, tuple[str, ...]]:
        return tcb.merge(found[0], found[1] if len(found) > 1 else None), found[0].advisories

    return case._part("outcome", merged)  # noqa: SLF001


@COLLATERAL.evidence("tcb.level")
def _level(case: IntelCase) -> Verdict:
    """Platform and TDX module each reach a level, and every status is known."""
    found = evaluations(case)
    if not found:
        return _GIVE["tcb-info.json"]
    for evaluation in found:
        # Asking for it refuses statuses that nobody knows.
        if evaluation.status == tcb.NO_MATCH and evaluation.missing != tcb.QE:
            return failed(
                expected=f"{evaluation.missing} that reaches a TCB level",
                found="none of the levels matches",
                advice="It is older than everything that Intel supports: update BIOS, microcode, "
                "TDX module and attestation software of that machine.",
            )
    outcome(case)
    return PASSED


@COLLATERAL.evidence("qe.level")
def _qe_has_level(case: IntelCase) -> Verdict:
    """The quoting enclave reaches a level of its identity, and that one is not revoked."""
    if qe_identity(case) is None:
        return _GIVE["qe-identity.json"]
    level = _qe_level(case)
    found = case.any_quote.qe_report.isv_svn
    if level is None:
        return failed(expected="a quoting enclave that reaches a level", found=f"ISVSVN {found}")
    if level.status == tcb.REVOKED:
        return failed(
            expected="a quoting enclave that is not revoked",
            found=f"ISVSVN {found}: Revoked",
            advice="Update the attestation software (DCAP) of that machine.",
        )
    return PASSED


@COLLATERAL.evidence("tcb.revoked")
def _revoked(case: IntelCase) -> Verdict:
    """Neither the platform nor its TDX module is revoked, neither at launch nor now."""
    found = evaluations(case)
    if not found:
        return _GIVE["tcb-info.json"]
    for evaluation in found:
        if evaluation.revoked:
            return failed(
                expected="a platform that is not revoked",
                found="Revoked",
                advice="Intel has withdrawn its trust in this TCB level: do not use the machine.",
            )
    return PASSED


# ---- what is remembered -------------------------------------------------------------------------


def _seen_of_body(case: IntelCase) -> dict[str, Any]:
    """Return what the checks see of a TD; of an enclave nothing."""
    body: Any = case.any_quote.report_body
    names = ("tee_tcb_svn", "tee_tcb_svn2", "mrsigner_seam", "seam_attributes")
    return {name: getattr(body, name) for name in names} if case.tee == "TDX" else {}


def _key(case: IntelCase) -> Hashable:
    """All that the checks of the collateral depend on besides the time."""
    pck, report = case.pck, case.any_quote.qe_report
    return (
        case.pinned,
        case.endorsements.items,
        tuple(certificate.der for certificate in case.chain[1:]),
        (pck.fmspc, pck.pce_id, pck.components, pck.pce_svn),
        (report.mrsigner, report.isv_prod_id, report.isv_svn),
        (report.attributes.flags, report.attributes.xfrm, report.misc_select),
        tuple(_seen_of_body(case).values()),
    )


def _reduced(case: IntelCase, at: Moment) -> IntelCase:
    """Return a case with nothing but what is in the key."""
    pck, quote, chain = case.pck, case.any_quote, case.chain
    report = quote.qe_report
    return case.bare(
        at,
        case.endorsements,
        quote=SimpleNamespace(
            qe_report=SimpleNamespace(
                mrsigner=report.mrsigner,
                isv_prod_id=report.isv_prod_id,
                isv_svn=report.isv_svn,
                attributes=report.attributes,
                misc_select=report.misc_select,
            ),
            report_body=SimpleNamespace(**_seen_of_body(case)),
        ),
        chain=Known((None, *chain[1:])),
        pck=SimpleNamespace(
            fmspc=pck.fmspc, pce_id=pck.pce_id, components=pck.components, pce_svn=pck.pce_svn
        ),
    )


def collateral_block(*more: str) -> Block[Any]:
    """
    Return the checks of collateral, and *more* of one kind, as a block to be remembered.

    Whether this very PCK certificate is revoked is asked each time.
    """
    return Block(
        names=(frozenset(COLLATERAL.functions) | set(more)) - {"revocation.pck"},
        key=_key,
        reduce=_reduced,
        given=frozenset(("quote", "chain", "pck")),
    )


# ---- how long it holds --------------------------------------------------------------------------


def window(case: IntelCase) -> tuple[datetime, datetime] | None:
    """Return from when until when everything that was given is in force, if all was given."""
    info, identity = tcb_info(case), qe_identity(case)
    lists = _crl(case, "crl.root", "root-ca-crl.der"), _crl(case, "crl.pck", "pck-crl.der")
    if info is None or identity is None or None in lists:
        return None
    crls = [entry.value for entry in lists if entry is not None]
    starts = [info.issue_date, identity.issue_date, *(crl.this_update for crl in crls)]
    ends = [info.next_update, identity.next_update]
    ends += [crl.next_update for crl in crls if crl.next_update is not None]
    chains = [case.chain]
    for check in _CHAIN_NAMES:
        entry = _signer_chain(case, check)
        chains += [] if entry is None else [entry.value]
    for chain in chains:
        starts += [certificate.not_before for certificate in chain]
        ends += [certificate.not_after for certificate in chain]
    return max(starts), min(ends)
