"""Results: no truth value, verdicts that follow from checks, and secrets sent to the enclave."""

from __future__ import annotations

import json
import pickle

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.attestation.result import Check, Claims
from pyenclave.errors import AppraisalError, UnsealError
from pyenclave.formats.evidence import provision_info
from pyenclave.formats.sgx import Attributes, ReportBody


def result_of(issuer, *checks: Check) -> AttestationResult:
    return AttestationResult(kind="pyenclave", checks=checks, claims={}, at=issuer.AT)


def test_a_result_has_no_truth_value(issuer):
    result = issuer.appraise(issuer.evidence())
    for use in (bool, lambda value: value and 1, lambda value: not value):
        with pytest.raises(TypeError, match="accepted"):
            use(result)


def test_a_result_without_checks_refuses(issuer):
    empty = result_of(issuer)
    assert not any((empty.genuine, empty.accepted, empty.identified, empty.fresh))


def test_what_was_not_reached_refuses_and_what_was_not_asked_does_not(issuer):
    passed = Check(name="a", outcome="passed")
    assert result_of(issuer, passed, Check(name="b", outcome="skipped", asked=False)).genuine
    assert not result_of(issuer, passed, Check(name="b", outcome="skipped")).genuine
    assert not result_of(issuer, passed, Check(name="b", outcome="failed", asked=False)).genuine


def test_a_failed_policy_check_leaves_genuine_and_takes_accepted(issuer):
    checks = Check(name="a", outcome="passed"), Check(name="p", outcome="failed", part="policy")
    assert result_of(issuer, *checks).genuine
    assert not result_of(issuer, *checks).accepted


def test_a_measurement_that_matches_beside_a_signer_that_does_not_identifies_nobody(issuer):
    assert not issuer.appraise(issuer.evidence(body={"mrsigner": b"\x23" * 32})).identified


def test_json_has_the_documented_members(issuer):
    document = json.loads(json.dumps(issuer.appraise(issuer.evidence()).to_json()))
    verdicts = ["genuine", "accepted", "identified", "fresh"]
    assert list(document) == ["kind", *verdicts, "checks", "claims"]
    assert document["kind"] == "pyenclave"
    for check in document["checks"]:
        assert list(check) == ["name", "outcome", "expected", "found", "advice"]
        assert check["outcome"] in ("passed", "failed", "skipped")
    claims = document["claims"]
    assert claims["mrenclave"] == issuer.MRENCLAVE.hex()
    assert (claims["isv_prod_id"], claims["isv_svn"], claims["debug"]) == (7, 3, False)
    assert claims["bits"]["landlock"] == {"value": 7, "by": "inside"}
    assert (claims["level"], claims["tee"], claims["platform_svn"]) == ("embedded", "none", 2)


def test_unreadable_parts_leave_the_claims_of_the_others(issuer):
    result = issuer.appraise(issuer.evidence(record_bytes=b"junk"))
    assert "level" not in result.claims
    assert result.claims["mrenclave"] == issuer.MRENCLAVE.hex()
    json.dumps(result.to_json())


def _open(issuer, ciphertext: bytes, info: bytes = b"", **body: object) -> bytes:
    """What the enclave does: it knows its identity from the platform, not from the message."""
    fields = {
        "cpu_svn": (2).to_bytes(2, "little") + bytes(14),
        "attributes": Attributes(flags=5, xfrm=3),
        "mrenclave": issuer.MRENCLAVE,
        "mrsigner": issuer.MRSIGNER,
        "isv_prod_id": 7,
        "isv_svn": 3,
        "config_id": bytes.fromhex(issuer.appraise(issuer.evidence()).claims["config_id"]),
    }
    own = ReportBody(**(fields | body))
    context = provision_info(
        report_body=own.to_bytes(), runtime_key=issuer.runtime.public, info=info
    )
    return issuer.runtime.decrypt(ciphertext, info=context)


def test_only_the_attested_launch_opens_a_secret(issuer):
    result = issuer.appraise(issuer.evidence())
    assert _open(issuer, result.encrypt(b"model key")) == b"model key"
    assert _open(issuer, result.encrypt(bytearray(b"k"), info=b"ctx"), info=b"ctx") == b"k"
    with pytest.raises(UnsealError):
        _open(issuer, result.encrypt(b"k", info=b"ctx"), info=b"other")
    for other in ({"isv_svn": 2}, {"mrenclave": b"\x12" * 32}, {"config_id": bytes(64)}):
        with pytest.raises(UnsealError):
            _open(issuer, result.encrypt(b"k"), **other)


def test_a_secret_that_is_no_bytes_is_refused_by_its_type(issuer):
    result = issuer.appraise(issuer.evidence())
    for secret in ("text", 32, [1, 2]):
        with pytest.raises(TypeError, match="a secret is bytes"):
            result.encrypt(secret)


def test_two_encryptions_of_one_secret_differ(issuer):
    result = issuer.appraise(issuer.evidence())
    assert result.encrypt(b"model key") != result.encrypt(b"model key")


def test_no_secret_goes_to_evidence_that_is_refused_unidentified_or_stale(issuer):
    any_code = AppraisalPolicy.any_code(dangerous_allow_software=True)
    refused = issuer.appraise(issuer.evidence(), nonce=b"\x01" * 32)
    unidentified = issuer.appraise(issuer.evidence(), policy=any_code)
    stale = issuer.appraise(issuer.evidence(), freshness="not_checked")
    for result, what in ((refused, "accepted"), (unidentified, "identified"), (stale, "fresh")):
        with pytest.raises(AppraisalError, match=f"not {what}") as caught:
            result.encrypt(b"secret")
        assert caught.value.result is result
        # What to do: the refusal of "accepted" has it check by check.
        assert what == "accepted" or caught.value.advice
    with pytest.raises(AppraisalError, match="not accepted"):
        refused.encrypt(b"x", dangerous_allow_unidentified=True, dangerous_allow_stale=True)
    with pytest.raises(AppraisalError, match="not fresh"):
        stale.encrypt(b"x", dangerous_allow_unidentified=True)
    assert _open(issuer, unidentified.encrypt(b"x", dangerous_allow_unidentified=True)) == b"x"
    assert _open(issuer, stale.encrypt(b"x", dangerous_allow_stale=True)) == b"x"


def test_att_34_raw_evidence_takes_no_secret(issuer):
    evidence = issuer.evidence(raw=True, body={"report_data": b"\x05" * 64})
    result = issuer.appraise(evidence, freshness="not_checked")
    assert result.accepted
    with pytest.raises(AppraisalError, match="no runtime key"):
        result.encrypt(b"secret", dangerous_allow_stale=True)


def test_a_bound_runtime_key_that_is_no_key_is_refused(issuer):
    evidence = issuer.evidence(runtime_key=b"\xff" * 1216)
    result = issuer.appraise(evidence)
    assert result.accepted
    with pytest.raises(ValueError, match=r"(?i)key"):
        result.encrypt(b"secret")


def test_claims_are_told_once_and_only_when_they_are_looked_at():
    told = []

    def tell():
        told.append(1)
        return {"debug": False}

    claims = Claims(tell)
    assert not told
    assert claims == {"debug": False}
    assert dict(claims) == {"debug": False}
    assert len(claims) == len(told) == 1
    assert repr(claims) == "{'debug': False}"
    copied = pickle.loads(pickle.dumps(claims))
    assert copied == {"debug": False}
    assert told == [1]
