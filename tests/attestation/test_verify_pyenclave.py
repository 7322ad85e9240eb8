"""Each check of our own evidence: a case that only it refuses, and the mutation check (C.3)."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from negatives_pyenclave import CASES, STRUCTURAL, judged, padded_binding

from pyenclave.attestation import AppraisalPolicy, cache, ecdsa
from pyenclave.attestation.checks import PASSED
from pyenclave.attestation.verify_pyenclave import CHECKS
from pyenclave.formats.dcap import Quote


def name(case: Any) -> str:
    return case.check


@pytest.mark.parametrize("case", CASES, ids=name)
def test_evidence_with_one_thing_wrong_is_refused_by_that_check_alone(case, issuer):
    result = judged(case, issuer)
    assert not result.accepted
    assert result.refused_by == (case.check,)
    failed = next(check for check in result.checks if check.name == case.check)
    assert failed.expected or failed.found
    in_evidence = CHECKS.parts[case.check] == "evidence"
    assert result.genuine is not in_evidence
    if in_evidence:
        assert not result.identified
        assert not result.fresh


@pytest.mark.parametrize("case", [c for c in CASES if c.check not in STRUCTURAL], ids=name)
def test_with_that_check_forced_to_pass_the_evidence_would_be_accepted(case, issuer, monkeypatch):
    """The mutation check of the catalogue, C.3: no other check stands in for the removed one."""
    monkeypatch.setitem(CHECKS.functions, case.check, lambda _: PASSED)
    assert judged(case, issuer).accepted


def test_every_registered_check_has_a_case():
    assert {case.check for case in CASES} == set(CHECKS.functions)


@pytest.mark.parametrize("check", sorted(STRUCTURAL))
def test_a_structural_check_that_is_removed_still_ends_in_a_refusal(check, issuer, monkeypatch):
    monkeypatch.setitem(CHECKS.functions, check, lambda _: PASSED)
    for case in CASES:
        if case.check == check:
            result = judged(case, issuer)
            assert not result.genuine
            assert not result.accepted


@pytest.mark.parametrize("check", list(CHECKS.functions))
def test_att_35_a_check_that_breaks_refuses(check, issuer, monkeypatch):
    def broken(_: object) -> None:
        raise ValueError("out of luck")

    monkeypatch.setitem(CHECKS.functions, check, broken)
    result = issuer.appraise(issuer.evidence())
    assert not result.accepted
    assert result.refused_by == (check,)
    assert "out of luck" in next(c for c in result.checks if c.name == check).found


@pytest.mark.parametrize("kind", [MemoryError, RecursionError, RuntimeError, KeyboardInterrupt])
def test_att_35_what_is_no_fault_of_the_evidence_leaves_without_a_result(kind, issuer, monkeypatch):
    def broken(_: object) -> None:
        raise kind

    monkeypatch.setitem(CHECKS.functions, "quote.signature", broken)
    with pytest.raises(kind):
        issuer.appraise(issuer.evidence())


def test_genuine_evidence_of_the_wanted_enclave_passes_every_check(issuer):
    result = issuer.appraise(issuer.evidence())
    skipped = [check.name for check in result.checks if check.outcome != "passed"]
    assert skipped == ["report_data", "user_data", "platform.bits"]
    assert result.genuine
    assert result.accepted
    assert result.identified
    assert result.fresh


def test_optional_comparisons_pass_when_they_match(issuer):
    result = issuer.appraise(
        issuer.evidence(),
        user_data=b"user data",
        report_data=bytes.fromhex(issuer.appraise(issuer.evidence()).claims["report_data"]),
        policy=issuer.policy(
            required_bits=("seccomp", "landlock"), min_platform_svn=2, min_level="embedded"
        ),
    )
    assert all(check.outcome == "passed" for check in result.checks)


def test_a_signer_with_product_and_version_identifies_without_a_measurement(issuer):
    policy = issuer.policy(mrenclave=None)
    result = issuer.appraise(issuer.evidence(body={"mrenclave": b"\x77" * 32}), policy=policy)
    assert result.accepted
    assert result.identified


def test_any_code_is_accepted_but_never_identified(issuer):
    policy = AppraisalPolicy.any_code(dangerous_allow_software=True)
    result = issuer.appraise(issuer.evidence(), policy=policy)
    assert result.accepted
    assert not result.identified


def test_without_a_nonce_evidence_is_accepted_but_never_fresh(issuer):
    result = issuer.appraise(issuer.evidence(), freshness="not_checked")
    assert result.accepted
    assert not result.fresh


def test_raw_evidence_is_judged_by_its_report_data(issuer):
    evidence = issuer.evidence(raw=True, body={"report_data": b"\x05" * 64})
    result = issuer.appraise(evidence, freshness="not_checked", report_data=b"\x05" * 64)
    assert result.accepted
    assert not result.fresh
    assert result.claims["raw"] is True
    other = issuer.appraise(evidence, freshness="not_checked", report_data=b"\x06" * 64)
    assert other.refused_by == ("report_data",)


def test_att_12_every_byte_of_report_data_counts(issuer):
    right = bytes.fromhex(issuer.appraise(issuer.evidence()).claims["report_data"])
    for position in range(64):
        wrong = bytearray(right)
        wrong[position] ^= 1
        result = issuer.appraise(issuer.evidence(body={"report_data": bytes(wrong)}))
        assert result.refused_by == ("report_data.binding",)


def test_att_01_strict_and_default_policies_refuse_debug(issuer):
    evidence = issuer.evidence(debug=True)
    for policy in (AppraisalPolicy.strict(), issuer.policy()):
        assert "enclave.debug" in issuer.appraise(evidence, policy=policy).refused_by
    assert issuer.appraise(evidence, policy=AppraisalPolicy.permissive()).accepted


def test_strict_refuses_software_and_permissive_takes_what_is_genuine(issuer):
    strict = issuer.appraise(issuer.evidence(), policy=AppraisalPolicy.strict())
    assert strict.genuine
    assert strict.refused_by == ("platform.software",)
    permissive = issuer.appraise(issuer.evidence(), policy=AppraisalPolicy.permissive())
    assert permissive.accepted
    assert not permissive.identified


def test_att_11_another_key_auth_data_or_padding_is_not_bound(issuer):
    real = issuer.raw_public(issuer.key("attestation"))
    digest = hashlib.sha256(real + b"auth data of the quoting enclave").digest()
    wrong = [
        {
            "attestation_public": issuer.raw_public(issuer.key("forger")),
            "qe": {"report_data": digest + bytes(32)},
        },
        {"quote": {"qe_auth_data": b"other auth data"}},
        {"quote": {"qe_auth_data": b""}},
        padded_binding(issuer),
    ]
    for changes in wrong:
        assert "qe.binding" in issuer.appraise(issuer.evidence(**changes)).refused_by


def test_att_26_product_is_equal_and_security_version_has_a_floor(issuer):
    for product, accepted in ((6, False), (7, True), (8, False)):
        result = issuer.appraise(issuer.evidence(body={"isv_prod_id": product}))
        assert result.accepted is accepted
    for version, accepted in ((0, False), (2, False), (3, True), (4, True), (65535, True)):
        result = issuer.appraise(issuer.evidence(body={"isv_svn": version}))
        assert result.accepted is accepted


@pytest.fixture(params=["native", "library"])
def verifier(request, monkeypatch):
    monkeypatch.setenv(ecdsa.SWITCH, "library" if request.param == "library" else "")
    ecdsa.forget()
    yield request.param
    monkeypatch.undo()
    ecdsa.forget()


@pytest.mark.parametrize("known", [False, True])
def test_core_and_library_judge_each_signature_alike(verifier, known, issuer):
    """Also when the chain is known already, from evidence of the same platform."""
    cache.clear()
    assert not known or issuer.appraise(issuer.evidence()).accepted
    for field in ("signature", "qe_report_signature"):
        good = getattr(Quote.from_bytes(issuer.parts().quote), field)
        for place in (0, 31, 32, 63):
            bad = bytearray(good)
            bad[place] ^= 1
            result = issuer.appraise(issuer.evidence(quote={field: bytes(bad)}))
            assert result.refused_by == (
                "quote.signature" if field == "signature" else "qe.signature",
            )
    record = bytearray(issuer.parts().record)
    record[-1] ^= 1
    result = issuer.appraise(issuer.evidence(record_bytes=bytes(record)))
    assert result.refused_by == ("record.signature",)
    assert issuer.appraise(issuer.evidence()).accepted


def test_a_known_chain_is_judged_by_other_roots_and_times_anew(issuer):
    evidence = issuer.evidence()
    assert issuer.appraise(evidence).accepted
    stranger = issuer.chain(root={"key": issuer.key("stranger"), "signer": issuer.key("stranger")})
    assert issuer.appraise(evidence, roots=[stranger[-1]]).refused_by == ("chain.root",)
    late = issuer.appraise(evidence, at=issuer.END.replace(year=issuer.END.year + 1))
    assert "chain.validity" in late.refused_by
    # What was worked out for these certificates is not told of others, one byte off.
    for place in ("leaf", "intermediate", "root"):
        forged = issuer.chain(**{place: {"signer": issuer.key("forger")}})
        assert not issuer.appraise(issuer.evidence(chain=forged)).genuine
    assert issuer.appraise(evidence).accepted
