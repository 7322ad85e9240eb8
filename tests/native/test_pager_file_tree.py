"""The tests of heaps with a file again: the nodes of their versions' tree are in the file, too."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import test_pager_file
from test_pager_file import *  # noqa: F403 - its tests and fixtures, on other heaps


@pytest.fixture(autouse=True)
def tree(monkeypatch: pytest.MonkeyPatch) -> None:
    made = partial(test_pager_file.Pages, tree_above=0, tree_cache=1)
    monkeypatch.setattr(test_pager_file, "Pages", made)


# These say that nothing is behind the pages; here the nodes are.
test_pag_05_a_file_that_was_made_longer_is_as_it_was = None
test_cold_pages_are_in_the_file_and_not_in_memory = None


def test_nodes_lie_behind_the_pages_and_a_changed_one_ends_the_heap(
    pages: test_pager_file.Pages, file: int
) -> None:
    place, num, page = test_pager_file.place, test_pager_file.NUM, test_pager_file.PAGE
    array = test_pager_file.filled(pages)
    # Four leaves; the topmost node stays in memory.
    assert os.fstat(file).st_size == place(num + 4)
    os.pwrite(file, b"more", place(num + 5) + 1)
    assert np.array_equal(array, test_pager_file.numbers())
    array[0] = 1
    pages.evict()  # of a page that was written, after which nodes leave
    byte = os.pread(file, 1, place(num + 2) + 77)[0]
    os.pwrite(file, bytes([byte ^ 1]), place(num + 2) + 77)
    assert array[0] == 1
    assert array[2 * 128 * page // 8] == 0
    assert "PYE_E_AUTH" in str(pages.poisoned)


def test_a_node_whose_pages_are_all_freed_is_nobody_s_in_the_file(
    pages: test_pager_file.Pages, file: int
) -> None:
    place, page = test_pager_file.place, test_pager_file.PAGE
    leaf = place(test_pager_file.NUM) + page  # of pages 128 to 255
    array = test_pager_file.filled(pages)
    assert os.pread(file, page, leaf).strip(b"\0")
    pages.discard(128 * page, 128 * page)
    array[0] = 7
    pages.evict()  # after which nodes leave, this one without being stored
    hole = os.lseek(file, leaf, os.SEEK_HOLE)
    assert hole == leaf or os.pread(file, page, leaf).strip(b"\0"), "no holes here: it stays"
    os.pwrite(file, b"whatever it says", leaf)
    assert not array[128 * page // 8 : 256 * page // 8].any()
    array[130 * page // 8] = 8
    pages.evict()
    assert (array[0], array[130 * page // 8], array[1]) == (7, 8, 2)
    assert not pages.poisoned
