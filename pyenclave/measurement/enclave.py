"""
An enclave as a list of runs of pages, and its MRENCLAVE.

Every reader of a file format (``sgx_elf``, ``oe``, ``sgxs``) says what the loader would add, in the
loader's order; this module checks that hardware would take it, bounds the work, and hashes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from pyenclave.errors import MeasurementError
from pyenclave.measurement._records import PAGE_SIZE, begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from typing_extensions import Buffer

__all__ = [
    "MAX_HASHED",
    "MAX_RUNS",
    "PAGE_SIZE",
    "Layout",
    "Run",
    "check_layout",
    "kind_of",
    "measure",
    "page_down",
    "page_up",
    "segment_runs",
]

# What is hashed at most: an enclave of 1 TiB with an unmeasured heap, or 13 GB of measured pages.
MAX_HASHED = 1 << 34
MAX_RUNS = 1 << 20

ALL_CHUNKS = 0xFFFF
_EADD_BYTES = 64
_CHUNK_BYTES = 64 + 256


class Run(NamedTuple):
    """
    Neighbouring pages that are added one after another with equal flags.

    Attributes:
        offset: Of the first page, in bytes from the enclave's base.
        pages: How many.
        flags: SECINFO.FLAGS.
        content: The pages' bytes; an int is the 32-bit word that fills them; None if it is not
            measured and not known.
        what: What they are, for people.
        chunks: Bit i: chunk i (256 bytes) of each page is measured.

    """

    offset: int
    pages: int
    flags: int
    content: Buffer | int | None
    what: str
    chunks: int = ALL_CHUNKS

    @property
    def end(self) -> int:
        """Where the last page ends."""
        return self.offset + self.pages * PAGE_SIZE

    def page(self, index: int) -> bytes:
        """Return the bytes of page *index* of the run (zeros where they are not known)."""
        if self.content is None:
            return bytes(PAGE_SIZE)
        if isinstance(self.content, int):
            return self.content.to_bytes(4, "little") * (PAGE_SIZE // 4)
        with memoryview(self.content) as view:
            return bytes(view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])


def _no_places() -> list[tuple[int, int, str]]:
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """
    What a loader would build from a file.

    Attributes:
        kind: ``sgx-sdk-elf``, ``sgx-oe-elf``, ``sgx-sgxs`` or ``pyenclave``.
        size: SECS.SIZE in bytes.
        ssa_frame_size: In pages.
        runs: The pages, in the order of EADD.
        sigstruct: The 1808 bytes of SIGSTRUCT in the file; None if it has none.
        details: What else the file says, by the names that ``measure --json`` prints.
        places: Lists (start, end, name) of the named parts of the enclave, ascending.

    """

    kind: str
    size: int
    ssa_frame_size: int
    runs: Sequence[Run]
    sigstruct: bytes | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    places: Callable[[], list[tuple[int, int, str]]] = _no_places

    @property
    def eadd_count(self) -> int:
        """How many pages are added."""
        return sum(run.pages for run in self.runs)

    @property
    def eextend_count(self) -> int:
        """How many chunks are measured."""
        return sum(run.pages * run.chunks.bit_count() for run in self.runs)


def page_down(address: int) -> int:
    """Return the start of the page that an address is in."""
    return address & -PAGE_SIZE


def page_up(address: int) -> int:
    """Return the first start of a page that is not below an address."""
    return -(-address // PAGE_SIZE) * PAGE_SIZE


def check_layout(layout: Layout) -> None:
    """
    Check that hardware would take the pages, and that measuring them is bounded work.

    Raises:
        MeasurementError: Too much, a page outside the enclave, or two pages in one place.

    """
    if len(layout.runs) > MAX_RUNS:
        raise MeasurementError("too many parts", expected=MAX_RUNS, found=len(layout.runs))
    hashed, last, ascending = 64, 0, True
    for run in layout.runs:
        if not run.pages:
            continue
        hashed += run.pages * (_EADD_BYTES + run.chunks.bit_count() * _CHUNK_BYTES)
        if run.offset % PAGE_SIZE or run.end > layout.size or run.offset < 0:
            raise MeasurementError(
                f"{run.what}: pages outside the enclave",
                expected=f"below {layout.size:#x}",
                found=f"{run.pages} pages at {run.offset:#x}",
            )
        ascending &= run.offset >= last
        last = run.end
    if hashed > MAX_HASHED:
        raise MeasurementError(
            "the enclave is too large to be measured", expected=MAX_HASHED, found=hashed
        )
    if not ascending:
        _refuse_overlaps([run for run in layout.runs if run.pages])


def _refuse_overlaps(runs: list[Run]) -> None:
    runs.sort(key=lambda run: run.offset)
    for before, after in pairwise(runs):
        if after.offset < before.end:
            raise MeasurementError(
                "a page is added twice",
                expected="a free range",
                found=f"{after.offset:#x} by {before.what} and by {after.what}",
            )


def measure(layout: Layout) -> bytes:
    """
    Compute MRENCLAVE of an enclave whose pages are measured whole or not at all.

    Args:
        layout: What the loader would build.

    Returns:
        The 32 bytes.

    Raises:
        MeasurementError: Hardware would refuse it, or it is too large.

    """
    check_layout(layout)
    try:
        recorder = begin(layout.size, layout.ssa_frame_size)
    except (ValueError, OverflowError) as error:
        raise MeasurementError(f"the enclave cannot be built: {error}") from None
    for run in layout.runs:
        try:
            if not run.chunks:
                recorder.add_unmeasured(run.pages, run.offset, run.flags)
            elif isinstance(run.content, int):
                recorder.add_filled(run.pages, run.offset, run.flags, run.content)
            elif run.content is None or run.chunks != ALL_CHUNKS:
                raise MeasurementError(f"{run.what}: pages measured in part have no run")
            else:
                recorder.add_pages(run.content, run.offset, run.flags)
        except (ValueError, OverflowError) as error:
            raise MeasurementError(f"{run.what}: {error}") from None
    return recorder.digest()


# ---- segments ------------------------------------------------------------------------------------


class Patches:
    """
    Bytes that the loader writes over an image before it measures.

    Args:
        limit: How many pages may be touched at most.

    """

    def __init__(self, limit: int = 1 << 18) -> None:
        self._pages: dict[int, list[tuple[int, memoryview]]] = {}
        self._sorted: list[int] | None = None
        self._room = limit

    def add(self, address: int, data: Buffer) -> None:
        """Write *data* at an address; what is written later wins."""
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            page = page_down(address + at)
            part = view[at : at + page + PAGE_SIZE - (address + at)]
            self._room -= 1
            if self._room < 0:
                raise MeasurementError("too much is patched")
            self._pages.setdefault(page, []).append((address + at - page, part))
            at += len(part)
        self._sorted = None

    def between(self, start: int, end: int) -> list[int]:
        """Return the starts of the touched pages in a range, ascending."""
        if self._sorted is None:
            self._sorted = sorted(self._pages)
        found = self._sorted
        return found[bisect_right(found, start - 1) : bisect_right(found, end - 1)]

    def apply(self, page: bytearray, address: int) -> None:
        """Write what belongs on the page at *address*."""
        for at, part in self._pages.get(address, ()):
            page[at : at + len(part)] = part


def segment_runs(
    what: str,
    address: int,
    content: memoryview,
    end: int,
    flags: int,
    *,
    patches: Patches | None = None,
    writable: Sequence[int] = (),
) -> Iterator[Run]:
    """
    Iterate over the pages of a segment, all measured, without copying whole pages.

    Content that does not fill its first or last page stands between zeros; after it come zero
    pages.

    Args:
        what: What to call the pages.
        address: Where the content begins; need not be the start of a page.
        content: The bytes of the file.
        end: Where the segment ends in the enclave, a page boundary.
        flags: SECINFO.FLAGS.
        patches: Written over the segment, the zeros included.
        writable: Starts of pages, ascending, that get W although the segment has not.

    Yields:
        Runs in ascending order.

    """
    start, content_end = page_down(address), address + len(content)
    if not content:
        content_end = start
    special = set(patches.between(start, end)) if patches is not None else set()
    if address != start and content:
        special.add(start)
    if content_end % PAGE_SIZE:
        special.add(page_down(content_end))
    writes = set(writable)
    special |= {page for page in writes if start <= page < content_end}
    at = start
    for page in [*sorted(special), end]:
        full = min(page, page_down(content_end))
        if at < full:
            part = content[at - address : full - address]
            yield Run(at, len(part) // PAGE_SIZE, flags, part, what)
            at = full
        if at < page:
            yield Run(at, (page - at) // PAGE_SIZE, flags, 0, what)
            at = page
        if page < end:
            octets = bytearray(PAGE_SIZE)
            low, high = max(page, address), min(page + PAGE_SIZE, content_end)
            if low < high:
                octets[low - page : high - page] = content[low - address : high - address]
            if patches is not None:
                patches.apply(octets, page)
            extra = 2 if page in writes and page < content_end else 0
            yield Run(page, 1, flags | extra, octets, what)
            at = page + PAGE_SIZE


# ---- recognising files ---------------------------------------------------------------------------

_SIGSTRUCT_HEADER = bytes.fromhex("06000000e100000000000100")


def kind_of(data: memoryview) -> str | None:
    """
    Tell from its first bytes what a file claims to be.

    Returns:
        ``elf``, ``sgx-sgxs``, ``pyenclave``, ``sgx-sigstruct``, or None.

    """
    start = bytes(data[:12])
    if start.startswith(b"\x7fELF"):
        return "elf"
    if start[:8] in (b"ECREATE\0", b"UNSIZED\0"):
        return "sgx-sgxs"
    if start[:8] == b"PYENCIMG":
        return "pyenclave"
    if start == _SIGSTRUCT_HEADER:
        return "sgx-sigstruct"
    return None
