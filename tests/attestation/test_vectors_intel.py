"""Every published case of SGX, TDX and their collateral comes out exactly as its file says."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.attestation.cache import clear

KINDS = ("sgx-quote", "tdx-quote", "sgx-collateral")
EVIDENCE = ("quote", "qe_identity", "tcb_info")
# Not claims: what the case is about, and what somebody else's verifier said.
NOT_CLAIMED = {"verdict", "strict_policy", "reason", "second_opinion_dcap_qvl"}


def _folder() -> Path:
    import os

    root = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
    return Path(os.environ.get("PYENCLAVE_VECTORS", root)) / "attestation"


def _cases() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in sorted(_folder().glob("*/case.json")):
        case = json.loads(path.read_text())
        if case["kind"] in KINDS:
            found.append((path.parent.name, case))
    return found


def judged(
    folder: Path, case: dict[str, Any], policy: AppraisalPolicy | None = None
) -> AttestationResult:
    role = next(role for role in EVIDENCE if role in case["files"])
    evidence = (folder / case["files"][role]).read_bytes()
    beside = {
        name: (folder / name).read_bytes() for other, name in case["files"].items() if other != role
    }
    at = case["verify_at"]
    return appraise(
        evidence,
        policy=policy or AppraisalPolicy.strict(),
        freshness="not_checked",
        endorsements=beside,
        at=datetime.fromisoformat(at) if at else datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_there_are_as_many_cases_as_were_published(vectors: Path) -> None:
    assert len(_cases()) >= 40
    assert {case["kind"] for _, case in _cases()} == set(KINDS)


@pytest.mark.parametrize(("name", "case"), _cases(), ids=[name for name, _ in _cases()])
def test_a_published_case_comes_out_as_expected(
    vectors: Path, name: str, case: dict[str, Any]
) -> None:
    folder = vectors / "attestation" / name
    clear()
    # The second time with everything known already: nothing may depend on that.
    for result in (judged(folder, case), judged(folder, case)):
        expect = case["expect"]
        assert result.kind == case["kind"]
        assert result.genuine is (expect["verdict"] == "valid"), result.refused_by
        assert not result.identified
        assert not result.fresh
        if "strict_policy" in expect:
            assert result.accepted is (expect["strict_policy"] == "accept"), result.refused_by
        for field in sorted(set(expect) - NOT_CLAIMED):
            assert result.claims.get(field, "absent") == expect[field], field


@pytest.mark.parametrize(("name", "case"), _cases(), ids=[name for name, _ in _cases()])
def test_the_permissive_policy_takes_whatever_is_genuine(
    vectors: Path, name: str, case: dict[str, Any]
) -> None:
    result = judged(vectors / "attestation" / name, case, AppraisalPolicy.permissive())
    assert result.accepted is result.genuine is (case["expect"]["verdict"] == "valid")
