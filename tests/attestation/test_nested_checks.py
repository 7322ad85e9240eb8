"""Evidence inside evidence: the inner checks count, and what is not reached refuses."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.attestation.case import CaseBase, judge_nonce, judge_report_data
from pyenclave.attestation.checks import PASSED, NotReachedError, Registry, absent, failed
from pyenclave.attestation.result import Check
from pyenclave.errors import EvidenceFormatError

AT = datetime(2026, 7, 1, tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class Inner(CaseBase):
    pass


@dataclass(slots=True, kw_only=True)
class Outer(CaseBase):
    made: list[str]


def inner_registry() -> Registry[Inner]:
    registry: Registry[Inner] = Registry()

    @registry.evidence("quote.signature")
    def _signature(case: Inner) -> object:
        return PASSED if case.data == b"good" else failed(expected="good", found=case.data)

    @registry.policy("nonce")
    def _nonce(case: Inner) -> object:
        return failed(expected="never run", found="run")

    @registry.policy("code.launch_digest")
    def _code(case: Inner) -> object:
        return PASSED

    return registry


def run(data: bytes, inner: object, **options: object) -> tuple[Check, ...]:
    outer: Registry[Outer] = Registry()
    outer.evidence("outer")(lambda _: PASSED)
    outer.include("snp", inner_registry(), inner, **options)
    case = Outer(data=data, policy=AppraisalPolicy.strict(), at=AT, made=[])
    checks = outer.run(case)
    assert len(case.made) <= 1, "the inner case is made once"
    return checks


def make(case: Outer) -> Inner:
    case.made.append("x")
    return case.derive(Inner, case.data)


def outcomes(checks: tuple[Check, ...]) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


def test_inner_checks_run_under_a_prefix_without_freshness():
    assert outcomes(run(b"good", make)) == {
        "outer": "passed",
        "snp.quote.signature": "passed",
        "snp.code.launch_digest": "passed",
    }
    assert outcomes(run(b"bad", make))["snp.quote.signature"] == "failed"


def broken(case: Outer) -> Inner:
    raise EvidenceFormatError("no report")


def not_reached(case: Outer) -> Inner:
    raise NotReachedError("hcl.format")


def malformed(case: Outer) -> Inner:
    raise IndexError


@pytest.mark.parametrize("inner", [broken, not_reached, malformed, lambda case: None])
def test_an_inner_part_that_cannot_be_read_refuses(inner):
    checks = run(b"", inner)
    assert outcomes(checks)["snp.quote.signature"] == "skipped"
    result = AttestationResult(kind="x", checks=checks, claims={}, at=AT)
    assert not result.genuine
    assert not result.accepted


def test_an_optional_inner_part_that_is_not_there_leaves_no_checks():
    assert outcomes(run(b"", lambda case: None, optional=True)) == {"outer": "passed"}
    assert outcomes(run(b"", broken, optional=True))["snp.quote.signature"] == "skipped"


def test_a_nested_measurement_identifies():
    for name, identified in (
        ("snp.code.launch_digest", True),
        ("code.mrtd", True),
        ("code.product_id", False),
        ("code.rtmrs", False),
        ("barcode.mrtd", False),
        ("code.mrtd.x", False),
    ):
        checks = (
            Check(name="a", outcome="passed"),
            Check(name=name, outcome="passed", part="policy"),
        )
        assert AttestationResult(kind="x", checks=checks, claims={}, at=AT).identified is identified


def test_two_checks_of_one_name_and_unknown_exceptions_are_slips_that_show():
    outer: Registry[Outer] = Registry()
    outer.include("snp", inner_registry(), make)
    with pytest.raises(ValueError, match="twice"):
        outer.include("snp", inner_registry(), make)
    with pytest.raises(ValueError, match="no inner check"):
        outer.include("tdx", inner_registry(), make, without=("debgu",))


def case_with(**values: object) -> CaseBase:
    return CaseBase(data=b"", policy=AppraisalPolicy.strict(), at=AT, **values)


def test_a_nonce_is_the_padded_report_data_or_what_the_caller_says():
    nonce, data = b"n" * 32, b"n" * 32 + bytes(32)
    assert judge_nonce(case_with(), data).outcome == "skipped"
    assert judge_nonce(case_with(nonce=nonce), data).outcome == "passed"
    assert judge_nonce(case_with(nonce=nonce + b"\0" * 9), data).outcome == "passed"
    for wrong in (b"m" * 32, nonce[:-1], nonce + b"n", b"n" * 65):
        assert judge_nonce(case_with(nonce=wrong), data).outcome == "failed"
    hashed = case_with(nonce=nonce, report_data=b"h" * 64)
    assert judge_nonce(hashed, b"h" * 64).outcome == "passed"
    assert judge_nonce(hashed, data).outcome == "failed"


def test_report_data_is_compared_whole():
    assert judge_report_data(case_with(), bytes(64)).outcome == "skipped"
    for position in range(64):
        wrong = bytearray(64)
        wrong[position] = 1
        verdict = judge_report_data(case_with(report_data=bytes(wrong)), bytes(64))
        assert verdict.outcome == "failed"


def test_an_absent_endorsement_is_a_failure_with_advice():
    verdict = absent("a VCEK in vek.der", advice="fetch it from AMD")
    assert (verdict.outcome, verdict.found, verdict.advice) == (
        "failed",
        "absent",
        "fetch it from AMD",
    )
