"""What is remembered of checks changes no outcome."""

from __future__ import annotations

import operator
import pickle
import random
from datetime import UTC, datetime, timedelta

import pytest

from pyenclave.attestation import AppraisalPolicy, appraise, cache, kinds, memo
from pyenclave.attestation.checks import PASSED, failed
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.testing.certificates import Key
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
POLICY = AppraisalPolicy.strict()


def said(quote, files, roots, at):
    result = appraise(
        quote,
        policy=POLICY,
        freshness="not_checked",
        endorsements=Endorsements.of(files),
        roots=roots,
        at=at,
    )
    return result.checks, dict(result.claims), result.genuine, result.accepted


def test_remembered_and_fresh_outcomes_are_the_same_for_any_time_root_and_collateral():
    """The same random cases twice: with all that is remembered of the others, and each anew."""
    draw = random.Random(20260701)
    platforms = [IntelPlatform(NOW) for _ in range(3)]
    quotes, files = [], []
    for platform in platforms:
        quotes += [platform.enclave_quote(), platform.td_quote()]
        platform.key = Key.ec()
        platform.pck = platform.make_pck({})
        quotes.append(platform.enclave_quote())
        files += [dict(platform.endorsements()), dict(platform.endorsements("tdx"))]
    roots = [[platform.root] for platform in platforms] + [[], [p.root for p in platforms]]
    days = (0, 0, 0, 1, -1, 20, 29, 31, 40, -40, 400, -400, 5000, 12000)
    cases = []
    for _ in range(250):
        which = draw.randrange(3)
        given = dict(files[draw.choice((2 * which, 2 * which, 2 * which + 1, draw.randrange(6)))])
        if draw.random() < 0.2:
            del given[draw.choice(sorted(given))]
        if draw.random() < 0.2:
            name = draw.choice(sorted(given))
            given[name] = files[draw.randrange(6)].get(name, given[name])
        at = NOW + timedelta(days=draw.choice(days), seconds=draw.choice((0, 0, 1, -1, 43200)))
        pinned = roots[draw.choice((which, which, which, 4, draw.randrange(5)))]
        cases.append((quotes[3 * which + draw.randrange(3)], given, pinned, at))
    cases += draw.sample(cases, 100)
    cache.clear()
    warm = [said(*case) for case in cases]
    assert len(memo.MEMORY) > 5
    accepted = 0
    for case, before in zip(cases, warm, strict=True):
        cache.clear()
        assert said(*case) == before
        accepted += before[3]
    assert 20 < accepted < len(cases) - 20


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
def test_what_is_remembered_ends_to_the_second_when_the_collateral_does(tee):
    platform = IntelPlatform(NOW)
    quote = platform.enclave_quote() if tee == "sgx" else platform.td_quote()
    files = dict(platform.endorsements(tee))
    case = (quote, files, [platform.root])
    cache.clear()
    assert said(*case, NOW)[3]
    assert said(*case, NOW)[3]
    window = said(*case, NOW)[1]["valid_window"]
    for text, outside in zip(window, (-1, 1), strict=True):
        edge = datetime.fromisoformat(text)
        for _ in range(2):
            assert said(*case, edge)[3]
            assert not said(*case, edge + timedelta(seconds=outside))[2]
            assert not said(*case, edge + timedelta(microseconds=outside))[2]


def test_a_revoked_pck_is_refused_although_its_neighbour_was_accepted():
    platform = IntelPlatform(NOW)
    first = platform.enclave_quote()
    platform.pck = platform.make_pck({}, serial=0x77)
    second = platform.enclave_quote()
    files = dict(platform.endorsements(pck_crl=platform.pck_crl(revoked=(0x77,))))
    for _ in range(3):
        assert said(first, files, [platform.root], NOW)[3]
        checks, _, genuine, _ = said(second, files, [platform.root], NOW)
        assert not genuine
        assert [check.name for check in checks if check.outcome == "failed"] == ["revocation.pck"]


def test_a_check_that_is_exchanged_is_run_although_its_block_is_remembered(monkeypatch):
    platform = IntelPlatform(NOW)
    case = (platform.enclave_quote(), dict(platform.endorsements()), [platform.root], NOW)
    for _ in range(3):
        assert said(*case)[3]
    refused = failed(expected="one", found="another")
    functions = kinds.load("sgx-quote").checks.functions
    with monkeypatch.context() as patch:
        patch.setitem(functions, "tcb.fmspc", lambda _: refused)
        assert not said(*case)[2]
        patch.setitem(functions, "tcb.fmspc", lambda _: PASSED)
        assert said(*case)[2]
    assert said(*case)[3]


def test_the_table_of_checks_changes_only_where_it_is_noticed():
    functions = kinds.load("sgx-quote").checks.functions
    for change in (functions.clear, functions.popitem, lambda: functions.update({"x": None})):
        with pytest.raises(TypeError):
            change()


def test_claims_are_the_same_whenever_they_are_read():
    platform = IntelPlatform(NOW)
    result = appraise(
        platform.enclave_quote(), policy=POLICY, freshness="not_checked", roots=[platform.root]
    )
    again = pickle.loads(pickle.dumps(result))
    assert again == result
    assert again.claims == result.claims
    assert result.claims is result.claims
    assert result.claims["tee_type"] == "SGX"
    assert "tee_type" in repr(again)
    with pytest.raises(AttributeError):
        result.claim  # noqa: B018


@pytest.mark.parametrize("name", ["ge", "le", "gt", "lt"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_moment_notes_every_comparison(name, swapped):
    """Within what was noted, the comparison comes out as it did."""
    compare = getattr(operator, name)
    for offset in range(-2, 3):
        other = NOW + timedelta(seconds=offset)
        moment = memo.Moment.of(NOW)
        result = compare(other, moment) if swapped else compare(moment, other)
        assert result is (compare(other, NOW) if swapped else compare(NOW, other))
        noted = memo.remembered((), moment, {})
        if noted is None:
            continue
        assert noted.earliest == other or noted.latest == other
        for seconds in range(-4, 5):
            at = NOW + timedelta(seconds=seconds)
            if noted.holds_at(at):
                assert (compare(other, at) if swapped else compare(at, other)) is result


@pytest.mark.parametrize(
    "use",
    [
        lambda moment: moment == NOW,
        lambda moment: moment != NOW,
        lambda moment: NOW == moment,  # noqa: SIM300
        lambda moment: moment + timedelta(1),
        lambda moment: timedelta(1) + moment,
        lambda moment: moment - NOW,
        lambda moment: NOW - moment,
        lambda moment: moment.isoformat(),
        lambda moment: moment.year,
        lambda moment: moment.timestamp(),
        lambda moment: {moment: 1},
        lambda moment: f"{moment}",
        repr,
    ],
)
def test_a_moment_used_otherwise_is_not_remembered(use):
    moment = memo.Moment.of(NOW)
    assert memo.remembered((), moment, {}) is not None
    use(moment)
    assert memo.remembered((), moment, {}) is None


def test_memory_is_bounded_by_number_and_size():
    memory = memo.Memory(max_items=3, max_bytes=100)
    value = memo.Remembered((), None, None, {})
    for index in range(9):
        memory.keep((index, b"x"), value)
    assert len(memory) <= 3
    assert memory.find((0, b"x"), NOW) is None
    memory.clear()
    memory.keep(b"x" * 101, value)
    assert not len(memory)
    memory.keep(b"x" * 60, value)
    memory.keep(b"y" * 60, value)
    assert memory.find(b"x" * 60, NOW) is None
    assert memory.find(b"y" * 60, NOW) is value


def test_evidence_inside_evidence_comes_out_the_same_with_what_is_remembered():
    import negatives_tdx_ccel as issuer

    log = issuer.ccel(*issuer.EVENTS)
    good = issuer.quote(*issuer.EVENTS)
    others = [issuer.quote(*issuer.EVENTS, seam_attributes=bytes(7) + b"\1"), good[:700], None]
    times = [issuer.AT + timedelta(days=days) for days in (0, 1, 20, 400, -400)]
    cases = [(quote, at) for at in times for quote in (good, *others, good)]
    options = {"nonce": issuer.NONCE}

    def judged(quote, at):
        result = issuer.judge(log, quote, at=at, **options)
        return result.checks, dict(result.claims), result.accepted

    fresh = []
    for quote, at in cases:
        cache.clear()
        fresh.append(judged(quote, at))
    assert any(item[2] for item in fresh)
    assert not all(item[2] for item in fresh)
    cache.clear()
    assert [judged(*case) for case in cases] == fresh
    assert len(memo.MEMORY) >= 2  # the chain's and the collateral's checks
    assert [judged(*case) for case in reversed(cases)] == fresh[::-1]
