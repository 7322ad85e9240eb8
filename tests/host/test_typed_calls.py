"""`enclave.call(module.function, …)` as type checkers see it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

SCORING = """
from __future__ import annotations
from collections.abc import Iterator
from dataclasses import dataclass
import numpy as np
import numpy.typing as npt
import pyenclave

@dataclass
class Applicant:
    age: int

@pyenclave.ecall
def score(rows: npt.NDArray[np.float64], threshold: float = 0.5) -> list[bool]:
    return [bool(row > threshold) for row in rows]

@pyenclave.ecall
def admit(one: Applicant, *, strict: bool = False) -> Applicant:
    return one

@pyenclave.ecall
def numbers(count: int) -> Iterator[int]:
    yield from range(count)
"""

RIGHT = """
import numpy as np
import scoring
import pyenclave

with pyenclave.Enclave("scoring.enclave", quiet=True) as enclave:
    flags: list[bool] = enclave.call(scoring.score, np.zeros(3), threshold=0.5)
    age: int = enclave.call(scoring.admit, scoring.Applicant(5), strict=True).age
    total: int = sum(enclave.call(scoring.numbers, 3))
    slow: list[bool] = enclave.options(timeout=1.0).call(scoring.score, np.zeros(3))
    by_name = enclave.call("score", np.zeros(3), anything=5)
    short = enclave.score(np.zeros(3))
"""

WRONG = [
    'enclave.call(scoring.score, "rows")',
    "enclave.call(scoring.score)",
    "enclave.call(scoring.score, np.zeros(3), 0.5, 7)",
    "enclave.call(scoring.admit, scoring.Applicant(5), True)",
    "enclave.call(scoring.admit, scoring.Applicant(5), strikt=True)",
    "text: str = enclave.call(scoring.score, np.zeros(3))",
    "more: list[str] = list(enclave.call(scoring.numbers, 3))",
    "enclave.options(timeout=1.0).call(scoring.score)",
    "enclave.call(5)",
]


def wrong_lines(folder: Path, check) -> None:
    (folder / "scoring.py").write_text(SCORING)
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(RIGHT + "".join(f"    {line}\n" for line in WRONG))
    assert check("right.py") == set()
    first = len(RIGHT.splitlines()) + 1
    assert check("wrong.py") == {first + place for place in range(len(WRONG))}


@pytest.mark.slow
def test_mypy_takes_the_right_uses_and_refuses_each_wrong_one(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")

    def check(name: str) -> set[int]:
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", name],
            cwd=tmp_path,
            env={"MYPYPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.stderr == ""
        lines = [line for line in done.stdout.splitlines() if ": error:" in line]
        assert all(line.startswith(name) for line in lines), lines
        return {int(line.split(":")[1]) for line in lines}

    wrong_lines(tmp_path, check)


@pytest.mark.slow
def test_pyright_takes_the_right_uses_and_refuses_each_wrong_one(tmp_path):
    folder = Path(sys.executable).parent
    found = [shutil.which(name, path=folder) or shutil.which(name) for name in
             ("pyright", "basedpyright")]  # fmt: skip
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("pyright is not installed")

    def check(name: str) -> set[int]:
        config = {
            "typeCheckingMode": "standard",
            "extraPaths": [str(REPOSITORY)],
            "include": [name],
            "pythonVersion": "3.11",
        }
        (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
        done = subprocess.run(
            [program, "--outputjson", "--pythonpath", sys.executable],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        rows = json.loads(done.stdout)["generalDiagnostics"]
        return {row["range"]["start"]["line"] + 1 for row in rows if row["severity"] == "error"}

    wrong_lines(tmp_path, check)
