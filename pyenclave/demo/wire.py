"""How the demo's processes talk: frames of a JSON header and a binary body over a stream socket."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from pyenclave.errors import EnclaveLostError, EnclaveStateError, by_code

__all__ = ["Peer"]

_PREFIX = struct.Struct("<II")
_MAX_HEADER = 1 << 20
_MAX_BODY = 1 << 30


class Peer:
    """
    One end of a conversation.

    Args:
        sock: A connected stream socket; the peer owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send one frame."""
        head = json.dumps(header).encode()
        self._sock.sendall(_PREFIX.pack(len(head), len(body)) + head)
        if body:
            self._sock.sendall(body)

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._sock.recv_into(view[got:])
            if count == 0:
                raise EnclaveLostError("the other process of the demo ended")
            got += count
        return bytes(data)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Receive one frame."""
        head_size, body_size = _PREFIX.unpack(self._exactly(_PREFIX.size))
        if head_size > _MAX_HEADER or body_size > _MAX_BODY:
            raise EnclaveStateError("frame of the demo is too long", found=(head_size, body_size))
        header = json.loads(self._exactly(head_size))
        return header, self._exactly(body_size)

    def ask(self, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send a request and return its answer; an error that came back is raised as its class."""
        self.send(header, body)
        answer, data = self.receive()
        if "error" in answer:
            error = by_code().get(answer["error"]["code"], EnclaveStateError)
            raise error(answer["error"]["message"])
        return answer, data

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
