"""Many calls of one function in few crossings, on an event loop: the twin of ``_map.Results``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pyenclave._core import AsyncCall, Batch, BatchCall
from pyenclave.errors import CallError, EnclaveError
from pyenclave.host._engine import Engine
from pyenclave.host._map import Items, Work, check_array, joined, source_of
from pyenclave.host._options import Options

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["AsyncResults", "async_results"]

_READ_AHEAD = 256  # items of an asynchronous source that are asked for at most between crossings
_PATIENCE = 0.002  # seconds that a packed batch waits for more of them


class AsyncResults(AsyncIterator[Any]):
    """
    The results of ``AsyncEnclave.map``, in the order of the items. For one task at a time.

    Args:
        engine: Where batches go.
        options: The deadline is for each wait, not for the whole.
        work: What is mapped.
        source: Where the items come from if that is asynchronous.
        raises: Whether an item's error is raised in its place, or given out as a result.

    """

    def __init__(
        self, engine: Engine, options: Options, work: Work, source: _Source | None, *, raises: bool
    ) -> None:
        self._engine = engine
        self._options = options
        self._work = work
        self._source = source
        self._raises = raises
        self._values: Iterator[Any] = iter(())
        self._failed = False
        self._busy = False
        self._begun = False

    def __aiter__(self) -> AsyncResults:
        return self

    async def __anext__(self) -> Any:
        """Return the next result; raises as the sync form does."""
        while True:
            for value in self._values:
                if self._failed and self._raises and isinstance(value, CallError):
                    raise value
                return value
            if not await self._fetch():
                raise StopAsyncIteration
            results, self._failed = self._work.results()
            self._values = iter(results)

    async def _fetch(self) -> bool:
        """Cross until the next results are there; False at the end."""
        if self._busy:
            raise ValueError("the results of one map are for one task at a time")
        self._busy = self._begun = True
        try:
            work = self._work
            while not work.ready:
                if self._source is not None:
                    await self._source.fill()
                batches = work.next_batches()
                if not batches:
                    return False
                start = time.monotonic()
                answers: list[bytearray | None] = []
                try:
                    await self._cross(batches, answers)
                except EnclaveError as error:
                    work.failed(answers, error)
                    continue
                except BaseException:
                    work.abandon()
                    raise
                work.answered(answers, time.monotonic() - start)
            return True
        finally:
            self._busy = False

    async def _cross(self, batches: list[Batch], answers: list[bytearray | None]) -> None:
        """
        Send batches, as many at a time as there are lanes, and put their answers into *answers*.

        If one fails, those before it are there.
        """
        if len(batches) == 1:
            answers.append(await self._send(batches[0]))
            return
        sent = [asyncio.ensure_future(self._send(batch)) for batch in batches]
        try:
            for one in sent:  # the first error in their order, as it is: no group of them
                answers.append(await one)
        except BaseException:
            for one in sent:
                one.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
            raise

    async def _send(self, batch: Batch) -> bytearray | None:
        if batch.count == 0:
            return None
        answer = self._engine.lanes.send_batch(self._work.call, batch)
        if isinstance(answer, AsyncCall):
            answer = await self._engine.wait(answer, self._options)
        got: bytearray = answer
        return got

    async def array(self) -> npt.NDArray[Any]:
        """Return all results of a native function as one array, as ``Results.array`` does."""
        check_array(self._work.call, begun=self._begun)
        self._work.hurry()
        parts = []
        while await self._fetch():
            parts.append(self._work.rows())
        return joined(parts, self._work.call.element)

    async def aclose(self) -> None:
        """Close the asynchronous source, if it can be closed."""
        if self._source is not None:
            await self._source.aclose()


class _Source:
    """Items of an asynchronous iterable, some of them read ahead, for who packs them."""

    def __init__(self, items: AsyncIterable[Any]) -> None:
        self._items = aiter(items)
        self._read: list[Any] = []
        self._next: asyncio.Future[Any] | None = None
        self._error: BaseException | None = None
        self.ended = False

    async def fill(self) -> None:
        """Have at least one item if there is one, and those that come soon after."""
        end = 0.0
        while len(self._read) < _READ_AHEAD and not self.ended:
            if self._next is None:
                self._next = asyncio.ensure_future(self._advance())
            left = None if not self._read else max(0.0, end - time.monotonic())
            done, _ = await asyncio.wait({self._next}, timeout=left)
            if not done:
                return
            got, self._next = self._next.result(), None
            if got is None:
                self.ended = True
                return
            if not self._read:
                end = time.monotonic() + _PATIENCE
            self._read.append(got[0])

    async def _advance(self) -> tuple[Any] | None:
        try:
            return (await anext(self._items),)
        except StopAsyncIteration:
            return None
        except Exception as error:
            self._error = error
            return None

    def take_ready(self) -> Iterator[Any]:
        """Give out what was read ahead; raises in its place what the iterable raised."""
        while self._read:
            yield self._read.pop(0)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    async def aclose(self) -> None:
        self.ended = True
        reading, self._next = self._next, None
        if reading is not None:
            reading.cancel()
            await asyncio.wait({reading})  # a generator that still runs cannot be closed
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()


class _AsyncItems(Items):
    """What was read ahead of an asynchronous iterable, each time anew."""

    def __init__(self, call: BatchCall, source: _Source) -> None:
        super().__init__(call, ())
        self._source = source

    def take(self, most: int) -> Batch | None:
        """Pack what is there."""
        self._items = self._source.take_ready()
        return super().take(most)


def async_results(
    engine: Engine,
    options: Options,
    call: BatchCall,
    items: Iterable[Any] | AsyncIterable[Any],
    *,
    raises: bool,
) -> AsyncResults:
    """
    Return the results of mapping a function over *items*.

    Raises:
        TypeError: *items* can be iterated in neither way.
        ArgumentError: *items* is an array that the native function does not take.

    """
    if not isinstance(items, AsyncIterable):
        return AsyncResults(
            engine, options, Work(call, source_of(call, items)), None, raises=raises
        )
    source = _Source(items)
    work = Work(call, _AsyncItems(call, source))
    return AsyncResults(engine, options, work, source, raises=raises)
