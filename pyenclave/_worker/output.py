"""
Where a debug worker's output goes: to a pipe that the platform reads (``pyenclave logs``).

With the pipe comes a socket on which a debugger is asked for (``pyenclave debug``). Nothing of this
runs in a production worker: its output was /dev/null before it was forked, and the platform sends
it neither.
"""

from __future__ import annotations

import io
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

from pyenclave._worker.dispatch import current_note
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import EnclaveStateError
from pyenclave.formats import messages

__all__ = ["Side", "keep_records", "redirect", "side"]

_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """
    Where a debug worker asks for a debugger.

    Attributes:
        sock: Packets as in ``_platform/debugging.py``.
        wait: Seconds that the first breakpoint waits for one.

    """

    sock: socket.socket
    wait: float


_side: Side | None = None


def side() -> Side | None:
    """Return where a debugger is asked for; None: this is no debug worker."""
    return _side


def redirect(channel: Channel) -> None:
    """
    Receive the pipe and make it standard output and error; receive where debuggers are asked for.

    Raises:
        EnclaveStateError: The platform sent something else first.

    """
    global _side  # noqa: PLW0603 - one process, one of them
    message, fds = channel.receive(_SECONDS)
    try:
        if not isinstance(message, messages.Output) or len(fds) != 2:
            raise EnclaveStateError(
                "protocol with the platform is broken",
                expected="Output",
                found=type(message).__name__,
            )
        os.dup2(fds[0], 1)
        os.dup2(fds[0], 2)
        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
        sock = socket.socket(socket.AF_UNIX, kind, 0, fileno=fds.pop())
        _side = Side(sock=sock, wait=message.wait)
        sys.breakpointhook = _halt
    finally:
        close_all(fds)
    sys.stdout = _stream(1)
    sys.stderr = _stream(2)


def _halt(*_: object, **options: object) -> None:
    """Stop in a debugger where ``breakpoint()`` stands."""
    try:
        # Only images that allow debug have it on their lock lists, and pdb with it.
        from pyenclave._worker import debugger
    except ModuleNotFoundError:
        raise EnclaveStateError(
            "breakpoint(): there is no debugger on this image's lock list",
            advice="Set debug = true in [enclave] of its manifest, and build it again.",
        ) from None
    debugger.halt(sys._getframe(1), header=options.get("header"))  # noqa: SLF001 - as pdb does


def _stream(fd: int) -> io.TextIOWrapper:
    # Line by line: the process ends without warning, and what was printed must be out.
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def keep_records() -> None:
    """Have every ``logging`` record printed, if the entry uses logging and set up nothing."""
    logging: Any = sys.modules.get("logging")
    if logging is None or logging.root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(note)s%(message)s"))

    def add_note(record: Any) -> bool:
        note = current_note()
        record.note = f"[{note}] " if note else ""
        return True

    handler.addFilter(add_note)
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
