"""The entry of the enclaves that are called from event loops."""

from __future__ import annotations

import os
import time

import numpy as np

import pyenclave
from pyenclave.errors import EnclavePoisonedError

_notes: list[int] = []


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x


@pyenclave.ecall
def twice(x: np.ndarray) -> np.ndarray:
    return x * 2


@pyenclave.ecall
def zeros(count: int) -> np.ndarray:
    return np.zeros(count)


@pyenclave.ecall
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pyenclave.ecall
def note(x: int, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    _notes.append(x)


@pyenclave.ecall
def notes() -> list[int]:
    return _notes


@pyenclave.ecall
def fail(text: str) -> None:
    raise LookupError(text)


@pyenclave.ecall
def end() -> None:
    os._exit(9)


@pyenclave.ecall
def poison(seconds: float) -> None:
    time.sleep(seconds)
    raise EnclavePoisonedError("a page's MAC does not hold")
