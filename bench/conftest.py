"""Fixtures of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pyenclave.benchmarks import in_c
from pyenclave.benchmarks.rows import AbsentError


@pytest.fixture(scope="session")
def loops() -> in_c.Loops:
    """The loops in C."""
    try:
        return in_c.loops()
    except AbsentError as absent:
        pytest.skip(f"not installed: {absent}")
