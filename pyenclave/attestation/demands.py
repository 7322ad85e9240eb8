"""
What a policy demands that evidence of this kind has no answer to: such a demand refuses.

A policy may name the identities of several kinds, and what it says of one kind does not concern the
others. But a demand that belongs to no other kind that it names would silently fall away, and with
it the protection that its author thought of: PCRs behind the launch digest of an Azure VM are not
met by the bare hardware report, and an audience is not met by a quote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from pyenclave.attestation.policy import NAMES_CODE, AppraisalPolicy

__all__ = ["ANSWERS", "families", "unanswered"]

# Field of the policy → the checks that answer it (behind any prefix of evidence inside evidence),
# and the families of evidence that it speaks of.
ANSWERS: Final[Mapping[str, tuple[tuple[str, ...], frozenset[str]]]] = MappingProxyType(
    {
        field: (tuple(checks.split()), frozenset(families.split()))
        for field, checks, families in (
            ("mrenclave", "code.mrenclave", "sgx own"),
            ("mrsigner", "code.mrsigner", "sgx own"),
            ("product_id", "code.product_id", "sgx own"),
            ("min_security_version", "code.security_version code.min_security_version", "sgx own"),
            ("config_id", "code.config_id", "sgx"),
            ("isv_ext_prod_id", "code.isv_ext_prod_id", "sgx"),
            ("isv_family_id", "code.isv_family_id", "sgx"),
            ("min_config_svn", "code.config_svn code.min_config_svn", "sgx"),
            ("xfrm", "enclave.xfrm code.xfrm", "sgx"),
            ("required_attributes", "enclave.attributes", "sgx"),
            ("forbidden_attributes", "enclave.attributes", "sgx"),
            ("ppid", "platform.ppid code.ppid", "sgx tdx"),
            ("fmspc", "platform.fmspc code.fmspc", "sgx tdx"),
            ("mrtd", "code.mrtd", "tdx"),
            ("rtmrs", "code.rtmrs", "tdx"),
            ("mr_seam", "platform.mr_seam code.mr_seam", "tdx"),
            ("mr_config_id", "code.mr_config_id", "tdx"),
            ("mr_owner", "code.mr_owner", "tdx"),
            ("mr_owner_config", "code.mr_owner_config", "tdx"),
            ("mr_service_td", "code.mr_service_td", "tdx"),
            ("xfam", "td.xfam code.xfam", "tdx"),
            ("sept_ve_disable", "td.sept_ve_disable", "tdx"),
            ("min_tcb_evaluation_number", "tcb.evaluation", "sgx tdx"),
            ("launch_digest", "code.launch_digest", "snp"),
            ("host_data", "guest.host_data code.host_data", "snp"),
            ("id_key_digest", "code.id_key_digest", "snp"),
            ("author_key_digest", "code.author_key_digest", "snp"),
            ("family_id", "guest.family_id code.family_id", "snp"),
            ("image_id", "guest.image_id code.image_id", "snp"),
            ("chip_id", "platform.chip_id code.chip_id", "snp"),
            ("product_lines", "platform.line", "snp"),
            ("max_vmpl", "guest.vmpl hcl.vmpl code.max_vmpl", "snp"),
            ("min_guest_svn", "guest.svn code.min_guest_svn", "snp"),
            ("min_tcb", "tcb.minimum", "snp"),
            ("required_policy_bits", "guest.policy", "snp"),
            ("forbidden_policy_bits", "guest.policy", "snp"),
            ("required_platform_bits", "platform.bits", "snp"),
            ("rim", "code.rim", "cca"),
            ("rems", "code.rems", "cca"),
            ("rpv", "code.rpv", "cca"),
            ("implementation_id", "platform.implementation code.implementation_id", "cca"),
            ("gpu_measurements", "code.gpu_measurements", "gpu"),
            ("pcrs", "code.pcrs", "nitro vtpm"),
            ("issuers", "issuer", "token"),
            ("audience", "audience", "token"),
            ("claims", "code.claims", "token"),
            ("max_age", "token.age document.age", "token nitro"),
            ("min_level", "platform.level", "own"),
            ("required_bits", "platform.bits", "own"),
            ("min_platform_svn", "platform.svn", "own"),
            ("allow_jit", "enclave.jit", "own"),
        )
    }
)
# What these fields are if they demand nothing; for the others that is None or an empty list.
_NOTHING: Final[Mapping[str, object]] = {
    "min_level": "embedded",
    "min_platform_svn": 0,
    "allow_jit": True,
}
# Identities of virtual machines, which may have a vTPM: with them, PCRs are those of that vTPM.
_MACHINES: Final = ("mrtd", "launch_digest", "id_key_digest", "author_key_digest")


def _demanded(policy: AppraisalPolicy, field: str) -> bool:
    value = getattr(policy, field)
    if field in _NOTHING:
        return bool(value != _NOTHING[field])
    return value is not None and value != ()


def families(policy: AppraisalPolicy) -> frozenset[str]:
    """Return the families of evidence that *policy* speaks of: all, if any code will do."""
    if policy.accept_any_code:
        return frozenset[str]().union(*(spoken for _, spoken in ANSWERS.values()))
    named = (field for field in NAMES_CODE if _demanded(policy, field))
    return frozenset[str]().union(*(ANSWERS[field][1] for field in named))


# Kinds have few sets of checks, so this is worked out a few times in a process.
@lru_cache(maxsize=64)
def _answered(kind: str, names: tuple[str, ...]) -> frozenset[str]:
    """Return the fields that the checks *names* of *kind* answer."""
    found = set()
    for field, (checks, families) in ANSWERS.items():
        # Two families have a check of this name, about different bits.
        if "platform.bits" in checks and (kind == "pyenclave") is not ("own" in families):
            continue
        if any(f".{name}".endswith(f".{check}") for name in names for check in checks):
            found.add(field)
    return frozenset(found)


def unanswered(policy: AppraisalPolicy, kind: str, names: Iterable[str]) -> tuple[str, ...]:
    """
    Return the fields of *policy* that evidence of *kind* cannot answer, and has to.

    Args:
        policy: The policy.
        kind: The kind of the evidence.
        names: The checks that were run.
    """
    demanded = [field for field in ANSWERS if _demanded(policy, field)]
    if not demanded:
        return ()
    answered = _answered(kind, tuple(names)).intersection(demanded)
    # An identity of another family says that the policy speaks of that family too.
    others = {field for field in NAMES_CODE if field in demanded and field not in answered}
    if answered.intersection(_MACHINES):
        others.discard("pcrs")
    elsewhere = frozenset[str]().union(*(ANSWERS[field][1] for field in others))
    return tuple(
        field for field in demanded if field not in answered and not ANSWERS[field][1] & elsewhere
    )
