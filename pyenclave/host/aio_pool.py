"""
A pool of enclaves of one image, for asyncio: the twin of ``pool.EnclavePool``.

Both use one book (``_book.py``), which says what is to be done. All of this runs on the loop's
thread; launching, closing and asking the platform are done in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar, Unpack, overload

from pyenclave.errors import (
    BusyError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
)
from pyenclave.host._book import Member, Ticket
from pyenclave.host._engine import answered_lanes, in_thread
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._pool_streams import AsyncPoolStream
from pyenclave.host._pooled import PROBE, RETRIES, SELF, TROUBLE, PoolArguments, PoolBase, PoolView
from pyenclave.host.aio import AsyncEnclave, AsyncEnclaveOptions

if TYPE_CHECKING:
    from pyenclave.calls.signature import Signature

__all__ = ["AsyncEnclavePool"]

P = ParamSpec("P")
T = TypeVar("T")

_PING_SECONDS = 5.0
_SLICE = 0.1
_QUIET = 0.02  # seconds after a hand-out in which none is replaced


class AsyncEnclavePool(PoolBase):
    """
    Enclaves of one image that share the calls of one event loop.

    State, retries and limits are those of :class:`~pyenclave.host.pool.EnclavePool`. A task that
    is cancelled stops waiting; its call may go on inside, and its thread of the enclave is used
    again when it returns.

    Args:
        image: Path of an image, or its bytes.
        size: How many enclaves are kept.
        max_size: How many there may be while calls wait; None: *size*.
        warm: Workers that the platform keeps ready for replacements and fresh enclaves.
        queue: Calls that may wait for an enclave; more raise BusyError.
        max_calls: Replace an enclave after about so many calls (up to a tenth more).
        max_age: Replace it after about so many seconds.
        shrink_after: End one above *size* that was idle so many seconds.
        health: Ask an idle enclave whether it answers every so many seconds.
        stuck_after: Replace one whose threads all belong to calls that nobody waits for.
        give_up: After so many launches that failed in a row, stop trying until :meth:`restart`.
        max_fresh: Enclaves of ``enclave(fresh=True)`` at a time.
        debug: As for ``AsyncEnclave``, like the rest.
        require: Protection bits without which none is launched.
        state: The state directory.
        quiet: Do not say that an unsigned image runs as debug.
        ocalls: Handlers of the image's host functions, as for ``AsyncEnclave``.
        inline: As for ``AsyncEnclave``.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A number is impossible.

    """

    def __init__(
        self,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        inline: bool = True,
        **options: Unpack[PoolArguments],
    ) -> None:
        self._inline = inline
        super().__init__(image, **options)
        self._script: str | os.PathLike[str] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._watched: dict[Member, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._quiet_until = 0.0

    def _make(self, image: Any, *, quiet: bool) -> AsyncEnclave:
        return AsyncEnclave(
            image, quiet=quiet, ocalls=self._ocalls, inline=self._inline, **self._settings
        )

    @classmethod
    def from_file(cls, script: str | os.PathLike[str], **options: Any) -> Self:
        """
        Make a pool of a single Python file, unsigned, launched as debug; built when it is started.

        Args:
            script: The file.
            options: As for the class.

        """
        if not isinstance(script, str | os.PathLike):
            raise TypeError(f"a script is a path, not {type(script).__name__}")
        self = cls(script, **options)
        self._script = script
        return self

    def _read(self) -> bytes:
        if self._script is None:
            return super()._read()
        from pyenclave.image.build import build_script

        return build_script(os.fsdecode(self._script))

    # ---- life ---------------------------------------------------------------------------------

    async def start(self) -> Self:
        """
        Launch the enclaves; returns when all of them run.

        Raises:
            ImageError: The image is refused.
            LaunchError: An enclave could not be started, or a limit of platform, process, user or
                machine has no room for so many. None is left behind.
            EnclaveStateError: The pool was started before.

        """
        self._begin()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        try:
            for done in range(await in_thread(self._prepare)):
                try:
                    await self._join(await self._launch(quiet=self._quiet or done > 0))
                except EnclaveError as error:
                    self._failed(error)
                    raise
            self._keeper = asyncio.create_task(self._keep(), name="pyenclave-pool")
        except BaseException:
            await self.close()
            raise
        return self

    async def _launch(self, *, quiet: bool = True) -> AsyncEnclave:
        handle: AsyncEnclave = self._new(quiet=quiet)
        return await handle.start()

    async def _join(self, handle: AsyncEnclave) -> None:
        member = self._joined(handle, handle._functions()[0].lanes)  # noqa: SLF001 - same package
        if member is None:
            await handle.close()
            return
        fd = self._watched[member] = os.dup(handle._running().pidfd)  # noqa: SLF001
        self._this_loop().add_reader(fd, self._ended, member)

    def _ended(self, member: Member) -> None:
        error = EnclaveLostError("the enclave's process ended")
        self._lose(member, error, began=None if member.running else False)

    def _unwatch(self, member: Member) -> None:
        fd = self._watched.pop(member, -1)
        if fd >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(fd)
            os.close(fd)

    def _lose(self, member: Member, error: EnclaveError, *, began: bool | None = False) -> None:
        self._unwatch(member)
        super()._lose(member, error, began=began)

    async def drain(self, timeout: float | None = None) -> bool:
        """
        Take no new calls, and wait for those under way.

        Args:
            timeout: Seconds, or None to wait as long as they take.

        Returns:
            Whether all ended in time; those that did not go on until :meth:`close`.

        """
        self._check_process()
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._book.drain()
        while self._book.busy and self._book.state == "draining":
            left = min(_SLICE, deadline - time.monotonic())
            if left <= 0:
                return False
            await asyncio.sleep(min(left, 0.01))
        return True

    async def close(self, timeout: float = 0.0) -> None:
        """
        End the pool and its enclaves. May be called twice; goes on if the caller is cancelled.

        Args:
            timeout: Seconds for calls under way, as :meth:`drain`; what still runs then is ended
                with its enclave, and its caller gets EnclaveClosedError.

        """
        if os.getpid() != self._pid:
            return  # the parent's enclaves are not the child's to end
        if timeout > 0:
            await self.drain(timeout)
        closer = self._closer
        if closer is None or closer.get_loop() is not asyncio.get_running_loop():
            closer = self._closer = asyncio.create_task(self._close())
        await asyncio.shield(closer)

    async def _close(self) -> None:
        handles = self._book.close()
        self._poke()
        for member in list(self._watched):
            self._unwatch(member)
        keeper, self._keeper = self._keeper, None
        # Another loop's task cannot be ended here; it ends when that loop runs, if ever.
        if keeper is not None and self._loop is asyncio.get_running_loop():
            keeper.cancel()  # what it launches is closed when it is there
            await asyncio.wait({keeper})
        results = await asyncio.gather(*(one.close() for one in handles), return_exceptions=True)
        if self._reserve is not None:
            await in_thread(self._reserve.close)
        if self._term is not None:
            self._term.forget()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    @property
    def _over(self) -> bool:
        return super()._over or self._loop is None or self._loop.is_closed()

    def _told_to_end(self) -> None:
        super()._told_to_end()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._spawn(self._end()))

    async def _end(self) -> None:
        try:
            await self.close(self._patience)
        finally:
            if self._term is not None:
                self._term.done()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> Self:
        if self._book.state == "new":
            await self.start()
        self._check_process()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _this_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            raise EnclaveStateError(
                "this pool belongs to another event loop",
                advice="Make an AsyncEnclavePool in each loop.",
            )
        return loop

    def _poke(self) -> None:
        if self._wake is not None:
            self._wake.set()

    # ---- use ----------------------------------------------------------------------------------

    @overload
    def call(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncPoolStream[T]: ...

    @overload
    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function in one of the enclaves: ``await pool.call("double", 21)``.

        A function that streams gives an ``AsyncPoolStream``, for ``async for``, which has its
        thread of an enclave from its first item to its end. In a handler of an ocall, a call goes
        to the enclave that asks.

        Args:
            function: As for ``AsyncEnclave.call``, like the rest.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            BusyError: Too many calls wait; or this task itself has every enclave.
            EnclaveClosedError: The pool is draining, closed or not started.
            EnclaveLostError: The enclave ended while the call may have run inside, or before it
                began in every enclave that was tried.
            LaunchError: The pool gave up; the error names the last reason.
            EnclaveError: As ``AsyncEnclave.call``.

        """
        return self._call(function, args, kwargs, NO_OPTIONS)

    def options(
        self,
        *,
        timeout: float | None = None,
        kill_after: float | None = None,
        correlation: str | None = None,
    ) -> AsyncPoolOptions:
        """
        Return the same pool with other settings for its calls.

        Args:
            timeout: Seconds until a call raises CallTimeoutError, waiting for an enclave included.
            kill_after: As for ``AsyncEnclave.options``; the enclave that is ended is replaced.
            correlation: Id of the calls in errors and logs, as for ``Enclave.options``.

        Raises:
            ValueError: A number is impossible.

        """
        options = Options(timeout=timeout, kill_after=kill_after, correlation=correlation)
        return AsyncPoolOptions(self, options)

    async def map(
        self,
        function: str | Callable[..., Any],
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> AsyncIterator[Any]:
        """
        Call a function for each item, as ``AsyncEnclave.map``, in one enclave alone.

        Args:
            function: As for ``AsyncEnclave.map``, like the rest.
            items: One positional argument each.
            errors: ``raise`` an item's error in its place, or ``return`` it as its result.

        Raises:
            EnclaveError: As :meth:`enclave`, when the first result is asked for; batches are
                never sent again.

        """
        async with self.enclave() as one:
            async for result in one.map(function, items, errors=errors):
                yield result

    @contextlib.asynccontextmanager
    async def enclave(
        self, *, fresh: bool = False, timeout: float | None = None
    ) -> AsyncIterator[AsyncEnclave]:
        """
        Have one enclave alone, for calls that belong together.

        Args:
            fresh: As for ``EnclavePool.enclave``: a new enclave, ended with the block; else one of
                the pool, which goes back.
            timeout: Seconds to wait for one of the pool.

        Raises:
            BusyError: Too many wait, or too many fresh enclaves are in use; or this task itself
                has every enclave.
            CallTimeoutError: None came free in time.
            EnclaveError: As :meth:`call`.

        """
        self._check_process()
        if fresh:
            token = object()
            handle = None
            try:
                self._book.take_fresh(token)
                self._quiet_until = time.monotonic() + _QUIET
                async with await self._launch() as handle:
                    self._book.fresh_started(token, handle)
                    yield handle
                self._end_fresh(token, handle)
            except BaseException as error:
                self._end_fresh(token, handle, error)
                raise
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        ticket = Ticket(alone=True)
        try:
            member = await self._acquire(ticket, deadline)
            self._book.keep(ticket, asyncio.current_task())
            yield member.handle
        finally:
            # A stream may be open yet, or a call go on inside: its threads are asked.
            self._give(ticket, gave_up=True)

    # ---- calls --------------------------------------------------------------------------------

    def _function(self, name: str, signature: Signature, options: Options) -> Any:
        if signature.streams:
            return super()._function(name, signature, options)

        async def function(*args: Any, **kwargs: Any) -> Any:
            return await self._await_call(name, args, kwargs, options)

        return function

    def _call(
        self,
        function: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
    ) -> Any:
        name = function if isinstance(function, str) else getattr(function, "__qualname__", "")
        signature = self._signatures.get(name)
        if signature is None or not signature.streams:
            return self._await_call(function, args, kwargs, options)
        self._check_process()
        outer = self._nested_in()
        if outer is not None:
            return self._with_options(outer.handle, options).call(function, *args, **kwargs)
        return AsyncPoolStream(self, function, args, kwargs, options)

    async def _await_call(
        self,
        function: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
    ) -> Any:
        self._check_process()
        deadline = None if options.timeout is None else time.monotonic() + options.timeout
        if self._handles and (outer := self._nested_in()) is not None:
            return await self._view(outer, options, deadline).call(function, *args, **kwargs)
        for left in range(RETRIES, -1, -1):
            ticket = Ticket()
            try:
                member = await self._acquire(ticket, deadline)
                view = self._view(member, options, deadline)
                value = await view.call(function, *args, **kwargs)
                self._end_call(ticket, None)
                return value
            except BaseException as error:
                if not self._end_call(ticket, error, last=left == 0):
                    raise
        raise AssertionError("unreachable")

    def _nested_in(self) -> Member | None:
        """Return the enclave whose ocall this task's handler answers, if it is of this pool."""
        lanes = answered_lanes()
        if lanes is not None:
            for member in self._book.members:
                if member.handle._functions()[0].lanes is lanes:  # noqa: SLF001 - same package
                    return member
        return None

    def _with_options(
        self, handle: AsyncEnclave, options: Options
    ) -> AsyncEnclave | AsyncEnclaveOptions:
        return handle if options is NO_OPTIONS else AsyncEnclaveOptions(handle, options)

    async def _acquire(self, ticket: Ticket, deadline: float | None) -> Member:
        """Wait until *ticket* has an enclave; whatever happens, the caller gives it back."""
        loop = self._this_loop()
        while True:
            if not self._book.take(ticket):
                if deadline is None and self._book.waits_for_itself(asyncio.current_task()):
                    raise BusyError(SELF, advice="End one first, or make the pool larger.")
                gate: asyncio.Future[None] = loop.create_future()
                ticket.wake = lambda gate=gate: None if gate.done() else gate.set_result(None)
                ticket.since = time.monotonic()
                self._poke()
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                await asyncio.wait((gate,), timeout=left)
            if ticket.error is not None:
                raise ticket.error
            member = ticket.member
            if member is None:
                raise self._book.late(ticket, time.monotonic())
            if not member.handle.closed:
                return member
            self._lose(member, EnclaveClosedError("the enclave was closed"))
            self._book.forget(ticket, time.monotonic())
            self._poke()

    # ---- keeping ------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while self._book.state != "closed":
            plan = self._book.plan(time.monotonic())
            for member in plan.end:
                self._unwatch(member)
                with contextlib.suppress(*TROUBLE):
                    await member.handle.close()
            for _ in range(plan.launches):
                try:
                    await self._join(await self._launch())
                except TROUBLE as error:
                    self._failed(error)
            for member in plan.ask:
                self._spawn(self._ask(member))
            seconds = min(plan.seconds, await self._fill())
            if not plan.end and not plan.launches:
                await _wait(self._wake, max(0.001, seconds))

    async def _ask(self, member: Member) -> None:
        answered = False
        try:
            with contextlib.suppress(*TROUBLE):
                answered = await member.handle.ping(PROBE, timeout=_PING_SECONDS) == PROBE
        finally:
            self._book.asked(member, time.monotonic(), answered=answered)
            self._poke()

    async def _fill(self) -> float:
        reserve = self._reserve
        if reserve is None or self._book.state != "running":
            return math.inf
        left = self._quiet_until - time.monotonic()
        if left > 0:
            return left
        if reserve.open < self._book.limits.warm:
            # What fails here fails again, and is told, when an enclave is launched.
            with contextlib.suppress(*TROUBLE):
                await in_thread(lambda: reserve.fill(self._book.limits.warm))
        return math.inf


class AsyncPoolOptions(PoolView):
    """A pool with settings for its calls; made by ``AsyncEnclavePool.options``."""

    @overload
    def call(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncPoolStream[T]: ...

    @overload
    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`AsyncEnclavePool.call`, and CallTimeoutError when the deadline passes."""
        return self._pool._call(function, args, kwargs, self._options)  # noqa: SLF001


async def _wait(event: asyncio.Event | None, seconds: float) -> None:
    """Wait until *event* is set, or some time; it is cleared."""
    if event is None:
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), min(seconds, 60.0))
    event.clear()
