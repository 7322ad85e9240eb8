"""
The same as plain.py with 64 MiB of the table in the clear: ``python sealed.py [ROWS]``.

Three lines are new, and one prints what was; the rest of the table is ciphertext in memory.
"""

from __future__ import annotations

import sys

import numpy as np

import pyenclave  # 1

HEAP = pyenclave.SealedHeap("8 GiB", resident="64 MiB")  # 2


def main(count: int) -> None:
    random = np.random.default_rng(7)
    mixing = random.standard_normal((32, 32))
    table = np.empty((count, 32))
    for begin in range(0, count, 50_000):
        part = table[begin : begin + 50_000]
        part[:] = random.standard_normal(part.shape) @ mixing
    table -= table.mean(axis=0)
    table /= np.sqrt(np.einsum("ij,ij->j", table, table) / count)
    correlation = table.T @ table / count
    share = np.linalg.eigvalsh(correlation)[::-1] / 32
    print(f"{table.nbytes >> 20} MiB, the first five of 32 components:")
    print(np.array2string(share[:5], precision=4))


if __name__ == "__main__":
    with HEAP.numpy():  # 3
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 4_000_000)
    print(f"{HEAP.stats.resident_peak >> 20} MiB of it were plaintext at most")
