"""
The chains behind launch digests: native where the extension is there, else with hashlib.

Both forms have the same methods, and tests hold them equal. Sources: AMD SEV-SNP firmware ABI
1.55, section 8.17.2 (PAGE_INFO); Intel TDX module ABI, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "PAGE_CPUID",
    "PAGE_NORMAL",
    "PAGE_SECRETS",
    "PAGE_UNMEASURED",
    "PAGE_VMSA",
    "PAGE_ZERO",
    "PurePythonSnp",
    "PurePythonTdx",
    "SnpChain",
    "TdxChain",
    "snp_chain",
    "tdx_chain",
]

PAGE_NORMAL = 1
PAGE_VMSA = 2
PAGE_ZERO = 3
PAGE_UNMEASURED = 4
PAGE_SECRETS = 5
PAGE_CPUID = 6

_PAGE = 4096
_CHUNK = 256
_END = 1 << 52
_PAGE_INFO = struct.Struct("<48s48sHBB4xQ")


class SnpChain(Protocol):
    """The chain of SHA-384 that is an SNP launch digest."""

    def add_pages(self, data: Buffer, gpa: int, page_type: int = PAGE_NORMAL) -> None:
        """Measure whole pages with their content, ascending from *gpa*."""

    def add_empty(self, num_pages: int, gpa: int, page_type: int) -> None:
        """Measure pages of a type whose content does not count, ascending from *gpa*."""

    def add_same(self, page: Buffer, count: int, gpa: int, page_type: int) -> None:
        """Measure one page *count* times at the same address."""

    def digest(self) -> bytes:
        """Return the 48 bytes so far; more may follow."""


class TdxChain(Protocol):
    """The one SHA-384 that is MRTD."""

    def add_pages(self, num_pages: int, gpa: int) -> None:
        """TDH.MEM.PAGE.ADD of pages ascending from *gpa*."""

    def extend(self, data: Buffer, gpa: int) -> None:
        """TDH.MR.EXTEND of every chunk of whole pages."""

    def add_and_extend(self, data: Buffer, gpa: int) -> None:
        """Add a page, extend with its chunks, and on to the next."""

    def digest(self) -> bytes:
        """Return the 48 bytes so far; more may follow."""


def snp_chain(start: bytes | None = None) -> SnpChain:
    """Begin a launch digest, at zeros or at 48 bytes that an earlier part of it gave."""
    try:
        from pyenclave._core import SnpMeasurement
    except ImportError:
        return PurePythonSnp(start)
    return SnpMeasurement(start)


def tdx_chain() -> TdxChain:
    """Begin an MRTD."""
    try:
        from pyenclave._core import TdxMeasurement
    except ImportError:
        return PurePythonTdx()
    return TdxMeasurement()


def _check_range(num_pages: int, gpa: int) -> None:
    """Refuse what the native form refuses."""
    if gpa % _PAGE or num_pages < 0 or not 0 <= gpa <= _END - num_pages * _PAGE:
        raise ValueError(f"{num_pages} pages at {gpa:#x}: not whole pages below 2^52")


def _check_type(page_type: int, *, content: bool) -> None:
    if not PAGE_NORMAL <= page_type <= PAGE_CPUID or (page_type <= PAGE_VMSA) != content:
        raise ValueError(f"page type {page_type} does not fit")


def _whole_pages(data: Buffer) -> memoryview:
    view = memoryview(data).cast("B")
    if view.nbytes % _PAGE:
        raise ValueError(f"{view.nbytes} bytes are not whole pages of {_PAGE}")
    return view


class PurePythonSnp:
    """An SNP launch digest with hashlib."""

    def __init__(self, start: bytes | None = None) -> None:
        if start is not None and len(start) != 48:
            raise ValueError(f"a launch digest has 48 bytes, not {len(start)}")
        self._value = start if start is not None else bytes(48)

    def _link(self, contents: bytes, page_type: int, gpa: int) -> None:
        info = _PAGE_INFO.pack(self._value, contents, 0x70, page_type, 0, gpa)
        self._value = hashlib.sha384(info).digest()

    def add_pages(self, data: Buffer, gpa: int, page_type: int = PAGE_NORMAL) -> None:
        """Measure whole pages with their content."""
        view = _whole_pages(data)
        _check_range(view.nbytes // _PAGE, gpa)
        _check_type(page_type, content=True)
        for at in range(0, view.nbytes, _PAGE):
            self._link(hashlib.sha384(view[at : at + _PAGE]).digest(), page_type, gpa + at)

    def add_empty(self, num_pages: int, gpa: int, page_type: int) -> None:
        """Measure pages whose content does not count."""
        _check_range(num_pages, gpa)
        _check_type(page_type, content=False)
        for number in range(num_pages):
            self._link(bytes(48), page_type, gpa + number * _PAGE)

    def add_same(self, page: Buffer, count: int, gpa: int, page_type: int) -> None:
        """Measure one page several times."""
        view = _whole_pages(page)
        if view.nbytes != _PAGE:
            raise ValueError(f"one page has {_PAGE} bytes, not {view.nbytes}")
        _check_range(1, gpa)
        _check_type(page_type, content=True)
        contents = hashlib.sha384(view).digest()
        for _ in range(count):
            self._link(contents, page_type, gpa)

    def digest(self) -> bytes:
        """Return the digest so far."""
        return self._value


class PurePythonTdx:
    """An MRTD with hashlib."""

    def __init__(self) -> None:
        self._hash = hashlib.sha384()

    def _add(self, gpa: int) -> None:
        self._hash.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104))

    def _extend_page(self, page: memoryview, gpa: int) -> None:
        for at in range(0, _PAGE, _CHUNK):
            record = b"MR.EXTEND".ljust(16, b"\0") + (gpa + at).to_bytes(8, "little")
            self._hash.update(record.ljust(128, b"\0"))
            self._hash.update(page[at : at + _CHUNK])

    def add_pages(self, num_pages: int, gpa: int) -> None:
        """Add pages without their content."""
        _check_range(num_pages, gpa)
        for number in range(num_pages):
            self._add(gpa + number * _PAGE)

    def extend(self, data: Buffer, gpa: int) -> None:
        """Extend with every chunk of whole pages."""
        view = _whole_pages(data)
        _check_range(view.nbytes // _PAGE, gpa)
        for at in range(0, view.nbytes, _PAGE):
            self._extend_page(view[at : at + _PAGE], gpa + at)

    def add_and_extend(self, data: Buffer, gpa: int) -> None:
        """Add and extend page by page."""
        view = _whole_pages(data)
        _check_range(view.nbytes // _PAGE, gpa)
        for at in range(0, view.nbytes, _PAGE):
            self._add(gpa + at)
            self._extend_page(view[at : at + _PAGE], gpa + at)

    def digest(self) -> bytes:
        """Return the digest so far."""
        return self._hash.copy().digest()
