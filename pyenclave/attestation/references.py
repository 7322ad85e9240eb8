"""Reference values: what a relying party compares with, and from when until when it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, TypeAlias

__all__ = ["GivenReferences", "GivenRegisters", "Reference", "references", "registers"]

_MAX_REFERENCES: Final = 4096


@dataclass(frozen=True, slots=True)
class Reference:
    """
    One accepted value.

    Attributes:
        value: The digest or identifier.
        not_before: First moment at which it is accepted, with a zone; None: always.
        not_after: Last such moment; None: for ever.
    """

    value: bytes
    not_before: datetime | None = None
    not_after: datetime | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.value, bytes):
            raise TypeError(f"{type(self.value).__name__} is not bytes")
        for name in ("not_before", "not_after"):
            moment = getattr(self, name)
            if moment is None:
                continue
            if not isinstance(moment, datetime):
                raise TypeError(f"{name} is a datetime, not {type(moment).__name__}")
            if moment.tzinfo is None:
                raise ValueError(f"{name}: a time without a zone is ambiguous")
        if self.not_before and self.not_after and self.not_before > self.not_after:
            raise ValueError("not_before is after not_after")

    def holds_at(self, at: datetime) -> bool:
        """Whether the value is accepted at *at*."""
        early = self.not_before is not None and at < self.not_before
        late = self.not_after is not None and at > self.not_after
        return not early and not late

    @property
    def window(self) -> str:
        """From when until when, in words; empty if always."""
        parts = []
        if self.not_before is not None:
            parts.append(f"from {self.not_before.isoformat()}")
        if self.not_after is not None:
            parts.append(f"until {self.not_after.isoformat()}")
        return " ".join(parts)

    def __str__(self) -> str:
        return f"{self.value.hex()} {self.window}".rstrip()


_OneOrMore: TypeAlias = "bytes | Reference | Iterable[bytes | Reference]"
GivenReferences: TypeAlias = "_OneOrMore | None"
GivenRegisters: TypeAlias = "Mapping[int, _OneOrMore] | None"


def references(
    name: str, given: Any, sizes: tuple[int, ...], *, allow_zero: bool = False
) -> tuple[Reference, ...] | None:
    """
    Return *given* (one value or several) as references of one of *sizes* bytes.

    Raises:
        TypeError: Not bytes.
        ValueError: An empty list, a wrong size, or a zero where zero is nobody's identity.

    """
    if given is None:
        return None
    listed = (given,) if isinstance(given, bytes | Reference) else given
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        hint = ": bytes.fromhex(…) makes them" if isinstance(given, str) else ""
        raise TypeError(f"{name}: {type(given).__name__} is not bytes{hint}")
    found = []
    for item in listed:
        if not isinstance(item, bytes | Reference):
            raise TypeError(f"{name}: {type(item).__name__} is not bytes")
        reference = item if isinstance(item, Reference) else Reference(item)
        if len(reference.value) not in sizes:
            wanted = " or ".join(str(size) for size in sizes)
            raise ValueError(f"{name}: a value has {wanted} bytes, not {len(reference.value)}")
        if not allow_zero and not any(reference.value):
            raise ValueError(f"{name}: zero is nobody's identity")
        found.append(reference)
    if not found:
        raise ValueError(f"{name}: an empty list would accept nothing; leave it out instead")
    if len(found) > _MAX_REFERENCES:
        raise ValueError(f"{name}: more than {_MAX_REFERENCES} values")
    return tuple(found)


def registers(
    name: str,
    given: Any,
    sizes: tuple[int, ...],
    *,
    highest: int,
    never_zero: tuple[int, ...] = (),
) -> Mapping[int, tuple[Reference, ...]] | None:
    """
    Return *given* (register → one value or several) with references as values.

    Raises:
        TypeError: Not a mapping of ints to bytes.
        ValueError: Empty, no such register, or a wrong value.

    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} maps numbers to digests; {type(given).__name__} does not")
    found: dict[int, tuple[Reference, ...]] = {}
    for index, values in given.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name}: {index!r} is not the number of a register")
        if not 0 <= index <= highest:
            raise ValueError(f"{name}: register {index} is not between 0 and {highest}")
        listed = references(f"{name}[{index}]", values, sizes, allow_zero=index not in never_zero)
        if listed is None:
            raise TypeError(f"{name}[{index}]: None is not bytes")
        found[index] = listed
    if not found:
        raise ValueError(f"{name}: an empty table compares nothing; leave it out instead")
    return MappingProxyType(dict(sorted(found.items())))
