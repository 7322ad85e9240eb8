"""The entry of the enclaves of these tests."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np

import pyenclave
from pyenclave.errors import EnclavePoisonedError


@dataclasses.dataclass
class Row:
    name: str
    value: float


@pyenclave.ecall
def double(x: int) -> int:
    """Twice."""
    return 2 * x


@pyenclave.ecall
def total(rows: list[Row]) -> Row:
    return Row("sum", sum(row.value for row in rows))


@pyenclave.ecall
def twice(x: np.ndarray) -> np.ndarray:
    return x * 2


@pyenclave.ecall
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pyenclave.ecall
def fail(text: str) -> None:
    raise LookupError(text)


@pyenclave.ecall
def refuse(text: str) -> None:
    raise pyenclave.PublicError(text)


@pyenclave.ecall
def end() -> None:
    os._exit(9)


@pyenclave.ecall
def poison() -> None:
    raise EnclavePoisonedError("a page's MAC does not hold")
