"""Tell files of virtual machines and Nitro enclaves from their first and last bytes."""

from __future__ import annotations

import uuid

__all__ = ["is_eif", "is_event_log", "is_firmware"]

_FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_SPEC_ID = b"Spec ID Event"


def is_eif(data: memoryview) -> bool:
    """Whether a file is a Nitro enclave image."""
    return bytes(data[:4]) == b".eif"


def is_firmware(data: memoryview) -> bool:
    """Whether a file has the table of GUIDs that firmware of confidential machines has."""
    return len(data) >= 48 and bytes(data[-48:-32]) == _FOOTER


def is_event_log(data: memoryview) -> bool:
    """Whether a file is an event log: with a Spec ID, of SHA-1 records, or dstack's JSON."""
    head = bytes(data[:64])
    if head[32:].startswith(_SPEC_ID):
        return True
    if head.lstrip(b" \t\r\n")[:1] == b"[":
        return b'"imr"' in bytes(data[:4096])
    # A first record of the SHA-1 form: PCR 0, a plausible type, data that fits.
    size = int.from_bytes(head[28:32], "little")
    return (
        len(head) > 32
        and head[:4] == bytes(4)
        and 1 <= int.from_bytes(head[4:8], "little") <= 0x13
        and 0 < size <= len(data) - 32
        and any(head[8:28])
    )
