"""What was measured, as a table of ranges: for ``measure sgx --explain``."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from pyenclave.measurement.enclave import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyenclave.measurement.enclave import Layout, Run

__all__ = ["access", "explain", "names_within", "page_digests"]

_MAX_NAMES = 6


def access(flags: int) -> str:
    """Return SECINFO.FLAGS as text: ``R-X``, ``TCS``."""
    if flags == 0x100:
        return "TCS"
    return "".join(letter if flags & bit else "-" for bit, letter in ((1, "R"), (2, "W"), (4, "X")))


def explain(layout: Layout) -> list[dict[str, Any]]:
    """
    List what was measured, in the order of measuring; neighbours alike are one row.

    Args:
        layout: Of the enclave.

    Returns:
        Rows with ``offset``, ``pages``, ``flags`` (``R-X``, ``TCS``), ``measured`` (``all``,
        ``part``, ``none``), ``content`` (``data``, ``zero``, ``fill 0x…``, ``unknown``),
        ``what``, ``sections`` (names of those that lie there) and, for data, ``sha256``.

    """
    places = layout.places()
    rows = []
    for group in _groups(layout.runs):
        first, last = group[0], group[-1]
        row: dict[str, Any] = {
            "offset": first.offset,
            "pages": sum(run.pages for run in group),
            "flags": access(first.flags),
            "measured": {0: "none", 0xFFFF: "all"}.get(first.chunks, "part"),
            "content": _content(first),
            "what": first.what,
            "sections": names_within(places, first.offset, last.end)[:_MAX_NAMES],
        }
        if row["content"] == "data":
            digest = hashlib.sha256()
            for run in group:
                if run.content is not None and not isinstance(run.content, int):
                    digest.update(run.content)
            row["sha256"] = digest.hexdigest()
        rows.append(row)
    return rows


def _content(run: Run) -> str:
    if run.content is None:
        return "unknown" if not run.chunks else "none"
    if not isinstance(run.content, int):
        return "data"
    return f"fill {run.content:#010x}" if run.content else "zero"


def _key(run: Run) -> tuple[object, ...]:
    return run.flags, run.chunks, run.what, _content(run)


def _groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    group: list[Run] = []
    for run in runs:
        if group and (group[-1].end != run.offset or _key(group[0]) != _key(run)):
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def names_within(places: list[tuple[int, int, str]], start: int, end: int) -> list[str]:
    """Return the names of the places that have a byte from *start* to before *end*."""
    stop = bisect_right(places, (end - 1, 1 << 64, ""))
    return [name for low, high, name in places[:stop] if high > start and low < end]


def page_digests(layout: Layout) -> Iterator[tuple[int, int, int, str | None]]:
    """
    Iterate over the pages in the order of EADD, to find where two computations part.

    Args:
        layout: Of the enclave.

    Yields:
        (offset, SECINFO.FLAGS, mask of measured chunks, SHA-256 of the page if it is measured).

    """
    for run in layout.runs:
        same = None
        if not run.chunks:
            digest = None
        elif isinstance(run.content, int):
            digest = same = hashlib.sha256(run.page(0)).hexdigest()
        for index in range(run.pages):
            if run.chunks and same is None:
                digest = hashlib.sha256(run.page(index)).hexdigest()
            yield run.offset + index * PAGE_SIZE, run.flags, run.chunks, digest
