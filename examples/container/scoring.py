"""Runs inside the enclave."""

from __future__ import annotations

import pyenclave


@pyenclave.ecall
def score(income: float, debt: float) -> float:
    """Return how likely the debt is paid back, from 0 to 1."""
    return max(0.0, min(1.0, 1.0 - debt / max(income, 1.0)))
