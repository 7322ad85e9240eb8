"""The log of a TD beside its quote: it replays to what the hardware holds, or is refused."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from issuer_eventlog import SHA384, log
from negatives_tdx_ccel import EVENTS, ccel, judge, negatives, quote

from pyenclave.attestation import AppraisalPolicy, appraise


def test_a_log_that_replays_to_its_quote_is_accepted_and_fresh():
    result = judge(ccel(*EVENTS), quote(*EVENTS))
    assert result.kind == "tdx-ccel"
    assert result.refused_by == ()
    assert result.accepted
    assert result.fresh
    assert set(result.claims["matches_quote"].values()) == {True}
    assert result.claims["events"] == len(EVENTS)


def test_code_is_identified_by_the_quote_inside():
    policy = AppraisalPolicy(mrtd=bytes(range(48)))
    assert judge(ccel(*EVENTS), quote(*EVENTS), policy=policy).identified
    other = AppraisalPolicy(mrtd=bytes(range(1, 49)))
    result = judge(ccel(*EVENTS), quote(*EVENTS), policy=other)
    assert result.refused_by == ("tdx.code.mrtd",)
    assert not result.identified


@pytest.mark.parametrize("case", list(negatives()), ids=lambda case: case[0])
def test_one_thing_wrong_is_refused_by_that_check(case):
    check, run = case
    result = run()
    assert check in result.refused_by
    assert not result.accepted


def test_the_register_of_the_running_system_may_be_unknown_to_the_log_but_not_contradict_it():
    boot = tuple(item for item in EVENTS if item[0] != 4)
    result = judge(ccel(*boot), quote(*EVENTS))
    assert result.accepted
    rtmr3 = next(check for check in result.checks if check.name == "log.rtmr3")
    assert (rtmr3.outcome, rtmr3.asked) == ("skipped", False)
    assert judge(ccel(*EVENTS), quote(*boot)).refused_by == ("log.rtmr3",)


def test_a_forged_quote_beside_a_log_is_not_genuine():
    forged = bytearray(quote(*EVENTS))
    forged[48 + 100] ^= 1
    result = judge(ccel(*EVENTS), bytes(forged))
    assert not result.genuine
    assert "tdx.quote.signature" in result.refused_by
    result = judge(ccel(*EVENTS), b"junk")
    assert "tdx.quote.format" in result.refused_by
    assert not result.genuine


def test_every_changed_digest_of_the_log_is_refused():
    data = ccel(*EVENTS)
    begin = len(log(banks=(SHA384,)))
    beside = quote(*EVENTS)
    for position in range(begin + 14, begin + 14 + 48):
        changed = bytearray(data)
        changed[position] ^= 1
        assert "log.rtmr0" in judge(bytes(changed), beside).refused_by


def test_the_vectors_have_the_expected_verdict_and_fields(vectors):
    seen = 0
    for path in sorted((vectors / "attestation").glob("*/case.json")):
        case = json.loads(path.read_text("utf-8"))
        if case["kind"] != "tdx-ccel":
            continue
        seen += 1
        result = appraise(
            (path.parent / case["files"]["ccel"]).read_bytes(),
            policy=AppraisalPolicy.permissive(),
            freshness="not_checked",
            endorsements=path.parent,
            at=datetime.fromisoformat(case["verify_at"]),
        )
        assert result.genuine is (case["expect"]["verdict"] == "valid")
        for name in set(case["expect"]) - {"verdict"}:
            assert result.claims[name] == case["expect"][name], name
    assert seen
