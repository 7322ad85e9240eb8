"""The trusted code that ``pyenclave doctor`` launches."""

from __future__ import annotations

import pyenclave


@pyenclave.ecall
def answer(x: int) -> int:
    """Give a sign of life."""
    return x + 1
