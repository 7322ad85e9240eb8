"""
The checks of DCAP quotes of TDs, versions 4 and 5.

Structures: the project's notes on TDX, 3.3 to 3.6; TDX module and relaunch: the notes on
collateral, 5.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pyenclave.attestation import tcb
from pyenclave.attestation.case import gathered, judge_reference, judge_registers, judged_at
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed
from pyenclave.attestation.intel import CHAIN_BLOCK, EVIDENCE, IntelCase, adopt
from pyenclave.attestation.intel_collateral import (
    COLLATERAL,
    collateral_block,
    evaluations,
    tcb_info,
)
from pyenclave.attestation.intel_policy import NAME, POLICY, SHARED_CLAIMS, judge_code_kind
from pyenclave.formats import dcap, tdx

__all__ = ["CHECKS", "Case", "claims"]

# The project's notes on TDX, 3.3.
_KNOWN_ATTRIBUTES: Final = (
    tdx.ATTRIBUTE_DEBUG
    | tdx.ATTRIBUTE_SERVTD_EXT
    | tdx.ATTRIBUTE_SEPT_VE_DISABLE
    | tdx.ATTRIBUTE_MIGRATABLE
    | tdx.ATTRIBUTE_PKS
    | tdx.ATTRIBUTE_KEY_LOCKER
    | tdx.ATTRIBUTE_PERFMON
)
_XFAM_NEEDED: Final = 0x3
_XFAM_KNOWN: Final = 0x6DBE7
_EXTENDED: Final = 4


@dataclass(slots=True, kw_only=True)
class Case(IntelCase):
    """A quote of a TD, and what it is judged by."""

    tee: ClassVar[str] = "TDX"

    def read_quote(self) -> dcap.TdQuote:
        """Read the quote."""
        return self._part("quote", lambda: dcap.TdQuote.from_bytes(self.data))

    @property
    def body(self) -> tdx.TdReportBody:
        """The TD's report, for other checks."""
        found = self._read.get("quote")
        if isinstance(found, dcap.TdQuote):
            return found.report_body
        return self.need("quote.format", self.read_quote).report_body


CHECKS: Final[Registry[Case]] = Registry()
adopt(CHECKS, EVIDENCE)
adopt(CHECKS, COLLATERAL)


@CHECKS.evidence("tdx.module")
def _module(case: Case) -> Verdict:
    """The TDX module is one of Intel's, and of the identity that its version demands."""
    body, info = case.body, tcb_info(case)
    if any(body.seam_attributes):
        return failed(expected="no SEAM attributes", found=body.seam_attributes)
    if info is None:
        if any(body.mrsigner_seam):
            return failed(expected="a TDX module of Intel's", found=body.mrsigner_seam)
        return PASSED
    for svn in (body.tee_tcb_svn, body.tee_tcb_svn2):
        if svn is None:
            continue
        module, _ = tcb.find_module(info, svn)
        if module is None:
            return failed(
                expected=f"an identity {tcb.module_id(svn)} in the TCB info",
                found=[identity.id for identity in info.module_identities],
                advice="Fetch the TCB info again: it is older than that TDX module.",
            )
        if not tcb.module_fits(module, body):
            return failed(
                expected=f"signer {module.mrsigner.hex()}, attributes {module.attributes.hex()}",
                found=f"signer {body.mrsigner_seam.hex()}, attributes {body.seam_attributes.hex()}",
            )
    return PASSED


adopt(CHECKS, POLICY)


@CHECKS.policy("td.debug")
def _debug(case: Case) -> Verdict:
    """Nobody can debug the TD, unless the policy allows it."""
    if case.body.debug and not case.policy.allow_debug:
        return failed(
            expected="a TD that nobody can debug",
            found="debug",
            advice="The host reads its memory. Start it without DEBUG; allow_debug only for tests.",
        )
    return PASSED


@CHECKS.policy("td.migration")
def _migration(case: Case) -> Verdict:
    """Nobody can move the TD, and its memory, to where another TD says."""
    if case.body.flags & tdx.ATTRIBUTE_MIGRATABLE and not case.policy.allow_migration_agent:
        return failed(
            expected="a TD that stays where it is",
            found="MIGRATABLE",
            advice="Start it without MIGRATABLE, or, if you trust its migration TD, "
            "allow_migration_agent.",
        )
    return PASSED


@CHECKS.policy("td.attributes")
def _attributes(case: Case) -> Verdict:
    """Nothing is on whose meaning for security nobody here knows."""
    if case.policy.allow_unknown_td_features:
        return NAME("allow_unknown_td_features = false")
    body = case.body
    xfam = int.from_bytes(body.xfam, "little")
    wrong = None
    if body.flags & ~_KNOWN_ATTRIBUTES:
        wrong = f"ATTRIBUTES {body.flags & ~_KNOWN_ATTRIBUTES:#x}"
    elif xfam & _XFAM_NEEDED != _XFAM_NEEDED or xfam & ~_XFAM_KNOWN:
        wrong = f"XFAM {xfam:#x}"
    elif body.body_type == _EXTENDED:
        wrong = "a report body of type 4"
    if wrong is None:
        return PASSED
    return failed(
        expected="a TD with known features only",
        found=wrong,
        advice="Upgrade pyenclave, or accept them with allow_unknown_td_features.",
    )


@CHECKS.policy("td.sept_ve_disable")
def _sept_ve(case: Case) -> Verdict:
    """SEPT_VE_DISABLE is as the policy says."""
    wanted = case.policy.sept_ve_disable
    if wanted is None:
        return NAME("sept_ve_disable")
    found = bool(case.body.flags & tdx.ATTRIBUTE_SEPT_VE_DISABLE)
    if found is wanted:
        return PASSED
    return failed(
        expected=f"SEPT_VE_DISABLE {wanted}",
        found=found,
        advice="Without it the host can make the TD's kernel handle faults at any place.",
    )


@CHECKS.policy("code.mrtd")
def _mrtd(case: Case) -> Verdict:
    """MRTD is one that the policy names."""
    if not case.policy.reference("mrtd"):
        return NAME("mrtd")
    advice = "Another firmware was started. pyenclave measure tdx tells what to expect."
    return judge_reference(case, "mrtd", case.body.mr_td, advice=advice)


@CHECKS.policy("code.rtmrs")
def _rtmrs(case: Case) -> Verdict:
    """The RTMRs that the policy names have its values."""
    if not case.policy.registers("rtmrs"):
        return NAME("rtmrs")
    return judge_registers(case, "rtmrs", dict(enumerate(case.body.rtmrs)))


@CHECKS.policy("code.mr_config_id")
def _config_id(case: Case) -> Verdict:
    """MRCONFIGID is one that the policy names."""
    if not case.policy.reference("mr_config_id"):
        return NAME("mr_config_id")
    return judge_reference(case, "mr_config_id", case.body.mr_config_id)


@CHECKS.policy("code.mr_owner")
def _owner(case: Case) -> Verdict:
    """MROWNER is one that the policy names."""
    if not case.policy.reference("mr_owner"):
        return NAME("mr_owner")
    return judge_reference(case, "mr_owner", case.body.mr_owner)


@CHECKS.policy("code.mr_owner_config")
def _owner_config(case: Case) -> Verdict:
    """MROWNERCONFIG is one that the policy names."""
    if not case.policy.reference("mr_owner_config"):
        return NAME("mr_owner_config")
    return judge_reference(case, "mr_owner_config", case.body.mr_owner_config)


@CHECKS.policy("code.mr_service_td")
def _service_td(case: Case) -> Verdict:
    """MRSERVICETD is one that the policy names."""
    if not case.policy.reference("mr_service_td"):
        return NAME("mr_service_td")
    found = case.body.mr_service_td
    if found is not None:
        return judge_reference(
            case, "mr_service_td", found, advice="Another service TD is bound to it."
        )
    return failed(
        expected=case.policy.reference("mr_service_td"),
        found="a report of TDX 1.0, which has none",
        advice="Ask for a quote of version 5.",
    )


@CHECKS.policy("td.xfam")
def _xfam(case: Case) -> Verdict:
    """XFAM, the processor's state that the TD may use, is one that the policy names."""
    if not case.policy.reference("xfam"):
        return NAME("xfam")
    return judge_reference(
        case, "xfam", case.body.xfam, advice="It was started with other features of the CPU."
    )


@CHECKS.policy("platform.mr_seam")
def _seam(case: Case) -> Verdict:
    """The measurement of the TDX module is one that the policy names."""
    if not case.policy.reference("mr_seam"):
        return NAME("mr_seam")
    return judge_reference(case, "mr_seam", case.body.mr_seam, advice="Another TDX module runs.")


@CHECKS.policy("code.kind")
def _code_kind(case: Case) -> Verdict:
    """A policy that names code of other kinds of evidence only is not met by this one."""
    return judge_code_kind(case, "mrtd")


CHECKS.remember(CHAIN_BLOCK)
CHECKS.remember(collateral_block("tdx.module"))


def _body_claims(case: Case) -> dict[str, Any]:
    body = case.body
    found: dict[str, Any] = {
        "tee_tcb_svn": body.tee_tcb_svn.hex(),
        "mr_seam": body.mr_seam.hex(),
        "mrsigner_seam": body.mrsigner_seam.hex(),
        "seam_attributes": body.seam_attributes.hex(),
        "td_attributes": body.td_attributes.hex(),
        "xfam": body.xfam.hex(),
        "mr_td": body.mr_td.hex(),
        "mr_config_id": body.mr_config_id.hex(),
        "mr_owner": body.mr_owner.hex(),
        "mr_owner_config": body.mr_owner_config.hex(),
        "debug": body.debug,
        "sept_ve_disable": bool(body.flags & tdx.ATTRIBUTE_SEPT_VE_DISABLE),
    }
    found |= {f"rtmr{index}": value.hex() for index, value in enumerate(body.rtmrs)}
    if body.tee_tcb_svn2 is not None and body.mr_service_td is not None:
        found |= {
            "tee_tcb_svn2": body.tee_tcb_svn2.hex(),
            "mr_service_td": body.mr_service_td.hex(),
            "mr_service_td_is_zero": not any(body.mr_service_td),
        }
    return found


def _module_claims(case: Case) -> dict[str, Any]:
    body, info, evaluated = case.body, tcb_info(case), evaluations(case)
    if info is None or not evaluated:
        return {}
    module, identity = tcb.find_module(info, body.tee_tcb_svn)
    level = evaluated[0].module
    found: dict[str, Any] = {
        "tdx_module_status": None if level is None else level.status,
        "tdx_module_mrsigner_match": module is not None and body.mrsigner_seam == module.mrsigner,
    }
    return found if identity is None else found | {"tdx_module_id": identity.id}


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the evidence says, as far as it can be read; binary values as hex."""
    return gathered(case, judged_at, _body_claims, _module_claims, *SHARED_CLAIMS)
