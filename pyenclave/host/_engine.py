"""Enclaves on an event loop: how calls are awaited, what is watched, what runs in threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pyenclave._core import AsyncCall, AsyncFunction, AsyncLanes, HostCall
from pyenclave.errors import (
    ArgumentError,
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    LaunchError,
)
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._run import Run

__all__ = ["AsyncStream", "Engine", "answered_lanes", "in_thread", "running_loop", "spawn"]

FRAME_OCALL = 132
FRAME_ITEM = 133

_T = TypeVar("_T")


class Engine:
    """A run's lanes on one event loop: what is readable when, and how calls are awaited."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop, queue: int, inline: bool) -> None:
        self.run = run
        self.loop = loop
        self._pid = os.getpid()
        self._retire: Callable[[], object] = lambda: None
        this = weakref.ref(self)
        self.lanes = AsyncLanes(
            run.lanes,
            queue,
            loop,
            asyncio.get_running_loop,
            lambda: _attach(this),
            lambda check: _broken(this, check),
            inline,
        )

    # ---- the loop's descriptors ----

    def attach(self) -> int:
        """Have the loop watch an eventfd, which is returned, and the worker's end."""
        loop = self.loop
        events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            death = os.dup(self.run.pidfd)
        except OSError:
            os.close(events)
            raise
        ready, ended = weakref.WeakMethod(self.ready), weakref.WeakMethod(self.worker_ended)
        retire = weakref.finalize(self, _retire, loop, (events, death), os.getpid())
        try:
            loop.add_reader(events, _call_weakly, ready)
            loop.add_reader(death, _call_weakly, ended)
        except BaseException:
            retire()
            raise
        self._retire = retire
        self._events, self._death = events, death
        return events

    def ready(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child that runs the parent's loop: the event is the parent's to take
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._events)
        self.lanes.ready()

    def worker_ended(self) -> None:
        """The worker's process ended. Why, the platform knows; asking takes time."""
        if os.getpid() != self._pid:
            return
        self.loop.remove_reader(self._death)
        spawn(self._learn_why)

    def _learn_why(self) -> None:
        error: EnclaveError = EnclaveLostError("the enclave's process ended")
        try:
            self.run.guard()
        except EnclaveError as why:
            error = why
        finally:  # whatever asking led to: who waits must hear of the end
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self.loop.call_soon_threadsafe(self._fail_all, error)

    def _fail_all(self, error: EnclaveError) -> None:
        def make(started: bool) -> EnclaveError:
            one = type(error)(error.message, advice=error.advice)
            one.expected, one.found = error.expected, error.found
            if isinstance(one, EnclaveLostError):
                one.started = started
            return one

        self.lanes.fail_all(make)

    def broken(self, check: str) -> EnclaveError:
        """The worker broke the protocol: refuse for ever, and end it."""
        error = self.run.mark_broken(check)
        self.loop.call_soon(self._fail_all, error)
        spawn(self.run.close)
        return error

    def close(self) -> None:
        """Fail what waits and give back thread and descriptors."""
        if _loop_of_this_thread() is self.loop or self.loop.is_closed():
            self._close()
        else:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        self.lanes.fail_all(lambda _started: EnclaveClosedError("the enclave was closed"))
        self.lanes.close()
        self._retire()

    # ---- calls ----

    def wrap(self, call: HostCall) -> Callable[..., Any]:
        """Return a trusted function as a coroutine function without options."""
        return self.function(call, NO_OPTIONS)

    def function(self, call: HostCall, options: Options) -> Callable[..., Any]:
        """Return a trusted function as a coroutine function, or one that returns a stream."""
        target = AsyncFunction(self.lanes, call)
        begin, nest, lanes = target.begin, target.nest, self.lanes
        wait = self._follow if options.timeout is None else self.wait

        async def plain(*args: Any, **kwargs: Any) -> Any:
            answer = begin(args, kwargs)
            return answer if type(answer) is not AsyncCall else await wait(answer, options)

        async def nesting(*args: Any, **kwargs: Any) -> Any:
            held = _held_here(lanes)
            answer = begin(args, kwargs) if held is None else nest(args, kwargs, held)
            return answer if type(answer) is not AsyncCall else await wait(answer, options)

        def streaming(*args: Any, **kwargs: Any) -> AsyncStream[Any]:
            def first(stream: AsyncStream[Any]) -> Any:
                held = _held_here(lanes)
                if held is None:
                    return begin(args, kwargs)
                answer = nest(args, kwargs, held)
                _streams_here().add(stream)
                return answer

            return AsyncStream(self, first, options, call.__name__)

        made: Callable[..., Any] = nesting if self.run.handles else plain
        if call.streams:
            made = streaming
        made.__name__ = made.__qualname__ = call.__name__
        made.__doc__ = call.__doc__
        return made

    async def wait(self, call: AsyncCall, options: Options) -> Any:
        """
        Wait for a call that was not answered at once, answering its ocalls.

        Returns:
            The answer; or the call itself, held by an item of its stream.

        """
        if options.timeout is None:
            return await self._follow(call, options)
        limit = asyncio.timeout(options.timeout)
        try:
            async with limit:
                return await self._follow(call, options)
        except TimeoutError:
            if not limit.expired():
                raise  # the function's or a handler's own
            call.expired()
            before = "" if call.started else " before the call began"
            raise CallTimeoutError(
                f"the deadline passed{before}",
                advice="A call that began may still run; its lane is free when it returns.",
            ) from None

    async def _follow(self, call: AsyncCall, options: Options) -> Any:
        waits = True
        try:
            while True:
                if call.future.done():
                    await asyncio.sleep(0)  # answered, but the others have waited long enough
                else:
                    await call.future
                answer = call.take()
                if answer is not call or call.held == FRAME_ITEM:
                    waits = False
                    return answer
                await self._answer(call)
        finally:
            if waits:
                self.give_up(call, options)

    async def _answer(self, call: AsyncCall) -> None:
        """Have the handler of an ocall run, and send what comes of it."""
        value: Any = None
        error: Exception | None = None
        try:
            handler, args, kwargs = call.request()
        except ArgumentError as refused:
            error = refused
        else:
            ended = call.hold()
            context = contextvars.copy_context()
            streams: weakref.WeakSet[AsyncStream[Any]] = weakref.WeakSet()
            context.run(_answering.set, (self.lanes, call, call.serial, streams))
            work: asyncio.Future[Any] = self.loop.create_task(
                _handle(handler, args, kwargs), context=context
            )
            try:
                await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not work.done():  # given up, or the enclave is gone
                    work.cancel()
                for stream in list(streams):
                    stream.leave()
            if ended.done():
                work.add_done_callback(_forget)
                return
            if work.cancelled():  # by itself; the call's own caller was not cancelled
                error = CancelledError("the handler was cancelled")
            else:
                value, error = work.result()
        while (vacant := call.vacant()) is not None:
            await vacant
        if call.held:
            call.respond(value, error)

    def give_up(self, call: AsyncCall, options: Options) -> None:
        """Stop waiting for a call; ``kill_after`` counts from now."""
        lane = call.give_up()
        if lane >= 0 and options.kill_after is not None and not self.loop.is_closed():
            late = weakref.WeakMethod(self.end_late)
            self.loop.call_later(
                options.kill_after, _call_weakly, late, call, lane, options.kill_after
            )

    def end_late(self, call: AsyncCall, lane: int, seconds: float) -> None:
        """End the worker if the given-up *call* still has its lane."""
        if self.lanes.still(lane, call):
            error = self.run.mark_late(seconds)
            self._fail_all(error)
            spawn(self.run.close)


class AsyncStream(Generic[_T]):
    """
    What a streaming function gives, item by item: ``async for item in enclave.f(...)``.

    The call begins with the first item that is asked for. It has its lane until it ends: by its
    last item, by an exception, by ``aclose()`` or the end of an ``async with`` block, or when it is
    dropped. ``timeout`` and ``kill_after`` hold for each item. One that the handler of an ocall
    opened is nested: it has the lane of the call that waits, and ends when the handler returns.
    """

    def __init__(
        self, engine: Engine, begin: Callable[[AsyncStream[Any]], Any], options: Options, name: str
    ) -> None:
        self._engine = engine
        self._begin: Callable[[AsyncStream[Any]], Any] | None = begin
        self._options = options
        self._name = name
        self._call: AsyncCall | None = None
        self._closed = False
        self._left = False
        self._busy = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        """Return the next item; raises what the function raised."""
        if self._left:
            raise EnclaveStateError(
                "the stream belongs to a handler that has answered its ocall",
                advice="Read it within the handler that opened it.",
            )
        if self._closed or not await self._step(stop=False):
            self._closed = True
            raise StopAsyncIteration
        call = self._call
        if call is None:
            raise StopAsyncIteration
        try:
            item: _T = call.item()
        except BaseException:
            self._drop()
            raise
        return item

    async def _step(self, *, stop: bool) -> bool:
        """Ask for an item or the end; whether an item came."""
        if self._busy:
            raise EnclaveStateError("the stream is in use already")
        self._busy = True
        try:
            call = self._call
            if call is None:
                begin, self._begin = self._begin, None
                answer = begin(self) if begin is not None else None
                if type(answer) is not AsyncCall:
                    return False  # it ended before its first item
                call = self._call = answer
            elif call.held:
                call.more(stop)  # else it is over, and what follows raises why
            await self._engine.wait(call, self._options)
        except BaseException:
            self._drop()
            raise
        finally:
            self._busy = False
        return not call.done

    async def aclose(self) -> None:
        """
        End the stream: the generator inside is closed, and the lane is free again.

        May be called twice. EcallError: what the generator raised when it was closed.
        """
        if self._closed:
            return
        self._closed = True
        call = self._call
        if call is not None and call.held and await self._step(stop=True):
            self._drop()

    def leave(self) -> None:
        """The handler that opened it has returned."""
        self._left = not self._closed
        self._drop()

    def _drop(self) -> None:
        self._closed = True
        call = self._call
        if call is not None and not call.done:
            self._engine.give_up(call, self._options)

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
        call = self._call
        if call is None or call.done:
            return
        engine, options = self._engine, self._options
        with contextlib.suppress(RuntimeError):  # the loop is closed
            engine.loop.call_soon_threadsafe(engine.give_up, call, options)

    def __repr__(self) -> str:
        return f"<stream of {self._name}{', ended' if self._closed else ''}>"


_Answering = tuple[AsyncLanes, AsyncCall, int, "weakref.WeakSet[AsyncStream[Any]]"]
# The ocall that the running handler answers: calls that it makes go over the same lane.
_answering: contextvars.ContextVar[_Answering | None] = contextvars.ContextVar(
    "pyenclave_answering", default=None
)


def _held_here(lanes: AsyncLanes) -> AsyncCall | None:
    """Return the call whose ocall this task's handler answers, while it does."""
    found = _answering.get()
    if found is None or found[0] is not lanes:
        return None
    _, call, serial, _ = found
    return call if call.held == FRAME_OCALL and call.serial == serial else None


def _streams_here() -> weakref.WeakSet[AsyncStream[Any]]:
    """Return the streams that this task's handler opened."""
    found = _answering.get()
    return weakref.WeakSet() if found is None else found[3]


def answered_lanes() -> AsyncLanes | None:
    """Return the lanes of the enclave whose ocall this task's handler answers, while it does."""
    found = _answering.get()
    return None if found is None or _held_here(found[0]) is None else found[0]


async def _handle(
    handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Exception | None]:
    """Run a handler: a coroutine function here, any other in a thread, which may block."""
    try:
        if inspect.iscoroutinefunction(handler):
            return await handler(*args, **kwargs), None
        context = contextvars.copy_context()
        value = await in_thread(lambda: context.run(handler, *args, **kwargs))
        return (await value if inspect.isawaitable(value) else value), None
    except Exception as error:
        return None, error


def _forget(work: asyncio.Future[Any]) -> None:
    if not work.cancelled():
        work.exception()  # asked for, so that nobody complains that nobody did


def running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise EnclaveStateError(
            "no asyncio event loop runs here",
            advice="Use AsyncEnclave in a coroutine under asyncio; Enclave is for threads.",
        ) from None


def _loop_of_this_thread() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _attach(engine: weakref.ref[Engine]) -> int:
    this = engine()
    if this is None:
        raise EnclaveClosedError("the enclave was closed")
    return this.attach()


def _broken(engine: weakref.ref[Engine], check: str) -> EnclaveError:
    this = engine()
    return EnclaveClosedError("the enclave was closed") if this is None else this.broken(check)


def _call_weakly(method: weakref.WeakMethod[Any], *args: object) -> None:
    # The loop must not keep a forgotten handle, and with it an enclave, alive.
    this = method()
    if this is not None:
        this(*args)


def _retire(loop: asyncio.AbstractEventLoop, fds: tuple[int, ...], pid: int) -> None:
    """Have the loop forget *fds*, then close them: in that order, and on the loop's thread."""

    def close() -> None:
        for fd in fds:
            if not loop.is_closed() and os.getpid() == pid:
                loop.remove_reader(fd)
            os.close(fd)

    if os.getpid() != pid or loop.is_closed() or _loop_of_this_thread() is loop:
        close()
        return
    try:
        loop.call_soon_threadsafe(close)
    except RuntimeError:  # closed in between
        close()


def spawn(work: Callable[[], object]) -> None:
    """Run *work* in a thread of its own, or here if there can be none."""
    try:
        threading.Thread(target=work, name="pyenclave", daemon=True).start()
    except RuntimeError:
        work()


async def in_thread(work: Callable[[], _T], abandoned: Callable[[_T], object] | None = None) -> _T:
    """
    Run *work* in a thread of its own and wait for it.

    If the caller is cancelled, the thread goes on, and what it returns is given to *abandoned*.
    The loop's own pool is not used: the program's blocking calls may have filled it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Callable[[], _T]] = loop.create_future()

    def deliver(answer: Callable[[], _T]) -> None:
        if future.cancelled():
            spawn(lambda: _give_to(abandoned, answer))
        else:
            future.set_result(answer)

    def body() -> None:
        answer = _outcome(work)
        try:
            loop.call_soon_threadsafe(deliver, answer)
        except RuntimeError:  # the loop is closed
            _give_to(abandoned, answer)

    try:
        threading.Thread(target=body, name="pyenclave", daemon=True).start()
    except RuntimeError as error:
        raise LaunchError(f"the host cannot start a thread: {error}") from None
    try:
        answer = await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled():
            late = future.result()
            spawn(lambda: _give_to(abandoned, late))
        raise
    return answer()


def _outcome(work: Callable[[], _T]) -> Callable[[], _T]:
    """Call *work* now; what is returned gives or raises what came of it."""
    try:
        result = work()
    except BaseException as caught:
        error = caught

        def fail() -> _T:
            raise error

        return fail
    return lambda: result


def _give_to(abandoned: Callable[[_T], object] | None, answer: Callable[[], _T]) -> None:
    if abandoned is not None:
        with contextlib.suppress(Exception):  # it failed: nothing was made that is left behind
            abandoned(answer())
