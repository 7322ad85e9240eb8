"""
TypedDicts as msgspec takes them: it knows neither ``ReadOnly`` nor qualifiers inside ``Annotated``.

What is read-only is so for type checkers; what crosses is a copy, and its owner's.
"""

from __future__ import annotations

import sys
import types
import typing
from typing import Any

from pyenclave.calls.aliases import expand

__all__ = ["is_typeddict", "plain", "unqualified"]

_REQUIRED = {typing.Required: True, typing.NotRequired: False}


def _is_read_only(origin: Any) -> bool:
    places = (typing, sys.modules.get("typing_extensions"))  # which nothing here imports
    return any(origin is getattr(place, "ReadOnly", typing) for place in places)


def is_typeddict(cls: type) -> bool:
    """Whether *cls* is a TypedDict, of ``typing`` or of ``typing_extensions``."""
    return typing.is_typeddict(cls) or (
        issubclass(cls, dict) and hasattr(cls, "__total__") and hasattr(cls, "__required_keys__")
    )


def unqualified(hint: Any) -> tuple[Any, bool | None]:
    """
    Return the type of a TypedDict's item, and whether its qualifiers say that it must be there.

    Args:
        hint: What annotates the item.

    Returns:
        Of the second: None if they do not say.

    """
    required: bool | None = None
    notes: tuple[Any, ...] = ()
    inside = hint
    while True:
        origin = typing.get_origin(inside)
        if origin is typing.Annotated:
            notes = (*typing.get_args(inside)[1:], *notes)
        elif origin in _REQUIRED:
            required = _REQUIRED[origin]
        elif not _is_read_only(origin):
            return (typing.Annotated[(inside, *notes)] if notes else inside), required
        inside = typing.get_args(inside)[0]


def plain(annotation: Any, around: tuple[type, ...] = ()) -> Any:
    """
    Return *annotation* with TypedDicts that msgspec takes, wherever one is in it.

    What is a class of other fields stays as it is, and so does all of which nothing changes.

    Args:
        annotation: A type.
        around: TypedDicts in which it is: one that is inside itself stays as it is.

    """
    if isinstance(annotation, type) and not typing.get_args(annotation):
        if annotation in around or not is_typeddict(annotation):
            return annotation
        return _plain_class(annotation, (*around, annotation))
    if isinstance(annotation, typing.NewType):
        under = expand(annotation.__supertype__)
        inside = plain(under, around)
        return annotation if inside is under else inside
    origin = typing.get_origin(annotation)
    before = typing.get_args(annotation)
    if origin is None or origin is typing.Literal or not before:
        return annotation
    if origin is typing.Annotated:
        inside = plain(before[0], around)
        return annotation if inside is before[0] else typing.Annotated[(inside, *before[1:])]
    after = tuple(plain(part, around) for part in before)
    if all(new is old for new, old in zip(after, before, strict=True)):
        return annotation
    return typing.Union[after] if origin in (typing.Union, types.UnionType) else origin[after]  # noqa: UP007


def _plain_class(cls: type, around: tuple[type, ...]) -> Any:
    items: dict[str, Any] = {}
    changed = False
    always: frozenset[str] = getattr(cls, "__required_keys__", frozenset())
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inside, required = unqualified(expand(hint))
        kind = plain(inside, around)
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) in _REQUIRED else hint
        changed = changed or kind is not inside or inside != bare
        must = name in always if required is None else required
        items[name] = typing.Required[kind] if must else typing.NotRequired[kind]
    return typing.TypedDict(cls.__name__, items) if changed else cls  # type: ignore[operator]
