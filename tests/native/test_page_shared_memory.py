"""Page sealing in memory that an attacker writes while the call runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from borders import ALL_FEATURES, gcm_masks

from pyenclave import _core
from pyenclave.errors import UnsealError

KEY = bytes(range(32))
MASKS = gcm_masks()


@pytest.fixture(params=list(MASKS))
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.cpu_set_mask(MASKS[request.param])
    yield request.param
    _core.cpu_set_mask(ALL_FEATURES)


@contextmanager
def attacked(area: bytearray, at: list[int]) -> Iterator[None]:
    """Another thread turns bits of *area* back and forth as fast as it can."""
    stop = threading.Event()

    def attack() -> None:
        while not stop.is_set():
            for index in at:
                area[index] ^= 0x40
            for index in at:
                area[index] ^= 0x40

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_ciphertext_changed_while_it_is_opened_never_gives_another_plaintext(
    implementation: str,
) -> None:
    """Each byte is read once: what is authenticated is what is decrypted."""
    key, count = _core.PageKey(KEY), 128
    pages = random.Random(6).randbytes(4096 * count)
    sealed, tags, out = bytearray(len(pages)), bytearray(16 * count), bytearray(len(pages))
    first = key.seal_pages(pages, sealed, tags)
    opened_count = refused_count = 0
    with attacked(sealed, list(range(5, len(sealed), 4096 * 3 + 64))):
        for _ in range(25 if implementation == "portable" else 300):
            try:
                key.open_pages(sealed, tags, out, version=first)
                assert out == pages
                opened_count += 1
            except UnsealError:
                assert not any(out)
                refused_count += 1
    assert opened_count + refused_count >= 25


def test_ciphertext_changed_while_it_is_made_gets_no_valid_tag(implementation: str) -> None:
    """No output is read back: the tags are those of the true ciphertext whatever others write."""
    count = 128
    pages = random.Random(7).randbytes(4096 * count)
    out, tags, true_tags = bytearray(len(pages)), bytearray(16 * count), bytearray(16 * count)
    rounds = 10 if implementation == "portable" else 100
    for i in range(rounds):
        key, other = _core.PageKey(KEY), _core.PageKey(KEY)
        other.seal_pages(pages, bytearray(len(pages)), true_tags)
        with attacked(out, list(range(5 + i, len(out), 4096 * 3 + 64))):
            key.seal_pages(pages, out, tags)
        assert tags == true_tags
