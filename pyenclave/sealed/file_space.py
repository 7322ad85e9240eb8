"""
Free slots of a sealed file.

Slots that the last commit refers to are never written: what a transaction frees is free after its
own commit. Free extents are kept in a chain of sealed pages, of which only the first ones are read
and rewritten, so that a commit costs what it changed and not what is free.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

import numpy as np

from pyenclave.errors import SealLimitError, UnsealError
from pyenclave.formats.sealed_file import BLANK, MAX_SLOTS, UNIT, Ref

__all__ = ["Space"]

_LENGTH_BITS: Final = 24
_MAX_LENGTH: Final = (1 << _LENGTH_BITS) - 1
_PREFIX: Final = 56  # next slot, version, salt, tag, and the number of extents
CAPACITY: Final = (UNIT - _PREFIX) // 8
_LOOKED_AT: Final = 64  # extents tried for a long enough one
_WORTH: Final = 16  # slots in a row that are worth taking from the free ones at once

Extent = tuple[int, int]


def _rest(first: int, end: int, taken: array[int]) -> array[int]:
    """Return the packed extents of *first* to *end* without those that were taken."""
    found: array[int] = array("Q")
    for value in _merged(taken):
        start, length = value >> _LENGTH_BITS, value & _MAX_LENGTH
        if start > first:
            found.extend(_packed(first, start - first))
        first = start + length
    if end > first:
        found.extend(_packed(first, end - first))
    return found


def _packed(start: int, length: int) -> list[int]:
    found = []
    while length > 0:
        part = min(length, _MAX_LENGTH)
        found.append(start << _LENGTH_BITS | part)
        start, length = start + part, length - part
    return found


def _merged(values: array[int]) -> list[int]:
    """Return packed extents in order, neighbours and what overlaps joined."""
    if not values:
        return []
    packed = np.sort(np.frombuffer(values, dtype=np.uint64))
    starts = packed >> np.uint64(_LENGTH_BITS)
    ends = starts + (packed & np.uint64(_MAX_LENGTH))
    reach = np.maximum.accumulate(ends)
    first = np.concatenate(([True], starts[1:] > reach[:-1]))
    begin = starts[first]
    last = np.concatenate((np.flatnonzero(first)[1:] - 1, [len(starts) - 1]))
    length = reach[last] - begin
    found: list[int] = []
    for start, count in zip(begin.tolist(), length.tolist(), strict=True):
        found += _packed(start, count)
    return found


class Space:
    """
    Which slots may be written.

    Args:
        first: First slot that is not under a header.
        end: Slots of the committed file.
        chain: First page of the chain of free extents.
        free: Slots that the chain holds.
        load: Reads a page of the chain: 4096 bytes.

    """

    def __init__(
        self, first: int, end: int, chain: Ref, free: int, load: Callable[[Ref], bytes]
    ) -> None:
        self._first = first
        self._load = load
        self.end = end
        self._committed_end = end
        self.chain = chain
        self._in_chain = free
        self._ready: list[Extent] = []
        self._ready_slots = 0
        self._later: array[int] = array("Q")
        self._all_until = 0  # every slot before this is free after the next commit, unless taken
        self._taken: array[int] = array("Q")
        self._last: Extent = (0, 0)  # the extent that release_later is adding to

    def take(self, count: int) -> list[Extent]:
        """Return *count* slots that nothing refers to, in as few extents as is cheap."""
        found: list[Extent] = []
        while count > 0:
            while not self._ready and self.chain.slot:
                self._load_chain()
            extent = self._best(count)
            if extent is None:
                if self.end + count > MAX_SLOTS:
                    raise SealLimitError("the file has as many slots as it may", found=self.end)
                found.append((self.end, count))
                self.end += count
                break
            start, length = extent
            if length > count:
                self._ready.append((start + count, length - count))
                length = count
            self._ready_slots -= length
            found.append((start, length))
            self._note(start, length)
            count -= length
        return found

    def _note(self, start: int, length: int) -> None:
        if start < self._all_until:
            self._taken.extend(_packed(start, length))

    def _best(self, count: int) -> Extent | None:
        ready = self._ready
        if not ready:
            return None
        if ready[-1][1] >= count:
            return ready.pop()
        lowest = max(0, len(ready) - _LOOKED_AT)
        best = max(range(lowest, len(ready)), key=lambda i: ready[i][1])
        start, length = ready[best]
        # A long run is not broken into crumbs, unless a quarter of the file is crumbs.
        if length < min(count, _WORTH) and self._ready_slots < (self.end - self._first) // 4:
            return None
        ready[best] = ready[-1]
        ready.pop()
        return start, length

    def _load_chain(self) -> None:
        ref = self.chain
        data = self._load(ref)
        slot, version = (int.from_bytes(data[i : i + 8], "little") for i in (0, 8))
        count = int.from_bytes(data[48:56], "little")
        if count > CAPACITY:
            raise UnsealError("the free list is wrong", expected=f"at most {CAPACITY}", found=count)
        values = np.frombuffer(data, dtype="<u8", count=count, offset=_PREFIX).tolist()
        extents = [(v >> _LENGTH_BITS, v & _MAX_LENGTH) for v in values]
        total = sum(length for _, length in extents)
        if total > self._in_chain or any(
            start < self._first or start + length > self.end for start, length in extents
        ):
            raise UnsealError("the free list is wrong", expected="slots of the file", found=total)
        self.chain = Ref(slot, version, data[16:32], data[32:48]) if slot else BLANK
        self._in_chain -= total
        self._ready = extents[::-1]
        self._ready_slots += total
        self.release_later(ref.slot, 1)

    def release_now(self, start: int, length: int) -> None:
        """Give back slots that were taken after the last commit."""
        self._ready.append((start, length))
        self._ready_slots += length

    def release_later(self, start: int, length: int) -> None:
        """Give back slots that the last commit refers to; they are free after the next."""
        last, count = self._last
        if last + count == start and count:
            self._last = (last, count + length)
            return
        if count:
            self._later.extend(_packed(last, count))
        self._last = (start, length)

    def release_all(self) -> None:
        """Give back, after the next commit, every slot of the last one, used or free."""
        # What was taken after the last commit lies above, or was free in it: nothing needs it now.
        self._later, self._last = array("Q"), (0, 0)
        self._all_until = self._committed_end
        self._taken = array("Q")
        self._ready = [extent for extent in self._ready if extent[0] < self._committed_end]
        if self.end > self._committed_end:
            self._ready.append((self._committed_end, self.end - self._committed_end))
        self._ready_slots = sum(length for _, length in self._ready)

    def save(self, store: Callable[[int, bytes], Ref]) -> tuple[Ref, int, int]:
        """
        Write the chain as it will be after the commit under way.

        Args:
            store: Seals 4096 bytes and writes them to a slot.

        Returns:
            The chain's first page, the number of free slots, and the end of the file.

        """
        start, length = self._last
        self._last = (0, 0)
        if length:
            self._later.extend(_packed(start, length))
        own: list[int] = []
        if self._all_until:
            self.chain, self._in_chain = BLANK, 0
        while True:
            values = array("Q", self._later)
            if self._all_until:
                values.extend(_rest(self._first, self._all_until, self._taken))
            for begin, count in self._ready:
                values.extend(_packed(begin, count))
            extents = _merged(values)
            if len(own) * CAPACITY >= len(extents):
                break
            # Only what is free already may hold the list itself.
            if self._ready:
                begin, count = self._ready.pop()
                own.append(begin)
                self._note(begin, 1)
                self._ready_slots -= 1
                if count > 1:
                    self._ready.append((begin + 1, count - 1))
            else:
                own.append(self.end)
                self.end += 1
        end = self.end
        while extents and (extents[-1] >> _LENGTH_BITS) + (extents[-1] & _MAX_LENGTH) == end:
            end = extents.pop() >> _LENGTH_BITS
        free = self._in_chain + sum(v & _MAX_LENGTH for v in extents)
        ref = self.chain
        # A page taken for extents that then went away with the end of the file stays, empty: its
        # own slot is free again when it is read.
        for at in reversed(range(len(own))):
            part = extents[at * CAPACITY : (at + 1) * CAPACITY]
            page = bytearray(UNIT)
            page[0:8] = ref.slot.to_bytes(8, "little")
            page[8:16] = ref.version.to_bytes(8, "little")
            page[16:32] = ref.salt
            page[32:48] = ref.tags or bytes(16)
            page[48:56] = len(part).to_bytes(8, "little")
            page[_PREFIX : _PREFIX + 8 * len(part)] = np.array(part, dtype="<u8").tobytes()
            ref = store(own[at], bytes(page))
        return ref, free, end
