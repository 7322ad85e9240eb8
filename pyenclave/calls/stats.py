"""
What is known of the calls of this process's enclaves: counters made in C, read here.

The host registers each launch; whoever exports figures (``pyenclave.telemetry``) asks for all of
them. What a launch counted is kept when its handle is gone, summed up by the enclave's name, so
that a total never goes back. Names and functions are bounded: whatever is beyond is one "(other)".
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol, Self

from pyenclave._core import STATS_BOUNDS, STATS_SAMPLE, CallStats
from pyenclave._locks import Lock

__all__ = [
    "MAX_FUNCTIONS",
    "MAX_NAMES",
    "OTHER",
    "EnclaveStats",
    "FunctionStats",
    "Latency",
    "Launch",
    "NameTotals",
    "QueueStats",
    "Registry",
    "registry",
]

MAX_NAMES: Final = 64  # names of enclaves that are told apart
MAX_FUNCTIONS: Final = 128  # functions of one name that are told apart
OTHER: Final = "(other)"
_ENDS: Final = ("closed", "lost", "poisoned")
_FAILURES: Final = ("arguments", "busy", "timeouts", "lost", "poisoned")
_BUCKETS: Final = len(STATS_BOUNDS) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """
    How long calls took, from what was measured of one in 64.

    Attributes:
        samples: Calls that were timed.
        seconds: What they took together.
        counts: How many of them fell into each bucket; see :meth:`buckets`.

    """

    samples: int = 0
    seconds: float = 0.0
    counts: tuple[int, ...] = field(default=(0,) * _BUCKETS, repr=False)

    @property
    def mean(self) -> float | None:
        """Seconds of a timed call on average; None: none was timed."""
        return self.seconds / self.samples if self.samples else None

    def quantile(self, share: float) -> float | None:
        """
        Estimate a quantile in seconds, by a straight line through the bucket that it falls into.

        The true value of the timed calls lies in the same bucket: at most 25 % away.

        Args:
            share: 0.5 for the median.

        Raises:
            ValueError: *share* is not within 0 and 1.

        """
        if not 0 <= share <= 1:
            raise ValueError(f"a quantile is between 0 and 1, not {share!r}")
        if not self.samples:
            return None
        wanted = share * sum(self.counts)
        below = 0
        for number, count in enumerate(self.counts):
            if count and below + count >= wanted:
                low = STATS_BOUNDS[number - 1] if number else 0
                high = STATS_BOUNDS[min(number, len(STATS_BOUNDS) - 1)]
                return (low + (high - low) * max(0.0, wanted - below) / count) / 1e9
            below += count
        return STATS_BOUNDS[-1] / 1e9

    @property
    def p50(self) -> float | None:
        """The median, estimated."""
        return self.quantile(0.5)

    @property
    def p99(self) -> float | None:
        """What 99 of 100 calls did not exceed, estimated."""
        return self.quantile(0.99)

    def buckets(self) -> Iterator[tuple[float, int]]:
        """Give each upper bound in seconds and how many timed calls were at or below it."""
        total = 0
        for bound, count in zip(STATS_BOUNDS, self.counts, strict=False):
            total += count
            yield bound / 1e9, total
        yield float("inf"), sum(self.counts)

    def __add__(self, other: Latency) -> Latency:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Latency(
            samples=self.samples + other.samples,
            seconds=self.seconds + other.seconds,
            counts=counts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for people and JSON: estimates, without the buckets."""
        return {
            "samples": self.samples,
            "sampled_one_in": STATS_SAMPLE,
            "mean": self.mean,
            "p50": self.p50,
            "p99": self.p99,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionStats:
    """
    What was counted of one trusted function.

    Attributes:
        name: Its name; "(other)" for those beyond what is told apart.
        calls: Calls that were sent.
        raised: Calls whose function raised, or answered a status.
        refused: Calls that were answered without entering the function.
        bytes_in: Bytes of requests, encoded.
        bytes_out: Bytes of answers, encoded.
        latency: Of the calls that were timed.

    """

    name: str
    calls: int = 0
    raised: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    latency: Latency = field(default_factory=Latency)

    @classmethod
    def read(cls, name: str, counts: CallStats, index: int) -> Self:
        """Read the counters of the function number *index*."""
        calls, raised, refused, bytes_in, bytes_out, samples, nanoseconds, found = counts.read(
            index
        )
        return cls(
            name=name,
            calls=calls,
            raised=raised,
            refused=refused,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            latency=Latency(samples=samples, seconds=nanoseconds / 1e9, counts=found),
        )

    def __add__(self, other: FunctionStats) -> FunctionStats:
        return FunctionStats(
            name=self.name,
            calls=self.calls + other.calls,
            raised=self.raised + other.raised,
            refused=self.refused + other.refused,
            bytes_in=self.bytes_in + other.bytes_in,
            bytes_out=self.bytes_out + other.bytes_out,
            latency=self.latency + other.latency,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON has."""
        return {
            "name": self.name,
            "calls": self.calls,
            "raised": self.raised,
            "refused": self.refused,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "latency": self.latency.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveStats:
    """
    What was counted of one launch of an enclave.

    Each counter is exact; they are read one after the other, so that two of them may be a few
    calls apart while calls are made.

    Attributes:
        name: The enclave's name.
        since: When counting began, in seconds since the epoch.
        state: ``running``, ``closed``, ``lost`` or ``poisoned``, as far as a call has found out.
        calls: Calls that were sent.
        raised: Calls whose function raised.
        refused: Calls answered without entering a function (its arguments did not fit inside).
        arguments: Calls that never crossed, because an argument does not fit the signature.
        busy: Calls refused because too many waited.
        timeouts: Calls whose deadline passed.
        lost: Calls under way when the worker ended.
        poisoned: Calls under way when the protocol was broken.
        bytes_in: Bytes of requests, encoded.
        bytes_out: Bytes of answers, encoded.
        late: Threads of the enclave that still run a call whose caller gave up.
        waiting: Calls that wait for a thread now.
        most_waiting: Most calls that ever waited at the same time.
        latency: Of the calls that were timed, one in 64.
        functions: The same by function; only those that were called.

    """

    name: str
    since: float
    state: str
    calls: int
    raised: int
    refused: int
    arguments: int
    busy: int
    timeouts: int
    lost: int
    poisoned: int
    bytes_in: int
    bytes_out: int
    late: int
    waiting: int
    most_waiting: int
    latency: Latency
    functions: tuple[FunctionStats, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON has."""
        plain = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("latency", "functions")
        }
        plain["latency"] = self.latency.to_dict()
        plain["functions"] = [item.to_dict() for item in self.functions]
        return plain


class Lanes(Protocol):
    """What the lanes of a launch say of themselves; ``_core.HostLanes``."""

    @property
    def stats(self) -> CallStats:
        """The counters, which outlive the lanes."""

    @property
    def late_lanes(self) -> int:
        """Lanes that still run a call whose caller gave up."""

    @property
    def queued(self) -> int:
        """Calls that wait for a lane."""


class Launch:
    """
    One launch as the registry knows it.

    Args:
        name: The enclave's name.
        functions: Names by index.
        threads: Calls that run at the same time.
        lanes: Where its calls go; held weakly.

    Attributes:
        state: ``running``, ``closed``, ``lost`` or ``poisoned``; the launch keeps it up.

    """

    def __init__(self, name: str, functions: Sequence[str], threads: int, lanes: Lanes) -> None:
        self.name = name
        self.functions = tuple(functions)
        self.threads = threads
        self.counts = lanes.stats
        self.since = time.time()
        self.state = "running"
        self._lanes = weakref.ref(lanes)

    def by_function(self) -> tuple[FunctionStats, ...]:
        """Return the counters of each function that was called."""
        own = min(len(self.counts), len(self.functions))
        names = [*self.functions[:own], OTHER]
        indexes = [*range(own), len(self.counts)]
        read = (
            FunctionStats.read(name, self.counts, index)
            for name, index in zip(names, indexes, strict=True)
        )
        return tuple(item for item in read if item.calls)

    def stats(self) -> EnclaveStats:
        """Return everything."""
        functions = self.by_function()
        total = sum(functions, start=FunctionStats(name=""))
        arguments, busy, timeouts, lost, poisoned, most = self.counts.events()
        lanes = self._lanes()
        return EnclaveStats(
            name=self.name,
            since=self.since,
            state=self.state,
            calls=total.calls,
            raised=total.raised,
            refused=total.refused,
            arguments=arguments,
            busy=busy,
            timeouts=timeouts,
            lost=lost,
            poisoned=poisoned,
            bytes_in=total.bytes_in,
            bytes_out=total.bytes_out,
            late=0 if lanes is None else lanes.late_lanes,
            waiting=0 if lanes is None else lanes.queued,
            most_waiting=most,
            latency=total.latency,
            functions=functions,
        )


@dataclass(slots=True, kw_only=True)
class QueueStats:
    """
    What a pool counted of calls that no enclave ever saw; the pool keeps it up.

    Attributes:
        name: The enclaves' name.
        line: Who waits now.
        busy: Calls refused because too many waited.
        timeouts: Calls whose deadline passed while they waited for an enclave.
        repeated: Calls made again, because their enclave was lost before they began.
        launch_failures: Enclaves that could not be launched.
        most_waiting: Most calls that ever waited at the same time.

    """

    name: str = ""
    line: Sized = ()
    busy: int = 0
    timeouts: int = 0
    repeated: int = 0
    launch_failures: int = 0
    most_waiting: int = 0


@dataclass(slots=True, kw_only=True)
class NameTotals:
    """All launches and pools of one name in this process: those that are gone and those there."""

    launches: int = 0
    launch_failures: int = 0
    repeated: int = 0
    running: int = 0
    threads: int = 0
    late: int = 0
    waiting: int = 0
    most_waiting: int = 0
    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_ENDS, 0))
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_FAILURES, 0))
    functions: dict[str, FunctionStats] = field(default_factory=dict)

    def add(self, launch: Launch) -> None:
        """Add one launch."""
        stats = launch.stats()
        self.launches += 1
        if stats.state == "running":
            self.running += 1
            self.threads += launch.threads
            self.late += stats.late
            self.waiting += stats.waiting
        else:
            self.ended[stats.state] += 1
        self.most_waiting = max(self.most_waiting, stats.most_waiting)
        for reason in _FAILURES:
            self.failures[reason] += getattr(stats, reason)
        self._add_functions(stats.functions)

    def add_queue(self, queue: QueueStats) -> None:
        """Add what a pool counted."""
        self.launch_failures += queue.launch_failures
        self.repeated += queue.repeated
        self.waiting += len(queue.line)
        self.most_waiting = max(self.most_waiting, queue.most_waiting)
        self.failures["busy"] += queue.busy
        self.failures["timeouts"] += queue.timeouts

    def merge(self, other: NameTotals) -> None:
        """Add the totals of other launches."""
        self.launches += other.launches
        self.launch_failures += other.launch_failures
        self.repeated += other.repeated
        self.running += other.running
        self.threads += other.threads
        self.late += other.late
        self.waiting += other.waiting
        self.most_waiting = max(self.most_waiting, other.most_waiting)
        for how, number in other.ended.items():
            self.ended[how] += number
        for reason, number in other.failures.items():
            self.failures[reason] += number
        self._add_functions(other.functions.values())

    def _add_functions(self, functions: Iterable[FunctionStats]) -> None:
        for item in functions:
            known = item.name in self.functions or len(self.functions) < MAX_FUNCTIONS
            name = item.name if known else OTHER
            before = self.functions.get(name) or FunctionStats(name=name)
            self.functions[name] = before + item


_GRAVES = 8  # launches that are gone, and are looked at later


class Registry:
    """The launches and pools of this process. Thread-safe; a forked child begins with none."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._launches: dict[int, Launch] = {}
        self._queues: dict[int, QueueStats] = {}
        self._gone: dict[str, NameTotals] = {}
        # A finalizer runs anywhere, even in a thread that holds the lock: it only says so here.
        self._dead: deque[int] = deque()
        self._number = 0

    def add(self, launch: Launch, owner: object) -> None:
        """Know *launch* from now on; when *owner* is gone, keep what it had counted."""
        with self._lock:
            if len(self._dead) >= _GRAVES:  # whoever launches waits for it
                self._bury()
            self._number += 1
            self._launches[self._number] = launch
            finalizer = weakref.finalize(owner, self._dead.append, self._number)
        finalizer.atexit = False

    def add_queue(self, queue: QueueStats, owner: object) -> None:
        """Know a pool's *queue* from now on; when *owner* is gone, keep what it had counted."""
        with self._lock:
            self._bury()
            self._number += 1
            self._queues[self._number] = queue
            finalizer = weakref.finalize(owner, self._dead.append, self._number)
        finalizer.atexit = False

    def _bury(self) -> None:
        while self._dead:
            number = self._dead.popleft()
            queue = self._queues.pop(number, None)
            if queue is not None:
                queue.line = ()  # nobody waits for a pool that is gone
                self._of(self._gone, queue.name).add_queue(queue)
            launch = self._launches.pop(number, None)
            if launch is not None:
                if launch.state == "running":
                    launch.state = "closed"  # nobody closed it, but its handle is gone
                self._of(self._gone, launch.name).add(launch)

    @staticmethod
    def _of(totals: dict[str, NameTotals], name: str) -> NameTotals:
        if name not in totals and len(totals) >= MAX_NAMES:
            name = OTHER
        return totals.setdefault(name, NameTotals())

    def launches(self) -> tuple[Launch, ...]:
        """Return the launches whose handles there are."""
        with self._lock:
            self._bury()
            return tuple(self._launches.values())

    def totals(self) -> dict[str, NameTotals]:
        """Return what all launches counted, by the names of their enclaves."""
        found: dict[str, NameTotals] = {}
        with self._lock:
            self._bury()
            for name, gone in self._gone.items():
                self._of(found, name).merge(gone)
            for launch in self._launches.values():
                self._of(found, launch.name).add(launch)
            for queue in self._queues.values():
                self._of(found, queue.name).add_queue(queue)
        return found

    def forget(self) -> None:
        """Know of nothing (a forked child; tests)."""
        self._lock = Lock()  # another thread may have held it when this child was made
        self._launches = {}
        self._queues = {}
        self._gone = {}
        self._dead = deque()


registry: Final = Registry()
os.register_at_fork(after_in_child=registry.forget)
