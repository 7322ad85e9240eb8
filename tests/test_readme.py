"""The README's examples run as they are pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


def example(name: str) -> str:
    """Return the fenced block below the mark ``<!-- example: name -->``."""
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"README.md has no example {name!r}"
    return found[1]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    return tmp_path


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with this Python's environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_hello_prints_its_answer_and_says_that_it_is_a_debug_enclave(state: Path) -> None:
    """The hello world prints 42, and one line on stderr."""
    (state / "hello.py").write_text(example("hello"))
    done = run("hello.py", cwd=state)
    assert done.stdout == "42\n", done.stderr
    assert "debug" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_ten_lines_of_attestation_run(state: Path) -> None:
    """Build and sign by the command line, then the pasted lines."""
    (state / "scoring.py").write_text(example("scoring"))
    toml = re.search(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert toml
    (state / "enclave.toml").write_text(toml[1])
    for line in (
        "keygen -o signing.pem",
        "build enclave.toml -o scoring.unsigned",
        "sign scoring.unsigned --key signing.pem -o scoring.enclave",
        "inspect scoring.enclave",
    ):
        assert f"pyenclave {line}" in README
        done = run("-m", "pyenclave", *line.split(), cwd=state)
        assert done.returncode == 0, done.stderr
    script = "model_key = bytes(32)\n" + example("attest") + "    print(result.accepted)\n"
    (state / "owner.py").write_text(textwrap.dedent(script))
    done = run("owner.py", cwd=state)
    assert done.stdout == "True\n", done.stderr


def test_both_commands_are_marked() -> None:
    """The newcomer's commands can be found."""
    for mark in ("demo", "test"):
        assert re.search(rf"<!-- command: {mark} -->\n```sh\n.*?```", README, flags=re.DOTALL)
