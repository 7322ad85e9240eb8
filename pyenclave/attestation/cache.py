"""
What is remembered between appraisals: only facts about bytes, never about the moment or a policy.

An entry says "these bytes read as this" and "the signature in them was made by that key". Neither
changes, so nothing here has to be invalidated; times, revocation and policies are judged anew in
each appraisal. Entries are found by the bytes themselves, compared whole: no collision can stand in
for equality, and bytes that are handed in again cost nothing. What fails is not remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, Generic, TypeVar

from pyenclave._locks import Lock
from pyenclave.attestation import memo

__all__ = ["FACTS", "Cache", "Known", "clear", "known"]

T = TypeVar("T")
F = TypeVar("F")

_MAX_FACTS: Final = 64


class Known(Generic[T]):
    """
    What some bytes read as, with facts derived from them.

    Attributes:
        value: What was read. It is shared by all appraisals and must not be changed.
        used: Whether it was asked for again since the store last looked.
    """

    __slots__ = ("_facts", "used", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self.used = False
        self._facts: dict[Hashable, Any] = {}

    def has(self, name: Hashable) -> bool:
        """Whether `fact` *name* is known already."""
        return name in self._facts

    def fact(self, name: Hashable, derive: Callable[[], F]) -> F:
        """
        Return what *derive* gives; it runs once for each *name*.

        Args:
            name: The fact, with everything it depends on besides the bytes.
            derive: Gives the fact. What it raises is not remembered.
        """
        try:
            found: F = self._facts[name]
        except KeyError:
            found = derive()
            if len(self._facts) < _MAX_FACTS:
                self._facts[name] = found
        return found


class Cache:
    """
    A bounded store; the oldest entries leave first, but those in use get another turn.

    So a fleet of new platforms does not drive out the collateral that they share. Threads may
    share it.

    Args:
        max_items: How many entries there may be.
        max_bytes: How many bytes all that was read may have had.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._entries: dict[tuple[str, bytes], Known[Any]] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, what: str, data: bytes, read: Callable[[bytes], T]) -> Known[T]:
        """
        Return what *data* reads as.

        Args:
            what: How it is read; different readers must have different names.
            data: The bytes.
            read: Reads them. What it raises is not remembered.
        """
        key = (what, data)
        found = self._entries.get(key)
        if found is not None:
            found.used = True
            return found
        made = Known(read(data))
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                return found
            if len(data) <= self._max_bytes:
                self._entries[key] = made
                self._size += len(data)
            while len(self._entries) > self._max_items or self._size > self._max_bytes:
                oldest = next(iter(self._entries))
                entry = self._entries.pop(oldest)
                if entry.used:
                    entry.used = False
                    self._entries[oldest] = entry
                else:
                    self._size -= len(oldest[1])
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._size = 0


FACTS: Final = Cache(max_items=512, max_bytes=16 << 20)


def known(what: str, data: bytes, read: Callable[[bytes], T]) -> Known[T]:
    """Return what *data* reads as, from the one store of this process; see `Cache.get`."""
    return FACTS.get(what, data, read)


def clear() -> None:
    """Forget everything; for tests and measurements."""
    FACTS.clear()
    memo.clear()
