"""Comparing with reference values: one of several, within its window, all named registers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pyenclave.attestation import AppraisalPolicy
from pyenclave.attestation.case import CaseBase, judge_reference, judge_registers
from pyenclave.attestation.references import Reference

AT = datetime(2026, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
A, B, C = b"\xaa" * 48, b"\xbb" * 48, b"\xcc" * 48


def case(**fields: object) -> CaseBase:
    return CaseBase(data=b"", policy=AppraisalPolicy(**fields), at=AT)


def test_a_field_that_is_not_named_is_not_asked_for():
    verdict = judge_reference(case(mrtd=A), "launch_digest", B)
    assert (verdict.outcome, verdict.asked, verdict.found) == ("skipped", False, B)
    verdict = judge_registers(case(mrtd=A), "rtmrs", {0: A})
    assert (verdict.outcome, verdict.asked) == ("skipped", False)


@pytest.mark.parametrize(
    ("wanted", "outcome"),
    [
        (A, "passed"),
        ([B, A], "passed"),
        (B, "failed"),
        ([B, C], "failed"),
        (Reference(A, AT, AT), "passed"),
        (Reference(A, AT + DAY), "failed"),
        (Reference(A, None, AT - DAY), "failed"),
        ([Reference(A, None, AT - DAY), Reference(A, AT - DAY)], "passed"),
        ([Reference(A, None, AT - DAY), B], "failed"),
        ([Reference(B), Reference(A, AT + DAY)], "failed"),
    ],
)
def test_one_value_must_match_within_its_window(wanted, outcome):
    verdict = judge_reference(case(mrtd=wanted), "mrtd", A)
    assert verdict.outcome == outcome
    if outcome == "failed":
        assert verdict.expected
        assert A.hex() in str(verdict.found) or verdict.found == A


def test_a_value_out_of_its_window_says_so():
    verdict = judge_reference(case(mrtd=Reference(A, None, AT - DAY)), "mrtd", A)
    assert "another time" in verdict.advice


def test_prefixes_and_extensions_do_not_match():
    for found in (A[:-1], A + b"\0", b""):
        assert judge_reference(case(mrtd=A), "mrtd", found).outcome == "failed"


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        ({0: A, 1: B, 2: C}, "passed"),
        ({0: A, 1: C}, "passed"),
        ({0: A, 1: A}, "failed"),
        ({0: A}, "failed"),
        ({1: B}, "failed"),
        ({}, "failed"),
    ],
)
def test_every_named_register_must_match(found, outcome):
    verdict = judge_registers(case(pcrs={0: A, 1: [B, C]}), "pcrs", found)
    assert verdict.outcome == outcome


def test_registers_have_windows_too_and_all_that_differ_are_named():
    late = Reference(A, AT + DAY)
    assert judge_registers(case(mrtd=A, rtmrs={0: late}), "rtmrs", {0: A}).outcome == "failed"
    verdict = judge_registers(case(mrtd=A, rtmrs={0: B, 1: A, 3: B}), "rtmrs", {0: A, 1: A, 2: A})
    assert "0, 3" in verdict.advice
    assert verdict.expected.startswith("0: bbbb")


def test_an_unknown_field_is_a_slip_that_shows():
    with pytest.raises(KeyError):
        judge_reference(case(mrtd=A), "mr_td", A)
    with pytest.raises(KeyError):
        judge_registers(case(mrtd=A), "mrtd", {})
