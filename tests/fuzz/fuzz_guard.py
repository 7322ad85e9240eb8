"""
What must hold of every input: a typed error or a value, in bounded time and memory.

Time is the processor's, so that a busy machine finds nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import resource
import signal
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz_targets import Target

CPU_SECONDS = 5.0
MEMORY = 512 << 20  # bytes beyond what the process has before the first input
_ITEMS = 24  # of one sequence that `touch` looks at
_DEPTH = 6


class FindingError(AssertionError):
    """An input that breaks the promise; the message holds it, `data` too."""

    def __init__(self, target: str, data: bytes, what: str) -> None:
        shown = data.hex() if len(data) <= 2048 else f"{data[:2048].hex()}… ({len(data)} bytes)"
        super().__init__(f"{target}: {what}\ninput: {shown}")
        self.target, self.data, self.what = target, data, what


class TooSlowError(BaseException):
    """The time is over; no reader catches it."""


def _over(_signal: int, _frame: object) -> None:
    raise TooSlowError


def bound_memory(beyond: int = MEMORY) -> None:
    """Let this process take *beyond* bytes of address space more than it has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = used + beyond
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bound what this process may take while inputs are tried; for the main thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _over)
    bound_memory()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def examine(target: Target, data: bytes) -> bool:
    """
    Give *data* to the reader. Call it within `limits`.

    Returns:
        Whether it was accepted; otherwise it was refused in one of the documented ways.

    Raises:
        FindingError: Neither.

    """
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            touch(target.read(target.frame(data)), target.errors)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except target.errors:
        return False
    except TooSlowError:
        raise FindingError(target.name, data, f"more than {CPU_SECONDS} s of processor") from None
    except Exception as error:
        raise FindingError(target.name, data, f"{type(error).__name__}: {error}") from error
    return True


def touch(value: Any, errors: tuple[type[Exception], ...], depth: int = 0) -> None:
    """Ask for every property and the text of what was read: what is lazy is hostile, too."""
    if depth > _DEPTH:
        return
    if isinstance(value, Mapping):
        for item in [*value.values()][:_ITEMS]:
            touch(item, errors, depth + 1)
        return
    if isinstance(value, tuple | list):
        for item in value[:_ITEMS]:
            touch(item, errors, depth + 1)
        return
    kind = type(value)
    if not kind.__module__.startswith("pyenclave"):
        return
    repr(value)
    for name in _properties(kind):
        with contextlib.suppress(*errors):
            touch(getattr(value, name), errors, depth + 1)
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            touch(getattr(value, field.name), errors, depth + 1)


@functools.cache
def _properties(kind: type) -> tuple[str, ...]:
    return tuple(
        name
        for name in dir(kind)
        if not name.startswith("__")
        and isinstance(
            next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None),
            property | functools.cached_property,
        )
    )


def reduced(target: Target, data: bytes, seconds: float = 20.0) -> bytes:
    """Return a shorter input with the same kind of finding; call it within `limits`."""
    import time

    def fails(candidate: bytes) -> str | None:
        try:
            examine(target, candidate)
        except FindingError as finding:
            return finding.what.partition(":")[0]
        return None

    wanted, end = fails(data), time.monotonic() + seconds
    size = len(data) // 2
    while size and wanted and time.monotonic() < end:
        at, shorter = 0, False
        while at < len(data) and time.monotonic() < end:
            candidate = data[:at] + data[at + size :]
            if fails(candidate) == wanted:
                data, shorter = candidate, True
            else:
                at += size
        size = size if shorter and size == 1 else size // 2
    return data
