"""
Row ``measure_1gib``: MRENCLAVE of an Intel SDK enclave with 1 GiB of measured pages.

The file is made here: one segment, and metadata that has the rest as a measured heap. The peer is
hashlib over the same records, made beforehand part by part; only the hashing is timed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from time import perf_counter
from typing import Any, Final

from pyenclave.measurement.sgx_file import measure_sgx

__all__ = ["measure_1gib"]

_PAGE: Final = 4096
_CONTENT: Final = 4 * _PAGE
_HEAP: Final = (1 << 30) - _CONTENT
_SIZE: Final = 1 << 31
_HEAP_AT: Final = 0x100000
_PART: Final = 4096  # pages
_READ, _READ_WRITE = 0x201, 0x203
_MAGIC: Final = 0x86A80294635D0E4C


def _file(content: bytes) -> bytes:
    """Write an enclave of metadata 1.4 with *content* at 0 and a heap that is measured."""
    rows = struct.pack("<HHIQIIQ", 7, 3, _HEAP // _PAGE, _HEAP_AT, 0, 0, _READ_WRITE)
    directories = struct.pack("<IIII16x", 1872 + 32, 0, 1872 + 32, len(rows))
    size = 1872 + len(directories) + len(rows)
    head = struct.pack("<QIIIIIIIIQ", _MAGIC, 4, 1, size, 0, 1, 2632, 0, 0, _SIZE)
    note = head + bytes(16) + bytes(1808) + directories + rows
    note = struct.pack("<III", 13, len(note), 0) + b"sgx_metadata\0" + note
    names = b"\0.note.sgxmeta\0.shstrtab\0"
    at = 64 + 56
    program = struct.pack("<IIQQQQQQ", 1, 4, at, 0, 0, len(content), len(content), _PAGE)
    note_at = at + len(content)
    names_at = note_at + len(note)
    table_at = names_at + len(names)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 7, 0, 0, note_at, len(note), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 15, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(3, 62, 1, 0, 64, table_at, 0, 64, 56, 1, 64, 3, 2),
    )
    return header + program + content + note + names + sections


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records that are hashed, in parts."""
    yield struct.pack("<8sIQ44x", b"ECREATE", 1, _SIZE)
    pages = [(at, _READ, content[at : at + _PAGE]) for at in range(0, len(content), _PAGE)]
    zeros = bytes(_PAGE)
    places = range(_HEAP_AT, _HEAP_AT + _HEAP, _PAGE)
    add, extend = struct.Struct("<8sQQ40x").pack, struct.Struct("<8sQ48x").pack
    for start in range(0, len(places), _PART):
        pages += [(at, _READ_WRITE, zeros) for at in places[start : start + _PART]]
        parts = []
        for at, flags, data in pages:
            parts.append(add(b"EADD", at, flags))
            for chunk in range(0, _PAGE, 256):
                parts += extend(b"EEXTEND", at + chunk), data[chunk : chunk + 256]
        yield b"".join(parts)
        pages = []


def measure_1gib() -> dict[str, Any]:
    """
    Measure the file through the public API.

    Returns:
        The row, in gigabytes of page content a second.
    """
    content = os.urandom(_CONTENT)
    data = _file(content)
    start = perf_counter()
    found = measure_sgx(data)
    ours = perf_counter() - start
    peer, theirs = hashlib.sha256(), 0.0
    for part in _records(content):
        again = peer.copy()
        start = perf_counter()
        peer.update(part)
        middle = perf_counter()
        again.update(part)
        theirs += min(middle - start, perf_counter() - middle)
    start = perf_counter()
    second = measure_sgx(data)
    ours = min(ours, perf_counter() - start)
    if not found.mrenclave == second.mrenclave == peer.digest():
        raise AssertionError("the two measurements of one enclave differ")
    return {
        "name": "measure_1gib",
        "value": (_HEAP + _CONTENT) / ours / 1e9,
        "unit": "GB/s",
        "peer": "hashlib over the same records",
        "peer_value": (_HEAP + _CONTENT) / theirs / 1e9,
        "ratio": theirs / ours,
    }
