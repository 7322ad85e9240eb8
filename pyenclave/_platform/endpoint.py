"""
Where hosts and the platform meet: a socket in the state directory, else an abstract one.

There is one platform for each runtime (interpreter, package, folders of packages) of a user and
state directory, so that programs of two virtual environments do not share zygotes. The socket's
name carries the runtime's digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

import pyenclave
from pyenclave._locks import RLock
from pyenclave._platform.state import State
from pyenclave.errors import PlatformUnavailableError
from pyenclave.formats.lock import Roots
from pyenclave.formats.messages import FORMAT_VERSION

__all__ = ["Endpoint", "no_fork", "not_inherited", "peer_uid", "runtime_name"]

_CREDENTIALS: Final = struct.Struct("iII")
_BACKLOG: Final = 1024
_FULL_TIMEOUT: Final = 5.0  # seconds for a platform to accept one of those that wait
_BIND_TIMEOUT: Final = 1.0  # for a predecessor that is ending


def runtime_name(executable: str, roots: Roots) -> str:
    """Return 16 hexadecimal digits that name a runtime."""
    parts = [pyenclave.__version__, str(FORMAT_VERSION), os.path.realpath(executable)]
    return hashlib.sha256(msgspec.json.encode([*parts, roots])).hexdigest()[:16]


def peer_uid(sock: socket.socket) -> int:
    """Return the user of the process at the other end, as the kernel saw it (SO_PEERCRED)."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])


def peer_pid(sock: socket.socket) -> int:
    """Return the process at the other end, for listings only: numbers are used again."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[0])


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
no_fork = RLock()  # while a thread has it, no other thread forks


def not_inherited(make: Callable[[], tuple[socket.socket, ...]]) -> tuple[socket.socket, ...]:
    """
    Return the sockets that *make* makes; they are closed in forked children.

    A child's copy would keep the connection alive, and its enclaves, when the host is gone.
    """
    with no_fork:
        made = make()
        for sock in made:
            _sockets.add(sock)
        return made


def _new_socket() -> tuple[socket.socket, ...]:
    return (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC),)


def _after_fork() -> None:
    for sock in list(_sockets):
        sock.close()
    no_fork.release()  # this thread took it before the fork


os.register_at_fork(
    before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=_after_fork
)


class OtherUserError(PlatformUnavailableError):
    """The process at the other end is another user's."""


class Endpoint:
    """
    The address of one platform.

    Args:
        state: The state directory.
        runtime: From :func:`runtime_name`.

    """

    def __init__(self, state: State, runtime: str) -> None:
        self._state = state
        self.socket_name = f"platform-{runtime}.sock"
        self.lock_name = f"platform-{runtime}.lock"
        self.start_lock_name = f"start-{runtime}.lock"
        self.log_name = f"platform-{runtime}.log"
        place = hashlib.sha256(state.path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._abstract = f"\0pyenclave-{os.geteuid()}-{place}-{runtime}"

    def _path(self) -> str:
        # Through the open directory: no race with whoever swaps a path, and no limit of 107 bytes.
        return f"/proc/self/fd/{self._state.fd}/{self.socket_name}"

    @property
    def durable(self) -> bool:
        """Whether a platform that starts now could keep its root."""
        return self._state.writable

    def connect(self) -> socket.socket | None:
        """
        Connect to the platform in the state directory, if one listens there.

        Returns:
            The socket, or None if nobody listens.

        Raises:
            PlatformUnavailableError: Who listens is another user, or does not accept.

        """
        if self._state.exists:
            sock = self._connect_to(self._path())
            if sock is not None:
                return sock
        return None

    def connect_abstract(self) -> socket.socket | None:
        """Connect to a platform that found no place for a socket in the state directory."""
        try:
            return self._connect_to(self._abstract)
        except OtherUserError:
            return None  # another user took the name: work without it

    def _connect_to(self, address: str) -> socket.socket | None:
        deadline = time.monotonic() + _FULL_TIMEOUT
        while True:
            (sock,) = not_inherited(_new_socket)
            try:
                sock.setblocking(False)
                sock.connect(address)
                uid = peer_uid(sock)
                break
            except BlockingIOError:
                # Its queue is full: it lives, and a second platform beside it would be wrong.
                sock.close()
                if time.monotonic() >= deadline:
                    raise PlatformUnavailableError(
                        "the platform does not answer",
                        expected=f"a connection within {_FULL_TIMEOUT:g} s",
                        advice="Is it stopped? 'pyenclave ps' and the platform's log say more.",
                    ) from None
                time.sleep(0.005)
            except OSError:
                sock.close()
                return None
        if uid != os.geteuid():
            sock.close()
            raise OtherUserError(
                "another user listens in place of the platform",
                expected=f"uid {os.geteuid()}",
                found=uid,
            )
        return sock

    def listen(self) -> socket.socket | None:
        """
        Listen, in place of a socket that a dead platform left.

        The caller holds the platform's lock (where the state directory can be written), so that
        no living platform's socket is taken away.

        Returns:
            The listener, or None if there is no place for one: the platform then serves only the
            host that started it.

        """
        if self._state.exists and self._state.writable:
            self._state.unlink(self.socket_name)
            with contextlib.suppress(OSError):
                return self._listen_at(self._path())
        # No place there, or none any more: the disk may have filled up since.
        deadline = time.monotonic() + _BIND_TIMEOUT
        while True:
            try:
                return self._listen_at(self._abstract)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                    return None
                time.sleep(0.01)

    @contextlib.contextmanager
    def turn(self, timeout: float) -> Iterator[None]:
        """
        Hold the right to start the platform, so that of many hosts one starts it.

        Raises:
            PlatformUnavailableError: Another host had it for longer than *timeout* seconds.

        """
        if self._state.writable:
            with self._state.lock(self.start_lock_name, timeout=timeout):
                yield
            return
        listener = self._abstract_turn(timeout)
        try:
            yield
        finally:
            if listener is not None:
                listener.close()

    def _abstract_turn(self, timeout: float) -> socket.socket | None:
        """Where no file can be locked: whoever has the name has the turn."""
        name = f"{self._abstract}-start"
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                return self._listen_at(name)
            try:
                other = self._connect_to(name)
            except OtherUserError:
                return None  # a squatter holds up nobody
            if other is not None:
                other.close()
            if time.monotonic() >= deadline:
                raise PlatformUnavailableError(
                    "another process is starting the platform and does not come to an end",
                    expected=f"a platform within {timeout:g} s",
                )
            time.sleep(0.01)

    def _listen_at(self, address: str) -> socket.socket:
        (listener,) = not_inherited(_new_socket)
        try:
            listener.bind(address)  # umask 077: mode 0700, and the directory is 0700
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener

    def forget(self) -> None:
        """Remove the socket; only the platform that made it, while it holds the lock."""
        if self._state.exists and self._state.writable:
            self._state.unlink(self.socket_name)
