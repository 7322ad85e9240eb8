"""
The bookkeeping of a pool: which enclaves there are, who waits, what is to be done next.

No threads, no loop, no clock of its own and no I/O: the pool for threads and the pool for asyncio
use the same book and do what it says. Its methods are called under the pool's lock.

A place in an enclave is the ticket's that got it, until the ticket is given or forgotten; either
may be done twice. Ctrl-C may interrupt Python code at any call: so a ticket gets its place by
statements without one, and whoever holds the ticket can always give it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from pyenclave.calls.stats import QueueStats
from pyenclave.errors import (
    BusyError,
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveError,
    LaunchError,
)
from pyenclave.host._limits import Limits, PoolStats, State

__all__ = ["Book", "Member", "Plan", "Ticket"]

_FIRST_DELAY: Final = 0.05  # seconds after a failure; doubled with each that follows
_LAST_DELAY: Final = 30.0
_SETTLED: Final = 5.0  # seconds that an enclave lives after which its end is no failure to start


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
        health: Seconds without a sign of life after which it is asked for one.
        leaving: Whether it takes no new calls.
        lost: Whether it ended unasked.
        failed: Whether it did before it was of any use.
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
    health: float = math.inf
    leaving: bool = False
    lost: bool = False
    failed: bool = False
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
    Somebody who wants a place in an enclave, waits for one, or has it.

    Attributes:
        alone: Whether the enclave is wanted for nobody else.
        wake: Called when *member* or *error* is set, if it had to wait.
        since: When it began to wait.
        member: The enclave that was given.
        error: Why none ever will be.

    """

    alone: bool = False
    wake: Callable[[], None] | None = None
    since: float = math.inf
    member: Member | None = None
    error: EnclaveError | None = None

    @property
    def waits(self) -> bool:
        """Whether neither is known yet."""
        return self.member is None and self.error is None


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
        self.ending = False  # no new calls, whatever the state: the process was told to end
        self._jitter = jitter
        # In the order of use: the one that was used last is warm, and the others grow old enough
        # to be surplus. Sets of dicts: what is looked for among many is found at once.
        self._members: dict[Member, None] = {}
        self._leaving: dict[Member, None] = {}  # they still have calls
        self._done: list[Member] = []  # they have none, and are to be ended
        self._waiting: dict[Ticket, None] = {}
        self._kept: dict[Ticket, object] = {}
        self._fresh: dict[object, Any] = {}
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
        state = "draining" if self.ending and self.state != "closed" else self.state
        if state == "running" or (state == "failed" and self._members):
            return
        if state == "failed":
            raise self._given_up()
        text = {
            "new": "the pool is not started",
            "draining": "the pool is draining: it takes no new calls",
        }.get(state, "the pool was closed")
        advice = "Use it in a `with` block, or call start()." if state == "new" else None
        raise EnclaveClosedError(text, advice=advice)

    def _given_up(self) -> LaunchError:
        last = self._last_error
        return LaunchError(
            f"the pool gave up: {self._failures} launches failed in a row",
            found=f"{type(last).__name__}: {last}" if last is not None else "no error",
            advice="Remove the cause, then call restart().",
        )

    def take(self, ticket: Ticket) -> bool:
        """
        Give a place in an enclave to *ticket*; False: it waits for one, in its turn.

        Raises:
            BusyError: Too many wait.
            EnclaveError: As :meth:`check`.

        """
        self.check()
        if not self._waiting:
            member = self._pick(alone=ticket.alone)
            if member is not None:
                ticket.member = member
                member.running += 1
                member.owned = ticket.alone
                return True
        if len(self._waiting) >= self.limits.queue:
            self.queue.busy += 1
            raise BusyError(
                "too many calls wait for the pool's enclaves",
                expected=f"at most {self.limits.queue}",
                advice="Make the pool larger, or call from fewer.",
            )
        self._waiting[ticket] = None
        self.queue.most_waiting = max(self.queue.most_waiting, len(self._waiting))
        return False

    def _pick(self, *, alone: bool) -> Member | None:
        # Idle threads of a busy enclave only where no enclave is idle.
        best, most = None, 0
        for member in reversed(self._members):
            free = member.free()
            if free == member.lanes:
                return member
            if free > most and not alone:
                best, most = member, free
        return best

    def late(self, ticket: Ticket, now: float) -> CallTimeoutError:
        """Somebody's deadline passed while it waited; return the error."""
        self.forget(ticket, now)
        self.queue.timeouts += 1
        return CallTimeoutError(
            "the deadline passed before an enclave was free",
            advice="The call never began. Allow more time, or make the pool larger.",
        )

    def forget(self, ticket: Ticket, now: float) -> None:
        """Somebody does not want a place any more, or did not use it."""
        self._waiting.pop(ticket, None)
        member = ticket.member
        if member is not None:
            ticket.member = None
            member.running -= 1
            member.owned = False
            self._settle(member, now)

    def give(
        self, ticket: Ticket, now: float, *, answered: bool = False, gave_up: bool = False
    ) -> None:
        """
        A call ended, or whatever else had a place.

        Args:
            ticket: Its ticket.
            now: The time.
            answered: The enclave answered, if only by an error of the function.
            gave_up: The caller stopped waiting, and the call may go on inside.

        """
        member = ticket.member
        if member is None:
            self._waiting.pop(ticket, None)
            return
        ticket.member = None
        member.running -= 1
        member.calls += 1
        member.used = now
        member.owned = False
        member.gave_up = member.gave_up or gave_up
        self._calls += 1
        self._kept.pop(ticket, None)
        if member in self._members:
            del self._members[member]
            self._members[member] = None
        if answered and not member.lost:
            self._works(member, now)
        self._settle(member, now)

    def _works(self, member: Member, now: float) -> None:
        member.asked = now
        if self._failures and self.state == "running":
            self._failures = 0

    def _settle(self, member: Member, now: float) -> None:
        if member.calls >= member.max_calls or now - member.started >= member.max_age:
            self._leave(member)
        if member.running == 0 and member in self._leaving:
            del self._leaving[member]
            self._done.append(member)
        self._hand_out()

    def _leave(self, member: Member) -> None:
        if not member.leaving:
            member.leaving = True
            del self._members[member]
            self._leaving[member] = None
            self._recycled += 1

    def keep(self, ticket: Ticket, who: object) -> None:
        """Note that *who* has a place for longer than one call takes."""
        self._kept[ticket] = who

    def waits_for_itself(self, who: object) -> bool:
        """Whether *who* has every place that there will ever be: to wait for one is for ever."""
        if self._starting or self._target < self.limits.max_size or not self._members:
            return False
        mine: dict[Member, int] = {}
        for ticket, owner in self._kept.items():
            if owner == who and ticket.member is not None:
                all_of_it = ticket.member.lanes if ticket.alone else 1
                mine[ticket.member] = mine.get(ticket.member, 0) + all_of_it
        return all(mine.get(member, 0) >= member.lanes for member in self._members)

    def again(self) -> None:
        """Count a call that is made again."""
        self.queue.repeated += 1

    def _hand_out(self) -> None:
        while self._waiting:
            ticket = next(iter(self._waiting))
            member = self._pick(alone=ticket.alone)
            if member is None:
                return
            del self._waiting[ticket]
            ticket.member = member
            member.running += 1
            member.owned = ticket.alone
            _wake(ticket)

    # ---- fresh enclaves -----------------------------------------------------------------------

    def take_fresh(self, token: object) -> None:
        """
        Count one more enclave of ``enclave(fresh=True)``, until :meth:`end_fresh`.

        Raises:
            BusyError: There are too many.
            EnclaveError: As :meth:`check`.

        """
        self.check()
        if len(self._fresh) >= self.limits.max_fresh:
            self.queue.busy += 1
            raise BusyError(
                "too many fresh enclaves are in use", expected=f"at most {self.limits.max_fresh}"
            )
        self._fresh[token] = None

    def fresh_started(self, token: object, handle: Any) -> None:
        """
        Note the enclave, which ends with the pool if it does not before.

        Raises:
            EnclaveClosedError: The pool was closed meanwhile.

        """
        if self.state == "closed":
            self.check()
        self._fresh[token] = handle
        self._launched += 1

    def end_fresh(
        self,
        token: object,
        *,
        refused: bool = False,
        lost: bool = False,
        error: EnclaveError | None = None,
    ) -> None:
        """
        It is over. May be called twice: the first time counts.

        Args:
            token: As for :meth:`take_fresh`.
            refused: The platform started none, which may be known only now.
            lost: It ended unasked.
            error: Why.

        """
        if token not in self._fresh:
            return
        started = self._fresh.pop(token) is not None
        if refused:
            self._launched -= started
            self.queue.launch_failures += 1
        elif started:
            self._calls += 1
            self._lost += lost
        if (refused or lost) and error is not None:
            self._last_error = error

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
        member.health = limits.health * (0.9 + self._jitter() / 5)
        member.used = member.asked = now
        self._launched += 1
        self._members[member] = None
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

    def lost(
        self, member: Member, error: EnclaveError, now: float, *, began: bool | None = False
    ) -> bool:
        """
        An enclave ended unasked.

        Args:
            member: The enclave.
            error: Why.
            now: The time.
            began: Whether a call had begun, whose doing it may be: the enclave had started well.
                None: that is not known, and each of its calls will say.

        Returns:
            Whether the end was not known before.

        """
        known = member.lost
        if not known:
            if member not in self._members and member not in self._leaving:
                return False
            self._members.pop(member, None)
            self._leaving.pop(member, None)
            member.leaving = member.lost = True
            self._lost += 1
            # Its calls hear for themselves what became of it, before the handle is closed.
            if member.running:
                self._leaving[member] = None
            else:
                self._done.append(member)
        young = now - member.started < _SETTLED and not member.calls
        if began is False and young and not member.failed:
            member.failed = True
            self._fail(error, now)
        elif not known:
            self._last_error = error
            if self.state == "failed" and not self._members:
                self._refuse_all(self._given_up)
        return not known

    def asked(self, member: Member, now: float, *, answered: bool) -> None:
        """Health was asked for; what does not answer is ended."""
        member.owned = False
        if answered:
            self._works(member, now)
            self._settle(member, now)
        elif member in self._members:
            del self._members[member]
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
                    del self._leaving[member]
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
                del self._leaving[member]
                self._done.append(member)
            elif now - member.asked >= member.health and self.state in ("running", "failed"):
                member.owned = True
                plan.ask.append(member)
            else:
                plan.seconds = min(
                    plan.seconds,
                    member.asked + member.health - now,
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
        left = next(iter(self._waiting)).since + self.limits.grow_after - now
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

    def close(self) -> list[Any]:
        """End: return the handle of every enclave, fresh ones too, which the caller ends."""
        self.state = "closed"
        self._refuse_all(lambda: EnclaveClosedError("the pool was closed"))
        members = [*self._members, *self._leaving, *self._done]
        for member in members:
            member.leaving = True
        fresh = [handle for handle in self._fresh.values() if handle is not None]
        self._members, self._leaving, self._done = {}, {}, []
        return [*(member.handle for member in members), *fresh]

    def _refuse_all(self, error: Callable[[], EnclaveError]) -> None:
        while self._waiting:
            ticket = next(iter(self._waiting))
            del self._waiting[ticket]
            ticket.error = error()
            _wake(ticket)

    @property
    def members(self) -> tuple[Member, ...]:
        """The enclaves that live, leaving ones included."""
        return (*self._members, *(member for member in self._leaving if not member.lost))

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self._fresh) or any(
            member.running for member in (*self._members, *self._leaving)
        )

    def stats(self) -> PoolStats:
        """Return the figures."""
        members = self.members
        return PoolStats(
            state=self.state,
            enclaves=len(members),
            idle=sum(not member.running for member in self._members),
            starting=self._starting,
            fresh=len(self._fresh),
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


def _wake(ticket: Ticket) -> None:
    wake = ticket.wake
    if wake is not None:  # else it was interrupted before it could wait
        wake()
