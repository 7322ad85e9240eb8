"""From csrc/README.md any file and any function of the core is found."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PAGE = (CSRC / "README.md").read_text("utf-8")
HEADERS = sorted((CSRC / "include/pyenclave").glob("*.h"))
# Folder of src → the folders that it may use, as the picture has it.
ARROWS = {
    "base": {"base"},
    "crypto": {"base", "crypto"},
    "page": {"base", "crypto", "page"},
    "measure": {"base", "crypto", "measure"},
    "call": {"base", "call"},
    "linux": {"base", "linux", "page"},
}
# Public header → the folder that it is of.
OF_HEADER = {
    "base": "base",
    **dict.fromkeys(("gcm", "hash", "ecdsa"), "crypto"),
    **dict.fromkeys(("measure", "launch"), "measure"),
    **dict.fromkeys(("page", "epoch", "tree", "extents"), "page"),
    **dict.fromkeys(("call", "batch", "stats"), "call"),
    **dict.fromkeys(("linux", "heap", "protect"), "linux"),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("csrc_tool", ROOT / "docs/tools/csrc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> dict[str, tuple[str, list[str]]]:
    """Return what each file of the tables holds and gives."""
    row = re.compile(r"^\| \[`[^`]+`\]\(([^)]+)\) \| (.*) \| (.*) \|$", re.M)
    return {
        place: (holds, re.findall(r"`(\w+)`", gives)) for place, holds, gives in row.findall(PAGE)
    }


def public(header: Path) -> set[str]:
    """Return the functions of a header, found otherwise than the tool finds them."""
    text = re.sub(r"/\*.*?\*/", "", header.read_text("utf-8"), flags=re.DOTALL)
    return set(re.findall(r"(?<![*\w(])(pye_\w+)\(", text))


def test_every_file_is_named_and_said_to_hold_something() -> None:
    files = {str(path.relative_to(CSRC)) for path in CSRC.rglob("*.*") if path.suffix != ".pyc"}
    found = rows()
    assert set(found) == files - {"README.md"}, "run python docs/tools/csrc.py"
    assert all(len(holds) >= 5 for holds, _ in found.values())


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_every_public_function_is_in_the_row_of_its_file(header: Path) -> None:
    found = rows()
    for name in sorted(public(header)):
        sources = [place for place in found if place.startswith("src")]
        places = [place for place in sources if name in found[place][1]]
        assert len(places) == 1, f"{name} is in {places}"
        text = (CSRC / places[0]).read_text("utf-8")
        assert re.search(rf"^\w[^\n;]*\b{name}\(", text, re.M), f"{places[0]} has no {name}"
        assert places[0].split("/")[1] == OF_HEADER[header.stem], f"{name}: {places[0]}"


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_the_prefix_of_a_public_function_leads_to_its_header(header: Path) -> None:
    table = PAGE.split("| prefix | header | code |")[1].split("\n## ")[0]
    prefixes = {
        prefix: name
        for cells, name in re.findall(r"^\| ([^|]+) \| `(\w+)\.h` \|", table, re.M)
        for prefix in re.findall(r"`(pye_\w+)`", cells)
    }
    for name in public(header):
        fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
        told = prefixes[max(fitting, key=len)] if fitting else "linux"  # "all others"
        assert told == header.stem, name


def test_the_tables_are_those_that_the_script_writes(tool: ModuleType) -> None:
    assert tool.page() == PAGE, "run python docs/tools/csrc.py"


def test_every_header_is_in_the_picture_and_every_folder() -> None:
    picture = PAGE.split("```")[1]
    for header in HEADERS:
        assert re.search(rf"\b{header.name}\b", picture), header.name
    for folder in (CSRC / "src").iterdir():
        assert f"src/{folder.name}" in picture, folder.name


@pytest.mark.parametrize("folder", sorted(ARROWS))
def test_what_a_folder_includes_is_an_arrow_of_the_picture(folder: str) -> None:
    for path in (CSRC / "src" / folder).iterdir():
        for name in re.findall(r'^#include "([^"]+)"', path.read_text("utf-8"), re.M):
            head, _, rest = name.partition("/")
            if name == "pyenclave.h":
                target = "all"
            else:
                target = OF_HEADER[rest.removesuffix(".h")] if head == "pyenclave" else head
            assert target in ARROWS[folder], f"{path.name} includes {name}"
