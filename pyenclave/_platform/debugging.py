"""
Where debuggers and debug workers meet: the platform's end of a debug worker's second descriptor.

The platform introduces them and hears nothing of what they say. A worker that stops asks for a
debugger, here; ``pyenclave debug`` asks for the enclave, at the platform's own socket, under the
rules of ``kill`` and ``logs``: the same user. Each debugger gets one end of a fresh socket pair and
the worker the other, once it asks. Packets with the worker (no decoder is needed for them):

====== ===================================================== ======================
from   bytes                                                 descriptor
====== ===================================================== ======================
worker ``?``: it stopped, and waits                          none
worker ``n``: it stopped, and waits only for an answer       none
worker ``.``: it waits no more                               none
here   ``!``: a debugger is there                            the worker's end
here   ``-``: none is there (after ``?`` one may come yet)   none
====== ===================================================== ======================

A production worker has no such descriptor, and no ``Debuggee`` is made for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
from typing import Final

from pyenclave.errors import BusyError, EnclaveStateError

__all__ = ["WAIT", "Debuggee", "breakpoint_wait", "wait_of"]

WAIT: Final = 60.0  # seconds that the first breakpoint waits for a debugger
_MAX_WAIT: Final = 86400.0


def wait_of(text: str | None) -> float:
    """Return the seconds that ``PYENCLAVE_BREAKPOINT_WAIT`` says; 60 for what is no number."""
    try:
        wait = WAIT if text is None else float(text)
    except ValueError:
        return WAIT
    return WAIT if math.isnan(wait) else min(max(wait, 0.0), _MAX_WAIT)


def _pair() -> tuple[socket.socket, socket.socket]:
    kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    return socket.socketpair(socket.AF_UNIX, kind)


class Debuggee:
    """
    A debug worker as its debuggers find it. Thread-safe.

    Raises:
        OSError: There are no descriptors for it.

    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._ours, self._theirs = _pair()
        self._holder: object | None = None
        self._pending: socket.socket | None = None  # the worker's end, until it asks
        self._waiting = False
        self._closed = False

    @property
    def worker_fd(self) -> int:
        """The worker's end, which goes with Output."""
        return self._theirs.fileno()

    def close_worker_end(self) -> None:
        """Close our copy of the worker's end, once that is on its way. Twice is fine."""
        self._theirs.close()

    def fileno(self) -> int:
        """Return the descriptor to be polled; -1: closed."""
        return self._ours.fileno()

    @property
    def state(self) -> str:
        """``attached``, ``stopped`` (it waits for a debugger), or empty."""
        with self._mutex:
            if self._holder is not None:
                return "attached"
            return "stopped" if self._waiting else ""

    def attach(self, holder: object) -> socket.socket:
        """
        Return the debugger's end of a new connection with the worker.

        Args:
            holder: Whoever attaches, until :meth:`detach`.

        Raises:
            BusyError: Another debugger is attached.
            EnclaveStateError: The enclave ended.

        """
        with self._mutex:
            if self._closed:
                raise EnclaveStateError("the enclave ended")
            if self._holder is not None:
                raise BusyError(
                    "another debugger is attached to this enclave", expected="one at a time"
                )
            theirs, workers = _pair()
            self._holder = holder
            self._pending = workers
            if self._waiting:
                self._give()
            return theirs

    def detach(self, holder: object) -> None:
        """Make room for the next debugger, if *holder* is the one that is attached."""
        with self._mutex:
            if self._holder is holder:
                self._holder = None
                self._drop()

    def answer(self) -> bool:
        """Answer one packet of the worker; return False if there will be no more."""
        try:
            data = self._ours.recv(2)
        except BlockingIOError:
            return True
        except OSError:
            return False
        with self._mutex:
            if data == b".":
                self._waiting = False
                return True
            if data not in (b"?", b"n"):
                return False  # its end is closed, or it is no debugger of ours
            self._waiting = data == b"?"
            if not self._give():
                self._send(b"-")
        return True

    def _give(self) -> bool:
        """Give the worker its end of the connection, if there is a debugger that still lives."""
        pending = self._pending
        if pending is None:
            return False
        poll = select.poll()
        poll.register(pending, 0)
        alive = not poll.poll(0)
        if alive:
            self._send(b"!", pending)
            self._waiting = False
        self._drop()
        return alive

    def _send(self, data: bytes, sock: socket.socket | None = None) -> None:
        # A worker that reads nothing, or is gone, has no debugger.
        with contextlib.suppress(OSError):
            if sock is None:
                self._ours.send(data, socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self._ours, [data], [sock.fileno()], socket.MSG_NOSIGNAL)

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending.close()
            self._pending = None

    def close(self) -> None:
        """End it all: a debugger that waits hears that the enclave ended. Twice is fine."""
        with self._mutex:
            self._closed = True
            self._waiting = False
            self._drop()
            self._ours.close()
            self._theirs.close()


def breakpoint_wait() -> float:
    """Return how long this platform's workers wait, from its environment."""
    return wait_of(os.environ.get("PYENCLAVE_BREAKPOINT_WAIT"))
