"""What makes two files of SGX differ: fields, sections, pages."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pyenclave.measurement.difference import Difference, compare
from pyenclave.measurement.enclave import PAGE_SIZE
from pyenclave.measurement.explain import access, names_within
from pyenclave.measurement.sgx_file import measure_sgx

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyenclave.measurement.enclave import Layout, Run

__all__ = ["MAX_ROWS", "diff"]

# Rows of pages at most; the rest is one row with their number.
MAX_ROWS = 64

# Computed from the others, or said better by the rows of pages.
_DERIVED = {"mrenclave", "signed_mrenclave", "matches_sigstruct", "warnings", "metadata_blocks",
            "eadd_count", "eextend_count", "metadata_file_offset"}  # fmt: skip
_MEASURED_FIELDS = {"enclave_size", "ssa_frame_size", "heap_pages", "stack_pages", "tcs_count",
                    "tls_pages", "image_size", "reloc_size", "capture_pf_gp_exceptions",
                    "zero_base", "start_address"}  # fmt: skip


def diff(a: Buffer, b: Buffer) -> list[Difference]:
    """
    Name what makes two files of SGX differ.

    Args:
        a: One file; untrusted input.
        b: The other; untrusted input.

    Returns:
        Fields first, then sections by content, then pages (ranges of neighbours in one row).

    """
    found = measure_sgx(a), measure_sgx(b)
    claims = [
        {name: value for name, value in one.claims().items() if name not in _DERIVED}
        for one in found
    ]
    rows = [
        Difference(row.what, row.name, row.a, row.b, row.name in _MEASURED_FIELDS)
        for row in compare("field", claims[0], claims[1])
    ]
    layouts = found[0].layout, found[1].layout
    if layouts[0] is not None and layouts[1] is not None:
        if found[0].mrenclave != found[1].mrenclave:
            rows += _sections(layouts[0], layouts[1])
            rows += _pages(layouts[0], layouts[1])
    elif found[0].mrenclave != found[1].mrenclave:
        rows.append(
            Difference("field", "mrenclave", found[0].mrenclave.hex(), found[1].mrenclave.hex())
        )
    return rows


# From, to, and what is on either side.
_Range = tuple[int, int, tuple[str | None, str | None]]


class _Index:
    """The pages of an enclave by offset."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.places = layout.places()
        self.runs = sorted((run for run in layout.runs if run.pages), key=lambda run: run.offset)

    def bounds(self) -> set[int]:
        return {edge for run in self.runs for edge in (run.offset, run.end)}

    def content(self, low: int, high: int) -> bytes:
        """Return what is at addresses of the enclave (zeros where nothing is)."""
        octets = bytearray(high - low)
        for run in self.runs:
            start, end = max(low, run.offset), min(high, run.end)
            if start >= end or run.content is None or isinstance(run.content, int):
                continue
            with memoryview(run.content) as view:
                part = view.cast("B")[start - run.offset : end - run.offset]
                octets[start - low : end - low] = part
        return bytes(octets)


def _sections(a: Layout, b: Layout) -> list[Difference]:
    """Compare sections with data by name and content, wherever they lie."""
    sides: list[dict[str, Any]] = []
    for layout in (a, b):
        index = _Index(layout)
        top = max((run.end for run in index.runs if not isinstance(run.content, int)), default=0)
        names: dict[str, Any] = {}
        for low, high, name in index.places:
            if 0 <= low < high <= top:
                digest = hashlib.sha256(index.content(low, high)).hexdigest()
                names.setdefault(name, f"{high - low} bytes at {low:#x}, sha256 {digest[:32]}")
        sides.append(names)
    return compare("section", sides[0], sides[1])


def _pages(a: Layout, b: Layout) -> list[Difference]:
    """Walk both enclaves by address and name the ranges of pages that differ."""
    sides = _Index(a), _Index(b)
    edges = sorted(sides[0].bounds() | sides[1].bounds())
    rows: list[Difference] = []
    more = 0
    places = [0, 0]
    last: tuple[int, tuple[str | None, str | None]] | None = None
    for low, high in pairwise(edges):
        pair: list[Run | None] = []
        for side, index in enumerate(sides):
            runs = index.runs
            while places[side] < len(runs) and runs[places[side]].end <= low:
                places[side] += 1
            at = places[side]
            pair.append(runs[at] if at < len(runs) and runs[at].offset <= low else None)
        for start, end, texts in _differing(low, high, pair[0], pair[1]):
            if last == (start, texts) and rows:
                row = rows.pop()
                first = int(row.name.split("-")[0].split()[0], 16)
            else:
                first = start
            last = end, texts
            if len(rows) >= MAX_ROWS:
                more += 1
                continue
            rows.append(Difference("page", _name(sides, first, end), *texts))
    if more:
        rows.append(Difference("page", f"and {more} more ranges", "…", "…"))
    if not rows:
        rows.append(Difference("page", "order", "one order of adding", "another order"))
    return rows


def _differing(low: int, high: int, a: Run | None, b: Run | None) -> list[_Range]:
    """Compare two runs over a range that each covers whole or not at all."""
    if a is None and b is None:
        return []
    texts = _text(a), _text(b)
    if a is None or b is None or texts[0] != texts[1]:
        return [(low, high, texts)]
    if not a.chunks or (isinstance(a.content, int) and a.content == b.content):
        return []
    found: list[_Range] = []
    for at in range(low, high, PAGE_SIZE):
        pages = [run.page((at - run.offset) // PAGE_SIZE) for run in (a, b)]
        if pages[0] == pages[1]:
            continue
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + PAGE_SIZE, found[-1][2])
            continue
        start = next(i for i in range(PAGE_SIZE) if pages[0][i] != pages[1][i])
        shown = [f"…{page[start : start + 8].hex()}… at {at + start:#x}" for page in pages]
        found.append((at, at + PAGE_SIZE, (shown[0], shown[1])))
    return found


def _text(run: Run | None) -> str | None:
    if run is None:
        return None
    measured = {0: "not measured", 0xFFFF: "measured"}.get(run.chunks, f"chunks {run.chunks:#06x}")
    # Zeros from the file and zeros from the loader are the same pages.
    filled = f", fill {run.content:#x}" if isinstance(run.content, int) and run.content else ""
    return f"{access(run.flags)} {measured}{filled}"


def _name(sides: tuple[_Index, _Index], low: int, high: int) -> str:
    names: list[str] = []
    for index in sides:
        found = names_within(index.places, low, high)
        if not found:
            found = [run.what for run in index.runs if run.offset < high and run.end > low][:3]
        names += [name for name in found if name not in names]
    span = f"{low:#x}" if high - low == PAGE_SIZE else f"{low:#x}-{high:#x}"
    return f"{span} ({', '.join(names[:6])})" if names else span
