"""Synthetic enclaves, and a slow reference that knows nothing of the code under test."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

PAGE = 4096
MAGIC = 0x86A80294635D0E4C


@dataclass
class Seg:
    """A PT_LOAD segment: where, what, how long in memory, p_flags."""

    vaddr: int
    content: bytes
    memsz: int
    flags: int


@dataclass
class Sdk:
    """An enclave of Intel's SDK, in words rather than bytes."""

    segments: list[Seg]
    version: tuple[int, int] = (1, 4)
    size: int = 1 << 24
    ssa: int = 1
    # (attributes, pages, rva, fill or content, flags), or ("group", count, times, step)
    table: list[tuple] = field(default_factory=list)
    patches: list[tuple[int, int, bytes]] = field(default_factory=list)  # segment, at, bytes
    elrange: tuple[int, int, int] | None = None
    relocations: list[tuple[int, int]] | None = None  # offset, type; None: no DT_TEXTREL
    blocks: int = 1
    sigstruct: bytes = bytes(1808)


def elf_file(
    segments: list[Seg],
    sections: list[tuple[str, int, int, int, bytes, int, int]],
    *,
    entry: int = 0x1234,
    extra_headers: list[tuple[int, int, int, int, bytes, int, int]] = (),
    patch_offsets: dict[int, int] | None = None,
) -> bytes:
    """Lay out an ELF file. Sections: name, type, flags, address, content, align, entry size.

    Section content that is an int is a size without content (NOBITS). Extra program headers:
    type, flags, vaddr, memsz, content or an int offset, filesz, align.
    """
    count = len(segments) + len(extra_headers)
    out = bytearray(64 + 56 * count)
    headers = b""
    for number, seg in enumerate(segments):
        out += bytes(-len(out) % 16 + 5)  # odd places: the file's offsets mean nothing
        if patch_offsets is not None:
            patch_offsets[number] = len(out)
        headers += struct.pack(
            "<IIQQQQQQ", 1, seg.flags, len(out), seg.vaddr, 0, len(seg.content), seg.memsz, PAGE
        )
        out += seg.content
    for kind, flags, vaddr, memsz, content, filesz, align in extra_headers:
        at = len(out)
        out += content
        headers += struct.pack("<IIQQQQQQ", kind, flags, at, vaddr, 0, filesz, memsz, align)
    names = b"\0"
    table = bytes(64)
    for name, kind, flags, address, content, align, entry_size in sections:
        at = len(out)
        size = content
        if isinstance(content, bytes):
            out += content
            size = len(content)
        table += struct.pack(
            "<IIQQQQIIQQ", len(names), kind, flags, address, at, size, 0, 0, align, entry_size
        )
        names += name.encode() + b"\0"
    table += struct.pack("<IIQQQQIIQQ", len(names), 3, 0, 0, len(out), len(names) + 10, 0, 0, 1, 0)
    names += b".shstrtab\0"
    out += names
    place = len(out)
    out += table
    out[:64] = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        3, 62, 1, entry, 64, place, 0, 64, 56, count, 64, len(sections) + 2, len(sections) + 1,
    )  # fmt: skip
    out[64 : 64 + len(headers)] = headers
    return bytes(out)


def metadata_block(sdk: Sdk, offsets: dict[int, int]) -> bytes:
    """Write one metadata block."""
    data = bytearray(32)  # the four directories

    def put(octets: bytes) -> int:
        data.extend(octets)
        return 1872 + len(data) - len(octets)

    rows = b""
    for row in sdk.table:
        if row[0] == "group":
            rows += struct.pack("<HHIQ16x", 0x1009, *row[1:])
            continue
        attributes, pages, rva, content, flags = row
        at, value = (put(content), len(content)) if isinstance(content, bytes) else (0, content)
        rows += struct.pack("<HHIQIIQ", 7, attributes, pages, rva, value, at, flags)
    sources = {octets: put(octets) for octets in {octets for _, _, octets in sdk.patches}}
    patches = b"".join(
        struct.pack("<QII16x", offsets[number] + at, sources[octets], len(octets))
        for number, at, octets in sdk.patches
    )
    directories = [(put(patches), len(patches)), (put(rows), len(rows)), (0, 0), (0, 0)]
    if sdk.elrange is not None:
        directories[2] = (put(struct.pack("<QQQ", *sdk.elrange)), 24)
    data[:32] = b"".join(struct.pack("<II", *row) for row in directories)
    major, minor = sdk.version
    size = 1872 + len(data)
    head = struct.pack("<QIIIIIIIIQ", MAGIC, minor, major, size, 0, sdk.ssa, 2632, 0, 0, sdk.size)
    return head + bytes(16) + sdk.sigstruct + bytes(data)


def sdk_file(sdk: Sdk) -> bytes:
    """Write the file of an enclave."""
    offsets: dict[int, int] = {}
    extra, sections = [], []
    if sdk.relocations is not None:
        rela = b"".join(struct.pack("<QQq", at, kind, 0) for at, kind in sdk.relocations)
        sections.append((".rela.dyn", 4, 2, 0x7000000, rela, 8, 24))
        dynamic = struct.pack("<qQqQqQqQ", 22, 0, 7, 0x7000000, 8, len(rela), 0, 0)
        extra.append((2, 6, 0x7100000, len(dynamic), dynamic, len(dynamic), 8))
    elf_file(sdk.segments, [], extra_headers=extra, patch_offsets=offsets)
    note = metadata_block(sdk, offsets) * sdk.blocks
    note = struct.pack("<III", 13, len(note), 0) + b"sgx_metadata\0" + note
    sections.append((".note.sgxmeta", 7, 0, 0, note, 1, 0))
    return elf_file(sdk.segments, sections, extra_headers=extra)


def up(number: int) -> int:
    return -(-number // PAGE) * PAGE


def stream(size: int, ssa: int, pages: list[tuple[int, int, bytes, bool]]) -> bytes:
    """Write the records of pages (offset, flags, content, measured)."""
    out = bytearray(struct.pack("<8sIQ44x", b"ECREATE", ssa, size))
    for offset, flags, content, measured in pages:
        out += struct.pack("<8sQQ40x", b"EADD", offset, flags)
        for chunk in range(0, PAGE, 256) if measured else ():
            out += struct.pack("<8sQ48x", b"EEXTEND", offset + chunk)
            out += content[chunk : chunk + 256]
    return bytes(out)


def region(vaddr, content, memsz, flags, writable=()):
    """Pages of a segment as Intel's loader walks it, a page at a time."""
    offset = 0
    while offset < len(content):
        address = vaddr + offset
        size = min(PAGE - address % PAGE, len(content) - offset)
        page = bytearray(PAGE)
        page[address % PAGE : address % PAGE + size] = content[offset : offset + size]
        start = address - address % PAGE
        yield start, flags | (2 if start in writable else 0), bytes(page), True
        offset += PAGE - address % PAGE
    if memsz > offset:
        address = vaddr + offset
        end = address - address % PAGE + up(memsz - offset + address % PAGE)
        for at in range(address - address % PAGE, end, PAGE):
            yield at, flags, bytes(PAGE), True


def sdk_pages(sdk: Sdk) -> list[tuple[int, int, bytes, bool]]:
    """Return the pages by the specification, slowly."""
    pages: list[tuple[int, int, bytes, bool]] = []
    writable = set()
    for at, kind in sdk.relocations or ():
        if kind:
            writable.add(at - at % PAGE)
            if at % PAGE > PAGE - 8:
                writable.add(at - at % PAGE + PAGE)
    last = None

    def trailing(next_start):
        if last is None or sdk.version != (1, 3):
            return
        at = up(last.vaddr + last.memsz)
        if at < up(up(last.memsz) + last.vaddr) and (next_start is None or at < next_start):
            pages.append((at, secinfo(last.flags), bytes(PAGE), True))

    for number, seg in enumerate(sdk.segments):
        trailing(seg.vaddr - seg.vaddr % PAGE)
        if seg.vaddr > (last.vaddr if last else 0):
            last = seg
        content = bytearray(seg.content)
        for index, at, octets in sdk.patches:
            if index == number:
                content[at : at + len(octets)] = octets
        pages += region(seg.vaddr, bytes(content), seg.memsz, secinfo(seg.flags), writable)
    trailing(None)
    for number, row in enumerate(sdk.table):
        if row[0] != "group":
            pages += entry_pages(row, 0)
            continue
        _, count, times, step = row
        for time in range(times):
            for before in sdk.table[number - count : number]:
                pages += entry_pages(before, (time + 1) * step)
    shift = sdk.elrange[0] - sdk.elrange[1] if sdk.elrange else 0
    return [(at + shift, flags, content, measured) for at, flags, content, measured in pages]


def entry_pages(row, delta):
    attributes, pages, rva, content, flags = row
    rva += delta
    if not attributes & 1:
        return
    measured = attributes & 3 == 3
    if isinstance(content, bytes):
        if flags == 0x100:
            page = bytearray(content + bytes(PAGE - len(content)))
            for at in (16, 48, 56):
                value = struct.unpack_from("<Q", page, at)[0]
                struct.pack_into("<Q", page, at, (value + rva) % (1 << 64))
            yield rva, flags, bytes(page), measured
        else:
            yield from region(rva, content, pages * PAGE, flags)
    elif flags:
        for number in range(pages):
            yield rva + number * PAGE, flags, struct.pack("<I", content) * 1024, measured


def secinfo(flags: int) -> int:
    return 0x200 | (1 if flags & 4 else 0) | (2 if flags & 2 else 0) | (4 if flags & 1 else 0)


def sdk_mrenclave(sdk: Sdk) -> bytes:
    size = sdk.elrange[2] if sdk.elrange else sdk.size
    return hashlib.sha256(stream(size, sdk.ssa, sdk_pages(sdk))).digest()


@dataclass
class Oe:
    """An enclave of Open Enclave, in words."""

    segments: list[Seg]
    info_at: int
    info_size: int = 1960
    heap: int = 3
    stack: int = 2
    threads: int = 1
    flags: int = 0
    start: int = 0
    rela_dyn: list[tuple[int, int, int]] = field(default_factory=list)
    rela_plt: list[tuple[int, int, int]] = field(default_factory=list)
    tdata: tuple[int, int, int] | None = None  # address, size, align (content is in a segment)
    tbss: tuple[int, int] | None = None  # size, align
    symbols: dict[str, int] = field(default_factory=dict)
    entry: int = 0x1040
    sigstruct: bytes = bytes(1808)


def oe_info(oe: Oe) -> bytes:
    config = struct.pack("<HHI", 5, 6, oe.flags)
    if oe.info_size >= 1952:
        config += bytes(range(32))
    config += struct.pack("<QQ", 4, 3)
    if oe.info_size >= 1960:
        config += struct.pack("<Q", oe.start)
    head = struct.pack("<IIQQQ", oe.info_size, 2, oe.heap, oe.stack, oe.threads)
    return head + config + bytes(48) + oe.sigstruct + b"\xec" * 8


def put(segments: list[Seg], address: int, octets: bytes) -> None:
    """Write into the content of whichever segment has the address."""
    for seg in segments:
        at = address - seg.vaddr
        if at >= 0 and at + len(octets) <= len(seg.content):
            seg.content = seg.content[:at] + octets + seg.content[at + len(octets) :]
            return
    raise AssertionError(hex(address))


def oe_file(oe: Oe) -> bytes:
    """Write the file; the ELF header lies in no segment here."""
    put(oe.segments, oe.info_at, oe_info(oe))
    names = b"\0"
    symbols = bytes(24)
    for name, value in oe.symbols.items():
        symbols += struct.pack("<IBBHQQ", len(names), 0x11, 0, 1, value, 8)
        names += name.encode() + b"\0"
    sections = [
        (".oeinfo", 1, 2, oe.info_at, bytes(oe.info_size), 1, 0),
        (".dynsym", 11, 2, 0, symbols, 8, 24),
        (".dynstr", 3, 2, 0, names, 1, 0),
    ]
    for name, rows in ((".rela.dyn", oe.rela_dyn), (".rela.plt", oe.rela_plt)):
        if rows:
            packed = b"".join(struct.pack("<QQq", *row) for row in rows)
            sections.append((name, 4, 2, 0, packed, 8, 24))
    extra = []
    if oe.tdata:
        address, size, align = oe.tdata
        sections.append((".tdata", 1, 3, address, bytes(size), 1, 0))
        extra.append(
            (7, 4, address, size + (oe.tbss[0] if oe.tbss else 0), bytes(size), size, align)
        )
    if oe.tbss:
        sections.append((".tbss", 8, 3, 0, oe.tbss[0], oe.tbss[1], 0))
    return elf_file(oe.segments, sections, entry=oe.entry, extra_headers=extra)


def oe_mrenclave(oe: Oe) -> tuple[bytes, int]:
    """Compute MRENCLAVE and the enclave's size over a whole image buffer."""
    put(oe.segments, oe.info_at, oe_info(oe))
    image_size = up(max(seg.vaddr + seg.memsz for seg in oe.segments))
    image = bytearray(image_size)
    for seg in oe.segments:
        image[seg.vaddr : seg.vaddr + len(seg.content)] = seg.content
    relocations = b""
    if oe.rela_dyn:
        values = [0, *oe.symbols.values()]
        for at, info, addend in [*oe.rela_dyn, *oe.rela_plt]:
            value = values[info >> 32] if info & 0xFFFFFFFF == 18 else addend
            relocations += struct.pack("<QQq", at, info, value)
        relocations += bytes(-len(relocations) % PAGE)
    tls = 0
    if oe.tdata:
        tls += -(-oe.tdata[1] // oe.tdata[2]) * oe.tdata[2]
    if oe.tbss:
        tls += -(-oe.tbss[0] // oe.tbss[1]) * oe.tbss[1]
    tls = up(tls) // PAGE
    if oe.info_size == 1920 and "_td_from_tcs_offset" not in oe.symbols:
        tls = 1
    per_thread = 1 + oe.stack + 1 + tls + 4 + 1
    total = image_size + len(relocations) + (oe.heap + oe.threads * per_thread) * PAGE
    size = 1
    while size < total:
        size *= 2
    whole = 1
    while whole < total + oe.start:
        whole *= 2
    base = oe.start if oe.flags & 2 else 0
    info = oe.info_at + oe.info_size - 8 - 1808 - 48
    heap_rva = image_size + len(relocations)
    struct.pack_into(
        "<QQQQQQ",
        image,
        info,
        oe.info_at,
        oe.info_size,
        image_size,
        len(relocations),
        heap_rva,
        size,
    )
    values = {
        "_reloc_rva": image_size,
        "_reloc_size": len(relocations),
        "_td_from_tcs_offset": (tls + 4) * PAGE,
        "_enclave_rva": oe.symbols.get("_enclave_rva"),
    }
    if oe.tdata and oe.tdata[1]:
        values |= dict(zip(("_tdata_rva", "_tdata_size", "_tdata_align"), oe.tdata, strict=True))
    if oe.tbss and oe.tbss[0]:
        values |= dict(zip(("_tbss_size", "_tbss_align"), oe.tbss, strict=True))
    for name, at in oe.symbols.items():
        if name in values:
            struct.pack_into("<Q", image, at, values[name])
    image[info + 48 : info + 48 + 1808] = bytes(1808)
    pages = []
    for seg in oe.segments:
        for at in range(seg.vaddr - seg.vaddr % PAGE, seg.vaddr + seg.memsz, PAGE):
            pages.append((at, secinfo(seg.flags), bytes(image[at : at + PAGE]), True))
    at = image_size
    for place in range(0, len(relocations), PAGE):
        pages.append((at + place, 0x201, relocations[place : place + PAGE], True))
    at = heap_rva
    for _ in range(oe.heap):
        pages.append((at, 0x203, b"", False))
        at += PAGE
    for _ in range(oe.threads):
        at += PAGE
        for _ in range(oe.stack):
            pages.append((at, 0x203, b"\xcc" * PAGE, True))
            at += PAGE
        at += PAGE
        tcs = bytearray(PAGE)
        struct.pack_into("<Q", tcs, 16, base + at + PAGE)
        struct.pack_into("<I", tcs, 28, 2)
        struct.pack_into("<Q", tcs, 32, base + oe.entry)
        struct.pack_into("<QQII", tcs, 48, *[base + at + (tls + 4) * PAGE] * 2, *[0xFFFFFFFF] * 2)
        pages.append((at, 0x100, bytes(tcs), True))
        for offset in (1, 2, *range(4, 4 + tls + 1)):
            pages.append((at + offset * PAGE, 0x203, bytes(PAGE), True))
        at += (4 + tls + 1) * PAGE
    pages = [(at + base, flags, content, measured) for at, flags, content, measured in pages]
    created = whole if oe.flags & 2 else size
    return hashlib.sha256(stream(created, 1, pages)).digest(), created


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """What builds enclaves and measures them slowly."""
    return SimpleNamespace(
        Seg=Seg, Sdk=Sdk, Oe=Oe, elf_file=elf_file, sdk_file=sdk_file, sdk_pages=sdk_pages,
        sdk_mrenclave=sdk_mrenclave, oe_file=oe_file, oe_mrenclave=oe_mrenclave, stream=stream,
        page=PAGE,
    )  # fmt: skip
