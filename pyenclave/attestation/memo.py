"""
Checks whose outcome is remembered, because nothing they saw has changed.

Most checks of a vendor's collateral come out the same for every quote of a fleet, until something
expires. A `Block` of such checks runs on a *reduced case*, which holds nothing but what is in the
block's key, so that a remembered outcome cannot depend on anything else; and at a `Moment`, which
notes what it is compared with, so that the outcome is used only for times at which every
comparison comes out the same. Only blocks in which nothing refuses are remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from pyenclave._locks import Lock

if TYPE_CHECKING:
    from pyenclave.attestation.result import Check

__all__ = [
    "MEMORY",
    "Block",
    "Memory",
    "Moment",
    "Remembered",
    "clear",
    "find",
    "keep",
    "remembered",
]

Case = TypeVar("Case")

_OWN: Final = frozenset(("earliest", "latest", "steady", "__class__"))


class Moment(datetime):
    """
    A time that notes between which times all comparisons with it come out as they did.

    Attributes:
        earliest: From when, included; None: any time before.
        latest: Until when, included; None: any time after.
        steady: False as soon as it was used in a way of which that cannot be said.
    """

    earliest: datetime | None
    latest: datetime | None
    steady: bool

    @classmethod
    def of(cls, at: datetime) -> Moment:
        """Return the time *at*."""
        made = cls.combine(at.date(), at.time(), at.tzinfo)
        made.earliest = made.latest = None
        made.steady = True
        return made

    def _from(self, other: datetime) -> None:
        if self.earliest is None or datetime.__gt__(other, self.earliest):
            self.earliest = other

    def _until(self, other: datetime) -> None:
        if self.latest is None or datetime.__lt__(other, self.latest):
            self.latest = other

    # A comparison of ``other <= self`` comes here first, too, as this is a subclass.

    def __ge__(self, other: Any) -> bool:
        holds = datetime.__ge__(self, other)
        if holds is True:
            self._from(other)
        else:
            self.steady = False
        return holds

    def __le__(self, other: Any) -> bool:
        holds = datetime.__le__(self, other)
        if holds is True:
            self._until(other)
        else:
            self.steady = False
        return holds

    def __lt__(self, other: Any) -> bool:
        holds = datetime.__lt__(self, other)
        if holds is False:
            self._from(other)
        else:
            self.steady = False
        return holds

    def __gt__(self, other: Any) -> bool:
        holds = datetime.__gt__(self, other)
        if holds is False:
            self._until(other)
        else:
            self.steady = False
        return holds

    def __eq__(self, other: object) -> bool:
        self.steady = False
        return datetime.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self.steady = False
        return datetime.__ne__(self, other)

    def __repr__(self) -> str:
        self.steady = False
        return datetime.__repr__(self)

    def __hash__(self) -> int:
        self.steady = False
        return datetime.__hash__(self)

    def __add__(self, other: Any) -> Any:
        self.steady = False
        return datetime.__add__(self, other)

    def __sub__(self, other: Any) -> Any:
        self.steady = False
        return datetime.__sub__(self, other)

    def __rsub__(self, other: Any) -> Any:
        self.steady = False
        return datetime.__sub__(other, self)

    __radd__ = __add__

    def __getattribute__(self, name: str) -> Any:
        if name not in _OWN and name not in ("_from", "_until"):
            object.__setattr__(self, "steady", False)
        return object.__getattribute__(self, name)


@dataclass(frozen=True, slots=True, eq=False)
class Block(Generic[Case]):
    """
    Checks that are remembered together.

    Attributes:
        names: The checks.
        key: Gives everything that they depend on besides the time; None: not this time.
        reduce: Gives the case with nothing but that, and with the time that is given.
        given: Parts that `reduce` puts into the case; the others are handed to the real one.
    """

    names: frozenset[str]
    key: Callable[[Case], Hashable | None]
    reduce: Callable[[Case, Moment], Case]
    given: frozenset[str]


@dataclass(frozen=True, slots=True)
class Remembered:
    """How the checks of a block came out, from when until when, and the parts that they read."""

    checks: tuple[tuple[Check, ...], ...]
    earliest: datetime | None
    latest: datetime | None
    parts: dict[str, object]

    def holds_at(self, at: datetime) -> bool:
        """Whether every comparison of times comes out the same at *at*."""
        early, late = self.earliest, self.latest
        return (early is None or early <= at) and (late is None or at <= late)


def _size(key: object) -> int:
    """Return how many bytes *key* keeps alive, roughly."""
    if isinstance(key, bytes):
        return len(key)
    if isinstance(key, tuple | frozenset):
        return sum(_size(item) for item in key)
    return 64


class Memory:
    """
    A bounded store of blocks; the oldest leave first. Threads may share it.

    Args:
        max_items: How many there may be.
        max_bytes: How many bytes all keys may have.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._entries: dict[Hashable, tuple[Remembered, int]] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, at: datetime) -> Remembered | None:
        """Return what is remembered of *key* and holds at *at*."""
        found = self._entries.get(key)
        return found[0] if found is not None and found[0].holds_at(at) else None

    def keep(self, key: Hashable, value: Remembered) -> None:
        """Remember *value*, in place of an older one."""
        size = _size(key)
        if size > self._max_bytes:
            return
        with self._lock:
            self._drop(key)
            self._entries[key] = value, size
            self._size += size
            while len(self._entries) > self._max_items or self._size > self._max_bytes:
                self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        gone = self._entries.pop(key, None)
        if gone is not None:
            self._size -= gone[1]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._size = 0


MEMORY: Final = Memory(max_items=256, max_bytes=16 << 20)
find = MEMORY.find
keep = MEMORY.keep
clear = MEMORY.clear


def remembered(
    checks: Iterable[tuple[Check, ...]], moment: Moment, parts: dict[str, object]
) -> Remembered | None:
    """Return what to remember of *checks*, that ran at *moment*; None if one may not be."""
    found = tuple(checks)
    for segment in found:
        for check in segment:
            if not check.holds:
                return None
    if not moment.steady:
        return None
    return Remembered(found, moment.earliest, moment.latest, parts)
