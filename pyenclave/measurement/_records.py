"""
The record stream behind MRENCLAVE: the native core's, or the same in Python where there is none.

Somebody who verifies needs no Linux and no extension modules. The portable form takes about
four times as long and gives the same values.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

try:
    from pyenclave import _core
except ImportError:  # another system, or a checkout that was not built
    _core = None  # type: ignore[assignment]

__all__ = ["NATIVE", "PAGE_SIZE", "PortableMeasurement", "Recorder", "add_many", "begin", "sha256"]

NATIVE: bool = "SgxMeasurement" in dir(_core)
PAGE_SIZE = 4096

_CHUNK = 256
_EADD = struct.Struct("<8sQQ40x")
_STRIDE = 64 + _CHUNK  # an EEXTEND record and its content
_MAX_U64 = (1 << 64) - 1


class Recorder(Protocol):
    """What measures pages: ``_core.SgxMeasurement`` or :class:`PortableMeasurement`."""

    @property
    def num_pages(self) -> int: ...
    def add_pages(self, data: Buffer, offset: int, flags: int, measured: bool = True) -> None: ...
    def add_unmeasured(self, num_pages: int, offset: int, flags: int) -> None: ...
    def add_filled(self, num_pages: int, offset: int, flags: int, word: int = 0) -> None: ...
    def digest(self) -> bytes: ...


def begin(size: int, ssa_frame_size: int = 1) -> Recorder:
    """Begin a measurement with ECREATE; arguments and errors as of ``_core.SgxMeasurement``."""
    if NATIVE:
        return _core.SgxMeasurement(size, ssa_frame_size)
    return PortableMeasurement(size, ssa_frame_size)


def add_many(jobs: Sequence[tuple[Recorder, Sequence[tuple[int, int, Buffer | None]]]]) -> None:
    """Add to each measurement its runs of pages: offset, flags, content (None: one, unmeasured)."""
    if NATIVE:
        _core.sgx_add_many(cast("list[tuple[_core.SgxMeasurement, Any]]", jobs))
        return
    for measurement, pages in jobs:
        for offset, flags, content in pages:
            if content is None:
                measurement.add_unmeasured(1, offset, flags)
            else:
                measurement.add_pages(content, offset, flags)


def sha256(data: Buffer) -> bytes:
    """Return the SHA-256 of *data*."""
    return _core.sha256(data) if NATIVE else hashlib.sha256(data).digest()


class PortableMeasurement:
    """The record stream (Intel SDM vol. 3D, ECREATE, EADD, EEXTEND), through ``hashlib``."""

    def __init__(self, size: int, ssa_frame_size: int = 1) -> None:
        if not 0 <= size <= _MAX_U64 or not 0 <= ssa_frame_size < 1 << 32:
            raise OverflowError("ECREATE: a number does not fit")
        if size < 2 * PAGE_SIZE or size & (size - 1) or not ssa_frame_size:
            raise ValueError(f"ECREATE of {size} bytes, SSA frame of {ssa_frame_size} pages")
        self.size = size
        self.num_pages = 0
        self._hash = hashlib.sha256(struct.pack("<8sIQ44x", b"ECREATE", ssa_frame_size, size))
        self._page = bytearray(64 + 16 * _STRIDE)
        for at in range(64, len(self._page), _STRIDE):
            self._page[at : at + 7] = b"EEXTEND"

    def _check(self, pages: int, offset: int, flags: int, what: str) -> None:
        for number in (pages, offset, flags):
            if not 0 <= number <= _MAX_U64:
                raise OverflowError(f"{what}: a number does not fit: {number}")
        text = f"{what}: {pages} pages at {offset:#x} with flags {flags:#x}"
        if offset % PAGE_SIZE:
            raise ValueError(f"{text}: PYE_E_ALIGNMENT")
        if offset > self.size or pages > (self.size - offset) // PAGE_SIZE:
            raise ValueError(f"{text}: PYE_E_ARGUMENT")
        # Regular pages of any access but W without R; a TCS has no access bits.
        if flags != 0x100 and (flags & ~7 != 0x200 or flags & 3 == 2):
            raise ValueError(f"{text}: PYE_E_ARGUMENT")

    def add_pages(self, data: Buffer, offset: int, flags: int, measured: bool = True) -> None:
        """Add the pages that *data* holds, from *offset* on."""
        with memoryview(data) as view, view.cast("B") as octets:
            if len(octets) % PAGE_SIZE:
                raise ValueError(f"add_pages: {len(octets)} bytes are not whole pages of 4096")
            pages = len(octets) // PAGE_SIZE
            self._check(pages, offset, flags, "add_pages")
            if not measured:
                self.add_unmeasured(pages, offset, flags)
                return
            for number in range(pages):
                at = number * PAGE_SIZE
                for chunk in range(16):
                    start = at + chunk * _CHUNK
                    place = 128 + chunk * _STRIDE
                    self._page[place : place + _CHUNK] = octets[start : start + _CHUNK]
                self._take_page(offset + at, flags)
        self.num_pages += pages

    def _take_page(self, offset: int, flags: int) -> None:
        """Hash one measured page; its content is in ``_page`` already."""
        page = self._page
        page[:64] = _EADD.pack(b"EADD", offset, flags)
        for chunk in range(16):
            place = 72 + chunk * _STRIDE
            page[place : place + 8] = (offset + chunk * _CHUNK).to_bytes(8, "little")
        self._hash.update(page)

    def add_unmeasured(self, num_pages: int, offset: int, flags: int) -> None:
        """Add pages whose content is not measured."""
        self._check(num_pages, offset, flags, "add_unmeasured")
        for start in range(0, num_pages, 256):
            count = min(256, num_pages - start)
            first = offset + start * PAGE_SIZE
            self._hash.update(
                b"".join(
                    _EADD.pack(b"EADD", first + number * PAGE_SIZE, flags)
                    for number in range(count)
                )
            )
        self.num_pages += num_pages

    def add_filled(self, num_pages: int, offset: int, flags: int, word: int = 0) -> None:
        """Add measured pages whose every 32-bit word is *word*."""
        self._check(num_pages, offset, flags, "add_filled")
        content = word.to_bytes(4, "little") * (_CHUNK // 4)
        for chunk in range(16):
            place = 128 + chunk * _STRIDE
            self._page[place : place + _CHUNK] = content
        for number in range(num_pages):
            self._take_page(offset + number * PAGE_SIZE, flags)
        self.num_pages += num_pages

    def digest(self) -> bytes:
        """Return MRENCLAVE of the pages so far; more may follow."""
        return self._hash.copy().digest()
