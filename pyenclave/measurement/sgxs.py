"""
SGXS streams: the records behind MRENCLAVE, written to a file.

Only canonical streams are measured: pages ascending, the chunks of a page right after it and each
once. Two kinds of records are not hardware's: UNSIZED stands for an ECREATE whose size is not
known yet, UNMEASRD is a chunk that is loaded but not measured. Untrusted input.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

from pyenclave.errors import MeasurementError
from pyenclave.measurement.enclave import MAX_RUNS, PAGE_SIZE, Layout, Run

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Stream"]

_RECORD = 64
_CHUNK = 256
_MEASURED_CHUNK = _RECORD + _CHUNK

_CREATE_TAGS = (b"ECREATE\0", b"UNSIZED\0")
_EADD, _EEXTEND, _UNMEASURED = b"EADD\0\0\0\0", b"EEXTEND\0", b"UNMEASRD"
_CREATE = struct.Struct("<8sIQ44s")
_ADD = struct.Struct("<8sQQ40s")
_EXTEND = struct.Struct("<8sQ48s")
_MAX_SIZE = 1 << 56
_MAX_PAGES = 1 << 22


class _Page:
    """One page: where it is, and where in the stream its chunks are."""

    __slots__ = ("chunks", "flags", "measured", "offset", "places")

    def __init__(self, offset: int, flags: int) -> None:
        self.offset = offset
        self.flags = flags
        self.chunks = 0  # bit i: chunk i is there
        self.measured = 0
        self.places: list[tuple[int, int]] = []  # chunk, place of its bytes


class Stream:
    """
    A checked SGXS stream.

    Args:
        data: The whole file; untrusted input.
        size: The enclave's size in bytes, for a stream that leaves it open (UNSIZED).

    Attributes:
        sized: Whether the stream says its size.
        size: SECS.SIZE in bytes.
        ssa_frame_size: In pages.
        record_counts: How many records of each kind there are.

    Raises:
        MeasurementError: It is malformed or not canonical, or the size is missing.

    """

    def __init__(self, data: Buffer, *, size: int | None = None) -> None:
        self.view = memoryview(data).toreadonly().cast("B")
        self.record_counts: dict[str, int] = {}
        tag, frame, number = self._read_create()
        self.sized = tag == _CREATE_TAGS[0]
        if self.sized and size not in (None, number):
            raise MeasurementError("the stream has another size", expected=size, found=number)
        if not self.sized and size is None:
            raise MeasurementError(
                "the stream leaves the enclave's size open (UNSIZED), so it has no MRENCLAVE yet",
                advice="Give the size that the enclave will have (--size).",
            )
        self._size_at = None if self.sized else number
        if number % 8:
            raise self._wrong(0, "the place of the enclave's size is not aligned", f"{number:#x}")
        found = number if size is None else size
        if not 2 * PAGE_SIZE <= found <= _MAX_SIZE or found & (found - 1) or not frame:
            raise MeasurementError(
                "the enclave cannot be built",
                expected="a size that is a power of two from 8192 on, an SSA frame of a page",
                found=f"{found} bytes, {frame} pages",
            )
        self.size = found
        self.ssa_frame_size = frame
        self._pages: list[_Page] = []
        self._replaced: tuple[int, bytes] | None = None
        self._read_pages()
        if self._size_at is not None and self._replaced is None:
            raise MeasurementError(
                "the place of the enclave's size is not in a measured chunk",
                found=f"{self._size_at:#x}",
            )

    def _wrong(self, at: int, what: str, found: object = None) -> MeasurementError:
        return MeasurementError(f"SGXS record at {at:#x}: {what}", found=found)

    def _take(self, at: int, size: int, what: str) -> memoryview:
        if size > len(self.view) - at:
            raise self._wrong(at, f"{what} is cut off", f"{len(self.view) - at} bytes of {size}")
        return self.view[at : at + size]

    def _read_create(self) -> tuple[bytes, int, int]:
        tag, frame, number, rest = _CREATE.unpack(self._take(0, _RECORD, "ECREATE"))
        if tag not in _CREATE_TAGS or any(rest):
            raise self._wrong(0, "not an ECREATE", tag)
        self._count(tag)
        return tag, frame, number

    def _count(self, tag: bytes) -> None:
        name = tag.rstrip(b"\0").decode("ascii")
        self.record_counts[name] = self.record_counts.get(name, 0) + 1

    def _read_pages(self) -> None:
        at, page = _RECORD, _Page(-PAGE_SIZE, 0)
        total = len(self.view)
        while at < total:
            tag = bytes(self._take(at, _RECORD, "the record")[:8])
            if tag == _EADD:
                page = self._read_add(at, page)
                at += _RECORD
            elif tag in (_EEXTEND, _UNMEASURED):
                if not self._pages:
                    raise self._wrong(at, "a chunk before any page")
                self._read_chunk(at, page, tag == _EEXTEND)
                at += _MEASURED_CHUNK
            else:
                raise self._wrong(at, "unknown kind of record", tag)
            self._count(tag)

    def _read_add(self, at: int, last: _Page) -> _Page:
        _, offset, flags, rest = _ADD.unpack_from(self.view, at)
        if offset % PAGE_SIZE or offset >= self.size:
            raise self._wrong(at, "a page outside the enclave", f"{offset:#x}")
        if offset <= last.offset:
            raise self._wrong(at, "not canonical: pages do not ascend", f"{offset:#x}")
        tcs = flags == 0x100
        if any(rest) or not (tcs or (flags & ~7 == 0x200 and flags & 3 != 2)):
            raise self._wrong(at, "impossible SECINFO flags", f"{flags:#x}")
        if len(self._pages) == _MAX_PAGES:
            raise self._wrong(at, "too many pages", f"more than {_MAX_PAGES}")
        page = _Page(offset, flags)
        self._pages.append(page)
        return page

    def _read_chunk(self, at: int, page: _Page, measured: bool) -> None:
        self._take(at, _MEASURED_CHUNK, "a chunk")
        _, offset, rest = _EXTEND.unpack_from(self.view, at)
        chunk, odd = divmod(offset - page.offset, _CHUNK)
        if odd or not 0 <= chunk < 16 or any(rest):
            raise self._wrong(at, "not canonical: a chunk of another page", f"{offset:#x}")
        if page.chunks >> chunk & 1:
            raise self._wrong(at, "not canonical: a chunk twice", f"{offset:#x}")
        page.chunks |= 1 << chunk
        page.measured |= measured << chunk
        place = at + _RECORD
        page.places.append((chunk, place))
        if self._size_at is not None and measured and offset <= self._size_at < offset + _CHUNK:
            self._replaced = place + self._size_at - offset, self.size.to_bytes(8, "little")

    def mrenclave(self) -> bytes:
        """Return the SHA-256 of the records that hardware would see."""
        digest = hashlib.sha256()
        digest.update(_CREATE.pack(_CREATE_TAGS[0], self.ssa_frame_size, self.size, bytes(44)))
        for start, end in self._measured_ranges():
            if self._replaced is not None and start <= self._replaced[0] < end:
                place, value = self._replaced
                digest.update(self.view[start:place])
                digest.update(value)
                digest.update(self.view[place + 8 : end])
            else:
                digest.update(self.view[start:end])
        return digest.digest()

    def _measured_ranges(self) -> list[tuple[int, int]]:
        """Return the parts of the stream that are hashed: all but UNMEASRD records."""
        if "UNMEASRD" not in self.record_counts:
            return [(_RECORD, len(self.view))]
        found, start = [], _RECORD
        for page in self._pages:
            for chunk, place in page.places:
                if not page.measured >> chunk & 1:
                    found.append((start, place - _RECORD))
                    start = place + _CHUNK
        found.append((start, len(self.view)))
        return found

    def _content(self, page: _Page) -> bytes:
        octets = bytearray(PAGE_SIZE)
        for chunk, place in page.places:
            octets[chunk * _CHUNK : (chunk + 1) * _CHUNK] = self.view[place : place + _CHUNK]
            if self._replaced is not None and place <= self._replaced[0] < place + _CHUNK:
                at = chunk * _CHUNK + self._replaced[0] - place
                octets[at : at + 8] = self._replaced[1]
        return bytes(octets)

    def layout(self) -> Layout:
        """Return the pages, neighbours alike in one run; those without content coalesced."""
        runs: list[Run] = []
        for page in self._pages:
            last = runs[-1] if runs else None
            content = self._content(page) if page.chunks else None
            if (
                last is not None
                and content is None
                and last.content is None
                and (last.end, last.flags) == (page.offset, page.flags)
            ):
                runs[-1] = last._replace(pages=last.pages + 1)
            else:
                runs.append(Run(page.offset, 1, page.flags, content, "page", page.measured))
        if len(runs) > MAX_RUNS:
            raise MeasurementError("too many pages to list", expected=MAX_RUNS, found=len(runs))
        return Layout(
            kind="sgx-sgxs",
            size=self.size,
            ssa_frame_size=self.ssa_frame_size,
            runs=runs,
            details={"record_counts": dict(self.record_counts)},
        )
