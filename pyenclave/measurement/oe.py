"""
Open Enclave enclaves: the properties in ``.oeinfo``, and the pages that the loader builds.

Follows host/sgx/{create,loadelf,elf,sgxload}.c of Open Enclave. There is no table of pages in the
file: heap, stacks and threads follow from the properties, and the ELF header is measured as it
stands, so that a file stripped after signing is another enclave. Untrusted input.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyenclave.errors import MeasurementError
from pyenclave.formats.elf_enclave import EnclaveElf, Section
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
from pyenclave.measurement.sgx_elf import places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

__all__ = ["PROPERTIES_SECTION", "Properties", "layout", "properties"]

PROPERTIES_SECTION = ".oeinfo"

_SIGSTRUCT_SIZE = 1808
_HEADER = struct.Struct("<IIQQQ")
_IMAGE_INFO = struct.Struct("<QQQQQQ")
# The configuration grew; the size of the whole tells which it is.
_CONFIGS = {
    1920: struct.Struct("<HHIQQ"),  # since March 2019
    1952: struct.Struct("<HHI16s16sQQ"),  # since November 2020: key separation and sharing
    1960: struct.Struct("<HHI16s16sQQQ"),  # since June 2021: start address
}
_TYPE_SGX = 2
_ZERO_BASE = 2  # bit 1 of the flags; bit 0, capture of #PF and #GP, is not measured

_R, _RW, _TCS = 0x201, 0x203, 0x100
_STACK_WORD = 0xCCCCCCCC
_CONTROL_PAGES = 4  # TCS, two SSA frames, a guard
_MAX_PAGES = 1 << 40
_MAX_RELOCATION_BYTES = 1 << 28

_RELA = struct.Struct("<QQq")
_R_TPOFF64 = 18
_RELOCATION_TYPES = {1, 6, 7, 8, _R_TPOFF64}  # 64, GLOB_DAT, JUMP_SLOT, RELATIVE
_DT_NEEDED = 1

_SYMBOLS = frozenset(
    {
        "_enclave_rva",
        "_reloc_rva",
        "_reloc_size",
        "_tdata_rva",
        "_tdata_size",
        "_tdata_align",
        "_tbss_size",
        "_tbss_align",
        "_td_from_tcs_offset",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """
    ``.oeinfo``: what was asked for when the enclave was built or signed.

    Attributes:
        address: Of the section in the enclave.
        size: Of the structure in bytes.
        heap_pages: Pages of heap.
        stack_pages: Pages of stack of one thread.
        tcs_count: Threads.
        product_id: ISVPRODID.
        security_version: ISVSVN.
        flags: Bit 0 capture #PF and #GP, bit 1 zero-base.
        family_id: ISVFAMILYID.
        extended_product_id: ISVEXTPRODID.
        attributes: ATTRIBUTES.FLAGS.
        xfrm: ATTRIBUTES.XFRM.
        start_address: Where a zero-base enclave begins.
        sigstruct: Its 1808 bytes, zeros before it is signed.

    """

    address: int
    size: int
    heap_pages: int
    stack_pages: int
    tcs_count: int
    product_id: int
    security_version: int
    flags: int
    family_id: bytes
    extended_product_id: bytes
    attributes: int
    xfrm: int
    start_address: int
    sigstruct: bytes

    @property
    def zero_base(self) -> bool:
        """Whether ELRANGE begins at address 0."""
        return bool(self.flags & _ZERO_BASE)

    @property
    def sigstruct_address(self) -> int:
        """Where SIGSTRUCT is in the enclave."""
        return self.address + self.size - 8 - _SIGSTRUCT_SIZE

    @property
    def image_info_address(self) -> int:
        """Where that is what the loader fills in."""
        return self.sigstruct_address - _IMAGE_INFO.size


def properties(elf: EnclaveElf) -> Properties:
    """
    Read ``.oeinfo``.

    Raises:
        MeasurementError: There is none, or it is malformed, or of an unknown release.

    """
    section = elf.section(PROPERTIES_SECTION)
    if section is None:
        raise MeasurementError(f"the file has no section {PROPERTIES_SECTION}")
    data = elf.at_address(section.address, min(section.size, max(_CONFIGS)), PROPERTIES_SECTION)
    if len(data) < _HEADER.size:
        raise MeasurementError(f"{PROPERTIES_SECTION} is cut off", found=f"{len(data)} bytes")
    size, kind, heap, stack, threads = _HEADER.unpack_from(data)
    if size not in _CONFIGS or kind != _TYPE_SGX or size > len(data):
        raise MeasurementError(
            f"{PROPERTIES_SECTION} is not of an SGX enclave of a known release",
            expected=f"type {_TYPE_SGX}, size {' or '.join(map(str, _CONFIGS))}",
            found=f"type {kind}, size {size} of {len(data)}",
        )
    config = _CONFIGS[size].unpack_from(data, _HEADER.size)
    if len(config) == 5:
        config = (*config[:3], bytes(16), bytes(16), *config[3:])
    product, version, flags, family, extended, attributes, xfrm, *rest = config
    if max(heap, stack, threads) > _MAX_PAGES:
        raise MeasurementError(
            f"{PROPERTIES_SECTION}: impossible sizes", found=(heap, stack, threads)
        )
    return Properties(
        address=section.address,
        size=size,
        heap_pages=heap,
        stack_pages=stack,
        tcs_count=threads,
        product_id=product,
        security_version=version,
        flags=flags,
        family_id=family,
        extended_product_id=extended,
        attributes=attributes,
        xfrm=xfrm,
        start_address=rest[0] if rest else 0,
        sigstruct=bytes(data[size - 8 - _SIGSTRUCT_SIZE : size - 8]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What the properties and the image come to, in bytes if not said otherwise."""

    image: int
    relocations: int
    tls_pages: int
    thread_pages: int
    total: int
    enclave: int


def layout(data: Buffer) -> Layout:
    """
    Work out what the loader builds from an enclave, signed or not.

    Args:
        data: The whole file; untrusted input.

    Raises:
        MeasurementError: No Open Enclave enclave, a malformed one, or one that needs a second
            file (a module that it is linked against).

    """
    elf = EnclaveElf(data)
    own = properties(elf)
    if _DT_NEEDED in elf.dynamic:
        raise MeasurementError(
            "the enclave is linked against a module, which would be measured with it",
            advice="Enclaves of two files are not supported.",
        )
    image = _image_size(elf)
    relocations = _relocations(elf)
    tdata, tbss = _thread_sections(elf)
    thread_local = page_up(_thread_local(tdata) + _thread_local(tbss))
    if own.size == min(_CONFIGS) and "_td_from_tcs_offset" not in elf.symbols(_SYMBOLS):
        thread_local = PAGE_SIZE  # before August 2020 there was one page, used or not
    sizes = _sizes(own, image, len(relocations), thread_local)
    patches = _patches(elf, own, sizes, tdata, tbss)
    start = own.start_address if own.zero_base else 0
    if start % PAGE_SIZE or start > 1 << 56:
        raise MeasurementError("the start address is no page", found=f"{start:#x}")
    if own.tcs_count > MAX_RUNS >> 4:
        raise MeasurementError("too many threads", expected=MAX_RUNS >> 4, found=own.tcs_count)
    runs = list(_runs(elf, own, sizes, patches, relocations, start))
    size = _power_of_two(sizes.total + start) if own.zero_base else sizes.enclave
    signed = any(own.sigstruct)
    return Layout(
        kind="sgx-oe-elf",
        size=size,
        ssa_frame_size=1,
        runs=runs,
        sigstruct=own.sigstruct if signed else None,
        details={
            "heap_pages": own.heap_pages,
            "stack_pages": own.stack_pages,
            "tcs_count": own.tcs_count,
            "tls_pages": sizes.tls_pages,
            "image_size": sizes.image,
            "reloc_size": sizes.relocations,
            "capture_pf_gp_exceptions": bool(own.flags & 1),
            "zero_base": own.zero_base,
            "start_address": own.start_address,
        },
        places=lambda: places(elf, start),
    )


def _image_size(elf: EnclaveElf) -> int:
    if not elf.segments or min(segment.vaddr for segment in elf.segments) != 0:
        raise MeasurementError("the image does not begin at address 0")
    return page_up(max(segment.end for segment in elf.segments))


def _relocations(elf: EnclaveElf) -> bytes:
    """Return the pages with the relocations, as the enclave will apply them itself."""
    parts = []
    for name in (".rela.dyn", ".rela.plt"):
        section = elf.section(name)
        if section is None:
            parts.append(b"")
            continue
        if section.entry_size != _RELA.size or section.size % _RELA.size:
            raise MeasurementError(
                f"{name} has entries of an odd size", expected=_RELA.size, found=section.entry_size
            )
        if section.size > _MAX_RELOCATION_BYTES:
            raise MeasurementError(f"{name} is too long", found=section.size)
        parts.append(bytes(elf.section_content(section)))
    if not parts[0]:  # without the one the loader leaves out the other as well
        return b""
    data = bytearray(parts[0] + parts[1])
    for at in range(0, len(data), _RELA.size):
        info = int.from_bytes(data[at + 8 : at + 16], "little")
        kind = info & 0xFFFFFFFF
        if kind not in _RELOCATION_TYPES:
            raise MeasurementError(
                "a relocation of an unsupported type",
                expected=sorted(_RELOCATION_TYPES),
                found=kind,
            )
        if kind == _R_TPOFF64:
            # The enclave looks no symbol up: the loader puts the value where the addend was.
            data[at + 16 : at + 24] = elf.symbol_value(info >> 32).to_bytes(8, "little")
    return bytes(data) + bytes(-len(data) % PAGE_SIZE)


def _thread_sections(elf: EnclaveElf) -> tuple[Section | None, Section | None]:
    """Return ``.tdata``, with the alignment that counts, and ``.tbss``."""
    tdata, tbss = elf.section(".tdata"), elf.section(".tbss")
    tls = elf.tls
    if tls is not None:
        if tls.filesz != (tdata.size if tdata else 0):
            raise MeasurementError(
                ".tdata has not the size of its segment",
                expected=tls.filesz,
                found=tdata.size if tdata else 0,
            )
        if tdata is not None and tdata.address:
            if tdata.address != tls.vaddr:
                raise MeasurementError(
                    ".tdata is not where its segment is", expected=tls.vaddr, found=tdata.address
                )
            tdata = Section(
                tdata.name, tdata.type, tdata.flags, tdata.address, tdata.offset, tdata.size,
                tls.align, tdata.entry_size,
            )  # fmt: skip
    return tdata, tbss


def _thread_local(section: Section | None) -> int:
    if section is None or not section.size:
        return 0
    if section.size > _MAX_PAGES or not 0 < section.align <= PAGE_SIZE << 8:
        raise MeasurementError(
            f"{section.name}: impossible size or alignment", found=(section.size, section.align)
        )
    return -(-section.size // section.align) * section.align


def _sizes(own: Properties, image: int, relocations: int, tls: int) -> _Sizes:
    # Two guards, the stack, thread-local pages, control pages and one of thread data.
    pages = 2 + own.stack_pages + tls // PAGE_SIZE + _CONTROL_PAGES + 1
    total = image + relocations + (own.heap_pages + own.tcs_count * pages) * PAGE_SIZE
    return _Sizes(
        image=image,
        relocations=relocations,
        tls_pages=tls // PAGE_SIZE,
        thread_pages=pages,
        total=total,
        enclave=_power_of_two(total),
    )


def _power_of_two(number: int) -> int:
    found = 1 << (number - 1).bit_length()
    if found > 1 << 56:
        raise MeasurementError("the enclave is too large", found=f"{number:#x} bytes")
    return found


def _patches(
    elf: EnclaveElf, own: Properties, sizes: _Sizes, tdata: Section | None, tbss: Section | None
) -> Patches:
    """Return what the loader writes into the image before it measures."""
    patches = Patches()
    info = (own.address, own.size, sizes.image, sizes.relocations)
    heap = sizes.image + sizes.relocations
    values = {
        "_reloc_rva": sizes.image,
        "_reloc_size": sizes.relocations,
        "_td_from_tcs_offset": (sizes.tls_pages + _CONTROL_PAGES) * PAGE_SIZE,
    }
    if tdata is not None and tdata.size:
        values |= {
            "_tdata_rva": tdata.address,
            "_tdata_size": tdata.size,
            "_tdata_align": tdata.align,
        }
    if tbss is not None and tbss.size:
        values |= {"_tbss_size": tbss.size, "_tbss_align": tbss.align}
    found = elf.symbols(_SYMBOLS)
    if "_enclave_rva" in found:
        values["_enclave_rva"] = found["_enclave_rva"]
    # In the order of the loader; the signature is the last to go.
    patches.add(own.image_info_address, _IMAGE_INFO.pack(*info, heap, sizes.enclave))
    for name in ("_enclave_rva", *sorted(values.keys() - {"_enclave_rva"})):
        if name in found and name in values:
            if found[name] + 8 > sizes.image:
                raise MeasurementError(
                    f"symbol {name} lies outside the image",
                    expected=f"below {sizes.image:#x}",
                    found=f"{found[name]:#x}",
                )
            patches.add(found[name], values[name].to_bytes(8, "little"))
    patches.add(own.sigstruct_address, bytes(_SIGSTRUCT_SIZE))
    return patches


def _runs(
    elf: EnclaveElf,
    own: Properties,
    sizes: _Sizes,
    patches: Patches,
    relocations: bytes,
    start: int,
) -> Iterator[Run]:
    for run in _image_runs(elf, patches):
        yield run._replace(offset=run.offset + start)
    at = start + sizes.image
    if relocations:
        yield Run(at, len(relocations) // PAGE_SIZE, _R, relocations, "relocations")
        at += len(relocations)
    if own.heap_pages:
        yield Run(at, own.heap_pages, _RW, 0, "heap", 0)
        at += own.heap_pages * PAGE_SIZE
    for number in range(own.tcs_count):
        yield from _thread(own, sizes, at, start + elf.entry, f"thread {number}")
        at += sizes.thread_pages * PAGE_SIZE


def _image_runs(elf: EnclaveElf, patches: Patches) -> Iterator[Run]:
    end = 0
    for number, segment in enumerate(elf.segments):
        access = (segment.flags >> 2 & 1) | (segment.flags & 2) | (segment.flags & 1) << 2
        if not access:
            raise MeasurementError(f"segment {number} is without any access")
        if page_down(segment.vaddr) < end or (number and segment.vaddr == 0):
            raise MeasurementError(
                f"segment {number} overlaps the one before it",
                expected=f"at least {end:#x}",
                found=f"{segment.vaddr:#x}",
            )
        end = segment.end
        yield from segment_runs(
            f"segment {number}",
            segment.vaddr,
            elf.view[segment.offset : segment.offset + segment.filesz],
            page_up(segment.end),
            0x200 | access,
            patches=patches,
        )


def _thread(own: Properties, sizes: _Sizes, at: int, entry: int, what: str) -> Iterator[Run]:
    at += PAGE_SIZE  # a guard
    if own.stack_pages:
        yield Run(at, own.stack_pages, _RW, _STACK_WORD, f"{what}, stack")
        at += own.stack_pages * PAGE_SIZE
    at += PAGE_SIZE  # a guard
    base = at + (sizes.tls_pages + _CONTROL_PAGES) * PAGE_SIZE
    control = struct.pack(
        "<QQQIIQQQQII", 0, 0, at + PAGE_SIZE, 0, 2, entry, 0, base, base, 0xFFFFFFFF, 0xFFFFFFFF
    )
    yield Run(at, 1, _TCS, control + bytes(PAGE_SIZE - len(control)), f"{what}, TCS")
    yield Run(at + PAGE_SIZE, 2, _RW, 0, f"{what}, SSA")
    at += _CONTROL_PAGES * PAGE_SIZE
    yield Run(at, sizes.tls_pages + 1, _RW, 0, f"{what}, thread data")
