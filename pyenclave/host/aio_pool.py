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
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, NoReturn, Self

from pyenclave.calls.signature import Signature
from pyenclave.calls.stats import registry
from pyenclave.errors import (
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
)
from pyenclave.host import _images
from pyenclave.host._base import DEFAULT_QUEUE, NoSuchAttributeError
from pyenclave.host._book import Book, Limits, Member, PoolStats, Ticket
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._reserve import Reserve
from pyenclave.host._run import read_image
from pyenclave.host.aio import AsyncEnclave, AsyncEnclaveOptions

__all__ = ["AsyncEnclavePool"]

_PING_SECONDS = 5.0
_SLICE = 0.1
_QUIET = 0.02  # seconds after a hand-out in which none is replaced
_RETRIES = 3  # of a call whose enclave was lost before it began, each time another one
_NO_WAIT = 0.99  # of a deadline that is left counts as all of it
_VIEWS = 16  # sets of options that an enclave keeps functions for
_PROBE = b"pool"


class AsyncEnclavePool:
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
        inline: As for ``AsyncEnclave``.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A number is impossible.

    """

    def __init__(
        self,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        size: int = 2,
        max_size: int | None = None,
        warm: int = 1,
        queue: int = 1024,
        max_calls: int | None = None,
        max_age: float | None = None,
        shrink_after: float = 60.0,
        health: float = 10.0,
        stuck_after: float = 30.0,
        give_up: int = 8,
        max_fresh: int = 32,
        debug: bool | None = None,
        require: tuple[str, ...] | list[str] = (),
        state: str | os.PathLike[str] | None = None,
        quiet: bool = False,
        inline: bool = True,
    ) -> None:
        limits = Limits(
            size=size,
            max_size=size if max_size is None else max_size,
            warm=warm,
            queue=queue,
            max_calls=max_calls,
            max_age=max_age,
            shrink_after=shrink_after,
            health=health,
            stuck_after=stuck_after,
            give_up=give_up,
            max_fresh=max_fresh,
        )
        # The handle checks its arguments; it is never started.
        AsyncEnclave(image, debug=debug, require=require, state=state, quiet=quiet, inline=inline)
        self._settings: dict[str, Any] = {
            "debug": debug,
            "require": tuple(require),
            "state": state,
        }
        self._source = image
        self._script: str | os.PathLike[str] | None = None
        self._inline = inline
        self._quiet = quiet
        self._data = b""
        self._threads = 1
        self._signatures: dict[str, Signature] = {}
        self._pid = os.getpid()
        self._book = Book(limits, random.random)  # jitter only: nothing secret depends on it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reserve: Reserve | None = None
        self._wake: asyncio.Event | None = None
        self._released: asyncio.Event | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._watched: dict[Member, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._quiet_until = 0.0

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

    # ---- life ---------------------------------------------------------------------------------

    async def start(self) -> Self:
        """
        Launch the enclaves; returns when all of them run.

        Raises:
            ImageError: The image is refused.
            LaunchError: An enclave could not be started. None is left behind.
            EnclaveStateError: The pool was started before.

        """
        self._check_process()
        if self._book.state != "new":
            raise EnclaveStateError("the pool was started already")
        self._loop = asyncio.get_running_loop()
        self._book.state = "running"
        self._wake, self._released = asyncio.Event(), asyncio.Event()
        try:
            image = await asyncio.to_thread(self._prepare)
            self._threads = image.info.threads
            self._signatures = {item.name: item for item in image.signatures}
            self._book.queue.name = image.info.name
            registry.add_queue(self._book.queue, self)
            for done in range(self._book.plan(time.monotonic()).launches):
                try:
                    await self._join(await self._launch(quiet=self._quiet or done > 0))
                except EnclaveError as error:
                    self._book.failed(error, time.monotonic())
                    raise
            self._keeper = asyncio.create_task(self._keep(), name="pyenclave-pool")
        except BaseException:
            await self.close()
            raise
        return self

    def _prepare(self) -> _images.Prepared:
        if self._script is None:
            self._data = read_image(self._source)
        else:
            from pyenclave.image.build import build_script

            self._data = build_script(os.fsdecode(self._script))
        if self._book.limits.warm:
            self._reserve = Reserve(self._data, queue=DEFAULT_QUEUE, **self._settings)
        return _images.prepare(self._data)

    async def _launch(self, *, quiet: bool = True) -> AsyncEnclave:
        handle = AsyncEnclave(self._data, quiet=quiet, inline=self._inline, **self._settings)
        handle._reserve = self._reserve  # noqa: SLF001 - of the same package
        return await handle.start()

    async def _join(self, handle: AsyncEnclave) -> None:
        engine, _ = handle._functions()  # noqa: SLF001 - of the same package
        lanes = engine.lanes
        now = time.monotonic()
        member = Member(handle=handle, lanes=self._threads, late=lambda: lanes.busy, started=now)
        if not self._book.joined(member, now):
            await handle.close()
            return
        fd = os.dup(handle._running().pidfd)  # noqa: SLF001
        self._watched[member] = fd
        self._this_loop().add_reader(fd, self._ended, member)

    def _ended(self, member: Member) -> None:
        self._lose(member, EnclaveLostError("the enclave's process ended"))

    def _unwatch(self, member: Member) -> None:
        fd = self._watched.pop(member, -1)
        if fd >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(fd)
            os.close(fd)

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
            await _wait(self._released, left)
        return True

    async def close(self, timeout: float = 0.0) -> None:
        """
        End the pool and its enclaves. May be called twice.

        Args:
            timeout: Seconds for calls under way, as :meth:`drain`; what still runs then is ended
                with its enclave, and its caller gets EnclaveClosedError.

        """
        if os.getpid() != self._pid:
            return  # the parent's enclaves are not the child's to end
        if timeout > 0:
            await self.drain(timeout)
        members = self._book.close()
        self._poke()
        for member in members:
            self._unwatch(member)
        await asyncio.gather(*(member.handle.close() for member in members))
        keeper, self._keeper = self._keeper, None
        # Another loop's task cannot be awaited here; it ends when that loop runs, if ever.
        mine = self._loop is asyncio.get_running_loop()
        if keeper is not None and mine and keeper is not asyncio.current_task():
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        if self._reserve is not None:
            await asyncio.to_thread(self._reserve.close)

    def restart(self) -> None:
        """Try to start enclaves again after the pool gave up."""
        self._check_process()
        self._book.restart()
        self._poke()

    def close_on_sigterm(self, timeout: float = 10.0) -> None:
        """
        Drain and close this pool when the process gets SIGTERM, then do what was done before.

        As :meth:`EnclavePool.close_on_sigterm`. A server that has its own shutdown closes the
        pool there instead.

        Args:
            timeout: Seconds for calls under way.

        Raises:
            EnclaveStateError: The loop does not run in the main thread, or the pool not at all.

        """
        self._check_process()
        self._book.check()
        before = signal.getsignal(signal.SIGTERM)
        loop = self._this_loop()

        async def end() -> None:
            await self.close(timeout)
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, before)
            if before is signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)

        def handle() -> None:
            self._book.drain()
            self._spawn(end())
            if callable(before):
                before(signal.SIGTERM, None)

        try:
            loop.add_signal_handler(signal.SIGTERM, handle)
        except (RuntimeError, ValueError) as error:
            raise EnclaveStateError(
                f"handlers of signals are set in the main thread: {error}"
            ) from None

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

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EnclaveStateError(
                "this pool belongs to the process that made it, not to a forked child",
                advice="Make the pool after forking, in each worker.",
            )

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

    async def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function in one of the enclaves.

        Args:
            function: As for ``AsyncEnclave.call``, like the rest.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            BusyError: Too many calls wait.
            EnclaveClosedError: The pool is draining, closed or not started.
            EnclaveLostError: The enclave ended while the call may have run inside, or before it
                began in every enclave that was tried.
            LaunchError: The pool gave up; the error names the last reason.
            EnclaveError: As ``AsyncEnclave.call``.

        """
        return await self._call(function, args, kwargs, NO_OPTIONS)

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
            BusyError: Too many wait, or too many fresh enclaves are in use.
            CallTimeoutError: None came free in time.
            EnclaveError: As :meth:`call`.

        """
        self._check_process()
        if fresh:
            self._book.take_fresh()
            try:
                self._quiet_until = time.monotonic() + _QUIET
                async with await self._launch() as one:
                    yield one
            finally:
                self._book.fresh -= 1
                self._notify()
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        member = await self._acquire(deadline, alone=True)
        handle: AsyncEnclave = member.handle
        gave_up = True
        try:
            yield handle
            gave_up = False
        finally:
            self._release(member, gave_up=gave_up)

    @property
    def stats(self) -> PoolStats:
        """What the pool is doing, and what was counted; also after it was closed."""
        return self._book.stats()

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        return _attribute(self, name, NO_OPTIONS)

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *self._signatures])

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool of enclaves cannot be pickled or copied")

    def __repr__(self) -> str:
        stats = self._book.stats()
        return (
            f"<AsyncEnclavePool, {stats.state}, {stats.enclaves} enclaves, {stats.running} calls>"
        )

    # ---- calls --------------------------------------------------------------------------------

    async def _call(
        self,
        function: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
    ) -> Any:
        self._check_process()
        begun = time.monotonic()
        deadline = None if options.timeout is None else begun + options.timeout
        for left in range(_RETRIES, -1, -1):
            member = await self._acquire(deadline)
            gave_up = False
            try:
                return await _view(member, options, deadline).call(function, *args, **kwargs)
            except EnclaveLostError as error:
                self._lose(member, error)
                # None or True: nobody knows that it did not begin.
                if error.started is not False or left == 0:
                    raise
                self._book.again()
            except EnclavePoisonedError as error:
                self._lose(member, error)
                raise
            except (CallTimeoutError, asyncio.CancelledError):
                gave_up = True
                raise
            finally:
                self._release(member, gave_up=gave_up)
        raise AssertionError("unreachable")

    async def _acquire(self, deadline: float | None, *, alone: bool = False) -> Member:
        loop = self._this_loop()
        while True:
            now = time.monotonic()
            member = self._book.take(now, alone=alone)
            if member is None:
                member = await self._await(loop, deadline, now, alone=alone)
            if not member.handle.closed:
                return member
            self._lose(member, EnclaveClosedError("the enclave was closed"))
            self._release(member)

    async def _await(
        self, loop: asyncio.AbstractEventLoop, deadline: float | None, now: float, *, alone: bool
    ) -> Member:
        gate: asyncio.Future[None] = loop.create_future()
        ticket = Ticket(
            wake=lambda: None if gate.done() else gate.set_result(None), since=now, alone=alone
        )
        self._book.wait(ticket)
        self._poke()
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            await asyncio.wait((gate,), timeout=left)
        except BaseException:
            self._book.forget(ticket, time.monotonic())
            raise
        if ticket.error is not None:
            raise ticket.error
        if ticket.member is None:
            raise self._book.late(ticket, time.monotonic())
        return ticket.member

    def _release(self, member: Member, *, gave_up: bool = False) -> None:
        self._book.give(member, time.monotonic(), gave_up=gave_up)
        if self._released is not None and self._book.state == "draining":
            self._released.set()
        if member.leaving or gave_up:
            self._poke()

    def _notify(self) -> None:
        if self._released is not None:
            self._released.set()
        self._poke()

    def _lose(self, member: Member, error: EnclaveError) -> None:
        self._unwatch(member)
        self._book.lost(member, error, time.monotonic())
        self._poke()

    # ---- keeping ------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while self._book.state != "closed":
            plan = self._book.plan(time.monotonic())
            for member in plan.end:
                self._unwatch(member)
                await member.handle.close()
            for _ in range(plan.launches):
                try:
                    await self._join(await self._launch())
                except EnclaveError as error:
                    self._book.failed(error, time.monotonic())
            for member in plan.ask:
                self._spawn(self._ask(member))
            seconds = min(plan.seconds, await self._fill())
            if not plan.end and not plan.launches:
                await _wait(self._wake, max(0.001, seconds))

    async def _ask(self, member: Member) -> None:
        answered = False
        with contextlib.suppress(EnclaveError):
            answered = await member.handle.ping(_PROBE, timeout=_PING_SECONDS) == _PROBE
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
            with contextlib.suppress(EnclaveError, OSError):
                await asyncio.to_thread(reserve.fill, self._book.limits.warm)
        return math.inf


class AsyncPoolOptions:
    """A pool with settings for its calls; made by ``AsyncEnclavePool.options``."""

    def __init__(self, pool: AsyncEnclavePool, options: Options) -> None:
        self._pool = pool
        self._options = options

    async def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`AsyncEnclavePool.call`, and CallTimeoutError when the deadline passes."""
        return await self._pool._call(function, args, kwargs, self._options)  # noqa: SLF001

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        return _attribute(self._pool, name, self._options)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool of enclaves cannot be pickled or copied")


def _view(
    member: Member, options: Options, deadline: float | None
) -> AsyncEnclave | AsyncEnclaveOptions:
    """Return what a call that begins now is made through."""
    handle: AsyncEnclave = member.handle
    if options is NO_OPTIONS:
        return handle
    left = math.inf if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise CallTimeoutError("the deadline passed before the call could begin")
    if options.timeout is not None and left < _NO_WAIT * options.timeout:
        # It waited for an enclave, and has less than the whole time.
        return handle.options(timeout=left, kill_after=options.kill_after)
    view: AsyncEnclaveOptions | None = member.views.get(options)
    if view is None:
        view = handle.options(timeout=options.timeout, kill_after=options.kill_after)
        if len(member.views) < _VIEWS:
            member.views[options] = view
    return view


def _attribute(
    pool: AsyncEnclavePool, name: str, options: Options
) -> Callable[..., Coroutine[Any, Any, Any]]:
    if name.startswith("_"):
        raise AttributeError(name)
    if pool._book.state == "new":  # noqa: SLF001 - of this module
        raise EnclaveClosedError(
            "the pool is not started", advice="Use it in an `async with` block, or await start()."
        )
    signature = pool._signatures.get(name)  # noqa: SLF001
    if signature is None:
        raise NoSuchAttributeError(
            f"the enclaves have no function {name!r}",
            advice=f"They have: {', '.join(pool._signatures) or 'none'}.",  # noqa: SLF001
        )

    async def function(*args: Any, **kwargs: Any) -> Any:
        return await pool._call(name, args, kwargs, options)  # noqa: SLF001

    function.__name__ = function.__qualname__ = name
    function.__doc__ = str(signature)
    return function


async def _wait(event: asyncio.Event | None, seconds: float) -> None:
    """Wait until *event* is set, or some time; it is cleared."""
    if event is None:
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), min(seconds, 60.0))
    event.clear()
