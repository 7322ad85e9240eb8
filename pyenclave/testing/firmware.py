"""Synthetic OVMF firmware: a small file with the tables that launch digests depend on."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from typing import Final

__all__ = ["firmware"]

_FOOTER: Final = "96b582de-1fb2-45f7-baea-a366c55a082d"
_RESET: Final = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
_SEV: Final = "dc886566-984a-4798-a75e-5585a7bf67cc"
_METADATA_AT: Final = 1024  # bytes before the end
# Guest address, size and kind (1 memory, 2 secrets, 3 CPUID) of pages that the launch prepares.
_SECTIONS: Final = ((0x800000, 0x9000, 1), (0x80A000, 0x1000, 2), (0x80B000, 0x1000, 3))


def firmware(
    size: int = 65536,
    *,
    fill: int = 1,
    sections: Sequence[tuple[int, int, int]] = _SECTIONS,
    reset: int = 0x80B004,
) -> bytes:
    """
    Return a firmware file that is no program, only measured like one.

    Args:
        size: Bytes, whole pages.
        fill: Another number makes other content.
        sections: Of the SEV metadata: guest address, size, kind.
        reset: Where further processors start.
    """
    data = bytearray((index * fill + (index >> 8)) & 0xFF for index in range(size))
    body = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), 1, len(sections))
    body += b"".join(struct.pack("<III", *section) for section in sections)
    data[size - _METADATA_AT : size - _METADATA_AT + len(body)] = body
    table = _entry(_SEV, struct.pack("<I", _METADATA_AT)) + _entry(_RESET, struct.pack("<I", reset))
    whole = table + struct.pack("<H", len(table) + 18) + uuid.UUID(_FOOTER).bytes_le
    data[size - 32 - len(whole) : size - 32] = whole
    return bytes(data)


def _entry(guid: str, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le
