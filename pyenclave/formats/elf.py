"""
Shared objects: what a 64-bit ELF file is called, what it needs, what it exports.

Read as the dynamic loader reads it (System V ABI, chapters 4 and 5): by program headers and the
dynamic section, never by section headers, which a file may lack or lie about. Untrusted input.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyenclave.errors import ImageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MACHINES", "SharedObject", "exported", "is_elf", "parse", "variables"]

# e_machine of the platforms on which enclaves run.
MACHINES = {62: "x86_64", 183: "aarch64"}

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_DYN = struct.Struct("<qQ")
_SYM = struct.Struct("<IBBHQQ")

_ET_EXEC, _ET_DYN = 2, 3
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ = 0, 1, 4, 5, 6, 10
_DT_SYMENT, _DT_SONAME, _DT_TEXTREL, _DT_FLAGS, _DT_GNU_HASH = 11, 14, 22, 30, 0x6FFFFEF5
_DT_SYMBOLIC = 16
_DF_SYMBOLIC, _DF_TEXTREL = 2, 4

_STB_GLOBAL, _STB_WEAK, _STB_UNIQUE, _STT_OBJECT, _STV_PROTECTED = 1, 2, 10, 1, 3

_MAX_PROGRAM_HEADERS = 512
_MAX_DYNAMIC = 4096
_MAX_STRING = 4096
_MAX_SYMBOLS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedObject:
    """
    What the dynamic loader is told by a file.

    Attributes:
        machine: ``x86_64`` or ``aarch64``.
        soname: DT_SONAME, empty if there is none.
        needs: DT_NEEDED, in order.
        executable: Whether it is a program (ET_EXEC) rather than ET_DYN.
        writable_code: Whether a segment is both writable and executable, or the loader is to write
            into code (DT_TEXTREL, DF_TEXTREL).

    """

    machine: str
    soname: str
    needs: tuple[str, ...]
    executable: bool
    writable_code: bool


def is_elf(data: Buffer) -> bool:
    """Tell whether *data* begins like an ELF file."""
    return bytes(memoryview(data).cast("B")[:4]) == b"\x7fELF"


class _File:
    """A checked view: every read is inside the file, or an ImageError that names the file."""

    def __init__(self, data: Buffer, name: str) -> None:
        self.view = memoryview(data).toreadonly().cast("B")
        self.name = name
        self.loads: list[tuple[int, int, int]] = []  # (vaddr, offset, bytes in the file)
        self.dynamic: dict[int, list[int]] = {}
        self.writable_code = False
        self.type = 0
        self.machine = ""
        self._read_headers()

    def wrong(self, what: str, *, expected: object = None, found: object = None) -> ImageError:
        return ImageError(f"{self.name}: {what}", expected=expected, found=found)

    def unpack(self, layout: struct.Struct, offset: int) -> tuple[int, ...]:
        if not 0 <= offset <= len(self.view) - layout.size:
            raise self.wrong("ELF structure lies outside the file", found=f"offset {offset:#x}")
        return layout.unpack_from(self.view, offset)

    def _read_headers(self) -> None:
        if len(self.view) < _EHDR.size or not is_elf(self.view):
            raise self.wrong("not an ELF file")
        fields = _EHDR.unpack_from(self.view)
        ident, self.type, machine, phoff, ehsize = (
            fields[0],
            fields[1],
            fields[2],
            fields[5],
            fields[8],
        )
        phentsize, phnum = fields[9], fields[10]
        if ident[4:7] != b"\x02\x01\x01":
            raise self.wrong("not a 64-bit little-endian ELF file", found=ident[4:7].hex())
        if self.type not in (_ET_EXEC, _ET_DYN):
            raise self.wrong("not a program or shared object", found=f"e_type {self.type}")
        if machine not in MACHINES:
            raise self.wrong(
                "ELF file is for another machine", expected=list(MACHINES.values()), found=machine
            )
        self.machine = MACHINES[machine]
        if ehsize != _EHDR.size or phentsize != _PHDR.size or not 0 < phnum <= _MAX_PROGRAM_HEADERS:
            raise self.wrong("ELF header has odd sizes", found=(ehsize, phentsize, phnum))
        dynamic: tuple[int, int] | None = None
        for index in range(phnum):
            kind, flags, offset, vaddr, _, filesz, memsz, _ = self.unpack(
                _PHDR, phoff + index * _PHDR.size
            )
            if kind == _PT_LOAD:
                if offset + filesz > len(self.view) or filesz > memsz:
                    raise self.wrong("a segment lies outside the file")
                self.loads.append((vaddr, offset, filesz))
                self.writable_code |= flags & 3 == 3
            elif kind == _PT_DYNAMIC:
                if dynamic is not None:
                    raise self.wrong("two dynamic sections")
                dynamic = (vaddr, filesz)
        if dynamic is not None:
            self._read_dynamic(*dynamic)

    def _read_dynamic(self, vaddr: int, size: int) -> None:
        # By address, as the loader does; p_offset could say something else.
        offset, room = self.locate(vaddr)
        if size > room or size // _DYN.size > _MAX_DYNAMIC:
            raise self.wrong("dynamic section is too long", found=size)
        for index in range(size // _DYN.size):
            tag, value = self.unpack(_DYN, offset + index * _DYN.size)
            if tag == _DT_NULL:
                return
            self.dynamic.setdefault(tag, []).append(value)
        raise self.wrong("dynamic section has no end")

    def locate(self, vaddr: int) -> tuple[int, int]:
        """Return the offset of an address, and how many bytes of its segment follow there."""
        for start, offset, size in self.loads:
            if start <= vaddr < start + size:
                return offset + (vaddr - start), size - (vaddr - start)
        raise self.wrong("an address lies in no segment", found=f"{vaddr:#x}")

    def one(self, tag: int, what: str) -> int:
        values = self.dynamic.get(tag, [])
        if len(values) != 1:
            raise self.wrong(f"dynamic section has {len(values)} {what}", expected=1)
        return values[0]

    def string_table(self) -> memoryview:
        offset, room = self.locate(self.one(_DT_STRTAB, "DT_STRTAB"))
        size = self.one(_DT_STRSZ, "DT_STRSZ")
        if size > room:
            raise self.wrong("string table is too long", found=size)
        return self.view[offset : offset + size]

    def string(self, table: memoryview, at: int) -> str:
        if not 0 <= at < len(table):
            raise self.wrong("a name lies outside the string table", found=at)
        text, nul, _ = bytes(table[at : at + _MAX_STRING]).partition(b"\0")
        if not nul:
            raise self.wrong("a name has no end")
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a name is not UTF-8", found=text) from None

    def symbol_count(self) -> int:
        """Count the dynamic symbols by the hash table; the file says it nowhere else."""
        if _DT_HASH in self.dynamic:
            offset, _ = self.locate(self.one(_DT_HASH, "DT_HASH"))
            count = self.unpack(struct.Struct("<II"), offset)[1]
        elif _DT_GNU_HASH in self.dynamic:
            count = self._gnu_count()
        else:
            count = 0
        if count > _MAX_SYMBOLS:
            raise self.wrong("too many symbols", expected=f"<= {_MAX_SYMBOLS}", found=count)
        return count

    def _gnu_count(self) -> int:
        word = struct.Struct("<I")
        offset, room = self.locate(self.one(_DT_GNU_HASH, "DT_GNU_HASH"))
        buckets, first, bloom, _ = self.unpack(struct.Struct("<IIII"), offset)
        chains = 16 + 8 * bloom + 4 * buckets
        if chains > room:
            raise self.wrong("symbol hash table is too long", found=chains)
        start = offset + 16 + 8 * bloom
        heads = struct.unpack_from(f"<{buckets}I", self.view, start)
        last = max(heads, default=0)
        if last < first:
            return first
        # The chain of the highest bucket is the last one; bit 0 marks its end.
        for _step in range(_MAX_SYMBOLS):
            if self.unpack(word, offset + chains + 4 * (last - first))[0] & 1:
                return last + 1
            last += 1
        raise self.wrong("symbol hash table has no end")

    def flags(self, flag: int, tag: int) -> bool:
        """Tell whether DT_FLAGS has *flag*, or the dynamic section the *tag* that says the same."""
        return tag in self.dynamic or any(flags & flag for flags in self.dynamic.get(_DT_FLAGS, ()))

    def symbols(self) -> Iterator[tuple[str, int, int, int]]:
        """Iterate over what is defined: names, st_info, st_other and addresses."""
        count = self.symbol_count()
        if not count:
            return
        if self.dynamic.get(_DT_SYMENT, [_SYM.size]) != [_SYM.size]:
            raise self.wrong("symbols have an odd size")
        offset, room = self.locate(self.one(_DT_SYMTAB, "DT_SYMTAB"))
        if count * _SYM.size > room:
            raise self.wrong("symbol table is too long", found=count)
        table = self.string_table()
        for index in range(1, count):
            name, info, other, section, address, _ = _SYM.unpack_from(
                self.view, offset + index * _SYM.size
            )
            # Defined, not STB_LOCAL, STV_DEFAULT or STV_PROTECTED.
            if info >> 4 != 0 and section != 0 and other & 3 in (0, 3):
                yield self.string(table, name), info, other, address


def parse(data: Buffer, name: str) -> SharedObject:
    """
    Read what the dynamic loader is told by a file; untrusted input.

    Args:
        data: The whole file.
        name: What to call it in errors.

    Returns:
        Its name and its needs.

    Raises:
        ImageError: Not a 64-bit little-endian program or shared object, or a malformed one.

    """
    file = _File(data, name)
    soname, needs = "", ()  # type: tuple[str, tuple[str, ...]]
    if _DT_SONAME in file.dynamic or _DT_NEEDED in file.dynamic:
        table = file.string_table()
        needs = tuple(file.string(table, at) for at in file.dynamic.get(_DT_NEEDED, ()))
        if _DT_SONAME in file.dynamic:
            soname = file.string(table, file.one(_DT_SONAME, "DT_SONAME"))
    for text in (*needs, *((soname,) if _DT_SONAME in file.dynamic else ())):
        if not text or not text.isprintable() or len(text) > 255:
            raise file.wrong("a SONAME is not a short printable text", found=repr(text[:80]))
    return SharedObject(
        machine=file.machine,
        soname=soname,
        needs=needs,
        executable=file.type == _ET_EXEC,
        writable_code=file.writable_code or file.flags(_DF_TEXTREL, _DT_TEXTREL),
    )


def exported(data: Buffer, name: str, prefix: str = "") -> tuple[str, ...]:
    """
    Return the names that a shared object exports; untrusted input.

    Args:
        data: The whole file.
        name: What to call it in errors.
        prefix: Only names that begin so, and without it.

    Returns:
        The names, sorted.

    Raises:
        ImageError: As for ``parse``.

    """
    file = _File(data, name)
    return tuple(
        sorted(
            {
                text.removeprefix(prefix)
                for text, info, _, _ in file.symbols()
                if info >> 4 in (_STB_GLOBAL, _STB_WEAK) and text.startswith(prefix)
            }
        )
    )


def variables(data: Buffer, name: str) -> tuple[tuple[str, int], ...]:
    """
    Return the variables that the loader may take from another object; untrusted input.

    These are exported ones: the loader gives one of each name to all, and this shared object may
    not be the one whose variable that is.

    Args:
        data: The whole file.
        name: What to call it in errors.

    Returns:
        Names and addresses in the file, sorted.

    Raises:
        ImageError: As for ``parse``.

    """
    file = _File(data, name)
    own = file.flags(_DF_SYMBOLIC, _DT_SYMBOLIC)
    return tuple(
        sorted(
            {
                (text, address)
                for text, info, other, address in file.symbols()
                if info & 15 == _STT_OBJECT
                and (info >> 4 == _STB_UNIQUE or not (own or other & 3 == _STV_PROTECTED))
            }
        )
    )
