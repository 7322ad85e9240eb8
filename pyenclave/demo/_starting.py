"""
What the demo makes on its machine, so that all of it goes again: its folder and its processes.

Processes are started whole: no signal comes between one and the note of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["folder", "undisturbed"]

_PREFIX: Final = "pyenclave-demo-"
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE: Final = 100
_PAUSE: Final = 0.05  # seconds


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Give a temporary folder, for state directories too: a platform may write to its end."""
    _sweep()
    path, held = _make()
    try:
        yield path
    finally:
        os.close(held)
        for _ in range(_PATIENCE):  # the platform ends a second after its last host
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(_PAUSE)
        else:
            shutil.rmtree(path)  # and says why it cannot


def _make() -> tuple[Path, int]:
    """Return a new folder, and the descriptor that holds its lock. It has its name when locked."""
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    fd = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps it
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = made.with_name(made.name[1:])
        made.rename(path)
    except BaseException:
        os.close(fd)
        made.rmdir()
        raise
    return path, fd


def _sweep() -> None:
    """Remove what demos left that were killed: folders of this user whose lock nobody holds."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """
    Have signals wait until the end of the block; they are not blocked, which a child would inherit.

    ``subprocess.Popen`` that is interrupted has a child that nobody knows.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in _SIGNALS
        if callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), came[0])
