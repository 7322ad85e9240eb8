"""
Forked children: what a child must forget of its parent's enclaves, and what it may not use.

A running enclave belongs to the process that started it. A child inherits memory and descriptors,
but it may neither call the enclave nor end it: two processes in one ring would break its protocol,
and the parent would lose its worker for it. ``docs/deploying.md`` has the pattern for each server.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol

from pyenclave.errors import EnclaveStateError

__all__ = ["ADVICE", "refusal", "watch"]

ADVICE: Final = (
    "Start an enclave in each process, after the fork; docs/deploying.md shows how for gunicorn, "
    "celery, multiprocessing and others."
)


class _Owned(Protocol):
    def _after_fork(self) -> None:
        """Called once in each forked child, before anything else of it runs."""


_owned: weakref.WeakSet[_Owned] = weakref.WeakSet()


def watch(thing: _Owned) -> None:
    """Call ``thing._after_fork()`` in forked children as long as *thing* lives."""
    _owned.add(thing)


def refusal(pid: int) -> EnclaveStateError:
    """Return the error for the use of a handle that belongs to process *pid*."""
    return EnclaveStateError(
        "this handle belongs to the process that started it, not to a forked child",
        expected=f"process {pid}",
        found=f"process {os.getpid()}",
        advice=ADVICE,
    )


def _after_fork() -> None:
    for thing in list(_owned):
        thing._after_fork()  # noqa: SLF001 - of the same package


os.register_at_fork(after_in_child=_after_fork)
