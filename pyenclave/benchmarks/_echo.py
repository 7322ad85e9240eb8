"""The trusted code that the benchmarks launch."""

from __future__ import annotations

import pyenclave


@pyenclave.ecall
def add(a: int, b: float) -> float:
    """Two scalars in, one out."""
    return a + b
