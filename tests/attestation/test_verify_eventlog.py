"""A TCG log by itself: readable, replayed, never genuine."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime

import pytest
from issuer_eventlog import SHA1, SHA3, SHA256, SHA384, log, registers

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.errors import EvidenceFormatError

AT = datetime(2026, 7, 1, tzinfo=UTC)
EVENTS = ((0, b"crtm"), (7, b"secure boot"), (0, b"firmware"), (9, b"initrd"))


def judge(data: bytes, **options: object) -> AttestationResult:
    options = {"policy": AppraisalPolicy.permissive(), "at": AT} | options
    return appraise(data, freshness="not_checked", **options)  # type: ignore[arg-type]


def test_a_log_is_replayed_in_every_bank_and_never_genuine():
    result = judge(log(*EVENTS, banks=(SHA1, SHA256, SHA384)))
    assert result.kind == "tcg-eventlog"
    assert result.refused_by == ("log.quote",)
    assert not result.genuine
    assert not result.accepted
    replayed = result.claims["replayed_pcrs"]
    for bank, name in ((SHA1, "sha1"), (SHA256, "sha256"), (SHA384, "sha384")):
        wanted = {str(i): v.hex() for i, v in sorted(registers(bank, *EVENTS).items())}
        assert replayed[name] == wanted
    assert result.claims["events"] == len(EVENTS)


def test_the_vector_replays_to_what_is_expected(vectors):
    seen = 0
    for path in sorted((vectors / "attestation").glob("*/case.json")):
        case = json.loads(path.read_text("utf-8"))
        if case["kind"] != "tcg-eventlog":
            continue
        seen += 1
        result = judge((path.parent / case["files"]["eventlog"]).read_bytes())
        assert not result.genuine
        for name in ("events", "replayed_pcrs"):
            assert result.claims[name] == case["expect"][name]
    assert seen


def test_a_bank_whose_hash_is_unknown_here_is_not_replayed():
    result = judge(log(*EVENTS, banks=(SHA3,)))
    assert result.refused_by == ("log.banks", "log.quote")
    assert result.claims["replayed_pcrs"] == {}
    both = judge(log(*EVENTS, banks=(SHA3, SHA256)))
    assert both.refused_by == ("log.quote",)


@pytest.mark.parametrize("padding", [bytes(1000), b"\xff" * 1000])
def test_an_area_may_be_larger_than_its_log(padding):
    result = judge(log(*EVENTS) + padding)
    assert result.refused_by == ("log.quote",)
    assert result.claims["log_bytes_total"] - result.claims["log_bytes_used"] == 1000


def test_att_22_cut_and_lying_logs_are_refused_by_their_format():
    data = log(*EVENTS)
    for size in range(70, len(data), 7):
        result = judge(data[:size])
        assert not result.accepted
        assert set(result.refused_by) & {"log.format", "log.quote"}
    for position in range(32, len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x80
        with contextlib.suppress(EvidenceFormatError):  # no longer a log at all
            assert not judge(bytes(changed)).genuine
