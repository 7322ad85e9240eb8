"""
Rows ``seal_pages_ipsec``, ``seal_pages_dram``, ``seal_pages_2threads`` and ``seal_many_keys``.

Sealing where something else than one Python call is the limit: the best C library there is, the
memory, a second core, and keys whose tables the cache does not hold.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave._core import PageKey
from pyenclave.benchmarks.in_c import ffi, lib
from pyenclave.benchmarks.rows import AbsentError, Row, figures
from pyenclave.benchmarks.sealing import (  # of the same rows
    _PAGE,
    _PEER,
    _SECRET,
    _expect,
    _header,
    _iv,
    _page,
)

__all__ = ["seal_many_keys", "seal_pages_2threads", "seal_pages_dram", "seal_pages_ipsec"]

_BATCH: Final = 64
_ROUNDS: Final = 31
_KEYS: Final = 64
_MIB: Final = 1 << 20


def _library(folder: str, *options: str) -> ctypes.CDLL:
    """Compile ``_sealing.c`` with the compiler that Python names."""
    named = (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = shutil.which(named) or shutil.which("cc")
    if compiler is None:
        raise AbsentError("a C compiler")
    source, library = Path(__file__).with_name("_sealing.c"), Path(folder, "sealing.so")
    flags, libraries = options[:1], options[1:]
    command = [compiler, "-O3", "-shared", "-fPIC", *flags, "-o", str(library), str(source)]
    try:
        subprocess.run([*command, *libraries], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        if not options:
            raise
        raise AbsentError("libipsec-mb-dev") from None
    return ctypes.CDLL(str(library))


def _memory(size: int) -> tuple[mmap.mmap, int]:
    """Return memory that begins at a page, and its address."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(size))  # a page that was never written would be read as the zero page
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _sealed_right(out: bytes, tags: bytes, pages: bytes, first: int, numbers: range) -> None:
    peer = AESGCM(_SECRET)
    for i in numbers:
        at = slice(_PAGE * i, _PAGE * (i + 1))
        expected = peer.encrypt(_iv(first + i), pages[at], _header(first + i, _PAGE * i))
        _expect(out[at] + tags[16 * i : 16 * (i + 1)], expected)


def _turns(*works: Callable[[], object], rounds: int = _ROUNDS) -> list[list[float]]:
    """Time each in turn; the first two rounds warm up."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 2):
        for work, taken in zip(works, times, strict=True):
            start = perf_counter_ns()
            work()
            if number >= 2:
                taken.append(perf_counter_ns() - start)
    return times


def _fastest(name: str, ours: list[float], theirs: list[float], **rest: Any) -> Row:
    """Return a row of the fastest rounds: what shares memory or cores with us only slows down."""
    row = figures(name, ours, theirs, **rest)
    best = max if rest.get("more") else min
    value, peer_value = best(ours), best(theirs)
    ratio = value / peer_value if rest.get("more") else peer_value / value
    return {**row, "value": value, "peer_value": peer_value, "ratio": ratio}


def _ipsec_rounds(loops: ctypes.CDLL, key: Any) -> tuple[list[float], list[float]]:
    """Seal 64 pages with both, in C; return ns a page of each round."""
    pages, out, tags = _page(count=_BATCH), bytes(_BATCH * _PAGE), bytes(16 * _BATCH)
    theirs, their_tags = bytes(_BATCH * _PAGE), bytes(16 * _BATCH)
    seal = ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.addressof(lib, "pye_pages_seal"))))
    where = ctypes.c_void_p(int(ffi.cast("uintptr_t", key)))
    loops.bench_ours.restype = ctypes.c_uint64
    size, rounds = ctypes.c_size_t(_BATCH), ctypes.c_size_t(20)

    def ours(count: ctypes.c_size_t = rounds) -> int:
        version = loops.bench_ours(seal, where, out, tags, pages, size, count)
        if not version:
            raise AssertionError("the pages were not sealed")
        return int(version)

    first = ours(ctypes.c_size_t(1))
    headers = b"".join(_header(first + i, _PAGE * i) for i in range(_BATCH))
    ivs = b"".join(_iv(first + i) for i in range(_BATCH))

    def peer() -> None:
        loops.bench_ipsec(theirs, their_tags, pages, headers, ivs, size, rounds)

    peer()
    _expect(out + tags, theirs + their_tags)
    times = _turns(ours, peer)
    per_page = [[taken / (20 * _BATCH) for taken in side] for side in times]
    return per_page[0], per_page[1]


def seal_pages_ipsec() -> Row:
    """Seal 64 pages in C, cache-hot, against the direct call of intel-ipsec-mb."""
    with tempfile.TemporaryDirectory() as folder:
        loops = _library(folder, "-DBENCH_IPSEC_MB", "-lIPSec_MB")
        raw = ffi.new("uint8_t[]", lib.pye_page_key_size() + 64)
        key = ffi.cast("pye_page_key *", raw + (-int(ffi.cast("uintptr_t", raw)) % 64))
        if lib.pye_page_key_init(key, _SECRET, 32, bytes(16), lib.PYE_GCM_ANY) != lib.PYE_OK:
            raise AssertionError("no key")
        try:
            if not loops.bench_ipsec_key(_SECRET):
                raise MemoryError("intel-ipsec-mb gave no manager")
            ours, theirs = _ipsec_rounds(loops, key)
        finally:
            lib.pye_page_key_destroy(key)
    return figures("seal_pages_ipsec", ours, theirs, peer="intel-ipsec-mb, in C")


def _dram(loops: ctypes.CDLL, mebibytes: int) -> Row:
    size = mebibytes * _MIB
    source, source_at = _memory(size)
    out, out_at = _memory(size)
    tags = bytearray(size // _PAGE * 16)
    for at in range(0, size, _MIB):
        source[at : at + _MIB] = _page(at, _MIB // _PAGE)
    length = ctypes.c_size_t(size)
    versions: list[int] = []
    with PageKey(_SECRET) as key:

        def ours() -> None:
            versions.append(key.seal_pages(source, out, tags))

        def copy() -> None:
            loops.bench_stream_copy(ctypes.c_void_p(out_at), ctypes.c_void_p(source_at), length)

        sealing, copying = _turns(ours, copy, rounds=1600 // mebibytes)
        _expect(out[:], source[:])  # the copy came last
        ours()
    numbers = range(0, size // _PAGE, 509)
    _sealed_right(out[:], bytes(tags), source[:], versions[-1], numbers)
    return _fastest(
        f"seal_pages_dram/{mebibytes}",
        [size / taken for taken in sealing],
        [size / taken for taken in copying],
        peer="a copy with non-temporal stores",
        unit="GB/s",
        more=True,
    )


def seal_pages_dram() -> list[Row]:
    """Seal batches of 16 and 64 MiB, one call each, against a copy past the cache."""
    with tempfile.TemporaryDirectory() as folder:
        loops = _library(folder)
        return [_dram(loops, mebibytes) for mebibytes in (16, 64)]


def _together(works: list[Callable[[], None]]) -> Callable[[], None]:
    """Return what runs each of *works* in a thread of its own."""

    def run() -> None:
        threads = [threading.Thread(target=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def seal_pages_2threads() -> list[Row]:
    """Seal batches of 64 pages from two threads, each with a key of its own; pages in all."""
    calls, peer_calls = 40, 600
    pages = _page(count=_BATCH)

    def batches(key: PageKey) -> Callable[[], None]:
        out, tags = bytearray(len(pages)), bytearray(16 * _BATCH)
        first = key.seal_pages(pages, out, tags)
        _sealed_right(bytes(out), bytes(tags), pages, first, range(0, _BATCH, 7))

        def run() -> None:
            for _ in range(calls):
                key.seal_pages(pages, out, tags)

        return run

    def singly() -> Callable[[], None]:
        peer, iv, aad, out = AESGCM(_SECRET), _iv(1), _header(1), bytearray(_PAGE + 16)

        def run() -> None:
            for _ in range(peer_calls):
                peer.encrypt_into(iv, pages[:_PAGE], aad, out)

        return run

    with PageKey(_SECRET) as first, PageKey(_SECRET) as second:
        works = [batches(first), batches(second)]
        both, one, peer = _turns(
            _together(works),
            _together(works[:1]),
            _together([singly(), singly()]),
            rounds=151,
        )
    ours = [taken / (2 * calls * _BATCH) for taken in both]
    alone = [taken / (calls * _BATCH) for taken in one]
    theirs = [taken / (2 * peer_calls) for taken in peer]
    name = "seal_pages_2threads"
    return [
        _fastest(name, ours, alone, peer="one thread"),
        _fastest(f"{name}/cryptography", ours, theirs, peer=f"{_PEER}.encrypt_into, two threads"),
    ]


def seal_many_keys() -> Row:
    """Seal one page under each of 64 keys in turn, against one key: what the tables cost."""
    page, out = _page(), bytearray(_PAGE + 16)
    keys = [PageKey(bytes([i]) * 32) for i in range(_KEYS)]
    only = PageKey(_SECRET)

    def in_turn() -> None:
        for _ in range(10):
            for key in keys:
                key.seal_page(page, out)

    def with_one() -> None:
        for _ in range(10 * _KEYS):
            only.seal_page(page, out)

    try:
        many, one = _turns(in_turn, with_one)
        version = keys[-1].seal_page(page, out)
        expected = AESGCM(bytes([_KEYS - 1]) * 32).encrypt(_iv(version), page, _header(version))
        _expect(bytes(out), expected)
    finally:
        for key in [*keys, only]:
            key.close()
    calls = 10 * _KEYS
    return figures(
        "seal_many_keys",
        [taken / calls for taken in many],
        [taken / calls for taken in one],
        peer="the same with one key",
    )
