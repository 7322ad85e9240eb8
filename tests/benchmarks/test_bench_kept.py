"""Kept runs: hostile files, and what a comparison says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyenclave.benchmarks import kept
from pyenclave.benchmarks.kept import Run
from pyenclave.errors import ArgumentError


def a_row(name: str = "seal_page", ratio: float = 3.0, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "value": 100.0,
        "unit": "ns",
        "peer": "cryptography",
        "peer_value": 100.0 * ratio,
        "ratio": ratio,
        **more,
    }


def a_file(*rows: Any, **more: Any) -> bytes:
    return json.dumps({"machine": {"cpu": "x"}, "results": list(rows), **more}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b'{"results": 1}',
        b'{"results": [1]}',
        b'{"results": [{}]}',
        b'{"results": [], "results": []}',
        b'{"results": [], "machine": []}',
        b'{"results": [], "when": 7}',
        b"[" * 100_000,
        b'{"results": [{"name": "a", "ratio": NaN}]}',
        b'{"results": [{"name": "a", "ratio": 1e999}]}',
        a_file(*([{"name": "a"}] * 1001)),
        a_file(a_row(), a_row()),
        a_file({"name": "a" * 2001}),
        a_file({"name": "a", "ratio": 2}),
        a_file(a_row(ratio=-1.0)),
        a_file({**a_row(), "ratio": 0}),
        a_file({**a_row(), "ratio": True}),
        a_file({**a_row(), "ratio": "3"}),
        a_file({**a_row(), "unit": None}),
        a_file(a_row(spread=[1.0])),
        a_file(a_row(ratio_spread=[2.0, 1.0])),
        a_file(a_row(ratio_spread=[1.0, {}])),
        a_file(a_row(absent="cryptography")),
        a_file(a_row(absent=[1])),
        a_file(a_row(bits=["seccomp"])),
        a_file(a_row(bits=None)),
        a_file(a_row(bits={"seccomp": "yes"})),
        a_file(a_row(bits={"seccomp": None})),
        a_file(a_row(bits={"seccomp": {}})),
        a_file(a_row(bits={"landlock_abi": 7.0})),
        a_file(a_row(bits={"landlock_abi": 0})),
        a_file(a_row(bits={"landlock_abi": -1})),
        a_file(a_row(bits={"landlock_abi": 1 << 31})),
        a_file(a_row(bits={"": True})),
        a_file(a_row(bits={"x" * 41: True})),
        a_file(a_row(bits={f"b{number}": True for number in range(65)})),
    ],
    ids=range(38),
)
def test_a_file_that_is_no_run_is_refused(data: bytes) -> None:
    with pytest.raises(ArgumentError):
        kept.read(data, "x.json")


def test_a_file_that_is_too_long_is_refused() -> None:
    with pytest.raises(ArgumentError, match="too large"):
        kept.read(b" " * (kept.MAX_SIZE + 1))


def test_what_was_written_is_read_again() -> None:
    rows = [
        a_row(spread=[99.0, 101.0], ratio_spread=[2.9, 3.1], cores="far", note="n", native=50.0),
        {"name": "b", "error": "OSError: x"},
        {"name": "c", "absent": ["fastapi"]},
    ]
    run = kept.read(a_file(*rows, when="2026-11-22T12:00Z", version="0.1.0", other=[1]))
    assert (list(run.results), run.when, run.version) == (rows, "2026-11-22T12:00Z", "0.1.0")
    assert not run.wide
    assert kept.read(a_file(machine={"kernels": {"gcm": "vaes512"}})).wide


def test_unknown_members_of_a_row_are_left_out() -> None:
    (row,) = kept.read(a_file(a_row(other={"seccomp": True}))).results
    assert row == a_row()


def test_the_protections_of_a_launch_are_read_again() -> None:
    for bits in ({}, {"seccomp": True, "mdwe": False, "landlock_abi": 7}):
        (row,) = kept.read(a_file(a_row("launch_zygote", bits=bits))).results
        assert row["bits"] == bits
        assert list(map(type, row["bits"].values())) == list(map(type, bits.values()))


def the_change(then: dict[str, Any], now: dict[str, Any]) -> kept.Change:
    (change,) = kept.compare(Run({}, [then]), Run({}, [now]))
    return change


def test_a_row_moved_if_its_rounds_lie_apart() -> None:
    before = a_row(ratio=3.0, ratio_spread=[2.8, 3.2])
    for ratio, quartiles, moved in (
        (4.0, [3.21, 4.5], True),
        (4.0, [3.2, 4.5], False),
        (2.0, [1.5, 2.79], True),
        (2.0, [1.5, 2.8], False),
    ):
        change = the_change(before, a_row(ratio=ratio, ratio_spread=quartiles))
        assert (change.factor, change.moved) == (ratio / 3.0, moved)


def test_without_a_spread_nothing_is_said_to_have_moved() -> None:
    assert the_change(a_row(ratio=3.0), a_row(ratio=30.0)).moved is None


def test_rows_of_one_run_only_are_told_too() -> None:
    then = Run({}, [a_row("gone"), a_row("failed")])
    now = Run({}, [a_row("new"), {"name": "failed", "error": "x"}])
    assert kept.compare(then, now) == [
        ("new", None, 3.0, None, None),
        ("failed", 3.0, None, None, None),
        ("gone", 3.0, None, None, None),
    ]
