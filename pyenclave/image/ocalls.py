"""
Ocalls of an image: those of ``[ocalls]``, whose types are text, and those of the entry's stubs.

The text is parsed, never run: only names of known types mean anything.
"""

from __future__ import annotations

import ast
import collections.abc
import datetime as dt
import decimal
import keyword
import types
import typing
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from pyenclave.errors import ArgumentError, ManifestError
from pyenclave.image.manifest import OcallEntry

__all__ = ["merge", "parse"]

_MAX_TEXT = 4096
_MAX_DEPTH = 32
_ADVICE = (
    "Types of docs/types.md, by their names. A dataclass or a Struct is declared in the entry, by "
    "a stub with @pyenclave.ocall."
)
_PLAIN: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "bytes": bytes,
    "bytearray": bytearray,
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "Any": Any,
    "typing.Any": Any,
    "Sequence": collections.abc.Sequence,
    "Collection": collections.abc.Collection,
    "Mapping": collections.abc.Mapping,
    "MutableMapping": collections.abc.MutableMapping,
    "datetime": dt.datetime,
    "date": dt.date,
    "time": dt.time,
    "timedelta": dt.timedelta,
    "datetime.datetime": dt.datetime,
    "datetime.date": dt.date,
    "datetime.time": dt.time,
    "datetime.timedelta": dt.timedelta,
    "Decimal": decimal.Decimal,
    "decimal.Decimal": decimal.Decimal,
    "UUID": uuid.UUID,
    "uuid.UUID": uuid.UUID,
}
_ONE = ("list", "set", "frozenset", "Sequence", "Collection")
_TWO = ("dict", "Mapping", "MutableMapping")
_ARRAYS = ("ndarray", "numpy.ndarray", "np.ndarray")
_TYPED_ARRAYS = ("NDArray", "npt.NDArray", "numpy.typing.NDArray")
_ELEMENTS = (
    "bool_", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip


class _Refused(Exception):  # noqa: N818 - never leaves this file
    """What is wrong with a text."""


def parse(name: str, text: str) -> dict[str, Any]:
    """
    Read the signature of an ocall.

    Args:
        name: Its name.
        text: Such as ``(key: str, limit: int) -> bytes``.

    Returns:
        Its form in an image, without what it allows.

    Raises:
        ManifestError: The text is not a signature, or names a type that does not cross.

    """
    from pyenclave.calls.signature import Parameter, Signature
    from pyenclave.calls.types import to_wire

    try:
        arguments, returns = _split(name, text)
        parameters = []
        groups = ((arguments.posonlyargs, False), (arguments.args, False))
        for group, by_keyword in (*groups, (arguments.kwonlyargs, True)):
            for item in group:
                if item.annotation is None:
                    raise _Refused(f"{item.arg} has no type")
                annotation = _type(item.annotation, 0)
                parameters.append(
                    Parameter(
                        name=item.arg,
                        wire=to_wire(annotation, f"{name}({item.arg})"),
                        annotation=annotation,
                        keyword=by_keyword,
                    )
                )
        names = [item.name for item in parameters]
        if len(set(names)) != len(names):
            raise _Refused("two parameters have one name")
        annotation = _type(returns, 0)
        signature = Signature(
            name=name,
            kind="ocall",
            parameters=tuple(parameters),
            returns=to_wire(annotation, f"what {name} returns"),
            returns_annotation=annotation,
        )
        wire = signature.to_wire()
        # What the image says is what is built here: read it as a worker will.
        Signature.from_wire(wire)
    except (_Refused, ArgumentError, RecursionError) as error:
        raise ManifestError(
            f"[ocalls] {name}: {error}",
            expected="a signature such as (key: str) -> bytes",
            found=text[:200],
            advice=_ADVICE,
        ) from None
    del wire["kind"]
    return wire


def _split(name: str, text: str) -> tuple[ast.arguments, ast.expr]:
    """Parse a signature as that of a function without a body; nothing is compiled or run."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise _Refused("not a name that a function can have")
    if len(text) > _MAX_TEXT or not text.isprintable():
        raise _Refused(f"not a printable text of at most {_MAX_TEXT} characters")
    try:
        tree = ast.parse(f"def {name}{text}: ...")
    except (SyntaxError, ValueError, MemoryError):
        raise _Refused("not the signature of a function") from None
    function = tree.body[0] if len(tree.body) == 1 else None
    whole = (
        isinstance(function, ast.FunctionDef)
        and len(function.body) == 1
        and isinstance(function.body[0], ast.Expr)
        and isinstance(function.body[0].value, ast.Constant)
        and function.body[0].value.value is Ellipsis
        and not getattr(function, "type_params", None)
        and text.lstrip().startswith("(")
    )
    if not whole or not isinstance(function, ast.FunctionDef):
        raise _Refused("not the signature of a function")
    arguments = function.args
    if arguments.vararg or arguments.kwarg:
        raise _Refused("* and ** parameters do not cross")
    if arguments.defaults or any(item is not None for item in arguments.kw_defaults):
        raise _Refused("a default is the handler's own")
    if function.returns is None:
        raise _Refused("it does not say what it returns")
    return arguments, function.returns


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute) and len(parts) < 4:
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise _Refused("a type is a name, or one with [...]")
    return ".".join([node.id, *reversed(parts)])


def _type(node: ast.expr, depth: int) -> Any:
    """Return the type that *node* names."""
    if depth > _MAX_DEPTH:
        raise _Refused("its types nest too deep")
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[_type(node.left, depth + 1), _type(node.right, depth + 1)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        name = _dotted(node.value).removeprefix("typing.").removeprefix("collections.abc.")
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _generic(name, inner, depth + 1)
    name = _dotted(node).removeprefix("collections.abc.")
    if name in _ARRAYS or name in _TYPED_ARRAYS:
        import numpy as np

        return np.ndarray
    if name not in _PLAIN:
        raise _Refused(f"{name} is not a type that it may name")
    return _PLAIN[name]


def _generic(name: str, inner: list[ast.expr], depth: int) -> Any:
    """Return the type *name* of *inner*."""
    if name == "Literal":
        return typing.Literal[tuple(_literal(item) for item in inner)]
    if name in _TYPED_ARRAYS:
        import numpy as np

        element = _dotted(inner[0]).rpartition(".")[2] if len(inner) == 1 else ""
        if element not in _ELEMENTS:
            raise _Refused(f"elements of an array: one of {', '.join(_ELEMENTS)}")
        kind = types.GenericAlias(np.dtype, (getattr(np, element),))
        return types.GenericAlias(np.ndarray, (Any, kind))
    if name == "tuple":
        if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is Ellipsis:
            return tuple.__class_getitem__((_type(inner[0], depth), ...))
        return tuple.__class_getitem__(tuple(_type(item, depth) for item in inner))
    parts = tuple(_type(item, depth) for item in inner)
    makers: dict[str, tuple[int | None, Callable[..., Any]]] = {
        "Optional": (1, lambda one: typing.Union[one[0], None]),  # noqa: UP007
        "Union": (None, lambda all_: typing.Union[all_]),  # noqa: UP007
        **dict.fromkeys(_ONE, (1, lambda one: _PLAIN[name][one[0]])),
        **dict.fromkeys(_TWO, (2, lambda two: _PLAIN[name][two])),
    }
    count, make = makers.get(name, (-1, tuple))
    if count is not None and count != len(parts):
        raise _Refused(f"{name}[...] is not a type that it may name")
    return make(parts)


def _literal(node: ast.expr) -> str | int | None:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    value = node.value if isinstance(node, ast.Constant) else ...
    if sign == -1 and type(value) is int:
        return -value
    if sign == -1 or not (value is None or isinstance(value, str | int)):
        raise _Refused("a literal is a str, an int, a bool or None")
    return value


def merge(
    declared: Mapping[str, OcallEntry],
    stubs: tuple[dict[str, Any], ...],
    functions: tuple[dict[str, Any], ...],
) -> tuple[dict[str, Any], ...]:
    """
    Return the ocalls of an image, sorted by name.

    Args:
        declared: Those of the manifest.
        stubs: Those of the entry.
        functions: The trusted functions of the image.

    Raises:
        ManifestError: One cannot be read, is declared twice in different ways, or allows a function
            that there is not.

    """
    found = {item["name"]: item for item in stubs}
    for name, entry in declared.items():
        wire = {**parse(name, entry.signature), "allow": list(entry.allow)}
        known = found.setdefault(name, wire)
        if _plain(known) != _plain(wire):
            raise ManifestError(
                f"[ocalls] {name}: the entry's stub declares it in another way",
                expected=str(known),
                found=str(wire),
                advice="Declare it once.",
            )
    callable_names = {item["name"] for item in functions}
    for name, item in found.items():
        for allowed in item["allow"]:
            if allowed not in callable_names:
                raise ManifestError(
                    f"ocall {name} allows {allowed}, which is no trusted function",
                    expected=", ".join(sorted(callable_names)) or "none",
                )
    allowed_names = {allowed for item in found.values() for allowed in item["allow"]}
    for item in functions:
        if item.get("private") and item["name"] not in allowed_names:
            raise ManifestError(
                f"{item['name']} is private, and no ocall allows it: nobody could call it",
                advice="Name it under `allow` of an ocall, or leave it out.",
            )
    return tuple(found[name] for name in sorted(found))


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what went through JSON compares equal."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
