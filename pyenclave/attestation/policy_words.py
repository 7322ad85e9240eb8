"""
An appraisal policy in sentences, for ``pyenclave policy explain``.

What the policy itself says is always told. What holds by default is told for the kinds of evidence
that its identities speak of: no other kind is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from pyenclave.attestation.demands import families
from pyenclave.attestation.references import Reference

if TYPE_CHECKING:
    from pyenclave.attestation.policy import AppraisalPolicy

__all__ = ["describe"]

_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "mrenclave": "SGX, pyenclave: MRENCLAVE",
        "mrsigner": "SGX, pyenclave: MRSIGNER",
        "config_id": "SGX: CONFIGID",
        "isv_ext_prod_id": "SGX: ISVEXTPRODID",
        "isv_family_id": "SGX: ISVFAMILYID",
        "xfrm": "SGX: XFRM",
        "ppid": "SGX, TDX: the platform's PPID",
        "fmspc": "SGX, TDX: the platform's FMSPC",
        "mrtd": "TDX: MRTD",
        "rtmrs": "TDX: RTMR",
        "mr_seam": "TDX: MRSEAM",
        "mr_config_id": "TDX: MRCONFIGID",
        "mr_owner": "TDX: MROWNER",
        "mr_owner_config": "TDX: MROWNERCONFIG",
        "mr_service_td": "TDX: MRSERVICETD",
        "xfam": "TDX: XFAM",
        "launch_digest": "SEV-SNP: launch digest",
        "host_data": "SEV-SNP: HOST_DATA",
        "id_key_digest": "SEV-SNP: ID key digest",
        "author_key_digest": "SEV-SNP: author key digest",
        "family_id": "SEV-SNP: FAMILY_ID",
        "image_id": "SEV-SNP: IMAGE_ID",
        "chip_id": "SEV-SNP: the chip",
        "rim": "Arm CCA: RIM",
        "rems": "Arm CCA: REM",
        "rpv": "Arm CCA: RPV",
        "implementation_id": "Arm CCA: implementation ID",
        "gpu_measurements": "NVIDIA: measurement ",
        "pcrs": "Nitro, vTPM: PCR",
    }
)


def _is(values: tuple[Reference, ...], at: datetime | None) -> str:
    """Say that a value is one of *values*."""
    shown = []
    for value in values:
        out = at is not None and not value.holds_at(at)
        shown.append(f"{value}{' (not accepted at this time)' if out else ''}")
    return f"is {shown[0]}" if len(shown) == 1 else "is one of " + ", ".join(shown)


def _or(words: Iterable[Any]) -> str:
    return " or ".join(str(word) for word in words)


def describe(policy: AppraisalPolicy, *, at: datetime | None = None) -> tuple[str, ...]:
    """Return the sentences; see `AppraisalPolicy.describe`."""
    spoken = families(policy)
    lines = ["The evidence is genuine: every signature holds up to a pinned root, nothing expired."]
    lines += _code(policy, at)
    lines += _intel(policy, spoken)
    lines += _amd(policy)
    lines += _tokens(policy, spoken)
    lines += _platform(policy, spoken)
    return tuple(lines)


def _code(policy: AppraisalPolicy, at: datetime | None) -> list[str]:
    from pyenclave.attestation.policy import REFERENCES, REGISTERS

    lines = []
    if policy.accept_any_code:
        lines.append(
            "ANY CODE is accepted: the result is never identified. Name a measurement or a signer."
        )
    else:
        lines.append("Evidence that tells no code identity named here is refused.")
    for name in REFERENCES:
        values = policy.reference(name)
        if values:
            lines.append(f"{_NAMES[name]} {_is(values, at)}.")
    for name in REGISTERS:
        for index, values in policy.registers(name).items():
            lines.append(f"{_NAMES[name]}{index} {_is(values, at)}.")
    if policy.product_id is not None:
        lines.append(f"SGX, pyenclave: the product ID is {policy.product_id}.")
    if policy.min_security_version is not None:
        lines.append(
            f"SGX, pyenclave: the security version is at least {policy.min_security_version}."
        )
    if policy.allow_debug:
        lines.append(
            "DEBUG IS ACCEPTED: whoever runs the machine may read and change what runs there."
        )
    else:
        lines.append("Debug is refused.")
    return lines


def _intel(policy: AppraisalPolicy, spoken: frozenset[str]) -> list[str]:
    lines = []
    up_to_date = policy.tcb_statuses == ("UpToDate",)
    if not up_to_date or spoken & {"sgx", "tdx", "token"}:  # tokens tell a TCB's status, too
        lines.append(f"SGX, TDX: the TCB status is {_or(policy.tcb_statuses)}.")
    if not up_to_date:
        allowed = policy.accepted_advisories
        if allowed == ("any",):
            lines.append("SGX, TDX: whatever advisories the TCB has are ACCEPTED.")
        elif allowed:
            lines.append(
                "SGX, TDX: a TCB that is not up to date may have only these advisories: "
                f"{', '.join(allowed)}."
            )
        else:
            lines.append("SGX, TDX: a TCB that is not up to date may have no advisory.")
    if not policy.require_collateral:
        lines.append("SGX, TDX: collateral that is NOT GIVEN is not missed.")
    elif spoken & {"sgx", "tdx"}:
        lines.append("SGX, TDX: all of Intel's collateral is given.")
    if policy.min_tcb_evaluation_number is not None:
        lines.append(
            "SGX, TDX: the collateral's evaluation number is at least "
            f"{policy.min_tcb_evaluation_number}."
        )
    if policy.min_config_svn is not None:
        lines.append(f"SGX: CONFIGSVN is at least {policy.min_config_svn}.")
    for name in policy.required_attributes:
        lines.append(f"SGX: the enclave has the attribute {name}.")
    for name in policy.forbidden_attributes:
        lines.append(f"SGX: the enclave has no attribute {name}.")
    if policy.sept_ve_disable is not None:
        word = "set" if policy.sept_ve_disable else "not set"
        lines.append(f"TDX: the attribute SEPT_VE_DISABLE is {word}.")
    if policy.allow_unknown_td_features:
        lines.append("TDX: features that are NOT KNOWN here are ACCEPTED.")
    return lines


def _amd(policy: AppraisalPolicy) -> list[str]:
    lines = []
    if policy.product_lines:
        lines.append(f"SEV-SNP: the processor is of the line {_or(policy.product_lines)}.")
    if policy.max_vmpl is not None:
        upto = f" to {policy.max_vmpl}" if policy.max_vmpl else ""
        lines.append(f"SEV-SNP: the report was asked for at VMPL 0{upto}.")
    if policy.min_guest_svn is not None:
        lines.append(f"SEV-SNP: the guest's SVN is at least {policy.min_guest_svn}.")
    for name, value in (policy.min_tcb or {}).items():
        lines.append(f"SEV-SNP: the TCB's {name} is at least {value}.")
    for name in policy.required_policy_bits:
        lines.append(f"SEV-SNP: the guest policy has {name}.")
    for name in policy.forbidden_policy_bits:
        lines.append(f"SEV-SNP: the guest policy has no {name}.")
    for name in policy.required_platform_bits:
        lines.append(f"SEV-SNP: the platform has {name}.")
    if policy.allow_migration_agent:
        lines.append("SEV-SNP: guests that a MIGRATION AGENT may take over are ACCEPTED.")
    if policy.allow_masked_chip_id:
        lines.append("SEV-SNP: reports that do NOT NAME THEIR CHIP are ACCEPTED.")
    return lines


def _tokens(policy: AppraisalPolicy, spoken: frozenset[str]) -> list[str]:
    lines = []
    if policy.ear_tiers != ("affirming",) or "token" in spoken:
        lines.append(f"Attestation results: each appraisal is {_or(policy.ear_tiers)}.")
    if policy.issuers:
        lines.append(f"Tokens: the issuer is {_or(policy.issuers)}.")
    if policy.audience:
        lines.append(f"Tokens: the audience is {policy.audience}.")
    for name, values in (policy.claims or {}).items():
        lines.append(f"Tokens: the claim {name} is {_or(repr(value) for value in values)}.")
    if policy.max_age is not None:
        lines.append(f"Tokens, documents: the age is at most {policy.max_age} seconds.")
    return lines


def _platform(policy: AppraisalPolicy, spoken: frozenset[str]) -> list[str]:
    lines = []
    if policy.min_level != "embedded" or "own" in spoken:
        lines.append(f"pyenclave: the level is at least {policy.min_level}.")
    if policy.required_bits:
        lines.append(f"pyenclave: these protections held: {', '.join(policy.required_bits)}.")
    if policy.min_platform_svn:
        lines.append(f"pyenclave: the platform's version is at least {policy.min_platform_svn}.")
    if not policy.allow_jit:
        lines.append("pyenclave: code may not write memory and then execute it.")
    if policy.dangerous_allow_software:
        lines.append(
            "pyenclave: A SOFTWARE PLATFORM IS ACCEPTED: whoever controls that machine can forge "
            "its evidence."
        )
    elif "own" in spoken:
        lines.append("pyenclave: a platform without TEE hardware is refused.")
    return lines
