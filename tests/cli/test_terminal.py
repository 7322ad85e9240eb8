"""What names and data that are not ours do to a terminal and to who reads errors by the line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyenclave.cli
from pyenclave import errors
from pyenclave.cli import main, output

PLACE = Path(pyenclave.cli.__file__).resolve().parents[2]
NAME = "no\n\x1b[31mpyenclave: ok\r\x9b2J\u202egnp"
SHOWN = "no\\n\\x1b[31mpyenclave: ok\\r\\x9b2J\\u202egnp"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "arguments",
    [["inspect", NAME], ["verify", NAME], ["run", NAME, "f"], ["info", NAME], ["build", NAME],
     ["seal", NAME, "--key-file", NAME], [NAME], ["logs", NAME]],
    ids=lambda words: words[0].partition("\n")[0],
)  # fmt: skip
def test_a_name_stays_on_the_line_of_its_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    assert main(arguments) in (1, 2)
    told = capsys.readouterr()
    *before, last = told.err.split("\n")[:-1]
    assert last.startswith("pyenclave: ")
    assert SHOWN in last
    assert not any(line.startswith("pyenclave") for line in before)  # usage
    assert all(c.isprintable() or c == "\n" for c in told.err)
    assert all(c.isprintable() or c == "\n" for c in told.out)


def test_json_has_the_name_as_it_is_and_in_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", NAME, "--json"]) == 2
    told = capsys.readouterr()
    assert told.out.count("\n") == 1
    assert told.out[:-1].isprintable()
    assert NAME in json.loads(told.out)["error"]["message"]
    assert told.err == f"pyenclave: error [unreadable]: No such file or directory: {SHOWN}\n"


@pytest.mark.parametrize("text", [NAME, "\udcff\U000e0001 grüß \"'\\", "plain"])
def test_any_text_crosses_as_json(text: str) -> None:
    found = output.json_text({text: [text]})
    assert found.isprintable()
    # A surrogate pair is one character again, a single surrogate stays one.
    assert json.loads(found) == {text: [text]}


def test_files_of_a_lock_have_a_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise errors.RuntimeLockError("it differs", files=(NAME, *["b"] * 30), found=NAME)

    path = tmp_path / "x"
    path.write_bytes(b"")
    monkeypatch.setattr("pyenclave.formats.image.Image.parse", refused)
    assert main(["inspect", str(path), "--json"]) == 1
    told = capsys.readouterr()
    rows = [SHOWN, *["b"] * 19, "… and 11 more"]
    head = f"pyenclave: error [image.runtime_lock]: it differs; found {SHOWN}"
    assert told.err == "\n  ".join([head, *rows]) + "\n"
    assert json.loads(told.out)["error"]["message"].count("\n  ") == 21


def test_a_terminal_gets_our_colours_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    output.say(f"{output.paint('good', 'green')} \x1b]0;title\x07 \x1b[8m \x1b[2J {NAME} \udcff")
    said = screen.getvalue()
    assert said.startswith("\x1b[32mgood\x1b[0m \\x1b]0;title\\x07 \\x1b[8m \\x1b[2J no\n")
    assert said.endswith(" \\udcff\n")
    assert said.count("\x1b") == 3  # ours, and the colour in the name, which does no harm


def test_names_that_are_no_text_are_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "inspect", b"no\xff\n"],
        env={**os.environ, "PYTHONPATH": str(PLACE), "LC_ALL": "C.UTF-8"},
        cwd=tmp_path, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        b"pyenclave: error [unreadable]: No such file or directory: no\\udcff\\n\n"
    )
