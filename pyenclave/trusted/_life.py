"""Marks of the functions that run when an enclave starts and when it is closed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, TypeVar, overload

from pyenclave.trusted._lookup import signature_of

__all__ = ["MAX_STOP_SECONDS", "hooks", "on_start", "on_stop", "stop_seconds"]

DEFAULT_STOP_SECONDS = 1.0
MAX_STOP_SECONDS = 5.0  # of all on_stop functions of an enclave together

START = "__pyenclave_on_start__"
STOP = "__pyenclave_on_stop__"
ECALL = "__pyenclave_ecall__"

F = TypeVar("F", bound=Callable[[], object])


def _mark(function: F, mark: str, value: object) -> F:
    name = mark.strip("_").removeprefix("pyenclave_")
    if not isinstance(function, FunctionType):
        raise TypeError(f"{name} marks functions, not {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{name}: {function.__qualname__} must be a plain function")
    if any(
        item.default is item.empty and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
        for item in signature_of(function).parameters.values()
    ):
        raise TypeError(f"{name}: {function.__qualname__} is called without arguments")
    if ECALL in function.__dict__:
        raise TypeError(f"{name}: {function.__qualname__} is a trusted function; make two of it")
    function.__dict__[mark] = value
    return function


def on_start(function: F) -> F:
    """
    Have *function* run inside before the first call is served, to load a model for instance.

    Identity and keys are there, so that everything of ``pyenclave.trusted`` works. Several run in
    the order in which the module defines them. What one raises refuses the launch: the host gets a
    LaunchError with the exception's type; its text crosses only if it is a ``PublicError``, or in
    debug. Outside an enclave *function* is an ordinary function that nobody calls.

    Raises:
        TypeError: *function* is not a plain function without arguments.

    """
    return _mark(function, START, True)


@overload
def on_stop(function: F, /) -> F: ...


@overload
def on_stop(*, seconds: float = ...) -> Callable[[F], F]: ...


def on_stop(function: Any = None, /, *, seconds: float = DEFAULT_STOP_SECONDS) -> Any:
    """
    Have *function* run inside when the host closes the enclave in order.

    It runs in a thread of its own while calls that are under way go on, and everything of
    ``pyenclave.trusted`` works but ocalls. The enclave is ended when all such functions have
    returned, in the reverse order of their definition, or when their time is over. An enclave that
    is killed, lost or poisoned, or whose host is gone, runs none. What one raises is ignored, and
    printed in debug.

    Args:
        function: The function.
        seconds: Its time. All of an enclave share the sum, at most 5.

    Raises:
        TypeError: *function* is not a plain function without arguments.
        ValueError: *seconds* is not between 0 and 5.

    """
    if not 0 < seconds <= MAX_STOP_SECONDS:
        raise ValueError(f"seconds must be above 0 and at most {MAX_STOP_SECONDS:g}: {seconds!r}")
    if function is None:
        return lambda inner: _mark(inner, STOP, float(seconds))
    return _mark(function, STOP, float(seconds))


def hooks(entry: object, mark: str) -> list[Callable[[], object]]:
    """Return the functions of a module that have *mark*, in the order of their definition."""
    if not isinstance(entry, ModuleType):
        return []  # native
    found: dict[int, Any] = {}
    for value in vars(entry).values():
        if isinstance(value, FunctionType) and mark in value.__dict__:
            found.setdefault(id(value), value)
    return list(found.values())


def stop_seconds(functions: list[Callable[[], object]]) -> float:
    """Return how long on_stop functions may take together; 0 if there are none."""
    total = sum(float(function.__dict__[STOP]) for function in functions)
    return min(total, MAX_STOP_SECONDS)
