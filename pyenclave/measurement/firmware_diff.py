"""What makes two firmware files differ: entries of the GUID table, sections, pages."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pyenclave.errors import MeasurementError
from pyenclave.measurement.difference import Difference, compare
from pyenclave.measurement.ovmf import PAGE_SIZE, Firmware

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["diff"]

MAX_RANGES = 64


def diff(a: Buffer, b: Buffer) -> list[Difference]:
    """
    Name what makes two firmware files differ.

    All pages count for SEV; for TDX those of sections that are measured, which their names say.

    Raises:
        MeasurementError: A file is malformed.
    """
    one, two = Firmware(a), Firmware(b)
    found: list[Difference] = []
    if one.size != two.size:
        found.append(Difference("field", "size", one.size, two.size))
    found += compare("guid entry", _entries(one), _entries(two))
    found += compare("sev section", _sev(one), _sev(two))
    found += compare("tdx section", _tdvf(one), _tdvf(two))
    return found + _pages(one, two)


def _entries(image: Firmware) -> dict[str, object]:
    return {entry.name: entry.data.hex() for entry in image.entries.values()}


def _sev(image: Firmware) -> dict[str, object]:
    if not image.has_sev_metadata:
        return {}
    return {
        f"{number} {section.name}": f"{section.size} bytes at {section.gpa:#x}"
        for number, section in enumerate(image.sev.sections)
    }


def _tdvf(image: Firmware) -> dict[str, object]:
    try:
        sections = image.tdvf
    except MeasurementError:
        return {}
    return {
        f"{number} {section.name}": (
            f"{section.memory_data_size} bytes at {section.memory_address:#x}, "
            f"{section.raw_data_size} bytes of the file at {section.data_offset:#x}, "
            f"attributes {section.attributes}"
        )
        for number, section in enumerate(sections)
    }


def _place(image: Firmware, offset: int) -> str:
    """Name the TDX section that a page belongs to."""
    try:
        sections = image.tdvf
    except MeasurementError:
        return ""
    for section in sections:
        if 0 <= offset - section.data_offset < section.raw_data_size:
            return f" ({section.name}, {'' if section.attributes & 1 else 'not '}measured by TDX)"
    return " (in no TDX section)"


def _pages(one: Firmware, two: Firmware) -> list[Difference]:
    """Compare the pages by their distance from the end, which is where memory has them."""
    size = max(one.size, two.size)
    begin = -(-size // PAGE_SIZE) * PAGE_SIZE
    ranges: list[list[int]] = []  # distances from the end, first and behind the last
    for distance in range(begin, 0, -PAGE_SIZE):
        if _page(one, distance) == _page(two, distance):
            continue
        if ranges and ranges[-1][1] == distance:
            ranges[-1][1] = distance - PAGE_SIZE
        else:
            ranges.append([distance, distance - PAGE_SIZE])
    found = []
    for first, last in ranges[:MAX_RANGES]:
        offset = max(one.size - first, 0)
        gpa = (1 << 32) - first
        count = (first - last) // PAGE_SIZE
        name = f"{gpa:#x}, {count} page{'s' * (count != 1)} from file offset {offset:#x}"
        sums = _sha256(one, first, last), _sha256(two, first, last)
        found.append(Difference("page", name + _place(one, offset), *sums))
    if len(ranges) > MAX_RANGES:
        rest = len(ranges) - MAX_RANGES
        found.append(Difference("page", f"{rest} more ranges", None, None))
    return found


def _page(image: Firmware, distance: int) -> bytes | None:
    return _slice(image, distance, distance - PAGE_SIZE)


def _slice(image: Firmware, first: int, last: int) -> bytes | None:
    begin, end = max(image.size - first, 0), image.size - last
    return bytes(image.data[begin:end]) if end > begin else None


def _sha256(image: Firmware, first: int, last: int) -> str | None:
    data = _slice(image, first, last)
    return None if data is None else hashlib.sha256(data).hexdigest()
