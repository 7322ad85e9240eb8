"""
Warm workers: everything of a launch but the identity, done before anybody asks.

A host offers rings, and each gets a worker of the host's image ahead of time, which loads the
entry, closes itself in, is tried from both sides and makes its runtime key. It holds no identity
and no key of the platform. Handed out it is one enclave and ends with it: nothing ever comes back.
A warm worker belongs to one connection, one image and one kind (debug or production), and dies
with the connection.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from pyenclave._platform.candidate import Candidate
from pyenclave._platform.launch import Launcher, Wish, check_ring
from pyenclave.calls.channel import close_all
from pyenclave.errors import ArgumentError, BusyError, LaunchError
from pyenclave.formats import messages

__all__ = ["MAX_RESERVES", "Reserves", "Taken"]

MAX_RESERVES: Final = 16  # of one host: images, in debug and in production
# After a hand-out the processor is the new enclave's: so long none is started, in seconds, while
# there is a warm worker left and while there is none.
_QUIET: Final = (0.02, 0.005)
_FIRST_DELAY: Final = 0.05  # seconds after a failure; doubled with each that follows
_LAST_DELAY: Final = 30.0
_FORGIVEN: Final = 60.0  # seconds without one after which failures are not counted together
_MAX_ERROR: Final = 1000  # characters
_SLICE: Final = 0.1


@dataclass(slots=True, kw_only=True, eq=False)
class _Offer:
    """A ring, and the worker that will serve it, once there is one."""

    slot: int
    ring_fd: int
    bell: int
    candidate: Candidate | None = None
    starting: bool = False

    def close(self) -> None:
        """It is over."""
        os.close(self.ring_fd)
        os.close(self.bell)


@dataclass(slots=True, kw_only=True, eq=False)
class _Reserve:
    """The warm workers of one kind."""

    reserve_id: bytes
    wish: Wish
    image_fd: int
    offers: dict[int, _Offer] = field(default_factory=dict)
    last: int = -1
    failures: int = 0
    failed_at: float = 0.0
    error: str = ""
    not_before: float = 0.0

    @property
    def ready(self) -> int:
        return sum(offer.candidate is not None for offer in self.offers.values())

    def warm(self, slot: int = -1) -> _Offer | None:
        """Return the oldest offer with a warm worker, or *slot* if it has one."""
        for offer in self._those(slot):
            if offer.candidate is not None:
                return offer
        return None

    def lacking(self, slot: int = -1) -> _Offer | None:
        """Return the oldest offer for which no worker was started, or *slot* if it is one."""
        for offer in self._those(slot):
            if offer.candidate is None and not offer.starting:
                return offer
        return None

    def _those(self, slot: int) -> Iterable[_Offer]:
        if slot == -1:
            return self.offers.values()
        return (self.offers[slot],) if slot in self.offers else ()

    def told(self) -> messages.Reserved:
        return messages.Reserved(
            reserve_id=self.reserve_id,
            slots=tuple(self.offers),
            ready=self.ready,
            failures=self.failures,
            error=self.error,
        )

    def fail(self, error: str) -> None:
        """Wait longer before the next one; the jitter keeps many hosts from trying at once."""
        now = time.monotonic()
        if now - self.failed_at > _FORGIVEN:
            self.failures = 0
        self.failures += 1
        self.failed_at = now
        self.error = error[:_MAX_ERROR]
        delay = min(_LAST_DELAY, _FIRST_DELAY * 2.0 ** min(self.failures - 1, 16))
        self.not_before = now + delay * (0.75 + secrets.randbelow(1000) / 2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """
    An offer that becomes an enclave.

    Attributes:
        wish: What it is.
        slot: The offer.
        image_fd: The reserve's image, which stays the reserve's, like the next.
        ring_fd: The offer's ring.
        candidate: Its warm worker, now the caller's with its place; None: there is none yet.

    """

    wish: Wish
    slot: int
    image_fd: int
    ring_fd: int
    candidate: Candidate | None


class Reserves:
    """
    The warm workers of one host. Thread-safe; one request is under way at a time.

    Args:
        launcher: Starts them.
        book: Takes the place of one enclave on this platform; raises BusyError if it is full.
        unbook: Gives such a place back.
        wanted: Whether the host is still there.
        slow: As for ``Launcher.launch``.
        most: How many may be offered, of all kinds together.
        name: For the thread that keeps them up.

    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        book: Callable[[], None],
        unbook: Callable[[], None],
        wanted: Callable[[], bool],
        slow: Callable[[], None],
        most: int,
        name: str,
    ) -> None:
        self._launcher = launcher
        self._book = book
        self._unbook = unbook
        self._host_is_there = wanted
        self._slow = slow
        self._most = most
        self._name = name
        self._lock = threading.Condition()
        self._reserves: dict[bytes, _Reserve] = {}
        self._wake = -1
        self._closed = False

    # ---- requests -----------------------------------------------------------------------------

    def reserve(self, wish: Wish, image_fd: int) -> messages.Reserved:
        """
        Begin a reserve of a kind.

        Args:
            wish: The kind.
            image_fd: Its image; stays the caller's.

        Raises:
            BusyError: There are too many kinds.
            LaunchError: There can be no thread to keep them.

        """
        with self._lock:
            if len(self._reserves) >= MAX_RESERVES:
                raise BusyError("this host has too many reserves", expected=MAX_RESERVES)
            self._start_keeper()
            reserve = _Reserve(
                reserve_id=secrets.token_bytes(16), wish=wish, image_fd=os.dup(image_fd)
            )
            self._reserves[reserve.reserve_id] = reserve
            return reserve.told()

    def _find(self, reserve_id: bytes) -> _Reserve:
        reserve = self._reserves.get(reserve_id)
        if reserve is None:
            raise ArgumentError("this host has no such reserve")
        return reserve

    def ask(self, reserve_id: bytes) -> messages.Reserved:
        """Say how a reserve is. Raises ArgumentError if there is none."""
        with self._lock:
            return self._find(reserve_id).told()

    def offer(self, reserve_id: bytes, ring_fd: int) -> tuple[messages.Reserved, int]:
        """
        Begin to keep one more warm worker.

        Args:
            reserve_id: Of the reserve.
            ring_fd: What it will serve; stays the caller's.

        Returns:
            How the reserve is, and the worker's bell for the host; it stays this object's.

        Raises:
            ArgumentError: There is no such reserve, or that is no ring.
            BusyError: There are too many offers.
            LaunchError: There can be no thread to keep them.

        """
        with self._lock:
            reserve = self._find(reserve_id)
            check_ring(ring_fd, reserve.wish)
            offered = sum(len(item.offers) for item in self._reserves.values())
            if offered >= self._most:
                raise BusyError("this host wants too many warm workers", expected=self._most)
            self._start_keeper()  # one that ended by a flaw has a successor
            ring_fd = os.dup(ring_fd)
            try:
                bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except BaseException:
                os.close(ring_fd)
                raise
            reserve.last += 1
            reserve.offers[reserve.last] = _Offer(slot=reserve.last, ring_fd=ring_fd, bell=bell)
            self._notify()
            return reserve.told(), bell

    def withdraw(self, reserve_id: bytes, slot: int) -> messages.Reserved:
        """
        End one warm worker, or (-1) all and the reserve.

        Raises:
            ArgumentError: There is no such reserve or offer.

        """
        with self._lock:
            reserve = self._find(reserve_id)
            if slot == -1:
                gone = self._drop(reserve)
            elif slot in reserve.offers:
                gone = _strip([reserve.offers.pop(slot)])
            else:
                raise ArgumentError("this reserve has no such offer", found=slot)
            told = reserve.told()
        self._end(gone)
        return told

    def _drop(self, reserve: _Reserve) -> list[Candidate]:
        del self._reserves[reserve.reserve_id]
        os.close(reserve.image_fd)
        gone = _strip(reserve.offers.values())
        reserve.offers.clear()
        return gone

    def take(self, reserve_id: bytes, slot: int = -1) -> Taken:
        """
        Take an offer; call :meth:`used` afterwards.

        Args:
            reserve_id: Of the reserve.
            slot: The offer, and no other whatever becomes of it: its ring may have a call in it.
                -1: the oldest with a warm worker, else the oldest.

        Raises:
            ArgumentError: There is no such reserve or offer, or nothing was offered.
            LaunchError: The host is gone.

        """
        with self._lock:
            reserve = self._find(reserve_id)
            while True:
                found = reserve.warm(slot) or reserve.lacking(slot)
                if found is not None:
                    break
                if slot != -1 and slot not in reserve.offers:
                    raise ArgumentError("this reserve has no such offer", found=slot)
                if not reserve.offers:
                    raise ArgumentError("no ring was offered to this reserve")
                # All are being started: one is there sooner than another would be.
                self._lock.wait(_SLICE)
                if not self._host_is_there():
                    raise LaunchError("the host is gone")
            candidate, found.candidate = found.candidate, None
            found.starting = True
            return Taken(
                wish=reserve.wish,
                slot=found.slot,
                image_fd=reserve.image_fd,
                ring_fd=found.ring_fd,
                candidate=candidate,
            )

    def used(self, reserve_id: bytes, slot: int, *, error: str | None = None) -> None:
        """
        Say what became of an offer that was taken.

        Args:
            reserve_id: Of the reserve.
            slot: The offer, which is over: a ring that a worker was given serves no other.
            error: Why it became no enclave.

        """
        with self._lock:
            reserve = self._reserves.get(reserve_id)
            if reserve is None or slot not in reserve.offers:
                return
            reserve.offers.pop(slot).close()
            if error is not None:
                reserve.fail(error)
            quiet = _QUIET[not reserve.ready]
            reserve.not_before = max(reserve.not_before, time.monotonic() + quiet)

    def shed(self) -> bool:
        """End one warm worker, for somebody who needs its place now; False: there is none."""
        with self._lock:
            for reserve in self._reserves.values():
                for offer in reversed(reserve.offers.values()):
                    if offer.candidate is not None:
                        candidate, offer.candidate = offer.candidate, None
                        reserve.fail("the platform is full")
                        self._notify()
                        break
                else:
                    continue
                break
            else:
                return False
        candidate.end()
        self._unbook()
        return True

    # ---- keeping ------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        if self._wake >= 0:
            return
        if self._closed:
            raise LaunchError("the connection is closing")
        wake = -1
        try:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            thread = threading.Thread(target=self._keep, args=(wake,), name=self._name, daemon=True)
            thread.start()
        except (OSError, RuntimeError) as error:
            if wake >= 0:
                os.close(wake)
            raise LaunchError(f"cannot keep warm workers: {error}") from None
        self._wake = wake

    def _notify(self) -> None:
        if self._wake < 0 and not self._closed:
            with contextlib.suppress(LaunchError):  # the next offer says so
                self._start_keeper()
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _keep(self, wake: int) -> None:
        try:
            while self._watch(wake):
                due = self._due()
                if due is not None:
                    self._start_one(*due)
        finally:
            with self._lock:
                self._wake = -1
                os.close(wake)

    def _watch(self, wake: int) -> bool:
        """Wait for something to do; end warm workers that died or spoke. False: it is over."""
        with self._lock:
            if self._closed:
                return False
            watched: dict[int, tuple[_Reserve, _Offer, Candidate]] = {}
            for reserve in self._reserves.values():
                for offer in reserve.offers.values():
                    if offer.candidate is not None:
                        one = (reserve, offer, offer.candidate)
                        watched[offer.candidate.worker.pidfd] = one
                        watched[offer.candidate.channel.fileno()] = one
            seconds = self._patience()
        # Who takes one may close its descriptors meanwhile: only those that still wait count.
        poll = select.poll()
        for fd in (wake, *watched):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000 + 1)}
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(wake)
        ended: list[Candidate] = []
        with self._lock:
            for fd in ready & watched.keys():
                reserve, offer, candidate = watched[fd]
                if offer.candidate is candidate:
                    offer.candidate = None
                    # A warm worker has nothing to say: what speaks is no longer what was tried.
                    reserve.fail("a warm worker ended by itself")
                    ended.append(candidate)
        for candidate in ended:
            candidate.end()
            self._unbook()
        return True

    def _patience(self) -> float | None:
        """How long to start none, in seconds; None: none is needed."""
        now = time.monotonic()
        waits = [
            max(0.0, reserve.not_before - now)
            for reserve in self._reserves.values()
            if reserve.lacking() is not None
        ]
        return min(waits, default=None)

    def _due(self) -> tuple[_Reserve, _Offer] | None:
        now = time.monotonic()
        with self._lock:
            for reserve in sorted(self._reserves.values(), key=lambda item: item.ready):
                offer = reserve.lacking()
                if offer is not None and reserve.not_before <= now:
                    offer.starting = True
                    return reserve, offer
        return None

    def _start_one(self, reserve: _Reserve, offer: _Offer) -> None:
        error = ""
        candidate = None
        try:
            self._book()
            try:
                candidate = self._warm(reserve, offer)
            finally:
                if candidate is None:
                    self._unbook()
        except Exception as failure:
            # Of a flaw of ours, too: who waits for this offer would do so for ever.
            error = f"{type(failure).__name__}: {failure}"
        with self._lock:
            offer.starting = False
            self._lock.notify_all()
            if candidate is None:
                reserve.fail(error)
                return
            if self._wants(reserve, offer):
                offer.candidate = candidate
                return
        candidate.end()
        self._unbook()

    def _warm(self, reserve: _Reserve, offer: _Offer) -> Candidate:
        with contextlib.ExitStack() as stack:
            with self._lock:
                if not self._wants(reserve, offer):
                    raise LaunchError("nobody wants it any more")
                fds: list[int] = []
                stack.callback(close_all, fds)
                for fd in (reserve.image_fd, offer.ring_fd, offer.bell):
                    fds.append(os.dup(fd))
            return self._launcher.warm(
                reserve.wish,
                *fds,
                wanted=lambda: self._wants(reserve, offer) and self._host_is_there(),
                slow=self._slow,
            )

    def _wants(self, reserve: _Reserve, offer: _Offer) -> bool:
        return not self._closed and reserve.offers.get(offer.slot) is offer

    def _end(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            # All at once: each takes a moment to be gone.
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(candidate.worker.pidfd, signal.SIGKILL)
        for candidate in candidates:
            candidate.end()
            self._unbook()

    def close(self) -> None:
        """End every warm worker. May be called twice."""
        with self._lock:
            self._closed = True
            gone = [one for item in list(self._reserves.values()) for one in self._drop(item)]
            self._notify()
        self._end(gone)


def _strip(offers: Iterable[_Offer]) -> list[Candidate]:
    """Close the rings of offers that are over; return their workers, which nobody else ends."""
    found = []
    for offer in offers:
        offer.close()
        candidate, offer.candidate = offer.candidate, None
        if candidate is not None:
            found.append(candidate)
    return found
