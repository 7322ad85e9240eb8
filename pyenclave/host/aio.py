"""
The handle on one enclave for asyncio: the twin of ``enclave.Enclave``.

A call is written to shared memory by the task that makes it, and its answer looked for at once for
some microseconds: most short functions answer without a turn of the event loop. Else a watcher
thread, in C, makes a descriptor readable on which the loop waits like on any socket. Nothing that
takes time (launching, closing, asking the platform) runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from pyenclave._core import AsyncCall, AsyncFunction, AsyncLanes, HostCall
from pyenclave.errors import (
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    LaunchError,
)
from pyenclave.host._base import (
    DEFAULT_QUEUE,
    FRAME_ATTEST,
    FRAME_PING,
    Handle,
    attribute,
    find,
    nonce_of,
)
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._run import Run
from pyenclave.host.handle import Evidence, Functions

__all__ = ["AsyncEnclave"]

_T = TypeVar("_T")


class AsyncEnclave(Handle):
    """
    An enclave for asyncio: trusted code in a process of its own, and the calls into it.

    It belongs to the event loop that first uses it; on another it raises EnclaveStateError. Where
    anyio runs on asyncio it works; other loops (trio) are not supported.

    Cancelling a call, or a deadline, means that the caller stops waiting. A call that still waits
    for a thread of the enclave then never starts; one that runs inside goes on, and its thread is
    free when it returns, unless ``options(kill_after=...)`` says to end the worker first.

    Args:
        image: Path of an image, or its bytes.
        debug: Launch as debug (True), as production (False), or as production if the image is
            signed and else as debug (None).
        require: Names of protection bits without which the launch is refused.
        state: The state directory; None for ``PYENCLAVE_STATE`` or the default.
        queue: How many calls may wait for a thread of the enclave; more raise BusyError.
        quiet: Do not say on stderr that an unsigned image runs as debug.
        inline: Look for an answer for up to 50 microseconds before the loop gets its turn, for
            functions that usually answer so soon. False: never.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: *queue* is negative.

    """

    def __init__(
        self,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        debug: bool | None = None,
        require: Sequence[str] = (),
        state: str | os.PathLike[str] | None = None,
        queue: int = DEFAULT_QUEUE,
        quiet: bool = False,
        inline: bool = True,
    ) -> None:
        super().__init__(image, debug=debug, require=require, state=state, queue=queue, quiet=quiet)
        if not isinstance(inline, bool):
            raise TypeError(f"inline is True or False, not {inline!r}")
        self._inline = inline
        self._script: str | os.PathLike[str] | None = None
        self._starting = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: _Engine | None = None
        self._made: Functions | None = None

    @classmethod
    def from_file(cls, script: str | os.PathLike[str], **options: Any) -> Self:
        """
        Make an enclave of a single Python file, unsigned, launched as debug.

        The file is built when the enclave is started, off the loop's thread.

        Args:
            script: The file; ``__file__`` for the running script.
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

    def _bind(self) -> asyncio.AbstractEventLoop:
        self._check_process()
        loop = _running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise EnclaveStateError(
                "this handle belongs to another event loop",
                expected="the loop that first used it",
                found="another one",
                advice="Make an AsyncEnclave in each loop.",
            )
        return loop

    async def start(self) -> Self:
        """
        Launch the enclave, in a thread. Cancelled, it leaves no enclave behind.

        Raises:
            ImageError: The image is refused (SignatureError, RuntimeLockError among them).
            LaunchError: It could not be started, or a required protection is missing.
            EnclaveStateError: It was started before, or belongs to another process or loop.

        """
        loop = self._bind()
        self._check_may_start()
        if self._starting:
            raise EnclaveStateError("the enclave is being started already")
        self._starting = True
        try:
            run = await _in_thread(self._launch, Run.close)
        finally:
            self._starting = False
        if self._closed:
            await _in_thread(run.close)
            self._check_may_start()
        self._engine = _Engine(run, loop, self._queue, self._inline)
        self._made = run.functions.with_options(NO_OPTIONS, self._engine.wrap)
        self._run = run
        return self

    async def close(self) -> None:
        """End the enclave at once, running calls included. May be called twice."""
        if os.getpid() != self._pid:
            return  # the parent's enclave is not the child's to end
        self._closed = True
        run, engine = self._run, self._engine
        if run is None or engine is None:
            return
        run.mark_closed()
        engine.close()
        await _in_thread(run.close)

    async def __aenter__(self) -> Self:
        if self._run is None or self._closed:
            await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # ---- use ----------------------------------------------------------------------------------

    def _functions(self) -> tuple[_Engine, Functions]:
        self._running()
        if self._engine is None or self._made is None:
            raise EnclaveClosedError("the enclave is not started")
        return self._engine, self._made

    def call(
        self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Any]:
        """
        Call a trusted function: ``await enclave.call("double", 21)``.

        Args:
            function: Its name, or the host's own function of that name; then classes of its
                module are used for what comes back.
            args: Positional arguments. What they point to (arrays) must not change before the
                call is over.
            kwargs: Keyword arguments; ``out=`` is an array that takes an array result.

        Raises:
            UnknownFunctionError: The enclave has no such function.
            ArgumentError: An argument does not fit the signature, or a limit.
            EcallError: The function raised.
            BusyError: Too many calls wait.
            EnclaveLostError: The worker ended; ``started`` says whether the call may have begun.
            EnclavePoisonedError: The protocol was broken; the enclave is gone for ever.

        """
        made: Coroutine[Any, Any, Any] = find(self._functions()[1], function)(*args, **kwargs)
        return made

    def options(
        self,
        *,
        timeout: float | None = None,
        kill_after: float | None = None,
        correlation: str | None = None,
    ) -> AsyncEnclaveOptions:
        """
        Return the same enclave with other settings for its calls.

        Args:
            timeout: Seconds until a call raises CallTimeoutError, waiting for a thread of the
                enclave included. The function inside is not stopped.
            kill_after: Seconds that a call may still run after its caller stopped waiting
                (deadline or cancellation); then the worker is ended, and every call raises
                EnclaveLostError.
            correlation: Id of the calls in errors and logs, as for ``Enclave.options``.

        Raises:
            ValueError: *timeout* is not a positive number, *kill_after* is negative, or
                *correlation* has characters that it may not have.

        """
        options = Options(timeout=timeout, kill_after=kill_after, correlation=correlation)
        return AsyncEnclaveOptions(self, options)

    async def attest(self, nonce: bytes = b"", *, timeout: float | None = None) -> Evidence:
        """
        Return evidence of what runs inside.

        Args:
            nonce: What the relying party sent, at most 1024 bytes; it proves freshness.
            timeout: Seconds, or None.

        Raises:
            ArgumentError: The nonce is too long.
            EnclaveStateError: The enclave does not run.

        """
        options = NO_OPTIONS if timeout is None else Options(timeout=timeout)
        return Evidence(await self._request(FRAME_ATTEST, nonce_of(nonce), options))

    async def ping(self, data: bytes = b"", *, timeout: float | None = None) -> bytes:
        """Send *data* through a lane and back, without any trusted function."""
        options = NO_OPTIONS if timeout is None else Options(timeout=timeout)
        return await self._request(FRAME_PING, data, options)

    async def _request(self, kind: int, data: bytes, options: Options) -> bytes:
        engine = self._functions()[0]
        answer = engine.lanes.request(kind, data)
        if isinstance(answer, AsyncCall):
            answer = await engine.wait(answer, options)
        raw: bytes = answer
        return raw

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        function = attribute(self._functions()[1], name)
        self.__dict__[name] = function  # found without this method from now on
        return function


class AsyncEnclaveOptions:
    """An enclave with settings for its calls; made by ``AsyncEnclave.options``."""

    def __init__(self, enclave: AsyncEnclave, options: Options) -> None:
        self._enclave = enclave
        self._options = options
        self._made: Functions | None = None

    def _find(self) -> Functions:
        engine, functions = self._enclave._functions()  # noqa: SLF001 - of the same module
        if self._made is None:
            wrap = engine.wrapper(self._options)
            self._made = functions.with_options(self._options, wrap)
        return self._made

    def call(
        self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Any]:
        """As :meth:`AsyncEnclave.call`, and CallTimeoutError when the deadline passes."""
        made: Coroutine[Any, Any, Any] = find(self._find(), function)(*args, **kwargs)
        return made

    async def attest(self, nonce: bytes = b"") -> Evidence:
        """As :meth:`AsyncEnclave.attest`."""
        request = self._enclave._request  # noqa: SLF001
        return Evidence(await request(FRAME_ATTEST, nonce_of(nonce), self._options))

    async def ping(self, data: bytes = b"") -> bytes:
        """As :meth:`AsyncEnclave.ping`."""
        return await self._enclave._request(FRAME_PING, data, self._options)  # noqa: SLF001

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        function = attribute(self._find(), name)
        self.__dict__[name] = function
        return function

    def __reduce__(self) -> NoReturn:
        raise TypeError("an enclave's handle cannot be pickled or copied")


class _Engine:
    """A run's lanes on one event loop: what is readable when, and how calls are awaited."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop, queue: int, inline: bool) -> None:
        self.run = run
        self.loop = loop
        self._retire: Callable[[], object] = lambda: None
        this = weakref.ref(self)
        self.lanes = AsyncLanes(
            run.lanes,
            queue,
            loop,
            _running_loop,
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
        self._retire = weakref.finalize(self, _retire, loop, (events, death), os.getpid())
        loop.add_reader(events, _call_weakly, ready)
        loop.add_reader(death, _call_weakly, ended)
        self._events, self._death = events, death
        return events

    def ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._events)
        self.lanes.ready()

    def worker_ended(self) -> None:
        """The worker's process ended. Why, the platform knows; asking takes time."""
        self.loop.remove_reader(self._death)
        _spawn(self._learn_why)

    def _learn_why(self) -> None:
        error: EnclaveError = EnclaveLostError("the enclave's process ended")
        try:
            self.run.guard()
        except EnclaveError as why:
            error = why
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
        _spawn(self.run.close)
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

    def wrap(self, call: HostCall) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a trusted function as a coroutine function without options."""
        begin, wait = AsyncFunction(self.lanes, call).begin, self.wait

        async def function(*args: Any, **kwargs: Any) -> Any:
            answer = begin(args, kwargs)
            return answer if type(answer) is not AsyncCall else await wait(answer, NO_OPTIONS)

        return _named(function, call)

    def wrapper(
        self, options: Options
    ) -> Callable[[HostCall], Callable[..., Coroutine[Any, Any, Any]]]:
        """Return what makes coroutine functions with *options*."""

        def wrap(call: HostCall) -> Callable[..., Coroutine[Any, Any, Any]]:
            begin, wait = AsyncFunction(self.lanes, call).begin, self.wait

            async def function(*args: Any, **kwargs: Any) -> Any:
                answer = begin(args, kwargs)
                return answer if type(answer) is not AsyncCall else await wait(answer, options)

            return _named(function, call)

        return wrap

    async def wait(self, call: AsyncCall, options: Options) -> Any:
        """Wait for a call that was not answered at once."""
        timer = None
        if options.timeout is not None:
            timer = self.loop.call_later(options.timeout, self._expire, call, options)
        try:
            if call.future.done():
                await asyncio.sleep(0)  # answered, but the others have waited long enough
            else:
                await call.future
            return call.take()
        finally:
            if timer is not None:
                timer.cancel()
            if not call.done:
                self._give_up(call, options)

    def _expire(self, call: AsyncCall, options: Options) -> None:
        if call.future.done():
            return
        text = (
            "the deadline passed" if call.started else "the deadline passed before the call began"
        )
        self._give_up(call, options)
        call.expire(
            CallTimeoutError(
                text, advice="A call that began may still run; its lane is free when it returns."
            )
        )

    def _give_up(self, call: AsyncCall, options: Options) -> None:
        lane = call.give_up()
        if lane >= 0 and options.kill_after is not None and not self.loop.is_closed():
            self.loop.call_later(
                options.kill_after,
                _call_weakly,
                weakref.WeakMethod(self.end_late),
                call,
                lane,
                options.kill_after,
            )

    def end_late(self, call: AsyncCall, lane: int, seconds: float) -> None:
        """End the worker if the given-up *call* still has its lane."""
        if self.lanes.still(lane, call):
            error = self.run.mark_late(seconds)
            self._fail_all(error)
            _spawn(self.run.close)


def _named(
    function: Callable[..., Coroutine[Any, Any, Any]], call: HostCall
) -> Callable[..., Coroutine[Any, Any, Any]]:
    function.__name__ = function.__qualname__ = call.__name__
    function.__doc__ = call.__doc__
    return function


def _running_loop() -> asyncio.AbstractEventLoop:
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


def _attach(engine: weakref.ref[_Engine]) -> int:
    this = engine()
    if this is None:
        raise EnclaveClosedError("the enclave was closed")
    return this.attach()


def _broken(engine: weakref.ref[_Engine], check: str) -> EnclaveError:
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


def _spawn(work: Callable[[], object]) -> None:
    """Run *work* in a thread of its own, or here if there can be none."""
    try:
        threading.Thread(target=work, name="pyenclave", daemon=True).start()
    except RuntimeError:
        work()


async def _in_thread(work: Callable[[], _T], abandoned: Callable[[_T], object] | None = None) -> _T:
    """
    Run *work* in a thread of its own and wait for it.

    If the caller is cancelled, the thread goes on, and what it returns is given to *abandoned*.
    The loop's own pool is not used: the program's blocking calls may have filled it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def forget(result: _T) -> None:
        if abandoned is not None:
            abandoned(result)

    def deliver(result: _T | None, error: BaseException | None) -> None:
        if not future.cancelled():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]
        elif error is None:
            _spawn(lambda: forget(result))  # type: ignore[arg-type]

    def body() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # raised again in the waiting task
            error = caught
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:  # the loop is closed
            if error is None:
                forget(result)  # type: ignore[arg-type]

    try:
        threading.Thread(target=body, name="pyenclave", daemon=True).start()
    except RuntimeError as error:
        raise LaunchError(f"the host cannot start a thread: {error}") from None
    try:
        return await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled() and future.exception() is None:
            result = future.result()
            _spawn(lambda: forget(result))
        raise
