"""A second reader and writer of batches, in Python's unbounded integers (docs/formats/ring.md)."""

from __future__ import annotations

import struct

HEADER = struct.Struct("<IIQI44x")
EVEN, TABLE = 0, 1
ITEM, ERROR, STATUS, NOT_RUN = 0, 1, 2, 3
MOST = 65536


def up(value: int, to: int) -> int:
    return -(-value // to) * to


def write(items, align, *, form=TABLE, budget=0) -> bytes:
    """A batch of ``(tag, bytes)``; the even form takes them all of one size."""
    if form == EVEN:
        size = len(items[0][1])
        return HEADER.pack(len(items), EVEN, size, budget) + b"".join(data for _, data in items)
    table = b"".join(struct.pack("<Q", tag << 62 | len(data)) for tag, data in items)
    head = HEADER.pack(len(items), TABLE, 0, budget) + table
    head += bytes(up(len(head), 64) - len(head))
    return head + b"".join(data + bytes(up(len(data), align) - len(data)) for _, data in items)


def read(data: bytes, align: int, reply: bool) -> list[tuple[int, int, int]] | None:
    """Offset, length and tag of each item; None: not a batch."""
    if len(data) < 64 or any(data[20:64]):
        return None
    count, form, size, budget = HEADER.unpack(data[:64])
    if not 1 <= count <= MOST or form not in (EVEN, TABLE) or (reply and budget):
        return None
    if form == EVEN:
        if size % align or 64 + count * size != len(data):
            return None
        return [(64 + i * size, size, ITEM) for i in range(count)]
    end = 64 + 8 * count
    at = up(end, 64)
    if size or at > len(data) or any(data[end:at]):
        return None
    found = []
    stopped = False
    for i in range(count):
        (word,) = struct.unpack_from("<Q", data, 64 + 8 * i)
        tag, length = word >> 62, word & (1 << 62) - 1
        stopped = stopped or tag == NOT_RUN
        if (tag and not reply) or (tag == STATUS and length != 4):
            return None
        if stopped and (tag != NOT_RUN or length or i == 0):
            return None
        after = up(at + length, align)
        if after > len(data) or any(data[at + length : after]):
            return None
        found.append((at, length, tag))
        at = after
    return found if at == len(data) else None
