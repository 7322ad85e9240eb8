"""
The handle on one enclave, for threads; ``aio.AsyncEnclave`` is its twin for asyncio.

Nothing starts before ``with`` or ``start()``. The host is untrusted: what it holds is the ring,
ciphertext and evidence, and whatever it puts into the ring is checked inside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, NoReturn, ParamSpec, Self, TypeVar, overload

from pyenclave.errors import EnclaveStateError
from pyenclave.host._base import (
    DEFAULT_QUEUE,
    FRAME_ATTEST,
    FRAME_PING,
    NO_COPY,
    Handle,
    attribute,
    find,
    nonce_of,
)
from pyenclave.host._map import Results, check_errors, source_of
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host.handle import Evidence, Functions

__all__ = ["DEFAULT_QUEUE", "Enclave"]

P = ParamSpec("P")
T = TypeVar("T")


class Enclave(Handle):
    """
    An enclave: trusted code in a process of its own, and the calls into it.

    Args:
        image: Path of an image, or its bytes.
        debug: Launch as debug (True), as production (False), or as production if the image is
            signed and else as debug (None).
        require: Names of protection bits without which the launch is refused.
        state: The state directory; None for ``PYENCLAVE_STATE`` or the default.
        queue: How many calls may wait for a thread of the enclave; more raise BusyError.
        quiet: Do not say on stderr that an unsigned image runs as debug.
        ocalls: A handler for each host function that the image declares, by name. It runs in the
            thread that makes the call, or in one of its own if the call has a timeout.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: *queue* is negative.

    """

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
        Make an enclave of a single Python file, built now, unsigned, launched as debug.

        Args:
            script: The file; ``__file__`` for the running script.
            shared_memory: Memory that host and enclave both map, for arrays (``shared``): bytes,
                or a text such as ``"64 MiB"``.
            sealed_memory: Limit of plaintext in sealed arrays (``trusted.heap``), likewise.
            sealed_files: Names of sealed files that are lent (``pyenclave.lend_files``).
            release: Whether keys are released to it (``pyenclave.relay``).
            options: As for the class.

        Raises:
            ImageError: The file cannot be used; with its line.
            ValueError: *shared_memory* or *sealed_memory* is no size of whole pages, or out of
                range.

        """
        from pyenclave.image.build import build_script

        data = build_script(
            os.fspath(script),
            shared_memory=shared_memory,
            sealed_memory=sealed_memory,
            sealed_files=sealed_files,
            release=release,
        )
        return cls(data, **options)

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> Self:
        """
        Launch the enclave.

        Raises:
            ImageError: The image is refused (SignatureError, RuntimeLockError among them).
            OcallError: A declared ocall has no handler, or a handler is for none.
            LaunchError: It could not be started, or a required protection is missing.
            EnclaveStateError: It was started before, or belongs to another process.

        """
        self._check_process()
        if self._ends.taken_here():
            raise EnclaveStateError(
                "this thread is in the middle of starting or closing this enclave",
                advice="A handler of a signal or a finalizer can close it then, not start it.",
            )
        with self._ends, self._lock:
            self._check_may_start()
            self._run = self._launch()
        return self

    def close(self) -> None:
        """
        End the enclave at once, running calls included. May be called twice.

        In a handler of a signal that came while this thread starts it, it ends when that is over.
        """
        if os.getpid() == self._pid:  # the parent's enclave is not the child's to end
            self._ends.end(self._close)

    def _close(self) -> None:
        with self._ends, self._lock:
            self._closed = True
            run = self._run
        if run is not None:
            run.close()

    def __enter__(self) -> Self:
        self._check_process()
        if self._run is None or self._closed:
            self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- use ----------------------------------------------------------------------------------

    @overload
    def call(
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]: ...

    @overload
    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function.

        Args:
            function: Its name, or the host's own function of that name; then classes of its
                module are used for what comes back, and type checkers know the call's types.
            args: Positional arguments.
            kwargs: Keyword arguments; ``out=`` is an array that takes an array result (type
                checkers know of it in the form with a name only).

        Raises:
            UnknownFunctionError: The enclave has no such function.
            ArgumentError: An argument does not fit the signature, or a limit.
            EcallError: The function raised.
            BusyError: Too many calls wait.
            EnclaveLostError: The worker ended; ``started`` says whether the call may have begun.
            EnclavePoisonedError: The protocol was broken; the enclave is gone for ever.

        """
        return find(self._running().functions, function)(*args, **kwargs)

    def options(
        self,
        *,
        timeout: float | None = None,
        kill_after: float | None = None,
        correlation: str | None = None,
    ) -> EnclaveOptions:
        """
        Return the same enclave with other settings for its calls.

        Args:
            timeout: Seconds until a call raises CallTimeoutError. The function inside is not
                stopped: its thread of the enclave stays busy until it returns.
            kill_after: Seconds that a call may still run after its caller stopped waiting; then
                the worker is ended, and every call raises EnclaveLostError.
            correlation: Id of the calls in errors and logs, such as a request's: 1 to 64 letters,
                digits or ``._:-``. A debug enclave's log has it too.

        Raises:
            ValueError: *timeout* is not a positive number, *kill_after* is negative, or
                *correlation* has other characters.

        """
        options = Options(timeout=timeout, kill_after=kill_after, correlation=correlation)
        return EnclaveOptions(self, options)

    def map(
        self,
        function: str | Callable[..., Any],
        items: Iterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> Results:
        """
        Call a function for each item, many calls to a crossing.

        Items are taken when results are asked for, and only as many ahead as are packed for the
        threads of the enclave. An error of one item concerns that item: the others are called all
        the same, later ones of its batch too.

        Args:
            function: Its name, or the host's own function of that name.
            items: One positional argument each; of a function that requires several, a tuple of
                them. The rows of a NumPy array that a native function gets cross as one buffer.
            errors: ``raise`` an item's error in its place, or ``return`` it as its result.

        Returns:
            An iterator over the results in order; of a native function also ``array()``: all
            results as the rows of one array.

        Raises:
            UnknownFunctionError: The enclave has no such function.
            ArgumentError: It cannot be called with one item each.
            TypeError: *items* cannot be iterated.
            ValueError: *errors* is neither ``raise`` nor ``return``.

        """
        run = self._run
        if run is None:
            run = self._running()  # raises. Who was forked is refused by `source_of`
        return _map(run.functions, function, items, errors)

    def attest(self, nonce: bytes = b"", *, timeout: float | None = None) -> Evidence:
        """
        Return evidence of what runs inside.

        Args:
            nonce: What the relying party sent, at most 1024 bytes; it proves freshness.
            timeout: Seconds, or None.

        Raises:
            ArgumentError: The nonce is too long.
            EnclaveStateError: The enclave does not run.

        """
        return Evidence(self._request(FRAME_ATTEST, nonce_of(nonce), _with_timeout(timeout)))

    def ping(self, data: bytes = b"", *, timeout: float | None = None) -> bytes:
        """Send *data* through a lane and back, without any trusted function."""
        return self._request(FRAME_PING, data, _with_timeout(timeout))

    def _request(self, kind: int, data: bytes, options: Options) -> bytes:
        return self._running().lanes.request(kind, data, options.seconds, options.grace)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return attribute(self._running().functions, name)


class EnclaveOptions:
    """An enclave with settings for its calls; made by ``Enclave.options``."""

    def __init__(self, enclave: Enclave, options: Options) -> None:
        self._enclave = enclave
        self._options = options
        self._functions: Functions | None = None

    def _find(self) -> Functions:
        functions = self._enclave._running().functions  # noqa: SLF001 - of the same package
        if self._functions is None:
            self._functions = functions.with_options(self._options)
        return self._functions

    @overload
    def call(
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]: ...

    @overload
    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`Enclave.call`, and CallTimeoutError when the deadline passes."""
        return find(self._find(), function)(*args, **kwargs)

    def map(
        self,
        function: str | Callable[..., Any],
        items: Iterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> Results:
        """As :meth:`Enclave.map`; the deadline is for each wait, not for the whole."""
        return _map(self._find(), function, items, errors)

    def attest(self, nonce: bytes = b"") -> Evidence:
        """As :meth:`Enclave.attest`."""
        request = self._enclave._request  # noqa: SLF001
        return Evidence(request(FRAME_ATTEST, nonce_of(nonce), self._options))

    def ping(self, data: bytes = b"") -> bytes:
        """As :meth:`Enclave.ping`."""
        return self._enclave._request(FRAME_PING, data, self._options)  # noqa: SLF001

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return attribute(self._find(), name)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPY)


def _with_timeout(timeout: float | None) -> Options:
    return NO_OPTIONS if timeout is None else Options(timeout=timeout)


def _map(
    functions: Functions, function: str | Callable[..., Any], items: Iterable[Any], errors: str
) -> Results:
    raises = errors == "raise" or check_errors(errors)
    call = functions.batched(function)
    return Results(call, source_of(call, items), raises=raises)
