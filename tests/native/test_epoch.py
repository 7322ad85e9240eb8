"""Keys that outlive their counter: PAG-06's epoch change, and what is left after the last epoch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from tree_ends import NAME, SECRET, Epoch, StatusError, check, memory

from pyenclave._ffi import ffi, lib

PAGE = os.urandom(4096)
LIMIT = lib.PYE_PAGE_MAX_PAGES
EPOCH = 1 << 40


def skip(key: Epoch, to: int) -> None:
    check(lib.pye_epoch_skip(key.key, to))


def refused(status: int, call, *args) -> None:
    with pytest.raises(StatusError) as error:
        call(*args)
    assert error.value.status == status, error.value


def key_of(epoch: int) -> bytes:
    """The key of docs/formats/page.md, derived a second time."""
    label = b"pyenclave page epoch" + epoch.to_bytes(8, "little")
    return HKDFExpand(SHA256(), 32, label).derive(SECRET)


@pytest.mark.parametrize("epoch", [0, 1, 255, 65536, 2**24 - 1])
def test_a_page_is_sealed_as_the_document_says(epoch: int) -> None:
    key = Epoch()
    skip(key, epoch * EPOCH + 5)
    version, sealed, tag = key.seal(PAGE, 8192)
    assert version == epoch * EPOCH + 5
    head = b"PYEPAGE1" + NAME + (8192).to_bytes(8, "little") + version.to_bytes(8, "little")
    head += bytes(4) + b"\x02" + bytes(19)
    nonce = version.to_bytes(8, "big") + bytes(4)
    assert AESGCM(key_of(epoch)).decrypt(nonce, sealed + tag, head) == PAGE
    assert lib.pye_epoch_number(key.key) == epoch


def test_PAG_06_a_key_at_its_limit_moves_to_the_next_epoch_and_opens_the_old_one() -> None:
    key = Epoch()
    first = key.seal(PAGE)
    skip(key, LIMIT - 1)
    last = [key.seal(PAGE) for _ in range(2)]
    assert [version for version, *_ in last] == [LIMIT - 1, LIMIT]
    assert lib.pye_epoch_number(key.key) == 0
    after = [key.seal(PAGE) for _ in range(2)]
    assert [version for version, *_ in after] == [EPOCH + 1, EPOCH + 2]
    assert lib.pye_epoch_number(key.key) == 1
    for version, sealed, tag in [first, *last, *after, first]:
        assert key.open(version, sealed, tag) == PAGE
    # A page is of its epoch only.
    version, sealed, tag = first
    refused(lib.PYE_E_AUTH, key.open, version + EPOCH, sealed, tag)
    refused(lib.PYE_E_AUTH, key.open, after[0][0] - EPOCH, *after[0][1:])


def test_PAG_06_a_batch_that_does_not_fit_is_sealed_in_the_next_epoch() -> None:
    key = Epoch()
    skip(key, LIMIT - 62)
    old = key.to_seal(63)
    assert lib.pye_page_key_sealed(old) == LIMIT - 63
    assert lib.pye_epoch_number(key.key) == 0
    assert lib.pye_page_key_sealed(key.to_seal(64)) == 0
    assert lib.pye_epoch_number(key.key) == 1
    # What was left of the old one is given up: it is never gone back to.
    version, _, _ = key.seal(PAGE)
    assert version == EPOCH + 1


def test_pages_of_any_epoch_are_opened_in_one_call_and_none_if_one_is_bad() -> None:
    key = Epoch()
    pages = []
    for epoch in (0, 0, 1, 4, 4, 2**24 - 1):
        if epoch > lib.pye_epoch_number(key.key):
            skip(key, epoch * EPOCH + 1)
        pages.append(key.seal(PAGE, 4096 * len(pages)))
    order = [5, 0, 1, 3, 2, 1, 3, 4, 0]  # some of one epoch beside each other
    jobs = ffi.new("pye_page_job[]", len(order))
    outs = [ffi.new("uint8_t[4096]") for _ in order]
    ins = [ffi.new("uint8_t[4096]", pages[which][1]) for which in order]
    tags = [ffi.new("uint8_t[16]", pages[which][2]) for which in order]
    for i, which in enumerate(order):
        jobs[i] = {
            "in": ins[i],
            "out": outs[i],
            "tag": tags[i],
            "version": pages[which][0],
            "info": {"address": 4096 * which, "flags": 0, "type": 2},
        }
    assert lib.pye_epoch_jobs_open(key.key, jobs, len(order)) == lib.PYE_OK
    assert all(bytes(out) == PAGE for out in outs)
    for bad in range(len(order)):
        ins[bad][4095] ^= 1
        for out in outs:
            ffi.memmove(out, b"\xcc" * 4096, 4096)
        assert lib.pye_epoch_jobs_open(key.key, jobs, len(order)) == lib.PYE_E_AUTH
        assert not any(any(out) for out in outs), bad
        ins[bad][4095] ^= 1
    # The same pages one after the other.
    ins = ffi.new("uint8_t[]", b"".join(page[1] for page in pages))
    tags = ffi.new("uint8_t[]", b"".join(page[2] for page in pages))
    versions = ffi.new("uint64_t[]", [page[0] for page in pages])
    first = ffi.new("pye_page_info *", {"type": 2})
    num = len(pages)
    out = ffi.new("uint8_t[]", num * 4096)
    args = (out, ins, tags, versions, num, first)
    assert lib.pye_epoch_pages_open(key.key, *args) == lib.PYE_OK
    assert bytes(ffi.buffer(out, num * 4096)) == PAGE * num
    for bad in range(num):
        ins[4096 * bad] ^= 1
        assert lib.pye_epoch_pages_open(key.key, *args) == lib.PYE_E_AUTH
        assert not any(bytes(ffi.buffer(out, num * 4096))), bad
        ins[4096 * bad] ^= 1
    null = ffi.NULL
    for args in ((out, ins, tags, null, num, first), (out, ins, tags, versions, num, null)):
        assert lib.pye_epoch_pages_open(key.key, *args) == lib.PYE_E_ARGUMENT
    none = lib.pye_epoch_pages_open(key.key, out, ins, tags, versions, 0, first)
    assert none == lib.PYE_E_LENGTH
    assert lib.pye_epoch_jobs_open(key.key, jobs, 0) == lib.PYE_E_LENGTH
    assert lib.pye_epoch_jobs_open(key.key, ffi.NULL, 1) == lib.PYE_E_ARGUMENT


def test_PAG_06_after_the_last_epoch_the_keys_are_destroyed_never_wrapped() -> None:
    key = Epoch()
    skip(key, lib.PYE_EPOCH_LAST * EPOCH + LIMIT)
    version, sealed, tag = key.seal(PAGE)
    assert version == lib.PYE_EPOCH_LAST * EPOCH + LIMIT
    assert key.open(version, sealed, tag) == PAGE
    refused(lib.PYE_E_LIMIT, key.to_seal)
    refused(lib.PYE_E_CLOSED, key.to_seal)
    refused(lib.PYE_E_CLOSED, key.to_open, version)
    assert SECRET not in bytes(key.raw)


@pytest.fixture
def no_features() -> Iterator[Callable[[], None]]:
    """Take away what the CPU offers: no implementation but the portable one is left."""
    yield lambda: lib.pye_cpu_set_mask(0)
    lib.pye_cpu_set_mask(0xFFFFFFFF)


def test_PAG_06_if_the_next_key_cannot_be_made_all_are_destroyed(
    no_features: Callable[[], None],
) -> None:
    allowed = lib.PYE_GCM_AESNI | lib.PYE_GCM_ARMV8
    if not lib.pye_gcm_implementations() & allowed:
        pytest.skip("this CPU has the portable implementation only")
    for to in (None, 7 * EPOCH + 1):
        key = Epoch(allowed=allowed)
        skip(key, LIMIT)
        version, sealed, tag = key.seal(PAGE)
        no_features()
        if to is None:
            refused(lib.PYE_E_UNSUPPORTED, key.to_seal)
        else:
            refused(lib.PYE_E_UNSUPPORTED, skip, key, to)
        lib.pye_cpu_set_mask(0xFFFFFFFF)
        refused(lib.PYE_E_CLOSED, key.to_seal)
        refused(lib.PYE_E_CLOSED, key.open, version, sealed, tag)
        assert SECRET not in bytes(key.raw)


def test_an_old_key_that_cannot_be_made_opens_nothing_and_the_new_one_goes_on(
    no_features: Callable[[], None],
) -> None:
    allowed = lib.PYE_GCM_AESNI | lib.PYE_GCM_ARMV8
    if not lib.pye_gcm_implementations() & allowed:
        pytest.skip("this CPU has the portable implementation only")
    key = Epoch(allowed=allowed)
    old = key.seal(PAGE)
    skip(key, EPOCH + 1)
    new = key.seal(PAGE)
    no_features()
    refused(lib.PYE_E_UNSUPPORTED, key.open, *old)
    assert key.open(*new) == PAGE
    lib.pye_cpu_set_mask(0xFFFFFFFF)
    assert key.open(*old) == PAGE


def test_a_destroyed_key_holds_nothing_of_its_secret() -> None:
    key = Epoch()
    version, sealed, tag = key.seal(PAGE)
    skip(key, 3 * EPOCH + 1)
    assert key.open(version, sealed, tag) == PAGE
    assert SECRET in bytes(key.raw)
    lib.pye_epoch_key_destroy(key.key)
    lib.pye_epoch_key_destroy(key.key)
    assert SECRET not in bytes(key.raw)
    # All that is left: the state, epochs, name, implementations, and the ends of two keys.
    left = sum(byte not in (0, 0xA5) for byte in bytes(key.raw))
    assert left < 100
    refused(lib.PYE_E_CLOSED, key.to_seal)
    lib.pye_epoch_key_destroy(ffi.NULL)


def test_memory_wiped_by_a_fork_is_no_key() -> None:
    key = Epoch()
    version, sealed, tag = key.seal(PAGE)
    ffi.memmove(key.raw, bytes(len(key.raw)), len(key.raw))
    refused(lib.PYE_E_STATE, key.to_seal)
    refused(lib.PYE_E_STATE, key.open, version, sealed, tag)
    refused(lib.PYE_E_STATE, skip, key, 5)
    lib.pye_epoch_key_destroy(key.key)


def test_what_cannot_be_is_refused() -> None:
    key = Epoch()
    skip(key, 100)
    for num in (0, LIMIT + 1, 2**64 - 1):
        refused(lib.PYE_E_LENGTH, key.to_seal, num)
    for version in (EPOCH, 2**64 - 1):
        refused(lib.PYE_E_ARGUMENT, key.to_open, version)
    for to in (0, 1, 99, LIMIT + 2, EPOCH, EPOCH + LIMIT + 2, 2**64 - 1):
        refused(lib.PYE_E_ARGUMENT, skip, key, to)
    assert lib.pye_epoch_number(key.key) == 0
    skip(key, EPOCH + 7)
    refused(lib.PYE_E_ARGUMENT, skip, key, LIMIT)
    assert key.seal(PAGE)[0] == EPOCH + 7
    # A batch of exactly an epoch's pages is one epoch's.
    assert key.to_seal(LIMIT) != ffi.NULL
    assert lib.pye_epoch_number(key.key) == 2
    out = ffi.new("pye_page_key **")
    raw, at = memory(lib.pye_epoch_key_size(), off=32)
    odd = ffi.cast("pye_epoch_key *", at)
    null = ffi.NULL
    assert lib.pye_epoch_key_init(odd, SECRET, NAME, lib.PYE_GCM_ANY) == lib.PYE_E_ALIGNMENT
    for args in ((null, SECRET, NAME), (key.key, null, NAME), (key.key, SECRET, null)):
        assert lib.pye_epoch_key_init(*args, lib.PYE_GCM_ANY) == lib.PYE_E_ARGUMENT
    assert lib.pye_epoch_to_seal(null, out, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_epoch_to_seal(key.key, null, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_epoch_skip(null, 5) == lib.PYE_E_ARGUMENT
    assert lib.pye_epoch_to_open(null, out, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_epoch_to_open(key.key, null, 1) == lib.PYE_E_ARGUMENT
    assert raw is not None


def test_no_implementation_no_key_and_no_secret_left() -> None:
    raw, at = memory(lib.pye_epoch_key_size())
    key = ffi.cast("pye_epoch_key *", at)
    assert lib.pye_epoch_key_init(key, SECRET, NAME, 0) == lib.PYE_E_UNSUPPORTED
    assert SECRET not in bytes(raw)
    out = ffi.new("pye_page_key **")
    assert lib.pye_epoch_to_seal(key, out, 1) == lib.PYE_E_STATE
