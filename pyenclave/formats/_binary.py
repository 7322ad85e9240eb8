"""
Reading and writing fixed binary layouts, strictly.

What is read here may come from an attacker: every length is checked before it is used, reserved
bytes must be zero, constants must be the ones of the specification, and each error names the
structure, the field, what was expected and what was found. All integers are little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

    from pyenclave.errors import EnclaveError

__all__ = ["Layout", "Reader", "shorten"]

_INTEGERS = {"B": 1, "H": 2, "I": 4, "Q": 8}


def shorten(value: bytes) -> str:
    """Return *value* in hex, for a message: at most sixteen bytes of it."""
    return value.hex() if len(value) <= 16 else f"{value[:16].hex()}… ({len(value)} bytes)"


class Layout:
    """
    A structure of fixed size.

    Args:
        what: Name of the structure, for errors.
        error: Class of the errors that reading raises.
        fields: In the order of the bytes. ``("name", "H")`` is an integer of the ``struct`` code
            B, H, I or Q; ``("name", 16)`` is that many bytes; ``("name", b"...")`` is a constant
            and ``(None, 12)`` is reserved: both are checked and not returned.
    """

    def __init__(
        self,
        what: str,
        error: type[EnclaveError],
        *fields: tuple[str | None, str | int | bytes],
    ) -> None:
        codes = "<"
        offset = 0
        self.what = what
        self.error = error
        self._names: list[tuple[int, str, int, int]] = []  # index, name, offset, size or 0
        self._fixed: list[tuple[int, str, int, bytes]] = []  # index, name, offset, value
        for index, (name, kind) in enumerate(fields):
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
        self._count = len(fields)
        self.size = offset

    def unpack(self, data: Buffer) -> dict[str, Any]:
        """
        Read the structure from exactly its size of bytes.

        Returns:
            The named fields: ``int`` or ``bytes``.

        Raises:
            EnclaveError: Of the class given, if the size, a constant or a reserved byte is wrong.
        """
        with memoryview(data) as view:
            if view.nbytes != self.size:
                raise self.error(
                    f"{self.what}: the size is wrong",
                    expected=f"{self.size} bytes",
                    found=f"{view.nbytes} bytes",
                )
            values = self._struct.unpack(view)
        for index, name, offset, wanted in self._fixed:
            if values[index] != wanted:
                raise self.error(
                    f"{self.what}: {name} at offset {offset} is wrong",
                    expected="zero" if not any(wanted) else wanted.hex(),
                    found=shorten(values[index]),
                )
        return {name: values[index] for index, name, _, _ in self._names}

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
