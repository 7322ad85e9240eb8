"""The entry of the enclaves whose ocalls are answered on event loops."""

from __future__ import annotations

from collections.abc import Iterator

import pyenclave
from pyenclave import trusted


@trusted.ocall(allow=["secret", "count"])
def fetch(name: str) -> int: ...


@trusted.ocall(allow=["ask"])
def again(depth: int) -> int: ...


@pyenclave.ecall(private=True)
def secret(x: int) -> int:
    return 100 + x


@pyenclave.ecall
def ask(name: str) -> int:
    return fetch(name) + 1


@pyenclave.ecall
def deep(depth: int) -> int:
    return again(depth)


@pyenclave.ecall
def caught(name: str) -> str:
    try:
        fetch(name)
    except pyenclave.errors.OcallError as error:
        return str(error)
    return "nothing"


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x


@pyenclave.ecall
def count(stop: int) -> Iterator[int]:
    yield from range(stop)


@pyenclave.ecall
def count_badly(stop: int) -> Iterator[int]:
    yield from range(stop)
    raise LookupError("at the end")


@pyenclave.ecall
def fetched(names: list[str]) -> Iterator[int]:
    for name in names:
        yield fetch(name)
