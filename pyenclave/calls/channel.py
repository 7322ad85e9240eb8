"""
Control channels: sequenced-packet Unix sockets that carry messages and descriptors.

One message is one packet. Descriptors that come with a message are owned by the receiver, which
closes those that it does not expect.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from types import TracebackType
from typing import Self

from pyenclave.errors import EnclaveLostError, EnclaveStateError
from pyenclave.formats import messages

__all__ = ["Channel", "close_all"]

_MAX_FDS = 8
_SLICE = 0.1  # seconds; no wait is longer, so that no peer's death hangs the other


def close_all(fds: tuple[int, ...] | list[int]) -> None:
    """Close every descriptor of *fds*, whatever happens to the others."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class Channel:
    """
    One end of a control channel. Not thread-safe: its owner holds a lock around an exchange.

    Args:
        sock: A connected ``AF_UNIX``/``SOCK_SEQPACKET`` socket; the channel owns it.

    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Return two connected channels."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Take over the socket *fd*, which is of the kind of :meth:`pair`."""
        # Said here, Python need not ask the kernel for it.
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd))

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def send(
        self,
        message: messages.Message,
        fds: tuple[int, ...] = (),
        timeout: float | None = None,
    ) -> None:
        """
        Send *message* with *fds* (which stay the caller's).

        Args:
            message: What to send.
            fds: Descriptors that go with it.
            timeout: Seconds, or None to wait as long as the peer lives without reading.

        Raises:
            EnclaveLostError: The peer is gone.
            TimeoutError: The peer reads nothing; the message was not sent.

        """
        data = messages.encode(message)
        deadline = None if timeout is None else time.monotonic() + timeout
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            try:
                self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError("the peer does not read") from None
                poll = select.poll()
                poll.register(self._sock, select.POLLOUT)
                poll.poll(_SLICE * 1000)
            except OSError as error:
                raise EnclaveLostError(f"the peer is gone: {error.strerror}") from None
            else:
                return

    def receive(
        self, timeout: float | None = None, *, spin: float = 0.0
    ) -> tuple[messages.Message, list[int]]:
        """
        Receive one message and its descriptors (now the caller's).

        Args:
            timeout: Seconds, or None to wait until the peer ends.
            spin: Seconds to look again and again before this sleeps.

        Raises:
            TimeoutError: Nothing came in time.
            EnclaveLostError: The peer is gone.
            EnclaveStateError: What came is not a message; its descriptors are closed.

        """
        deadline = None if timeout is None else time.monotonic() + timeout
        space = socket.CMSG_SPACE(_MAX_FDS * 4)
        awake = time.monotonic() + spin if spin else 0.0
        while True:
            left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
            if left < 0:
                raise TimeoutError("no message within the deadline")
            if not awake:
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                if not poll.poll(left * 1000):
                    continue
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    messages.MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                if awake:
                    os.sched_yield()
                    if time.monotonic() >= awake:
                        awake = 0.0
                continue
            except OSError as error:
                raise EnclaveLostError(f"the peer is gone: {error.strerror}") from None
            break
        fds: list[int] = []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                fds.extend(numbers)
        try:
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise EnclaveStateError("control message or its descriptors were cut short")
            if not data:
                raise EnclaveLostError("the peer closed the channel")
            return messages.decode(data), fds
        except BaseException:
            close_all(fds)
            raise

    def readable(self) -> bool:
        """Return whether :meth:`receive` would return or raise at once."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the channel; may be called twice."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
