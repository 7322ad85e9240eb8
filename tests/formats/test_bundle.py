"""Bundles of endorsements."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import CollateralError
from pyenclave.formats.bundle import Bundle

MOMENT = datetime(2026, 7, 1, 12, tzinfo=UTC)
BUNDLE = Bundle({"tcb-info.json": b"{}", "pck-crl.der": b"\x30\x00"}, MOMENT, "a service")


@given(st.dictionaries(st.sampled_from(["a.der", "b-c.json", "d.pem"]), st.binary(max_size=99)))
def test_what_was_written_is_read(files: dict[str, bytes]) -> None:
    bundle = Bundle(files, MOMENT, "x")
    assert Bundle.from_bytes(bundle.to_bytes()) == bundle


@pytest.mark.parametrize(
    "change",
    [
        {"pyenclave_bundle": 2},
        {"pyenclave_bundle": True},
        {"pyenclave_bundle": "1"},
        {"extra": 1},
        {"files": []},
        {"files": {"../x.der": ""}},
        {"files": {"x.der": 1}},
        {"files": {"x.der": "!"}},
        {"files": {"x.der": "AA=\n="}},
        {"files": {f"x{n}.der": "" for n in range(65)}},
        {"fetched_at": "2026-07-01T12:00:00"},
        {"fetched_at": 1},
        {"source": None},
    ],
)
def test_what_is_no_bundle_is_refused(change: dict[str, Any]) -> None:
    value = json.loads(BUNDLE.to_bytes()) | change
    with pytest.raises(CollateralError):
        Bundle.from_bytes(json.dumps(value).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", BUNDLE.to_bytes()[:-5]])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(CollateralError):
        Bundle.from_bytes(data)


def test_a_bundle_that_could_not_be_read_is_not_written() -> None:
    with pytest.raises(ValueError, match="zone"):
        Bundle({}, datetime(2026, 7, 1)).to_bytes()
    with pytest.raises(ValueError, match="name"):
        Bundle({"../x": b""}, MOMENT).to_bytes()
