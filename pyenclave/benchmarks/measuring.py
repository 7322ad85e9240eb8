"""Rows ``mrenclave``, ``mrenclave_16``, ``sha384_pages``: hashing pages, against hashlib.

One MRENCLAVE is one serial SHA-256, so no implementation of it can be faster than the hash over
records that already lie in one piece. ``mrenclave`` says how near the public API comes to that,
with all the records made on the way; a ratio of 1 is the ceiling, and what stands above it is
noise. Sixteen go side by side, and so do the SHA-384 digests of pages (SEV-SNP).
"""

from __future__ import annotations

import hashlib
import os
import struct
from time import perf_counter
from typing import Any

from pyenclave import _core
from pyenclave.benchmarks.rows import spread
from pyenclave.measurement.sgx import PAGE_SIZE, measure_many, measure_pages

__all__ = ["mrenclave", "mrenclave_16", "sha384_pages"]

_PAGES = 512
_ROUNDS = 200
_ENCLAVES = 16
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


def _fastest(
    name: str, length: int, ours: list[float], theirs: list[float], peer: str
) -> dict[str, Any]:
    """Return the row of *length* bytes hashed in so many seconds, by the fastest rounds."""
    return {
        "name": name,
        "value": length / min(ours) / 1e9,
        "unit": "GB/s",
        "peer": peer,
        "peer_value": length / min(theirs) / 1e9,
        "ratio": min(theirs) / min(ours),
        **spread([length / x / 1e9 for x in ours], [length / x / 1e9 for x in theirs], more=True),
    }


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
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(_ROUNDS):
        start = perf_counter()
        value = measure_pages(pages, size=size)
        middle = perf_counter()
        wanted = hashlib.sha256(stream).digest()
        end = perf_counter()
        if value != wanted:
            raise AssertionError("the two measurements of one enclave differ")
        ours.append(middle - start)
        theirs.append(end - middle)
    return _fastest(
        "mrenclave", len(content), ours, theirs, "hashlib over a prebuilt record stream"
    )


def mrenclave_16() -> dict[str, Any]:
    """
    Measure sixteen enclaves of one layout and 128 KiB of content each, in one call.

    Returns:
        The row, in gigabytes of page content a second of all sixteen together.
    """
    length = _PAGES // _ENCLAVES * PAGE_SIZE
    size = 2 * length
    contents = [os.urandom(length) for _ in range(_ENCLAVES)]
    streams = [_prebuilt_stream(content, size) for content in contents]
    enclaves = [([(0, _SECINFO_RW, content)], size) for content in contents]
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(_ROUNDS):
        start = perf_counter()
        values = measure_many(enclaves)
        middle = perf_counter()
        wanted = [hashlib.sha256(stream).digest() for stream in streams]
        end = perf_counter()
        if values != wanted:
            raise AssertionError("the two measurements of one enclave differ")
        ours.append(middle - start)
        theirs.append(end - middle)
    return _fastest(
        "mrenclave_16",
        _ENCLAVES * length,
        ours,
        theirs,
        "hashlib over prebuilt record streams, one after the other",
    )


def sha384_pages() -> dict[str, Any]:
    """
    Hash 512 pages with SHA-384 each, in one call, as a launch digest of SEV-SNP needs them.

    Returns:
        The row, in gigabytes a second; the value of each side is that of its fastest round.
    """
    content = os.urandom(_PAGES * PAGE_SIZE)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(_ROUNDS // 2):
        start = perf_counter()
        value = _core.snp_page_digests(content)
        middle = perf_counter()
        wanted = b"".join(
            hashlib.sha384(content[at : at + PAGE_SIZE]).digest()
            for at in range(0, len(content), PAGE_SIZE)
        )
        end = perf_counter()
        if value != wanted:
            raise AssertionError("the digests of one page differ")
        ours.append(middle - start)
        theirs.append(end - middle)
    return _fastest("sha384_pages", len(content), ours, theirs, "hashlib, page by page")
