"""Our results as EARs: what was refused is never affirming, and we read what we write."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.attestation.ear import sign_ear, to_ear, trustworthiness
from pyenclave.attestation.result import Check
from pyenclave.formats.ear import appraisals_of, tier_of
from pyenclave.formats.jwk import public_members

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
KEY = ec.derive_private_key(11, ec.SECP256R1())
NONCE = bytes(range(16))


def check(name: str, outcome: str = "passed", part: str = "evidence") -> Check:
    return Check(name=name, outcome=outcome, part=part)  # type: ignore[arg-type]


def result(*checks: Check, kind: str = "sev-snp-report", **claims: Any) -> AttestationResult:
    return AttestationResult(
        kind=kind, checks=(check("report.signature"), *checks), claims=claims, at=AT
    )


CODE = check("code.launch_digest", part="policy")
GOOD = (CODE, check("nonce", part="policy"))


@pytest.mark.parametrize(
    ("given", "vector", "status"),
    [
        (
            result(*GOOD),
            {"hardware": 2, "runtime-opaque": 2, "executables": 2, "configuration": 2},
            "affirming",
        ),
        (
            result(check("debug", "failed", "policy")),
            {"hardware": 96, "runtime-opaque": 96, "configuration": 96},
            "contraindicated",
        ),
        # Debug that a policy allows is still visible memory.
        (
            result(*GOOD, debug=True),
            {"hardware": 96, "runtime-opaque": 96, "executables": 2, "configuration": 96},
            "contraindicated",
        ),
        (
            result(check("code.launch_digest", "failed", "policy")),
            {"hardware": 2, "runtime-opaque": 2, "executables": 33, "configuration": 32},
            "warning",
        ),
        (
            result(CODE, kind="tdx-quote", tcb_status="OutOfDate"),
            {"hardware": 32, "runtime-opaque": 2, "executables": 2, "configuration": 2},
            "warning",
        ),
        (
            result(CODE, kind="tdx-quote", tcb_status="Revoked"),
            {"hardware": 96, "runtime-opaque": 2, "executables": 2, "configuration": 2},
            "contraindicated",
        ),
        (
            result(check("tcb.level", "failed", "policy"), CODE),
            {"hardware": 32, "runtime-opaque": 2, "executables": 2, "configuration": 32},
            "warning",
        ),
        (
            result(check("code.mrenclave", part="policy"), kind="pyenclave", tee="none"),
            {"hardware": 97, "runtime-opaque": 96, "executables": 2, "configuration": 2},
            "contraindicated",
        ),
        (
            result(check("chain.root", "failed")),
            {"hardware": 99},
            "contraindicated",
        ),
    ],
)
def test_each_outcome_has_its_tier(
    given: AttestationResult, vector: dict[str, int], status: str
) -> None:
    assert trustworthiness(given) == vector
    for form in ("dotted", "underscored"):
        claims = to_ear(given, form=form)  # type: ignore[arg-type]
        (appraisal,) = appraisals_of(claims).values()
        assert appraisal.status == status
        assert appraisal.vector == vector
    assert (status == "affirming") is all(tier_of(v) == "affirming" for v in vector.values())


def test_a_result_without_checks_is_not_affirming() -> None:
    nothing = AttestationResult(kind="nitro-document", checks=(), claims={}, at=AT)
    assert trustworthiness(nothing) == {"hardware": 99}


def test_only_a_nonce_that_was_checked_goes_in() -> None:
    assert to_ear(result(*GOOD), nonce=NONCE)["eat_nonce"]
    for given, nonce in ((result(CODE), NONCE), (result(*GOOD), b"short"), (result(*GOOD), b"")):
        with pytest.raises(ValueError, match="nonce"):
            to_ear(given, nonce=nonce)
    with pytest.raises(ValueError, match="lifetime"):
        to_ear(result(*GOOD), lifetime=0)
    with pytest.raises(ValueError, match="form"):
        to_ear(result(*GOOD), form="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["dotted", "underscored"])
def test_what_is_signed_is_accepted_with_the_verifiers_key(form: Any) -> None:
    text = sign_ear(result(*GOOD), key=KEY, kid="us", form=form, nonce=NONCE, policy_id="p")
    keys = {"keys": [{"kid": "us", **public_members(KEY.public_key())}]}
    options: dict[str, Any] = {
        "policy": AppraisalPolicy.any_code(),
        "nonce": NONCE,
        "endorsements": {"jwks.json": json.dumps(keys).encode()},
    }
    judged = appraise(text.encode(), at=AT, **options)
    assert judged.kind == "attestation-result-jwt"
    assert judged.accepted, judged.refused_by
    assert judged.fresh
    late = appraise(text.encode(), at=AT + timedelta(hours=1), **options)
    assert "token.times" in late.refused_by
    refused = sign_ear(result(check("chain.root", "failed")), key=KEY, kid="us", form=form)
    assert "ear.status" in appraise(refused.encode(), at=AT, **options).refused_by


@pytest.mark.parametrize("kind", ["sgx-collateral", "sev-snp-vek-cert", "maa-jwks", "tcg-eventlog"])
def test_a_document_of_a_vendor_makes_no_machine_trustworthy(kind: str) -> None:
    """Anybody can show a chip's certificate: as an attestation result it says nothing."""
    vendors = AttestationResult(kind=kind, checks=(check("chain.root"),), claims={}, at=AT)
    assert vendors.accepted
    assert trustworthiness(vendors) == {}
    (appraisal,) = appraisals_of(to_ear(vendors)).values()
    assert appraisal.status == "none"


def test_debug_and_levels_of_evidence_inside_evidence_count() -> None:
    """The claims of a TD stand below those of its event log."""
    inner = result(*GOOD, kind="tdx-ccel", quote={"debug": True, "tcb_status": "UpToDate"})
    assert trustworthiness(inner)["runtime-opaque"] == 96
    old = result(*GOOD, kind="tdx-ccel", quote={"debug": False, "tcb_status": "OutOfDate"})
    assert trustworthiness(old)["hardware"] == 32
    good = result(*GOOD, kind="tdx-ccel", quote={"debug": False, "tcb_status": "UpToDate"})
    assert trustworthiness(good)["hardware"] == 2
