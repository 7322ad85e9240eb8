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

# The same for the handles of asyncio, and for pools.
OTHERS = {
    "aio": """
async def use() -> None:
    async with pyenclave.AsyncEnclave.from_file("scoring.py", quiet=True) as enclave:
        flags: list[bool] = await enclave.call(scoring.score, np.zeros(3), threshold=0.5)
        age: int = (await enclave.call(scoring.admit, scoring.Applicant(5), strict=True)).age
        counted: list[int] = [number async for number in enclave.call(scoring.numbers, 3)]
        async with enclave.call(scoring.numbers, 3) as stream:
            first: int = await anext(stream)
        slow: list[bool] = await enclave.options(timeout=1.0).call(scoring.score, np.zeros(3))
        by_name = await enclave.call("score", np.zeros(3), anything=5)
        short = await enclave.score(np.zeros(3))
""",
    "pool": """
def use() -> None:
    with pyenclave.EnclavePool.from_file("scoring.py", size=2) as pool:
        flags: list[bool] = pool.call(scoring.score, np.zeros(3), threshold=0.5)
        slow: list[bool] = pool.options(timeout=1.0).call(scoring.score, np.zeros(3))
        by_name = pool.call("score", np.zeros(3), anything=5)
        with pool.enclave() as enclave:
            total: int = sum(enclave.call(scoring.numbers, 3))
""",
    "aio_pool": """
async def use() -> None:
    async with pyenclave.AsyncEnclavePool.from_file("scoring.py", size=2) as pool:
        flags: list[bool] = await pool.call(scoring.score, np.zeros(3), threshold=0.5)
        slow: list[bool] = await pool.options(timeout=1.0).call(scoring.score, np.zeros(3))
        by_name = await pool.call("score", np.zeros(3), anything=5)
""",
}

WRONG_OTHERS = {
    "aio": [
        'await enclave.call(scoring.score, "rows")',
        "await enclave.call(scoring.score)",
        "await enclave.call(scoring.admit, scoring.Applicant(5), strikt=True)",
        "text: str = await enclave.call(scoring.score, np.zeros(3))",
        "plain: list[bool] = enclave.call(scoring.score, np.zeros(3))",
        "more: list[str] = [number async for number in enclave.call(scoring.numbers, 3)]",
        "await enclave.options(timeout=1.0).call(scoring.score)",
        "await enclave.call(5)",
    ],
    "pool": [
        'pool.call(scoring.score, "rows")',
        "text: str = pool.call(scoring.score, np.zeros(3))",
        "pool.options(timeout=1.0).call(scoring.score)",
        "pool.call(5)",
    ],
    "aio_pool": [
        'await pool.call(scoring.score, "rows")',
        "text: str = await pool.call(scoring.score, np.zeros(3))",
        "await pool.options(timeout=1.0).call(scoring.score)",
        "await pool.call(5)",
    ],
}

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
    head = "import numpy as np\nimport scoring\nimport pyenclave\n"
    texts, wrong = {"right.py": RIGHT, "wrong.py": with_lines(RIGHT, WRONG)}, {"wrong.py": WRONG}
    for name, text in OTHERS.items():
        texts[f"{name}_right.py"] = head + text
        texts[f"{name}_wrong.py"] = with_lines(head + text, WRONG_OTHERS[name])
        wrong[f"{name}_wrong.py"] = WRONG_OTHERS[name]
    for name, text in texts.items():
        (folder / name).write_text(text)
    found = check(*texts)
    for name, text in texts.items():
        lines = wrong.get(name, [])
        last = len(text.splitlines())
        assert found.get(name, set()) == set(range(last - len(lines) + 1, last + 1)), name


def with_lines(text: str, lines: list[str]) -> str:
    """Return *text* with more lines, as deep as its last."""
    last = text.splitlines()[-1]
    indent = " " * (len(last) - len(last.lstrip()))
    return text + "".join(f"{indent}{line}\n" for line in lines)


@pytest.mark.slow
def test_mypy_takes_the_right_uses_and_refuses_each_wrong_one(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")

    def check(*names: str) -> dict[str, set[int]]:
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *names],
            cwd=tmp_path,
            env={"MYPYPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.stderr == ""
        lines = [line for line in done.stdout.splitlines() if ": error:" in line]
        assert all(line.split(":")[0] in names for line in lines), lines
        found: dict[str, set[int]] = {}
        for line in lines:
            file, number = line.split(":")[:2]
            found.setdefault(file, set()).add(int(number))
        return found

    wrong_lines(tmp_path, check)


@pytest.mark.slow
def test_pyright_takes_the_right_uses_and_refuses_each_wrong_one(tmp_path):
    folder = Path(sys.executable).parent
    found = [shutil.which(name, path=folder) or shutil.which(name) for name in
             ("pyright", "basedpyright")]  # fmt: skip
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("pyright is not installed")

    def check(*names: str) -> dict[str, set[int]]:
        config = {
            "typeCheckingMode": "standard",
            "extraPaths": [str(REPOSITORY)],
            "include": list(names),
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
        found: dict[str, set[int]] = {}
        for row in json.loads(done.stdout)["generalDiagnostics"]:
            if row["severity"] == "error":
                line = row["range"]["start"]["line"] + 1
                found.setdefault(Path(row["file"]).name, set()).add(line)
        return found

    wrong_lines(tmp_path, check)
