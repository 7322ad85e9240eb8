"""
Sealed streams: header and frames ↔ bytes (docs/formats/sealed-stream.md).

A stream is what goes through a pipe: written once from the beginning to the end and read so.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from pyenclave.errors import UnsealError

__all__ = [
    "FRAME_SIZE",
    "HEADER_SIZE",
    "MAC_SIZE",
    "MAX_CHUNK",
    "StreamHeader",
    "read_frame",
    "write_frame",
]

MAGIC: Final = b"PYESTRM\x01"
HEADER_SIZE: Final = 96
MAC_SIZE: Final = 32
FRAME_SIZE: Final = 4
MAX_CHUNK: Final = 1 << 24  # bytes of plaintext in a chunk
_FINAL: Final = 1 << 31
_HEADER = struct.Struct("<8sII32s16s32s")


def _refuse(what: str, *, expected: object, found: object) -> UnsealError:
    return UnsealError(f"the sealed stream's {what} is wrong", expected=expected, found=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamHeader:
    """
    Header of a sealed stream.

    Attributes:
        chunk_size: Most bytes of plaintext in a chunk.
        salt: 32 bytes, new for each stream.
        name_tag: 16 bytes that only the key can compute of the name.
        mac: 32 bytes over all before; it commits to the key.

    """

    chunk_size: int
    salt: bytes
    name_tag: bytes
    mac: bytes = bytes(MAC_SIZE)

    def to_bytes(self) -> bytes:
        """Return the 96 bytes."""
        return _HEADER.pack(MAGIC, self.chunk_size, 0, self.salt, self.name_tag, self.mac)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Parse a header.

        Raises:
            UnsealError: Not a header of this version, or a field is impossible.

        """
        if len(data) != HEADER_SIZE:
            raise _refuse("header", expected=f"{HEADER_SIZE} bytes", found=len(data))
        magic, chunk_size, reserved, salt, name_tag, mac = _HEADER.unpack(data)
        if magic != MAGIC:
            raise _refuse("magic or version", expected=MAGIC.hex(), found=magic.hex())
        if not 1 <= chunk_size <= MAX_CHUNK:
            raise _refuse("chunk size", expected=f"1 … {MAX_CHUNK}", found=chunk_size)
        if reserved:
            raise _refuse("reserved field", expected=0, found=reserved)
        return cls(chunk_size=chunk_size, salt=salt, name_tag=name_tag, mac=mac)


def write_frame(length: int, *, final: bool) -> bytes:
    """Return the four bytes before a chunk of *length* bytes of plaintext."""
    return (length | (_FINAL if final else 0)).to_bytes(4, "little")


def read_frame(data: bytes, chunk_size: int) -> tuple[int, bool]:
    """
    Return the length of a chunk's plaintext, and whether it is the last.

    Raises:
        UnsealError: The length is impossible.

    """
    value = int.from_bytes(data, "little")
    length, final = value & (_FINAL - 1), bool(value & _FINAL)
    if length > chunk_size or (length == 0 and not final):
        raise _refuse("chunk length", expected=f"1 … {chunk_size}", found=length)
    return length, final
