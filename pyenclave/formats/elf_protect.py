"""
What of a shared object can lie behind a protection key, and what cannot be put there.

Read as the loader reads it, from the bytes that will be loaded. Untrusted input. Found are the
pages that the library can still write after it was loaded (``PT_LOAD`` with ``W``, less
``PT_GNU_RELRO``), and every place in executable bytes where a processor could begin to read an
instruction that sets the rights of keys: in the middle of another instruction, too (ERIM, 3.4).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyenclave.errors import ProtectionError
from pyenclave.formats import elf

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["PAGE", "Protectable", "protectable"]

PAGE: Final = 4096
_PREFIX: Final = "pye_ecall_"
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_LOAD, _DYNAMIC, _TLS, _STACK, _RELRO = 1, 2, 7, 0x6474E551, 0x6474E552
_EXECUTE, _WRITE = 1, 2
_MOST: Final = 1 << 30
# WRPKRU (0F 01 EF), XRSTOR (0F AE /5) and XRSTORS (0F C7 /3), the latter two with a memory operand.
_SETS_RIGHTS: Final = re.compile(
    rb"\x0f(?:\x01\xef|\xae[\x28-\x2f\x68-\x6f\xa8-\xaf]|\xc7[\x18-\x1f\x58-\x5f\x98-\x9f])"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protectable:
    """
    A shared object that can lie behind a key.

    Attributes:
        functions: The names of its trusted functions, sorted.
        ranges: Address in the file and size of what is to be behind the key, in whole pages.
        first: The lowest address of a segment, rounded down to a page.

    """

    functions: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    first: int


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    flags: int
    offset: int
    start: int
    end: int
    filesz: int


def _segments(data: memoryview) -> list[_Segment]:
    """Read the program headers, which ``elf.parse`` has checked to lie in the file."""
    fields = _EHDR.unpack_from(data)
    rows = [_PHDR.unpack_from(data, fields[5] + i * _PHDR.size) for i in range(fields[10])]
    return [
        _Segment(kind, flags, offset, vaddr, vaddr + memsz, filesz)
        for kind, flags, offset, vaddr, _, filesz, memsz, _ in rows
    ]


def _down(address: int) -> int:
    return address // PAGE * PAGE


def _up(address: int) -> int:
    return -(-address // PAGE) * PAGE


def _check_kinds(name: str, found: elf.SharedObject, segments: list[_Segment]) -> None:
    if found.machine != "x86_64" or found.executable:
        raise ProtectionError(
            f"{name}: not a shared object for x86-64, where protection keys are",
            found="a program" if found.executable else found.machine,
        )
    if found.writable_code:
        raise ProtectionError(
            f"{name}: code that is written (DT_TEXTREL, or a segment both writable and executable)",
            advice="Compile with -fPIC.",
        )
    stacks = [segment for segment in segments if segment.kind == _STACK]
    if len(stacks) != 1 or stacks[0].flags & _EXECUTE:
        raise ProtectionError(
            f"{name}: asks for executable stacks (PT_GNU_STACK)", advice="Link with -z noexecstack."
        )
    if any(segment.kind == _TLS and segment.start != segment.end for segment in segments):
        raise ProtectionError(
            f"{name}: thread-local variables (PT_TLS) lie with the thread's, outside of any key",
            advice="Use variables, or memory of pyenclave_protected.h.",
        )


def _check_code(name: str, data: memoryview, segments: list[_Segment]) -> None:
    for segment in segments:
        # Whole pages are mapped: what shares the first and the last one is executable, too.
        if segment.kind == _LOAD and segment.flags & _EXECUTE:
            begin = _down(segment.offset)
            end = min(_up(segment.offset + segment.filesz), len(data))
            found = _SETS_RIGHTS.search(data[begin:end])
            if found:
                raise ProtectionError(
                    f"{name}: executable bytes that set the rights of protection keys "
                    "(WRPKRU, XRSTOR)",
                    found=f"{found[0].hex(' ')} at offset {begin + found.start():#x}",
                    advice="They may be the inside of another instruction: change the code there.",
                )


def _ranges(name: str, segments: list[_Segment]) -> tuple[tuple[int, int], ...]:
    loads = [segment for segment in segments if segment.kind == _LOAD]
    relro = [(_down(s.start), _down(s.end)) for s in segments if s.kind == _RELRO]
    dynamic = [s for s in segments if s.kind == _DYNAMIC]
    if len(relro) != 1 or len(dynamic) != 1:
        raise ProtectionError(f"{name}: not linked with -z relro", advice="Link with -z relro.")
    begin, end = relro[0]
    if not begin <= dynamic[0].start <= dynamic[0].end <= end:
        raise ProtectionError(
            f"{name}: its dynamic section, which the loader reads, is not within PT_GNU_RELRO",
            advice="Link with -z relro.",
        )
    found = []
    for segment in loads:
        if segment.flags & _WRITE and segment.end > segment.start:
            low, high = _down(segment.start), _up(segment.end)
            parts = [(low, min(high, begin)), (max(low, end), high)]
            found += [(at, to - at) for at, to in parts if at < to]
    spans = [(_down(s.start), _up(s.end)) for s in loads if not s.flags & _WRITE]
    for at, size in found:
        if size > _MOST or any(low < at + size and at < high for low, high in spans):
            raise ProtectionError(
                f"{name}: writable pages are shared with others, or are too many",
                found=f"{size} bytes at {at:#x}",
            )
    return tuple(found)


def protectable(data: Buffer, name: str) -> Protectable:
    """
    Read what of a shared object is to be put behind a key; untrusted input.

    Args:
        data: The whole file.
        name: What to call it in errors.

    Returns:
        Its functions and its writable pages.

    Raises:
        ProtectionError: It has what cannot be protected, or could open the key itself.
        ImageError: It is not a well-formed shared object.

    """
    view = memoryview(data).cast("B")
    found = elf.parse(view, name)
    segments = _segments(view)
    _check_kinds(name, found, segments)
    _check_code(name, view, segments)
    loads = [segment.start for segment in segments if segment.kind == _LOAD]
    functions = elf.exported(view, name, _PREFIX)
    if not functions:
        raise ProtectionError(f"{name}: no function of PYE_ECALL", expected=f"{_PREFIX}…")
    return Protectable(functions=functions, ranges=_ranges(name, segments), first=_down(min(loads)))
