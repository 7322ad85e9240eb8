"""
Root against cold data: what a scan of all of a worker's memory finds of sealed arrays.

The process wall holds nothing against root (X5-A1). Sealed memory leaves it the resident pages, and
no more: cold data is ciphertext in the worker's own memory as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyenclave.host import Enclave

pytestmark = pytest.mark.attack

ENTRY = """
import numpy as np

from pyenclave import trusted

KEPT = []


@trusted.ecall
def fill(pages: int, first: int, second: int, sealed: bool) -> int:
    make = trusted.heap.zeros if sealed else np.zeros
    array = make((pages, 512), np.uint64)
    # Two words of each page, side by side; nowhere else do they lie so.
    with np.errstate(over="ignore"):
        array[:, 100] = np.arange(1, pages + 1, dtype=np.uint64) * np.uint64(first)
        array[:, 101] = np.arange(1, pages + 1, dtype=np.uint64) * np.uint64(second)
    KEPT.append(array)
    return trusted.heap.stats.resident_bytes if sealed else array.nbytes
"""
PAGES = 4096
MOST = 64 << 20  # bytes of one mapping: a heap reserves gigabytes, and gives them out from below
LIMIT = 256  # pages that may be plaintext
FIRST, SECOND = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03


@pytest.fixture(scope="module")
def enclave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enclave]:
    """One that keeps sixteen times its limit."""
    script = tmp_path_factory.mktemp("scan") / "scan_of_test.py"
    script.write_text(ENTRY)
    with Enclave.from_file(script, sealed_memory="1 MiB", quiet=True) as made:
        yield made


def words_of(pid: int) -> Iterator[np.ndarray]:
    """Yield all readable memory of *pid*; of the reserved range of a heap what is used."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split(None, 2)[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            for at in range(start, min(end, start + MOST), 4 << 20):
                if "r" not in permissions:
                    break
                try:
                    data = os.pread(memory.fileno(), min(4 << 20, end - at), at)
                except OSError:
                    break  # shown to nobody: what is absent from a heap's view, the kernel's pages
                yield np.frombuffer(data[: len(data) // 8 * 8], np.uint64)


def pages_found(enclave: Enclave, first: int, second: int) -> int:
    """Count the pages whose content is somewhere in the worker's memory, in the clear."""
    inverse = np.uint64(pow(first, -1, 1 << 64))
    found: set[int] = set()
    searched = 0
    for words in words_of(enclave.info.pid):
        searched += words.nbytes
        number = words[:-1] * inverse
        hit = (number >= 1) & (number <= PAGES) & (words[1:] == number * np.uint64(second))
        found.update(number[hit].tolist())
    assert searched > 4096 * PAGES
    return len(found)


def test_X5_root_finds_no_cold_data_in_a_workers_memory(need_root: None, enclave: Enclave) -> None:
    """Of 4,096 pages, all of which were written, at most those that may be plaintext."""
    enclave.fill(PAGES, FIRST, SECOND, True)
    assert 0 < pages_found(enclave, FIRST, SECOND) <= LIMIT


def test_X5_the_same_scan_finds_every_page_of_an_ordinary_array(
    need_root: None, enclave: Enclave
) -> None:
    """Nothing found means something only because this finds all."""
    enclave.fill(PAGES, SECOND, FIRST, False)
    assert pages_found(enclave, SECOND, FIRST) == PAGES
