"""Event logs made by hand, record by record (TCG PC Client PFP 1.06, 10)."""

from __future__ import annotations

import hashlib
import struct

SHA1, SHA256, SHA384, SHA3 = 4, 11, 12, 0x27
SIZES = {SHA1: 20, SHA256: 32, SHA384: 48, SHA3: 32}
NAMES = {SHA1: "sha1", SHA256: "sha256", SHA384: "sha384"}


def spec_id(banks: tuple[int, ...], index: int = 0) -> bytes:
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks))
    data += b"".join(struct.pack("<HH", bank, SIZES[bank]) for bank in banks) + b"\0"
    return struct.pack("<II20sI", index, 3, bytes(20), len(data)) + data


def digest(bank: int, data: bytes) -> bytes:
    if bank in NAMES:
        return hashlib.new(NAMES[bank], data).digest()
    return hashlib.sha256(b"another" + data).digest()


def event(index: int, data: bytes, banks: tuple[int, ...], event_type: int = 0xD) -> bytes:
    digests = b"".join(struct.pack("<H", bank) + digest(bank, data) for bank in banks)
    head = struct.pack("<III", index, event_type, len(banks))
    return head + digests + struct.pack("<I", len(data)) + data


def log(*events: tuple[int, bytes], banks: tuple[int, ...] = (SHA1, SHA256)) -> bytes:
    return spec_id(banks) + b"".join(event(index, data, banks) for index, data in events)


def registers(bank: int, *events: tuple[int, bytes]) -> dict[int, bytes]:
    """What the hardware would hold."""
    found: dict[int, bytes] = {}
    for index, data in events:
        before = found.get(index, bytes(SIZES[bank]))
        found[index] = digest(bank, before + digest(bank, data))
    return found
