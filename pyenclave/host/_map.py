"""
Many calls of one function in few crossings: what ``enclave.map`` does.

:class:`Work` decides what is packed next and puts answers in order; it never waits. Who waits
(:class:`Results` for threads; asyncio has its own) sends its batches and hands it the answers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pyenclave._core import Batch, BatchCall, BatchRows, HostCall
from pyenclave._locks import Lock
from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError, CallError, EnclaveError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "Items",
    "Results",
    "Work",
    "batch_call",
    "check_array",
    "check_errors",
    "joined",
    "source_of",
]

TARGET = 0.004  # seconds that one crossing should take: results stream, and hand-overs do not count
BUDGET_MS = 20  # after so long the enclave answers what it has
_GROWTH = 8  # a batch is at most so many times its forerunner
_NOTHING: Iterator[Any] = iter(())


def batch_call(call: HostCall, signature: Signature) -> BatchCall:
    """
    Return the batched form of a function.

    Raises:
        ArgumentError: It cannot be called with one item each.

    """
    positional = [item for item in signature.parameters if not item.keyword]
    if not positional:
        raise ArgumentError(
            f"{signature.name} takes no argument, so there is nothing to map it over",
            expected="a function with a positional parameter",
            found=str(signature),
        )
    for item in signature.parameters:
        if item.keyword and not item.default:
            raise ArgumentError(
                f"{signature.name} needs its keyword argument {item.name}, which an item has not",
                found=str(signature),
                advice="Give the parameter a default, or make it positional and map over tuples.",
            )
    if signature.streams:
        raise ArgumentError(
            f"{signature.name} gives its result in items, so it cannot be mapped",
            found=str(signature),
            advice="Call it for each item, or have it return a list.",
        )
    required = sum(not item.default for item in positional)
    return BatchCall(call, spread=required > 1)


class Source(Protocol):
    """Where batches come from."""

    def take(self, most: int) -> Batch | None:
        """Pack at most *most* items, or return None: there are no more."""


class Items:
    """Items of any iterable, taken one by one, never more than are packed at once."""

    def __init__(self, call: BatchCall, items: Iterable[Any]) -> None:
        self._call = call
        self._items = iter(items)
        self._kept: list[Any] = []

    def take(self, most: int) -> Batch | None:
        """Pack items that fit one slot."""
        call = self._call
        return call.pack(self._items, self._kept, most, call.most_bytes, BUDGET_MS)


@dataclass(slots=True)
class _Entry:
    """A batch in its place in the order, and its answer when there is one."""

    batch: Batch
    answered: bool = False
    answer: bytearray | None = None


class Work:
    """
    The order of the batches of one map, and how large the next is. Waits for nothing.

    Args:
        call: The function.
        source: Where the batches come from.

    """

    __slots__ = ("_entries", "_error", "_hurries", "_most", "_over", "call", "source")

    def __init__(self, call: BatchCall, source: Source) -> None:
        self.call = call
        self.source: Source | None = source
        self._error: Exception | None = None
        self._most = 1
        self._hurries = False
        self._over = False
        self._entries: deque[_Entry] = deque()

    @property
    def ready(self) -> bool:
        """Whether the next results are there."""
        return bool(self._entries) and self._entries[0].answered

    def hurry(self) -> None:
        """Pack as much as fits from now on: nobody waits for a single result."""
        self._most = self.call.most_items
        self._hurries = True

    def next_batches(self) -> list[Batch]:
        """
        Return what to send now, at most one batch for each lane; empty at the end.

        What the iterable raises is raised here, once all results before it were given out.
        """
        entries = self._entries
        while self._error is None and self.source is not None:
            if len(entries) >= self.call.num_lanes:
                break
            try:
                batch = self.source.take(self._most)
            except Exception as error:  # of the caller's code, any
                self._error = error
                break
            except BaseException:  # Ctrl-C: now; and items may be lost, so that none follow
                self.source = None
                raise
            if batch is None:
                break
            entries.append(_Entry(batch))
        if self._error is not None and not entries:
            raised, self._error = self._error, None
            raise raised
        return [entry.batch for entry in entries if not entry.answered]

    def abandon(self) -> None:
        """Sending failed: what may have begun is never sent again, and nothing follows it."""
        self.source = None
        self._error = None
        self._entries.clear()

    def failed(self, answers: list[bytearray | None], error: Exception) -> None:
        """
        Sending failed after some answers had come: their results are given out, then *error*.

        As after ``abandon`` nothing is sent again, and nothing follows.
        """
        waiting = [entry for entry in self._entries if not entry.answered]
        for entry, answer in zip(waiting, answers, strict=False):
            entry.answered, entry.answer = True, answer
        while self._entries and not self._entries[-1].answered:
            self._entries.pop()
        self.source = None
        self._error = error
        self._over = True

    def answered(self, answers: list[bytearray | None], seconds: float) -> None:
        """Take the answers to all of ``next_batches``, which came in *seconds*."""
        waiting = [entry for entry in self._entries if not entry.answered]
        for entry, answer in zip(waiting, answers, strict=True):
            entry.answered, entry.answer = True, answer
        if not self._hurries:
            calls = sum(entry.batch.count for entry in waiting) / len(waiting)
            wanted = TARGET * calls / max(seconds, 1e-9)
            self._most = max(1, int(min(wanted, self._most * _GROWTH, self.call.most_items)))

    def results(self) -> tuple[list[Any], bool]:
        """Decode the first answer; say whether errors are among the results."""
        entry = self._entries.popleft()
        results, failed, done = self.call.unpack(entry.batch, entry.answer)
        self._again(entry.batch, done, len(results))
        return results, failed

    def rows(self) -> npt.NDArray[Any]:
        """
        Return the first answer as an array of rows.

        Raises:
            CallError: An item was refused, or the results are not all of one length.

        """
        entry = self._entries.popleft()
        if entry.batch.errors:
            raise entry.batch.errors[min(entry.batch.errors)]
        rows: npt.NDArray[Any]
        rows, done = self.call.unpack_rows(entry.batch, entry.answer)
        self._again(entry.batch, done, done)
        return rows

    def _again(self, batch: Batch, done: int, covered: int) -> None:
        """Put back what the enclave did not come to, before all that follows."""
        if done < batch.count and self._over:
            self._entries.clear()  # the error comes where the first result is missing
        elif done < batch.count:
            self._most = max(1, min(self._most, done))
            self._entries.appendleft(_Entry(batch.rest(done, covered, BUDGET_MS)))


class Results(Iterator[Any]):
    """
    The results of ``enclave.map``, in the order of the items. For one thread at a time.

    Args:
        call: The function.
        source: Where its batches come from.
        raises: Whether an item's error is raised in its place, or given out as a result.

    """

    __slots__ = ("_begun", "_call", "_failed", "_lock", "_made", "_raises", "_source", "_values")

    def __init__(self, call: BatchCall, source: Source, *, raises: bool) -> None:
        self._call = call
        self._source = source
        self._made: Work | None = None
        self._raises = raises
        self._lock = Lock()
        self._values: Iterator[Any] = _NOTHING
        self._failed = False
        self._begun = False

    def _work(self) -> Work:
        """Return what is under way; a small array needs none of it."""
        work = self._made
        if work is None:
            work = self._made = Work(self._call, self._source)
        return work

    def __next__(self) -> Any:
        """
        Return the next result.

        Raises:
            ArgumentError: The item does not fit the signature.
            EcallError: The function raised for the item. The next call goes on after it.
            CallTimeoutError: The deadline passed. The map is over: nothing is sent again.
            EnclaveStateError: The enclave is gone; ``started`` as for a call. The same.
            Exception: What the iterable raised, after the results of all items before it.

        """
        while True:
            for value in self._values:
                if self._failed and self._raises and isinstance(value, CallError):
                    raise value
                return value
            if not self._fetch():
                raise StopIteration
            self._values, self._failed = self._take()

    def _take(self) -> tuple[Iterator[Any], bool]:
        values, failed = self._work().results()
        return iter(values), failed

    def _fetch(self) -> bool:
        """Cross until the next results are there; False at the end."""
        got = False
        try:
            (got,) = map(self._lock.acquire, (False,))  # no Ctrl-C comes before it is told
            if not got:
                raise ValueError("the results of one map are for one thread at a time")
            self._begun = True
            work = self._work()
            while not work.ready:
                batches = work.next_batches()
                if not batches:
                    return False
                start = time.monotonic()
                answers: list[bytearray | None] = []
                try:
                    work.call.cross(batches, answers)
                except EnclaveError as error:
                    work.failed(answers, error)
                    continue
                except BaseException:
                    work.abandon()
                    raise
                work.answered(answers, time.monotonic() - start)
            return True
        finally:
            if got:
                self._lock.release()

    def array(self) -> npt.NDArray[Any]:
        """
        Return all results of a native function as one array: a row for each item.

        No object is made for an item, neither on the way in, if the items are the rows of an
        array, nor on the way out. An item's error is raised, whatever ``errors`` says.

        Returns:
            Rows of the element type that the image names, or of bytes (``uint8``).

        Raises:
            TypeError: The function is a Python function.
            ValueError: A result was taken already.
            CallError: The results are not all of one length, or the function refused an item.

        """
        check_array(self._call, begun=self._begun)
        parts = []
        source = self._source
        if type(source) is BatchRows:
            self._begun = True
            first: npt.NDArray[Any] = source.first()
            if source.done:
                return first
            parts.append(first)
        work = self._work()
        work.hurry()
        while self._fetch():
            parts.append(work.rows())
        return parts[0] if len(parts) == 1 else joined(parts, self._call.element)


def check_array(call: BatchCall, *, begun: bool) -> None:
    """
    Check that ``array()`` may be called.

    Raises:
        TypeError: The function is a Python function.
        ValueError: A result was taken already.

    """
    if not call.native:
        raise TypeError("array() is for native functions; iterate over the results instead")
    if begun:
        raise ValueError("array() takes all results, and some were taken before")


def joined(parts: list[npt.NDArray[Any]], element: str | None) -> npt.NDArray[Any]:
    """
    Return the parts one after the other.

    Raises:
        CallError: Their rows are not all of one length.

    """
    import numpy as np

    if not parts:
        return _nothing(element)
    sizes = sorted({part.shape[1] for part in parts})
    if len(sizes) > 1:
        raise CallError(
            "the results are not all of one length",
            expected=sizes[0],
            found=sizes[-1],
            advice="Iterate over the results instead.",
        )
    return np.concatenate(parts)


def _nothing(element: str | None) -> npt.NDArray[Any]:
    import numpy as np

    return np.empty((0, 0), element or np.uint8)


def source_of(call: BatchCall, items: Iterable[Any]) -> Source:
    """
    Return where the batches of *items* come from.

    Raises:
        TypeError: *items* is not iterable.
        ArgumentError: *items* is an array that the native function does not take.

    """
    rows = call.rows(items)
    if rows is not None:
        return rows
    if call.native and hasattr(items, "dtype"):
        import numpy as np

        if isinstance(items, np.ndarray):
            return BatchRows(call, _rows(call, items))
    return Items(call, items)


def _rows(call: BatchCall, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a native function's items as bytes in two dimensions, without a copy if possible."""
    import numpy as np

    wanted = call.wanted
    if array.ndim == 0:
        raise TypeError("an array without dimensions has no rows to map over")
    if wanted is not None and array.dtype != np.dtype(wanted):
        raise ArgumentError(
            "the items do not fit their type",
            expected=f"an array of {np.dtype(wanted)}",
            found=str(array.dtype),
            advice=f"Convert it: .astype('{np.dtype(wanted)}').",
        )
    if array.dtype.hasobject or type(array).__name__ == "MaskedArray":
        raise ArgumentError(
            "the items do not fit their type",
            expected="an array of plain elements",
            found=f"{type(array).__name__} of {array.dtype}",
        )
    size = array.itemsize * math.prod(array.shape[1:])
    if size > call.most_item:
        raise ArgumentError(
            "the items are too long",
            expected=f"at most {call.most_item} bytes",
            found=size,
            advice="Raise [memory] message in enclave.toml.",
        )
    if size == 0 or len(array) == 0:
        return np.empty((len(array), size), np.uint8)
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


def check_errors(errors: str) -> bool:
    """
    Return whether errors are raised.

    Raises:
        ValueError: *errors* is neither ``raise`` nor ``return``.

    """
    if errors not in ("raise", "return"):
        raise ValueError(f"errors is 'raise' or 'return', not {errors!r}")
    return errors == "raise"
