"""Firmware files made for tests."""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
HASHES = "7255371f-3a3b-4b04-927b-1da6efa8d454"
SEV = "dc886566-984a-4798-a75e-5585a7bf67cc"
TDX = "e47a6535-984a-4798-865e-4685a7bf8ec2"
SVSM = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"


def entry(guid: str, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le


def build(
    size: int = 16384,
    *,
    sev: Sequence[tuple[int, int, int]] | None = None,
    tdx: Sequence[tuple[int, int, int, int, int, int]] | None = None,
    reset: int | None = 0x80B004,
    hashes: tuple[int, int] | None = None,
    svsm: int | None = None,
    extra: Sequence[bytes] = (),
    fill: int = 1,
) -> bytearray:
    """Return a firmware of *size* bytes with the tables asked for."""
    data = bytearray((i * fill + (i >> 8)) & 0xFF for i in range(size))
    table = list(extra)
    at = 1024  # distance from the end
    if sev is not None:
        body = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sev), 1, len(sev))
        body += b"".join(struct.pack("<III", *section) for section in sev)
        data[size - at : size - at + len(body)] = body
        table.append(entry(SEV, struct.pack("<I", at)))
        at += 1024
    if tdx is not None:
        body = struct.pack("<4sIII", b"TDVF", 16 + 32 * len(tdx), 1, len(tdx))
        body += b"".join(struct.pack("<IIQQII", *section) for section in tdx)
        data[size - at : size - at + len(body)] = body
        table.append(entry(TDX, struct.pack("<I", at)))
    if reset is not None:
        table.append(entry(RESET, struct.pack("<I", reset)))
    if hashes is not None:
        table.append(entry(HASHES, struct.pack("<II", *hashes)))
    if svsm is not None:
        table.append(entry(SVSM, struct.pack("<I", svsm)))
    body = b"".join(table)
    whole = body + struct.pack("<H", len(body) + 18) + uuid.UUID(FOOTER).bytes_le
    data[size - 32 - len(whole) : size - 32] = whole
    return data


@pytest.fixture(scope="session")
def firmware() -> Callable[..., bytearray]:
    """Make firmware files."""
    return build


@pytest.fixture(scope="session")
def guid_entry() -> Callable[[str, bytes], bytes]:
    """Make one entry of the GUID table."""
    return entry
