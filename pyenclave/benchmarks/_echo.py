"""The trusted code that the benchmarks launch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import pyenclave


@pyenclave.ecall
def add(a: int, b: float) -> float:
    """Two scalars in, one out."""
    return a + b


@pyenclave.ecall
def negate(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """An array in and out, each element looked at and changed."""
    return np.negative(x, out=x)
