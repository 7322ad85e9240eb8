"""
Rows of sealing: ``seal_page``, ``open_page``, ``seal_pages_64``, ``seal_64``.

The peer is `cryptography`'s AESGCM with the same key, IV, AAD and page, writing into the caller's
buffer. Before anything is timed, both must give the same bytes. Rounds of subject and peer take
turns; a value is the median over the rounds, the ratio the median of the rounds' ratios, so that
a machine whose clock moves during the run moves both.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave._core import Gcm, PageKey
from pyenclave.benchmarks.rows import Row, spread

__all__ = ["open_page", "seal_64", "seal_page", "seal_pages_64"]

_PAGE = 4096
_BATCH = 64
_ROUNDS = 41
_CALLS = 2000
_SECRET = bytes(range(32))
_PEER = "cryptography AESGCM"


def _header(version: int, address: int = 0) -> bytes:
    """The 64 authenticated bytes of docs/formats/page.md for flags 0, type 2, enclave 0."""
    return (
        b"PYEPAGE1"
        + bytes(16)
        + address.to_bytes(8, "little")
        + version.to_bytes(8, "little")
        + b"\0\0\0\0\2"
        + bytes(19)
    )


def _iv(version: int) -> bytes:
    return version.to_bytes(8, "big") + bytes(4)


def _page(seed: int = 1, count: int = 1) -> bytes:
    return random.Random(seed).randbytes(_PAGE * count)


def _expect(ours: object, theirs: object) -> None:
    if ours != theirs:
        raise AssertionError("the subject and its peer gave different bytes")


def _compare(name: str, ours: Callable[[], int], theirs: Callable[[], int], peer: str) -> Row:
    """
    Time both in turns.

    Args:
        name: The row's name.
        ours: Does some pages and returns their number.
        theirs: Likewise.
        peer: What *theirs* calls.

    Returns:
        The row, in nanoseconds a page.
    """
    values: list[float] = []
    peer_values: list[float] = []
    for round_number in range(_ROUNDS + 2):
        start = time.perf_counter_ns()
        pages = ours()
        middle = time.perf_counter_ns()
        peer_pages = theirs()
        end = time.perf_counter_ns()
        if round_number >= 2:  # the first two warm up
            values.append((middle - start) / pages)
            peer_values.append((end - middle) / peer_pages)
    return {
        "name": name,
        "value": statistics.median(values),
        "unit": "ns",
        "peer": peer,
        "peer_value": statistics.median(peer_values),
        "ratio": statistics.median(b / a for a, b in zip(values, peer_values, strict=True)),
        **spread(values, peer_values),
    }


def _theirs_sealing(page: bytes) -> Callable[[], int]:
    peer, iv, aad, out = AESGCM(_SECRET), _iv(1), _header(1), bytearray(_PAGE + 16)

    def run(calls: int = _CALLS // 2) -> int:
        seal = peer.encrypt_into
        for _ in range(calls):
            seal(iv, page, aad, out)
        return calls

    return run


def seal_page() -> Row:
    """Seal one 4 KiB page into the caller's buffer, one Python call, 64 bytes of AAD, AES-256."""
    page, out = _page(), bytearray(_PAGE + 16)
    with PageKey(_SECRET) as key:
        version = key.seal_page(page, out)
        _expect(bytes(out), AESGCM(_SECRET).encrypt(_iv(version), page, _header(version)))

        def ours() -> int:
            seal = key.seal_page
            for _ in range(_CALLS):
                seal(page, out)
            return _CALLS

        row = _compare("seal_page", ours, _theirs_sealing(page), f"{_PEER}.encrypt_into")
        version = key.seal_page(page, out)
        _expect(bytes(out), AESGCM(_SECRET).encrypt(_iv(version), page, _header(version)))
    return row


def open_page() -> Row:
    """Authenticate and open one sealed page into the caller's buffer, one Python call."""
    page, sealed = _page(), bytearray(_PAGE + 16)
    out, peer_out = bytearray(_PAGE), bytearray(_PAGE)
    peer = AESGCM(_SECRET)
    with PageKey(_SECRET) as key:
        version = key.seal_page(page, sealed)
        iv, aad = _iv(version), _header(version)
        _expect(bytes(sealed), peer.encrypt(iv, page, aad))

        def ours() -> int:
            open_ = key.open_page
            for _ in range(_CALLS):
                open_(sealed, out, version)
            return _CALLS

        def theirs() -> int:
            open_ = peer.decrypt_into
            for _ in range(_CALLS // 2):
                open_(iv, sealed, aad, peer_out)
            return _CALLS // 2

        row = _compare("open_page", ours, theirs, f"{_PEER}.decrypt_into")
    _expect(bytes(out), page)
    _expect(bytes(peer_out), page)
    return row


def seal_pages_64() -> Row:
    """Seal 64 pages in one call, cache-hot; the peer seals one page a call."""
    pages = _page(count=_BATCH)
    out, tags = bytearray(len(pages)), bytearray(16 * _BATCH)
    with PageKey(_SECRET) as key:
        first = key.seal_pages(pages, out, tags)
        for i in range(_BATCH):
            at = slice(_PAGE * i, _PAGE * (i + 1))
            aad = _header(first + i, _PAGE * i)
            expected = AESGCM(_SECRET).encrypt(_iv(first + i), pages[at], aad)
            _expect(bytes(out[at] + tags[16 * i : 16 * (i + 1)]), expected)

        def ours() -> int:
            for _ in range(_CALLS // _BATCH):
                key.seal_pages(pages, out, tags)
            return _CALLS // _BATCH * _BATCH

        return _compare(
            "seal_pages_64", ours, _theirs_sealing(pages[:_PAGE]), f"{_PEER}.encrypt_into"
        )


def seal_64() -> Row:
    """Seal 64 bytes into the caller's buffer, one Python call: nearly all of it is the call."""
    data, iv = _page()[:64], _iv(1)
    out, peer_out = bytearray(80), bytearray(80)
    peer = AESGCM(_SECRET)
    with Gcm(_SECRET) as key:

        def ours() -> int:
            seal = key.seal_into
            for _ in range(_CALLS):
                seal(iv, data, out)
            return _CALLS

        def theirs() -> int:
            seal = peer.encrypt_into
            for _ in range(_CALLS):
                seal(iv, data, None, peer_out)
            return _CALLS

        row = _compare("seal_64", ours, theirs, f"{_PEER}.encrypt_into")
    _expect(bytes(out), bytes(peer_out))
    return row
