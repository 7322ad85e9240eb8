"""A demand of the policy that a kind of evidence cannot answer refuses; it never falls away."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import issuer_amd as amd
import negatives_azure_hcl_snp as azure_snp
import negatives_azure_hcl_tdx as azure_tdx
import pytest
from issuer_azure import PCR0, Flaw
from issuer_intel import NOW, machine
from issuer_nitro import AT as NITRO_AT
from issuer_nitro import ISSUER
from issuer_nitro import PCR0 as IMAGE
from issuer_token import ear_claims, judge, token

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise, kinds
from pyenclave.attestation.demands import ANSWERS, unanswered
from pyenclave.attestation.policy import NAMES_CODE
from pyenclave.testing.amd import AmdChip

CODE = bytes(range(48))  # launch digest and MRTD of the synthetic machines
ENCLAVE = bytes(range(32))
# Fields that weaken or only choose among what is there: they demand nothing that is not answered.
CHOICES = {
    "accepted_advisories",
    "accept_any_code",
    "allow_debug",
    "allow_masked_chip_id",
    "allow_migration_agent",
    "allow_unknown_td_features",
    "dangerous_allow_software",
    "ear_tiers",
    "require_collateral",
    "tcb_statuses",
}
# A value that demands something, for each field that can.
DEMANDS: dict[str, Any] = {
    "product_id": 0,
    "min_security_version": 0,
    "config_id": bytes(64),
    "isv_ext_prod_id": bytes(16),
    "isv_family_id": bytes(16),
    "min_config_svn": 0,
    "xfrm": b"\1" * 8,
    "required_attributes": ("kss",),
    "forbidden_attributes": ("debug",),
    "ppid": b"\1" * 16,
    "fmspc": b"\1" * 6,
    "rtmrs": {0: bytes(48)},
    "mr_seam": b"\1" * 48,
    "mr_config_id": bytes(48),
    "mr_owner": bytes(48),
    "mr_owner_config": bytes(48),
    "mr_service_td": bytes(48),
    "xfam": b"\1" * 8,
    "sept_ve_disable": False,
    "min_tcb_evaluation_number": 0,
    "host_data": bytes(32),
    "family_id": bytes(16),
    "image_id": bytes(16),
    "chip_id": b"\1" * 64,
    "product_lines": ("milan",),
    "max_vmpl": 3,
    "min_guest_svn": 0,
    "min_tcb": {"snp": 0},
    "required_policy_bits": ("smt",),
    "forbidden_policy_bits": ("debug",),
    "required_platform_bits": ("smt_en",),
    "rems": {0: bytes(32)},
    "rpv": bytes(64),
    "implementation_id": b"\1" * 32,
    "issuers": ("https://verifier.example",),
    "audience": "me",
    "max_age": 3600,
    "min_level": "service",
    "required_bits": ("seccomp",),
    "min_platform_svn": 1,
    "allow_jit": False,
}
SNP = {name for name, (_, families) in ANSWERS.items() if "snp" in families}
TOKEN = {name for name, (_, families) in ANSWERS.items() if "token" in families}


def of_sgx(policy: AppraisalPolicy) -> AttestationResult:
    return appraise(
        machine().enclave_quote(),
        policy=policy,
        freshness="not_checked",
        endorsements=machine().endorsements(),
        roots=[machine().root],
        at=NOW,
    )


def of_snp(policy: AppraisalPolicy) -> AttestationResult:
    chip = AmdChip("milan")
    return appraise(
        chip.report(),
        policy=policy,
        freshness="not_checked",
        endorsements=chip.endorsements(),
        roots=[chip.root],
        at=amd.AT,
    )


def of_nitro(policy: AppraisalPolicy) -> AttestationResult:
    return appraise(
        ISSUER.document(),
        policy=policy,
        freshness="not_checked",
        roots=[ISSUER.root()],
        at=NITRO_AT,
    )


def of_token(policy: AppraisalPolicy) -> AttestationResult:
    return judge(token(ear_claims()), policy=policy)


KINDS = {"sgx": of_sgx, "snp": of_snp, "nitro": of_nitro, "token": of_token}
# What each kind answers besides identities.
ANSWERED = {
    "sgx": {name for name, (_, families) in ANSWERS.items() if "sgx" in families},
    "snp": SNP,
    "nitro": {"max_age", "pcrs"},
    # Digests and numbers that a token does not tell are refused by their own checks.
    "token": TOKEN
    | {name for name in ANSWERS if name in DEMANDS}
    - {
        "sept_ve_disable",
        "min_tcb_evaluation_number",
        "min_tcb",
        "required_attributes",
        "forbidden_attributes",
        "product_lines",
        "required_policy_bits",
        "forbidden_policy_bits",
        "required_platform_bits",
        "min_level",
        "required_bits",
        "min_platform_svn",
        "allow_jit",
    },
}


def test_every_field_of_a_policy_is_a_demand_or_a_choice():
    named = {item.name for item in fields(AppraisalPolicy)}
    assert set(ANSWERS) | CHOICES == named
    assert not set(ANSWERS) & CHOICES
    assert set(ANSWERS) == set(DEMANDS) | set(NAMES_CODE)


def test_every_demand_is_answered_by_a_check_that_there_is():
    names = {check for kind in kinds.available() for check in kinds.load(kind).checks.functions}
    for checks, _ in ANSWERS.values():
        assert all(check in names for check in checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", DEMANDS)
def test_att_31_a_demand_without_an_answer_refuses(kind: str, field: str):
    result = KINDS[kind](AppraisalPolicy.any_code(**{field: DEMANDS[field]}))
    refused = "policy.answered" in result.refused_by
    assert refused is (field not in ANSWERED[kind])
    assert result.genuine
    if refused:
        assert not result.accepted
        (check,) = (item for item in result.checks if item.name == "policy.answered")
        assert field in (check.expected or "")
        assert check.advice


def test_a_policy_without_demands_adds_no_check():
    for run in KINDS.values():
        assert "policy.answered" not in {c.name for c in run(AppraisalPolicy.strict()).checks}


def test_a_policy_may_speak_of_several_kinds():
    policy = AppraisalPolicy(
        mrenclave=ENCLAVE,
        product_id=0,
        launch_digest=CODE,
        max_vmpl=0,
        pcrs={0: IMAGE},
    )
    assert of_sgx(policy).accepted
    assert of_nitro(policy).accepted


def test_att_31_pcrs_beside_firmware_are_not_met_by_the_bare_report():
    """Stripping the vTPM from an Azure VM's evidence must not strip the demand for its PCRs."""
    policy = AppraisalPolicy(launch_digest=CODE, mrtd=CODE, pcrs={0: PCR0})
    assert of_snp(policy).refused_by == ("policy.answered",)
    quote = appraise(
        machine().td_quote(),
        policy=policy,
        freshness="not_checked",
        endorsements=machine().endorsements("tdx"),
        roots=[machine().root],
        at=NOW,
    )
    assert quote.refused_by == ("policy.answered",)
    for judged in (azure_snp.judged, azure_tdx.judged):
        result = judged(Flaw(""), policy=policy)
        assert result.accepted
        assert result.identified


@pytest.mark.parametrize("judged", [azure_snp.judged, azure_tdx.judged])
def test_att_27_registers_without_the_firmware_below_identify_nothing(judged: Any):
    """Firmware of one's own brings a vTPM that quotes whatever one wants."""
    result = judged(Flaw(""), policy=AppraisalPolicy(pcrs={0: PCR0}))
    assert result.genuine
    assert result.refused_by == ("code.kind",)
    assert not result.identified


def test_the_other_families_demands_are_open_only_with_their_identity():
    sgx = tuple(kinds.load("sgx-quote").checks.functions)
    own = {"mrenclave": ENCLAVE, "required_bits": ("seccomp",)}
    assert unanswered(AppraisalPolicy(**own), "sgx-quote", sgx) == ("required_bits",)
    two = AppraisalPolicy(mrenclave=ENCLAVE, host_data=bytes(32))
    assert unanswered(two, "sgx-quote", sgx) == ("host_data",)
    named = AppraisalPolicy(mrenclave=ENCLAVE, host_data=bytes(32), launch_digest=CODE)
    assert unanswered(named, "sgx-quote", sgx) == ()
