"""
Intel SGX SDK enclaves (``*.signed.so``): the metadata in the file, and the pages it leads to.

Follows what Intel's loader and signing tool do (psw/urts/loader.cpp, psw/urts/parser,
common/inc/internal/metadata.h of linux-sgx). Untrusted input: every offset and count is bounded
before it is used, and what no known signing tool makes is refused by name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyenclave.errors import MeasurementError
from pyenclave.formats.elf_enclave import EnclaveElf, Segment
from pyenclave.measurement.enclave import (
    MAX_RUNS,
    PAGE_SIZE,
    Layout,
    Patches,
    Run,
    page_down,
    page_up,
    segment_runs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

__all__ = ["METADATA_SECTION", "MetadataBlock", "blocks", "layout", "metadata_blocks"]

METADATA_SECTION = ".note.sgxmeta"

_NOTE_NAME = b"sgx_metadata\0"
_MAGIC = 0x86A80294635D0E4C
_HEAD = struct.Struct("<QIIIIIIIIQ")
_SIGSTRUCT_AT, _SIGSTRUCT_SIZE = 64, 1808
_DIRECTORIES_AT = _SIGSTRUCT_AT + _SIGSTRUCT_SIZE
_SMALLEST = _DIRECTORIES_AT + 16
_MAX_BLOCKS = 16

_ENTRY = struct.Struct("<HHIQIIQ")
_GROUP = struct.Struct("<HHIQ16s")
_PATCH = struct.Struct("<QII16x")
_RANGE = struct.Struct("<QQQ")
_EXTENSION = struct.Struct("<IIII")
_SHARED_OBJECT = struct.Struct("<QQQQ")
_FIPS_SHARED_OBJECT = 0x1002

_GROUP_BIT = 1 << 12
_EADD, _EEXTEND = 1, 2
_FLAGS_TCS, _FLAGS_REG = 0x100, 0x200
_TCS_ADDRESSES = (16, 48, 56)  # OSSA, OFSBASE, OGSBASE
_R_NONE = 0
_DT_RELA, _DT_RELASZ, _DT_PLTRELSZ, _DT_TEXTREL, _DT_JMPREL = 7, 8, 2, 22, 23

# Names of layout entries, for people only: attributes and flags say what is done. Version 1.3 had
# another list.
_NAMES_1_3 = {1: "heap", 2: "TCS", 3: "thread data", 4: "SSA", 5: "stack", 7: "guard"}
_NAMES = {
    1: "heap", 2: "heap", 3: "heap", 4: "TCS", 5: "thread data", 6: "SSA", 7: "stack", 8: "stack",
    10: "guard", 11: "dynamic heap", 12: "dynamic heap", 13: "dynamic heap", 14: "dynamic TCS",
    15: "dynamic thread data", 16: "dynamic SSA", 17: "dynamic stack", 18: "dynamic stack",
    20: "reserved memory", 21: "reserved memory", 22: "reserved memory", 23: "user region",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataBlock:
    """
    One metadata block; signers put several for several versions of the loader into one file.

    Attributes:
        offset: Of the block in the note's description.
        version: (major, minor) as it stands; a major above 10 means that there is an ELRANGE.
        data: The block.
        ssa_frame_size: In pages.
        enclave_size: In bytes, of the image without ELRANGE.

    """

    offset: int
    version: tuple[int, int]
    data: memoryview
    ssa_frame_size: int
    enclave_size: int

    @property
    def sigstruct(self) -> bytes:
        """The 1808 bytes of SIGSTRUCT."""
        return bytes(self.data[_SIGSTRUCT_AT:_DIRECTORIES_AT])

    @property
    def name(self) -> str:
        """The version as text."""
        return f"{self.version[0]}.{self.version[1]}"

    def part(self, offset: int, size: int, what: str) -> memoryview:
        """Return bytes of the block, or refuse by the name *what*."""
        if offset > len(self.data) or size > len(self.data) - offset:
            raise MeasurementError(
                f"metadata {self.name}: {what} lies outside the block",
                expected=f"at most {len(self.data)}",
                found=f"{size} bytes at {offset}",
            )
        return self.data[offset : offset + size]

    def directory(self, index: int, what: str, entry: int) -> memoryview:
        """Return what directory *index* points to: whole entries of *entry* bytes."""
        place = self.part(_DIRECTORIES_AT + 8 * index, 8, f"directory of {what}")
        offset, size = struct.unpack("<II", place)
        found = self.part(offset, size, what)
        if size % entry:
            raise MeasurementError(
                f"metadata {self.name}: {what} has a broken entry",
                expected=f"a multiple of {entry}",
                found=size,
            )
        return found


def metadata_blocks(elf: EnclaveElf) -> tuple[int, tuple[MetadataBlock, ...]]:
    """
    Find the metadata of an enclave.

    Args:
        elf: The file.

    Returns:
        Where the metadata begins in the file, and its blocks in their order, at least one.

    Raises:
        MeasurementError: There is none, or it is malformed.

    """
    section = elf.section(METADATA_SECTION)
    if section is None:
        raise MeasurementError(
            f"the file has no section {METADATA_SECTION}",
            advice="An enclave gets it when it is signed: give the signed file.",
        )
    note = elf.section_content(section)
    if len(note) < 12:
        raise MeasurementError("the metadata note is cut off", expected=12, found=len(note))
    name_size, size, _ = struct.unpack_from("<III", note)
    if name_size != len(_NOTE_NAME) or note[12 : 12 + name_size] != _NOTE_NAME:
        raise MeasurementError(
            "the metadata note has another name", expected=_NOTE_NAME, found=bytes(note[12:25])
        )
    start = 12 + name_size
    if size > len(note) - start:
        raise MeasurementError(
            "the metadata note is cut off", expected=size, found=len(note) - start
        )
    # Unlike other notes this one has no padding after its name.
    found = tuple(_blocks(note[start : start + size]))
    if not found:
        raise MeasurementError(
            "the metadata note holds no metadata",
            expected=f"{_MAGIC:#x}",
            advice="The enclave is not signed yet: give the signed file.",
        )
    return section.offset + start, found


def _blocks(data: memoryview) -> Iterator[MetadataBlock]:
    at = 0
    for _ in range(_MAX_BLOCKS):
        if len(data) - at < 8 or int.from_bytes(data[at : at + 8], "little") != _MAGIC:
            return
        if len(data) - at < _SMALLEST:
            raise MeasurementError(
                "a metadata block is cut off", expected=_SMALLEST, found=len(data) - at
            )
        _, minor, major, size, _, frame, _, _, _, enclave_size = _HEAD.unpack_from(data, at)
        if not _SMALLEST <= size <= len(data) - at:
            raise MeasurementError(
                "a metadata block has an impossible size",
                expected=f"{_SMALLEST} to {len(data) - at}",
                found=size,
            )
        if major % 10 not in (1, 2, 3) or major >= 20:
            raise MeasurementError(
                "metadata of an unknown version", expected="1.x to 3.x", found=f"{major}.{minor}"
            )
        yield MetadataBlock(
            offset=at,
            version=(major, minor),
            data=data[at : at + size],
            ssa_frame_size=frame,
            enclave_size=enclave_size,
        )
        at += size
    raise MeasurementError("too many metadata blocks", expected=_MAX_BLOCKS)


def blocks(data: Buffer) -> list[Layout]:
    """
    Read a signed enclave: one layout for each metadata block.

    Args:
        data: The whole file; untrusted input.

    Returns:
        The layouts in the order of the blocks. Equal blocks give equal runs.

    Raises:
        MeasurementError: No enclave of the SDK, a malformed one, or one that no loader would take.

    """
    elf = EnclaveElf(data)
    _, found = metadata_blocks(elf)
    return [layout(elf, block) for block in found]


def layout(elf: EnclaveElf, block: MetadataBlock) -> Layout:
    """
    Work out what the loader builds from one metadata block.

    Args:
        elf: The file.
        block: One of its metadata blocks.

    Raises:
        MeasurementError: The block or the file is malformed.

    """
    size, shift = _range(block)
    runs = list(_segments(elf, block))
    runs += _Table(block, len(runs)).runs()
    if shift:
        runs = [run._replace(offset=run.offset + shift) for run in runs]
    details: dict[str, Any] = {"metadata_version": block.name}
    return Layout(
        kind="sgx-sdk-elf",
        size=size,
        ssa_frame_size=block.ssa_frame_size,
        runs=runs,
        sigstruct=block.sigstruct,
        details=details,
        places=lambda: places(elf, shift),
    )


def places(elf: EnclaveElf, shift: int = 0) -> list[tuple[int, int, str]]:
    """List (start, end, name) of the sections that are loaded, ascending."""
    return sorted(
        (section.address + shift, section.address + section.size + shift, section.name)
        for section in elf.sections
        if section.loaded
    )


def _range(block: MetadataBlock) -> tuple[int, int]:
    """Return the size for ECREATE, and what is added to every page's offset."""
    if block.version[0] <= 10:
        return block.enclave_size, 0
    data = block.directory(2, "ELRANGE", _RANGE.size)
    if len(data) != _RANGE.size:
        raise MeasurementError(
            f"metadata {block.name} has no single ELRANGE", expected=_RANGE.size, found=len(data)
        )
    image, start, size = _RANGE.unpack(data)
    if (
        image % PAGE_SIZE
        or start % PAGE_SIZE
        or not start <= image < start + size
        or image + block.enclave_size > start + size
        or size & (size - 1)
        or start & (size - 1)
    ):
        raise MeasurementError(
            f"metadata {block.name}: impossible ELRANGE",
            found=f"image at {image:#x}, {size:#x} bytes from {start:#x}",
        )
    return size, image - start


# ---- segments ------------------------------------------------------------------------------------


def _segments(elf: EnclaveElf, block: MetadataBlock) -> Iterator[Run]:
    parts = [(segment, 0, elf.view) for segment in elf.segments]
    parts += _shared_object(elf, block)
    writable = sorted(_relocated_pages(elf))
    patches = _patches(elf, block)
    quirk = block.version == (1, 3)
    last: tuple[int, int, int] | None = None  # vaddr, memsz and flags of the highest segment
    for number, (segment, shift, view) in enumerate(parts):
        address, flags = segment.vaddr + shift, _flags(segment)
        if quirk:
            yield from _trailing_page(last, page_down(address))
            if address > (last[0] if last else 0):
                last = (address, segment.memsz, flags)
        over = Patches()
        for at, octets in patches:
            # Where the patched bytes of the file come to lie in the enclave, if they do.
            place = at - segment.offset - (len(elf.view) - len(view))
            low, high = max(place, 0), min(place + len(octets), segment.filesz)
            if low < high:
                over.add(address + low, octets[low - place : high - place])
        yield from segment_runs(
            f"segment {number}",
            address,
            view[segment.offset : segment.offset + segment.filesz],
            page_up(address + segment.memsz) if segment.memsz else page_down(address),
            flags,
            patches=over,
            writable=writable,
        )
    if quirk:
        yield from _trailing_page(last, None)


def _flags(segment: Segment) -> int:
    access = (segment.flags >> 2 & 1) | (segment.flags & 2) | (segment.flags & 1) << 2
    if not access:
        raise MeasurementError(f"program header {segment.index}: a segment without any access")
    return _FLAGS_REG | access


def _trailing_page(last: tuple[int, int, int] | None, below: int | None) -> Iterator[Run]:
    """Yield the page that loaders of version 1.3 added after a segment that is not aligned."""
    if last is None:
        return
    address, size, flags = last
    at = page_up(address + size)
    if at < page_up(page_up(size) + address) and (below is None or at < below):
        yield Run(at, 1, flags, 0, "trailing page (1.3)")


def _patches(elf: EnclaveElf, block: MetadataBlock) -> list[tuple[int, memoryview]]:
    """Return (offset in the file, bytes) of what the loader writes over the file."""
    found = []
    total = 0
    for at, source, size in _PATCH.iter_unpack(block.directory(0, "patches", _PATCH.size)):
        what = "what a patch overwrites"
        elf.content(at, size, what)
        total += size
        if total > len(elf.view):
            raise MeasurementError("too much is patched", expected=len(elf.view), found=total)
        found.append((at, block.part(source, size, "a patch")))
    return found


def _relocated_pages(elf: EnclaveElf) -> set[int]:
    """Return the pages that text relocations make writable."""
    dynamic = elf.dynamic
    pages: set[int] = set()
    if _DT_TEXTREL not in dynamic:
        return pages
    for table, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
        if table not in dynamic:
            continue
        for address, info, _ in elf.relocations(dynamic[table], dynamic.get(size, 0)):
            if info & 0xFFFFFFFF != _R_NONE:
                pages.add(page_down(address))
                pages.add(page_down(address + 7))
    return pages


def _shared_object(elf: EnclaveElf, block: MetadataBlock) -> list[tuple[Segment, int, memoryview]]:
    """Return the segments of a FIPS module that is appended to the file, if there is one."""
    major, minor = block.version[0] % 10, block.version[1]
    if major == 2 or (major == 1 and minor < 5) or (major == 3 and minor < 2):
        return []
    data = block.directory(3, "extensions", 1)
    for at in range(0, len(data) - _EXTENSION.size + 1, _EXTENSION.size):
        kind, size, offset, _ = _EXTENSION.unpack_from(data, at)
        if kind == _FIPS_SHARED_OBJECT and size and offset:
            break
    else:
        return []
    start, address, length, _ = _SHARED_OBJECT.unpack(
        block.part(offset, _SHARED_OBJECT.size, "the shared object's entry")
    )
    if address % PAGE_SIZE or address > block.enclave_size:
        raise MeasurementError("the shared object lies outside the enclave", found=f"{address:#x}")
    if start + length != len(elf.view):
        raise MeasurementError(
            "the shared object is not at the end of the file",
            expected=len(elf.view),
            found=start + length,
        )
    module = EnclaveElf(elf.content(start, length, "the shared object"))
    return [(segment, address, module.view) for segment in module.segments]


# ---- the layout table ----------------------------------------------------------------------------


class _Table:
    """
    The layout table: heap and threads.

    Args:
        block: The metadata block.
        before: How many runs there are already.

    """

    def __init__(self, block: MetadataBlock, before: int) -> None:
        self.block = block
        self.data = block.directory(1, "layout table", _ENTRY.size)
        self.names = _NAMES_1_3 if block.version == (1, 3) else _NAMES
        self.room = MAX_RUNS - before

    def runs(self) -> Iterator[Run]:
        """Iterate over the runs in the order in which the loader adds them."""
        entries: list[tuple[int, ...] | None] = []  # None: a group
        for at in range(0, len(self.data), _ENTRY.size):
            if int.from_bytes(self.data[at : at + 2], "little") & _GROUP_BIT:
                yield from self._group(at, entries)
                entries.append(None)
            else:
                entry = _ENTRY.unpack_from(self.data, at)
                entries.append(entry)
                self._spend(1)
                yield from self._entry(entry, 0, "")

    def _spend(self, number: int) -> None:
        self.room -= number
        if self.room < 0:
            raise MeasurementError(
                f"metadata {self.block.name}: the layout has too many parts", expected=MAX_RUNS
            )

    def _group(self, at: int, entries: list[tuple[int, ...] | None]) -> Iterator[Run]:
        _, count, times, step, _ = _GROUP.unpack_from(self.data, at)
        if count > len(entries):
            raise MeasurementError(
                f"metadata {self.block.name}: a group of entries that are not there",
                expected=f"at most {len(entries)}",
                found=count,
            )
        if times * step > self.block.enclave_size:
            raise MeasurementError(
                f"metadata {self.block.name}: a group repeats beyond the enclave",
                expected=f"at most {self.block.enclave_size:#x}",
                found=f"{times} times {step:#x}",
            )
        self._spend(count * times)
        group = entries[len(entries) - count :]
        for number in range(1, times + 1) if count else ():
            for entry in group:
                if entry is None:
                    raise MeasurementError(f"metadata {self.block.name}: a group holds a group")
                yield from self._entry(entry, number * step, f", repeat {number}")

    def _entry(self, entry: tuple[int, ...], shift: int, note: str) -> Iterator[Run]:
        number, attributes, pages, address, size, offset, flags = entry
        address += shift
        what = self.names.get(number, f"layout entry {number}") + note
        if address % PAGE_SIZE or address + pages * PAGE_SIZE > self.block.enclave_size:
            raise MeasurementError(
                f"{what}: pages outside the enclave",
                expected=f"below {self.block.enclave_size:#x}",
                found=f"{pages} pages at {address:#x}",
            )
        if not attributes & _EADD:
            return
        chunks = 0xFFFF if attributes & _EEXTEND else 0
        if not offset:
            if flags:
                yield Run(address, pages, flags, size, what, chunks)
            return
        content = self.block.part(offset, size, what)
        if flags == _FLAGS_TCS:
            page = _thread_control(content, address, what)
            for index in range(pages):
                self._spend(1)
                yield Run(address + index * PAGE_SIZE, 1, flags, page, what, chunks)
        else:
            end = address + max(pages * PAGE_SIZE, page_up(size))
            # The loader measures this content whatever the attributes say.
            yield from segment_runs(what, address, content, end, flags)


def _thread_control(template: memoryview, address: int, what: str) -> bytes:
    """Return a TCS: the template, with the page's own address added to three fields."""
    if len(template) > PAGE_SIZE:
        raise MeasurementError(f"{what}: longer than a page", found=len(template))
    page = bytearray(PAGE_SIZE)
    page[: len(template)] = template
    for at in _TCS_ADDRESSES:
        value = int.from_bytes(page[at : at + 8], "little") + address
        page[at : at + 8] = (value & (1 << 64) - 1).to_bytes(8, "little")
    return bytes(page)
