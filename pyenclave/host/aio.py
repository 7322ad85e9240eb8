"""
The handle on one enclave for asyncio: the twin of ``enclave.Enclave``.

A call is written to shared memory by the task that makes it, and its answer looked for at once for
some microseconds: most short functions answer without a turn of the event loop. Else a watcher
thread, in C, makes a descriptor readable on which the loop waits like on any socket. Nothing that
takes time (launching, closing, asking the platform) runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncIterable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from types import TracebackType
from typing import Any, Literal, NoReturn, ParamSpec, Self, TypeVar, overload

from pyenclave._core import AsyncCall
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveStateError,
)
from pyenclave.host._aio_map import AsyncResults, async_results
from pyenclave.host._base import (
    DEFAULT_QUEUE,
    FRAME_ATTEST,
    FRAME_PING,
    Handle,
    attribute,
    find,
    nonce_of,
)
from pyenclave.host._engine import AsyncStream, Engine, in_thread, running_loop
from pyenclave.host._map import check_errors
from pyenclave.host._ocalls import Handlers
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._run import Run
from pyenclave.host.handle import Evidence, Functions

__all__ = ["AsyncEnclave"]

P = ParamSpec("P")
T = TypeVar("T")


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
        ocalls: A handler for each host function that the image declares, by name. Coroutine
            functions are awaited on the loop, others run in a thread, so that they may block.
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
        ocalls: Handlers | None = None,
        inline: bool = True,
    ) -> None:
        super().__init__(
            image,
            debug=debug,
            require=require,
            state=state,
            queue=queue,
            quiet=quiet,
            ocalls=ocalls,
        )
        if not isinstance(inline, bool):
            raise TypeError(f"inline is True or False, not {inline!r}")
        self._inline = inline
        self._script: str | os.PathLike[str] | None = None
        self._asked: tuple[int | str, int | str, Iterable[str], bool] = (0, 0, (), False)
        self._starting = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._made: Functions | None = None

    _async_handlers = True

    @classmethod
    def from_file(
        cls,
        script: str | os.PathLike[str],
        *,
        shared_memory: int | str = 0,
        sealed_memory: int | str = 0,
        sealed_files: Iterable[str] = (),
        release: bool = False,
        **options: Any,
    ) -> Self:
        """
        Make an enclave of a single Python file, unsigned, launched as debug.

        The file is built when the enclave is started, off the loop's thread.

        Args:
            script: The file; ``__file__`` for the running script.
            shared_memory: As for ``Enclave.from_file``.
            sealed_memory: Likewise.
            sealed_files: Likewise.
            release: Likewise.
            options: As for the class.

        """
        if not isinstance(script, str | os.PathLike):
            raise TypeError(f"a script is a path, not {type(script).__name__}")
        self = cls(script, **options)
        self._script = script
        self._asked = shared_memory, sealed_memory, tuple(sealed_files), release
        return self

    def _read(self) -> bytes:
        if self._script is None:
            return super()._read()
        from pyenclave.image.build import build_script

        shared, sealed, files, release = self._asked
        return build_script(
            os.fsdecode(self._script),
            shared_memory=shared,
            sealed_memory=sealed,
            sealed_files=files,
            release=release,
        )

    # ---- life ---------------------------------------------------------------------------------

    def _bind(self) -> asyncio.AbstractEventLoop:
        self._check_process()
        loop = running_loop()
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
            run = await in_thread(self._launch, Run.close)
        finally:
            self._starting = False
        if self._closed:
            await in_thread(run.close)
            self._check_may_start()
        self._engine = Engine(run, loop, self._queue, self._inline)
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
        await in_thread(run.close)

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

    def _functions(self) -> tuple[Engine, Functions]:
        self._running()
        if self._engine is None or self._made is None:
            raise EnclaveClosedError("the enclave is not started")
        return self._engine, self._made

    @overload
    def call(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncStream[T]: ...

    @overload
    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function: ``await enclave.call("double", 21)``.

        Args:
            function: Its name, or the host's own function of that name; then classes of its
                module are used for what comes back, and type checkers know the call's types.
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
        return find(self._functions()[1], function)(*args, **kwargs)

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

    def map(
        self,
        function: str | Callable[..., Any],
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> AsyncResults:
        """
        Call a function for each item, many calls to a crossing.

        As ``Enclave.map``, with which it shares the meaning of *items* and *errors*.

        Args:
            function: Its name, or the host's own function of that name.
            items: One positional argument each; of a function that requires several, a tuple of
                them. An asynchronous iterable is read ahead by at most 256 items.
            errors: ``raise`` an item's error in its place, or ``return`` it as its result.

        Returns:
            An asynchronous iterator over the results in order; of a native function also
            ``await ....array()``: all results as the rows of one array.

        Raises:
            UnknownFunctionError: The enclave has no such function.
            ArgumentError: It cannot be called with one item each.
            TypeError: *items* cannot be iterated.
            ValueError: *errors* is neither ``raise`` nor ``return``.

        """
        raises = check_errors(errors)
        engine, functions = self._functions()
        call = functions.batched(function)
        return async_results(engine, NO_OPTIONS, call, items, raises=raises)

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
            options = self._options
            self._made = functions.with_options(
                options, lambda call: engine.function(call, options)
            )
        return self._made

    @overload
    def call(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncStream[T]: ...

    @overload
    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`AsyncEnclave.call`, and CallTimeoutError when the deadline passes."""
        return find(self._find(), function)(*args, **kwargs)

    def map(
        self,
        function: str | Callable[..., Any],
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> AsyncResults:
        """As :meth:`AsyncEnclave.map`; the deadline is for each wait, not for the whole."""
        raises = check_errors(errors)
        call = self._find().batched(function)
        engine = self._enclave._functions()[0]  # noqa: SLF001
        return async_results(engine, self._options, call, items, raises=raises)

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
