"""The page of memory that steers the core's test build; ``proof_core.c`` has its layout."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FILE = "PYE_PROOF_STATE"
MAX_CHECKS = 4000
SIZE = 128 + MAX_CHECKS
LIE = -1  # as an error: the call does nothing and says that it did
CALLS, COMPARISONS, SYSCONF = 1, 2, 3


class _Layout(ctypes.Structure):
    _fields_ = (
        ("mutant", ctypes.c_uint32),
        ("armed", ctypes.c_uint32),
        ("owner", ctypes.c_int32),
        ("fail_at", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("calls", ctypes.c_uint32),
        ("failed", ctypes.c_uint32),
        ("live", ctypes.c_int32),
        ("name", ctypes.c_char * 32),
        ("also", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 15),
        ("fired", ctypes.c_uint8 * MAX_CHECKS),
    )


assert ctypes.sizeof(_Layout) == SIZE


@dataclass
class Failure:
    """What one armed run did: the name of the call that failed, or nothing if none was reached."""

    at: int
    error: int
    name: str = ""
    calls: int = 0
    what: str = ""  # the name, and of madvise what was advised

    def __str__(self) -> str:
        code = {0: "its usual error", LIE: "a lie"} | errno.errorcode
        return f"call {self.at} ({self.name}) fails with {code[self.error]}"


class State:
    """The shared page: one for all processes of a test run."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        self._page = _Layout.from_buffer(self._memory)

    def mutate(self, number: int) -> None:
        """Let the check *number* pass from now on (0: none)."""
        self._page.mutant = number

    def take_fired(self) -> list[int]:
        """Return the numbers of the checks that fired since the last time."""
        found = [i for i, byte in enumerate(bytes(self._page.fired)) if byte]
        ctypes.memset(self._page.fired, 0, MAX_CHECKS)
        return found

    @property
    def live(self) -> int:
        """How many allocations of the core were not freed."""
        return int(self._page.live)

    @contextmanager
    def failing(
        self,
        at: int,
        error: int = 0,
        *,
        everywhere: bool = False,
        what: int = CALLS,
        also: int = 0,
    ) -> Iterator[Failure]:
        """Let the *at*-th call of this thread (or of all, with children) fail with *error*.

        Bit *n* of *also* lets the one that comes *n* + 1 later fail too.
        """
        page = self._page
        failure = Failure(at, error)
        page.calls = page.failed = 0
        page.fail_at, page.error, page.also = at, error, also
        page.owner = 0 if everywhere else threading.get_native_id()
        page.name = b""
        page.armed = what
        try:
            yield failure
        finally:
            page.armed = 0
            failure.calls = page.calls
            failure.what = page.name.decode() if page.failed else ""
            advice = failure.what.startswith("madvise ")
            failure.name = "madvise" if advice else failure.what


def shared_state() -> State | None:
    """Return the page of this run, or ``None`` when the core is an ordinary build."""
    path = os.environ.get(FILE)
    return State(path) if path else None
