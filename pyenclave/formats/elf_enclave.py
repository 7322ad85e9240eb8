"""
ELF files as enclave loaders read them: segments, sections by name, relocations, dynamic symbols.

Unlike ``formats.elf``, which reads shared objects as the dynamic loader does, Intel's and Open
Enclave's loaders find their data by section headers too. Only 64-bit little-endian ET_DYN files
for x86-64 are enclaves. Untrusted input: nothing is read before its bounds are known.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyenclave.errors import MeasurementError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

__all__ = ["EnclaveElf", "Section", "Segment"]

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_DYN = struct.Struct("<qQ")
_SYM = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")

_ET_DYN, _EM_X86_64 = 3, 62
PT_LOAD, PT_DYNAMIC, PT_TLS = 1, 2, 7
_SHT_NOBITS, _SHT_DYNSYM = 8, 11
_SHF_ALLOC = 2

_MAX_PROGRAM_HEADERS = 512
_MAX_DYNAMIC = 4096
_MAX_RELOCATIONS = 1 << 22
_MAX_SYMBOLS = 1 << 20
_MAX_NAME = 256
_MAX_ADDRESS = 1 << 56


@dataclass(frozen=True, slots=True)
class Segment:
    """
    A program header of type PT_LOAD or PT_TLS.

    Attributes:
        index: Its place among the program headers.
        type: p_type.
        flags: p_flags: 4 read, 2 write, 1 execute.
        offset: Where its content is in the file.
        vaddr: Where it begins in the enclave.
        filesz: Bytes of content.
        memsz: Bytes in the enclave.
        align: p_align.

    """

    index: int
    type: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int

    @property
    def end(self) -> int:
        """Where it ends in the enclave."""
        return self.vaddr + self.memsz


@dataclass(frozen=True, slots=True)
class Section:
    """A section header, with its name; its bounds are checked when its content is asked for."""

    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    align: int
    entry_size: int

    @property
    def loaded(self) -> bool:
        """Whether it has a place in memory (thread-local zeros have none)."""
        return bool(self.flags & _SHF_ALLOC) and bool(self.size)


class EnclaveElf:
    """
    A checked view of an enclave's file; it copies nothing.

    Args:
        data: The whole file; untrusted.

    Raises:
        MeasurementError: Not such a file, or a segment lies outside it.

    """

    def __init__(self, data: Buffer) -> None:
        self.view = memoryview(data).toreadonly().cast("B")
        if len(self.view) < _EHDR.size or bytes(self.view[:4]) != b"\x7fELF":
            raise MeasurementError("not an ELF file")
        fields = _EHDR.unpack_from(self.view)
        ident, kind, machine = fields[:3]
        self.entry: int = fields[4]
        program, self._section_table = fields[5], fields[6]
        program_size, program_count = fields[9], fields[10]
        self._section_size, self._section_count, self._name_section = fields[11:14]
        if ident[4:7] != b"\x02\x01\x01":
            raise MeasurementError(
                "not a 64-bit little-endian ELF file", expected="020101", found=ident[4:7].hex()
            )
        if kind != _ET_DYN:
            raise MeasurementError("not a shared object", expected="e_type 3", found=kind)
        if machine != _EM_X86_64:
            raise MeasurementError("not for x86-64", expected="e_machine 62", found=machine)
        if program_size != _PHDR.size or not 0 < program_count <= _MAX_PROGRAM_HEADERS:
            raise MeasurementError(
                "program headers of an odd size or number", found=(program_size, program_count)
            )
        self.segments: tuple[Segment, ...] = tuple(self._read_segments(program, program_count))

    def _read_segments(self, table: int, count: int) -> Iterator[Segment]:
        self.tls: Segment | None = None
        self._dynamic_place: tuple[int, int] | None = None
        self.content(table, count * _PHDR.size, "program headers")
        for index in range(count):
            kind, flags, offset, vaddr, _, filesz, memsz, align = _PHDR.unpack_from(
                self.view, table + index * _PHDR.size
            )
            if kind not in (PT_LOAD, PT_DYNAMIC, PT_TLS):
                continue
            what = f"program header {index}"
            self.content(offset, filesz, what)
            if kind == PT_DYNAMIC:
                # The loaders take the first.
                self._dynamic_place = self._dynamic_place or (offset, filesz)
                continue
            if filesz > memsz or vaddr + memsz > _MAX_ADDRESS:
                raise MeasurementError(
                    f"{what}: impossible size",
                    found=f"{filesz:#x} in the file, {memsz:#x} at {vaddr:#x}",
                )
            segment = Segment(index, kind, flags, offset, vaddr, filesz, memsz, align)
            if kind == PT_LOAD:
                yield segment
            elif self.tls is None:
                self.tls = segment
            else:
                raise MeasurementError("two thread-local segments")

    def content(self, offset: int, size: int, what: str) -> memoryview:
        """Return bytes of the file, or refuse by the name *what*."""
        if offset > len(self.view) or size > len(self.view) - offset:
            raise MeasurementError(
                f"{what} lies outside the file",
                expected=f"at most {len(self.view):#x}",
                found=f"{size:#x} bytes at {offset:#x}",
            )
        return self.view[offset : offset + size]

    # ---- sections --------------------------------------------------------------------------------

    def _headers(self) -> Iterator[tuple[Any, ...]]:
        if not self._section_count:
            return
        if self._section_size != _SHDR.size:
            raise MeasurementError(
                "section headers of an odd size", expected=_SHDR.size, found=self._section_size
            )
        size = self._section_count * _SHDR.size
        yield from _SHDR.iter_unpack(self.content(self._section_table, size, "section headers"))

    @cached_property
    def _names(self) -> memoryview:
        headers = list(self._headers())
        if not 0 < self._name_section < len(headers):
            raise MeasurementError(
                "the section of section names does not exist", found=self._name_section
            )
        header = headers[self._name_section]
        return self.content(header[4], header[5], "the section of section names")

    def _section(self, header: tuple[Any, ...], name: str) -> Section:
        _, kind, flags, address, offset, size, _, _, align, entry_size = header
        return Section(name, kind, flags, address, offset, size, align, entry_size)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections in order; for listing, since most files need few of them."""
        return tuple(
            self._section(header, _text(self._names, header[0])) for header in self._headers()
        )

    def section(self, name: str) -> Section | None:
        """
        Return the section of a name, or None.

        Raises:
            MeasurementError: There are two, so that readers could take different ones.

        """
        wanted = name.encode() + b"\0"
        found: Section | None = None
        for header in self._headers():
            at = header[0]
            if self._names[at : at + len(wanted)] == wanted:
                if found is not None:
                    raise MeasurementError(f"two sections are called {name}")
                found = self._section(header, name)
        return found

    def section_content(self, section: Section) -> memoryview:
        """Return what a section has in the file (nothing, if it is all zeros)."""
        if section.type == _SHT_NOBITS:
            return self.view[:0]
        return self.content(section.offset, section.size, f"section {section.name}")

    # ---- addresses -------------------------------------------------------------------------------

    def at_address(self, address: int, size: int, what: str) -> memoryview:
        """Return the bytes that the file puts at an address of the enclave."""
        for segment in self.segments:
            at = address - segment.vaddr
            if at >= 0 and at + size <= segment.filesz:
                return self.view[segment.offset + at : segment.offset + at + size]
        raise MeasurementError(
            f"{what} is not in the content of a segment", found=f"{size:#x} bytes at {address:#x}"
        )

    # ---- the dynamic section ---------------------------------------------------------------------

    @cached_property
    def dynamic(self) -> dict[int, int]:
        """Tags of the dynamic section with their values; of a tag that repeats the last."""
        found: dict[int, int] = {}
        if self._dynamic_place is None:
            return found
        offset, size = self._dynamic_place
        for number, (tag, value) in enumerate(
            _DYN.iter_unpack(self.view[offset : offset + size - size % _DYN.size])
        ):
            if tag == 0:
                return found
            if number >= _MAX_DYNAMIC:
                raise MeasurementError("the dynamic section is too long", expected=_MAX_DYNAMIC)
            found[tag] = value
        raise MeasurementError("the dynamic section has no end")

    def relocations(self, address: int, size: int) -> Iterator[tuple[int, int, int]]:
        """
        Iterate over the relocations (offset, info, addend) of the section at an address.

        Args:
            address: Of a section, as Intel's loader finds it.
            size: In bytes; need not be the section's.

        """
        for header in self._headers():
            if header[3] == address:
                break
        else:
            raise MeasurementError("relocations lie in no section", found=f"{address:#x}")
        if size // _RELA.size > _MAX_RELOCATIONS:
            raise MeasurementError(
                "too many relocations", expected=_MAX_RELOCATIONS, found=size // _RELA.size
            )
        size -= size % _RELA.size
        yield from _RELA.iter_unpack(self.content(header[4], size, "relocations"))

    # ---- dynamic symbols -------------------------------------------------------------------------

    @cached_property
    def _symbol_values(self) -> tuple[memoryview, memoryview] | None:
        table, names = self.section(".dynsym"), self.section(".dynstr")
        if table is None or names is None or table.type != _SHT_DYNSYM:
            return None
        if table.entry_size != _SYM.size:
            raise MeasurementError(
                "symbols of an odd size", expected=_SYM.size, found=table.entry_size
            )
        if table.size // _SYM.size > _MAX_SYMBOLS:
            raise MeasurementError(
                "too many symbols", expected=_MAX_SYMBOLS, found=table.size // _SYM.size
            )
        content = self.section_content(table)
        whole = len(content) - len(content) % _SYM.size
        return content[:whole], self.section_content(names)

    def symbols(self, names: frozenset[str]) -> dict[str, int]:
        """Return the values of those dynamic symbols among *names* that there are."""
        tables = self._symbol_values
        if tables is None:
            return {}
        values, texts = tables
        wanted = {name.encode() + b"\0": name for name in names}
        longest = max(map(len, wanted), default=0)
        found: dict[str, int] = {}
        for index, (at, _, _, _, value, _) in enumerate(_SYM.iter_unpack(values)):
            if index and at:
                text = bytes(texts[at : at + longest])
                name = wanted.get(text[: text.find(b"\0") + 1])
                if name is not None:
                    found.setdefault(name, value)
        return found

    def symbol_value(self, index: int) -> int:
        """Return the value of a dynamic symbol by its number."""
        tables = self._symbol_values
        if tables is None or index >= len(tables[0]) // _SYM.size:
            raise MeasurementError("a relocation names a symbol that does not exist", found=index)
        value: int = _SYM.unpack_from(tables[0], index * _SYM.size)[4]
        return value


def _text(table: memoryview, at: int) -> str:
    """Return a name for people: what is no short plain text is escaped."""
    name, _, _ = bytes(table[at : at + _MAX_NAME]).partition(b"\0")
    text = name.decode("ascii", "backslashreplace")
    return text if text.isprintable() else ascii(text)
