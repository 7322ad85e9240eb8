"""
What sealed memory is compared with, and the memory that the comparison takes.

- :class:`HandlerThread`: the textbook's userfaultfd, in C (``_paging.c``), whose faults a thread
  answers; it opens its pages with the core's own function.
- :class:`SealedPages`: sealed pages in ordinary memory, opened and sealed by calls: what there is
  to do without any fault.
- :class:`LruPages`: a dictionary of pages under `cryptography`, the last used ones open: what a
  programmer of Python would write.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave._core import PageKey
from pyenclave.benchmarks import in_c
from pyenclave.benchmarks.rows import AbsentError

__all__ = [
    "MIB",
    "PAGE",
    "HandlerThread",
    "LruPages",
    "SealedPages",
    "Touch",
    "Words",
    "need_memory",
    "on_processor",
    "plain",
]

PAGE: Final = 4096
MIB: Final = 1 << 20
_SECRET: Final = bytes(range(32))
_BATCH: Final = 64  # pages of a call, where a call has not all
_WORDS: Final = PAGE // 8
_WORD: Final = (1 << 64) - 1
_SOURCE: Final = Path(__file__).with_name("_paging.c")

Words = np.ndarray[Any, np.dtype[np.uint64]]


def need_memory(size: int) -> None:
    """
    Say that a row takes *size* bytes of memory at once.

    Raises:
        AbsentError: This machine, or the group that this process is in, has not as many to give.
    """
    free = []
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):  # no group, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))
        free.append(limit - int((group / "memory.current").read_text("ascii")))
    if free and min(free) < size + size // 4:
        raise AbsentError(f"{size / (1 << 30):.1f} GiB of free memory")


def plain(size: int) -> Words:
    """Return *size* bytes of ordinary memory as words, on a page, in small pages, all written."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # as a heap's pages are
    words = np.frombuffer(memory, np.uint64)
    words[:] = 0
    return words


@contextlib.contextmanager
def on_processor(processor: int) -> Iterator[None]:
    """Bind this thread to *processor* meanwhile."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {processor})
        yield
    finally:
        os.sched_setaffinity(0, before)


class SealedPages:
    """
    Words, sealed page by page into ordinary memory.

    Args:
        words: What is sealed; a whole number of pages.
    """

    def __init__(self, words: Words) -> None:
        self.key = PageKey(_SECRET)
        self.num_pages = words.nbytes // PAGE
        self.sealed = plain(words.nbytes)
        self.tags = bytearray(16 * self.num_pages)
        self.first = self.key.seal_pages(words.data.cast("B"), self._bytes(), self.tags)
        self._versions = [self.first + page for page in range(0, self.num_pages, _BATCH)]

    def _bytes(self, start: int = 0, stop: int | None = None) -> memoryview:
        return self.sealed.data.cast("B")[start:stop]

    def open(self) -> None:
        """Open all of them in place, in one call, as sealed by :meth:`__init__` or :meth:`seal`."""
        whole = self._bytes()
        self.key.open_pages(whole, self.tags, whole, version=self.first, address=0)

    def seal(self) -> None:
        """Seal all of them in place, in one call."""
        whole = self._bytes()
        self.first = self.key.seal_pages(whole, whole, self.tags)
        self._versions = [self.first + page for page in range(0, self.num_pages, _BATCH)]

    def _batches(self) -> Iterator[tuple[int, int, memoryview, memoryview]]:
        """Give each batch's number, address, pages and tags."""
        tags = memoryview(self.tags)
        for batch, page in enumerate(range(0, self.num_pages, _BATCH)):
            part = self._bytes(page * PAGE, (page + _BATCH) * PAGE)
            yield batch, page * PAGE, part, tags[16 * page : 16 * (page + _BATCH)]

    def seal_in_batches(self) -> None:
        """Seal all of them in place, 64 a call; :meth:`open` does not open what came of it."""
        for batch, address, part, tags in self._batches():
            self._versions[batch] = self.key.seal_pages(part, part, tags, address=address)

    def open_in_batches(self) -> None:
        """Open all of them in place, 64 a call, however they were sealed."""
        for batch, address, part, tags in self._batches():
            version = self._versions[batch]
            self.key.open_pages(part, tags, part, version=version, address=address)

    def through(self, out: Words) -> int:
        """
        Open 64 pages, read a word of each, seal them again, and so on to the end.

        What was sealed again is no longer what :meth:`open` opens.

        Args:
            out: 64 pages of room.

        Returns:
            The sum of the words modulo 2^64.
        """
        total, room = 0, out.data.cast("B")
        for batch, address, part, tags in self._batches():
            opened, version = room[: len(part)], self._versions[batch]
            self.key.open_pages(part, tags, opened, version=version, address=address)
            total += int(out[: len(part) // 8 : _WORDS].sum())
            self._versions[batch] = self.key.seal_pages(opened, part, tags, address=address)
        return total & _WORD

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.key.close()


class _Library:
    """``_paging.c``, compiled."""

    def __init__(self) -> None:
        named = (sysconfig.get_config_var("CC") or "cc").split()[0]
        compiler = shutil.which(named) or shutil.which("cc")
        if compiler is None:
            raise AbsentError("a C compiler")
        with tempfile.TemporaryDirectory(prefix="pyenclave-bench-") as folder:
            target = Path(folder, "paging.so")
            command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(target)]
            if subprocess.run(
                [*command, str(_SOURCE)], capture_output=True, check=False
            ).returncode:
                raise AbsentError(f"a C compiler that compiles {_SOURCE.name}")
            self.functions = ctypes.CDLL(str(target))
        self.functions.paging_region.restype = ctypes.c_uint64
        self.functions.paging_touch.restype = ctypes.c_uint64


class Touch(_Library):
    """The loop that reads the first word of pages and times each; ours and theirs."""

    def __call__(
        self, base: int, order: np.ndarray[Any, np.dtype[np.uint32]]
    ) -> tuple[int, np.ndarray[Any, np.dtype[np.uint32]]]:
        """
        Read the first word of each page of *order*.

        Returns:
            The sum of the words modulo 2^64, and the ns that each took, reading the clock included.
        """
        times = np.zeros(len(order), np.uint32)
        total = self.functions.paging_touch(
            ctypes.c_void_p(base),
            ctypes.c_void_p(order.ctypes.data),
            ctypes.c_size_t(len(order)),
            ctypes.c_void_p(times.ctypes.data),
        )
        return total, times


class HandlerThread:
    """
    Pages that a thread opens when they are touched, by userfaultfd.

    Args:
        pages: The sealed pages. They are used as long as the thread runs.
        touch: The compiled loop, whose library the thread is in too.

    Raises:
        AbsentError: The kernel gives no userfaultfd.
    """

    def __init__(self, pages: SealedPages, touch: Touch) -> None:
        self._library = touch.functions
        self._keep = pages
        self._pager = ctypes.c_void_p()
        ffi, lib = in_c.ffi, in_c.lib
        raw = ffi.new("uint8_t[]", lib.pye_page_key_size() + 64)
        key = ffi.cast("pye_page_key *", raw + (-int(ffi.cast("uintptr_t", raw)) % 64))
        in_c.check(lib.pye_page_key_init(key, _SECRET, 32, bytes(16), lib.PYE_GCM_ANY))
        self._key = raw, key
        opened = int(ffi.cast("uintptr_t", ffi.addressof(lib, "pye_page_open")))
        error = self._library.paging_start(
            ctypes.byref(self._pager),
            ctypes.c_size_t(pages.num_pages),
            ctypes.c_void_p(opened),
            ctypes.c_void_p(int(ffi.cast("uintptr_t", key))),
            ctypes.c_void_p(pages.sealed.ctypes.data),
            ctypes.c_void_p(np.frombuffer(pages.tags, np.uint8).ctypes.data),
            ctypes.c_uint64(pages.first),
        )
        if error:
            lib.pye_page_key_destroy(key)
            raise AbsentError(f"userfaultfd ({os.strerror(error)})")
        self.base: int = self._library.paging_region(self._pager)

    def move(self, processor: int) -> None:
        """Bind the thread to *processor*."""
        error = self._library.paging_move(self._pager, ctypes.c_int(processor))
        if error:
            raise OSError(error, os.strerror(error))

    def drop(self) -> None:
        """Make every page fault again."""
        error = self._library.paging_drop(self._pager)
        if error:
            raise OSError(error, os.strerror(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """
        End the thread and give back the pages.

        Raises:
            AssertionError: It met a page that it could not open.
        """
        status = self._library.paging_stop(self._pager)
        in_c.lib.pye_page_key_destroy(self._key[1])
        if status:
            raise AssertionError(f"the thread could not open a page: {status}")


class LruPages:
    """
    Words in pages that `cryptography` seals; the last used ones are open.

    The fastest that was found with it: one key object, buffers that are used again, no copy beside
    those of the cipher, a page sealed again only if it was written.

    Args:
        words: What the pages hold at first.
        resident: How many pages are open at most.
    """

    def __init__(self, words: Words, resident: int) -> None:
        self._aead = AESGCM(_SECRET)
        self._version = 0
        count = words.nbytes // PAGE
        self._store = memoryview(bytearray(count * (PAGE + 16)))
        self._versions = [0] * count
        self._room = [bytearray(PAGE) for _ in range(resident)]
        self._views = [memoryview(room).cast("Q") for room in self._room]
        self._open: OrderedDict[int, int] = OrderedDict()
        self._dirty: set[int] = set()
        source = words.data.cast("B")
        for page in range(count):
            self._seal(page, source[page * PAGE : (page + 1) * PAGE])

    def _seal(self, page: int, content: memoryview | bytearray) -> None:
        self._version += 1
        at = page * (PAGE + 16)
        nonce = self._version.to_bytes(12, "big")
        self._aead.encrypt_into(
            nonce, content, page.to_bytes(8, "big"), self._store[at : at + PAGE + 16]
        )
        self._versions[page] = self._version

    def _fetch(self, page: int) -> int:
        if len(self._open) < len(self._room):
            slot = len(self._open)
        else:
            oldest, slot = self._open.popitem(last=False)
            if oldest in self._dirty:
                self._dirty.discard(oldest)
                self._seal(oldest, self._room[slot])
        at = page * (PAGE + 16)
        nonce = self._versions[page].to_bytes(12, "big")
        sealed = self._store[at : at + PAGE + 16]
        self._aead.decrypt_into(nonce, sealed, page.to_bytes(8, "big"), self._room[slot])
        self._open[page] = slot
        return slot

    def add(self, places: list[int]) -> None:
        """Add 1 to the words at *places*, one after the other."""
        known, views, dirty = self._open, self._views, self._dirty
        for place in places:
            page = place >> 9
            slot = known.get(page)
            if slot is None:
                slot = self._fetch(page)
            else:
                known.move_to_end(page)
            dirty.add(page)
            view = views[slot]
            word = place & (_WORDS - 1)
            view[word] = view[word] + 1

    def read(self, places: list[int]) -> list[int]:
        """Return the words at *places*."""
        found = []
        for place in places:
            slot = self._open.get(place >> 9)
            slot = self._fetch(place >> 9) if slot is None else slot
            found.append(self._views[slot][place & (_WORDS - 1)])
        return found
