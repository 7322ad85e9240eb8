"""What an entry runs when its enclave starts and when it is closed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable

from pyenclave.calls.errors import cut
from pyenclave.errors import LaunchError
from pyenclave.trusted import _life, _runtime

__all__ = ["Life"]

_MAX_TYPE = 128  # bytes of the name of an exception's class


class Life:
    """
    The start and stop functions of one entry.

    Args:
        entry: The imported module, or a native library, which has none.
        debug: Whether texts of exceptions cross, and tracebacks are printed.

    """

    def __init__(self, entry: object, *, debug: bool) -> None:
        self._start = _life.hooks(entry, _life.START)
        self._stop = _life.hooks(entry, _life.STOP)
        self._debug = debug

    @property
    def starting(self) -> bool:
        """Whether there is something to run before the first call."""
        return bool(self._start)

    @property
    def grace(self) -> float:
        """Seconds that the stop functions may take; 0 if there are none."""
        return _life.stop_seconds(self._stop)

    def begin(self) -> None:
        """
        Run the start functions, and wait in a thread for the platform's word to stop.

        Raises:
            LaunchError: A start function raised; ``type`` names the exception's class.

        """
        for function in self._start:
            try:
                function()
            except Exception as error:
                raise self._refusal(function, error) from error
        if self._stop:
            threading.Thread(target=self._await_stop, name="on_stop", daemon=True).start()

    def _refusal(self, function: Callable[[], object], error: Exception) -> LaunchError:
        kind = type(error)
        text = f"{function.__qualname__} (on_start) raised {kind.__name__}"
        # The same rule as for calls: only what is declared public leaves the enclave.
        if self._debug or getattr(kind, "public", False) is True:
            with contextlib.suppress(Exception):
                text = f"{text}: {error}"
        return LaunchError(cut(text), type=cut(kind.__name__, _MAX_TYPE))

    def _await_stop(self) -> None:
        if not _runtime.current().wait_for_stop():
            return  # the platform is gone; the lanes see that as well, and end the process
        for function in reversed(self._stop):
            try:
                function()
            except Exception as error:
                if self._debug:
                    print(f"{function.__qualname__} (on_stop) raised:", file=sys.stderr)  # noqa: T201
                    traceback.print_exception(error)
        with contextlib.suppress(Exception):
            _runtime.stop()
        os._exit(0)
