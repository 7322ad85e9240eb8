"""The limits of a pool, and the figures that it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Limits", "PoolStats", "State"]

State = Literal["new", "running", "failed", "draining", "closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    How a pool behaves; all times in seconds.

    Attributes:
        size: Enclaves that are kept.
        max_size: Enclaves that there may be under load.
        warm: Workers that wait ready at the platform, for replacements and fresh enclaves.
        queue: Calls that may wait.
        max_calls: Calls after which an enclave is replaced; None: never.
        max_age: Time after which it is; None: never.
        grow_after: How long a call waits until one more is started.
        shrink_after: How long one more than *size* must have been idle until it is ended.
        health: How often an idle enclave is asked whether it answers.
        stuck_after: How long all threads of an enclave may belong to calls that nobody waits for.
        give_up: Launches that may fail in a row.
        max_fresh: Enclaves of ``enclave(fresh=True)`` at a time.

    """

    size: int = 2
    max_size: int = 2
    warm: int = 1
    queue: int = 1024
    max_calls: int | None = None
    max_age: float | None = None
    grow_after: float = 0.05
    shrink_after: float = 60.0
    health: float = 10.0
    stuck_after: float = 30.0
    give_up: int = 8
    max_fresh: int = 32

    def __post_init__(self) -> None:
        for name in ("size", "max_size", "warm", "queue", "give_up", "max_fresh"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is a number, not {value!r}")
            least = 0 if name in ("warm", "queue", "max_fresh") else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value!r}")
        if self.max_size < self.size:
            raise ValueError(f"max_size must be at least size, not {self.max_size!r}")
        if self.max_calls is not None:
            if isinstance(self.max_calls, bool) or not isinstance(self.max_calls, int):
                raise TypeError(f"max_calls is a number, not {self.max_calls!r}")
            if self.max_calls < 1:
                raise ValueError(f"max_calls must be at least 1, not {self.max_calls!r}")
        for name in ("max_age", "grow_after", "shrink_after", "health", "stuck_after"):
            value = getattr(self, name)
            if value is None and name == "max_age":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is a number of seconds, not {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "grow_after"):
                raise ValueError(f"{name} must be above 0 seconds, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """
    A pool at one moment, and what was counted since it began.

    Attributes:
        state: ``new``, ``running``, ``failed``, ``draining`` or ``closed``.
        enclaves: Enclaves that serve calls.
        idle: Those without a call.
        starting: Enclaves that are being launched.
        fresh: Enclaves of ``enclave(fresh=True)``.
        running: Calls under way in the pool's own enclaves.
        waiting: Calls that wait.
        calls: Calls that ended, however they did; a block of ``enclave()`` is one.
        retried: Calls that were made again, since their enclave was lost before they began.
        refused: Calls that found the queue full.
        launched: Enclaves that were started, fresh ones too.
        lost: Enclaves that ended unasked, fresh ones too.
        recycled: Enclaves that were replaced for their age or number of calls, or ended as
            surplus.
        failures: Launches that failed in a row, or enclaves that ended at once.
        last_error: The latest of those errors; empty if there was none.

    """

    state: str
    enclaves: int
    idle: int
    starting: int
    fresh: int
    running: int
    waiting: int
    calls: int
    retried: int
    refused: int
    launched: int
    lost: int
    recycled: int
    failures: int
    last_error: str
