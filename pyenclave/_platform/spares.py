"""
Spares: processes that a zygote forked ahead of time and that wait to become workers.

Half of a launch can be done before anybody asks for it: the fork, the namespaces, fresh
randomness, the kernel's copying of shared pages, reading an image that was launched before. A
spare has no identity and no key, and it has run nothing of an enclave. Each becomes one worker or
none.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pyenclave.errors import EnclaveError, LaunchError

__all__ = ["MAX_SPARES", "Spare", "Spares", "readable"]

#: The most that wait at the same time. There is one at first; whoever finds none doubles it.
MAX_SPARES: Final = 4
# A launch that was just asked for, and the calls after it, have the processor to themselves: so
# long nothing is forked, in seconds, while there is a spare left and while there is none.
_QUIET: Final = (0.02, 0.005)
_LOOK: Final = 1.0  # seconds between two looks for workers that ended
_RETRY: Final = 1.0  # seconds, after a fork that failed or a spare that ended unasked
# A spare that was roused looks for its launch so long before it sleeps again, in seconds.
_AWAKE: Final = 0.001
_LARGEST_IMAGE: Final = 64 << 20  # bytes; a larger one is not held on to


def readable(fd: int, seconds: float) -> bool:
    """Whether *fd* can be read within *seconds*; a pidfd can once its process has ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spare:
    """
    A process that waits to become a worker.

    Attributes:
        pid: Its pid in the platform's pid namespace.
        pidfd: Its pidfd.
        namespaces: The namespaces that it got of its own, by name.
        sock: Where it waits for image, ring and channel.
        image: SHA-256 of the image that it prepared for; empty: for none.

    """

    pid: int
    pidfd: int
    namespaces: tuple[str, ...]
    sock: socket.socket
    image: bytes

    def rouse(self) -> None:
        """Have it wake up: it may be needed in a moment."""
        with contextlib.suppress(OSError):  # it ended, or heard it often enough
            self.sock.send(b"W", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def begin(self, fds: list[int], *, image: bytes) -> bool:
        """
        Hand over image, ring and channel.

        Nobody waits until the process has taken them. One that was killed may look alive for a
        moment, and what is sent to it is lost: :meth:`began` says so when its channel has ended.

        Args:
            fds: Descriptors of the three; they stay the caller's.
            image: SHA-256 of the image; empty: it is not one to prepare for.

        Returns:
            False if the process ended before: nobody has or had them.

        """
        kind = b"A" if image and image == self.image else b"S"
        try:
            socket.send_fds(self.sock, [kind], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def began(self) -> bool:
        """Whether the process took what it was handed over, as far as it said so yet."""
        try:
            return self.sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b"B"
        except OSError:
            return False

    def close(self) -> None:
        """End the process, which sees its socket close."""
        self.sock.close()
        os.close(self.pidfd)


class Spares:
    """
    The spares of one zygote. Any thread may use it.

    Args:
        fork: Has the zygote fork one, for the image of a descriptor and its digest, or for none.
        zygote: The zygote's pidfd; stays the caller's, open until :meth:`close` has returned.
        ended: Called once, in a thread of this object, when the zygote ends by itself; it must
            call :meth:`close`.
        look: Gives back what belonged to workers that ended; whether there are workers. Called
            about every second while there are.
        name: For the thread that keeps them up.

    """

    def __init__(
        self,
        fork: Callable[[int | None, bytes], Spare],
        *,
        zygote: int,
        ended: Callable[[], None],
        look: Callable[[], bool] = lambda: False,
        name: str,
    ) -> None:
        self._fork = fork
        self._zygote = zygote
        self._ended = ended
        self._look = look
        self._name = name
        self._lock = threading.Lock()
        self._wake = -1  # an eventfd while there is a thread to wake
        self._waiting: collections.deque[Spare] = collections.deque()
        self._wanted = 1
        self._image: tuple[int | None, bytes] = (None, b"")
        self._not_before = 0.0
        self._roused = (-1, 0.0)  # which was, by its pidfd, and when
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to keep spares. Raises LaunchError if there can be no thread for it."""
        thread = threading.Thread(target=self._keep, name=self._name, daemon=True)
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            thread.start()
        except (OSError, RuntimeError) as error:
            raise LaunchError(f"cannot keep a zygote: {error}") from None
        self._thread = thread

    @property
    def waiting(self) -> bool:
        """Whether there is one to take; it may have ended, which is seen when it is taken."""
        return bool(self._waiting)

    def take(self, image_fd: int, image: bytes) -> Spare | None:
        """
        Return a spare for the caller to use, best one that knows its image; None: there is none.

        Args:
            image_fd: The image that is launched; later spares prepare for it.
            image: Its SHA-256, over bytes that cannot change any more; empty: do not prepare.

        """
        with self._lock:
            if self._closed:
                return None
            self._remember(image_fd, image)
            found = self._pick(image)
            if found is None and self._thread is not None:
                self._wanted = min(2 * self._wanted, MAX_SPARES)
            self._not_before = time.monotonic() + _QUIET[not self._waiting]
        return found

    def rouse(self) -> None:
        """Wake the spare that is likely to be taken next; nothing depends on it."""
        with self._lock:
            if self._closed or not self._waiting:
                return
            spare = self._best(self._image[1])
            now = time.monotonic()
            # Who asks again and again keeps none from sleeping for longer than it takes to ask.
            if self._roused != (spare.pidfd, self._roused[1]) or now > self._roused[1] + _AWAKE:
                self._roused = spare.pidfd, now
                spare.rouse()

    def used(self) -> None:
        """Have what was taken replaced; to be called once the launch went on, or failed."""
        with self._lock:
            self._notify()

    def _notify(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _best(self, image: bytes) -> Spare:
        rank = {image: 0, b"": 1}
        return min(self._waiting, key=lambda spare: rank.get(spare.image, 2))

    def _pick(self, image: bytes) -> Spare | None:
        if not self._waiting:
            return None
        found = self._best(image)
        self._waiting.remove(found)
        return found

    def _remember(self, image_fd: int, image: bytes) -> None:
        held, digest = self._image
        if image == digest:
            return
        fd = None
        if image and os.fstat(image_fd).st_size <= _LARGEST_IMAGE:
            with contextlib.suppress(OSError):  # out of descriptors
                fd = os.dup(image_fd)
        self._image = (fd, image if fd is not None else b"")
        if held is not None:
            os.close(held)

    def _keep(self) -> None:
        while (ready := self._watch()) is not None:
            if self._zygote in ready:
                self._ended()
                return
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            self._fork_one()

    def _watch(self) -> set[int] | None:
        """Wait for something to do; drop spares that ended. None: this object is closed."""
        with self._lock:
            if self._closed:
                return None
            watched = {spare.pidfd: spare for spare in self._waiting}
            seconds = self._patience()
        if seconds is None and self._look():
            seconds = _LOOK
        # Who takes a spare may close its pidfd meanwhile; so only those that still wait count.
        poll = select.poll()
        for fd in (self._wake, self._zygote, *watched):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
        with self._lock:
            for fd in ready & watched.keys():
                if watched[fd] in self._waiting:
                    self._waiting.remove(watched[fd])
                    watched[fd].close()
                    # Whatever ends them must not have us fork without pause.
                    self._not_before = time.monotonic() + _RETRY
        return ready

    def _patience(self) -> float | None:
        """How long to fork none, in seconds; None: none is needed."""
        if len(self._waiting) >= self._wanted:
            return None
        return max(0.0, self._not_before - time.monotonic())

    def _fork_one(self) -> None:
        with self._lock:
            if self._closed or self._patience() != 0:
                return
            fd, image = self._image
            try:
                fd = None if fd is None else os.dup(fd)
            except OSError:
                fd, image = None, b""
        try:
            spare = self._fork(fd, image)
        except (EnclaveError, OSError):
            # Who launches next sees the error, or that it was none for long.
            with self._lock:
                self._not_before = time.monotonic() + _RETRY
            return
        finally:
            if fd is not None:
                os.close(fd)
        self._put(spare)

    def _put(self, spare: Spare) -> None:
        with self._lock:
            if not self._closed:
                self._waiting.append(spare)
                return
        spare.close()

    def close(self) -> None:
        """End every spare. May be called twice; the zygote has ended or is about to."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            held, _ = self._image
            self._image = (None, b"")
            self._notify()
        if held is not None:
            os.close(held)
        for spare in waiting:
            with contextlib.suppress(OSError):
                spare.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
