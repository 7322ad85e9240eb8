"""
Reading and writing fixed binary layouts, strictly.

What is read here may come from an attacker: every length is checked before it is used, reserved
bytes must be zero, constants must be the ones of the specification, and each error names the
structure, the field, what was expected and what was found. All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import fields
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from typing_extensions import Buffer

    from pyenclave.errors import EnclaveError

__all__ = ["Layout", "Reader", "maker", "shorten"]

T = TypeVar("T")

_INTEGERS = {"B": 1, "H": 2, "I": 4, "Q": 8}


def shorten(value: bytes) -> str:
    """Return *value* in hex, for a message: at most sixteen bytes of it."""
    return value.hex() if len(value) <= 16 else f"{value[:16].hex()}… ({len(value)} bytes)"


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what takes the values at *indices* out of a sequence, as a tuple."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple([values[index] for index in indices])


def maker(cls: type[T], *names: str) -> Callable[[Iterable[Any]], T]:
    """
    Return what makes a *cls* of the values of all its fields, given in the order of *names*.

    A frozen dataclass sets each field by a call of ``object.__setattr__``, which is most of the
    time that reading one takes; this sets its slots.

    Args:
        cls: A frozen dataclass with slots whose making does nothing but set fields.
        names: Every field, once.
    """
    if sorted(names) != sorted(item.name for item in fields(cls)) or hasattr(cls, "__post_init__"):  # type: ignore[arg-type]
        raise TypeError(f"these are not all fields of {cls.__name__}, or not only fields")
    setters = [getattr(cls, name).__set__ for name in names]
    new = cls.__new__

    def make(values: Iterable[Any]) -> T:
        made = new(cls)
        for put, value in zip(setters, values, strict=True):
            put(made, value)
        return made

    return make


class Layout:
    """
    A structure of fixed size.

    Args:
        what: Name of the structure, for errors.
        error: Class of the errors that reading raises.
        parts: In the order of the bytes. ``("name", "H")`` is an integer of the ``struct`` code
            B, H, I or Q; ``("name", 16)`` is that many bytes; ``("name", b"...")`` is a constant
            and ``(None, 12)`` is reserved: both are checked and not returned.
    """

    def __init__(
        self,
        what: str,
        error: type[EnclaveError],
        *parts: tuple[str | None, str | int | bytes],
    ) -> None:
        codes = "<"
        offset = 0
        self.what = what
        self.error = error
        self._names: list[tuple[int, str, int, int]] = []  # index, name, offset, size or 0
        self._fixed: list[tuple[int, str, int, bytes]] = []  # index, name, offset, value
        for index, (name, kind) in enumerate(parts):
            if isinstance(kind, str):
                if name is None:
                    raise TypeError("an integer field needs a name")
                codes += kind
                self._names.append((index, name, offset, 0))
                offset += _INTEGERS[kind]
                continue
            size = kind if isinstance(kind, int) else len(kind)
            codes += f"{size}s"
            if isinstance(kind, bytes):
                self._fixed.append((index, name or "constant", offset, kind))
            elif name is None:
                self._fixed.append((index, "reserved", offset, bytes(size)))
            else:
                self._names.append((index, name, offset, size))
            offset += size
        self._struct = struct.Struct(codes)
        self._count = len(parts)
        self.names = tuple([name for _, name, _, _ in self._names])
        self._picked = _picker([index for index, _, _, _ in self._names])
        self._checked = _picker([index for index, _, _, _ in self._fixed])
        self._wanted = tuple([wanted for _, _, _, wanted in self._fixed])
        self.size = offset

    def unpack(self, data: Buffer) -> dict[str, Any]:
        """
        Read the structure from exactly its size of bytes.

        Returns:
            The named fields: ``int`` or ``bytes``.

        Raises:
            EnclaveError: Of the class given, if the size, a constant or a reserved byte is wrong.
        """
        return dict(zip(self.names, self.values(data), strict=True))

    def values(self, data: Buffer) -> tuple[Any, ...]:
        """Read the same, and return the named fields without their names."""
        size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        if size != self.size:
            raise self.error(
                f"{self.what}: the size is wrong",
                expected=f"{self.size} bytes",
                found=f"{size} bytes",
            )
        values = self._struct.unpack(data)
        if self._checked(values) != self._wanted:
            raise self._fault(values)
        return self._picked(values)

    def _fault(self, values: Sequence[Any]) -> EnclaveError:
        """Return the error for the first constant or reserved byte that is wrong."""
        index, name, offset, wanted = next(
            item for item in self._fixed if values[item[0]] != item[3]
        )
        return self.error(
            f"{self.what}: {name} at offset {offset} is wrong",
            expected="zero" if not any(wanted) else wanted.hex(),
            found=shorten(values[index]),
        )

    def pack(self, fields: Mapping[str, int | bytes]) -> bytes:
        """
        Write the structure.

        Raises:
            ValueError: If a field does not fit its place.
        """
        values: list[int | bytes] = [b""] * self._count
        for index, _, _, wanted in self._fixed:
            values[index] = wanted
        for index, name, _, size in self._names:
            value = fields[name]
            if size:
                if not isinstance(value, bytes):
                    raise TypeError(f"{self.what}: {name} is {type(value).__name__}, not bytes")
                if len(value) != size:
                    raise ValueError(f"{self.what}: {name} has {size} bytes, not {len(value)}")
            values[index] = value
        try:
            return self._struct.pack(*values)
        except struct.error as error:
            raise ValueError(f"{self.what}: an integer does not fit: {error}") from None


class Reader:
    """
    Takes parts off the front of bytes, for structures of variable size.

    Args:
        data: The bytes.
        what: Name of the structure, for errors.
        error: Class of the errors that reading raises.
    """

    __slots__ = ("_data", "_error", "_what", "offset")

    def __init__(self, data: bytes, what: str, error: type[EnclaveError]) -> None:
        self._data = data
        self._what = what
        self._error = error
        self.offset = 0

    @property
    def remaining(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self.offset

    def take(self, size: int, name: str) -> bytes:
        """Take *size* bytes, which the error calls *name*."""
        start = self.offset
        end = start + size
        if end > len(self._data):
            raise self._error(
                f"{self._what}: {name} at offset {start} does not fit",
                expected=f"{size} bytes",
                found=f"{self.remaining} bytes",
            )
        self.offset = end
        return self._data[start:end]

    def integer(self, size: int, name: str) -> int:
        """Take an unsigned integer of *size* bytes."""
        return int.from_bytes(self.take(size, name), "little")

    def end(self, *, zeros: bool = False) -> None:
        """Check that nothing is left or, with *zeros*, nothing but zero bytes."""
        rest = self._data[self.offset :]
        if rest.strip(b"\0") if zeros else rest:
            raise self._error(
                f"{self._what}: bytes follow the end at offset {self.offset}",
                expected="zero bytes" if zeros else "nothing",
                found=f"{len(rest)} bytes",
            )
