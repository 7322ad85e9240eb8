"""What the handles of both kinds, for threads and for asyncio, have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pyenclave._locks import Ends
from pyenclave.calls.stats import EnclaveStats
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveStateError,
    LaunchError,
    UnknownFunctionError,
)
from pyenclave.host import _fork
from pyenclave.host._arena import SharedMemory
from pyenclave.host._ocalls import Handlers, check_handlers
from pyenclave.host._reserve import Begun, Reserve
from pyenclave.host._run import Run, read_image
from pyenclave.host.handle import EnclaveInfo, Functions

__all__ = [
    "DEFAULT_QUEUE",
    "FRAME_ATTEST",
    "FRAME_PING",
    "NO_COPY",
    "Handle",
    "attribute",
    "find",
    "nonce_of",
]

DEFAULT_QUEUE = 1024  # calls that may wait for a lane
FRAME_ATTEST = 3
FRAME_PING = 2
NO_COPY = (
    "an enclave's handle cannot be pickled or copied: open one in each process (docs/deploying.md)"
)


class NoSuchAttributeError(UnknownFunctionError, AttributeError):
    """For ``enclave.name``: hasattr() and getattr() with a default work as usual."""


class Handle:
    """
    An enclave's image, how it is to be launched, and its run when it was.

    Args and errors are those of the public classes.
    """

    _async_handlers = False  # whether handlers of ocalls may be coroutine functions

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
        self._ocalls = check_handlers(ocalls, allow_async=self._async_handlers)
        self._pid = os.getpid()
        self._ends = Ends()
        self._lock = self._ends.lock
        self._run: Run | None = None
        self._reserve: Reserve | None = None  # a pool's, which its enclaves come from
        self._begun: Begun | None = None  # what a pool asked for, before there was this handle
        self._closed = False
        _fork.watch(self)

    # ---- launching ----------------------------------------------------------------------------

    def _read(self) -> bytes:
        return read_image(self._source)

    def _launch(self) -> Run:
        data = self._read()
        try:
            run = Run(
                data,
                self._debug,
                self._require,
                self._state,
                self._queue,
                self._ocalls,
                self._reserve,
                self._begun,
            )
        except OSError as error:
            raise LaunchError(
                f"the host has not what an enclave takes: {error.strerror or error}",
                advice="Look at its limits: open files, file size (memory files too), memory.",
            ) from error
        if run.unsigned and not self._quiet:
            print(  # noqa: T201 - asked for by the contract
                f"pyenclave: {run.name} is unsigned and runs as a debug enclave: "
                "not for real secrets",
                file=sys.stderr,
            )
        return run

    def _check_may_start(self) -> None:
        if self._closed:
            raise EnclaveClosedError("the enclave was closed; make a new handle")
        if self._run is not None:
            raise EnclaveStateError("the enclave was started already")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise _fork.refusal(self._pid)

    def _after_fork(self) -> None:
        """In a forked child: one that was not started yet is the child's own from now on."""
        self._ends = Ends()  # a thread of the parent may have held it
        self._lock = self._ends.lock
        if self._run is None:
            self._pid = os.getpid()

    def _running(self) -> Run:
        run = self._run
        if run is not None and os.getpid() == self._pid:
            return run
        self._check_process()
        if run is None:
            raise EnclaveClosedError(
                "the enclave is not started" if not self._closed else "the enclave was closed",
                advice="Use it in a `with` block, or call start()." if not self._closed else None,
            )
        return run

    # ---- what it is ---------------------------------------------------------------------------

    @property
    def info(self) -> EnclaveInfo:
        """What the platform says of the running enclave."""
        return self._running().info

    @property
    def stats(self) -> EnclaveStats:
        """
        What was counted of this enclave's calls; also after it ended.

        Raises:
            EnclaveStateError: It was never started, or belongs to another process.

        """
        return self._running().launch.stats()

    @property
    def shared(self) -> SharedMemory:
        """
        The memory that host and enclave both map: arrays made in it cross without being sent.

        What is in it is in the clear for whoever controls the host, as all that crosses is.

        Raises:
            EnclaveStateError: The image has none, the enclave is not started, or it belongs to
                another process.

        """
        shared = self._running().shared
        if shared is None:
            raise EnclaveStateError(
                "the image has no shared memory",
                advice='It is asked for at build: [memory] shared = "64 MiB" in the manifest, or '
                'from_file(…, shared_memory="64 MiB").',
            )
        return shared

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def parameter_types(self, function: str) -> list[str]:
        """Return the types of a function's parameters, for tools."""
        return self._running().functions.parameter_types(function)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPY)

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self._run is None or self._closed:
            return f"<{kind}, {'closed' if self._closed else 'not started'}>"
        if not self._run.known:  # who looks at it does not wait for the platform
            return f"<{kind} {self._run.name}, asked for>"
        return f"<{kind} {self._run.info.name}, pid {self._run.info.pid}>"

    def __dir__(self) -> list[str]:
        run = self._run
        return sorted([*super().__dir__(), *(run.names if run is not None else ())])


def find(functions: Functions, function: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return the enclave's counterpart of a name or of the host's own function."""
    return functions.named(function) if isinstance(function, str) else functions.typed(function)


def attribute(functions: Functions, name: str) -> Callable[..., Any]:
    """Return what ``enclave.name`` is."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return functions.named(name)
    except UnknownFunctionError as error:
        raise NoSuchAttributeError(error.message, advice=error.advice) from None


def nonce_of(nonce: Any) -> Any:
    """Return *nonce* if it is bytes, which is all that the host can say about it."""
    if not isinstance(nonce, bytes | bytearray | memoryview):
        raise TypeError(f"a nonce is bytes, not {type(nonce).__name__}")
    return nonce
