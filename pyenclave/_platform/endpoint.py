"""
Where hosts and the platform meet: a socket in the state directory, else an abstract one.

There is one platform for each runtime (interpreter, package, folders of packages) of a user and
state directory, so that programs of two virtual environments do not share zygotes. The socket's
name carries the runtime's digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from typing import Final

import msgspec

import pyenclave
from pyenclave._platform.state import State
from pyenclave.errors import PlatformUnavailableError
from pyenclave.formats.lock import Roots
from pyenclave.formats.messages import FORMAT_VERSION

__all__ = ["Endpoint", "peer_uid", "runtime_name"]

_CREDENTIALS: Final = struct.Struct("iII")
_BACKLOG: Final = 64


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

    def connect(self) -> socket.socket | None:
        """
        Connect to the platform, if one listens.

        Returns:
            The socket, or None if nobody listens.

        Raises:
            PlatformUnavailableError: Who listens is another user.

        """
        if self._state.exists:
            sock = self._connect_to(self._path())
            if sock is not None:
                return sock
        if self._state.writable:
            return None
        try:
            return self._connect_to(self._abstract)
        except PlatformUnavailableError:
            return None  # another user took the name: work without it

    def _connect_to(self, address: str) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)  # a full backlog is an answer, not a reason to hang
            sock.connect(address)
            uid = peer_uid(sock)
        except OSError:
            sock.close()
            return None
        if uid != os.geteuid():
            sock.close()
            raise PlatformUnavailableError(
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
            return None
        with contextlib.suppress(OSError):
            return self._listen_at(self._abstract)
        return None

    def _listen_at(self, address: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
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
