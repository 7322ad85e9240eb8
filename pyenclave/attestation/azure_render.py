"""
An appraisal policy in Azure's two languages, and our claims under Azure's names.

What a policy demands and a language cannot say is an error, never left out. Claim names: the
project's notes on Azure Attestation, 8.2. The TCB of SGX and SEV-SNP platforms is judged by Azure's
own baseline; only TDX tokens tell a status that a policy can name. ``pyenclave`` is no TEE of
Azure's: it is what this project's own attestation service says of this project's enclaves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from operator import itemgetter
from typing import Any, Final, Literal

from pyenclave.attestation.policy import LEVELS, AppraisalPolicy
from pyenclave.attestation.references import Reference
from pyenclave.formats.release_policy import (
    AllOf,
    AnyOf,
    Authority,
    ClaimCondition,
    Condition,
    ReleasePolicy,
    normal_authority,
)

__all__ = ["TEES", "Tee", "attestation_policy", "azure_claims", "release_policy"]

Tee = Literal["sgx", "sevsnpvm", "tdxvm", "pyenclave"]
TEES: Final[tuple[Tee, ...]] = ("sgx", "sevsnpvm", "tdxvm", "pyenclave")
Scalar = str | int | bool
Comparison = Literal["==", "<=", ">="]
_TYPE: Final = "x-ms-attestation-type"
_SGX: Final = "x-ms-sgx-"
_SNP: Final = "x-ms-sevsnpvm-"
_TDX: Final = "tdx_"
_OURS: Final = "x-pyenclave-"
# Field of the policy → claim, by TEE: one of several values …
_REFERENCES: Final[Mapping[Tee, Mapping[str, str]]] = {
    "sgx": {
        "mrenclave": f"{_SGX}mrenclave",
        "mrsigner": f"{_SGX}mrsigner",
        "config_id": f"{_SGX}config-id",
        "isv_ext_prod_id": f"{_SGX}isv-extended-product-id",
        "isv_family_id": f"{_SGX}isv-family-id",
    },
    "sevsnpvm": {
        "launch_digest": f"{_SNP}launchmeasurement",
        "host_data": f"{_SNP}hostdata",
        "id_key_digest": f"{_SNP}idkeydigest",
        "author_key_digest": f"{_SNP}authorkeydigest",
        "family_id": f"{_SNP}familyId",
        "image_id": f"{_SNP}imageId",
    },
    "tdxvm": {
        "mrtd": f"{_TDX}mrtd",
        "mr_seam": f"{_TDX}mrseam",
        "mr_config_id": f"{_TDX}mrconfigid",
        "mr_owner": f"{_TDX}mrowner",
        "mr_owner_config": f"{_TDX}mrownerconfig",
        "xfam": f"{_TDX}xfam",
    },
    "pyenclave": {
        "mrenclave": f"{_SGX}mrenclave",
        "mrsigner": f"{_SGX}mrsigner",
    },
}
# … or a number in a relation to the field's.
_NUMBERS: Final[Mapping[Tee, Mapping[str, tuple[str, Comparison]]]] = {
    "sgx": {
        "product_id": (f"{_SGX}product-id", "=="),
        "min_security_version": (f"{_SGX}svn", ">="),
        "min_config_svn": (f"{_SGX}config-svn", ">="),
    },
    "sevsnpvm": {
        "min_guest_svn": (f"{_SNP}guestsvn", ">="),
        "max_vmpl": (f"{_SNP}vmpl", "<="),
    },
    "tdxvm": {},
    "pyenclave": {
        "product_id": (f"{_SGX}product-id", "=="),
        "min_security_version": (f"{_SGX}svn", ">="),
        "min_platform_svn": (f"{_OURS}platform-svn", ">="),
    },
}
_DEBUG: Final[Mapping[Tee, str]] = {
    "sgx": f"{_SGX}is-debuggable",
    "sevsnpvm": f"{_SNP}is-debuggable",
    "tdxvm": f"{_TDX}td_attributes_debug",
    "pyenclave": f"{_SGX}is-debuggable",
}
_TCB: Final = {
    "bootloader": f"{_SNP}bootloader-svn",
    "tee": f"{_SNP}tee-svn",
    "snp": f"{_SNP}snpfw-svn",
    "microcode": f"{_SNP}microcode-svn",
}
_STATUS: Final = "attester_tcb_status"
# TEEs that can hold the root of a platform of ours: named, so that what is new is not let in.
_HARDWARE: Final = ("sev-snp", "tdx", "sgx")
# What says nothing about hardware evidence, or only ever allows more than Azure does.
_WITHOUT_MEANING: Final = frozenset(
    {
        "accept_any_code",
        "allow_debug",
        "allow_jit",
        "allow_masked_chip_id",
        "allow_migration_agent",
        "dangerous_allow_software",
        "require_collateral",
    }
)
# Of these, what has a meaning for our own kind of evidence.
_MEANT: Final[Mapping[str, frozenset[str]]] = {"pyenclave": frozenset({"allow_jit"})}


@dataclass(frozen=True, slots=True)
class _Demand:
    """A claim that must stand in a relation to one of the values."""

    field: str
    claim: str
    comparison: Comparison
    values: tuple[Scalar, ...]


def _default(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()


def _references(name: str, given: Any, at: datetime | None) -> tuple[str, ...]:
    values: list[str] = []
    for reference in given:
        if not isinstance(reference, Reference):
            raise TypeError(f"{name}: not a reference value")
        if reference.window and at is None:
            raise ValueError(
                f"{name}: Azure's policies know no validity windows; say with at= for when the "
                "policy is made, and make it anew when a window opens or ends"
            )
        if at is None or reference.holds_at(at):
            values.append(reference.value.hex())
    if not values:
        raise ValueError(f"{name}: no value is valid at that time")
    return tuple(dict.fromkeys(values))


def _demands(policy: AppraisalPolicy, tee: Tee, at: datetime | None) -> Iterator[_Demand]:
    if tee not in TEES:
        raise ValueError(f"tee is one of {', '.join(TEES)}, not {tee!r}")
    without_meaning = _WITHOUT_MEANING - _MEANT.get(tee, frozenset())
    yield _Demand("kind", _TYPE, "==", (tee,))
    if tee == "pyenclave" and not policy.dangerous_allow_software:
        yield _Demand("dangerous_allow_software", f"{_OURS}tee", "==", _HARDWARE)
    if not policy.allow_debug:
        yield _Demand("allow_debug", _DEBUG[tee], "==", (False,))
    if tee == "sevsnpvm" and not policy.allow_migration_agent:
        yield _Demand("allow_migration_agent", f"{_SNP}migration-allowed", "==", (False,))
    if tee == "tdxvm":
        yield _Demand("tcb_statuses", _STATUS, "==", tuple(policy.tcb_statuses))
    for item in fields(AppraisalPolicy):
        if not item.init or item.name.startswith("_"):
            continue
        value = getattr(policy, item.name)
        if value == _default(item) or item.name in without_meaning:
            continue
        demands = list(_demand(item.name, value, tee, at))
        if not demands and (item.name, tee) != ("tcb_statuses", "tdxvm"):
            raise ValueError(f"{item.name}: Azure's policies for {tee} have no word for it")
        yield from demands


def _demand(name: str, value: Any, tee: Tee, at: datetime | None) -> Iterator[_Demand]:
    if name in _REFERENCES[tee]:
        yield _Demand(name, _REFERENCES[tee][name], "==", _references(name, value, at))
    elif name in _NUMBERS[tee]:
        claim, comparison = _NUMBERS[tee][name]
        yield _Demand(name, claim, comparison, (value,))
    elif tee == "sevsnpvm" and name == "min_tcb":
        for component, level in value.items():
            if component not in _TCB:
                raise ValueError(f"min_tcb: Azure's tokens do not tell {component}")
            yield _Demand(f"min_tcb.{component}", _TCB[component], ">=", (level,))
    elif tee == "sevsnpvm" and name == "forbidden_policy_bits" and set(value) == {"smt"}:
        yield _Demand(name, f"{_SNP}smt-allowed", "==", (False,))
    elif tee == "sevsnpvm" and name == "required_policy_bits" and set(value) == {"smt"}:
        yield _Demand(name, f"{_SNP}smt-allowed", "==", (True,))
    elif tee == "tdxvm" and name == "sept_ve_disable":
        yield _Demand(name, f"{_TDX}td_attributes_septve_disable", "==", (value,))
    elif tee == "pyenclave" and name == "min_level":
        yield _Demand(name, f"{_OURS}level", "==", LEVELS[LEVELS.index(value) :])
    elif tee == "pyenclave" and name == "allow_jit":
        yield _Demand(name, f"{_OURS}jit", "==", (False,))
    elif tee == "tdxvm" and name == "rtmrs":
        for index, given in value.items():
            yield _Demand(
                f"rtmrs.{index}", f"{_TDX}rtmr{index}", "==", _references(name, given, at)
            )


def attestation_policy(policy: AppraisalPolicy, *, tee: Tee, at: datetime | None = None) -> str:
    """
    Return *policy* as the text of an Azure Attestation policy (version 1.0).

    Args:
        policy: What is demanded.
        tee: Of the attestation: ``sgx``, ``sevsnpvm``, ``tdxvm`` or ``pyenclave``.
        at: For when; needed if reference values have validity windows.

    Raises:
        ValueError: The policy demands what the language cannot say.

    """
    lines = ["version=1.0;", "authorizationrules", "{"]
    conditions = []
    for number, demand in enumerate(_demands(policy, tee, at)):
        claims = [
            f'[type=="{demand.claim}", value{demand.comparison}{json.dumps(value)}, '
            'issuer=="AttestationService"]'
            for value in demand.values
        ]
        if len(claims) == 1:
            conditions.append(claims[0])
            continue
        # The language has no "or": each value adds the same mark, which only a policy can add.
        mark = f"demand-{number}"
        lines += [f'  {claim} => add(type="{mark}", value=true);' for claim in claims]
        conditions.append(f'[type=="{mark}", value==true, issuer=="AttestationPolicy"]')
    lines.append("  " + " &&\n  ".join(conditions) + " => permit();")
    lines += ["};", "issuancerules", "{", "};", ""]
    return "\n".join(lines)


_OPERATORS: Final[Mapping[Comparison, Any]] = {
    "==": "equals",
    "<=": "lessOrEquals",
    ">=": "greaterOrEquals",
}


def release_policy(
    policy: AppraisalPolicy,
    *,
    tee: Tee,
    authority: str,
    prefix: str = "",
    at: datetime | None = None,
) -> ReleasePolicy:
    """
    Return *policy* as a key-release policy.

    Args:
        policy: What is demanded.
        tee: Of the attestation.
        authority: Address of the attestation service whose tokens count.
        prefix: What stands before the claims' names: ``x-ms-isolation-tee.`` for the tokens of
            guest attestation in confidential VMs.
        at: For when; needed if reference values have validity windows.

    Raises:
        AttestationError: *authority* is no plain https address.
        ValueError: The policy demands what the language cannot say.

    """
    if not re.fullmatch(r"([A-Za-z0-9-]+\.)*", prefix):
        raise ValueError(f"prefix: {prefix!r} is not names that end in dots")
    conditions: list[Condition] = []
    for demand in _demands(policy, tee, at):
        claims = tuple(
            ClaimCondition(prefix + demand.claim, _OPERATORS[demand.comparison], value)
            for value in demand.values
        )
        conditions.append(claims[0] if len(claims) == 1 else AnyOf(claims))
    normal_authority(authority)
    return ReleasePolicy((Authority(authority, AllOf(tuple(conditions))),), strict=True)


# ---- our claims under Azure's names -----------------------------------------------------------


def _attribute(place: int) -> Callable[[Any], bool]:
    def bit(text: str) -> bool:
        return bool(int.from_bytes(bytes.fromhex(text), "little") >> place & 1)

    return bit


def _as_is(value: Any) -> Any:
    return value


# Claim of Azure → claim of ours and how its value is said.
_CLAIMS: Final[Mapping[Tee, Mapping[str, tuple[str, Callable[[Any], Any]]]]] = {
    "sgx": {
        f"{_SGX}mrenclave": ("mrenclave", _as_is),
        f"{_SGX}mrsigner": ("mrsigner", _as_is),
        f"{_SGX}product-id": ("isv_prod_id", _as_is),
        f"{_SGX}svn": ("isv_svn", _as_is),
        f"{_SGX}is-debuggable": ("debug", _as_is),
        f"{_SGX}config-id": ("config_id", _as_is),
        f"{_SGX}config-svn": ("config_svn", _as_is),
        f"{_SGX}isv-extended-product-id": ("isv_ext_prod_id", _as_is),
        f"{_SGX}isv-family-id": ("isv_family_id", _as_is),
    },
    "sevsnpvm": {
        f"{_SNP}launchmeasurement": ("measurement", _as_is),
        f"{_SNP}hostdata": ("host_data", _as_is),
        f"{_SNP}idkeydigest": ("id_key_digest", _as_is),
        f"{_SNP}authorkeydigest": ("author_key_digest", _as_is),
        f"{_SNP}familyId": ("family_id", _as_is),
        f"{_SNP}imageId": ("image_id", _as_is),
        f"{_SNP}reportdata": ("report_data", _as_is),
        f"{_SNP}reportid": ("report_id", _as_is),
        f"{_SNP}guestsvn": ("guest_svn", _as_is),
        f"{_SNP}vmpl": ("vmpl", _as_is),
        f"{_SNP}is-debuggable": ("debug_allowed", _as_is),
        f"{_SNP}migration-allowed": ("migrate_ma", _as_is),
        f"{_SNP}smt-allowed": ("smt_allowed", _as_is),
        **{claim: ("reported_tcb_decoded", itemgetter(name)) for name, claim in _TCB.items()},
    },
    "tdxvm": {
        f"{_TDX}mrtd": ("mr_td", _as_is),
        f"{_TDX}mrseam": ("mr_seam", _as_is),
        f"{_TDX}mrsignerseam": ("mrsigner_seam", _as_is),
        f"{_TDX}seam_attributes": ("seam_attributes", _as_is),
        f"{_TDX}mrconfigid": ("mr_config_id", _as_is),
        f"{_TDX}mrowner": ("mr_owner", _as_is),
        f"{_TDX}mrownerconfig": ("mr_owner_config", _as_is),
        f"{_TDX}report_data": ("report_data", _as_is),
        f"{_TDX}tee_tcb_svn": ("tee_tcb_svn", _as_is),
        f"{_TDX}xfam": ("xfam", _as_is),
        f"{_TDX}td_attributes": ("td_attributes", _as_is),
        f"{_TDX}td_attributes_debug": ("td_attributes", _attribute(0)),
        f"{_TDX}td_attributes_septve_disable": ("td_attributes", _attribute(28)),
        f"{_TDX}td_attributes_protection_keys": ("td_attributes", _attribute(30)),
        f"{_TDX}td_attributes_key_locker": ("td_attributes", _attribute(31)),
        f"{_TDX}td_attributes_perfmon": ("td_attributes", _attribute(63)),
        **{f"{_TDX}rtmr{n}": (f"rtmr{n}", _as_is) for n in range(4)},
        _STATUS: ("tcb_status", _as_is),
    },
    "pyenclave": {
        f"{_SGX}mrenclave": ("mrenclave", _as_is),
        f"{_SGX}mrsigner": ("mrsigner", _as_is),
        f"{_SGX}product-id": ("isv_prod_id", _as_is),
        f"{_SGX}svn": ("isv_svn", _as_is),
        f"{_SGX}is-debuggable": ("debug", _as_is),
        f"{_OURS}level": ("level", _as_is),
        f"{_OURS}tee": ("tee", _as_is),
        f"{_OURS}platform-svn": ("platform_svn", _as_is),
        f"{_OURS}jit": ("jit", _as_is),
    },
}


def azure_claims(claims: Mapping[str, Any], *, tee: Tee) -> dict[str, Scalar]:
    """
    Return the *claims* of a result under the names that Azure's tokens have.

    Args:
        claims: `AttestationResult.claims` of evidence of that TEE.
        tee: ``sgx``, ``sevsnpvm``, ``tdxvm`` or ``pyenclave``.
    """
    if tee not in TEES:
        raise ValueError(f"tee is one of {', '.join(TEES)}, not {tee!r}")
    found: dict[str, Scalar] = {_TYPE: tee}
    for name, (ours, say) in _CLAIMS[tee].items():
        if claims.get(ours) is None:
            continue
        value = say(claims[ours])
        if isinstance(value, str | int):
            found[name] = value
    return found
