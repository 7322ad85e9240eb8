"""Use sealed memory for long, in turns of all its ways.

    python tests/native/pager_soak.py --seconds 1800

Each turn has a new seed. The model (``pager_model.c``, against a reference pager that keeps
everything): one thread and several, with both mechanisms, in memory and in a file, alone and with
a helper. Then NumPy on a heap beside the same on ordinary arrays, in threads; the results are
compared. Memory, descriptors and threads are shown after each turn. Exits 1 at the first
difference.
"""

from __future__ import annotations

# ruff: noqa: E402 - imports follow the path
import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # with PYTHONSAFEPATH it is not there

import numpy as np
from test_pager_model import MECHANISMS, build, run

from pyenclave import SealedHeap

STEPS = 20_000
WORDS = 1 << 19  # of an array: 4 MiB
WAYS = list(itertools.product(("model", "threads"), MECHANISMS, (False, True), (False, True)))


def change(source: Any, *arrays: Any) -> None:
    """Do one and the same to sealed and to ordinary words."""
    kind = int(source.integers(5))
    start, size = (int(n) for n in source.integers(1, WORDS // 2, 2))
    places = source.integers(0, WORDS, 500)
    for array in arrays:
        part = array[start : start + size]
        if kind == 0:
            part += np.uint64(start)
        elif kind == 1:
            np.add.at(array, places, np.uint64(size))
        elif kind == 2:
            part[:] = array[:size][::-1].copy()
        elif kind == 3:
            part.sort()
        else:
            np.bitwise_xor(part, array[-size:], out=part)


def numpy_turn(seed: int, mechanism: Any, path: Path | None) -> list[str]:
    """Let three threads work on arrays of a heap of 20 MiB, 2 MiB of it open."""
    wrong: list[str] = []
    with SealedHeap("20 MiB", "2 MiB", path, mechanism=mechanism) as heap:

        def work(number: int) -> None:
            source = np.random.default_rng((seed, number))
            plain = source.integers(0, 1 << 62, WORDS).astype(np.uint64)
            sealed = heap.array(plain)
            for _ in range(12):
                change(source, sealed, plain)
                ways = (heap.evict, heap.prefetch, lambda a: None)
                ways[int(source.integers(3))](sealed[: int(source.integers(1, WORDS))])
                if not np.array_equal(sealed, plain):
                    wrong.append(f"seed {seed}, thread {number}")
                    return

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        with heap.helper():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if heap.stats.resident_peak > heap.stats.resident_limit:
            wrong.append(f"seed {seed}: {heap.stats.resident_peak} bytes resident")
    return wrong


def main() -> int:
    """Work until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    until = time.monotonic() + parser.parse_args().seconds
    turns = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(folder, ["-O2"])
        while time.monotonic() < until:
            turns += 1
            for kind, mechanism, stored, helped in WAYS:
                file = folder / "model" if stored else None
                run(model, kind, STEPS, mechanism, file, 2 * turns, helped=helped)
            for mechanism, stored in itertools.product(MECHANISMS, (False, True)):
                wrong = numpy_turn(turns, mechanism, folder / "heap" if stored else None)
                if wrong:
                    print("DIFFERENCE:", *wrong)
                    return 1
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
            print(
                f"turn {turns}: {resident} MiB, {len(os.listdir('/proc/self/fd'))} descriptors,"
                f" {threading.active_count()} threads",
                flush=True,
            )
    print(f"{turns} turns of {len(WAYS)} models of {STEPS} steps and 4 times 36 changes of arrays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
