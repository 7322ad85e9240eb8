"""Large heaps: their versions are in a tree, and their memory is what docs/formats/heap.md says."""

from __future__ import annotations

import numpy as np
import pytest
from test_tree_memory import told

from pyenclave._core import Pages

PAGE = 4096
GIB = 1 << 30
TIB = 1 << 40


def test_a_heap_above_64_gib_has_a_tree_unless_something_else_is_said() -> None:
    for capacity, options, levels in (
        (64 * GIB, {}, 0),
        (64 * GIB + PAGE, {}, 4),
        (64 * GIB + PAGE, {"tree_above": TIB}, 0),
        (128 * PAGE, {"tree_above": 128 * PAGE}, 0),
        (129 * PAGE, {"tree_above": 128 * PAGE}, 2),
        (128 * PAGE, {"tree_above": 0}, 1),
    ):
        assert Pages(capacity, 64 * PAGE, **options).stats()["tree_levels"] == levels, options


def test_options_that_cannot_be_are_refused() -> None:
    for options in ({"tree_above": -1}, {"tree_above": 1 << 64}, {"tree_cache": 1 << 20}):
        with pytest.raises((ValueError, OverflowError)):
            Pages(128 * PAGE, 64 * PAGE, **options)


def test_a_tebibyte_takes_the_memory_that_is_told() -> None:
    with Pages(TIB, 64 * PAGE) as heap, Pages(TIB, 64 * PAGE, tree_above=TIB) as flat:
        found, arrays = (one.stats()["metadata_bytes"] for one in (heap, flat))
    resident = told("where a page is, if it is resident")
    assert resident == 4 * TIB // PAGE
    tree = told("whatever the capacity") + told("and what else the tree has")
    # What a heap has besides: its own state and the slots of its 64 resident pages.
    assert 0 <= found - resident - tree < 64 * 1024
    assert 0 <= arrays - resident - told("versions and tags without a tree") < 64 * 1024


def test_pages_all_over_a_tebibyte_keep_what_was_written() -> None:
    """More leaves than the cache has room for, twice."""
    rng = np.random.default_rng(3)
    with Pages(TIB, 256 * PAGE, tree_cache=1) as heap:
        words = np.frombuffer(heap, np.uint64)
        at = rng.choice(TIB // PAGE, 1500, replace=False) * (PAGE // 8) + 5
        for turn in range(2):
            words[at] = at + turn
            assert np.array_equal(words[at], at + turn)
            at = rng.permutation(at)
        stats = heap.stats()
        assert stats["nodes_in"] > 1000
        assert stats["nodes_out"] > 1000
        heap.discard(0, TIB)
        assert not words[at].any()
        del words
