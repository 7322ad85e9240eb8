"""
A debug worker's connection with a debugger, and whose turn it is to speak with it.

A debugger is asked for over the socket that came with the output pipe; from the platform comes a
packet socket to it. What a debugger sends may be anything: at worst it loses its connection.
Several threads may stop; they take turns. One that steps has the next turn too, but not longer than
a moment, so that two threads that wait for each other can both be looked at.

Like ``debugger`` this is on the lock lists of images that allow debug, and on no others.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
import time
from typing import Final

from pyenclave._worker import output
from pyenclave.errors import EnclaveStateError
from pyenclave.formats import debugging
from pyenclave.trusted import _runtime

__all__ = ["Desk", "GoneError", "Session", "log", "the_desk"]

_SLICE: Final = 0.1  # seconds; no wait is longer
_ANSWER: Final = 5.0  # seconds for the platform to say whether there is a debugger
_TURN: Final = 1.0  # seconds for which a thread that steps keeps its turn


class GoneError(Exception):
    """The debugger is gone; trusted code never sees it."""


class Session:
    """The connection with one debugger."""

    def __init__(self, fd: int) -> None:
        # Family and kind are said, so that no filtered call asks for them.
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)

    @property
    def alive(self) -> bool:
        """Whether the debugger still holds its end."""
        return not self._ready(0, 0)

    def _ready(self, events: int, seconds: float) -> int:
        poll = select.poll()
        poll.register(self._sock, events)
        found = poll.poll(seconds * 1000)
        return found[0][1] if found else 0

    def send(self, packet: debugging.Packet) -> None:
        """Send *packet*, waiting while the debugger reads nothing. Raises GoneError."""
        data = debugging.encode(packet)
        while True:
            try:
                self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._ready(select.POLLOUT, _SLICE)
            except OSError:
                raise GoneError from None
            else:
                return

    def receive(self) -> debugging.Packet:
        """Wait for a packet. Raises GoneError, also if what comes is none."""
        while True:
            try:
                self._ready(select.POLLIN, _SLICE)
                data = self._sock.recv(debugging.MAX_PACKET + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                raise GoneError from None
            if not data:
                raise GoneError
            try:
                return debugging.decode(data)
            except EnclaveStateError as error:
                log(f"the debugger is detached: {error}")
                raise GoneError from None

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


class Desk:
    """
    What the threads of this process share: one debugger at most, and whose turn it is.

    Attributes:
        session: The connection with the debugger, once there is one.

    """

    def __init__(self) -> None:
        side = output.side()
        if side is None:
            raise EnclaveStateError("there is no debugger in a production enclave")
        self._side = side
        self._turn = threading.Condition()
        self._owner = 0
        self._depth = 0
        self._kept = (0, 0.0)  # thread that has the next turn, until when
        self._waited = False
        self._last = 0
        self.session: Session | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread has its turn."""
        return self._owner == threading.get_ident()

    def enter(self, where: str) -> bool:
        """Wait for this thread's turn, then for a debugger; return whether there is one."""
        me = threading.get_ident()
        with self._turn:
            while not self._free_for(me):
                self._turn.wait(_SLICE)
            self._owner = me
            self._depth += 1
        if self._depth == 1 and not self._find(where):
            self.leave()
            return False
        return True

    def _free_for(self, me: int) -> bool:
        if self._owner:
            return self._owner == me
        thread, until = self._kept
        return thread in (0, me) or time.monotonic() >= until

    def leave(self, *, stepping: bool = False) -> None:
        """End this thread's turn; if it is *stepping*, the next is its too."""
        with self._turn:
            self._depth -= 1
            if not self._depth:
                until = time.monotonic() + _TURN
                self._kept = (self._owner, until) if stepping else (0, 0.0)
                self._owner = 0
                self._turn.notify_all()

    def give_up(self) -> None:
        """Let another thread have the next turn."""
        with self._turn:
            if self._kept[0] == threading.get_ident():
                self._kept = (0, 0.0)
                self._turn.notify_all()

    def other_thread(self) -> str:
        """Return this thread's name if another had the turn before."""
        before, self._last = self._last, threading.get_ident()
        return threading.current_thread().name if before not in (0, self._last) else ""

    def drop(self, reason: str = "") -> None:
        """End the connection with the debugger."""
        session, self.session = self.session, None
        if session is not None:
            with contextlib.suppress(GoneError):
                session.send(debugging.Ends(reason=reason))
            session.close()

    # ---- finding a debugger -----------------------------------------------------------------

    def _find(self, where: str) -> bool:
        if self.session is not None and not self.session.alive:
            self.drop()
        if self.session is None:
            self.session = self._ask(where)
        return self.session is not None

    def _ask(self, where: str) -> Session | None:
        found = None
        while (packet := self._packet(0)) is not None:
            # One that came when nobody waited any more; or the answer to an earlier question.
            if packet[1] is not None:
                if found is not None:
                    found.close()
                found = packet[1]
        if found is not None:
            if found.alive:
                self._waited = True
                return found
            found.close()
        try:
            enclave = _runtime.current().identity.enclave_id.hex()[:12]
        except EnclaveStateError:
            log(f"{where}: passed, since nobody can attach while the module is being loaded")
            return None
        wait = 0.0 if self._waited else self._side.wait
        self._waited = True
        if wait <= 0:
            return self._await(b"n", _ANSWER, "")
        return self._await(
            b"?",
            wait,
            f"{where}: waiting up to {wait:g} s for: pyenclave debug {enclave}",
        )

    def _await(self, question: bytes, seconds: float, told: str) -> Session | None:
        try:
            self._side.sock.send(question, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            packet = self._packet(_SLICE)
            if packet is None:
                continue
            data, session = packet
            if session is not None:
                return session
            if data != b"-" or not told:
                return None
            log(told)
        if told:
            with contextlib.suppress(OSError):
                self._side.sock.send(b".", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            log("nobody came; from now on breakpoints stop only while a debugger is attached")
        return None

    def _packet(self, seconds: float) -> tuple[bytes, Session | None] | None:
        """Return the platform's next packet; None: there is none. Without a platform, b''."""
        poll = select.poll()
        poll.register(self._side.sock, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        try:
            flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            data, fds, _, _ = socket.recv_fds(self._side.sock, 2, 1, flags)
        except BlockingIOError:
            return None
        except OSError:
            return (b"", None) if seconds else None
        if not data:
            return (b"", None) if seconds else None
        return data, Session(fds[0]) if fds else None


_desk: Desk | None = None
_making = threading.Lock()


def the_desk() -> Desk:
    """Return this process's. Raises EnclaveStateError in a production worker."""
    global _desk  # noqa: PLW0603 - one process, one of them
    with _making:
        if _desk is None:
            _desk = Desk()
        return _desk


def log(text: str) -> None:
    """Print a line to the enclave's log."""
    print(f"[breakpoint] {text}", file=sys.stderr)  # noqa: T201 - the enclave's log
