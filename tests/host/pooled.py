"""The entry of the enclaves that pools are tried with."""

from __future__ import annotations

import itertools
import os
import time

import pyenclave

counts = itertools.count(1)


@pyenclave.ecall
def add(x: int, y: int) -> int:
    return x + y


@pyenclave.ecall
def counted() -> int:
    return next(counts)


@pyenclave.ecall
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pyenclave.ecall
def fail() -> int:
    raise ValueError("no")


@pyenclave.ecall
def leave() -> int:
    os._exit(9)
