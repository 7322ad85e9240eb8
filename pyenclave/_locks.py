"""
Locks of a host's process, which Ctrl-C at a bad moment does not leave taken.

A host's main thread may have KeyboardInterrupt raised wherever the interpreter looks for signals.
CPython 3.14 calls ``__enter__`` as it calls anything else, and looks before the block of a `with`
begins: if Ctrl-C raises there, nobody gives the lock back (CPython's issue 148874; 3.15.2 does not
look). Older ones enter a `with` in one step. `threading.Condition` has Python functions around its
lock, in which every version looks.

Finalizers run wherever their thread allocates, and handlers of signals where the interpreter looks:
also where that very thread has the lock that they want. What must end there is left to `Ends`.

These are taken by `with`. Where a lock may only be tried, ``(got,) = map(lock.acquire, (False,))``
in a ``try`` does it: between unpacking, which takes the lock, and the name nobody looks.
"""

from __future__ import annotations

import sys
import threading
from _thread import RLock as _RLock
from collections.abc import Callable

__all__ = ["Condition", "Ends", "Lock", "RLock"]


class _SureRLock(_RLock):  # type: ignore[misc] # final in typeshed alone
    """
    A lock whose `with` is left again whenever it was entered.

    The interpreter does not look for signals after the function below: it is Python's, and in it
    unpacking takes the lock, which is no call to the interpreter either. What gives the lock back
    is C code.
    """

    __slots__ = ()

    def __enter__(self) -> bool:  # type: ignore[override] # there it is acquire
        (taken,) = map(_RLock.acquire, (self,))
        return taken


class _SureLock(_SureRLock):  # type: ignore[misc]
    """
    The same, once only: who has it and wants it again is told so.

    With `threading.Lock` that is to wait for ever; no class can be made of it.
    """

    __slots__ = ()

    def __enter__(self) -> bool:  # type: ignore[override]
        if self._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("this thread has the lock already")
        (taken,) = map(_RLock.acquire, (self,))
        return taken

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock."""
        if self._is_owned():  # type: ignore[attr-defined]
            if not blocking:
                return False
            raise RuntimeError("this thread has the lock already")
        (taken,) = map(_RLock.acquire, (self,), (blocking,), (timeout,))
        return taken


if sys.version_info >= (3, 14):
    Lock = _SureLock
    RLock = _SureRLock
else:  # as sure, and faster
    from _thread import RLock
    from threading import Lock


class Ends:
    """
    A lock, and what is to end although its own thread has the lock: that waits until it lets go.

    Used by ``with ends, ends.lock:``. If Ctrl-C comes while the lock is let go, what is to end
    waits for the next who uses it. What an end raises is no concern of who had the lock: it is told
    as a finalizer's. Only what is to end a thread, as Ctrl-C, is raised, after the others ended.

    Attributes:
        lock: Who has it and wants it again is told so.

    """

    __slots__ = ("_busy", "_left", "lock")

    def __init__(self) -> None:
        self.lock = _SureLock()
        self._left: list[Callable[[], object]] = []
        self._busy: set[int] = set()  # threads that do what was left

    def taken_here(self) -> bool:
        """Whether this thread has the lock."""
        taken: bool = self.lock._is_owned()  # type: ignore[attr-defined]  # noqa: SLF001
        return taken

    def end(self, work: Callable[[], object]) -> None:
        """Do *work* now, or if this thread has the lock, when it was let go."""
        if self.taken_here():
            self._left.append(work)
        else:
            work()

    def forget(self) -> None:
        """Do nothing of what was left: in a forked child it is not the child's."""
        self._left.clear()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if not self._left or self.taken_here():
            return
        me = threading.get_ident()
        if me in self._busy:
            return  # below this is who does it, one after the other
        try:
            self._busy.add(me)
            self._do()
        finally:
            self._busy.discard(me)

    def _do(self) -> None:
        stopped: BaseException | None = None
        while self._left:
            try:
                work = self._left.pop(0)
            except IndexError:  # another thread was faster
                break
            try:
                work()
            except Exception:  # whatever it is, the others end too
                sys.excepthook(*sys.exc_info())  # as weakref.finalize does
            except BaseException as error:  # as above; raised below
                stopped = stopped or error
        if stopped is not None:
            raise stopped


class Condition(RLock):  # type: ignore[misc] # final in typeshed alone
    """A condition with a lock of its own, which is this object: no function of it is Python's."""

    def __init__(self) -> None:
        self._condition = threading.Condition(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until told, without the lock meanwhile; it is had again whatever is raised."""
        if not self._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("to wait asks for the lock")
        try:
            return self._condition.wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined] # interrupted after it was left
                self.acquire()
            raise

    def notify(self, n: int = 1) -> None:
        """Wake *n* that wait."""
        self._condition.notify(n)
