"""
Names that stand for types: ``type Rows = list[Row]`` (PEP 695).

From NumPy 2.5 on ``numpy.typing.NDArray`` is one, where Python knows them (3.12).
"""

from __future__ import annotations

import types
import typing
from typing import Any

from pyenclave.errors import ArgumentError

__all__ = ["expand"]

_MODULES = ("typing", "typing_extensions")


def _is_alias(value: Any) -> bool:
    kind = type(value)
    return kind.__name__ == "TypeAliasType" and kind.__module__ in _MODULES


def expand(annotation: Any, where: str = "an annotation") -> Any:
    """
    Return *annotation* with each alias replaced by the type that it stands for.

    Args:
        annotation: A type; one that mentions no alias is returned itself.
        where: What is annotated, for the message.

    Raises:
        ArgumentError: An alias stands for a type that mentions it, or its arguments do not fit.

    """
    return _expand(annotation, where, ())


def _expand(annotation: Any, where: str, open_ones: tuple[Any, ...]) -> Any:
    if type(annotation) is type:
        return annotation
    if _is_alias(annotation):
        return _value(annotation, (), where, open_ones)
    origin = typing.get_origin(annotation)
    if origin is None or origin is typing.Literal:
        return annotation
    if _is_alias(origin):
        return _value(origin, typing.get_args(annotation), where, open_ones)
    if origin is typing.Annotated:
        inside = annotation.__origin__
        found = _expand(inside, where, open_ones)
        return (
            annotation if found is inside else typing.Annotated[(found, *annotation.__metadata__)]
        )
    before = typing.get_args(annotation)
    after = tuple(_expand(part, where, open_ones) for part in before)
    if all(new is old for new, old in zip(after, before, strict=True)):
        return annotation
    if origin in (typing.Union, types.UnionType):
        return typing.Union[after]  # noqa: UP007 - of a tuple
    if isinstance(annotation, types.GenericAlias):
        return types.GenericAlias(origin, after)
    return annotation.copy_with(after)


def _value(alias: Any, arguments: tuple[Any, ...], where: str, open_ones: tuple[Any, ...]) -> Any:
    """Return what *alias* stands for, with *arguments* in the place of its parameters."""
    if any(one is alias for one in open_ones):
        raise ArgumentError(
            f"{where}: the type {alias.__name__} is made of itself",
            advice="Use a dataclass or a msgspec.Struct that names itself in a field.",
        )
    try:
        value = alias.__value__
        if arguments and (names := getattr(value, "__parameters__", ())):
            given = dict(zip(alias.__type_params__, arguments, strict=True))
            value = value[tuple(given.get(name, name) for name in names)]
    except (NameError, TypeError, ValueError) as error:
        raise ArgumentError(f"{where}: the type {alias.__name__} cannot be read: {error}") from None
    return _expand(value, where, (*open_ones, alias))
