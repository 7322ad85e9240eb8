"""
CBOR (RFC 8949), strictly: a reader for what strangers send, and a small writer.

Read are integers of 64 bits, byte and text strings, arrays, maps, tags, true, false and null.
Refused are indefinite lengths and floating point unless asked for, names that occur twice, other
simple values, text that is not UTF-8, bytes after the item, and sizes and nesting beyond the caps.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Final, Literal

from pyenclave.errors import EnclaveError, EvidenceFormatError

__all__ = ["MAX_DEPTH", "MAX_SIZE", "Form", "Tag", "dumps", "loads"]

MAX_DEPTH: Final = 16
MAX_SIZE: Final = 1 << 20  # bytes

Form = Literal["definite", "shortest", "canonical"]

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(8)
_SIMPLE: Final[dict[int, bool | None]] = {20: False, 21: True, 22: None}
_FLOATS: Final = {25: ">e", 26: ">f", 27: ">d"}
_INDEFINITE: Final = 31
_BREAK: Final = 0xFF


@dataclass(frozen=True, slots=True)
class Tag:
    """A tagged value (RFC 8949, 3.4)."""

    number: int
    value: Any


class _Reader:
    """One pass over the bytes; *depth* is passed down and capped."""

    __slots__ = (
        "at",
        "canonical",
        "data",
        "error",
        "floats",
        "indefinite",
        "max_depth",
        "shortest",
        "what",
    )

    def __init__(
        self,
        data: bytes,
        what: str,
        error: type[EnclaveError],
        max_depth: int,
        form: Form,
        floats: bool,
        indefinite: bool,
    ) -> None:
        self.data = data
        self.at = 0
        self.what = what
        self.error = error
        self.max_depth = max_depth
        self.shortest = form != "definite"
        self.canonical = form == "canonical"
        self.floats = floats
        self.indefinite = indefinite

    def fail(self, expected: object, found: object) -> EnclaveError:
        return self.error(
            f"{self.what}: malformed CBOR at offset {self.at}", expected=expected, found=found
        )

    def take(self, size: int) -> bytes:
        left = len(self.data) - self.at
        if size > left:
            raise self.fail(f"{size} bytes", f"{left} bytes")
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def head(self) -> tuple[int, int, int]:
        """Return the major type, the additional information and the argument."""
        start = self.at
        first = self.take(1)[0]
        major, info = first >> 5, first & 31
        if info < 24:
            return major, info, info
        if info == _INDEFINITE and self.indefinite and major in (_ARRAY, _MAP):
            return major, info, 0
        if info > 27:
            self.at = start
            what = "an indefinite length" if info == _INDEFINITE else f"reserved head {first:#x}"
            raise self.fail("an item of definite length", what)
        value = int.from_bytes(self.take(1 << (info - 24)), "big")
        # Floating point (major type 7) has its widths by meaning, not by value.
        if self.shortest and major != _OTHER and value < (24, 1 << 8, 1 << 16, 1 << 32)[info - 24]:
            self.at = start
            raise self.fail("the shortest form of a number", f"{value} in a longer one")
        return major, info, value

    def item(self, depth: int) -> Any:
        start = self.at
        major, info, value = self.head()
        if major == _UNSIGNED:
            return value
        if major == _NEGATIVE:
            return -1 - value
        if major == _BYTES:
            return self.take(value)
        if major == _TEXT:
            try:
                return self.take(value).decode("utf-8")
            except UnicodeDecodeError:
                self.at = start
                raise self.fail("UTF-8 text", "other bytes") from None
        if major == _OTHER:
            return self.simple(start, info, value)
        if depth >= self.max_depth:
            self.at = start
            raise self.fail(f"at most {self.max_depth} levels", "more")
        if major == _TAG:
            return Tag(value, self.item(depth + 1))
        if info == _INDEFINITE:
            return self.list_until_break(depth) if major == _ARRAY else self.map(None, depth)
        # Each item takes at least one byte: a count beyond that is a lie, found before any list.
        smallest = value if major == _ARRAY else 2 * value
        if smallest > len(self.data) - self.at:
            raise self.fail(f"{value} items", f"{len(self.data) - self.at} bytes")
        if major == _ARRAY:
            return [self.item(depth + 1) for _ in range(value)]
        return self.map(value, depth)

    def at_break(self) -> bool:
        """Take the end of something of indefinite length, if it is here."""
        if self.data[self.at : self.at + 1] != bytes((_BREAK,)):
            return False
        self.at += 1
        return True

    def list_until_break(self, depth: int) -> list[Any]:
        found: list[Any] = []
        while not self.at_break():
            found.append(self.item(depth + 1))
        return found

    def simple(self, start: int, info: int, value: int) -> bool | float | None:
        if info in _SIMPLE:
            return _SIMPLE[info]
        if self.floats and info in _FLOATS:
            raw = value.to_bytes(1 << (info - 24), "big")
            number: float = struct.unpack(_FLOATS[info], raw)[0]
            if math.isfinite(number):
                return number
        self.at = start
        raise self.fail("true, false or null", f"simple value or number {value:#x}")

    def map(self, count: int | None, depth: int) -> dict[int | str | bytes, Any]:
        found: dict[int | str | bytes, Any] = {}
        last = b""
        while not self.at_break() if count is None else len(found) < count:
            start = self.at
            key = self.item(depth + 1)
            # True equals 1 in Python; such names are refused, not confused.
            if type(key) not in (int, str, bytes):
                self.at = start
                raise self.fail("a number or string as name", type(key).__name__)
            if key in found:
                self.at = start
                raise self.fail("each name once", f"{key!r:.60} twice")
            if self.canonical:
                raw = self.data[start : self.at]
                if raw <= last:
                    self.at = start
                    raise self.fail("names in canonical order", f"{key!r:.60}")
                last = raw
            found[key] = self.item(depth + 1)
        return found


def loads(
    data: bytes,
    what: str = "CBOR",
    error: type[EnclaveError] = EvidenceFormatError,
    *,
    form: Form = "shortest",
    floats: bool = False,
    indefinite: bool = False,
    max_depth: int = MAX_DEPTH,
    max_size: int = MAX_SIZE,
) -> Any:
    """
    Read one CBOR item.

    Args:
        data: The bytes, all of them one item.
        what: What is read, for errors.
        error: Class of the errors.
        form: ``definite`` takes numbers and lengths in any width, ``shortest`` in the shortest
            only (RFC 8949, 4.1), ``canonical`` wants the names of maps in order too (4.2.1).
        floats: Read finite floating-point numbers instead of refusing them.
        indefinite: Read arrays and maps of indefinite length (never strings); for what is hashed
            or signed as the bytes it is.
        max_depth: How many arrays, maps and tags may be nested.
        max_size: How many bytes are looked at.

    Returns:
        int, bytes, str, list, dict, `Tag`, bool, float or None.

    Raises:
        EnclaveError: Of class *error*, if anything is malformed or ambiguous.

    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"{what} is bytes, not {type(data).__name__}")
    if form not in ("definite", "shortest", "canonical"):
        raise ValueError(f"form is definite, shortest or canonical, not {form!r}")
    if len(data) > max_size:
        raise error(
            f"{what}: too large", expected=f"at most {max_size} bytes", found=f"{len(data)} bytes"
        )
    reader = _Reader(bytes(data), what, error, max_depth, form, floats, indefinite)
    value = reader.item(0)
    if reader.at != len(reader.data):
        raise reader.fail("the end", f"{len(reader.data) - reader.at} more bytes")
    return value


def _head(major: int, value: int) -> bytes:
    first = major << 5
    if value < 24:
        return bytes((first | value,))
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if value < 1 << (8 * size):
            return bytes((first | info,)) + value.to_bytes(size, "big")
    raise ValueError(f"{value} does not fit 64 bits")


def dumps(value: object, *, canonical: bool = False) -> bytes:
    """
    Write one CBOR item, in the shortest form.

    Args:
        value: What `loads` returns; tuples are arrays.
        canonical: Order the names of maps (RFC 8949, 4.2.1) instead of keeping theirs.

    Raises:
        TypeError: A value that is none of those.
        ValueError: An integer beyond 64 bits, or a floating-point number that is not finite.

    """
    if value is None or isinstance(value, bool):
        return bytes((0xE0 | {False: 20, True: 21, None: 22}[value],))
    if isinstance(value, int):
        return _head(_UNSIGNED, value) if value >= 0 else _head(_NEGATIVE, -1 - value)
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        return _head(_BYTES, len(raw)) + raw
    if isinstance(value, str):
        raw = value.encode("utf-8")
        return _head(_TEXT, len(raw)) + raw
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        return b"\xfb" + struct.pack(">d", value)
    if isinstance(value, Tag):
        return _head(_TAG, value.number) + dumps(value.value, canonical=canonical)
    if isinstance(value, list | tuple):
        items = [dumps(item, canonical=canonical) for item in value]
        return _head(_ARRAY, len(items)) + b"".join(items)
    if isinstance(value, dict):
        return _map(value, canonical)
    raise TypeError(f"{type(value).__name__} has no form in CBOR here")


def _map(value: dict[Any, Any], canonical: bool) -> bytes:
    pairs: list[tuple[bytes, bytes]] = []
    for key, item in value.items():
        if type(key) not in (int, str, bytes):
            raise TypeError(f"a name is a number or string, not {type(key).__name__}")
        pairs.append((dumps(key), dumps(item, canonical=canonical)))
    if canonical:
        pairs.sort()
    return _head(_MAP, len(pairs)) + b"".join(key + item for key, item in pairs)
