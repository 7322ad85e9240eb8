"""Each check of a release is missed by some test when it is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from release_mutants import MUTANTS

HERE = Path(__file__).parent
TESTS = [
    str(HERE / f"test_{name}.py")
    for name in ("release_key", "release_answers", "relay", "azure_wire")
]


def run(mutant: str, who: str) -> subprocess.CompletedProcess[str]:
    options = [
        "-x",
        "-q",
        "-p",
        "release_mutants",
        "-p",
        "no:cacheprovider",
        "--timeout=60",
        "-k",
        who,
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS],
        env={**os.environ, "RELEASE_MUTANT": mutant, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.long
@pytest.mark.parametrize("name", MUTANTS)
def test_a_release_without_this_check_is_noticed(name: str) -> None:
    done = run(name, MUTANTS[name][3])
    assert "has 0 times" not in done.stdout
    assert done.returncode == 1, done.stdout[-2000:]


@pytest.mark.long
def test_a_release_with_all_checks_passes() -> None:
    done = run("", "not nothing")
    assert done.returncode == 0, done.stdout[-2000:]
