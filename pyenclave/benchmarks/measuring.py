"""Row ``mrenclave``: pages through the public API against hashlib's ceiling.

MRENCLAVE is one serial SHA-256, so no implementation of it can be faster than the hash over
records that already lie in one piece. The row says how near the public API comes to that, with
all the records made on the way; a ratio of 1 is the ceiling, and what stands above it is noise.
"""

from __future__ import annotations

import hashlib
import os
import struct
from time import perf_counter
from typing import Any

from pyenclave.measurement.sgx import PAGE_SIZE, measure_pages

__all__ = ["mrenclave"]

_PAGES = 512
_ROUNDS = 200
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


def mrenclave() -> dict[str, Any]:
    """
    Measure an enclave of 2 MiB of content through the public API.

    Each side's value is that of its fastest round: the work is the same every time and depends on
    nothing outside, so whatever is slower was disturbed.

    Returns:
        The row, in gigabytes of page content a second.
    """
    content = os.urandom(_PAGES * PAGE_SIZE)
    size = 2 * len(content)
    stream = _prebuilt_stream(content, size)
    pages = [(0, _SECINFO_RW, content)]
    ours = theirs = float("inf")
    for _ in range(_ROUNDS):
        start = perf_counter()
        value = measure_pages(pages, size=size)
        middle = perf_counter()
        wanted = hashlib.sha256(stream).digest()
        end = perf_counter()
        if value != wanted:
            raise AssertionError("the two measurements of one enclave differ")
        ours = min(ours, middle - start)
        theirs = min(theirs, end - middle)
    return {
        "name": "mrenclave",
        "value": len(content) / ours / 1e9,
        "unit": "GB/s",
        "peer": "hashlib over a prebuilt record stream",
        "peer_value": len(content) / theirs / 1e9,
        "ratio": theirs / ours,
    }
