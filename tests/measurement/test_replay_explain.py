"""Why a register differs: a change of one event is found and named, and nothing is made up."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from pyenclave.errors import MeasurementError
from pyenclave.measurement import replay_explain
from pyenclave.measurement.replay import replay
from pyenclave.measurement.replay_explain import Expected, check, explain, read_expected

if TYPE_CHECKING:
    from pathlib import Path

Row = tuple[int, int, bytes]

GLOBAL = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")


def variable(name: str, content: bytes) -> bytes:
    head = GLOBAL + struct.pack("<QQ", len(name), len(content))
    return head + name.encode("utf-16-le") + content


def log(rows: list[Row], *, locality: int | None = None) -> bytes:
    data = b""
    if locality is not None:
        rows = [(0, 3, b"StartupLocality\0" + bytes([locality])), *rows]
    for index, event_type, content in rows:
        data += struct.pack("<II", index, event_type) + hashlib.sha1(content).digest()
        data += struct.pack("<I", len(content)) + content
    return data


ROWS: list[Row] = [
    (0, 8, b"version"),
    (7, 0x80000001, variable("SecureBoot", b"\1")),
    (7, 0x80000001, variable("PK", b"key")),
    (4, 4, bytes(4)),
    (7, 4, bytes(4)),
    (7, 0x800000E0, variable("db", b"x" * 9)),
]


def cause_of(expected_rows: list[Row], index: int, **options: Any) -> replay_explain.Cause:
    """Explain ROWS where another machine measured *expected_rows*."""
    wanted = replay(log(expected_rows, **options)).value("sha1", index)
    return explain(replay(log(ROWS)), Expected("sha1", index, wanted))


def test_a_register_that_is_as_expected_has_no_cause() -> None:
    result = replay(log(ROWS))
    expected = [Expected("sha1", index, result.value("sha1", index)) for index in range(24)]
    assert check(result, expected) == []
    with pytest.raises(MeasurementError, match="has the expected value"):
        explain(result, expected[0])


def test_events_added_later_are_named_from_the_first_on() -> None:
    found = cause_of(ROWS[:3], 7)
    assert (found.kind, found.event, found.register) == ("later", 4, "pcr7")
    assert "EV_SEPARATOR" in found.text
    assert "1 later" in found.text
    assert cause_of(ROWS[:1], 7).event == 1


@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_event_that_was_not_measured_is_named(number: int) -> None:
    found = cause_of(ROWS[:number] + ROWS[number + 1 :], 7)
    assert (found.kind, found.event) == ("left out", number)


def test_an_event_that_was_measured_twice_is_named() -> None:
    found = cause_of([*ROWS[:3], ROWS[2], *ROWS[3:]], 7)
    assert (found.kind, found.event) == ("twice", 2)


def test_two_events_in_another_order_are_named() -> None:
    found = cause_of([ROWS[0], ROWS[2], ROWS[1], *ROWS[3:]], 7)
    assert (found.kind, found.event) == ("exchanged", 1)


def test_secure_boot_in_another_state_is_named() -> None:
    changed: list[Row] = [ROWS[0], (7, 0x80000001, variable("SecureBoot", b"\0")), *ROWS[2:]]
    found = cause_of(changed, 7)
    assert (found.kind, found.event) == ("other content", 1)
    assert "the variable was 0, here it is 1" in found.text


def test_another_separator_and_an_empty_variable_are_named() -> None:
    changed: list[Row] = [*ROWS[:4], (7, 4, b"\xff" * 4), ROWS[5]]
    assert cause_of(changed, 7).event == 4
    empty: list[Row] = [*ROWS[:2], (7, 0x80000001, variable("PK", b"")), *ROWS[3:]]
    found = cause_of(empty, 7)
    assert (found.event, "the variable was empty" in found.text) == (2, True)


def test_another_start_of_pcr_0_is_named() -> None:
    found = cause_of(ROWS, 0, locality=3)
    assert (found.kind, found.event) == ("start", None)
    assert "locality 3" in found.text


def test_what_a_single_change_does_not_explain_is_unknown() -> None:
    changed: list[Row] = [*ROWS[:5], (7, 0x800000E0, b"something else")]
    found = cause_of(changed, 7)
    assert (found.kind, found.event) == ("unknown", None)


def test_what_the_log_does_not_cover_is_said() -> None:
    result = replay(log(ROWS))
    for expected in (
        Expected("sha256", 7, bytes(32)),
        Expected("sha1", 9, b"\1" * 20),
        Expected("sha1", 7, bytes(32)),
    ):
        found = explain(result, expected)
        assert (found.kind, found.event) == ("not covered", None)


def test_a_log_of_many_events_is_explained_in_bounded_time() -> None:
    rows: list[Row] = [(7, 8, number.to_bytes(4, "little")) for number in range(3000)]
    result = replay(log(rows))
    assert explain(result, Expected("sha1", 7, b"x" * 20)).kind == "unknown"
    prefix = replay(log(rows[:2999])).value("sha1", 7)
    assert explain(result, Expected("sha1", 7, prefix)).event == 2999


# ---- expected values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "none"),
        ({"kind": "tpm-pcr", "event_count": 4}, "none"),
        ({"pcrs": {"sha1": "00"}}, "no object"),
        ({"pcrs": {"sha1": {"0": "zz"}}}, "malformed"),
        ({"pcrs": {"sha1": {"0": 5}}}, "malformed"),
        ({"pcrs": {"sha1": {"x": "00" * 20}}}, "malformed"),
        ({"pcrs": {"sha1": {"-1": "00" * 20}}}, "malformed"),
        ({"pcr0": "00" * 19}, "malformed"),
        ({"pcr100": "00" * 20}, "malformed"),
        ({"rtmr0": "00" * 48}, "one of a TPM"),
    ],
)
def test_malformed_expected_values_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(MeasurementError, match=match):
        read_expected(values, ccel=False)


def test_expected_values_are_read_in_every_form() -> None:
    a, b, c = bytes(20).hex(), bytes(32).hex(), bytes(48).hex()
    assert read_expected({"pcr7": a, "pcrs": {"sha256": {"1": b}}}, ccel=False) == [
        Expected("sha1", 7, bytes(20)),
        Expected("sha256", 1, bytes(32)),
    ]
    assert read_expected({"sha256": {"3": b}}, ccel=False) == [Expected("sha256", 3, bytes(32))]
    assert read_expected({"rtmr2": c, "mrtd": c}, ccel=True) == [Expected("sha384", 3, bytes(48))]


def test_the_expected_values_of_the_vectors_hold_and_one_bit_does_not(vectors: Path) -> None:
    for path in sorted((vectors / "measurement").glob("t[dp]*-*/case.json")):
        case = json.loads(path.read_text())
        role = next((r for r in ("ccel", "event_log", "event_log_json") if r in case["files"]), "")
        if not role:
            continue
        result = replay((path.parent / case["files"][role]["path"]).read_bytes())
        expected = read_expected(case["expect"], ccel=result.ccel)
        assert check(result, expected) == [], path
        one = expected[0]
        wrong = Expected(one.bank, one.index, bytes([one.value[0] ^ 1]) + one.value[1:])
        (cause,) = check(result, [wrong])
        assert (cause.kind, cause.event) == ("unknown", None)
