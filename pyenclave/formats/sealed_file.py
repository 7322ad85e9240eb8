"""
Sealed files: geometry and headers ↔ bytes, no I/O and no cryptography.

The byte-exact description is ``docs/formats/sealed-file.md``. A file is an array of *slots* of one
page size; the first few hold two headers, written in turn. Everything that a header says is
authenticated by its MAC; it is still checked here field by field, because sizes choose what is
allocated and read.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Final, Self

from pyenclave.errors import UnsealError

__all__ = [
    "BLANK",
    "HEADER_PLACES",
    "MAC_OFFSET",
    "MAC_SIZE",
    "MAGIC",
    "MAX_PAGE_SIZE",
    "MAX_SIZE",
    "MAX_SLOTS",
    "MIN_PAGE_SIZE",
    "TAG_SIZE",
    "UNIT",
    "FileHeader",
    "Geometry",
    "Ref",
    "check_page_size",
]

MAGIC: Final = b"PYEFILE\x01"
UNIT: Final = 4096  # what one tag covers
TAG_SIZE: Final = 16
MIN_PAGE_SIZE: Final = 4096
MAX_PAGE_SIZE: Final = 1 << 20
MAX_SLOTS: Final = 1 << 40
MAX_SIZE: Final = 1 << 62  # bytes of plaintext, holes included
MAX_HEIGHT: Final = 10  # 85 ** 10 pages are more than MAX_SIZE has
MAX_VERSION: Final = 1 << 36

MAC_OFFSET: Final = 224
MAC_SIZE: Final = 32
_FIXED: Final = 256  # bytes before the tags of root and free list

# Where a header may be, whatever the page size is: what a reader looks at first.
HEADER_PLACES: Final = (0, 4096, 8192)

_HEADER = struct.Struct("<8s I I 16s 16s Q Q Q Q Q Q 32s QQ16s QQ16s 32s 32s")
if _HEADER.size != _FIXED:  # pragma: no cover
    raise AssertionError("layout of the header of a sealed file")

_FLAG_COUNTER: Final = 1
_FLAG_MOVED: Final = 2  # from one counter to another: the header names both
_OLD_VALUE = struct.Struct("<Q")


def _refuse(what: str, *, expected: object, found: object) -> UnsealError:
    return UnsealError(f"the sealed file's {what} is wrong", expected=expected, found=found)


def check_page_size(page_size: int) -> int:
    """
    Return *page_size* if it is a power of two from 4096 to 1 MiB.

    Raises:
        ValueError: It is not.

    """
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"page_size: expected a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}, "
            f"found {page_size}"
        )
    return page_size


@dataclass(frozen=True, slots=True)
class Geometry:
    """
    What follows from the page size.

    Attributes:
        page_size: Bytes of a slot.
        units: Tags of a page: one for each 4096 bytes.
        fanout: Entries of a node.
        stride: Distance of the two headers, and the size of each.
        first_slot: First slot that is not under a header.

    """

    page_size: int
    units: int
    fanout: int
    stride: int
    first_slot: int

    @classmethod
    @functools.cache
    def of(cls, page_size: int) -> Self:
        """Return the geometry of a page size (`check_page_size`)."""
        units = check_page_size(page_size) // UNIT
        stride = 8192 if _FIXED + TAG_SIZE * (units + 1) > 4096 else 4096
        return cls(
            page_size=page_size,
            units=units,
            fanout=page_size // (32 + TAG_SIZE * units),
            stride=stride,
            first_slot=-(-2 * stride // page_size),
        )

    # A node is four columns: slots, versions, salts, tags.
    @property
    def salts_at(self) -> int:
        """Offset of the column of salts."""
        return 16 * self.fanout

    @property
    def tags_at(self) -> int:
        """Offset of the column of tags."""
        return 32 * self.fanout

    @property
    def tags_end(self) -> int:
        """Offset of the first byte of a node that is always zero."""
        return (32 + TAG_SIZE * self.units) * self.fanout

    def height_of(self, pages: int) -> int:
        """Return how many levels of nodes a file of *pages* pages needs."""
        height, reach = 0, 1
        while reach < pages:
            reach *= self.fanout
            height += 1
        return height


@dataclass(frozen=True, slots=True)
class Ref:
    """Where a page is and what authenticates it. Slot 0 means that there is none."""

    slot: int = 0
    version: int = 0
    salt: bytes = bytes(16)
    tags: bytes = b""


BLANK: Final = Ref()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader:
    """
    Header of a sealed file.

    Attributes:
        page_size: Bytes of a slot.
        file_id: 16 bytes, chosen when the file was made.
        name_tag: 16 bytes that only the file key can compute of the name.
        generation: Number of this commit; each is one more than the one before.
        size: Bytes of plaintext.
        end: Slots that belong to the file; what lies behind is not of this commit.
        height: Levels of nodes above the data.
        free_slots: Slots below ``end`` that nothing uses.
        counter_id: 32 bytes that name the counter the file is bound to, or None.
        counter_value: That counter's value once this commit is the current one.
        old_counter_id: Of the commit that binds the file to another counter: the one before.
        old_counter_value: The value that the counter before is retired with.
        root: The page at the top of the tree.
        free: The first page of the list of free slots.

    """

    page_size: int
    file_id: bytes
    name_tag: bytes
    generation: int
    size: int
    end: int
    height: int
    free_slots: int
    counter_id: bytes | None
    counter_value: int
    root: Ref
    free: Ref
    old_counter_id: bytes | None = None
    old_counter_value: int = 0

    @property
    def geometry(self) -> Geometry:
        """What follows from the page size."""
        return Geometry.of(self.page_size)

    @property
    def offset(self) -> int:
        """Where in the file this header belongs: commits take turns."""
        return (self.generation & 1) * self.geometry.stride

    def to_bytes(self) -> bytearray:
        """Return the whole header with a MAC of zeros, to be filled in at ``MAC_OFFSET``."""
        geometry = self.geometry
        data = bytearray(geometry.stride)
        flags = _FLAG_COUNTER if self.counter_id is not None else 0
        flags |= _FLAG_MOVED if self.old_counter_id is not None else 0
        _HEADER.pack_into(
            data,
            0,
            MAGIC,
            self.page_size,
            flags,
            self.file_id,
            self.name_tag,
            self.generation,
            self.size,
            self.end,
            self.height,
            self.free_slots,
            self.counter_value,
            self.counter_id or bytes(32),
            self.root.slot,
            self.root.version,
            self.root.salt,
            self.free.slot,
            self.free.version,
            self.free.salt,
            self.old_counter_id or bytes(32),
            bytes(MAC_SIZE),
        )
        tags = TAG_SIZE * geometry.units
        data[_FIXED : _FIXED + tags] = self.root.tags or bytes(tags)
        data[_FIXED + tags : _FIXED + tags + TAG_SIZE] = self.free.tags or bytes(TAG_SIZE)
        _OLD_VALUE.pack_into(data, _FIXED + tags + TAG_SIZE, self.old_counter_value)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Parse a header and check every field that has only some legal values.

        Args:
            data: At least the header; what follows is not looked at.

        Raises:
            UnsealError: Not a header of this version, or a field is impossible.

        """
        if len(data) < _FIXED:
            raise _refuse("header", expected=f"at least {_FIXED} bytes", found=len(data))
        (
            magic,
            page_size,
            flags,
            file_id,
            name_tag,
            generation,
            size,
            end,
            height,
            free_slots,
            counter_value,
            counter_id,
            root_slot,
            root_version,
            root_salt,
            free_slot,
            free_version,
            free_salt,
            old_counter_id,
            _mac,
        ) = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise _refuse("magic or version", expected=MAGIC.hex(), found=magic.hex())
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise _refuse("page size", expected="a power of two, 4 KiB … 1 MiB", found=page_size)
        geometry = Geometry.of(page_size)
        if len(data) < geometry.stride:
            raise _refuse("header", expected=f"{geometry.stride} bytes", found=len(data))
        first, fixed = geometry.first_slot, _FIXED
        tags = TAG_SIZE * geometry.units
        pages = -(-size // page_size)
        used = fixed + tags + TAG_SIZE
        root_tags, free_tags = data[fixed : fixed + tags], data[fixed + tags : used]
        (old_counter_value,) = _OLD_VALUE.unpack_from(data, used)
        moved = bool(flags & _FLAG_MOVED)
        end_used = used + _OLD_VALUE.size
        zeros = bytes(geometry.stride - end_used)
        checks: tuple[tuple[str, bool, object, object], ...] = (
            ("flags", flags in (0, _FLAG_COUNTER, _FLAG_COUNTER | _FLAG_MOVED), "0, 1 or 3", flags),
            ("generation", 1 <= generation < 1 << 63, "1 … 2^63 - 1", generation),
            ("size", size <= MAX_SIZE, f"at most {MAX_SIZE}", size),
            ("end", first <= end <= MAX_SLOTS, f"{first} … {MAX_SLOTS} slots", end),
            ("free slots", free_slots <= end - first, f"at most {end - first}", free_slots),
            (
                "height",
                height <= MAX_HEIGHT,
                f"at most {MAX_HEIGHT}",
                height,
            ),
            (
                "tree",
                geometry.height_of(pages) <= height or not root_slot,
                f"a height of {geometry.height_of(pages)}",
                height,
            ),
            (
                "counter",
                bool(flags & _FLAG_COUNTER) or (counter_value == 0 and not any(counter_id)),
                "zero without the counter flag",
                counter_value,
            ),
            (
                "counter before",
                moved or (old_counter_value == 0 and not any(old_counter_id)),
                "zero without the flag of a move",
                old_counter_value,
            ),
            ("reserved bytes", data[end_used : geometry.stride] == zeros, 0, "others"),
        )
        for what, holds, expected, found in checks:
            if not holds:
                raise _refuse(what, expected=expected, found=found)
        for what, slot, version, salt, found_tags in (
            ("root", root_slot, root_version, root_salt, root_tags),
            ("free list", free_slot, free_version, free_salt, free_tags),
        ):
            if slot and not (first <= slot < end and 1 <= version <= MAX_VERSION):
                raise _refuse(what, expected=f"a slot of {first} … {end - 1}", found=slot)
            if not slot and (version or any(salt) or any(found_tags)):
                raise _refuse(what, expected="zero where there is none", found=version)
        return cls(
            page_size=page_size,
            file_id=file_id,
            name_tag=name_tag,
            generation=generation,
            size=size,
            end=end,
            height=height,
            free_slots=free_slots,
            counter_id=counter_id if flags & _FLAG_COUNTER else None,
            counter_value=counter_value,
            root=Ref(root_slot, root_version, root_salt, bytes(root_tags)) if root_slot else BLANK,
            free=Ref(free_slot, free_version, free_salt, bytes(free_tags)) if free_slot else BLANK,
            old_counter_id=old_counter_id if moved else None,
            old_counter_value=old_counter_value,
        )
