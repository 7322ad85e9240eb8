"""docs/benchmarks.md describes every row, and only rows that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyenclave.benchmarks import goals, kept, registry
from pyenclave.benchmarks.plot import svg

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/benchmarks.md").read_text("utf-8")
PARTS = ("Measures", "Limit", "Does not say", "Made by")


def sections() -> dict[str, dict[str, str]]:
    """Return the parts of each row's section."""
    found: dict[str, dict[str, str]] = {}
    for head, body in re.findall(r"^### (.*)\n((?:(?!#).*\n)*)", PAGE, re.MULTILINE):
        parts = dict(re.findall(r"^- \*\*([\w ]+)\*\*: ((?:.+\n)(?:  .+\n)*)", body, re.MULTILINE))
        for name in re.findall(r"`(\w+)`", head):
            assert name not in found, f"{name} has two sections"
            found[name] = parts
    return found


SECTIONS = sections()


def test_every_row_is_described_and_nothing_else() -> None:
    assert sorted(SECTIONS) == sorted(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_a_row_has_its_limit_what_it_does_not_say_and_its_file(name: str) -> None:
    parts = SECTIONS[name]
    assert tuple(parts) == PARTS, name
    assert all(len(text) > 10 for text in parts.values())
    (path,) = re.findall(r"`([^`]+)`", parts["Made by"])
    assert path == registry.source(name)
    assert (ROOT / path).is_file()
    assert f"def {name}(" in (ROOT / path).read_text("utf-8")


def test_every_way_that_has_a_goal_is_described() -> None:
    for name in goals.GOALS:
        row, slash, way = name.partition("/")
        if slash:
            told = SECTIONS[row]["Measures"]
            for word in way.split("/"):
                assert word in told, f"{name} is not described"


def test_the_picture_is_that_of_the_run_beside_it() -> None:
    run = kept.read((ROOT / "docs/benchmarks.json").read_bytes(), "docs/benchmarks.json")
    assert (ROOT / "docs/benchmarks.svg").read_text("utf-8") == svg(run)
    assert {row["name"].partition("/")[0] for row in run.results} <= set(registry.names())
    assert run.when
    assert run.machine["cpu"]
