"""The entry of the enclaves whose streams and ocalls go through pools."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pyenclave
from pyenclave import trusted


@trusted.ocall(allow=["double", "count"])
def fetch(x: int) -> int: ...


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x


@pyenclave.ecall
def ask(x: int) -> int:
    return fetch(x) + 1


@pyenclave.ecall
def count(stop: int) -> Iterator[int]:
    yield from range(stop)


@pyenclave.ecall
def fetched(stop: int) -> Iterator[int]:
    for x in range(stop):
        yield fetch(x)


@pyenclave.ecall
def badly(stop: int) -> Iterator[int]:
    yield from range(stop)
    raise LookupError("at the end")


@pyenclave.ecall
def leaves(stop: int) -> Iterator[int]:
    yield from range(stop)
    os._exit(9)


@pyenclave.ecall
def slowly(seconds: float) -> Iterator[int]:
    yield 0
    time.sleep(seconds)
    yield 1
