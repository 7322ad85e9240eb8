"""
The bookkeeping of a pool: which enclaves there are, who waits, what is to be done next.

No threads, no loop, no clock of its own and no I/O: the pool for threads and the pool for asyncio
use the same book and do what it says. Its methods are called under the pool's lock.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pyenclave.calls.stats import QueueStats
from pyenclave.errors import (
    BusyError,
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveError,
    LaunchError,
)

__all__ = ["Book", "Limits", "Member", "Plan", "PoolStats", "Ticket"]

_FIRST_DELAY: Final = 0.05  # seconds after a failure; doubled with each that follows
_LAST_DELAY: Final = 30.0
_SETTLED: Final = 5.0  # seconds that an enclave lives after which its end is no failure to start
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
        running: Calls under way.
        waiting: Calls that wait.
        calls: Calls that ended, however they did.
        retried: Calls that were made again, since their enclave was lost before they began.
        refused: Calls that found the queue full.
        launched: Enclaves that were started.
        lost: Enclaves that ended unasked.
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


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """
    One enclave of a pool.

    Attributes:
        handle: Whatever the pool uses.
        lanes: Its threads.
        late: Asks how many of its threads are busy, given-up calls included.
        started: When it was started.
        running: Calls of the pool that are under way.
        calls: Calls that ended.
        used: When the last one ended.
        asked: When it last showed that it answers.
        stuck: Since when all its threads belong to calls that nobody waits for.
        gave_up: Whether a caller stopped waiting, so that *late* has to be asked.
        owned: Whether somebody has it alone, or the pool asks for its health.
        max_calls: When it is replaced.
        max_age: The same.
        leaving: Whether it takes no new calls.
        lost: Whether it ended unasked.
        views: What the pool keeps for each set of options.

    """

    handle: Any
    lanes: int
    late: Callable[[], int]
    started: float
    running: int = 0
    calls: int = 0
    used: float = 0.0
    asked: float = 0.0
    stuck: float | None = None
    gave_up: bool = False
    owned: bool = False
    max_calls: float = math.inf
    max_age: float = math.inf
    leaving: bool = False
    lost: bool = False
    views: dict[Any, Any] = field(default_factory=dict)

    def free(self) -> int:
        """How many calls it can take."""
        if self.leaving or self.owned:
            return 0
        busy = self.running
        if self.gave_up:
            busy = max(busy, self.late())
            self.gave_up = busy > self.running
        return self.lanes - busy


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """
    Somebody who waits for an enclave.

    Attributes:
        wake: Called when *member* or *error* is set.
        since: When it began.
        alone: Whether the enclave is wanted for nobody else.
        member: What was given.
        error: Why nothing ever will be.

    """

    wake: Callable[[], None]
    since: float
    alone: bool = False
    member: Member | None = None
    error: EnclaveError | None = None


@dataclass(slots=True, kw_only=True)
class Plan:
    """
    What a pool has to do now.

    Attributes:
        launches: How many enclaves to start.
        end: Enclaves to end; they are no members any more.
        ask: Idle members to ask whether they answer; each is owned until ``asked``.
        seconds: When to look again, at the latest.

    """

    launches: int = 0
    end: list[Member] = field(default_factory=list)
    ask: list[Member] = field(default_factory=list)
    seconds: float = 60.0


class Book:
    """
    The bookkeeping of one pool.

    Args:
        limits: How it behaves.
        jitter: Returns a number from 0 to 1 each time.

    """

    def __init__(self, limits: Limits, jitter: Callable[[], float]) -> None:
        self.limits = limits
        self.state: State = "new"
        self.fresh = 0
        self._jitter = jitter
        self._members: list[Member] = []
        self._leaving: list[Member] = []  # they still have calls
        self._done: list[Member] = []  # they have none, and are to be ended
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._target = limits.size
        self._starting = 0
        self._failures = 0
        self._not_before = 0.0
        self._last_error: EnclaveError | None = None
        self.queue = QueueStats(line=self._waiting)
        self._calls = 0
        self._launched = self._lost = self._recycled = 0

    # ---- calls --------------------------------------------------------------------------------

    def check(self) -> None:
        """
        Raise what a new call gets for the pool's state.

        Raises:
            EnclaveClosedError: It was not started, is draining or closed.
            LaunchError: It gave up, and no enclave is left.

        """
        if self.state == "running" or (self.state == "failed" and self._members):
            return
        if self.state == "failed":
            raise self._given_up()
        text = {
            "new": "the pool is not started",
            "draining": "the pool is draining: it takes no new calls",
        }.get(self.state, "the pool was closed")
        advice = "Use it in a `with` block, or call start()." if self.state == "new" else None
        raise EnclaveClosedError(text, advice=advice)

    def _given_up(self) -> LaunchError:
        last = self._last_error
        return LaunchError(
            f"the pool gave up: {self._failures} launches failed in a row",
            found=f"{type(last).__name__}: {last}" if last is not None else "no error",
            advice="Remove the cause, then call restart().",
        )

    def take(self, now: float, *, alone: bool = False) -> Member | None:
        """
        Return an enclave for one more call, or None: one has to wait (:meth:`wait`).

        Raises:
            EnclaveError: As :meth:`check`.

        """
        self.check()
        return None if self._waiting else self._pick(alone=alone)

    def take_fresh(self) -> None:
        """
        Count one more enclave of ``enclave(fresh=True)``; ``fresh`` counts it back.

        Raises:
            BusyError: There are too many.
            EnclaveError: As :meth:`check`.

        """
        self.check()
        if self.fresh >= self.limits.max_fresh:
            self.queue.busy += 1
            raise BusyError(
                "too many fresh enclaves are in use", expected=f"at most {self.limits.max_fresh}"
            )
        self.fresh += 1

    def _pick(self, *, alone: bool) -> Member | None:
        # The one that was used last is warm, and the others grow old enough to be surplus.
        best: Member | None = None
        most = 0
        for member in self._members:
            free = member.free()
            if alone and free < member.lanes:
                continue
            # Idle threads of a busy enclave only where no enclave is idle.
            rank = 2 * member.lanes if free == member.lanes else free
            if free > 0 and (rank > most or (rank == most and best and member.used > best.used)):
                best, most = member, rank
        if best is not None:
            best.running += 1
            best.owned = alone
        return best

    def wait(self, ticket: Ticket) -> None:
        """
        Let somebody wait for an enclave.

        Raises:
            BusyError: Too many wait.

        """
        if len(self._waiting) >= self.limits.queue:
            self.queue.busy += 1
            raise BusyError(
                "too many calls wait for the pool's enclaves",
                expected=f"at most {self.limits.queue}",
                advice="Make the pool larger, or call from fewer.",
            )
        self._waiting.append(ticket)
        self.queue.most_waiting = max(self.queue.most_waiting, len(self._waiting))

    def late(self, ticket: Ticket, now: float) -> CallTimeoutError:
        """Somebody's deadline passed while it waited; return the error."""
        self.forget(ticket, now)
        self.queue.timeouts += 1
        return CallTimeoutError(
            "the deadline passed before an enclave was free",
            advice="The call never began. Allow more time, or make the pool larger.",
        )

    def forget(self, ticket: Ticket, now: float) -> None:
        """Somebody does not wait any more; what was given meanwhile comes back."""
        if ticket.member is not None:
            ticket.member.running -= 1
            ticket.member.owned = False
            self._settle(ticket.member, now)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)

    def give(self, member: Member, now: float, *, gave_up: bool = False) -> None:
        """A call ended. *gave_up*: its caller stopped waiting, and it may go on inside."""
        member.running -= 1
        member.calls += 1
        member.used = now
        member.owned = False
        member.gave_up = member.gave_up or gave_up
        self._calls += 1
        if not gave_up:
            member.asked = now
            if self._failures and self.state == "running":
                self._failures = 0  # it was started, and it works
        self._settle(member, now)

    def _settle(self, member: Member, now: float) -> None:
        if member.calls >= member.max_calls or now - member.started >= member.max_age:
            self._leave(member)
        if member in self._leaving and member.running == 0:
            self._leaving.remove(member)
            self._done.append(member)
        self._hand_out()

    def _leave(self, member: Member) -> None:
        if not member.leaving:
            member.leaving = True
            self._members.remove(member)
            self._leaving.append(member)
            self._recycled += 1

    def again(self) -> None:
        """Count a call that is made again."""
        self.queue.repeated += 1

    def _hand_out(self) -> None:
        while self._waiting:
            member = self._pick(alone=self._waiting[0].alone)
            if member is None:
                return
            ticket = self._waiting.popleft()
            ticket.member = member
            ticket.wake()

    # ---- enclaves -----------------------------------------------------------------------------

    def joined(self, member: Member, now: float) -> bool:
        """An enclave was started; False: it is not wanted any more."""
        self._starting -= 1
        if self.state not in ("running", "failed"):
            return False
        limits = self.limits
        # Not all at once: replacing them would stop the service for a moment.
        if limits.max_calls is not None:
            member.max_calls = limits.max_calls * (1 + self._jitter() / 10)
        if limits.max_age is not None:
            member.max_age = limits.max_age * (1 + self._jitter() / 10)
        member.used = member.asked = now
        self._launched += 1
        self._members.append(member)
        self._hand_out()
        return True

    def failed(self, error: EnclaveError, now: float) -> None:
        """An enclave could not be started."""
        self._starting -= 1
        self.queue.launch_failures += 1
        self._fail(error, now)

    def _fail(self, error: EnclaveError, now: float) -> None:
        self._failures += 1
        self._last_error = error
        delay = min(_LAST_DELAY, _FIRST_DELAY * 2.0 ** min(self._failures - 1, 16))
        self._not_before = now + delay * (0.75 + self._jitter() / 2)
        if self._failures >= self.limits.give_up and self.state == "running":
            self.state = "failed"
        if self.state == "failed" and not self._members:
            self._refuse_all(self._given_up)

    def lost(self, member: Member, error: EnclaveError, now: float) -> bool:
        """An enclave ended unasked; True: it was not known before."""
        if member.lost:
            return False
        if member in self._members:
            self._members.remove(member)
        elif member in self._leaving:
            self._leaving.remove(member)
        else:
            return False
        member.leaving = member.lost = True
        self._lost += 1
        # Its calls hear for themselves what became of it, before the handle is closed.
        (self._leaving if member.running else self._done).append(member)
        if now - member.started < _SETTLED and not member.calls:
            self._fail(error, now)
        else:
            self._last_error = error
            if self.state == "failed" and not self._members:
                self._refuse_all(self._given_up)
        return True

    def asked(self, member: Member, now: float, *, answered: bool) -> None:
        """Health was asked for; what does not answer is ended."""
        member.owned = False
        if answered:
            member.asked = now
            self._settle(member, now)
        elif member in self._members:
            self._members.remove(member)
            member.leaving = True
            self._lost += 1
            self._done.append(member)

    def restart(self) -> None:
        """Try again after giving up."""
        if self.state == "failed":
            self.state = "running"
            self._failures = 0
            self._not_before = 0.0

    # ---- what to do ---------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """Return what is to be done now; it counts as begun."""
        plan = Plan()
        self._retire(now, plan)
        if self.state == "running":
            self._grow(now, plan)
            missing = self._target - len(self._members) - self._starting
            if missing > 0 and now >= self._not_before:
                # After failures one by one: each is a trial.
                plan.launches = 1 if self._failures else missing
                self._starting += plan.launches
            elif missing > 0:
                plan.seconds = min(plan.seconds, self._not_before - now)
        plan.end, self._done = self._done, []
        return plan

    def _retire(self, now: float, plan: Plan) -> None:
        limits = self.limits
        surplus = len(self._members) - limits.size
        for member in sorted(self._members, key=lambda item: item.used):
            if member.running or member.owned:
                # When it ends nobody says so: look again after the shortest time that counts.
                later = limits.shrink_after if surplus > 0 else limits.health
                plan.seconds = min(plan.seconds, max(0.01, later))
                continue
            if member.gave_up:
                member.free()
            if member.gave_up:
                member.stuck = member.stuck if member.stuck is not None else now
                left = member.stuck + limits.stuck_after - now
                if member.late() >= member.lanes and left <= 0:
                    self._leave(member)
                    self._leaving.remove(member)
                    self._done.append(member)
                else:
                    plan.seconds = min(plan.seconds, max(0.01, min(left, 0.1)))
                continue
            member.stuck = None
            old = now - member.started >= member.max_age
            unused = surplus > 0 and now - member.used >= limits.shrink_after
            if old or unused:
                if unused and not old:
                    self._target = max(limits.size, self._target - 1)
                    surplus -= 1
                self._leave(member)
                self._leaving.remove(member)
                self._done.append(member)
            elif now - member.asked >= limits.health and self.state in ("running", "failed"):
                member.owned = True
                plan.ask.append(member)
            else:
                plan.seconds = min(
                    plan.seconds,
                    member.asked + limits.health - now,
                    member.started + member.max_age - now,
                    member.used + limits.shrink_after - now if surplus > 0 else math.inf,
                )
        if self._waiting:
            self._hand_out()  # threads may be free whose callers had given up

    def _grow(self, now: float, plan: Plan) -> None:
        if not self._waiting or self._target >= self.limits.max_size:
            return
        if self._starting or len(self._members) < self._target:
            return  # one is coming
        left = self._waiting[0].since + self.limits.grow_after - now
        if left <= 0:
            self._target += 1
            left = self.limits.grow_after
        plan.seconds = min(plan.seconds, max(0.001, left))

    # ---- the end ------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new calls; those that wait are refused."""
        if self.state in ("new", "running", "failed"):
            self.state = "draining"
            self._refuse_all(
                lambda: EnclaveClosedError("the pool is draining: it takes no new calls")
            )

    def close(self) -> list[Member]:
        """End: return every enclave, which the caller ends."""
        self.state = "closed"
        self._refuse_all(lambda: EnclaveClosedError("the pool was closed"))
        members = [*self._members, *self._leaving, *self._done]
        for member in members:
            member.leaving = True
        self._members, self._leaving, self._done = [], [], []
        return members

    def _refuse_all(self, error: Callable[[], EnclaveError]) -> None:
        while self._waiting:
            ticket = self._waiting.popleft()
            ticket.error = error()
            ticket.wake()

    @property
    def members(self) -> tuple[Member, ...]:
        """The enclaves that live, leaving ones included."""
        return (*self._members, *(member for member in self._leaving if not member.lost))

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self.fresh > 0 or any(member.running for member in (*self._members, *self._leaving))

    def stats(self) -> PoolStats:
        """Return the figures."""
        members = self.members
        return PoolStats(
            state=self.state,
            enclaves=len(members),
            idle=sum(not member.running for member in self._members),
            starting=self._starting,
            fresh=self.fresh,
            running=sum(member.running for member in members),
            waiting=len(self._waiting),
            calls=self._calls,
            retried=self.queue.repeated,
            refused=self.queue.busy,
            launched=self._launched,
            lost=self._lost,
            recycled=self._recycled,
            failures=self._failures,
            last_error="" if self._last_error is None else str(self._last_error),
        )
