"""
What a launch takes and what can be made before anybody asks: a thread, and a draft.

An enclave needs a thread that serves it, and a record under its own number, signed. Both take some
tenths of a millisecond, which a host would wait for. So in quiet moments a few are made ahead, as
the last launch needed them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from pyenclave._platform.service import Attendant
from pyenclave.errors import EnclaveError

__all__ = ["MOST", "Ahead"]

#: How many of each are kept; as many as there may be spares.
MOST: Final = 4
# So long after a launch nothing is made, in seconds: it, and the calls after it, come first.
_QUIET: Final = 0.02


_Draft = TypeVar("_Draft")


class Ahead(Generic[_Draft]):
    """Threads and drafts for launches to come. Any thread may use it; none is given out twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attendants: deque[Attendant] = deque()
        self._drafts: deque[_Draft] = deque()
        self._kind: object = None
        self._make: Callable[[], _Draft] | None = None
        self._not_before = 0.0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def attendant(self) -> Attendant:
        """
        Return a thread for a worker, the caller's.

        Raises:
            LaunchError: The system gives no more threads.

        """
        with self._lock:
            if self._attendants:
                return self._attendants.popleft()
        return Attendant()

    def draft(self, kind: object, make: Callable[[], _Draft]) -> _Draft:
        """
        Return a draft that nobody else gets.

        Args:
            kind: Drafts made for another kind (not equal to this) are dropped.
            make: Makes one; used now if there is none, and later for those to come.

        """
        with self._lock:
            if kind != self._kind:
                self._drafts.clear()
            self._kind, self._make = kind, make
            self._not_before = time.monotonic() + _QUIET
            found = self._drafts.popleft() if self._drafts else None
        return make() if found is None else found

    def refill(self) -> None:
        """Have what was taken replaced; to be called once the host has its answer."""
        with self._lock:
            if self._closed:
                return
            if self._thread is None:
                thread = threading.Thread(target=self._keep, name="ahead", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread to be had: then the next launch says so
                    return
                self._thread = thread
        self._wake.set()

    def _keep(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while (wait := self._patience()) is not None:
                if wait > 0:
                    time.sleep(wait)
                elif not self._make_one():
                    break
            if self._closed:
                return

    def _patience(self) -> float | None:
        """How long to make nothing, in seconds; None: there is nothing to make."""
        with self._lock:
            if self._closed or min(len(self._attendants), len(self._drafts)) >= MOST:
                return None
            return max(0.0, self._not_before - time.monotonic())

    def _make_one(self) -> bool:
        """Make what there is less of; whether that worked."""
        with self._lock:
            kind, make = self._kind, self._make
            threads = len(self._attendants) <= len(self._drafts)
        try:
            if threads:
                self._keep_attendant(Attendant())
            elif make is not None:
                draft = make()
                with self._lock:
                    if kind == self._kind and not self._closed:
                        self._drafts.append(draft)
        except EnclaveError:
            return False  # whoever launches next hears of it
        return threads or make is not None

    def _keep_attendant(self, attendant: Attendant) -> None:
        with self._lock:
            if not self._closed:
                self._attendants.append(attendant)
                return
        attendant.dismiss()

    def close(self) -> None:
        """End the threads that wait. May be called twice."""
        with self._lock:
            self._closed = True
            attendants, self._attendants = self._attendants, deque()
            self._drafts.clear()
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join()
        for attendant in attendants:
            attendant.dismiss()
