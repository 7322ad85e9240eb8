"""
Values that are planted in sealed arrays, and what NumPy computes of them, are looked for.

A child computes in a heap and sends all of it away; then its whole memory and the file of its heap
are searched for words that came to be nowhere but in the heap, and none of it may be in swap. The
same search of an array that is not sealed finds every page of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

PAGES = 2048
# Word n of a page is n times one of these, modulo 2 ** 64; both stand side by side nowhere else.
FIRST, SECOND = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
CHILD = """
import sys
import numpy as np
import pyenclave

pages, first, second, path, sealed = (int(a) if a.isdigit() else a for a in sys.argv[1:])
heap = pyenclave.SealedHeap("256 MiB", "1 MiB", None if path == "-" else path)
with heap.numpy(), np.errstate(over="ignore"):
    number = np.arange(1, pages + 1, dtype=np.uint64)
    array = np.zeros((pages, 512), np.uint64)
    array[:, 100] = number * np.uint64(first)  # temporaries of NumPy's, in the heap too
    array[:, 101] = number * np.uint64(second)
if sealed:
    heap.evict()
    heap_of = heap.array(np.zeros(1))  # the handler's stack is used once more
    heap.evict()
else:
    kept = array.copy()  # outside of the block: in ordinary memory
print("ready", flush=True)
sys.stdin.read()
"""


def words_of(pid: int, extra: list[Path]) -> Iterator[np.ndarray]:
    """Yield what a process has in memory, and what files hold."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split(None, 2)[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            for at in range(start, end, 4 << 20):
                if "r" not in permissions:
                    break
                try:
                    data = os.pread(memory.fileno(), min(4 << 20, end - at), at)
                except OSError:
                    break  # absent from a heap's view; the kernel's pages
                yield np.frombuffer(data[: len(data) // 8 * 8], np.uint64)
    for file in extra:
        data = file.read_bytes()
        yield np.frombuffer(data[: len(data) // 8 * 8], np.uint64)


def found(pid: int, extra: list[Path]) -> tuple[int, int]:
    """Count the planted numbers that are in the clear somewhere, and the bytes searched."""
    inverse = np.uint64(pow(FIRST, -1, 1 << 64))
    numbers: set[int] = set()
    searched = 0
    with np.errstate(over="ignore"):
        for words in words_of(pid, extra):
            searched += words.nbytes
            number = words[:-1] * inverse
            hit = (number >= 1) & (number <= PAGES) & (words[1:] == number * np.uint64(SECOND))
            numbers.update(number[hit].tolist())
    return len(numbers), searched


def swapped(pid: int) -> int:
    """Return how many KiB of a process are in swap, where nobody can look."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmSwap:")[2].split()[0])


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "ordinary"])
@pytest.mark.no_asan  # shadow memory is terabytes
def test_planted_values_are_nowhere_once_they_are_cold(
    tmp_path: Path, place: str, sealed: bool
) -> None:
    path = tmp_path / "heap"
    arguments = [PAGES, FIRST, SECOND, path if place == "file" else "-", int(sealed)]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert swapped(child.pid) == 0, "what is in swap cannot be searched"
        extra = [path] if place == "file" else []
        number, searched = found(child.pid, extra)
        child.communicate("")
    assert child.returncode == 0
    assert searched > PAGES * 4096
    assert number == (0 if sealed else PAGES)
