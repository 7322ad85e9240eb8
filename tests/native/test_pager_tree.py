"""The pager's tests again, with versions in the tree, whose nodes leave after each batch."""

from __future__ import annotations

from functools import partial

import pytest
import test_pager
from test_pager import *  # noqa: F403 - its tests and fixtures, on other heaps


@pytest.fixture(autouse=True)
def tree(monkeypatch: pytest.MonkeyPatch) -> None:
    made = partial(test_pager.Pages, tree_above=0, tree_cache=1)
    monkeypatch.setattr(test_pager, "Pages", made)
