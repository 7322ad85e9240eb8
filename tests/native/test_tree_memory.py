"""What docs/formats/heap.md says of memory is what comes out."""

from __future__ import annotations

import re
from pathlib import Path

from pyenclave._ffi import ffi, lib

PAGE = Path(__file__).resolve().parents[2] / "docs/formats/heap.md"
TIB = 1 << 40


def told(row: str) -> int:
    """Return the number of bytes that a row of the page tells."""
    found = re.search(rf"{row}[^|\d]*(?:\| )?([\d,]+)", PAGE.read_text("utf-8"))
    assert found, row
    return int(found[1].replace(",", ""))


def test_the_memory_of_a_tebibyte_is_as_told() -> None:
    pages = TIB // lib.PYE_PAGE_SIZE
    assert told("for each TiB of capacity \\(") == pages
    assert told("versions and tags without a tree") == pages * (8 + 16)
    cache = lib.PYE_TREE_CACHE * lib.PYE_PAGE_SIZE
    assert told("whatever the capacity") == cache
    size = lib.pye_tree_size(ffi.new("pye_tree_options *", {"num_pages": pages}))
    # Rounded up to pages, as a mapping is.
    assert told("and what else the tree has") == -(-(size - cache) // 4096) * 4096
    nodes = lib.pye_tree_num_nodes(pages)
    text = PAGE.read_text("utf-8")
    assert f"{nodes:,} nodes" in text
    assert told("the nodes of a TiB take at most ") == nodes * lib.PYE_PAGE_SIZE
    # Leaves, and what is above them, counted a second time.
    assert nodes == pages // 128 + pages // 128**2 + pages // 128**3 + 1
