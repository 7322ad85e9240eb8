"""
The handle on one enclave.

Nothing starts before ``with`` or ``start()``. The host is untrusted: what it holds is the ring,
ciphertext and evidence, and whatever it puts into the ring is checked inside.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

from pyenclave import _core
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveStateError,
    LaunchError,
    UnknownFunctionError,
)
from pyenclave.host._run import Run, read_image
from pyenclave.host.handle import EnclaveInfo, Evidence, Functions

__all__ = ["DEFAULT_QUEUE", "Enclave"]

DEFAULT_QUEUE = 1024  # calls that may wait for a lane
MAX_NONCE = 1024
_FRAME_ATTEST = 3
_FRAME_PING = 2


class _NoSuchAttributeError(UnknownFunctionError, AttributeError):
    """For ``enclave.name``: hasattr() and getattr() with a default work as usual."""


class Enclave:
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
    ) -> None:
        if not isinstance(image, str | os.PathLike | bytes | bytearray | memoryview):
            raise TypeError(f"an image is a path or bytes, not {type(image).__name__}")
        if isinstance(require, str) or not all(isinstance(name, str) for name in require):
            raise TypeError("require is a sequence of names")
        if debug is not None and not isinstance(debug, bool):
            raise TypeError(f"debug is True, False or None, not {debug!r}")
        if state is not None and not isinstance(state, str | os.PathLike):
            raise TypeError(f"a state directory is a path, not {type(state).__name__}")
        if isinstance(queue, bool) or not isinstance(queue, int):
            raise TypeError(f"queue is a number of calls, not {queue!r}")
        if queue < 0:
            raise ValueError(f"queue must be a number of calls, not {queue!r}")
        self._source = image
        self._debug = debug
        self._require = tuple(require)
        self._state = state
        self._queue = queue
        self._quiet = quiet
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._run: Run | None = None
        self._closed = False

    @classmethod
    def from_file(cls, script: str | os.PathLike[str], **options: Any) -> Self:
        """
        Make an enclave of a single Python file, built now, unsigned, launched as debug.

        Args:
            script: The file; ``__file__`` for the running script.
            options: As for the class.

        Raises:
            ImageError: The file cannot be used; with its line.

        """
        from pyenclave.image.build import build_script

        return cls(build_script(os.fspath(script)), **options)

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> Self:
        """
        Launch the enclave.

        Raises:
            ImageError: The image is refused (SignatureError, RuntimeLockError among them).
            LaunchError: It could not be started, or a required protection is missing.
            EnclaveStateError: It was started before, or belongs to another process.

        """
        self._check_process()
        with self._lock:
            if self._closed:
                raise EnclaveClosedError("the enclave was closed; make a new handle")
            if self._run is not None:
                raise EnclaveStateError("the enclave was started already")
            data = read_image(self._source)
            try:
                self._run = Run(data, self._debug, self._require, self._state, self._queue)
            except OSError as error:
                raise LaunchError(
                    f"the host has not what an enclave takes: {error.strerror or error}",
                    advice="Look at its limits: open files, file size (memory files too), memory.",
                ) from error
        if self._run.unsigned and not self._quiet:
            print(  # noqa: T201 - asked for by the contract
                f"pyenclave: {self._run.name} is unsigned and runs as a debug enclave: "
                "not for real secrets",
                file=sys.stderr,
            )
        return self

    def close(self) -> None:
        """End the enclave at once, running calls included. May be called twice."""
        if os.getpid() != self._pid:
            return  # the parent's enclave is not the child's to end
        with self._lock:
            self._closed = True
            run = self._run
        if run is not None:
            run.close()

    def __enter__(self) -> Self:
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

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EnclaveStateError(
                "this handle belongs to the process that made it, not to a forked child",
                advice="Open the enclave after forking.",
            )

    def _running(self) -> Run:
        self._check_process()
        if self._run is None:
            raise EnclaveClosedError(
                "the enclave is not started" if not self._closed else "the enclave was closed",
                advice="Use it in a `with` block, or call start()." if not self._closed else None,
            )
        return self._run

    def __reduce__(self) -> NoReturn:
        raise TypeError("an enclave's handle cannot be pickled or copied")

    def __repr__(self) -> str:
        if self._run is None or self._closed:
            return f"<Enclave, {'closed' if self._closed else 'not started'}>"
        return f"<Enclave {self._run.info.name}, pid {self._run.info.pid}>"

    # ---- use ----------------------------------------------------------------------------------

    @property
    def info(self) -> EnclaveInfo:
        """What the platform says of the running enclave."""
        return self._running().info

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function.

        Args:
            function: Its name, or the host's own function of that name; then classes of its
                module are used for what comes back.
            args: Positional arguments.
            kwargs: Keyword arguments; ``out=`` is an array that takes an array result.

        Raises:
            UnknownFunctionError: The enclave has no such function.
            ArgumentError: An argument does not fit the signature, or a limit.
            EcallError: The function raised.
            BusyError: Too many calls wait.
            EnclaveLostError: The worker ended; ``started`` says whether the call may have begun.
            EnclavePoisonedError: The protocol was broken; the enclave is gone for ever.

        """
        return _find(self._running().functions, function)(*args, **kwargs)

    def options(self, *, timeout: float | None = None) -> Options:
        """
        Return the same enclave with other settings for its calls.

        Args:
            timeout: Seconds until a call raises CallTimeoutError. The function inside is not
                stopped: its thread of the enclave stays busy until it returns.

        Raises:
            ValueError: *timeout* is not a positive number.

        """
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, not {timeout!r}")
        return Options(self, None if timeout is None else float(timeout))

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
        if not isinstance(nonce, bytes | bytearray | memoryview):
            raise TypeError(f"a nonce is bytes, not {type(nonce).__name__}")
        lanes = self._running().lanes
        return Evidence(lanes.request(_FRAME_ATTEST, nonce, -1 if timeout is None else timeout))

    def ping(self, data: bytes = b"", *, timeout: float | None = None) -> bytes:
        """Send *data* through a lane and back, without any trusted function."""
        return self._running().lanes.request(_FRAME_PING, data, -1 if timeout is None else timeout)

    def parameter_types(self, function: str) -> list[str]:
        """Return the types of a function's parameters, for tools."""
        return self._running().functions.parameter_types(function)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _attribute(self._running().functions, name)

    def __dir__(self) -> list[str]:
        run = self._run
        return sorted([*super().__dir__(), *(run.names if run is not None else ())])


class Options:
    """An enclave with settings for its calls; made by ``Enclave.options``."""

    def __init__(self, enclave: Enclave, timeout: float | None) -> None:
        self._enclave = enclave
        self._timeout = timeout
        self._functions: Functions | None = None

    def _find(self) -> Functions:
        functions = self._enclave._running().functions  # noqa: SLF001 - of the same package
        if self._functions is None:
            self._functions = functions.with_timeout(self._timeout)
        return self._functions

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`Enclave.call`, and CallTimeoutError when the deadline passes."""
        return _find(self._find(), function)(*args, **kwargs)

    def attest(self, nonce: bytes = b"") -> Evidence:
        """As :meth:`Enclave.attest`."""
        return self._enclave.attest(nonce, timeout=self._timeout)

    def ping(self, data: bytes = b"") -> bytes:
        """As :meth:`Enclave.ping`."""
        return self._enclave.ping(data, timeout=self._timeout)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _attribute(self._find(), name)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an enclave's handle cannot be pickled or copied")


def _find(functions: Functions, function: str | Callable[..., Any]) -> _core.HostCall:
    return functions.named(function) if isinstance(function, str) else functions.typed(function)


def _attribute(functions: Functions, name: str) -> _core.HostCall:
    try:
        return functions.named(name)
    except UnknownFunctionError as error:
        raise _NoSuchAttributeError(error.message, advice=error.advice) from None
