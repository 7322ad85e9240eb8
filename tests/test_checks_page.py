"""docs/checks.md has every registered check, and no other."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import kinds

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/checks.md").read_text("utf-8")


@pytest.fixture(scope="module")
def tool() -> Any:
    """The script that writes the page."""
    spec = spec_from_file_location("docs_tools_checks", ROOT / "docs/tools/checks.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told() -> dict[str, set[str]]:
    """Return the checks of each kind, as a reader of the page finds them."""
    found: dict[str, set[str]] = {}
    taken: list[tuple[str, str, str, set[str]]] = []
    for section in PAGE.split("\n## ")[1:]:
        line = re.search(r"^Kinds: (.*)\.$", section, re.MULTILINE)
        assert line
        group = re.findall(r"`([\w-]+)`", line[1])
        found |= {kind: set() for kind in group}
        for row in re.findall(r"^\| `.*\|$", section, re.MULTILINE):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert all(cells), row
            listed = re.findall(r"`([\w-]+)`", cells[2]) if len(group) > 1 else []
            for kind in listed or group:
                found[kind].add(cells[0].strip("`"))
        for kind, other, prefix, without in re.findall(
            r"^`([\w-]+)` also has the checks of `([\w-]+)` as `([\w-]+)\.…`, without: (.*)\.$",
            section,
            re.MULTILINE,
        ):
            taken.append((kind, other, prefix, set(re.findall(r"`([\w.]+)`", without))))
    for kind, other, prefix, without in taken:
        found[kind] |= {f"{prefix}.{name}" for name in found[other] - without}
    return found


def test_the_page_has_every_check_and_no_other() -> None:
    found = told()
    assert set(found) == set(kinds.available())
    for kind, names in found.items():
        registered = set(kinds.load(kind).checks.functions)
        assert names == registered, f"{kind}: {sorted(names ^ registered)}"


def test_the_page_is_the_one_that_the_script_writes(tool: Any) -> None:
    assert tool.page() == PAGE, "run python docs/tools/checks.py"


def test_every_cure_is_of_some_check(tool: Any) -> None:
    """One that no check uses is left over, or hidden by one before it."""
    used = {tool.cure_of(kind, name) for kind in kinds.available() for name in tool.own(kind)}
    assert set(tool.CURES) == used


def test_the_check_that_appraisal_adds_is_on_the_page() -> None:
    source = (ROOT / "pyenclave/attestation/appraise.py").read_text("utf-8")
    for name in re.findall(r'Check\(\s*name="([\w.]+)"', source):
        assert f"`{name}`" in PAGE, name
