"""Rows of sealed memory: peers that work, rows that notice what was not done."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import pyenclave
from pyenclave.benchmarks import goals, paging, paging_arrays, paging_scan, registry
from pyenclave.benchmarks import paging_peers as peers
from pyenclave.benchmarks.paging_peers import MIB, PAGE
from pyenclave.benchmarks.rows import AbsentError
from pyenclave.errors import SealingError

SOURCE = Path(peers.__file__).with_name("_paging.c")
MODULES = (paging, paging_scan, paging_arrays)
ROWS = [(module, name) for module in MODULES for name in module.__all__ if name in registry.names()]


def numbers(size: int = MIB, seed: int = 1) -> peers.Words:
    words = peers.plain(size)
    words[:] = np.random.default_rng(seed).integers(0, 1 << 62, len(words), np.uint64)
    return words


@pytest.fixture(scope="module")
def touch() -> peers.Touch:
    try:
        return peers.Touch()
    except AbsentError as absent:
        pytest.skip(f"not installed: {absent}")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time; what they give says nothing."""
    monkeypatch.setattr(paging, "_SMALL", MIB)
    monkeypatch.setattr(paging, "_LARGE", 2 * MIB)
    for module in (paging_scan, paging_arrays):
        monkeypatch.setattr(module, "_SIZE", 8 * MIB)
        monkeypatch.setattr(module, "_RESIDENT", 2 * MIB)
    monkeypatch.setattr(paging_arrays, "_UPDATES", 300)
    monkeypatch.setattr(paging_arrays, "_WIDTH", 64)
    monkeypatch.setattr(paging_arrays, "_HEIGHT", 64)
    for module in MODULES:
        monkeypatch.setattr(module, "_ROUNDS", 1)


def test_the_peer_in_c_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is not installed")
    done = subprocess.run(
        [
            *(compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow"),
            *("-Werror", "-Wno-error=pedantic", "-c", "-o", tmp_path / "x.o", SOURCE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def handled(words: peers.Words, touch: peers.Touch) -> tuple[peers.SealedPages, Any]:
    pages = peers.SealedPages(words)
    try:
        return pages, peers.HandlerThread(pages, touch)
    except AbsentError as absent:
        pages.key.close()
        pytest.skip(f"not on this machine: {absent}")


def test_the_thread_opens_every_page_that_is_touched(touch: peers.Touch) -> None:
    words = numbers()
    pages, handler = handled(words, touch)
    order = np.random.default_rng(2).permutation(words.nbytes // PAGE).astype(np.uint32)
    with pages, handler as thread:
        for _ in range(2):
            total, times = touch(thread.base, order)
            assert total == int(words[:: PAGE // 8].sum())
            assert (times > 0).all()
            again, hot = touch(thread.base, order)
            assert again == total
            assert np.median(hot) < np.median(times)  # without drop() nothing faults again
            thread.drop()


def test_the_thread_tells_a_page_that_was_changed(touch: peers.Touch) -> None:
    words = numbers()
    pages, handler = handled(words, touch)
    pages.sealed[PAGE // 8 * 3] ^= np.uint64(1)
    with pages:
        total, _ = touch(handler.base, np.arange(words.nbytes // PAGE, dtype=np.uint32))
        with pytest.raises(AssertionError, match="could not open a page"):
            handler.stop()
    assert total == (int(words[:: PAGE // 8].sum()) - int(words[PAGE // 8 * 3])) % (1 << 64)


def test_sealed_pages_are_opened_and_sealed_again() -> None:
    words = numbers(MIB + 8 * PAGE)  # the last batch is not whole
    want = int(words[:: PAGE // 8].sum())
    room = peers.plain(64 * PAGE)
    with peers.SealedPages(words) as pages:
        before = pages.sealed.copy()
        assert [pages.through(room), pages.through(room)] == [want, want]
        assert not (before == pages.sealed).any()
        pages.open_in_batches()
        assert np.array_equal(pages.sealed, words)
        pages.seal()
        assert not (words == pages.sealed).any()
        pages.open()
        assert np.array_equal(pages.sealed, words)
        pages.sealed += np.uint64(1)
        pages.seal_in_batches()
        assert pages.through(room) == want + len(words) // (PAGE // 8)
        pages.sealed[5] ^= np.uint64(1)
        with pytest.raises(SealingError):
            pages.through(room)


def test_pages_under_cryptography_hold_what_was_added() -> None:
    words = numbers()
    pages = peers.LruPages(words, 8)
    source = np.random.default_rng(3)
    for _ in range(20):
        places = source.integers(0, len(words), 200)
        pages.add(places.tolist())
        np.add.at(words, places, np.uint64(1))
    assert pages.read(list(range(0, len(words), 7))) == words[::7].tolist()
    assert len(pages._open) == 8


def test_rows_without_their_memory_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AbsentError, match=r"1024\.0 GiB of free memory"):
        peers.need_memory(1 << 40)
    monkeypatch.setattr(paging_arrays, "_SIZE", 1 << 44)
    ((_, rows),) = registry.run(["numpy_sum"])
    assert rows == [{"name": "numpy_sum", "absent": ["32768.0 GiB of free memory"]}]


@pytest.mark.parametrize(("module", "name"), ROWS, ids=[name for _, name in ROWS])
@pytest.mark.usefixtures("small")
def test_a_row_is_measured_with_its_ways_and_results_compared(
    module: ModuleType, name: str
) -> None:
    ((_, rows),) = registry.run([name])
    assert "error" not in rows[0], rows[0]
    if "absent" in rows[0]:
        pytest.skip(f"not on this machine: {rows[0]['absent']}")
    assert rows[0]["name"] == name
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert all(row["ratio"] > 0 for row in rows)
    wanted = {goal for goal in goals.GOALS if goal.partition("/")[0] == name}
    if len(set(os.sched_getaffinity(0))) == 1:
        wanted = {goal for goal in wanted if not goal.endswith("other_core")}
    assert wanted <= set(names)


class Forgetful(pyenclave.SealedHeap):
    """A heap that loses what was put in."""

    def array(self, values: Any) -> Any:
        found = super().array(values)
        found[len(found) // 2] = 0
        return found


@pytest.mark.parametrize("name", ["fault_seq", "scan_open", "scan_evicting", "evict", "numpy_sum"])
@pytest.mark.usefixtures("small")
def test_a_heap_that_loses_data_makes_its_row_fail(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (paging, paging_scan, paging_arrays):
        monkeypatch.setattr(module, "SealedHeap", Forgetful)
    ((_, rows),) = registry.run([name])
    assert rows[0].get("error", "").startswith("AssertionError"), rows
