"""What SIGTERM and SIGHUP do to a command: what Ctrl-C does, so that nothing of it is left."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Final, Self

__all__ = ["EndedError", "Ending"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


class EndedError(SystemExit):
    """The process was told to end. No prompt and no loop of events goes on after it."""


class Ending:
    """
    While it is entered, a signal that would have ended the process unwinds the command first.

    Temporary folders, files on their way to their place and child processes go as they do after
    any error; then the process ends by that signal (:meth:`end`), as its parent expects. A second
    one ends it at once. Handlers that are there already, and ignored signals (nohup), stay.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._mine: list[signal.Signals] = []
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._mine.append(number)
                    signal.signal(number, self._unwind)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number in self._mine:
            if signal.getsignal(number) == self._unwind:
                signal.signal(number, signal.SIG_DFL)

    def _unwind(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._give_back()
        if os.getpid() != self._pid:  # a forked child, whose parent cleans up
            os.kill(os.getpid(), number)
            return
        self.number = signal.Signals(number)
        raise EndedError(128 + number)

    def end(self) -> int:
        """End the process by its signal; returns an exit code where that has no effect (pid 1)."""
        if self.number is None:
            raise AssertionError("no signal came")
        os.kill(os.getpid(), self.number)
        return 128 + self.number
