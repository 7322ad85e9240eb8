"""The tutorials are transcripts: their blocks run in order, and print what they show."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "docs/attestation.md",
    "docs/policies.md",
    "docs/howto-fastapi.md",
    "docs/sealed-files.md",
    "docs/first-release.md",
)
# Pages that go on where another one ends, in its folder.
CONTINUED = {"docs/first-release.md": ("docs/reviewing.md",)}
# Programs and packages that a page's reader installs first.
NEEDS = {
    "docs/howto-fastapi.md": (("curl",), ("fastapi", "uvicorn", "httpx")),
    "docs/sealed-files.md": ((), ("fsspec", "pandas", "pyarrow")),
    "docs/first-release.md": ((), ("sqlalchemy", "uvicorn")),
}
FENCE = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"^[A-Z_]+=.*$", re.MULTILINE)
# What differs from run to run, and padding, which hidden lines decide.
_VARIES = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+00:00)?"), "<time>"),
    (re.compile(r"\b[0-9a-f]{16,}\b"), "<hex>"),
    (re.compile(r" {2,}"), "  "),
)


@dataclass(frozen=True)
class Block:
    """A fenced block: the comment above it, its language, its text and the line it begins at."""

    mark: str
    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text("utf-8")
    for match in FENCE.finditer(text):
        yield Block(match[1] or "", match[2], match[3], text.count("\n", 0, match.start()) + 1)


def plain(text: str) -> list[str]:
    for pattern, to in _VARIES:
        text = pattern.sub(to, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def pattern_of(shown: str) -> re.Pattern[str]:
    """Return what *shown* allows: ``…`` as a line stands for lines, at an end for the rest."""
    parts = []
    for line in plain(shown):
        if line == "…":
            parts.append(r"(?:.*\n)*?")
        elif line.endswith("…"):
            parts.append(re.escape(line[:-1]) + r".*\n")
        else:
            parts.append(re.escape(line) + r"\n")
    return re.compile("".join(parts))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's folder, with `pyenclave` and `python` of this checkout on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("python", ""), ("pyenclave", "-m pyenclave")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(item for item in sys.path if item))
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("NO_COLOR", "1")
    if not any(item.name == "pyenclave" for item in entry_points(group="pytest11")):
        # A reader has it installed, and pytest finds the plugin by itself.
        monkeypatch.setenv("PYTEST_PLUGINS", "pyenclave.testing.plugin")
    if not any(item.name == "sealed" for item in entry_points(group="fsspec.specs")):
        with contextlib.suppress(ImportError):
            import fsspec

            name = "pyenclave.sealed.fsspec.SealedFileSystem"
            fsspec.register_implementation("sealed", name, clobber=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "work"
    for kept in (tmp_path / "work").glob("*.pid"):  # what a page began and did not end
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(kept.read_text()), signal.SIGTERM)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_prints_what_it_shows(page: str, folder: Path) -> None:
    """Each block as a reader would type it, one after the other."""
    programs, packages = NEEDS.get(page, ((), ()))
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    for name in packages:
        pytest.importorskip(name)
    session: dict[str, Any] = {}
    variables = ""
    printed: str | None = None
    shown = 0
    told = [(name, block) for name in (page, *CONTINUED.get(page, ())) for block in blocks(name)]
    for name, block in told:
        where = f"{name}:{block.line}"
        if block.mark.startswith("not run"):
            assert ": " in block.mark, f"{where}: say why"
            printed = None
        elif block.mark.startswith("file: "):
            (folder / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.language == "sh":
            done = subprocess.run(
                ["sh", "-c", variables + block.text],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A reader's Python buffers what goes into a pipe; the order is to be the same.
                env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
                text=True,
                check=False,
            )
            printed = done.stdout
            assert done.returncode == 0, f"{where}: {printed}"
            variables += "".join(f"{item}\n" for item in _ASSIGNMENT.findall(block.text))
        elif block.language == "python":
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(compile(block.text, where, "exec"), session)
            printed = stream.getvalue()
        else:
            assert printed is not None, f"{where}: the output of what?"
            actual = "".join(f"{line}\n" for line in plain(printed))
            assert pattern_of(block.text).fullmatch(actual), f"{where}: it printed\n{printed}"
            printed, shown = None, shown + 1
    assert shown > 2


def test_what_is_shown_is_compared() -> None:
    """The comparison sees a changed line, a missing one and one too many."""
    actual = "passed   one\nFAILED   two\npassed   three\n"
    for shown, fits in (
        ("passed  one\nFAILED  two\npassed  three\n", True),
        ("passed  one\n…\n", True),
        ("…\nFAILED  t…\n…\n", True),
        ("passed  one\nFAILED  two\n", False),
        ("…\npassed  two\n…\n", False),
        ("FAILED  two\n", False),
        ("", False),
    ):
        lines = "".join(f"{line}\n" for line in plain(actual))
        assert bool(pattern_of(shown).fullmatch(lines)) is fits, shown
