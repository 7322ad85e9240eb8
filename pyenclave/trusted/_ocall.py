"""Calling the host from inside: declared functions, whose answers are not to be trusted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar, overload

from pyenclave.errors import NotInEnclaveError
from pyenclave.trusted import _state
from pyenclave.trusted._lookup import signature_of

__all__ = ["call_host", "ocall"]

F = TypeVar("F", bound=Callable[..., Any])
_NONE = object()


def call_host(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """
    Call a function of the host that the image declares.

    What it answers was decoded by the declared types and is otherwise the host's word: check it as
    you would check input from the network. The arguments are the host's to read.

    Args:
        name: The name under ``[ocalls]``, or of a stub marked with ``pyenclave.ocall``.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        OcallError: The handler raised (``type`` names the class), or its answer does not fit.
        ArgumentError: An argument does not fit the declared types, or the message limit.
        UnknownFunctionError: The image declares no such function.
        EnclaveStateError: No trusted function runs in this thread.
        NotInEnclaveError: Outside an enclave.

    """
    link = _state.link()
    if link is None:
        raise NotInEnclaveError(
            "this works only inside an enclave",
            advice="Declare the function by a stub with @pyenclave.ocall to test without one.",
        )
    return link.call(name, args, kwargs)


@overload
def ocall(function: F, /) -> F: ...


@overload
def ocall(*, allow: Sequence[str] = ...) -> Callable[[F], F]: ...


def ocall(function: Any = _NONE, /, *, allow: Sequence[str] = ()) -> Any:
    """
    Declare *function* as one of the host that trusted code may call.

    Inside an enclave a call of it crosses to the handler that the host gave for its name. Outside,
    in unit tests for instance, its own body runs. Annotations are as for ecalls.

    Args:
        function: A plain function; its body is what unit tests get.
        allow: Names of the trusted functions that the host may call before it answers.

    Raises:
        TypeError: *function* is not a plain function, or *allow* not a list of names.

    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise TypeError("ocall: allow is a list of names of trusted functions")
    if function is _NONE:
        return lambda inner: _stub(inner, tuple(allow))
    return _stub(function, tuple(allow))


def _stub(function: Any, allow: tuple[str, ...]) -> Any:
    if not isinstance(function, FunctionType):
        raise TypeError(f"ocall marks functions, not {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"ocall: {function.__qualname__} must be a plain function")
    if "__pyenclave_ecall__" in function.__dict__:
        raise TypeError(f"ocall: {function.__qualname__} is a trusted function; make two of it")
    signature = signature_of(function)
    count = len(signature.parameters)
    plain = all(item.kind is not item.KEYWORD_ONLY for item in signature.parameters.values())

    @functools.wraps(function)
    def stub(*args: Any, **kwargs: Any) -> Any:
        link = _state.link()
        if link is None:
            return function(*args, **kwargs)
        if kwargs or len(args) != count or not plain:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = tuple(bound.arguments.values())
        return link.call_ordered(function.__qualname__, args)

    stub.__dict__["__pyenclave_ocall__"] = allow
    return stub
