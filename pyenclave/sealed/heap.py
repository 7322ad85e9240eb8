"""
Sealed memory: NumPy arrays of any size, of which a bounded part is plaintext at a time.

``docs/sealed-memory.md`` says what is ciphertext and when; ``csrc/include/pyenclave/heap.h`` how
pages come and go.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import math
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pyenclave import _core
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveError,
    EnclaveStateError,
    SealingError,
    SealLimitError,
)
from pyenclave.sealed import heap_io
from pyenclave.sealed._size import parse_size, size_text
from pyenclave.sealed.heap_file import create_file
from pyenclave.sealed.heap_stats import HeapStats, HeapWatch

__all__ = ["HeapFullError", "SealedHeap"]

_PAGE = 4096
_LEAST = 64 * _PAGE  # resident
_UNPINNED = 32  # pages of it that cannot be pinned: PYE_HEAP_UNPINNED
_MOST = 8 << 40  # PYE_HEAP_MAX_PAGES


class HeapFullError(SealLimitError, MemoryError):
    """The heap has no free range as long as was asked for; also a ``MemoryError``."""


def _whole_pages(value: object, name: str) -> int:
    try:
        size = parse_size(value)
    except ValueError as error:
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise TypeError(f"{name}: expected {error}, found {value!r}") from None
        raise ValueError(f"{name}: expected {error}, found {value!r}") from None
    if not 0 < size <= _MOST:
        raise ValueError(f"{name}: expected 1 … {_MOST} bytes (8 TiB), found {size}")
    return -(-size // _PAGE) * _PAGE


def _error_classes(pages: _core.Pages, name: str) -> tuple[type[BaseException], ...]:
    """
    Return what is raised in a thread that touches an ended heap; each is made without arguments.

    One set a heap, because an exception that is raised from outside a thread is only a class. Each
    keeps the heap weakly: whoever touches it has it.
    """
    heap = weakref.ref(pages)

    def told() -> _core.Pages | None:
        _core.heap_told()
        found = heap()
        if found is not None:
            found.conceal()
        return found

    class PoisonedError(SealingError):
        def __init__(self, message: str = "", **details: Any) -> None:
            found = told()
            if not message:
                why = found.poisoned if found is not None else None
                message = f"{name} is poisoned: {why or 'a page was changed outside'}"
                details = {
                    "advice": "What it held is gone, and what was read since then is zeros; make a "
                    "new heap and read the data again."
                }
            super().__init__(message, **details)

    class ClosedError(EnclaveClosedError):
        def __init__(self, message: str = "", **details: Any) -> None:
            told()
            super().__init__(message or f"{name} was closed: its arrays are gone", **details)

    class ForkedError(EnclaveStateError):
        def __init__(self, message: str = "", **details: Any) -> None:
            told()
            if not message:
                message = f"{name} belongs to the process that made it, not to its forked child"
                details = {"advice": "Make a heap in the child, or send it what it needs."}
            super().__init__(message, **details)

    for cls, base in (
        (PoisonedError, SealingError),
        (ClosedError, EnclaveClosedError),
        (ForkedError, EnclaveStateError),
    ):
        cls.__name__ = cls.__qualname__ = base.__name__
    return PoisonedError, ClosedError, ForkedError


def _stay_in_front() -> None:
    """
    Have ``faulthandler.enable`` leave our handler in front of its own.

    In front of ours, it takes the first fault for a crash. There is no hook for it: the function is
    replaced, once in a process, by one that calls it.
    """
    enable = faulthandler.enable
    if hasattr(enable, "__wrapped__"):
        return

    @functools.wraps(enable)
    def enable_behind(*args: Any, **options: Any) -> None:
        enable(*args, **options)
        _core.heap_front()

    faulthandler.enable = enable_behind


class _NumpyScope:
    """Has NumPy take the memory of new arrays from a heap, in this context."""

    def __init__(self, heap: SealedHeap) -> None:
        self._heap = heap
        self._before: Any = None
        self._refused = 0

    def __enter__(self) -> SealedHeap:
        if self._before is not None:
            raise EnclaveStateError("this scope is entered already; heap.numpy() makes another")
        self._before, self._refused = self._heap._enter_numpy()  # noqa: SLF001 - one module
        return self._heap

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        before, self._before = self._before, None
        _core.numpy_handler(before)
        if kind is not None and issubclass(kind, MemoryError):
            self._heap._explain(error, self._refused)  # noqa: SLF001


class SealedHeap:
    """
    Memory for NumPy arrays: *resident* bytes of it are plaintext at most, all else is ciphertext.

    Arrays of it are ordinary ``numpy.ndarray``; pages are opened, checked and sealed again as they
    are touched, in any thread. An array keeps its part of the heap; when it goes, the part is free
    again. A page that was changed from outside poisons the heap: everything in it is wiped, and
    whoever touches it gets SealingError (``docs/sealed-memory.md`` says when exactly).

    Args:
        capacity: How much the heap can hold, as bytes or text like ``"8 GiB"``; rounded up to
            pages of 4 KiB. Address space only: memory is used as it is touched.
        resident: How much of it may be plaintext at any moment; at least 256 KiB.
        path: A file for the ciphertext instead of memory, so that *capacity* may be larger than
            the memory there is. It must not exist, or be of a heap that has ended; it is removed
            when the heap is closed, and holds nothing that could be used again.
        require: ``"locked"`` refuses unless the resident pages are locked in memory, so that they
            never reach swap (``stats.locked_bytes``).
        mechanism: ``"auto"``, ``"userfaultfd"`` or ``"mprotect"``.
        read_ahead: Pages that one fault may bring at most (1 … 256); 0 for the default.

    Raises:
        ValueError: A size that no heap can have.
        SealingError: *path* is another file, or is in use.
        SealLimitError: *require* cannot be met.
        OSError: The system refuses what a heap needs.

    """

    def __init__(
        self,
        capacity: int | str,
        resident: int | str,
        path: str | os.PathLike[str] | None = None,
        *,
        require: Literal["locked"] | None = None,
        mechanism: Literal["auto", "userfaultfd", "mprotect"] = "auto",
        read_ahead: int = 0,
    ) -> None:
        if require not in (None, "locked"):
            raise ValueError(f'require: expected "locked" or None, found {require!r}')
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise EnclaveStateError(
                "sealed memory was not tried without the global interpreter lock",
                advice="Use a Python that is built with it.",
            )
        size = _whole_pages(capacity, "capacity")
        limit = _whole_pages(resident, "resident")
        if limit < _LEAST:
            raise ValueError(f"resident: expected at least {_LEAST} bytes (256 KiB), found {limit}")
        try:
            with contextlib.ExitStack() as undo:
                fd = -1 if path is None else undo.enter_context(create_file(path, size))
                self._pages = _core.Pages(
                    size,
                    min(limit, max(size, _LEAST)),
                    fd=fd,
                    require_locked=require == "locked",
                    mechanism=mechanism,
                    read_ahead=read_ahead,
                )
                # The file goes with the last array at the latest.
                self._end = weakref.finalize(self._pages, undo.pop_all().close)
        except PermissionError as error:
            if require is None:
                raise
            raise SealLimitError(
                "the resident pages cannot be locked in memory",
                expected=f"{size_text(limit)} that may be locked",
                found=error.strerror,
                advice="Raise the limit (ulimit -l, LimitMEMLOCK=), or ask for less.",
            ) from error
        self._name = f"the sealed heap of {size_text(size)}"
        self._arena = _core.Arena(self._pages)
        self._handler = self._arena.handler()
        _stay_in_front()
        self._threads: set[int] = {threading.main_thread().ident or 0}
        self._closed = False
        self._errors = _error_classes(self._pages, self._name)
        _core.heap_errors(self._pages, self._errors, self._threads)
        self._bytes = limit

    # ---- arrays ----

    def empty(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, *, order: str = "C"
    ) -> NDArray[Any]:
        """
        Return a new array in the heap, with any content.

        Args:
            shape: As for ``numpy.empty``.
            dtype: Of the elements; not objects, which would lie outside.
            order: ``"C"`` or ``"F"``.

        Raises:
            HeapFullError: There is no room (SealLimitError, and MemoryError).
            EnclaveStateError: The heap was closed, or belongs to another process.
            SealingError: The heap is poisoned.

        """
        kind = self._plain(shape, dtype)
        return self._make(lambda: np.empty(shape, kind, order=order))  # type: ignore[call-overload, no-any-return]

    def zeros(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, *, order: str = "C"
    ) -> NDArray[Any]:
        """Return a new array of zeros in the heap; pages are used as they are touched."""
        kind = self._plain(shape, dtype)
        return self._make(lambda: np.zeros(shape, kind, order=order))  # type: ignore[call-overload, no-any-return]

    def array(
        self, data: ArrayLike, dtype: DTypeLike | None = None, *, order: str = "K"
    ) -> NDArray[Any]:
        """Return a copy of *data* in the heap. What is copied stays where it is, in the clear."""
        if dtype is not None:
            self._plain((), dtype)
        made = self._make(lambda: np.array(data, dtype=dtype, copy=True, order=order))  # type: ignore[call-overload]
        self._plain((), made.dtype)
        return made  # type: ignore[no-any-return]

    def buffer(self, size: int | str) -> memoryview:
        """Return *size* zero bytes of the heap, to be written by anything that takes a buffer."""
        return memoryview(self.zeros(parse_size(size), np.uint8).data)

    def numpy(self) -> contextlib.AbstractContextManager[SealedHeap]:
        """
        Have NumPy take the memory of all new arrays from the heap, temporaries included.

        It holds for the thread or asyncio task that enters it, until it is left; arrays live on.
        When the heap is full, NumPy's MemoryError leaves the block as HeapFullError.
        """
        return _NumpyScope(self)

    def _plain(self, shape: object, dtype: DTypeLike) -> np.dtype[Any]:
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise TypeError(
                f"dtype: {kind} refers to Python objects, which lie outside of the heap"
            )
        sizes = shape if isinstance(shape, tuple | list) else (shape,)
        wanted = math.prod(int(n) for n in sizes) * kind.itemsize
        if wanted > self._pages.capacity:
            self._check()
            raise self._full(wanted)
        return kind

    def _make(self, function: Any) -> Any:
        before, refused = self._enter_numpy()
        try:
            return function()
        except MemoryError as error:
            self._explain(error, refused)
            raise
        finally:
            _core.numpy_handler(before)

    def _enter_numpy(self) -> tuple[Any, int]:
        self._check()
        self._threads.add(threading.get_ident())
        refused = self._arena.figures()[2]
        return _core.numpy_handler(self._handler), refused

    def _explain(self, error: BaseException | None, refused: int) -> None:
        """Say HeapFullError instead of NumPy's MemoryError, if it was for want of room here."""
        if self._arena.figures()[2] > refused and not isinstance(error, HeapFullError):
            raise self._full(None) from error

    def _full(self, wanted: int | None) -> HeapFullError:
        taken, largest, _ = self._arena.figures()
        return HeapFullError(
            f"{self._name} has no room",
            expected=None if wanted is None else f"a range of {wanted} bytes",
            found=f"{taken} bytes taken, {largest} bytes the longest free range",
            advice="Free arrays, or make the heap larger; that costs address space only.",
        )

    # ---- pages ----

    def prefetch(self, array: Any) -> int:
        """Bring the pages of *array* before they are touched, as far as there is room; how many."""
        return self._pages.prefetch(*self._range(array))

    def evict(self, array: Any = None) -> int:
        """Seal what is resident of *array* (of the whole heap); how many pages that were."""
        return self._pages.evict(
            *((0, self._pages.capacity) if array is None else self._range(array))
        )

    @contextlib.contextmanager
    def helper(self) -> Iterator[Self]:
        """
        Lend the heap a second thread while the block runs.

        Where many pages are opened at once (`prefetch`, sequences of accesses), it opens half, on
        another processor, whichever thread waits for them; it sleeps when there is nothing to do.
        That is worth it where pages come into room, not where each pushes out another, nor where
        no processor is idle.

        Raises:
            BusyError: It has one already.

        """
        self._check()
        thread = threading.Thread(target=self._pages.help, name="sealed-heap-helper", daemon=True)
        try:
            self._pages.hire()
        except EnclaveError:
            raise  # it has one already, which is not ours to dismiss
        except BaseException:  # an interrupt came as it was hired
            self._pages.dismiss()
            self._pages.help()
            raise
        try:
            thread.start()
        except BaseException:
            self._pages.dismiss()
            self._pages.help()  # returns at once: the heap may have another
            raise
        try:
            yield self
        finally:
            self._pages.dismiss()
            thread.join()

    @contextlib.contextmanager
    def pin(self, array: Any) -> Iterator[Any]:
        """
        Keep *array* resident while the block runs, for system calls and devices.

        Raises:
            SealLimitError: More than the resident limit less 128 KiB would be pinned.

        """
        where = self._range(array)
        try:
            self._pages.pin(*where)
        except SealLimitError:
            room = max(self._bytes - _UNPINNED * _PAGE, 0)
            raise SealLimitError(
                "the array is too large to be pinned",
                expected=f"at most {size_text(room)} pinned at a time",
                found=f"{size_text(where[1])}, and {size_text(self.stats.pinned_bytes)} pinned",
                advice="Give the heap a larger resident=, or use write_to or read_into,"
                " which pin a part after the other.",
            ) from None
        try:
            yield array
        finally:
            if not self._closed and self._pages.poisoned is None:
                self._pages.unpin(*where)

    def write_to(self, file: Any, array: Any) -> int:
        """
        Write the bytes of *array* to *file* and return their number.

        A system call that is handed a sealed page fails (``OSError``, ``EFAULT``); this pins a part
        of the array after the other while it is written.

        Args:
            file: A descriptor, a socket, or an object with ``write``.
            array: A contiguous array or buffer of this heap.

        """
        return heap_io.write_to(self._pages, file, array, self._slice())

    def read_into(self, file: Any, array: Any) -> int:
        """
        Fill *array* from *file* and return how many bytes came before its end.

        Args:
            file: A descriptor, a socket, or an object with ``readinto``.
            array: A contiguous, writable array or buffer of this heap.

        """
        return heap_io.read_into(self._pages, file, array, self._slice())

    def _slice(self) -> int:
        """Bytes that are pinned at a time: half of what could be, so that threads can share it."""
        self._check()
        pages = (min(self._bytes, self._pages.capacity) // _PAGE - _UNPINNED) // 2
        return max(1, min(pages, 1024)) * _PAGE

    def _range(self, array: Any) -> tuple[int, int]:
        self._check()
        return heap_io.pages_of(self._pages, array)

    def __contains__(self, array: Any) -> bool:
        try:
            heap_io.pages_of(self._pages, array)
        except ValueError:
            return False
        return True

    # ---- state ----

    def _check(self) -> None:
        poisoned, closed, forked = self._errors
        if not self._pages.address:
            raise forked()
        if self._closed:
            raise closed()
        if self._pages.poisoned is not None:
            raise poisoned()

    @property
    def capacity(self) -> int:
        """Bytes that the heap can hold."""
        return self._pages.capacity

    @property
    def mechanism(self) -> str:
        """How pages are shown and hidden: ``"userfaultfd"``, or ``"mprotect"`` (slower)."""
        return self._pages.mechanism

    @property
    def poisoned(self) -> str | None:
        """Why the heap was poisoned, or None."""
        return self._pages.poisoned

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def stats(self) -> HeapStats:
        """What was counted so far, and what is resident now."""
        self._check()
        return HeapStats.of(self._pages, self._arena)

    def watch(
        self, interval: float = 0.25, *, show: bool | None = None, file: Any = None
    ) -> HeapWatch:
        """
        Return a context manager that samples the heap while its block runs.

        Args:
            interval: Seconds between samples.
            show: Whether to show each; None: if *file* is a terminal.
            file: Where to, standard error by default.

        """
        return HeapWatch(
            lambda: self.stats, interval, show=show, file=sys.stderr if file is None else file
        )

    def close(self) -> None:
        """Wipe the heap. Arrays that are left raise EnclaveClosedError. May be called twice."""
        self._closed = True
        self._arena.close()
        self._pages.close()
        self._end()

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "poisoned" if self.poisoned else self.mechanism
        return (
            f"<SealedHeap {size_text(self._pages.capacity)}, {size_text(self._bytes)} resident, "
            f"{state}>"
        )

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a sealed heap cannot be pickled or copied")
