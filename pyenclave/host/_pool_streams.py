"""Streams of a pool's enclaves: each has its place in the pool until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pyenclave._core import HostStream
from pyenclave.errors import EnclaveError, EnclaveStateError
from pyenclave.host._book import Ticket
from pyenclave.host._engine import AsyncStream
from pyenclave.host._options import Options
from pyenclave.host._pooled import RETRIES

if TYPE_CHECKING:
    from pyenclave.host.aio_pool import AsyncEnclavePool
    from pyenclave.host.pool import EnclavePool

__all__ = ["AsyncPoolStream", "PoolStream"]

_T = TypeVar("_T")


class PoolStream(Iterator[Any]):
    """
    What a streaming function of a pool gives, item by item: as a stream of an ``Enclave``.

    It has its thread of one enclave, which gets no other call there, until it ends: by its last
    item, by an exception, by ``close()`` or the end of a ``with`` block, or when it is dropped.
    """

    def __init__(self, pool: EnclavePool, ticket: Ticket, stream: HostStream) -> None:
        self._pool = pool
        self._ticket = ticket
        self._stream: HostStream | None = stream
        with pool._lock:  # noqa: SLF001 - same package
            pool._book.keep(ticket, threading.get_ident())  # noqa: SLF001

    def _do(self, stream: HostStream, what: Callable[[], Any]) -> Any:
        pool = self._pool
        try:
            value = pool._run(self._ticket, what)  # noqa: SLF001 - same package
            if stream.closed:
                pool._end_call(self._ticket, None)  # noqa: SLF001
            return value
        except BaseException as error:
            if stream.closed:  # else it is in use by another thread
                over = None if isinstance(error, StopIteration) else error
                pool._end_call(self._ticket, over)  # noqa: SLF001
            raise

    def __next__(self) -> Any:
        """Return the next item; raises what the function raised."""
        stream = self._stream
        if stream is None:
            raise StopIteration
        return self._do(stream, stream.__next__)

    def close(self) -> None:
        """
        End the stream: the generator inside is closed, and the thread is free again.

        May be called twice. EcallError: what the generator raised when it was closed.
        """
        stream = self._stream
        if stream is not None:
            self._do(stream, stream.close)

    @property
    def closed(self) -> bool:
        """Whether the stream has ended."""
        return self._stream is None or self._stream.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except EnclaveError:
            if exc_type is None:
                raise  # else what the caller raised matters more

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self._stream = None  # the enclave is told to stop; its thread may take a while
            self._pool._give(self._ticket, gave_up=True)  # noqa: SLF001 - same package

    def __repr__(self) -> str:
        return f"<pool's {self._stream!r}>"


class AsyncPoolStream(AsyncIterator[_T]):
    """
    What a streaming function of a pool gives, item by item: as an ``AsyncStream`` of an enclave.

    The call begins with the first item that is asked for. From then on it has its thread of one
    enclave, which gets no other call there, until it ends: by its last item, by an exception, by
    ``aclose()`` or the end of an ``async with`` block, or when it is dropped.
    """

    def __init__(
        self,
        pool: AsyncEnclavePool,
        function: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
    ) -> None:
        self._pool = pool
        self._begin: Callable[[Any], AsyncStream[_T]] = lambda view: view.call(
            function, *args, **kwargs
        )
        self._options = options
        self._name = function if isinstance(function, str) else function.__qualname__
        self._ticket = Ticket()
        self._stream: AsyncStream[_T] | None = None
        self._busy = False
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        """Return the next item; raises what the function raised."""
        self._check_idle()
        if self._closed:
            raise StopAsyncIteration
        self._busy = True
        try:
            if self._stream is None:
                return await self._first()
            return await anext(self._stream)
        except BaseException as error:
            self._over(error)
            raise
        finally:
            self._busy = False

    async def _first(self) -> _T:
        """Get a place, and the first item."""
        pool, options = self._pool, self._options
        deadline = None if options.timeout is None else time.monotonic() + options.timeout
        for left in range(RETRIES, -1, -1):
            self._ticket = Ticket()
            try:
                member = await pool._acquire(self._ticket, deadline)  # noqa: SLF001 - same package
                pool._book.keep(self._ticket, asyncio.current_task())  # noqa: SLF001
                self._stream = self._begin(pool._view(member, options, deadline))  # noqa: SLF001
                return await anext(self._stream)
            except BaseException as error:
                if not self._over(error, last=left == 0):
                    raise
                self._closed = False
        raise AssertionError("unreachable")

    def _over(self, error: BaseException | None, *, last: bool = True) -> bool:
        self._closed = True
        if isinstance(error, StopAsyncIteration):
            error = None
        return self._pool._end_call(self._ticket, error, last=last)  # noqa: SLF001

    def _check_idle(self) -> None:
        if self._busy:
            raise EnclaveStateError("the stream is in use already")

    async def aclose(self) -> None:
        """
        End the stream: the generator inside is closed, and the thread is free again.

        May be called twice. EcallError: what the generator raised when it was closed.
        """
        self._check_idle()
        if self._closed:
            return
        self._closed = self._busy = True
        try:
            if self._stream is not None:
                await self._stream.aclose()
            self._over(None)
        except BaseException as error:
            self._over(error)
            raise
        finally:
            self._busy = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.aclose()
        except EnclaveError:
            if exc_type is None:
                raise  # else what the caller raised matters more

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is None or self._closed:
            return
        self._stream = None  # which gives its call up, on the loop and before this
        pool, ticket = self._pool, self._ticket
        loop = pool._loop  # noqa: SLF001 - same package
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if loop is not None:
                loop.call_soon_threadsafe(lambda: pool._give(ticket, gave_up=True))  # noqa: SLF001

    def __repr__(self) -> str:
        return f"<pool's stream of {self._name}{', ended' if self._closed else ''}>"
