"""
Where a debug worker's output goes: to a pipe that the platform reads (``pyenclave logs``).

Nothing of this runs in a production worker: its output was /dev/null before it was forked, and the
platform sends it no pipe.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from pyenclave._worker.dispatch import current_note
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import EnclaveStateError
from pyenclave.formats import messages

__all__ = ["keep_records", "redirect"]

_SECONDS = 5.0


def redirect(channel: Channel) -> None:
    """
    Receive the pipe and make it standard output and error.

    Raises:
        EnclaveStateError: The platform sent something else first.

    """
    message, fds = channel.receive(_SECONDS)
    try:
        if not isinstance(message, messages.Output) or len(fds) != 1:
            raise EnclaveStateError(
                "protocol with the platform is broken",
                expected="Output",
                found=type(message).__name__,
            )
        os.dup2(fds[0], 1)
        os.dup2(fds[0], 2)
    finally:
        close_all(fds)
    sys.stdout = _stream(1)
    sys.stderr = _stream(2)


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
