"""What SIGTERM does for pools: drain and close each, then what was done before."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from types import FrameType
from typing import Protocol

from pyenclave.errors import EnclaveStateError

__all__ = ["Term"]


class _Pool(Protocol):
    _pid: int

    @property
    def _over(self) -> bool:
        """Whether it is closed: nobody would do what is asked for."""

    def _told_to_end(self) -> None:
        """Called in a signal handler: take no new calls, and have ``Term.done`` called later."""


# Those at work: the process ends when the last of them is done.
_at_work: set[Term] = set()
os.register_at_fork(after_in_child=_at_work.clear)


class Term:
    """
    What SIGTERM does for one pool.

    Args:
        pool: The pool.

    Raises:
        EnclaveStateError: The caller is not the main thread.

    """

    def __init__(self, pool: _Pool) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise EnclaveStateError(
                "handlers of signals are set in the main thread",
                advice="Call it where the program starts, or close() from a handler of yours.",
            )
        self._pool = weakref.ref(pool)
        self._pid = os.getpid()
        self.begun = False
        self._mine = self._handle  # one object, so that it can be recognised
        self._before = signal.signal(signal.SIGTERM, self._mine)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Python runs this between two steps of the main thread, which may hold any lock: so it
        # takes none, and somebody who was there before does the work.
        pool = self._pool()
        first = not self.begun and pool is not None and os.getpid() == self._pid
        if first and pool is not None and not pool._over:  # noqa: SLF001 - it is asked to have it
            self.begun = True
            _at_work.add(self)
            pool._told_to_end()  # noqa: SLF001
        elif self._before is signal.SIG_DFL:
            if _at_work and not self.begun:
                return  # another pool drains, and ends the process afterwards
            # Told twice; or in a forked child, or for a pool that is closed: nobody drains.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if callable(self._before):
            self._before(number, frame)

    def done(self) -> None:
        """The pool is closed: end the process, if that is what the signal did before."""
        _at_work.discard(self)
        if not _at_work and self._ends():  # of two that are done at once both may say so
            os.kill(os.getpid(), signal.SIGTERM)  # comes to the handler again, and ends us

    def _ends(self) -> bool:
        """Whether the signal would have ended the process without any pool."""
        before = self._before
        while isinstance(owner := getattr(before, "__self__", None), Term):
            before = owner._before  # noqa: SLF001 - of this class
        return before is signal.SIG_DFL

    def forget(self) -> None:
        """Give the signal back, where that is still possible."""
        if (
            not self.begun
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is self._mine
        ):
            signal.signal(signal.SIGTERM, self._before)
