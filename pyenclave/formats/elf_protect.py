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
_MOST_ADDRESS: Final = 1 << 40
_MOST_RANGES: Final = 16
_MOST_FUNCTIONS: Final = 1024
# WRPKRU (0F 01 EF; with APX's prefix for 0F: D5 80 … FF), XRSTOR (0F AE /5) and XRSTORS (0F C7 /3),
# the latter two with a memory operand; APX's prefix makes these two invalid.
_SETS_RIGHTS: Final = re.compile(
    rb"\x0f(?:\x01\xef|\xae[\x28-\x2f\x68-\x6f\xa8-\xaf]|\xc7[\x18-\x1f\x58-\x5f\x98-\x9f])"
    rb"|\xd5[\x80-\xff]\x01\xef"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protectable:
    """
    A shared object that can lie behind a key.

    Attributes:
        functions: The names of its trusted functions, sorted.
        ranges: Address in the file and size of what is to be behind the key, in whole pages.
        variables: Names and addresses in the file of what is exported of that.
        first: The lowest address of a segment, rounded down to a page.

    """

    functions: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    variables: tuple[tuple[str, int], ...]
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
            f"{name}: code that is written (text relocations, or a segment both writable and "
            "executable)",
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


def _check_order(name: str, segments: list[_Segment]) -> None:
    """Each page is of one segment: else what is mapped depends on who maps."""
    after = 0
    for segment in segments:
        low, high = _down(segment.start), _up(segment.end)
        if segment.kind == _LOAD and low < high:
            if low < after or high > _MOST_ADDRESS:
                raise ProtectionError(
                    f"{name}: segments that are not in order, or share pages with others",
                    found=f"{segment.end - segment.start} bytes at {segment.start:#x}",
                )
            after = high


def _check_code(name: str, data: memoryview, segments: list[_Segment]) -> None:
    before, offset = b"", 0  # the last bytes of the segment before, and where the next one begins
    follows = -1
    for segment in segments:
        if segment.kind != _LOAD or not segment.flags & _EXECUTE:
            continue
        # Whole pages are mapped: what shares the first and the last one is executable, too. An
        # instruction may begin in one segment and end in the next.
        begin = _down(segment.offset)
        end = min(_up(segment.offset + segment.filesz), len(data))
        head = before if _down(segment.start) == follows else b""
        found = _SETS_RIGHTS.search(head + data[begin:end])
        if found:
            at = found.start() - len(head)
            raise ProtectionError(
                f"{name}: executable bytes that set the rights of protection keys (WRPKRU, XRSTOR)",
                found=f"{found[0].hex(' ')} at offset {begin + at if at >= 0 else offset + at:#x}",
                advice="They may be the inside of another instruction: change the code there.",
            )
        before, offset, follows = bytes(data[begin:end][-3:]), end, _up(segment.end)


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
        if segment.flags & _WRITE:
            low, high = _down(segment.start), _up(segment.end)
            parts = [(low, min(high, begin)), (max(low, end), high)]
            found += [(at, to - at) for at, to in parts if at < to]
    if len(found) > _MOST_RANGES or sum(size for _, size in found) > _MOST:
        raise ProtectionError(
            f"{name}: too many variables",
            expected=f"at most {_MOST} bytes in {_MOST_RANGES} places",
            found=f"{sum(size for _, size in found)} in {len(found)}",
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
    _check_order(name, segments)
    _check_code(name, view, segments)
    loads = [segment.start for segment in segments if segment.kind == _LOAD]
    functions = elf.exported(view, name, _PREFIX)
    if not functions:
        raise ProtectionError(f"{name}: no function of PYE_ECALL", expected=f"{_PREFIX}…")
    if len(functions) > _MOST_FUNCTIONS:
        raise ProtectionError(
            f"{name}: too many functions of PYE_ECALL",
            expected=f"at most {_MOST_FUNCTIONS}",
            found=len(functions),
        )
    ranges = _ranges(name, segments)
    return Protectable(
        functions=functions,
        ranges=ranges,
        variables=tuple(
            (text, at)
            for text, at in elf.variables(view, name)
            if any(start <= at < start + size for start, size in ranges)
        ),
        first=_down(min(loads)),
    )
