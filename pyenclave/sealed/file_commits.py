"""
Commits as they are found: the headers of a file, and the counter that tells the newest.

A header alone says nothing about being the newest. With a counter, only its value's commit opens,
or the one that was cut off just before the counter was advanced to it.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pyenclave.errors import RollbackError, UnsealError
from pyenclave.formats.sealed_file import HEADER_PLACES, FileHeader
from pyenclave.sealed.file_store import Store

__all__ = [
    "CommitCounter",
    "MarkingCounter",
    "Rebinding",
    "advance",
    "check_counter",
    "check_protocol",
    "counter_name",
    "read_headers",
    "refuse_lost_file",
    "value_and_mark",
]


@runtime_checkable
class CommitCounter(Protocol):
    """
    A monotonic counter that a file is bound to: what of `sealed.counter.Counter` is needed.

    One that also has ``reading`` and takes marks tells two commits apart that were both cut off
    before the counter was advanced.
    """

    @property
    def id(self) -> bytes:
        """What names the counter; a file opens with the same counter only."""

    def read(self) -> int:
        """Return the value."""

    def advance(self, to: int) -> None:
        """Make *to* the value; refuse to go back."""


@runtime_checkable
class MarkingCounter(Protocol):
    """A counter that keeps the mark of the one state that was committed with its value."""

    def reading(self) -> tuple[int, bytes]:
        """Return value and mark."""

    def advance(self, to: int, mark: bytes = b"") -> None:
        """Make *to* the value, for the state of that mark only."""


@dataclass(frozen=True, slots=True)
class Rebinding:
    """
    Both counters of a file whose binding to another one may have been cut off.

    Given as ``counter=`` it opens the file wherever that was: as the old counter's, as the new
    one's, or in between; then the binding is brought to its end.

    Attributes:
        old: The counter that the file was bound to.
        new: The one that ``bind`` was to bind it to.

    """

    old: CommitCounter
    new: CommitCounter


def check_protocol(counter: object) -> None:
    """Refuse what is neither a counter nor None, with TypeError."""
    given = (counter.old, counter.new) if isinstance(counter, Rebinding) else (counter,)
    for one in given:
        if (one is not None or len(given) > 1) and not isinstance(one, CommitCounter):
            raise TypeError(f"counter: expected read, advance and id, found {one!r}")


def value_and_mark(counter: CommitCounter) -> tuple[int, bytes]:
    """Return value and mark; a counter that keeps no marks has an empty one."""
    if isinstance(counter, MarkingCounter):
        value, mark = counter.reading()
        return value, bytes(mark)
    return counter.read(), b""


def advance(counter: CommitCounter, to: int, mark: bytes) -> None:
    """Advance *counter*, with the mark if it keeps one."""
    if isinstance(counter, MarkingCounter):
        counter.advance(to, mark)
    else:
        counter.advance(to)


def counter_name(counter: CommitCounter) -> bytes:
    """Return the 32 bytes that name *counter* in a header."""
    return hashlib.sha256(b"pyenclave/file/1/counter" + bytes(counter.id)).digest()


def read_headers(store: Store) -> tuple[list[tuple[FileHeader, bytes]], bool, UnsealError | None]:
    """
    Return the headers that can be parsed, unverified, with their bytes.

    Returns:
        The headers; whether there is nothing at all where headers are; why the last one was not
        usable.

    """
    found: list[tuple[FileHeader, bytes]] = []
    blank = True
    why: UnsealError | None = None
    buffer = bytearray(8192)
    for place in HEADER_PLACES:
        view = memoryview(buffer)
        size = 0
        while size < len(buffer):
            got = store.pread(view[size:], place + size)
            if got <= 0:
                break
            size += got
        data = bytes(view[:size])
        if place < HEADER_PLACES[2] and any(data[:4096]):
            blank = False
        if not any(data[:8]):
            continue
        try:
            header = FileHeader.from_bytes(data)
            if header.offset != place:
                raise UnsealError(
                    "the sealed file's header is at the wrong place",
                    expected=header.offset,
                    found=place,
                )
        except UnsealError as error:
            if place == 0 or why is None:
                # Its traceback would keep this frame, and all that called it, alive.
                why = error.with_traceback(None)
            continue
        found.append((header, data[: header.geometry.stride]))
    return found, blank, why


def refuse_lost_file(counter: CommitCounter | None) -> None:
    """A counter that was ever advanced says that there was a file."""
    if counter is not None and (value := counter.read()) > 0:
        raise RollbackError(
            "the sealed file is gone, but its counter was advanced",
            expected=f"a file of counter value {value}",
            found="no commit",
            advice="Bring the newest file, or give a new counter.",
        )


def check_counter(
    counter: CommitCounter | Rebinding | None, header: FileHeader, mark: bytes
) -> CommitCounter | None:
    """
    Judge a commit by its counter, and advance that if the commit was cut off before.

    Args:
        counter: What the caller brings.
        header: The commit.
        mark: Its header's MAC.

    Returns:
        The counter that the file is bound to.

    Raises:
        RollbackError: Not the commit that the counter names.

    """
    bound = header.counter_id
    if counter is None:
        if bound is not None:
            raise RollbackError(
                "the sealed file is bound to a counter",
                expected=f"counter {bound.hex()[:16]}…",
                found="no counter",
                advice="Give counter=; without it an old file could not be told.",
            )
        return None
    old: CommitCounter | None = None
    if isinstance(counter, Rebinding):
        # Of the two, the one that the header names; of a header that names both, both.
        if bound == counter_name(counter.old):
            counter = counter.old
        else:
            old, counter = counter.old, counter.new
    name = counter_name(counter)
    if bound != name:
        moved = header.old_counter_id == name
        found = "no counter" if bound is None else bound.hex()[:16]
        raise RollbackError(
            "the sealed file was bound to another counter"
            if moved
            else "the sealed file is not bound to this counter",
            expected=f"counter {name.hex()[:16]}…",
            found=found,
            advice="Give that one; or both, Rebinding(old, new), if bind() was cut off."
            if moved
            else "Give the counter that it is bound to; bind() binds it to another.",
        )
    value, current = value_and_mark(counter)
    if header.old_counter_id is not None and header.counter_value == value + 1:
        # Not before the old counter is retired: else a copy from before would open, too.
        _retire(old, header, mark)
    _judge(counter, value, current, header.counter_value, mark)
    return counter


def _retire(old: CommitCounter | None, header: FileHeader, mark: bytes) -> None:
    """Bring the counter that a file was bound to before to its end, as a cut off `bind` would."""
    if old is None or counter_name(old) != header.old_counter_id:
        raise RollbackError(
            "binding the sealed file to this counter was cut off",
            expected="both counters",
            found="the new one only" if old is None else "another old one",
            advice="Open it with counter=Rebinding(old, new); that brings it to its end.",
        )
    value, current = value_and_mark(old)
    _judge(old, value, current, header.old_counter_value, mark)


def _judge(counter: CommitCounter, value: int, current: bytes, wanted: int, mark: bytes) -> None:
    """Judge a commit of value *wanted*, where the counter is at *value* for the mark *current*."""
    if wanted not in (value, value + 1):
        raise RollbackError(
            "the sealed file is not the one that its counter names",
            expected=f"counter value {value} or {value + 1}",
            found=wanted,
            advice="This is an old copy; bring the newest."
            if wanted < value
            else "The counter was set back or replaced.",
        )
    if wanted == value + 1:
        advance(counter, value + 1, mark)  # the commit was cut off before this
    elif current and not hmac.compare_digest(current, mark):
        raise RollbackError(
            "another state of the sealed file was committed with this counter value",
            expected=f"mark {current.hex()[:16]}…",
            found=f"mark {mark.hex()[:16]}…",
            advice="This copy was written but never committed; bring the newest.",
        )
