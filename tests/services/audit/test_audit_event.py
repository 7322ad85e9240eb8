"""Nothing that a stranger sends keeps a decision out of the log, or makes it unreadable."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.formats.audit_log import MAX_BODY, Row, fields_of
from pyenclave.services.audit import Event
from pyenclave.services.audit.event import body_of


def body(event: Event) -> dict[str, Any]:
    encoded = body_of(event, at="2026-07-01T00:00:00.000000Z", reference="0" * 16)
    assert len(encoded) <= MAX_BODY
    assert b"\n" not in encoded
    return fields_of(Row(1, encoded, b""))


def test_the_form_is_canonical() -> None:
    event = Event("a/b", "refused", caller="é", claims={"z": 1, "a": [True, None, 1.5]}, found=0)
    encoded = body_of(event, at="2026-07-01T00:00:00.000000Z", reference="0123456789abcdef")
    assert encoded.decode() == (
        '{"action":"a/b","at":"2026-07-01T00:00:00.000000Z","caller":"é",'
        '"claims":{"a":[true,null,1.5],"z":1},"decision":"refused","found":0,'
        '"reference":"0123456789abcdef"}'
    )
    plain = json.dumps(
        json.loads(encoded), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert plain.encode() == encoded


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (2**64, str(2**64)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (b"\x00\xff", "00ff"),
        ("\ud800", "\\ud800"),
        ({1: 2}, {"1": 2}),
        ({"\udfff": "x"}, {"\\udfff": "x"}),
        ({"b", "a"}, ["a", "b"]),
        ((1, 2), [1, 2]),
        (dt.date(2026, 7, 1), "2026-07-01"),
        ("x" * 5_000, "x" * 4_096 + "…"),
    ],
)
def test_what_is_no_json_becomes_text(value: object, written: object) -> None:
    assert body(Event("a", "failed", found=value))["found"] == written
    assert body(Event("a", "failed", details={"x": value}))["details"] == {"x": written}


def test_what_has_no_end_is_cut() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "…" in json.dumps(body(Event("a", "failed", found=endless)), ensure_ascii=False)
    assert body(Event("a", "failed", found=10**100_000))["found"].startswith("0x")
    assert len(body(Event("a", "failed", found=list(range(3_000))))["found"]) == 2_001


def test_what_is_large_becomes_its_digest() -> None:
    found = body(Event("a", "refused", claims={str(n): "x" * 4_000 for n in range(100)}, rule="r"))
    assert set(found["claims"]) == {"omitted_bytes", "sha256"}
    assert found["rule"] == "r"
    found = body(Event("a" * 100_000, "refused", caller="\ud800" * 100_000, resource=7))  # type: ignore[arg-type]
    assert len(found["action"]) == 257
    assert found["resource"] == "7"


JSON: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=30,
)


@settings(max_examples=40)
@given(JSON, st.text(st.characters()), st.text(st.characters()))
def test_any_event_gives_a_row_that_is_read(value: object, caller: str, resource: str) -> None:
    event = Event(
        "a", "refused", caller=caller, resource=resource, found=value, details={"x": value}
    )
    assert body(event)["action"] == "a"
