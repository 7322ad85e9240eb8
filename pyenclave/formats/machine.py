"""
Evidence of the machine below a platform: container ↔ bytes, and what its report data binds.

On a confidential VM the platform has the VM's hardware vouch for its keys once, at its start. What
the hardware said, and the vendor's files that came with it, travel with the evidence of each
enclave. Layout: ``docs/formats/evidence.md``. Nothing binds the container itself: the hardware
report in it is signed, and binds the platform's keys.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.evidence import MAX_MACHINE, length_prefixed

__all__ = ["LABEL", "MAGIC", "MAX_MACHINE", "MachineEvidence", "machine_report_data"]

MAGIC: Final = b"PYEMACH\x01"
LABEL: Final = b"pyenclave-machine-v1"

_MAX_EVIDENCE: Final = 32 * 1024
_MAX_FILES: Final = 24
_MAX_NAME: Final = 64
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,58}\.[a-z]{3,4}")
_COUNT: Final = struct.Struct("<I")


def machine_report_data(*, root: bytes, attestation_key: bytes) -> bytes:
    """
    Return the 64 bytes of report data by which hardware vouches for a platform.

    Args:
        root: The platform's root certificate, DER.
        attestation_key: Its attestation key on P-256, X ‖ Y, 64 bytes big-endian.
    """
    if len(attestation_key) != 64:
        raise ValueError("an attestation key has 64 bytes")
    return hashlib.sha512(length_prefixed(LABEL, root, attestation_key)).digest()


def _bad(what: str, *, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"machine evidence: {what}", expected=expected, found=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineEvidence:
    """
    What a machine's hardware says of itself.

    Attributes:
        evidence: SEV-SNP report, TD quote or HCL report; its kind is seen from its bytes.
        files: The vendor's files beside it, by the names of ``verify --endorsements``.
    """

    evidence: bytes
    files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    def to_bytes(self) -> bytes:
        """
        Return the container: magic, number of files, evidence, then name and bytes of each file.

        Raises:
            ValueError: Something is longer than its limit, or a name is none.
        """
        if not 1 <= len(self.evidence) <= _MAX_EVIDENCE or len(self.files) > _MAX_FILES:
            raise ValueError("machine evidence is empty or too large")
        fields = [self.evidence]
        for name in sorted(self.files):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an endorsement")
            fields += [name.encode(), bytes(self.files[name])]
        data = MAGIC + _COUNT.pack(len(self.files)) + length_prefixed(*fields)
        if len(data) > MAX_MACHINE:
            raise ValueError(f"machine evidence of {len(data)} bytes, not {MAX_MACHINE} at most")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Parse a container; there is one way to write it.

        Raises:
            EvidenceFormatError: Anything else.
        """
        if len(data) > MAX_MACHINE:
            raise _bad("too long", expected=f"at most {MAX_MACHINE} bytes", found=len(data))
        head = len(MAGIC) + _COUNT.size
        if len(data) < head or data[: len(MAGIC)] != MAGIC:
            raise _bad("magic or version", expected=MAGIC.hex(), found=data[: len(MAGIC)].hex())
        (count,) = _COUNT.unpack_from(data, len(MAGIC))
        if count > _MAX_FILES:
            raise _bad("number of files", expected=f"at most {_MAX_FILES}", found=count)
        offset = head
        fields: list[bytes] = []
        for index in range(1 + 2 * count):
            if len(data) - offset < _COUNT.size:
                raise _bad("cut short", expected=_COUNT.size, found=len(data) - offset)
            (length,) = _COUNT.unpack_from(data, offset)
            offset += _COUNT.size
            if length > len(data) - offset or (index % 2 == 1 and length > _MAX_NAME):
                raise _bad("length", expected=f"at most {len(data) - offset}", found=length)
            fields.append(data[offset : offset + length])
            offset += length
        if offset != len(data):
            raise _bad("bytes behind it", expected=0, found=len(data) - offset)
        if not 1 <= len(fields[0]) <= _MAX_EVIDENCE:
            raise _bad(
                "length of the evidence", expected=f"1…{_MAX_EVIDENCE}", found=len(fields[0])
            )
        files: dict[str, bytes] = {}
        last = ""
        for raw, content in zip(fields[1::2], fields[2::2], strict=True):
            name = raw.decode("ascii", "replace")
            if not _NAME.fullmatch(name) or name <= last:
                raise _bad("name", expected="names of endorsements in order", found=name)
            files[name] = content
            last = name
        return cls(evidence=fields[0], files=MappingProxyType(files))
