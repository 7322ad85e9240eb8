"""The port that a development service keeps: a file of its state directory remembers it."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from pyenclave.cli import output
from pyenclave.errors import PlatformUnavailableError

__all__ = ["kept"]

_TAKEN: Final = frozenset({errno.EADDRINUSE, errno.EACCES})


def kept(host: str, state_dir: str | os.PathLike[str], name: str) -> socket.socket:
    """
    Return a socket that listens where this service of the state directory listened before.

    The first time it is a free port. If somebody else has the one of before, it is another free one
    and a line on stderr says so; the file stays, so that the next start tries again.

    Args:
        host: Address of this machine.
        state_dir: State directory.
        name: Of the service.

    Raises:
        OSError: The address is not of this machine, or the file cannot be made.
        PlatformUnavailableError: Others may read the file, or it is no plain one.

    """
    from pyenclave.services.web.run import bound
    from pyenclave.services.web.tls import private_file

    folder = os.path.join(state_dir, "dev")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, f"{name}.port")
    if not os.path.lexists(path):
        sock = bound(host)
        mine = sock.getsockname()[1]
        if _port_of(private_file(path, str(mine).encode())) == mine:
            return sock
        sock.close()  # another was faster, and the port is his
    port = _port_of(private_file(path, b""))
    if port is None:
        raise PlatformUnavailableError(
            f"{path} has no port", expected="1024 to 65535", advice="Remove the file."
        )
    try:
        return bound(host, port)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
    sock = bound(host)
    output.tell(
        f"{name}: port {port}, where it was before, is in use; it is now {sock.getsockname()[1]}"
    )
    return sock


def _port_of(data: bytes) -> int | None:
    text = data.strip()
    if not text.isdigit() or len(text) > 5:
        return None
    return int(text) if 1024 <= int(text) < 65536 else None
