"""Warm workers of one image, kept by the platform for this process, and launches that use them."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyenclave import _core
from pyenclave._locks import Ends
from pyenclave._platform.client import PlatformClient
from pyenclave.calls import ring
from pyenclave.calls.stats import Launch
from pyenclave.errors import (
    ArgumentError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
)
from pyenclave.formats.messages import Launched, Reserved
from pyenclave.host import _images, _shared
from pyenclave.host._held import Held
from pyenclave.host._lanes import Owner, make_lanes
from pyenclave.host.handle import Functions

__all__ = ["Begun", "Bell", "Reserve", "Slot", "Started", "make_slot"]

_READY = 32  # functions of an enclave that are made callable before it is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """
    What this process needs of an enclave, made before there is one.

    Attributes:
        lanes: Its ring.
        owner: Who hears how the lanes fare; the run sets itself.
        functions: Its functions.
        launch: Its counters.

    """

    lanes: _core.HostLanes
    owner: Owner
    functions: Functions
    launch: Launch


def make_slot(image: _images.Prepared, ring_fd: int, queue: int) -> Slot:
    """
    Make what this process needs of an enclave, in the time in which nobody waits for it.

    Args:
        image: What it is of.
        ring_fd: Its ring; stays the caller's.
        queue: Calls that may wait for a lane.

    """
    info = image.info
    owner = Owner()
    lanes = make_lanes(ring_fd, info, queue, owner)
    functions = Functions(image.signatures, lanes)
    for item in image.signatures[:_READY]:
        functions.named(item.name)
    launch = Launch(info.name, image.names, info.threads, lanes)
    return Slot(lanes=lanes, owner=owner, functions=functions, launch=launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """
    An enclave that a reserve started.

    Attributes:
        client: Its connection, to be given back.
        launched: What the platform says.
        pidfd: Of its worker.
        slot: The rest.

    """

    client: PlatformClient
    launched: Launched
    pidfd: int
    slot: Slot


class Bell:
    """
    What wakes one warm worker.

    Args:
        fd: An eventfd, now this object's.

    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ring(self) -> None:
        """Wake the worker: an identity may follow."""
        with contextlib.suppress(BlockingIOError):  # it was rung often enough
            os.eventfd_write(self._fd, 1)

    def __del__(self) -> None:
        os.close(self._fd)


@dataclass(slots=True, kw_only=True)
class Begun:
    """
    An enclave that the platform was asked for, or can be: its ring was offered.

    Attributes:
        held: It, at the platform.
        slot: The rest, which may be used once it was asked for.
        bell: Wakes its worker.
        handle: What its user gets, if that was made ahead.

    """

    held: Held
    slot: Slot
    bell: Bell
    handle: Any = None


class Reserve:
    """
    A reserve at the platform. Thread-safe; it survives the platform: another one is asked anew.

    Args:
        data: The image's bytes.
        debug: As for ``Enclave``, like the others.
        require: Protection bits.
        state: The state directory.
        queue: Calls that may wait for a lane of an enclave.

    """

    def __init__(
        self,
        data: bytes,
        *,
        debug: bool | None,
        require: tuple[str, ...],
        state: str | os.PathLike[str] | None,
        queue: int,
    ) -> None:
        self._image = _images.prepare(data)
        self._debug = debug
        self._require = require
        self._state = state
        self._queue = queue
        self._ends = Ends()
        self._lock = self._ends.lock
        self._client: PlatformClient | None = None
        self._id = b""
        self._slots: dict[int, Begun] = {}
        self._closed = False
        self._starting = True
        self._kept: _Kept | None = None
        self._finalizer: weakref.finalize[..., Reserve] | None = None

    def fill(self, count: int, prepare: Callable[[Begun], Any] | None = None) -> None:
        """
        Offer rings until *count* are open, or withdraw what is above.

        Args:
            count: How many.
            prepare: Makes the handle of an enclave that was not asked for yet.

        Raises:
            EnclaveError: As ``PlatformClient.reserve`` and ``offer``.

        """
        with self._ends, self._lock:
            client = self._connect()
            while len(self._slots) < count:
                begun = self._offer(client)
                if prepare is not None:
                    # What fails here fails again, and is told, when an enclave is wanted.
                    with contextlib.suppress(EnclaveError, OSError):
                        begun.handle = prepare(begun)
            while len(self._slots) > count:
                number = next(reversed(self._slots))
                try:
                    client.withdraw(self._id, number)
                except ArgumentError:
                    break  # it becomes an enclave just now
                del self._slots[number]

    def _offer(self, client: PlatformClient) -> Begun:
        image = self._image
        info = image.info
        fd = ring.create(info.threads, shared=info.shared_memory)
        try:
            slot = make_slot(image, fd, self._queue)
            number, bell = client.offer(self._id, fd)
        finally:
            os.close(fd)
        begun = self._slots[number] = Begun(held=Held(client), slot=slot, bell=Bell(bell))
        return begun

    def _connect(self) -> PlatformClient:
        """Return the connection; the reserve is made anew if the platform is another."""
        if self._closed:
            raise EnclaveClosedError("the reserve was closed")
        client = self._client
        if client is not None and not client.closed:
            return client
        self._drop()
        client = _shared.acquire(self._state, self._image.expect(self._debug))
        try:
            told = client.reserve(self._image.fd, debug=self._debug, require=self._require)
        except BaseException:
            _shared.release(client)
            raise
        self._client, self._id = client, told.reserve_id
        self._kept = _Kept(client, self._id)
        self._finalizer = weakref.finalize(self, self._kept.end)
        return client

    def _drop(self) -> None:
        self._slots.clear()
        self._client = None
        if self._finalizer is not None and self._kept is not None:
            self._kept.end()  # once more if Ctrl-C came before its end
            self._finalizer.detach()
            self._kept = self._finalizer = None

    def launch(self) -> Started:
        """
        Start an enclave, of a warm worker where there is one.

        Raises:
            EnclaveError: As ``PlatformClient.take``.

        """
        with self._ends, self._lock:
            client = self._connect()
            if not self._slots:
                self._offer(client)
            _shared.share(client)
            try:
                launched, pidfd = client.take(self._id)
            except BaseException:
                _shared.release(client)
                self._reconcile(client)
                raise
            slot = self._slots.pop(launched.slot).slot
            self._starting = launched.starting
        return Started(client=client, launched=launched, pidfd=pidfd, slot=slot)

    def begin(self) -> Begun | None:
        """
        As :meth:`launch`, without waiting for the platform's answer.

        Its oldest ring is named, so that calls may be put there at once: they wait for the enclave.

        Returns:
            None: The platform ended; or it is not known yet that this image's enclaves have nothing
            to do before their first call, what that raises being an error of the launch.

        Raises:
            EnclaveError: As ``PlatformClient.begin_take``.

        """
        with self._ends, self._lock:
            if self._starting:
                return None
            client = self._connect()
            if not self._slots:
                self._offer(client)
            number = next(iter(self._slots))
            try:
                taking = client.begin_take(self._id, number)
            except EnclaveLostError:
                return None  # it ended, perhaps long ago: the next one is asked as usual
            begun = self._slots.pop(number)
            begun.bell.ring()  # it wakes up while the platform does
            _shared.share(client)
            begun.held.begin(taking)
            return begun

    def _reconcile(self, client: PlatformClient) -> None:
        """Forget the rings that went with a launch that failed."""
        with contextlib.suppress(EnclaveError):
            still = client.ask_reserve(self._id).slots
            self._slots = {slot: self._slots[slot] for slot in still if slot in self._slots}

    @property
    def open(self) -> int:
        """How many offers are open, as far as is known; 0 if the platform is gone."""
        client = self._client
        return 0 if client is None or client.closed else len(self._slots)

    def told(self) -> Reserved:
        """Ask the platform how the reserve is."""
        with self._ends, self._lock:
            return self._connect().ask_reserve(self._id)

    def close(self) -> None:
        """End the warm workers. May be called twice."""
        self._ends.end(self._close)

    def _close(self) -> None:
        with self._ends, self._lock:
            self._closed = True
            self._drop()


class _Kept:
    """What the platform keeps for a reserve, and the connection, which is to be given back."""

    def __init__(self, client: PlatformClient, reserve_id: bytes) -> None:
        self._client = client
        self._id = reserve_id
        self._pid = os.getpid()
        self._released = False

    def end(self) -> None:
        """End it; in the middle of an exchange of this thread, after that. May be called twice."""
        if os.getpid() == self._pid and not self._released:
            self._client.leave(self._end)

    def _end(self) -> None:
        with contextlib.suppress(EnclaveError, OSError):
            self._client.withdraw(self._id)
        if not self._released:
            self._released = True
            _shared.release(self._client)
