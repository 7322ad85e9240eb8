"""
The certificate table that an SEV-SNP host hands to its guests (GHCB specification, 56421).

The table follows a report in the answer to an extended guest request, and is the ``auxblob`` of
configfs-tsm (the project's notes on evidence providers, 1.4). The host writes it: every number in
it may be an attacker's.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from pyenclave.errors import EvidenceFormatError

__all__ = [
    "GUID_ARK",
    "GUID_ASK",
    "GUID_PLATFORM_INFO",
    "GUID_VCEK",
    "GUID_VLEK",
    "MAX_TABLE_SIZE",
    "CertificateTable",
]

GUID_VCEK: Final = "63da758d-e664-4564-adc5-f4b93be8accd"
GUID_VLEK: Final = "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
GUID_ASK: Final = "4ab7b379-bbac-4fe4-a02f-05aef327c782"
GUID_ARK: Final = "c0b406a4-a803-4952-9743-3fb6014cd0ae"
GUID_PLATFORM_INFO: Final = "ecae0c0f-9502-43b1-afa2-0ae2e0d565b6"

#: Four times what the kernel's interface can carry (SEV_FW_BLOB_MAX_SIZE, 16 KiB).
MAX_TABLE_SIZE: Final = 1 << 16
_ENTRY: Final = 24
_MAX_ENTRIES: Final = 32
_WHAT: Final = "SEV-SNP certificate table"


@dataclass(frozen=True, slots=True)
class CertificateTable:
    """
    The entries of a certificate table.

    Attributes:
        entries: Pairs of GUID, in text, and content, in the order of the table.
    """

    entries: tuple[tuple[str, bytes], ...]

    @classmethod
    def from_bytes(cls, data: bytes) -> CertificateTable:
        """
        Read a table. No bytes at all are an empty table: hosts that have none send none.

        Raises:
            EvidenceFormatError: No end, too many entries, one GUID twice, or an entry that does
                not lie behind the table and inside the bytes.
        """
        if len(data) > MAX_TABLE_SIZE:
            raise EvidenceFormatError(
                f"{_WHAT} is too long",
                expected=f"at most {MAX_TABLE_SIZE} bytes",
                found=f"{len(data)} bytes",
            )
        if not data:
            return cls(())
        places: dict[str, tuple[int, int]] = {}
        for index in range(_MAX_ENTRIES + 1):
            entry = data[index * _ENTRY : (index + 1) * _ENTRY]
            if len(entry) != _ENTRY or index == _MAX_ENTRIES:
                raise EvidenceFormatError(
                    f"{_WHAT} has no end",
                    expected=f"a zero entry after at most {_MAX_ENTRIES} entries",
                    found=f"{index} entries in {len(data)} bytes",
                )
            if not any(entry):
                break
            guid = str(uuid.UUID(bytes_le=entry[:16]))
            if guid in places:
                raise EvidenceFormatError(f"{_WHAT} has a GUID twice", found=guid)
            places[guid] = (
                int.from_bytes(entry[16:20], "little"),
                int.from_bytes(entry[20:], "little"),
            )
        start = (len(places) + 1) * _ENTRY
        for guid, (offset, length) in places.items():
            if offset < start or offset + length > len(data):
                raise EvidenceFormatError(
                    f"{_WHAT}: the entry {guid} is outside",
                    expected=f"bytes {start} to {len(data)}",
                    found=f"bytes {offset} to {offset + length}",
                )
        return cls(tuple((guid, data[at : at + size]) for guid, (at, size) in places.items()))

    def get(self, guid: str) -> bytes | None:
        """Return the content of the entry with *guid*, if there is one that is not empty."""
        return dict(self.entries).get(guid) or None

    def to_bytes(self) -> bytes:
        """
        Write the table.

        Raises:
            ValueError: Too many entries, one GUID twice, a wrong GUID, or more than fits.
        """
        guids = [guid for guid, _ in self.entries]
        if len(set(guids)) != len(guids) or len(guids) > _MAX_ENTRIES:
            raise ValueError(f"{_WHAT}: at most {_MAX_ENTRIES} different GUIDs")
        offset = (len(guids) + 1) * _ENTRY
        head = b""
        for guid, content in self.entries:
            place = offset.to_bytes(4, "little") + len(content).to_bytes(4, "little")
            head += uuid.UUID(guid).bytes_le + place
            offset += len(content)
        if offset > MAX_TABLE_SIZE:
            raise ValueError(f"{_WHAT}: at most {MAX_TABLE_SIZE} bytes")
        return b"".join((head, bytes(_ENTRY), *(content for _, content in self.entries)))
