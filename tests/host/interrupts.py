"""Ctrl-C at each place where Python looks for signals, for tests of what it leaves behind."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any


class _Interrupter:
    """Raises KeyboardInterrupt where Python looks for signals, at the n-th such place."""

    def __init__(self, number: int, files: tuple[str, ...]) -> None:
        self.left = number
        self.files = files

    def __call__(self, frame, event, arg) -> None:
        # The interpreter looks after a call of C code and at the start of a function.
        code = frame.f_code
        # What a finalizer or a generator that is dropped raises nobody catches.
        if (
            event in ("call", "c_return")
            and code.co_filename.endswith(self.files)
            and code.co_name not in ("__del__", "<genexpr>")
        ):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


def interrupted(
    work: Callable[[], Any], files: Iterable[str], after: Callable[[], Any] = lambda: None
) -> int:
    """
    Interrupt *work* at each place in turn until there is none left; return how often.

    Args:
        work: What is interrupted.
        files: Ends of the paths of the sources in which it is.
        after: Called after each interrupt.

    """
    number = 0
    ends = ("/_locks.py", *(f"/{name}" for name in files))
    # Finalizers of what other tests left run in the same files, and what they raise nobody catches.
    gc.collect()
    gc.disable()
    try:
        while True:
            number += 1
            interrupter = _Interrupter(number, ends)
            try:
                sys.setprofile(interrupter)
                work()
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
            if interrupter.left > 0:
                return number
            after()
    finally:
        gc.enable()
        gc.collect()  # nor are other tests told of what was left here


def is_taken(lock: Any) -> bool:
    """Tell whether somebody has *lock*."""
    found = []

    def attempt() -> None:
        found.append(not lock.acquire(blocking=False))
        if not found[0]:
            lock.release()

    # Another thread, for a lock may be one that its owner can take again.
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


def in_another_thread(action: Callable[[], Any], seconds: float = 30) -> None:
    """Have a thread call *action*, and fail if that hangs or raises."""
    done: list[bool] = []

    def call() -> None:
        action()
        done.append(True)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, "it hangs" if thread.is_alive() else "it failed"
