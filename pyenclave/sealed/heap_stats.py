"""What a sealed heap counts: figures, a live view of them, and a picture of their course."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pyenclave.errors import EnclaveError
from pyenclave.sealed._size import size_text
from pyenclave.sealed.heap_plot import svg

if TYPE_CHECKING:
    from pyenclave import _core

__all__ = ["HeapStats", "HeapWatch", "Sample"]

_PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class HeapStats:
    """
    A heap at one moment, and what was counted since it was made.

    Attributes:
        faults: Accesses that found a page sealed, or not used before.
        pages_in: Pages that were opened.
        pages_out: Pages that were sealed.
        evictions: Pages that were taken out of view.
        read_ahead: Pages that were opened before anyone touched them.
        read_ahead_hits: Those of them that were needed.
        helped: Pages that a helper opened.
        resident_bytes: What is plaintext now.
        resident_peak: The most that ever was.
        resident_limit: The most that may be.
        locked_bytes: How much of it cannot reach swap.
        pinned_bytes: What is kept resident by ``pin``.
        taken_bytes: What arrays have, and the pages that small ones share.
        longest_free: The longest array that there is room for.
        refused: Arrays for which there was no room.
        capacity: What the heap can hold.
        metadata_bytes: Address space of versions, tags and queues; used as pages are.
        mechanism: ``"userfaultfd"`` or ``"mprotect"``.

    """

    faults: int
    pages_in: int
    pages_out: int
    evictions: int
    read_ahead: int
    read_ahead_hits: int
    helped: int
    resident_bytes: int
    resident_peak: int
    resident_limit: int
    locked_bytes: int
    pinned_bytes: int
    taken_bytes: int
    longest_free: int
    refused: int
    capacity: int
    metadata_bytes: int
    mechanism: str

    @classmethod
    def of(cls, pages: _core.Pages, arena: _core.Arena) -> HeapStats:
        """Read them."""
        found: dict[str, int] = pages.stats()
        taken, longest, refused = arena.figures()
        return cls(
            faults=found["faults"],
            pages_in=found["pages_in"],
            pages_out=found["pages_out"],
            evictions=found["evictions"],
            read_ahead=found["read_ahead"],
            read_ahead_hits=found["read_ahead_hits"],
            helped=found["helped"],
            resident_bytes=found["resident"] * _PAGE,
            resident_peak=found["resident_peak"] * _PAGE,
            resident_limit=found["resident_limit"] * _PAGE,
            locked_bytes=found["locked"] * _PAGE,
            pinned_bytes=found["pinned"] * _PAGE,
            taken_bytes=taken,
            longest_free=longest,
            refused=refused,
            capacity=found["capacity"] * _PAGE,
            metadata_bytes=found["metadata_bytes"],
            mechanism=pages.mechanism,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures at one time, in seconds since the watch began."""

    seconds: float
    stats: HeapStats


def line_of(before: Sample, now: Sample) -> str:
    """Say in one line what happened between two samples."""
    then, stats = before.stats, now.stats
    seconds = max(now.seconds - before.seconds, 1e-9)
    opened = (stats.pages_in - then.pages_in) * _PAGE / seconds
    sealed = (stats.pages_out - then.pages_out) * _PAGE / seconds
    ahead = stats.read_ahead - then.read_ahead
    hits = min(1.0, (stats.read_ahead_hits - then.read_ahead_hits) / ahead) if ahead else 0.0
    return (
        f"{now.seconds:7.1f} s  plaintext {size_text(stats.resident_bytes)} of "
        f"{size_text(stats.resident_limit)}  taken {size_text(stats.taken_bytes)}  "
        f"opened {size_text(opened)}/s  sealed {size_text(sealed)}/s  "
        f"{(stats.faults - then.faults) / seconds:,.0f} faults/s"
        + (f"  read-ahead {hits:.0%}" if ahead else "")
    )


class HeapWatch:
    """
    Samples a heap while its block runs, and shows each sample if it was asked to.

    Attributes:
        samples: What was seen, oldest first; from 4,000 on every second one is dropped.

    """

    _MOST = 4000

    def __init__(
        self, read: Callable[[], HeapStats], interval: float, *, show: bool | None, file: Any
    ) -> None:
        if not 0.001 <= interval <= 3600:
            raise ValueError(f"interval: expected 0.001 … 3600 seconds, found {interval!r}")
        self.samples: list[Sample] = []
        self._read = read
        self._interval = interval
        self._file = file
        self._terminal = bool(getattr(file, "isatty", lambda: False)())
        self._show = self._terminal if show is None else show
        self._began = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError("a watch is used once")
        self._began = time.monotonic()
        self._take()
        self._thread = threading.Thread(target=self._run, name="sealed-heap-watch", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C may come when the thread runs already
            self._over.set()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._take()
        if self._show and self._terminal:
            print(file=self._file)

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._take()

    def _take(self) -> None:
        try:
            sample = Sample(time.monotonic() - self._began, self._read())
        except EnclaveError:
            return  # the heap has ended; who uses it is told
        self.samples.append(sample)
        if len(self.samples) > self._MOST:
            del self.samples[1:-1:2]
        if self._show and len(self.samples) > 1:
            text = line_of(self.samples[-2], sample)
            if self._terminal:
                width = max(20, _columns(self._file) - 1)
                text = "\r" + text[:width].ljust(width)
            print(text, end="" if self._terminal else "\n", file=self._file, flush=True)

    def svg(self) -> str:
        """Return a picture of the course: what was plaintext, opened and sealed, and the faults."""
        return svg([(sample.seconds, sample.stats) for sample in self.samples])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write that picture to a file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.svg())


def _columns(file: Any) -> int:
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 80
