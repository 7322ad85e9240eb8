"""
What a virtual machine's firmware says about its own launch.

Sources: edk2 OvmfPkg/ResetVector (the table of GUIDed entries 32 bytes before the end of the
file, SEV and TDX metadata); AMD SEV-SNP firmware ABI, section 8.10; Intel TDX Virtual Firmware
Design Guide, section 11 (TDVF descriptor). Little-endian throughout.

The file may be hostile: every offset and size is checked against the file before it is used, and
the number of pages that it asks to measure is limited.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pyenclave.errors import MeasurementError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "FOUR_GIB",
    "GUID_NAMES",
    "PAGE_SIZE",
    "Firmware",
    "GuidEntry",
    "SevLayout",
    "SevSection",
    "TdvfSection",
]

PAGE_SIZE = 4096
FOUR_GIB = 1 << 32
MAX_FIRMWARE_SIZE = 256 << 20  # bytes
# Pages that metadata may have measured; 256 MiB where real firmware asks for some hundred KiB.
MAX_METADATA_PAGES = 1 << 16
MAX_SECTIONS = 256

_FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
_RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
_HASHES = "7255371f-3a3b-4b04-927b-1da6efa8d454"
_SEV_METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
_TDX_METADATA = "e47a6535-984a-4798-865e-4685a7bf8ec2"
_SVSM_INFO = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"

GUID_NAMES = {
    _FOOTER: "table footer",
    _RESET: "SEV-ES reset block",
    _HASHES: "kernel hashes table",
    _SEV_METADATA: "SEV metadata",
    _TDX_METADATA: "TDX metadata",
    _SVSM_INFO: "SVSM info",
    "4c2eb361-7d9b-4cc3-8081-127c90d3d294": "SEV secret block",
}
_ENTRY_HEAD = 18  # u16 size, GUID
_GUID = struct.Struct("<IHH8s")

SEV_SECTION_NAMES = {
    1: "memory",
    2: "secrets",
    3: "CPUID",
    4: "SVSM calling area",
    0x10: "kernel hashes",
}
TDVF_SECTION_NAMES = {
    0: "BFV",
    1: "CFV",
    2: "TD HOB",
    3: "temporary memory",
    4: "permanent memory",
    5: "payload",
    6: "payload parameters",
    7: "TD info",
}
TDVF_EXTEND = 1
TDVF_AUGMENT = 2


@dataclass(frozen=True, slots=True)
class GuidEntry:
    """
    An entry of the table at the firmware's end.

    Attributes:
        guid: In the usual text form.
        data: The entry's bytes, without its size and GUID.
        offset: Of ``data`` in the file, in bytes.
    """

    guid: str
    data: bytes
    offset: int

    @property
    def name(self) -> str:
        """What the entry is, or its GUID."""
        return GUID_NAMES.get(self.guid, self.guid)


@dataclass(frozen=True, slots=True)
class SevSection:
    """
    Memory that the hypervisor prepares before an SNP launch.

    Attributes:
        gpa: Guest-physical address, of a page.
        size: Bytes, whole pages.
        type: 1 memory, 2 secrets, 3 CPUID, 4 SVSM calling area, 16 kernel hashes.
    """

    gpa: int
    size: int
    type: int

    @property
    def name(self) -> str:
        """What the section is."""
        return SEV_SECTION_NAMES.get(self.type, f"type {self.type}")


@dataclass(frozen=True, slots=True)
class TdvfSection:
    """
    A section of the TDVF descriptor. The names are those of the vectors and of Intel's guide.

    Attributes:
        data_offset: Where its content is in the file, in bytes.
        raw_data_size: Bytes of content in the file.
        memory_address: Guest-physical address.
        memory_data_size: Bytes in memory.
        type: 0 BFV, 1 CFV, 2 TD HOB, 3 temporary memory, and others.
        attributes: Bit 0: the content is measured; bit 1: added after the launch.
    """

    data_offset: int
    raw_data_size: int
    memory_address: int
    memory_data_size: int
    type: int
    attributes: int

    @property
    def name(self) -> str:
        """What the section is."""
        return TDVF_SECTION_NAMES.get(self.type, f"type {self.type}")


@dataclass(frozen=True, slots=True)
class SevLayout:
    """
    What a launch digest needs of a firmware beside its bytes.

    Attributes:
        sections: In the order of the metadata, which is the order of measuring.
        hashes_table_gpa: Where the kernel hashes go; 0: not supported.
        ap_reset_eip: Where application processors start; None: not stated.
    """

    sections: tuple[SevSection, ...]
    hashes_table_gpa: int = 0
    ap_reset_eip: int | None = None

    def __post_init__(self) -> None:
        pages = 0
        for number, section in enumerate(self.sections):
            pages += _check_sev_section(number, section)
        if len(self.sections) > MAX_SECTIONS or pages > MAX_METADATA_PAGES:
            raise MeasurementError(
                "SEV metadata: more memory than any firmware needs",
                expected=f"≤ {MAX_SECTIONS} sections, ≤ {MAX_METADATA_PAGES} pages",
                found=f"{len(self.sections)} sections, {pages} pages",
            )


def _check_sev_section(number: int, section: SevSection) -> int:
    what = f"SEV metadata: section {number} ({section.name})"
    if section.type not in SEV_SECTION_NAMES:
        raise MeasurementError(
            f"{what}: unknown type",
            expected=", ".join(str(known) for known in SEV_SECTION_NAMES),
            found=section.type,
        )
    if section.gpa % PAGE_SIZE or section.size % PAGE_SIZE or section.size == 0:
        raise MeasurementError(
            f"{what}: not whole pages",
            expected="multiples of 4096",
            found=f"{section.size} bytes at {section.gpa:#x}",
        )
    if section.type in (2, 3) and section.size != PAGE_SIZE:
        raise MeasurementError(f"{what}: wrong size", expected="one page", found=section.size)
    return section.size // PAGE_SIZE


class Firmware:
    """
    A firmware file: whole, with the variable store, as the hypervisor maps it.

    Args:
        data: The file. It is not copied.
        end: Guest-physical address of its end.

    Raises:
        MeasurementError: Empty, too large, or its table of GUIDs is malformed. A file without
            such a table is accepted: plain SEV measures any.
    """

    def __init__(self, data: Buffer, *, end: int = FOUR_GIB) -> None:
        self.data = memoryview(data).cast("B")
        self.size = self.data.nbytes
        if not 0 < self.size <= MAX_FIRMWARE_SIZE:
            raise MeasurementError(
                "firmware: impossible size",
                expected=f"1 to {MAX_FIRMWARE_SIZE} bytes",
                found=f"{self.size} bytes",
            )
        if self.size > end:
            raise MeasurementError(
                "firmware: does not fit below its end", expected=f"≤ {end}", found=self.size
            )
        self.gpa = end - self.size
        self.entries = self._read_table()

    def _read_table(self) -> dict[str, GuidEntry]:
        """Read the table of GUIDed entries backwards from its footer."""
        top = self.size - 32 - _ENTRY_HEAD
        if top < 0 or self._guid(top + 2) != _FOOTER:
            return {}
        size = self._u16(top)
        if not _ENTRY_HEAD <= size <= top + _ENTRY_HEAD:
            raise MeasurementError(
                "firmware: the GUID table does not fit",
                expected=f"{_ENTRY_HEAD} to {top + _ENTRY_HEAD} bytes",
                found=size,
            )
        begin = top + _ENTRY_HEAD - size
        entries: dict[str, GuidEntry] = {}
        at = top
        while at > begin:
            room = at - begin
            length = self._u16(at - _ENTRY_HEAD) if room >= _ENTRY_HEAD else room
            if not _ENTRY_HEAD <= length <= room:
                raise MeasurementError(
                    f"firmware: the entry of the GUID table that ends at {at:#x} has a wrong size",
                    expected=f"{_ENTRY_HEAD} to {room} bytes",
                    found=length,
                )
            guid = self._guid(at - 16)
            if guid in entries:
                raise MeasurementError("firmware: a GUID is twice in the table", found=guid)
            begin_data, end_data = at - length, at - _ENTRY_HEAD
            entries[guid] = GuidEntry(guid, bytes(self.data[begin_data:end_data]), begin_data)
            at -= length
        return entries

    def _u16(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 2], "little")

    def _guid(self, at: int) -> str:
        # As uuid.UUID(bytes_le=...) has it; that module is as slow to import as firmware to hash.
        first, second, third, rest = _GUID.unpack_from(self.data, at)
        return f"{first:08x}-{second:04x}-{third:04x}-{rest[:2].hex()}-{rest[2:].hex()}"

    def _word(self, guid: str) -> int | None:
        """Return the u32 that an entry's data begins with; None without such an entry."""
        entry = self.entries.get(guid)
        if entry is None:
            return None
        if len(entry.data) < 4:
            raise MeasurementError(
                f"firmware: the entry {entry.name} is short",
                expected="≥ 4 bytes",
                found=f"{len(entry.data)} bytes",
            )
        return int.from_bytes(entry.data[:4], "little")

    def _metadata(self, guid: str, signature: bytes, entry_size: int) -> tuple[int, int]:
        """Find a table of descriptors; return where its entries begin and how many they are."""
        name = GUID_NAMES[guid]
        distance = self._word(guid)
        if distance is None:
            raise MeasurementError(
                f"firmware: no {name}",
                expected=guid,
                found=", ".join(entry.name for entry in self.entries.values()) or "no GUID table",
                advice="Take a firmware that was built for this technology.",
            )
        at = self.size - distance
        if at < 0 or distance < 16:
            raise MeasurementError(
                f"{name}: outside the file",
                expected=f"a distance of 16 to {self.size} bytes from the end",
                found=distance,
            )
        magic, length, version, count = struct.unpack_from("<4sIII", self.data, at)
        if magic != signature or version != 1:
            raise MeasurementError(
                f"{name}: not recognised",
                expected=f"{signature.decode()} version 1",
                found=f"{magic.hex()} version {version}",
            )
        if count > MAX_SECTIONS or not 16 + entry_size * count <= length <= distance:
            raise MeasurementError(
                f"{name}: impossible number of sections",
                expected=f"≤ {MAX_SECTIONS}, within {min(length, distance)} bytes",
                found=count,
            )
        return at + 16, count

    @cached_property
    def sev(self) -> SevLayout:
        """
        What the firmware states for SEV, SEV-ES and SEV-SNP; without metadata no sections.

        Raises:
            MeasurementError: The metadata is malformed.
        """
        sections: list[SevSection] = []
        if _SEV_METADATA in self.entries:
            at, count = self._metadata(_SEV_METADATA, b"ASEV", 12)
            sections += (
                SevSection(*struct.unpack_from("<III", self.data, at + 12 * number))
                for number in range(count)
            )
        return SevLayout(
            sections=tuple(sections),
            hashes_table_gpa=self._word(_HASHES) or 0,
            ap_reset_eip=self._word(_RESET),
        )

    @property
    def has_sev_metadata(self) -> bool:
        """Whether the firmware was built for SEV-SNP."""
        return _SEV_METADATA in self.entries

    @property
    def svsm_entry_offset(self) -> int:
        """
        Where an SVSM image starts to run, in bytes from its begin.

        Raises:
            MeasurementError: The file is no SVSM image.
        """
        offset = self._word(_SVSM_INFO)
        if offset is None or offset >= self.size:
            raise MeasurementError(
                "SVSM image: no entry point in it",
                expected=f"an SVSM info entry with an offset below {self.size}",
                found="none" if offset is None else offset,
            )
        return offset

    @cached_property
    def tdvf(self) -> tuple[TdvfSection, ...]:
        """
        The sections of the TDVF descriptor, in their order.

        Raises:
            MeasurementError: There is none, or a section does not fit the file or memory. A
                file of code alone, without the variable store, is refused here.
        """
        at, count = self._metadata(_TDX_METADATA, b"TDVF", 32)
        sections = tuple(
            TdvfSection(*struct.unpack_from("<IIQQII", self.data, at + 32 * number))
            for number in range(count)
        )
        if not sections:
            raise MeasurementError("TDX metadata: no sections", expected="1 or more", found=0)
        pages = sum(self._check_tdvf(number, section) for number, section in enumerate(sections))
        if pages > MAX_METADATA_PAGES:
            raise MeasurementError(
                "TDX metadata: more memory than any firmware needs",
                expected=f"≤ {MAX_METADATA_PAGES} pages",
                found=pages,
            )
        return sections

    def _check_tdvf(self, number: int, section: TdvfSection) -> int:
        """Check one section; return how many pages it has added at launch."""
        what = f"TDX metadata: section {number} ({section.name})"
        end = section.data_offset + section.raw_data_size
        if section.raw_data_size and end > self.size:
            raise MeasurementError(
                f"{what}: its data is past the end of the file",
                expected=f"≤ {self.size} bytes",
                found=end,
                advice="Measure the whole image (variables and code), not OVMF_CODE.fd alone.",
            )
        address, size = section.memory_address, section.memory_data_size
        if address % PAGE_SIZE or size % PAGE_SIZE or address + size > 1 << 52:
            raise MeasurementError(
                f"{what}: not whole pages of memory",
                expected="multiples of 4096 below 2^52",
                found=f"{size} bytes at {address:#x}",
            )
        if section.attributes & ~(TDVF_EXTEND | TDVF_AUGMENT):
            raise MeasurementError(
                f"{what}: unknown attributes", expected="0 to 3", found=f"{section.attributes:#x}"
            )
        if section.attributes == TDVF_EXTEND | TDVF_AUGMENT:
            raise MeasurementError(f"{what}: measured, but not there at launch")
        if section.attributes & TDVF_EXTEND and section.raw_data_size != size:
            raise MeasurementError(
                f"{what}: measured memory is not all in the file",
                expected=f"{size} bytes",
                found=f"{section.raw_data_size} bytes",
            )
        if section.raw_data_size > size:
            raise MeasurementError(
                f"{what}: more data than memory", expected=f"≤ {size}", found=section.raw_data_size
            )
        return 0 if section.attributes & TDVF_AUGMENT else size // PAGE_SIZE
