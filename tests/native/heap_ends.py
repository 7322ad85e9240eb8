"""Heaps for tests that call the core itself, without a signal handler and without Pages."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from failing import state
from proof_state import State

from pyenclave._ffi import ffi, lib

PAGE = 4096
NUM = 1024
RESIDENT = 64
UFFD, MPROTECT = lib.PYE_HEAP_USERFAULTFD, lib.PYE_HEAP_MPROTECT
MLOCK2 = "syscall 325"  # as on x86-64; on AArch64 284
WRITE, UNMAPPED, EXECUTE = lib.PYE_FAULT_WRITE, lib.PYE_FAULT_UNMAPPED, lib.PYE_FAULT_EXECUTE


@dataclass(frozen=True)
class Kind:
    """What a heap is made as."""

    mechanism: int = UFFD
    file: bool = False
    tree: bool = False
    shown: bool = False  # pages are locked one by one, while they are shown

    def __str__(self) -> str:
        names = ["userfaultfd" if self.mechanism == UFFD else "mprotect"]
        names += [name for name in ("file", "tree", "shown") if getattr(self, name)]
        return "-".join(names)


KINDS = [
    Kind(),
    Kind(MPROTECT),
    Kind(file=True),
    Kind(MPROTECT, file=True),
    Kind(shown=True),
    Kind(MPROTECT, shown=True),
    Kind(tree=True),
    Kind(tree=True, file=True),
]


def steered() -> State:
    """Return the state of the test build, which is loaded."""
    assert state is not None
    return state


def options_of(kind: Kind, fd: int = -1) -> Any:
    options = ffi.new("pye_heap_options *")
    options.capacity_pages, options.resident_pages = NUM, RESIDENT
    options.mechanism = kind.mechanism
    options.require_locked = kind.shown
    options.tree_above = 0 if kind.tree else NUM
    options.tree_cache = 1
    options.fd = fd
    return options


class Heap:
    """A heap, and what its pages must be."""

    _mlock_at: dict[Kind, int] = {}  # noqa: RUF012 - learnt once a kind

    def __init__(self, kind: Kind, fd: int) -> None:
        self.kind = kind
        self.options = options_of(kind, fd)
        self.out = ffi.new("pye_heap **")
        self.expected = [0] * NUM
        if kind.shown:
            self._make_shown()
        else:
            assert lib.pye_heap_new(self.out, self.options) == lib.PYE_OK
        self.raw = self.out[0]
        self.base = int(ffi.cast("uintptr_t", lib.pye_heap_base(self.raw)))

    def _make_shown(self) -> None:
        """The lock of the whole view fails, wherever in the making it comes."""
        for at in [self._mlock_at[self.kind]] if self.kind in self._mlock_at else range(1, 60):
            with steered().failing(at, 1) as failure:
                status = lib.pye_heap_new(self.out, self.options)
            if failure.name == MLOCK2:
                assert status == lib.PYE_OK
                assert lib.pye_heap_locks(self.out[0]) == lib.PYE_HEAP_LOCK_SHOWN
                self._mlock_at[self.kind] = at
                return
            lib.pye_heap_free(self.out[0])
        raise AssertionError("no such call")

    def stats(self) -> Any:
        out = ffi.new("pye_heap_stats *")
        assert lib.pye_heap_stats_read(self.raw, out) == lib.PYE_OK
        return out

    def fault(self, page: int, flags: int = 0) -> int:
        return int(lib.pye_heap_fault(self.raw, self.base + page * PAGE, flags))

    def prefetch(self, first: int, num: int) -> int:
        return int(lib.pye_heap_prefetch(self.raw, ffi.NULL, first, num))

    def evict(self, first: int = 0, num: int = NUM) -> int:
        return int(lib.pye_heap_evict(self.raw, ffi.NULL, first, num))

    def pin(self, first: int, num: int) -> int:
        return int(lib.pye_heap_pin(self.raw, first, num))

    def unpin(self, first: int, num: int) -> int:
        return int(lib.pye_heap_unpin(self.raw, first, num))

    def discard(self, first: int, num: int) -> int:
        return int(lib.pye_heap_discard(self.raw, first, num))

    def fill(self, first: int, num: int) -> None:
        """Write each page's number into its page, and leave them cold."""
        assert self.pin(first, num) == lib.PYE_OK
        for page in range(first, first + num):
            ffi.memmove(ffi.cast("void *", self.base + page * PAGE), bytes([page % 255 + 1]) * 8, 8)
            self.expected[page] = page % 255 + 1
        assert self.unpin(first, num) == lib.PYE_OK
        assert self.evict() == lib.PYE_OK

    def forget(self, first: int, num: int) -> None:
        self.expected[first : first + num] = [0] * num

    def right(self, first: int, num: int) -> bool:
        """Tell whether the pages are what was written, read by who has pinned them."""
        assert self.pin(first, num) == lib.PYE_OK
        found = [
            bytes(ffi.buffer(ffi.cast("uint8_t *", self.base + page * PAGE), 8))
            for page in range(first, first + num)
        ]
        assert self.unpin(first, num) == lib.PYE_OK
        return found == [bytes([value]) * 8 for value in self.expected[first : first + num]]

    def poison(self) -> tuple[int, int, int]:
        """Return the status, the page and the errno of what poisoned the heap."""
        page, error = ffi.new("uint64_t *"), ffi.new("int32_t *")
        status = lib.pye_heap_poisoned(self.raw, page, error)
        return int(status), int(page[0]), int(error[0])


@contextmanager
def heap_of(kind: Kind) -> Iterator[Heap]:
    with tempfile.TemporaryFile() as file:
        heap = Heap(kind, file.fileno() if kind.file else -1)
        try:
            yield heap
        finally:
            lib.pye_heap_free(heap.raw)
