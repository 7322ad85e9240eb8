"""
The shape of an Arrow IPC stream, looked at before a decoder sees the bytes.

Arrow's reader checks that a stream is one; it does not bound what the stream makes it allocate.
This walks the metadata alone (https://arrow.apache.org/docs/format/Columnar.html, "Serialization
and Interprocess Communication"; Message.fbs and Schema.fbs of format 1.5; FlatBuffers, "Internals")
and refuses compressed bodies, extension types, which may run code while they are decoded, batches
that say more rows than they have bytes, and whatever exceeds the limits below.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyenclave.errors import ArgumentError

__all__ = ["MAX_BATCHES", "MAX_DEPTH", "MAX_FIELDS", "MAX_ROWS", "Shape", "scan"]

MAX_BATCHES = 65536  # dictionaries count as well
MAX_FIELDS = 4096  # columns and whatever is nested in them
MAX_DEPTH = 16  # levels of nested types
MAX_ROWS = (1 << 31) - 1  # of one batch
_MAX_METADATA = 1 << 20  # bytes of one message's metadata
_MAX_TEXT = 4096  # bytes of a name or a key
_FREE_ROWS = 65536  # rows that a batch may have without a bit for each

_CONTINUATION = b"\xff\xff\xff\xff"
_VERSION_5 = 4
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_TYPES = {
    1: "null", 2: "int", 3: "floating point", 4: "binary", 5: "utf8", 6: "bool", 7: "decimal",
    8: "date", 9: "time", 10: "timestamp", 11: "interval", 12: "list", 13: "struct",
    15: "fixed-size binary", 16: "fixed-size list", 17: "map", 18: "duration",
    19: "large binary", 20: "large utf8", 21: "large list", 23: "binary view", 24: "utf8 view",
}  # fmt: skip
_REFUSED = {14: "union", 22: "run-end encoded", 25: "list view", 26: "large list view"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """
    What a stream says of itself.

    Attributes:
        fields: Columns and what is nested in them.
        batches: Record batches.
        rows: Of all batches.

    """

    fields: int
    batches: int
    rows: int


def _bad(what: str, *, advice: str | None = None, expected: object = None) -> ArgumentError:
    return ArgumentError(f"Arrow data: {what}", advice=advice, expected=expected)


class _Table:
    """A table of a FlatBuffers buffer; every read is inside the buffer, or an error."""

    __slots__ = ("_at", "_data", "_size", "_vtable")

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - self._read("<i", at)
        self._size = self._read("<H", self._vtable)
        if self._size < 4 or self._vtable + self._size > len(data):
            raise _bad("its metadata is malformed")

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise _bad("its metadata is malformed")
        try:
            value: int = struct.unpack_from(form, self._data, at)[0]
        except struct.error:
            raise _bad("its metadata is malformed") from None
        return value

    def _place(self, index: int) -> int:
        """Return where field *index* is, or 0 if it is absent."""
        entry = 4 + 2 * index
        if entry + 2 > self._size:
            return 0
        offset = self._read("<H", self._vtable + entry)
        return self._at + offset if offset else 0

    def number(self, index: int, form: str, default: int = 0) -> int:
        """Return a scalar."""
        place = self._place(index)
        return self._read(form, place) if place else default

    def has(self, index: int) -> bool:
        """Whether the field is there."""
        return self._place(index) != 0

    def table(self, index: int) -> _Table:
        """Return the table that the field points to."""
        place = self._place(index)
        if not place:
            raise _bad("its metadata lacks a table")
        return _Table(self._data, place + self._read("<I", place))

    def vector(self, index: int, width: int, most: int) -> tuple[int, int]:
        """Return where a vector's elements of *width* bytes begin, and how many there are."""
        place = self._place(index)
        if not place:
            return 0, 0
        at = place + self._read("<I", place)
        count = self._read("<I", at)
        if count > most:
            raise _bad("its metadata has too many parts", expected=f"at most {most}")
        if at + 4 + count * width > len(self._data):
            raise _bad("its metadata is malformed")
        return at + 4, count

    def tables(self, index: int, most: int) -> list[_Table]:
        """Return the tables of a vector."""
        at, count = self.vector(index, 4, most)
        places = range(at, at + 4 * count, 4)
        return [_Table(self._data, place + self._read("<I", place)) for place in places]

    def pairs(self, index: int, most: int) -> list[tuple[int, int]]:
        """Return the structs of a vector, each of two 64-bit integers."""
        at, count = self.vector(index, 16, most)
        return list(struct.iter_unpack("<qq", self._data[at : at + 16 * count]))

    def text(self, index: int) -> bytes:
        """Return a string."""
        at, count = self.vector(index, 1, _MAX_TEXT)
        return self._data[at : at + count]


class _Scan:
    def __init__(self) -> None:
        self.fields = 0
        self.views = 0

    def schema(self, table: _Table) -> None:
        if table.number(0, "<h") != 0:
            raise _bad("it is big-endian")
        for field in table.tables(1, MAX_FIELDS):
            self.field(field, 1)

    def field(self, field: _Table, depth: int) -> None:
        # Counted at each visit: tables may be shared, and sixteen levels of them are many.
        self.fields += 1
        if self.fields > MAX_FIELDS or depth > MAX_DEPTH:
            raise _bad(
                "it has too many columns, or they nest too deep",
                expected=f"at most {MAX_FIELDS} fields and {MAX_DEPTH} levels",
            )
        name = field.text(0)
        kind = field.number(2, "<B")
        if kind not in _TYPES:
            shown = _REFUSED.get(kind, f"of unknown type {kind}")
            raise _bad(
                f"column {name.decode(errors='replace')!r} is {shown}",
                expected=", ".join(_TYPES.values()),
                advice="Cast it to a plain type.",
            )
        self.views += kind in (23, 24)
        for pair in field.tables(6, 64):
            if pair.text(0).startswith(b"ARROW:extension"):
                raise _bad(
                    f"column {name.decode(errors='replace')!r} is of an extension type",
                    advice="Send its storage: column.cast(type.storage_type).",
                )
        for child in field.tables(5, MAX_FIELDS):
            self.field(child, depth + 1)

    def batch(self, table: _Table, body: int) -> int:
        if table.has(3):
            raise _bad(
                "its buffers are compressed",
                expected="no compression",
                advice="Write it without compression; it crosses in memory.",
            )
        rows = table.number(0, "<q")
        nodes = table.pairs(1, self.fields)
        for count, nulls in [(rows, 0), *nodes]:
            if not 0 <= nulls <= count <= MAX_ROWS:
                raise _bad("a batch says an impossible number of rows")
            if count > 8 * body + _FREE_ROWS:
                raise _bad("a batch says more rows than its bytes can hold")
        at, views = table.vector(4, 8, max(self.views, 1))
        extra = sum(table._read("<q", at + 8 * place) for place in range(views))  # noqa: SLF001
        if not 0 <= extra <= MAX_BATCHES:
            raise _bad("a batch has too many buffers")
        for offset, size in table.pairs(2, 3 * self.fields + extra):
            if offset < 0 or size < 0 or offset + size > body:
                raise _bad("a buffer lies outside its batch")
        return rows


def scan(data: bytes | memoryview) -> Shape:
    """
    Check the metadata of a whole Arrow IPC stream.

    Args:
        data: The stream, in memory that nobody else writes to. Bodies of batches are not read.

    Returns:
        What it says of itself. A decoder must still validate the values in full.

    Raises:
        ArgumentError: It is no such stream, or refused; the message says why.

    """
    view = memoryview(data).cast("B")
    state = _Scan()
    batches = messages = rows = at = 0
    while True:
        if len(view) - at < 8 or bytes(view[at : at + 4]) != _CONTINUATION:
            raise _bad("it is no IPC stream, or cut short")
        size = int.from_bytes(view[at + 4 : at + 8], "little")
        at += 8
        if size == 0:
            break
        if not 8 <= size <= _MAX_METADATA or size > len(view) - at:
            raise _bad("metadata is too long, or cut short", expected=f"at most {_MAX_METADATA}")
        metadata = bytes(view[at : at + size])
        at += size
        message = _Table(metadata, int.from_bytes(metadata[:4], "little"))
        body = message.number(3, "<q")
        if not 0 <= body <= len(view) - at:
            raise _bad("a body is cut short")
        at += body
        if message.number(0, "<h") != _VERSION_5:
            raise _bad("it is of another version of the format", expected="V5")
        kind, header = message.number(1, "<B"), message.table(2)
        messages += 1
        if (kind == _SCHEMA) != (messages == 1) or messages > MAX_BATCHES:
            raise _bad("its messages are not one schema and then batches")
        if kind == _SCHEMA:
            state.schema(header)
        elif kind == _DICTIONARY:
            state.batch(header.table(1), body)
        elif kind == _BATCH:
            rows += state.batch(header, body)
            batches += 1
        else:
            raise _bad("it has something else than batches")
    if at != len(view) or messages == 0:
        raise _bad("bytes are left over, or there is no schema")
    return Shape(fields=state.fields, batches=batches, rows=rows)
