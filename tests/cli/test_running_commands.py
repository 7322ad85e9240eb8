"""Commands that start enclaves: run, ps, kill, doctor, seal and unseal, as people type them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave.host import Enclave

SCRIPT = """
import numpy as np
import numpy.typing as npt
import pyenclave

@pyenclave.ecall
def add(a: float, b: float = 1.0) -> float:
    return a + b

@pyenclave.ecall
def greet(name: str) -> str:
    return "hello " + name

@pyenclave.ecall
def mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean())
"""


@pytest.fixture
def script(tmp_path: Path, used_state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A trusted script, and a platform of the test's own that all its commands find running."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(used_state))
    path = tmp_path / "adding.py"
    path.write_text(SCRIPT)
    with PlatformClient.connect():
        yield path


def command(*arguments: str | Path, code: int = 0) -> str:
    """Run the command line and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_run_decodes_arguments_by_the_signature(script: Path) -> None:
    """Numbers, a bare word as a string, a list as an array, a default."""
    assert command("run", script, "add", "1.5", "2") == "3.5\n"
    assert command("run", script, "add", "41") == "42.0\n"
    assert command("run", script, "greet", "you") == '"hello you"\n'
    assert command("run", script, "mean", "[1, 2, 3]") == "2.0\n"
    assert json.loads(command("run", script, "add", "1", "--json")) == {"result": 2.0}


def test_run_refuses_what_does_not_fit(script: Path) -> None:
    """Unknown functions, too many arguments and wrong types are wrong usage."""
    for arguments in (["treble", "1"], ["add", "1", "2", "3"], ["add", "word"]):
        answer = json.loads(command("run", script, *arguments, "--json", code=2))
        assert answer["error"]["code"] in ("call.unknown_function", "call.argument")


def test_run_names_only_what_is_missing(script: Path) -> None:
    """Arguments may be none at all, so that an absent function is the only mistake."""
    answer = json.loads(command("run", script, "--json", code=2))
    assert answer["error"]["message"].endswith("required: FUNCTION")


def test_ps_lists_and_kill_ends_a_running_enclave(script: Path) -> None:
    """The enclave is listed with its identity and is gone after kill."""
    with Enclave.from_file(script) as enclave:
        (row,) = json.loads(command("ps", "--json"))["enclaves"]
        assert row["enclave_id"] == enclave.info.enclave_id.hex()
        assert (row["pid"], row["debug"], row["name"]) == (enclave.info.pid, True, "adding")
        assert "adding" in command("ps")
        assert json.loads(command("kill", row["enclave_id"][:12], "--json")) == {
            "killed": [row["enclave_id"]],
            "missing": [],
        }
        assert json.loads(command("ps", "--json")) == {"enclaves": []}
        assert json.loads(command("kill", "nobody", "--json", code=1))["missing"] == ["nobody"]
    assert "no enclave is running" in command("kill", "--all")


def test_doctor_names_level_bits_and_what_is_open(script: Path) -> None:
    """Each protection was tried on an enclave launched for it."""
    report: dict[str, Any] = json.loads(command("doctor", "--json"))
    assert report["tee"] == "none"
    assert report["platform"] == {"level": "embedded", "ephemeral": False}
    assert report["enclave"]["level"] == "embedded"
    assert report["enclave"]["bits"]["dumpable_off"] == {"value": True, "by": "outside"}
    assert any("root" in line for line in report["not_protected"])
    text = command("doctor")
    assert "NOT protected" in text
    assert "dumpable_off" in text


def test_a_sealed_file_opens_to_standard_output(script: Path, tmp_path: Path) -> None:
    """``unseal -o -`` writes the content and nothing else; JSON has no room for it."""
    note = tmp_path / "note.txt"
    note.write_text("a note\n")
    command("seal", note, "-o", tmp_path / "note.sealed")
    assert command("unseal", tmp_path / "note.sealed", "-o", "-") == "a note\n"
    assert not Path("-").exists()
    command("unseal", tmp_path / "note.sealed", "-o", "-", "--json", code=2)
