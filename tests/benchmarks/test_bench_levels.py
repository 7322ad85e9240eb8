"""The benchmarks of bench/: each runs once, at each of its levels, with its results compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("native", "cffi", "cython", "public")


def test_every_operation_runs_at_its_levels() -> None:
    """What the levels give is compared inside; that none was skipped is seen here."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"),
            *("--benchmark-disable", "bench"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    ran = re.findall(r"\[(\w+)-(\w+)\] (\w+)", done.stdout)
    assert {result for _, _, result in ran} == {"PASSED"}
    levels: dict[str, set[str]] = {}
    for operation, level, _ in ran:
        levels.setdefault(operation, set()).add(level)
    assert all({"native", "cffi", "cython"} <= found <= set(LEVELS) for found in levels.values())
    for operation in ("ecall_64", "mrenclave_64", "snp_firmware", "message_4k"):
        assert levels[operation] == set(LEVELS), operation


def test_every_file_is_described_in_the_readme() -> None:
    page = (ROOT / "bench/README.md").read_text("utf-8")
    for path in (ROOT / "bench").glob("*.*"):
        if path.name not in ("README.md", "conftest.py", "levels.py"):
            assert path.name in page, path.name
