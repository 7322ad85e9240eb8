"""Row of measuring an SGX enclave: pages through the public API against hashlib's ceiling.

MRENCLAVE is one serial SHA-256, so no implementation of it can be faster than the hash over
records that already lie in one piece. The row says how near the public API comes to that, with
all the records made on the way; a ratio of 1 is the ceiling, and what stands above it is noise.
"""

from __future__ import annotations

import hashlib
import os
import struct
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from pyenclave.measurement.sgx import PAGE_SIZE, measure_pages

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["rows"]

_SECINFO_RW = 0x203


def _prebuilt_stream(content: bytes, size: int) -> bytes:
    """The records of *content* as one measured run from offset 0, ready to hash."""
    parts = [struct.pack("<8sIQ44x", b"ECREATE", 1, size)]
    for page in range(0, len(content), PAGE_SIZE):
        parts.append(struct.pack("<8sQQ40x", b"EADD", page, _SECINFO_RW))
        for chunk in range(page, page + PAGE_SIZE, 256):
            parts.append(struct.pack("<8sQ48x", b"EEXTEND", chunk))
            parts.append(content[chunk : chunk + 256])
    return b"".join(parts)


def _interleaved(
    ours: Callable[[], bytes], theirs: Callable[[], bytes], rounds: int
) -> tuple[float, float]:
    """Median seconds of both, measured in turns so that a slow moment meets both alike."""
    if ours() != theirs():
        raise AssertionError("the two measurements of one enclave differ")
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            function = (ours, theirs)[which]
            start = perf_counter()
            function()
            times[which].append(perf_counter() - start)
    return median(times[0]), median(times[1])


def rows(*, pages: int = 1024, rounds: int = 61) -> list[dict[str, object]]:
    """
    Measure an enclave of *pages* pages with content.

    Args:
        pages: Pages of 4096 bytes; the default is 4 MiB, more than the nearer caches hold.
        rounds: Repetitions of each side.

    Returns:
        One row: gigabytes of page content a second, of the public API and of hashlib over a
        prebuilt stream.
    """
    content = os.urandom(pages * PAGE_SIZE)
    size = 1 << max(13, (len(content) - 1).bit_length())
    stream = _prebuilt_stream(content, size)
    ours, theirs = _interleaved(
        lambda: measure_pages([(0, _SECINFO_RW, content)], size=size),
        lambda: hashlib.sha256(stream).digest(),
        rounds,
    )
    return [
        {
            "name": "mrenclave",
            "value": len(content) / ours / 1e9,
            "unit": "GB/s",
            "peer": "hashlib over a prebuilt record stream",
            "peer_value": len(content) / theirs / 1e9,
            "ratio": theirs / ours,
        }
    ]
