"""
A worker that is to become an enclave: what a zygote gives, what it says, what it ends as.

At each step it may say one thing only: anything else, its silence and its end are errors of the
launch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import msgspec

from pyenclave import _native
from pyenclave._platform.debuglog import DebugLog
from pyenclave._platform.drafts import Draft, Package, Wish
from pyenclave._platform.probe import has_ended
from pyenclave._platform.service import Attendant, Enclave, Facts, kill_and_wait
from pyenclave._platform.wire import raise_failure
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import EnclaveError, EnclaveLostError, EnclavePoisonedError, LaunchError
from pyenclave.formats import messages

__all__ = [
    "Candidate",
    "NotBegunError",
    "SpawnedWorker",
    "WorkerFactory",
    "WorkerGoneError",
    "ZygoteFactory",
    "await_closed",
    "await_ready",
    "await_shut",
    "complete",
    "enclave_of",
    "open_status",
]

_BEGIN_TIMEOUT: Final = 10.0  # seconds: a process just forked, on a machine that is busy
_CLOSED_TIMEOUT: Final = 30.0  # seconds: imports of the entry count
_RUNNING_TIMEOUT: Final = 15.0
_MAX_GRACE: Final = 5.0  # seconds of on_stop functions: whoever closes waits for them
_MAX_KEY: Final = 4096  # bytes of a runtime public key
_SLICE: Final = 0.1
_Message = TypeVar("_Message", bound=msgspec.Struct)


class SpawnedWorker(Protocol):
    """What a zygote returns: a new worker."""

    @property
    def pid(self) -> int:
        """Its number in the platform's pid namespace."""

    @property
    def pidfd(self) -> int:
        """Its pidfd, the caller's."""

    def began(self) -> bool:
        """Whether the worker took what it was given, as far as it said so yet."""

    def forget(self) -> None:
        """Close what :meth:`began` needs. May be called twice."""


class WorkerFactory(Protocol):
    """A zygote."""

    @property
    def alive(self) -> bool:
        """Whether its process runs."""

    def spawn(
        self, *, image_fd: int, ring_fd: int, channel_fd: int, debug: bool, image: bytes = b""
    ) -> SpawnedWorker:
        """Start a worker; the descriptors stay the caller's. *image* is the image's SHA-256."""


class ZygoteFactory(Protocol):
    """The zygotes of a platform."""

    def get(self, lock_bytes: bytes, *, debug: bool) -> WorkerFactory:
        """Return the zygote of a lock list, starting it if need be."""

    def begin(self, lock_bytes: bytes, *, debug: bool) -> None:
        """Begin to start the zygote of a lock; returns at once, and never fails."""

    def ready(self, lock_bytes: bytes, *, debug: bool) -> bool:
        """Whether ``get`` and then ``spawn`` return at once, as far as is known."""

    def rouse(self) -> None:
        """Have a process that may become a worker wake up; nothing depends on it."""

    def close(self) -> None:
        """End all zygotes."""


class WorkerGoneError(LaunchError):
    """A warm worker ended before it was an enclave: another one can take its place."""


class _SlowError(LaunchError):
    """It lives, and said nothing in time."""


class NotBegunError(WorkerGoneError):
    """The process that was to be the worker had ended before it took anything."""


@dataclass(slots=True, kw_only=True, eq=False)
class Candidate:
    """
    A worker that closed itself in and has no identity: on its way to one, or warm.

    Attributes:
        wish: What it was started for.
        worker: Its process.
        channel: The platform's end of its control channel.
        attendant: The thread that will serve it.
        draft: Its name, and its record as it is expected to be.
        outside: What was tried from outside when it had closed itself in.
        closed: What it tried inside.
        ready: Its runtime key, once it made one.
        package: What its identity will be.
        status: A descriptor of the kernel's account of it, for the second look.
        log: Of a debug worker, what keeps its output.

    """

    wish: Wish
    worker: SpawnedWorker
    channel: Channel
    attendant: Attendant
    draft: Draft
    outside: dict[str, bool]
    closed: messages.Closed
    ready: messages.Ready | None = None
    package: Package | None = None
    status: int = -1
    log: DebugLog | None = None

    def end(self) -> None:
        """End the worker and give everything back; never after it became an enclave."""
        self.attendant.dismiss()
        kill_and_wait(self.worker.pidfd)
        os.close(self.worker.pidfd)
        self.channel.close()
        self.forget()
        if self.log is not None:
            self.log.join()

    def forget(self) -> None:
        """Close what only a worker without identity needs."""
        status, self.status = self.status, -1
        if status >= 0:
            os.close(status)


def await_shut(channel: Channel, worker: SpawnedWorker, wanted: Callable[[], bool]) -> None:
    """Wait until a worker says that it has closed itself in."""
    try:
        try:
            _expect(channel, worker.pidfd, messages.Shut, _BEGIN_TIMEOUT, wanted)
        except _SlowError:
            if not worker.began():
                raise LaunchError(f"a worker did not begin within {_BEGIN_TIMEOUT:g} s") from None
            left = _CLOSED_TIMEOUT - _BEGIN_TIMEOUT
            _expect(channel, worker.pidfd, messages.Shut, left, wanted)
    except WorkerGoneError:
        # Nobody waited for its word that it has what it was given, so it is asked for now.
        if worker.began():
            raise
        raise NotBegunError("the worker ended at once") from None
    finally:
        worker.forget()


def await_closed(
    channel: Channel, worker: SpawnedWorker, wanted: Callable[[], bool]
) -> messages.Closed:
    """Return what a worker that is shut tried from inside."""
    return _expect(channel, worker.pidfd, messages.Closed, _RUNNING_TIMEOUT, wanted)


def await_ready(candidate: Candidate, wanted: Callable[[], bool]) -> messages.Ready:
    """Return the runtime key that a worker made."""
    ready = _expect(
        candidate.channel, candidate.worker.pidfd, messages.Ready, _RUNNING_TIMEOUT, wanted
    )
    if not 0 < len(ready.runtime_public_key) <= _MAX_KEY:
        raise LaunchError("the worker sent no usable runtime key")
    return ready


def open_status(worker: SpawnedWorker) -> int:
    """Open the kernel's account of a warm worker, for the second look."""
    try:
        return _native.open_status(worker.pid)
    except OSError as error:
        if has_ended(worker.pidfd):
            raise LaunchError("a warm worker ended by itself") from None
        raise LaunchError(f"a warm worker cannot be watched: {error.strerror}") from None


def complete(enclave: Enclave, ready: messages.Ready) -> Enclave:
    """Note what the worker said last."""
    enclave.facts = replace(
        enclave.facts,
        runtime_public_key=ready.runtime_public_key,
        starting=ready.starting,
        grace=min(max(ready.grace, 0.0), _MAX_GRACE),
    )
    return enclave


def enclave_of(candidate: Candidate, facts: Facts, host_pid: int) -> Enclave:
    """Return an enclave that has all but its runtime key."""
    candidate.forget()
    return Enclave(
        replace(facts, pid=candidate.worker.pid, started=time.time()),
        pidfd=candidate.worker.pidfd,
        channel=candidate.channel,
        host_pid=host_pid,
        attendant=candidate.attendant,
        log=candidate.log,
    )


def _expect(
    channel: Channel,
    pidfd: int,
    kind: type[_Message],
    timeout: float,
    wanted: Callable[[], bool],
) -> _Message:
    deadline = time.monotonic() + timeout
    while True:
        ended = has_ended(pidfd)
        try:
            message, fds = channel.receive(_SLICE)
            break
        except TimeoutError:
            if ended:
                raise WorkerGoneError("the worker ended while it started") from None
            if not wanted():
                raise LaunchError("the host is gone") from None
            if time.monotonic() >= deadline:
                raise _SlowError(
                    "the worker did not start in time", expected=f"{timeout:g} s"
                ) from None
        except EnclaveLostError:
            raise WorkerGoneError(
                "the worker ended while it started",
                advice="Launch it as debug to see what it prints.",
            ) from None
        except EnclaveError as error:
            raise LaunchError(f"the worker broke the control protocol: {error}") from None
    close_all(fds)
    if isinstance(message, messages.Ending):
        raise_failure(message)
    if isinstance(message, messages.Poisoned):
        raise EnclavePoisonedError(message.reason[:1000])
    if fds or not isinstance(message, kind):
        raise LaunchError(
            "the worker broke the control protocol",
            expected=kind.__name__,
            found=type(message).__name__,
        )
    return message
