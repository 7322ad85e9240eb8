"""The host's side of ocalls: handlers, checked against the image before anything is launched."""

from __future__ import annotations

import contextvars
import inspect
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pyenclave import _core
from pyenclave._locks import Lock
from pyenclave.calls.ocalls import Ocall
from pyenclave.errors import OcallError

__all__ = ["Handlers", "check", "check_handlers", "make_table", "submit"]

Handlers = Mapping[str, Callable[..., Any]]

_IDLE_SECONDS = 10.0


def check_handlers(handlers: Handlers | None, *, allow_async: bool = False) -> dict[str, Any]:
    """
    Return the handlers that a handle was given, whatever its image declares.

    Args:
        handlers: By name.
        allow_async: Whether coroutine functions are usable.

    Raises:
        TypeError: It is not a mapping of names to callables, or one is async where none can be.

    """
    if handlers is None:
        return {}
    if not isinstance(handlers, Mapping):
        raise TypeError(f"ocalls is a dict of handlers by name, not {type(handlers).__name__}")
    given: dict[Any, Any] = dict(handlers)
    for name, handler in given.items():
        if not isinstance(name, str) or not callable(handler):
            raise TypeError(f"ocalls is a dict of handlers by name: {name!r} is {handler!r}")
        if not allow_async and inspect.iscoroutinefunction(handler):
            raise TypeError(f"the handler of {name} is async: only an AsyncEnclave can await it")
    return given


def check(declared: tuple[Ocall, ...], handlers: Mapping[str, Any]) -> None:
    """
    Check that there is a handler for each declared ocall, and no other.

    Raises:
        OcallError: One is missing, or not declared.

    """
    names = [item.name for item in declared]
    missing = [str(item) for item in declared if item.name not in handlers]
    if missing:
        raise OcallError(
            "the enclave calls host functions that have no handler",
            expected="; ".join(missing),
            found=", ".join(sorted(handlers)) or "no handlers",
            advice='Give each: Enclave(image, ocalls={"name": function}).',
        )
    unknown = sorted(set(handlers) - set(names))
    if unknown:
        raise OcallError(
            f"the image declares no ocall {', '.join(unknown)}",
            expected=", ".join(names) or "none",
            advice="Declare it under [ocalls], or in the entry by a stub with @pyenclave.ocall.",
        )


def make_table(
    declared: tuple[Ocall, ...], handlers: Mapping[str, Any], limit: int
) -> _core.OcallTable:
    """
    Return what answers the ocalls of one image.

    Args:
        declared: The image's ocalls, in its order.
        handlers: One for each.
        limit: The image's message limit.

    """
    entries = tuple(
        (
            item.name,
            item.signature.request_plan,
            item.signature.reply_plan,
            handlers[item.name],
            tuple(one.name for one in item.signature.parameters if one.keyword),
        )
        for item in declared
    )
    return _core.OcallTable(entries, limit)


class _Threads:
    """Threads for handlers of calls that have a deadline: kept a while, and never waited for."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting = 0
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def submit(self, run: Callable[[], None]) -> None:
        context = contextvars.copy_context()

        def work() -> None:
            context.run(run)

        with self._lock:
            free = self._waiting > 0
            if free:
                self._waiting -= 1
        if free:
            self._work.put(work)
            return
        # With its work: if Ctrl-C comes as it starts, it does not wait for what never comes.
        name = "pyenclave-ocall"
        threading.Thread(target=self._serve, args=(work,), name=name, daemon=True).start()

    def _serve(self, work: Callable[[], None]) -> None:
        while True:
            work()
            del work
            with self._lock:
                self._waiting += 1
            while True:
                try:
                    work = self._work.get(timeout=_IDLE_SECONDS)
                    break
                except queue.Empty:
                    with self._lock:
                        if self._waiting > 0:
                            self._waiting -= 1
                            return
                # work is on its way to this thread, or to one like it


_threads = _Threads()


def submit(run: Callable[[], None]) -> None:
    """Have a thread of its own call *run*, in a copy of this thread's context."""
    _threads.submit(run)


def _after_fork() -> None:
    global _threads  # noqa: PLW0603 - a child has none of its parent's threads
    _threads = _Threads()


os.register_at_fork(after_in_child=_after_fork)
