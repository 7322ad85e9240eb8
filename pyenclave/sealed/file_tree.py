"""
The tree of a sealed file: from page numbers to slots, and what authenticates them.

Level 0 is the data, level 1 the nodes that refer to it, and so on; the *top* is one more node that
has a single entry and lives in the header. Data and nodes are pages alike: sealed, written to a
slot that the last commit does not use, and noted in the node above. Nodes are kept in a cache of
bounded size; changed ones go to the store when it is full, or with a commit.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections import OrderedDict
from typing import Any, Final

import numpy as np

from pyenclave.errors import SealingError, UnsealError
from pyenclave.formats.sealed_file import (
    BLANK,
    MAX_VERSION,
    TAG_SIZE,
    UNIT,
    FileHeader,
    Geometry,
    Ref,
)
from pyenclave.sealed.file_crypto import DATA_TYPE, FREE_TYPE, NODE_TYPE, FileKeys
from pyenclave.sealed.file_space import Space
from pyenclave.sealed.file_store import FileStore, Store, read_fully, write_fully

try:
    from pyenclave._core import node_blank, node_fill, node_run, read_pages, write_pages
except ImportError:  # pragma: no cover - systems without the native core
    from pyenclave.sealed.file_portable import (  # type: ignore[assignment]
        node_blank,
        node_fill,
        node_run,
    )

    read_pages = write_pages = None  # type: ignore[assignment]

__all__ = ["Node", "Tree"]

_AHEAD: Final = 1 << 16  # bytes of nodes that are read at once
BATCH: Final = 128  # units sealed at once: half a MiB stays in the cache of the processor


class Node:
    """One node: four columns over one buffer, by their numbers."""

    __slots__ = ("_fanout", "data", "dirty", "index", "level", "salts", "tags", "words")

    def __init__(
        self, geometry: Geometry, level: int, index: int, data: bytearray | None = None
    ) -> None:
        self.level = level
        self.index = index
        self.dirty = False
        self.data = data = bytearray(geometry.page_size) if data is None else data
        self._fanout = geometry.fanout
        view = memoryview(data)
        self.words = view.cast("Q")  # slots, then versions; little-endian, see the module's end
        self.salts = view[geometry.salts_at : geometry.tags_at]
        self.tags = view[geometry.tags_at : geometry.tags_end]

    def changed(self) -> None:
        """Note that an entry was written."""
        self.dirty = True

    def columns(self, entry: int, count: int) -> tuple[Any, Any, Any]:
        """Return slots, versions and salts of some entries as arrays."""
        fanout = self._fanout
        words = np.frombuffer(self.data, dtype="<u8", count=4 * fanout)
        salts = words[2 * fanout :].reshape(fanout, 2)
        end = entry + count
        return words[entry:end], words[fanout + entry : fanout + end], salts[entry:end]

    def run_end(self, entry: int, units: int) -> int:
        """Return the end of the entries from *entry* on that one read and one key open."""
        return node_run(self.data, entry, self._fanout, units)

    def ref(self, entry: int, units: int) -> Ref:
        """Return what an entry says."""
        width = TAG_SIZE * units
        return Ref(
            self.words[entry],
            self.words[self._fanout + entry],
            bytes(self.salts[16 * entry : 16 * entry + 16]),
            bytes(self.tags[entry * width : (entry + 1) * width]),
        )

    def put(self, entry: int, ref: Ref, units: int) -> None:
        """Set an entry."""
        width = TAG_SIZE * units
        self.words[entry] = ref.slot
        self.words[self._fanout + entry] = ref.version
        self.salts[16 * entry : 16 * entry + 16] = ref.salt
        self.tags[entry * width : (entry + 1) * width] = ref.tags or bytes(width)
        self.changed()


class Tree:
    """
    The pages of one file.

    Args:
        header: The commit that is opened.
        keys: The file's keys.
        store: Where slots are.
        nodes: How many nodes may be kept.

    """

    def __init__(self, header: FileHeader, keys: FileKeys, store: Store, *, nodes: int) -> None:
        self.geometry = header.geometry
        self.store = store
        native = isinstance(store, FileStore) and read_pages is not None
        self._file: FileStore | None = store if native else None  # type: ignore[assignment]
        self._keys = keys
        self._limit = nodes
        self._nodes: OrderedDict[tuple[int, int], Node] = OrderedDict()
        self._leaf: Node | None = None  # the leaf used last
        self._next = 0  # the leaf after those read last
        self.reset(header)

    def reset(self, header: FileHeader) -> None:
        """Forget all that was not committed."""
        g = self.geometry
        self._nodes.clear()
        self._leaf = None
        self.height = header.height
        self.top = Node(g, header.height + 1, 0)
        self.top.put(0, header.root, g.units)
        self.top.dirty = False
        self.space = Space(
            g.first_slot, header.end, header.free, header.free_slots, self._load_free
        )

    def committed(self, header: FileHeader) -> None:
        """Note that *header* is the commit that must not be touched from now on."""
        g = self.geometry
        self.space = Space(
            g.first_slot, header.end, header.free, header.free_slots, self._load_free
        )

    @functools.cached_property
    def _scratch(self) -> memoryview:
        """Ciphertext on its way out; aligned, as the cipher likes it."""
        return memoryview(mmap.mmap(-1, max(BATCH, self.geometry.units) * UNIT))

    @functools.cached_property
    def _ahead(self) -> memoryview:
        return memoryview(bytearray(max(_AHEAD, self.geometry.page_size)))

    # ---- nodes -------------------------------------------------------------------------------

    def _node(self, level: int, index: int, *, create: bool = False) -> Node | None:
        if level == self.height + 1:
            return self.top if index == 0 else None
        node = self._nodes.get((level, index))
        if node is not None:
            self._nodes.move_to_end((level, index))
            return node
        g = self.geometry
        parent = self._node(level + 1, index // g.fanout, create=create)
        if parent is None:
            return None
        entry = index % g.fanout
        if not parent.words[entry]:
            if not create:
                return None
            node = Node(g, level, index)
            node.dirty = True
            self._nodes[level, index] = node
            return node
        return self._load(level, index, parent, entry)

    def _load(self, level: int, index: int, parent: Node, entry: int) -> Node:
        """Read a node; where nodes are asked for one after the other, some more at once."""
        g = self.geometry
        size = g.page_size
        count = 1
        if index == self._next:
            most = min(max(1, _AHEAD // size), self._limit // 4)
            count = max(1, min(most, parent.run_end(entry, g.units) - entry))
            for i in range(1, count):
                if (level, index + i) in self._nodes:
                    count = i
                    break
        self._next = index + count
        out = self._ahead[: count * size]
        self._open(level, index, parent, entry, 0, out)
        for i in reversed(range(count)):
            node = Node(g, level, index + i, bytearray(out[i * size : (i + 1) * size]))
            self._nodes[level, index + i] = node
        return node

    def leaf(self, index: int, *, create: bool = False) -> Node | None:
        """Return the node of level 1 with *index*, or None if it would hold no page."""
        leaf = self._leaf
        if leaf is not None and leaf.index == index:
            return leaf
        leaf = self._leaf = self._node(1, index, create=create)
        return leaf

    def trim(self) -> None:
        """Bring the cache of nodes back to its size; only between operations."""
        if len(self._nodes) <= self._limit:
            return
        keep = self._limit * 3 // 4
        self._leaf = None
        for level in range(1, self.height + 1):
            if len(self._nodes) <= keep:
                break
            self._flush_level(level)
            for place in [p for p, node in self._nodes.items() if not node.dirty]:
                if len(self._nodes) <= keep:
                    break
                del self._nodes[place]

    def grow(self, pages: int) -> None:
        """Make the tree high enough for *pages* pages."""
        g = self.geometry
        height = g.height_of(pages)
        while self.height < height:
            old = self.top
            self.height += 1
            self.top = Node(g, self.height + 1, 0)
            if old.words[0]:
                old.changed()
                self._nodes[old.level, 0] = old
            self._leaf = None

    # ---- reading -----------------------------------------------------------------------------

    def _open(
        self, level: int, index: int, node: Node, entry: int, inner: int, out: memoryview
    ) -> None:
        """
        Read and open units of neighbouring pages into *out*.

        Args:
            level: Of the pages.
            index: Number of the first page.
            node: The node above.
            entry: That of the first page there.
            inner: The first unit in the first page.
            out: Where to; what does not verify is zeroed.

        """
        g = self.geometry
        size, units = g.page_size, g.units
        kind, flags = (DATA_TYPE, 0) if level == 0 else (NODE_TYPE, level)
        slot = node.words[entry]
        at = slot * size + inner * UNIT
        count = len(out)
        version = node.words[g.fanout + entry] + inner
        if slot >= self.space.end or version > MAX_VERSION:
            raise self._refused(level, index, at)
        tags = (entry * units + inner) * TAG_SIZE
        marks = node.tags[tags : tags + count // UNIT * TAG_SIZE]
        key = self._keys.opener(node.salts[16 * entry : 16 * entry + 16].tobytes())
        address = index * size + inner * UNIT
        opened = False
        # Straight from the descriptor: read and opened by pieces that stay in the cache.
        if self._file is not None:
            place = self._file.start + at
            try:  # noqa: SIM105 - contextlib takes half a microsecond
                opened = read_pages(
                    key, self._file.descriptor, place, marks, out, version, address, flags, kind
                )
            except UnsealError:
                pass
        if not opened:
            # Also to say what is wrong: that it ends, or a page that does not verify.
            try:
                read_fully(self.store, out, at, f"{'node' if level else 'page'} {index}")
            except BaseException:
                _zero(out)  # the caller's buffer: nothing that the store chose stays in it
                raise
            try:
                key.open_pages(
                    out, marks, out, version=version, address=address, flags=flags, type=kind
                )
                opened = True
            except UnsealError:
                if count == UNIT:
                    raise self._refused(level, index, at) from None
        if opened:
            return
        # Find the first page that does not verify, and say which.
        for i in range(inner, inner + count // UNIT):
            page, unit = divmod(i, units)
            part = out[(i - inner) * UNIT : (i - inner + 1) * UNIT]
            try:
                self._open(level, index + page, node, entry + page, unit, part)
            finally:
                part[:] = bytes(UNIT)
        raise self._refused(level, index, at)

    def _refused(self, level: int, index: int, at: int) -> UnsealError:
        size = self.geometry.page_size
        what = f"bytes {index * size} … {(index + 1) * size - 1}"
        return UnsealError(
            f"node {index} of level {level} of the sealed file is not authentic"
            if level
            else f"page {index} of the sealed file is not authentic",
            expected="what was committed" if level else what,
            found=f"other bytes at offset {at}",
            advice="The file was changed or damaged; bring back a good copy.",
        )

    def read(self, unit: int, out: memoryview) -> None:
        """
        Open units of 4096 bytes of the data straight into *out*.

        Raises:
            UnsealError: A page is not what was committed; nothing of its batch is in *out*.

        """
        g = self.geometry
        units, fanout = g.units, g.fanout
        done, size = 0, len(out)
        while done < size:
            page, inner = divmod(unit, units)
            index, entry = divmod(page, fanout)
            leaf = self._leaf
            if leaf is None or leaf.index != index:
                if len(self._nodes) > self._limit:
                    self.trim()
                leaf = self.leaf(index)
            left = min((size - done) // UNIT, (fanout - entry) * units - inner)
            if leaf is None:
                _zero(out[done : done + left * UNIT])
                done += left * UNIT
                unit += left
                continue
            end = leaf.run_end(entry, units)
            left = min(left, (end - entry) * units - inner)
            part = out[done : done + left * UNIT]
            if leaf.words[entry]:
                self._open(0, page, leaf, entry, inner, part)
            else:
                _zero(part)
            done += left * UNIT
            unit += left

    def _load_free(self, ref: Ref) -> bytes:
        data = memoryview(bytearray(UNIT))
        read_fully(self.store, data, ref.slot * self.geometry.page_size, "the free list")
        try:
            self._keys.opener(ref.salt).open_pages(
                data, ref.tags, data, version=ref.version, type=FREE_TYPE
            )
        except UnsealError:
            raise UnsealError(
                "the free list of the sealed file is not authentic",
                found=f"other bytes at offset {ref.slot * self.geometry.page_size}",
                advice="Reading goes on working; bring back a good copy to write.",
            ) from None
        return bytes(data)

    # ---- writing -----------------------------------------------------------------------------

    def write(self, level: int, index: int, data: memoryview) -> None:
        """Seal whole pages of *level* from *index* on, into slots that no commit refers to."""
        g = self.geometry
        size, units = g.page_size, g.units
        done = 0
        while done < len(data):
            at, entry = divmod(index, g.fanout)
            if level == 0:
                if len(self._nodes) > self._limit:
                    self.trim()
                node = self.leaf(at, create=True)
            else:
                node = self._node(level + 1, at, create=True)
            if node is None:  # pragma: no cover - grow() comes first
                raise SealingError("the tree is not high enough")
            count = min((len(data) - done) // size, g.fanout - entry, max(1, BATCH // units))
            key = self._keys.sealer(count * units)
            extents = self._assign(node, entry, count)
            part = data[done : done + count * size]
            if self._file is not None and len(extents) == 1:
                at = extents[0][0] * size
                self._write_native(key, node, level, index, entry, part, at)
            else:
                self._seal(key, node, level, index, entry, part)
                at = 0
                for start, length in extents:
                    sealed = self._scratch[at * size : (at + length) * size]
                    write_fully(self.store, sealed, start * size)
                    at += length
            done += count * size
            index += count

    def _mine(self, slots: Any, versions: Any, salts: Any) -> Any:
        """Tell which entries were written after the last commit, so that nothing needs them."""
        if not self._keys.salt:
            return np.zeros(len(slots), dtype=bool)
        same = (salts == np.frombuffer(self._keys.salt, dtype="<u8")).all(axis=1)
        return same & (versions > self._keys.committed) & (slots != 0)

    def _assign(self, node: Node, entry: int, count: int) -> list[tuple[int, int]]:
        """
        Give the entries slots to write to: their own, if no commit refers to those.

        Returns:
            The runs of slots, in the order of the entries.

        """
        if count == 1:
            slot = node.words[entry]
            if slot and not self._is_mine(node, entry):
                self.space.release_later(slot, 1)
                slot = 0
            if not slot:
                ((slot, _),) = self.space.take(1)
                node.words[entry] = slot
            return [(slot, 1)]
        fanout = self.geometry.fanout
        slots, versions, salts = node.columns(entry, count)
        where: Any = slice(None)
        needed = count
        if not node_blank(node.data, entry, count, fanout):
            mine = self._mine(slots, versions, salts)
            for start, length in _extents(slots[(slots != 0) & ~mine]):
                self.space.release_later(start, length)
            where = ~mine
            needed = int(np.count_nonzero(where))
            if not needed:
                return _extents(slots)
        extents = self.space.take(needed)
        if needed == count and len(extents) == 1:
            node_fill(node.data, entry, count, fanout, 1, extents[0][0], 0, self._keys.salt)
            return extents
        slots[where] = np.concatenate(
            [np.arange(start, start + length, dtype=np.uint64) for start, length in extents]
        )
        return _extents(slots)

    def _is_mine(self, node: Node, entry: int) -> bool:
        keys = self._keys
        return (
            node.words[self.geometry.fanout + entry] > keys.committed
            and node.salts[16 * entry : 16 * entry + 16] == keys.salt
        )

    def _seal(
        self, key: Any, node: Node, level: int, index: int, entry: int, data: memoryview
    ) -> None:
        g = self.geometry
        units = g.units
        kind, flags = (DATA_TYPE, 0) if level == 0 else (NODE_TYPE, level)
        total = len(data) // UNIT
        first = -1
        for start in range(0, total, BATCH):
            count = min(BATCH, total - start)
            tags = (entry * units + start) * TAG_SIZE
            version = key.seal_pages(
                data[start * UNIT : (start + count) * UNIT],
                self._scratch[start * UNIT : (start + count) * UNIT],
                node.tags[tags : tags + count * TAG_SIZE],
                address=index * g.page_size + start * UNIT,
                flags=flags,
                type=kind,
            )
            if first < 0:
                first = version
            elif version != first + start:
                raise SealingError("another user of the key", expected=first + start, found=version)
        self._note(node, entry, total // units, first)

    def _note(self, node: Node, entry: int, count: int, first: int) -> None:
        """Enter versions and salt of what was sealed; slots are there."""
        g = self.geometry
        node_fill(node.data, entry, count, g.fanout, g.units, 0, first, self._keys.salt)
        node.changed()

    def _write_native(
        self, key: Any, node: Node, level: int, index: int, entry: int, data: memoryview, at: int
    ) -> None:
        """Seal and write pages of neighbouring slots by pieces that stay in the cache."""
        g = self.geometry
        kind, flags = (DATA_TYPE, 0) if level == 0 else (NODE_TYPE, level)
        tags = entry * g.units * TAG_SIZE
        marks = node.tags[tags : tags + len(data) // UNIT * TAG_SIZE]
        file = self._file
        if file is None:  # pragma: no cover - the caller looked
            raise SealingError("the store is no file")
        address = index * g.page_size
        place = file.start + at
        try:
            first = write_pages(
                key, file.descriptor, place, data, marks, self._scratch, address, flags, kind
            )
        except OSError as error:  # the core says that a call failed; the number says why
            raise OSError(error.errno, os.strerror(error.errno or 0)) from None
        self._note(node, entry, len(data) // g.page_size, first)

    def _flush_level(self, level: int) -> None:
        dirty = sorted(
            (node for place, node in self._nodes.items() if place[0] == level and node.dirty),
            key=lambda node: node.index,
        )
        most = max(1, BATCH // self.geometry.units)
        at = 0
        while at < len(dirty):
            end = at + 1
            while (
                end < len(dirty)
                and end - at < most
                and dirty[end].index == dirty[end - 1].index + 1
            ):
                end += 1
            group = dirty[at:end]
            whole = group[0].data if len(group) == 1 else b"".join([n.data for n in group])
            self.write(level, group[0].index, memoryview(whole))
            for node in group:
                node.dirty = False
            at = end

    def save(self) -> tuple[Ref, Ref, int, int]:
        """
        Write all that is not yet written.

        Returns:
            The root, the chain of free slots, how many those are, and the end of the file.

        """
        for level in range(1, self.height + 1):
            self._flush_level(level)
        free, count, end = self.space.save(self._seal_free)
        root = self.top.ref(0, self.geometry.units)
        return (root if root.slot else BLANK), free, count, end

    def _seal_free(self, slot: int, page: bytes) -> Ref:
        tag = bytearray(TAG_SIZE)
        out = self._scratch[:UNIT]
        version = self._keys.sealer(1).seal_pages(page, out, tag, type=FREE_TYPE)
        write_fully(self.store, out, slot * self.geometry.page_size)
        return Ref(slot, version, self._keys.salt, bytes(tag))

    # ---- removing ----------------------------------------------------------------------------

    def cut(self, pages: int) -> None:
        """Remove all pages from number *pages* on."""
        self._leaf = None
        if pages == 0:
            # Nothing of the last commit is needed: no need to look at it.
            self.height = 0
            self.top = Node(self.geometry, 1, 0)
            self._nodes.clear()
            self.space.release_all()
            return
        self._cut(self.height + 1, 0, pages)

    def _cut(self, level: int, index: int, pages: int) -> None:
        """Cut below one node. The depth is that of the tree, at most ``MAX_HEIGHT``."""
        node = self._node(level, index)
        if node is None:
            return
        g = self.geometry
        span = g.fanout ** (level - 1)  # pages under one entry
        base = index * g.fanout
        first = max(0, -(-pages // span) - base)  # first entry of which nothing stays
        if level > 1:
            partly = pages // span - base
            if 0 <= partly < min(first, g.fanout):
                self._cut(level - 1, base + partly, pages)
            cached = {i for lvl, i in self._nodes if lvl == level - 1}
            for entry in range(first, g.fanout):
                if node.words[entry] or base + entry in cached:
                    self._cut(level - 1, base + entry, pages)
                    self._nodes.pop((level - 1, base + entry), None)
        if first >= g.fanout:
            return
        slots, versions, salts = node.columns(first, g.fanout - first)
        if not slots.any():
            return
        mine = self._mine(slots, versions, salts)
        for start, length in _extents(slots[mine]):
            self.space.release_now(start, length)
        for start, length in _extents(slots[(slots != 0) & ~mine]):
            self.space.release_later(start, length)
        blank = BLANK
        for entry in (np.flatnonzero(slots) + first).tolist():
            node.put(entry, blank, g.units)

    def close(self) -> None:
        """Forget everything."""
        self._nodes.clear()
        self._leaf = None


def _extents(slots: Any) -> list[tuple[int, int]]:
    """Return the runs of neighbouring slots, in the order of *slots*."""
    count = len(slots)
    if count == 0:
        return []
    if count == 1:
        return [(int(slots[0]), 1)]
    breaks = np.flatnonzero(slots[1:] - slots[:-1] != 1)
    if not len(breaks):
        return [(int(slots[0]), count)]
    begin = [0, *(breaks + 1).tolist()]
    return [(int(slots[a]), b - a) for a, b in zip(begin, [*begin[1:], count], strict=True)]


def _zero(view: memoryview) -> None:
    np.frombuffer(view, dtype=np.uint8)[:] = 0
