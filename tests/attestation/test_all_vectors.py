"""
Every case of the vectors, of whatever kind: verdict, strict policy and every expected field.

The tests of the single kinds look closer; this one sees to it that no case and no field is
forgotten, also when cases are added.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise, kinds

# What each case says about itself, for people, or what somebody else's verifier said.
PROSE = {"note", "reason", "pcrs_stated_upstream", "second_opinion_dcap_qvl"}
VERDICTS = {"verdict", "strict_policy"}
# Role of the file that is the evidence, by kind; the others are endorsements by their names.
EVIDENCE = {
    "sgx-quote": ("quote",),
    "tdx-quote": ("quote",),
    "sgx-collateral": ("tcb_info", "qe_identity"),
    "sev-snp-report": ("report",),
    "sev-snp-vek-cert": ("vek",),
    "azure-hcl-snp": ("hcl_report",),
    "azure-hcl-tdx": ("hcl_report",),
    "nitro-document": ("document",),
    "maa-jwt": ("token",),
    "maa-jwks": ("jwks",),
    "maa-cert": ("cert", "certificate"),
    "google-confidential-space-jwt": ("token",),
    "attestation-result-jwt": ("token",),
    "x5c-jwt": ("token",),
    "ra-tls-cert": ("cert", "certificate"),
    "tdx-ccel": ("ccel",),
    "tcg-eventlog": ("eventlog",),
    "arm-cca-token": ("token",),
    "nvidia-gpu-report": ("report",),
    "akv-release-policy": ("policy", "config"),
    "maa-claims": ("claims",),
}


def _root() -> Path:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
    return Path(os.environ.get("PYENCLAVE_VECTORS", default)) / "attestation"


def _cases() -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(_root().glob("*/case.json"))
    }


CASES = _cases()


def judged(name: str, policy: AppraisalPolicy) -> AttestationResult:
    """Judge as ``pyenclave verify EVIDENCE --endorsements FOLDER --at TIME`` does."""
    case = CASES[name]
    files = case["files"]
    role = next(role for role in EVIDENCE.get(case["kind"], tuple(files)) if role in files)
    at = case["verify_at"]
    return appraise(
        (_root() / name / files[role]).read_bytes(),
        policy=policy,
        freshness="not_checked",
        endorsements=_root() / name,
        at=datetime.fromisoformat(at) if at else datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_the_kinds_of_the_vectors_are_those_that_are_verified(vectors: Path) -> None:
    assert len(CASES) >= 91
    assert {case["kind"] for case in CASES.values()} <= set(EVIDENCE)
    assert set(EVIDENCE) <= set(kinds.KINDS)


@pytest.mark.parametrize("name", CASES)
def test_a_case_comes_out_as_its_file_says(name: str) -> None:
    case = CASES[name]
    expect = case["expect"]
    result = judged(name, AppraisalPolicy.strict())
    assert result.kind == case["kind"]
    valid = expect["verdict"] == "valid"
    if expect["verdict"] != "parsed":
        assert result.genuine is valid, result.refused_by
    assert result.claims
    if "strict_policy" in expect:
        # Strict acceptance needs validity (FORMAT.md); one case says accept of a negative.
        wanted = valid and expect["strict_policy"] == "accept"
        assert result.accepted is wanted, [c.name for c in result.checks if not c.holds]
    for field, value in expect.items():
        if field not in VERDICTS | PROSE:
            assert result.claims.get(field, "absent") == value, field
    assert not result.identified
    assert not result.fresh
    json.dumps(result.to_json())
    for check in result.checks:
        if check.outcome == "failed":
            assert check.expected or check.found, check.name


@pytest.mark.parametrize("name", CASES)
def test_permissive_accepts_what_is_genuine_and_nothing_else(name: str) -> None:
    result = judged(name, AppraisalPolicy.permissive())
    assert result.genuine is judged(name, AppraisalPolicy.strict()).genuine
    assert result.accepted is result.genuine, [c.name for c in result.checks if not c.holds]
