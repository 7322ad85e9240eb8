"""Running an operation of the core with its first call failing, then its second, and so on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from proof_state import CALLS, LIE, Failure, shared_state

from pyenclave._ffi import lib

state = shared_state()
needs_the_test_build = pytest.mark.skipif(
    state is None, reason="the core's test build is not loaded (tests/native/mutants.py)"
)

# What the kernel may answer: the usual error of each call, and those that mean something else.
ERRORS = (0, errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EINTR, LIE)
KNOWN = {
    value
    for name in dir(lib)
    if name.startswith("PYE_E_") and isinstance(value := getattr(lib, name), int)
}
MOST = 400  # calls of one operation


@dataclass(frozen=True)
class Resources:
    """What a process holds that a failed operation could leave behind."""

    descriptors: frozenset[str]
    allocations: int
    mapped: int  # bytes that are not the heap's

    @classmethod
    def now(cls) -> Resources:
        assert state is not None
        mapped = 0
        with open("/proc/self/maps", encoding="ascii") as file:
            for line in file:
                if "pye" in line or "secretmem" in line or "---p" in line:
                    low, high = line.split()[0].split("-")
                    mapped += int(high, 16) - int(low, 16)
        descriptors = frozenset(os.listdir("/proc/self/fd"))
        return cls(descriptors, state.live, mapped)


def every_failure(
    operation: Callable[[], int],
    errors: tuple[int, ...] = ERRORS,
    *,
    everywhere: bool = False,
    what: int = CALLS,
    settle: Callable[[int], None] = lambda _status: None,
) -> Iterator[tuple[Failure, int]]:
    """Yield each failure of *operation* with the status that it gave.

    *operation*, or *settle* after it (with its status, and nothing failing), cleans up when it
    succeeds. Whatever is held when it failed is a leak, and it must succeed afterwards.
    """

    def succeeds() -> bool:
        status = operation()
        settle(status)
        return status == lib.PYE_OK

    assert state is not None
    assert succeeds()
    for error in errors:
        for at in range(1, MOST):
            before = Resources.now()
            with state.failing(at, error, everywhere=everywhere, what=what) as failure:
                status = operation()
            settle(status)
            if not failure.name:
                break
            assert status == lib.PYE_OK or status in KNOWN, f"{failure}: status {status}"
            assert Resources.now() == before, f"{failure}: something is left"
            yield failure, status
            assert succeeds(), f"{failure}: it does not work afterwards"
        else:
            pytest.fail(f"more than {MOST} calls")
