"""Making the host's side of a ring, also before there is an enclave to serve it."""

from __future__ import annotations

import mmap
import threading
import weakref
from typing import Protocol

from pyenclave import _core
from pyenclave._locks import Condition
from pyenclave.calls import errors as _call_errors
from pyenclave.calls import ring
from pyenclave.errors import EnclaveClosedError, EnclaveError
from pyenclave.formats.image import ImageInfo

__all__ = ["Owner", "make_lanes", "token"]

_MADV_WIPEONFORK = 18  # madvise(2); the mmap module has no name for it


class _Run(Protocol):
    def guard(self) -> None: ...

    def broken(self, check: str) -> EnclaveError: ...

    def end_late(self, lane: int, epoch: int, seconds: float) -> None: ...


class Owner:
    """Who is asked when a call waits for long or the protocol breaks: a run, while it lives."""

    __slots__ = ("_run",)

    def __init__(self) -> None:
        self._run: weakref.ref[_Run] | None = None

    def set(self, run: _Run) -> None:
        """Ask *run* from now on; it is not kept alive."""
        self._run = weakref.ref(run)

    def _find(self) -> _Run | None:
        return None if self._run is None else self._run()

    def guard(self) -> None:
        """Raise if there is no worker to wait for."""
        run = self._find()
        if run is None:
            raise EnclaveClosedError("the enclave was closed")
        run.guard()

    def broken(self, check: str) -> EnclaveError:
        """Tell that the worker broke the protocol; return what is to be raised."""
        run = self._find()
        if run is None:
            return EnclaveClosedError("the enclave was closed")
        return run.broken(check)

    def watch_late(self, lane: int, epoch: int, seconds: float) -> None:
        """A caller gave up, and its call may go on for *seconds* only."""

        def look() -> None:
            run = self._find()
            if run is not None:
                run.end_late(lane, epoch, seconds)

        timer = threading.Timer(seconds, look)
        timer.daemon = True
        timer.start()


def make_lanes(ring_fd: int, info: ImageInfo, queue: int, owner: Owner) -> _core.HostLanes:
    """
    Map a ring and return the host's side of it.

    Args:
        ring_fd: The ring; stays the caller's.
        info: What its image says: threads, functions and limits.
        queue: How many calls may wait for a lane.
        owner: Who is asked.

    """
    return _core.HostLanes(
        ring.map_ring(ring_fd, info.threads, shared=info.shared_memory),
        token(),
        info.threads,
        ring.DEFAULT_SLOT,
        info.message_limit,
        owner.guard,
        owner.broken,
        _call_errors.from_frame,
        Condition(),
        queue,
        owner.watch_late,
        len(info.functions),
        info.shared_memory,
    )


def token() -> mmap.mmap:
    """Memory that a forked child sees as zero: how it knows that the ring is not its own."""
    token = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    token.madvise(_MADV_WIPEONFORK)
    return token
