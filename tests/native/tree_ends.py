"""Version trees and epoch keys for tests, over storages that can be looked at and attacked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pyenclave._ffi import ffi, lib

SECRET = bytes(range(32))
NAME = bytes(range(100, 116))
FANOUT = 128
# What a page that was never put has.
NOTHING = (0, bytes(16), 0)

Entry = tuple[int, bytes, int]


class StatusError(AssertionError):
    """A call gave another status than PYE_OK."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(ffi.string(lib.pye_status_name(status)).decode())


def check(status: int) -> None:
    if status != lib.PYE_OK:
        raise StatusError(status)


def memory(size: int, align: int = 64, off: int = 0) -> tuple[Any, Any]:
    """Return what keeps `size` bytes alive, and where they are; filled, not zero."""
    raw = ffi.new("uint8_t[]", size + align + off)
    ffi.memmove(raw, b"\xa5" * len(raw), len(raw))
    return raw, raw + (-int(ffi.cast("uintptr_t", raw)) % align) + off


class Epoch:
    """An epoch key."""

    def __init__(
        self, secret: bytes = SECRET, name: bytes = NAME, allowed: int = lib.PYE_GCM_ANY
    ) -> None:
        self.raw, at = memory(lib.pye_epoch_key_size())
        self.key = ffi.cast("pye_epoch_key *", at)
        check(lib.pye_epoch_key_init(self.key, secret, name, allowed))

    def to_seal(self, num: int = 1) -> Any:
        out = ffi.new("pye_page_key **")
        status = lib.pye_epoch_to_seal(self.key, out, num)
        assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
        check(status)
        return out[0]

    def to_open(self, version: int) -> Any:
        out = ffi.new("pye_page_key **")
        status = lib.pye_epoch_to_open(self.key, out, version)
        assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
        check(status)
        return out[0]

    def seal(self, page: bytes, address: int = 0) -> tuple[int, bytes, bytes]:
        """Seal one page; return its version, ciphertext and tag."""
        out, tag = ffi.new("uint8_t[4096]"), ffi.new("uint8_t[16]")
        version = ffi.new("uint64_t *")
        info = ffi.new("pye_page_info *", {"address": address, "flags": 0, "type": 2})
        check(lib.pye_page_seal(self.to_seal(), out, tag, version, page, info))
        return version[0], bytes(out), bytes(tag)

    def open(self, version: int, sealed: bytes, tag: bytes, address: int = 0) -> bytes:
        out = ffi.new("uint8_t[4096]")
        info = ffi.new("pye_page_info *", {"address": address, "flags": 0, "type": 2})
        check(lib.pye_page_open(self.to_open(version), out, sealed, tag, version, info))
        return bytes(out)


class Storage:
    """Nodes in a dictionary. `hook` may change what is given, or fail by a status."""

    def __init__(self) -> None:
        self.nodes: dict[int, bytes] = {}
        self.log: list[tuple[str, int]] = []
        self.kept: list[tuple[int, bytes]] = []  # every node that ever was stored
        self.fail_load = self.fail_store = 0
        # In memory of its own: `at` is not the room that the tree offered.
        self.own: Any = None

        @ffi.callback("pye_status(void *, const uint8_t **, uint8_t *, uint64_t)")
        def load(_context: Any, at: Any, room: Any, node: int) -> int:
            self.log.append(("load", node))
            if self.fail_load:
                return self.fail_load
            assert int(ffi.cast("uintptr_t", room)) % 64 == 0
            if self.own is not None:
                ffi.memmove(self.own, self.nodes[node], 4096)
                at[0] = self.own
            else:
                ffi.memmove(room, self.nodes[node], 4096)
                at[0] = room
            return int(lib.PYE_OK)

        @ffi.callback("pye_status(void *, uint64_t, const uint8_t *)")
        def store(_context: Any, node: int, sealed: Any) -> int:
            self.log.append(("store", node))
            if self.fail_store:
                return self.fail_store
            self.nodes[node] = bytes(ffi.buffer(sealed, 4096))
            self.kept.append((node, self.nodes[node]))
            return int(lib.PYE_OK)

        @ffi.callback("void(void *, uint64_t)")
        def drop(_context: Any, node: int) -> None:
            self.log.append(("drop", node))
            del self.nodes[node]

        self.callbacks = (load, store, drop)

    def fill(self, storage: Any) -> None:
        storage.context = ffi.NULL
        storage.load, storage.store, storage.drop = self.callbacks


class Tree:
    """A version tree. Entries are (version, tag, flags)."""

    def __init__(
        self,
        pages: int,
        cache: int = 16,
        *,
        storage: Storage | None = None,
        secret: bytes = SECRET,
        name: bytes = NAME,
        base: Any = None,
    ) -> None:
        self.epoch = Epoch(secret, name)
        self.storage = storage or Storage()
        self.options = ffi.new("pye_tree_options *")
        self.options.num_pages = pages
        self.options.cache_nodes = cache
        self.options.key = self.epoch.key
        if base is None:
            self.storage.fill(self.options.storage)
        else:
            lib.pye_tree_in_memory(ffi.addressof(self.options.storage), base)
        self.size = lib.pye_tree_size(self.options)
        assert self.size > 0
        self.raw, at = memory(self.size)
        self.tree = ffi.cast("pye_tree *", at)
        check(lib.pye_tree_init(self.tree, self.options))

    def get(self, first: int, num: int = 1) -> list[Entry]:
        entries = ffi.new("pye_tree_entry[]", num)
        ffi.memmove(entries, b"\xa5" * 32 * num, 32 * num)
        status = lib.pye_tree_get(self.tree, entries, first, num)
        return self._entries(status, entries)

    def get_many(self, pages: Sequence[int]) -> list[Entry]:
        entries = ffi.new("pye_tree_entry[]", len(pages))
        ffi.memmove(entries, b"\xa5" * 32 * len(pages), 32 * len(pages))
        status = lib.pye_tree_get_many(self.tree, entries, list(pages), len(pages))
        return self._entries(status, entries)

    def _entries(self, status: int, entries: Any) -> list[Entry]:
        if status != lib.PYE_OK:
            # Wrong arguments touch nothing; whatever else fails leaves zeroes.
            left = bytes(ffi.buffer(entries))
            assert left in (bytes(len(left)), b"\xa5" * len(left))
        check(status)
        return [(e.version, bytes(e.tag), e.flags) for e in entries]

    def put(self, first: int, *entries: Entry) -> None:
        check(lib.pye_tree_put(self.tree, self._array(entries), first, len(entries)))

    def put_many(self, pages: Sequence[int], entries: Iterable[Entry]) -> None:
        array = self._array(list(entries))
        check(lib.pye_tree_put_many(self.tree, array, list(pages), len(pages)))

    def _array(self, entries: Sequence[Entry]) -> Any:
        return ffi.new("pye_tree_entry[]", [list(entry) for entry in entries])

    def clear(self, first: int, num: int) -> None:
        check(lib.pye_tree_clear(self.tree, first, num))

    def prepare(self, pages: Sequence[int]) -> None:
        check(lib.pye_tree_prepare(self.tree, list(pages), len(pages)))

    def release(self) -> None:
        lib.pye_tree_release(self.tree)

    def trim(self, nodes: int = 0) -> None:
        check(lib.pye_tree_trim(self.tree, nodes))

    @property
    def stats(self) -> dict[str, int]:
        stats = ffi.new("pye_tree_stats *")
        lib.pye_tree_read_stats(self.tree, stats)
        return {name: getattr(stats, name) for name, _ in ffi.typeof("pye_tree_stats").fields}


def entry(number: int) -> Entry:
    """Return an entry that no other number has."""
    return number + 1, number.to_bytes(16, "big"), number % 7
