"""Page sealing: what the threat catalogue's part B.2 (PAG) demands, and its byte layout."""

from __future__ import annotations

import copy
import os
import pickle
import random
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from borders import ALL_FEATURES, gcm_masks
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave import _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveStateError,
    SealLimitError,
    UnsealError,
)

KEY = bytes(range(32))
PAGE = random.Random(1).randbytes(4096)
ENCLAVE = bytes(range(100, 116))
LIMIT = 2**36
STREAM_PAGES = lib.PYE_PAGE_STREAM_PAGES
MASKS = gcm_masks()


@contextmanager
def features(mask: int) -> Iterator[None]:
    _core.cpu_set_mask(mask)
    try:
        yield
    finally:
        _core.cpu_set_mask(ALL_FEATURES)


@pytest.fixture(params=list(MASKS))
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with features(MASKS[request.param]):
        assert _core.PageKey(KEY).implementation == request.param
        yield request.param


def sealed_page(key: _core.PageKey, page: bytes = PAGE, **info: int) -> tuple[bytearray, int]:
    out = bytearray(4112)
    return out, key.seal_page(page, out, **info)


def opened(key: _core.PageKey, sealed: bytes | bytearray, **info: int) -> bytes:
    out = bytearray(4096)
    key.open_page(sealed, out, **info)
    return bytes(out)


def refused(key: _core.PageKey, sealed: bytes | bytearray, **info: int) -> None:
    """The page does not open, and the output is zero."""
    out = bytearray(b"\xff" * 4096)
    with pytest.raises(UnsealError):
        key.open_page(sealed, out, **info)
    assert out == bytes(4096)


def header(version: int, address: int, flags: int, kind: int, enclave: bytes) -> bytes:
    """The 64 bytes of docs/formats/page.md, written a second time."""
    parts = [
        b"PYEPAGE1",
        enclave,
        address.to_bytes(8, "little"),
        version.to_bytes(8, "little"),
        flags.to_bytes(4, "little"),
        bytes([kind]),
        bytes(19),
    ]
    return b"".join(parts)


# ---- the threat catalogue --------------------------------------------------------------------


def test_PAG_01_an_older_version_of_a_page_is_refused(implementation: str) -> None:
    """Every evicted version is kept and offered again: only the newest opens."""
    key = _core.PageKey(KEY)
    kept = [sealed_page(key, bytes([i]) * 4096, address=4096) for i in range(20)]
    newest = kept[-1][1]
    for sealed, version in kept[:-1]:
        assert version < newest
        refused(key, sealed, version=newest, address=4096)
    assert opened(key, kept[-1][0], version=newest, address=4096) == bytes([19]) * 4096


def test_PAG_02_a_page_moved_to_another_address_is_refused(implementation: str) -> None:
    """Any two evicted pages are exchanged."""
    key = _core.PageKey(KEY)
    pages = [(4096 * i, *sealed_page(key, address=4096 * i)) for i in range(8)]
    for at, _, own in pages:
        for other_at, sealed, version in pages:
            if at != other_at:
                refused(key, sealed, version=version, address=at)
                refused(key, sealed, version=own, address=at)
    for bit in range(64):
        refused(key, pages[1][1], version=pages[1][2], address=4096 ^ 1 << bit)


def test_PAG_03_a_page_of_another_enclave_or_run_is_refused(implementation: str) -> None:
    one = _core.PageKey(KEY, enclave=ENCLAVE)
    sealed, version = sealed_page(one)
    for bit in range(128):
        other = bytearray(ENCLAVE)
        other[bit // 8] ^= 1 << bit % 8
        refused(_core.PageKey(KEY, enclave=bytes(other)), sealed, version=version)
    restarted = _core.PageKey(enclave=ENCLAVE)
    refused(restarted, sealed, version=version)
    sealed_again, same_version = sealed_page(restarted)
    assert same_version == version
    assert sealed_again != sealed
    assert opened(_core.PageKey(KEY, enclave=ENCLAVE), sealed, version=version) == PAGE


def test_PAG_04_every_bit_of_what_a_page_is_is_bound(implementation: str) -> None:
    """Flags, type, version, address and tag bit by bit; the page's bits one in each byte."""
    key = _core.PageKey(KEY, enclave=ENCLAVE)
    info = {"address": 0x7F0000001000, "flags": 5, "type": 2}
    sealed, version = sealed_page(key, **info)
    for name, width in (("address", 64), ("flags", 32), ("type", 8)):
        for bit in range(width):
            refused(key, sealed, version=version, **{**info, name: info[name] ^ 1 << bit})
    for bit in range(64):
        refused(key, sealed, version=version ^ 1 << bit, **info)
    for bit in [*range(32768, 32896), *(8 * at + at % 8 for at in range(4096))]:
        sealed[bit // 8] ^= 1 << bit % 8
        refused(key, sealed, version=version, **info)
        sealed[bit // 8] ^= 1 << bit % 8
    assert opened(key, sealed, version=version, **info) == PAGE


def test_PAG_04_every_single_bit_of_a_sealed_page_is_bound() -> None:
    key = _core.PageKey(KEY)
    sealed, version = sealed_page(key)
    for bit in range(8 * 4112):
        sealed[bit // 8] ^= 1 << bit % 8
        refused(key, sealed, version=version)
        sealed[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("size", [0, 1, 16, 4095, 4096, 4097, 4111, 4113, 8192, 8224])
def test_PAG_05_another_size_is_refused(size: int) -> None:
    key = _core.PageKey(KEY)
    if size != 4096:
        with pytest.raises(ValueError, match="4096 and 4112"):
            key.seal_page(bytes(size), bytearray(4112))
        with pytest.raises(ValueError, match="4112 and 4096"):
            key.open_page(bytes(4112), bytearray(size), version=1)
        if size % 4096 or size == 0:
            with pytest.raises(ValueError, match="pages"):
                key.seal_pages(bytes(size), bytearray(size), bytearray(16))
            with pytest.raises(ValueError, match="pages"):
                key.open_pages(bytes(size), bytes(16), bytearray(size), version=1)
    with pytest.raises(ValueError, match="4096 and 4112"):
        key.seal_page(PAGE, bytearray(size))
    with pytest.raises(ValueError, match="4112 and 4096"):
        key.open_page(bytes(size), bytearray(4096), version=1)
    assert key.pages_sealed == 0


@pytest.mark.parametrize("tags", [0, 15, 16, 17, 31, 33, 48])
def test_PAG_05_a_batch_with_the_wrong_number_of_tags_is_refused(tags: int) -> None:
    key = _core.PageKey(KEY)
    with pytest.raises(ValueError, match="tags: expected 32 bytes"):
        key.seal_pages(bytes(8192), bytearray(8192), bytearray(tags))
    with pytest.raises(ValueError, match="tags: expected 32 bytes"):
        key.open_pages(bytes(8192), bytes(tags), bytearray(8192), version=1)
    assert key.pages_sealed == 0


def test_PAG_06_no_version_is_ever_given_twice_to_threads() -> None:
    """Sixteen threads, single pages and batches: the ranges are disjoint and leave no gap."""
    key = _core.PageKey(KEY)
    ranges: list[tuple[int, int]] = []
    start = threading.Barrier(16)

    def work(seed: int) -> None:
        own, rng = [], random.Random(seed)
        out, pages, tags = bytearray(4112), bytearray(4096 * 9), bytearray(16 * 9)
        start.wait()
        for _ in range(150):
            if rng.random() < 0.5:
                own.append((key.seal_page(PAGE, out), 1))
            else:
                n = rng.randrange(1, 10)
                views = [memoryview(pages)[: 4096 * n], memoryview(tags)[: 16 * n]]
                own.append((key.seal_pages(views[0], views[0], views[1]), n))
        ranges.extend(own)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ranges) == 16 * 150
    expected = 1
    for first, count in sorted(ranges):
        assert first == expected
        expected += count
    assert key.pages_sealed == expected - 1


def test_PAG_06_the_caller_cannot_choose_a_version_or_turn_the_counter_back() -> None:
    key: Any = _core.PageKey(KEY)
    with pytest.raises(TypeError):
        key.seal_page(PAGE, bytearray(4112), version=7)
    with pytest.raises(TypeError):
        key.seal_pages(PAGE, bytearray(4096), bytearray(16), version=7)
    with pytest.raises(TypeError):
        key.seal_page(PAGE, bytearray(4112), 0, 0, 2, 7)
    with pytest.raises(AttributeError):
        key.pages_sealed = 0
    key._skip(100)
    assert key.seal_page(PAGE, bytearray(4112)) == 100
    for lower in (0, 1, 99, 100):
        with pytest.raises(ValueError, match="range"):
            key._skip(lower)
    assert key.seal_page(PAGE, bytearray(4112)) == 101


def test_PAG_06_the_limit_destroys_the_key(implementation: str) -> None:
    """The last version is usable; the next one is refused, and then everything is."""
    key = _core.PageKey(KEY)
    key._skip(LIMIT)
    sealed, version = sealed_page(key)
    assert version == LIMIT
    assert opened(key, sealed, version=version) == PAGE
    out = bytearray(4112)
    with pytest.raises(SealLimitError):
        key.seal_page(PAGE, out)
    assert out == bytes(4112)
    assert key.implementation == "none"
    assert key.pages_sealed == LIMIT
    for again in (
        lambda: key.seal_page(PAGE, out),
        lambda: key.open_page(sealed, bytearray(4096), version=version),
        lambda: key.seal_pages(PAGE, bytearray(4096), bytearray(16)),
        lambda: key._skip(LIMIT + 1),
    ):
        with pytest.raises(EnclaveClosedError):
            again()


@pytest.mark.parametrize("left", [1, 5, 63])
def test_PAG_06_a_batch_beyond_the_limit_seals_nothing(left: int) -> None:
    key = _core.PageKey(KEY)
    key._skip(LIMIT + 1 - left)
    pages, out, tags = os.urandom(4096 * 64), bytearray(4096 * 64), bytearray(16 * 64)
    with pytest.raises(SealLimitError):
        key.seal_pages(pages, out, tags)
    assert out == bytes(4096 * 64)
    assert tags == bytes(16 * 64)
    with pytest.raises(EnclaveClosedError):
        key.seal_page(PAGE, bytearray(4112))


def test_PAG_06_the_counter_of_the_c_interface_ends_at_the_limit() -> None:
    raw = ffi.new("uint8_t[]", lib.pye_page_key_size() + 64)
    key = ffi.cast("pye_page_key *", raw + (-int(ffi.cast("uintptr_t", raw)) % 64))
    assert lib.pye_page_key_init(key, KEY, 32, ENCLAVE, lib.PYE_GCM_ANY) == lib.PYE_OK
    for beyond in (LIMIT + 2, 2**38, 2**63, 2**64 - 1):
        assert lib.pye_page_key_skip(key, beyond) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_key_skip(key, LIMIT + 1) == lib.PYE_OK
    out, tag = ffi.new("uint8_t[4096]"), ffi.new("uint8_t[16]")
    version, info = ffi.new("uint64_t *", 9), ffi.new("pye_page_info *")
    status = lib.pye_page_seal(key, out, tag, version, PAGE, info)
    assert (status, version[0]) == (lib.PYE_E_LIMIT, 0)
    assert lib.pye_page_key_idle(key)
    size = lib.pye_page_key_size() - lib.pye_gcm_key_size()
    assert not any(bytes(ffi.buffer(key, lib.pye_page_key_size()))[size:])
    status = lib.pye_page_seal(key, out, tag, version, PAGE, info)
    assert status == lib.PYE_E_CLOSED


def test_PAG_07_a_forked_child_cannot_seal_under_its_parents_key(in_child: Any) -> None:
    """The child is refused, may make keys of its own, and leaves the parent's alone."""
    key = _core.PageKey(KEY)
    sealed, version = sealed_page(key)

    def use() -> list[str]:
        outcome = []
        for call in (
            lambda: key.seal_page(PAGE, bytearray(4112)),
            lambda: key.open_page(sealed, bytearray(4096), version=version),
            lambda: key.seal_pages(PAGE, bytearray(4096), bytearray(16)),
            lambda: key.open_pages(PAGE, bytes(16), bytearray(4096), version=1),
            lambda: key._skip(100),
        ):
            try:
                call()
                outcome.append("done")
            except EnclaveStateError:
                outcome.append("refused")
        key.close()
        own = _core.PageKey(KEY)
        outcome.append(f"{key!r} {own.seal_page(PAGE, bytearray(4112))}")
        return outcome

    outcome = in_child(use).result()
    assert outcome == ["refused"] * 5 + ["<PageKey none, 0 pages sealed> 1"]
    assert sealed_page(key)[1] == version + 1
    assert opened(key, sealed, version=version) == PAGE


def test_PAG_07_keys_are_fresh_at_every_start() -> None:
    ciphertexts = {bytes(sealed_page(_core.PageKey())[0]) for _ in range(20)}
    assert len(ciphertexts) == 20


def test_PAG_09_a_failed_load_leaves_a_zero_page_in_place_too(implementation: str) -> None:
    key = _core.PageKey(KEY)
    area, version = sealed_page(key)
    area[4096] ^= 1
    with pytest.raises(UnsealError):
        key.open_page(area, memoryview(area)[:4096], version=version)
    assert area[:4096] == bytes(4096)


@pytest.mark.parametrize("bad", [0, 1, 31, 32, 33, 69])
def test_one_bad_page_zeroes_the_whole_batch(implementation: str, bad: int) -> None:
    key = _core.PageKey(KEY)
    pages, tags = os.urandom(4096 * 70), bytearray(16 * 70)
    sealed = bytearray(len(pages))
    first = key.seal_pages(pages, sealed, tags)
    tags[16 * bad + 5] ^= 8
    out = bytearray(b"\xff" * len(pages))
    with pytest.raises(UnsealError):
        key.open_pages(sealed, tags, out, version=first)
    assert out == bytes(len(pages))
    tags[16 * bad + 5] ^= 8
    key.open_pages(sealed, tags, out, version=first)
    assert out == pages


# ---- the layout, and batches ------------------------------------------------------------------


@pytest.mark.parametrize("key_size", [16, 32])
def test_the_sealed_page_is_what_its_format_says(implementation: str, key_size: int) -> None:
    key = _core.PageKey(KEY[:key_size], enclave=ENCLAVE)
    other = AESGCM(KEY[:key_size])
    key._skip(0x0123456789)
    for address, flags, kind in ((0, 0, 2), (2**64 - 4096, 2**32 - 1, 255), (0x1234567, 7, 0)):
        sealed, version = sealed_page(key, address=address, flags=flags, type=kind)
        iv = version.to_bytes(8, "big") + bytes(4)
        aad = header(version, address, flags, kind, ENCLAVE)
        assert other.encrypt(iv, PAGE, aad) == sealed
        info = ffi.new("pye_page_info *", {"address": address, "flags": flags, "type": kind})
        written = ffi.new("uint8_t[64]")
        lib.pye_page_header(written, ENCLAVE, version, info)
        assert bytes(written) == aad


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 64, 65, 100])
def test_a_batch_equals_single_pages(implementation: str, count: int) -> None:
    single, batch = _core.PageKey(KEY, enclave=ENCLAVE), _core.PageKey(KEY, enclave=ENCLAVE)
    pages, info = os.urandom(4096 * count), {"flags": 3, "type": 1}
    out, tags = bytearray(4096 * count), bytearray(16 * count)
    first = batch.seal_pages(pages, out, tags, address=0x4000, **info)
    versions = []
    for i in range(count):
        page = pages[4096 * i : 4096 * (i + 1)]
        sealed, version = sealed_page(single, page, address=0x4000 + 4096 * i, **info)
        assert version == first + i
        assert sealed == out[4096 * i : 4096 * (i + 1)] + tags[16 * i : 16 * (i + 1)]
        versions.append(version)
    again = bytearray(len(pages))
    for form in (
        first,
        versions,
        tuple(versions),
        array("Q", versions),
        np.array(versions, np.uint64),
        np.array(versions, np.int64),
    ):
        again[:] = bytes(len(pages))
        batch.open_pages(out, tags, again, version=form, address=0x4000, **info)
        assert again == pages
    assert batch.pages_sealed == single.pages_sealed == count


@pytest.mark.parametrize(("key", "offset"), [(KEY, 0), (KEY, 1), (KEY, 32), (KEY[:16], 0)],
                         ids=["aligned", "1", "32", "AES-128"])  # fmt: skip
def test_a_batch_past_the_cache_equals_single_pages(
    implementation: str, key: bytes, offset: int
) -> None:
    """Non-temporal stores need outputs aligned to 64; both ways give the same bytes."""
    if implementation == "portable" and offset:
        pytest.skip("the portable code has one kind of store")
    count = STREAM_PAGES + 5
    size = 4096 * count
    single, batch = _core.PageKey(key), _core.PageKey(key)
    pages = random.Random(2).randbytes(size)
    areas = []
    for _ in range(2):
        raw = np.zeros(size + 128, np.uint8)
        start = -raw.ctypes.data % 64 + offset
        areas.append(raw[start : start + size])
    sealed, out = areas
    tags = bytearray(16 * count)
    first = batch.seal_pages(pages, sealed, tags)
    for i in range(count):
        one, version = sealed_page(single, pages[4096 * i : 4096 * (i + 1)], address=4096 * i)
        assert version == first + i
        assert one == sealed[4096 * i : 4096 * (i + 1)].tobytes() + tags[16 * i : 16 * (i + 1)]
    batch.open_pages(sealed, tags, out, version=first)
    assert out.tobytes() == pages
    sealed[-1] ^= 1
    with pytest.raises(UnsealError):
        batch.open_pages(sealed, tags, out, version=first)
    assert not out.any()


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("count", [1, 40, STREAM_PAGES])
def test_a_batch_in_place(implementation: str, count: int, size: int) -> None:
    key, other = _core.PageKey(KEY[:size]), _core.PageKey(KEY[:size])
    pages = os.urandom(4096 * count)
    area, tags = bytearray(pages), bytearray(16 * count)
    plain, plain_tags = bytearray(len(pages)), bytearray(16 * count)
    first = key.seal_pages(area, area, tags)
    other.seal_pages(pages, plain, plain_tags)
    assert (area, tags) == (plain, plain_tags)
    key.open_pages(area, tags, area, version=first)
    assert area == pages


def test_partial_overlap_is_refused_and_uses_no_version() -> None:
    key = _core.PageKey(KEY)
    area = bytearray(random.Random(3).randbytes(5 * 4096))
    before, view = bytes(area), memoryview(area)
    for shift in (1, 64, 2048, 4095):
        with pytest.raises(ValueError, match="overlap"):
            key.seal_page(view[shift : shift + 4096], view[:4112])
        with pytest.raises(ValueError, match="overlap"):
            key.open_page(view[:4112], view[shift : shift + 4096], version=1)
    tags = bytearray(32)
    for shift in (1, 4096, 8191):
        with pytest.raises(ValueError, match="overlap"):
            key.seal_pages(view[:8192], view[shift : shift + 8192], tags)
        with pytest.raises(ValueError, match="overlap"):
            key.open_pages(view[shift : shift + 8192], tags, view[:8192], version=1)
    with pytest.raises(ValueError, match="overlap"):
        key.seal_pages(bytes(8192), view[:8192], view[100:132])
    assert area == before
    assert key.pages_sealed == 0


def test_scattered_pages_equal_contiguous_ones(implementation: str) -> None:
    """pye_page_jobs_*: pages anywhere, in any order, each with its own description."""
    memory = [ffi.new("uint8_t[]", lib.pye_page_key_size() + 64) for _ in range(2)]
    allowed = getattr(lib, f"PYE_GCM_{implementation.upper()}")
    keys = []
    for raw in memory:
        key = ffi.cast("pye_page_key *", raw + (-int(ffi.cast("uintptr_t", raw)) % 64))
        assert lib.pye_page_key_init(key, KEY, 32, ENCLAVE, allowed) == lib.PYE_OK
        keys.append(key)
    count, rng = 45, random.Random(4)
    ins = [ffi.new("uint8_t[]", rng.randbytes(4096)) for _ in range(count)]
    outs = [ffi.new("uint8_t[4096]") for _ in range(count)]
    tags = [ffi.new("uint8_t[16]") for _ in range(count)]
    jobs = ffi.new("pye_page_job[]", count)
    for i, job in enumerate(jobs):
        job.out, job.tag = outs[i], tags[i]
        setattr(job, "in", ins[i])
        job.info.address, job.info.flags, job.info.type = rng.getrandbits(64), i, i
    assert lib.pye_page_jobs_seal(keys[0], jobs, count) == lib.PYE_OK
    one, tag, version = ffi.new("uint8_t[4096]"), ffi.new("uint8_t[16]"), ffi.new("uint64_t *")
    for i, job in enumerate(jobs):
        info = ffi.new("pye_page_info *", job.info)
        assert lib.pye_page_seal(keys[1], one, tag, version, ins[i], info) == lib.PYE_OK
        assert version[0] == job.version == i + 1
        assert (bytes(one), bytes(tag)) == (bytes(outs[i]), bytes(tags[i]))
    for i, job in enumerate(jobs):
        setattr(job, "in", outs[i])
    assert lib.pye_page_jobs_open(keys[0], jobs, count) == lib.PYE_OK
    assert [bytes(o) for o in outs] == [bytes(i)[:4096] for i in ins]
    jobs[40].version += 1
    assert lib.pye_page_jobs_open(keys[0], jobs, count) == lib.PYE_E_AUTH
    assert not any(any(bytes(o)) for o in outs)
    setattr(jobs[1], "in", outs[1] + 1)
    assert lib.pye_page_jobs_seal(keys[0], jobs, count) == lib.PYE_E_OVERLAP
    assert lib.pye_page_jobs_seal(keys[0], jobs, 0) == lib.PYE_E_LENGTH
    assert lib.pye_page_key_sealed(keys[0]) == count


# ---- arguments and life ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("address", -1),
        ("address", 2**64),
        ("flags", -1),
        ("flags", 2**32),
        ("type", -1),
        ("type", 256),
    ],
)
def test_a_number_out_of_range_is_a_value_error(name: str, value: int) -> None:
    key: Any = _core.PageKey(KEY)
    with pytest.raises(ValueError, match=name):
        key.seal_page(PAGE, bytearray(4112), **{name: value})
    with pytest.raises(ValueError, match=name):
        key.seal_pages(PAGE, bytearray(4096), bytearray(16), **{name: value})
    with pytest.raises(ValueError, match=name):
        key.open_page(bytes(4112), bytearray(4096), version=1, **{name: value})
    assert key.pages_sealed == 0


def test_versions_out_of_range_are_value_errors_and_other_types_type_errors() -> None:
    key: Any = _core.PageKey(KEY)
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="version"):
            key.open_page(bytes(4112), bytearray(4096), version=wrong)
    for wrong in (None, "1", 1.0, b"1"):
        with pytest.raises((TypeError, AttributeError)):
            key.open_page(bytes(4112), bytearray(4096), version=wrong)
    out = bytearray(8192)
    for wrong in (None, 1.0, b"12345678" * 2, np.zeros(2, np.float64), np.zeros(4, np.uint32)):
        with pytest.raises(TypeError):
            key.open_pages(bytes(8192), bytes(32), out, version=wrong)
    for wrong in (np.zeros(1, np.uint64), np.zeros(3, np.uint64), [], [1], [1, 2, 3]):
        with pytest.raises(ValueError, match="version"):
            key.open_pages(bytes(8192), bytes(32), out, version=wrong)
    with pytest.raises((TypeError, OverflowError)):
        key.open_pages(bytes(8192), bytes(32), out, version=[1, -1])


def test_a_batch_whose_addresses_wrap_around_is_refused() -> None:
    key = _core.PageKey(KEY)
    last = 2**64 - 4096
    key.seal_pages(PAGE, bytearray(4096), bytearray(16), address=last)
    with pytest.raises(ValueError, match="range"):
        key.seal_pages(bytes(8192), bytearray(8192), bytearray(32), address=last)
    assert key.pages_sealed == 1


def test_an_address_may_be_any_integer_like_object() -> None:
    key: Any = _core.PageKey(KEY)
    sealed, version = sealed_page(key, address=np.uint64(4096), flags=True)
    assert opened(key, sealed, version=np.int64(version), address=4096, flags=1) == PAGE
    with pytest.raises((TypeError, AttributeError)):
        key.seal_page(PAGE, bytearray(4112), address="4096")


def test_BND_22_hostile_buffers_are_refused() -> None:
    key: Any = _core.PageKey(KEY)
    for wrong in (None, 5, "x" * 4096, memoryview(bytearray(8192))[::2]):
        with pytest.raises((TypeError, BufferError)):
            key.seal_page(wrong, bytearray(4112))
    for wrong in (bytes(4112), memoryview(bytes(4112)), None):
        with pytest.raises((TypeError, BufferError)):
            key.seal_page(PAGE, wrong)
        with pytest.raises((TypeError, BufferError)):
            key.seal_pages(PAGE, bytearray(4096), wrong)
    assert key.pages_sealed == 0


def test_BND_22_every_way_out_of_a_call_gives_the_buffers_back() -> None:
    key: Any = _core.PageKey(KEY)
    page, out, tags, short = bytearray(4096), bytearray(4112), bytearray(16), bytearray(7)
    key.seal_page(page, out)
    for call in (
        lambda: key.seal_page(page, short),
        lambda: key.seal_page(page, 3),
        lambda: key.seal_page(page, out, type=999),
        lambda: key.open_page(out, page, version=9),
        lambda: key.open_page(out, short, version=9),
        lambda: key.seal_pages(page, short, tags),
        lambda: key.seal_pages(page, page, short),
        lambda: key.open_pages(page, tags, page, version=[3]),
        lambda: key.open_pages(page, tags, short, version=3),
    ):
        with pytest.raises((ValueError, TypeError, UnsealError)):
            call()
    for area in (page, out, tags, short):
        area.append(0)


@pytest.mark.parametrize("size", [0, 15, 17, 24, 31, 33])
def test_a_key_or_enclave_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="length"):
        _core.PageKey(bytes(size))
    with pytest.raises(ValueError, match="enclave"):
        _core.PageKey(KEY, enclave=bytes(size))


def test_close_wipes_and_may_be_called_twice() -> None:
    key = _core.PageKey(KEY)
    sealed, version = sealed_page(key)
    key.close()
    key.close()
    assert key.implementation == "none"
    with pytest.raises(EnclaveClosedError):
        key.seal_page(PAGE, bytearray(4112))
    with pytest.raises(EnclaveClosedError):
        key.open_page(sealed, bytearray(4096), version=version)
    with _core.PageKey(KEY) as used:
        used.seal_page(PAGE, bytearray(4112))
    with pytest.raises(EnclaveClosedError):
        used.seal_page(PAGE, bytearray(4112))


def test_closing_during_batches_gives_a_whole_result_or_a_refusal() -> None:
    """The tables stay until the last call is out: half-wiped keys would leak the pages."""
    pages = os.urandom(4096 * 64)
    for _ in range(20):
        key = _core.PageKey(KEY)
        results: list[tuple[int, bytes, bytes]] = []
        started = threading.Barrier(3)

        def work(key: Any = key, started: Any = started, results: Any = results) -> None:
            out, tags = bytearray(len(pages)), bytearray(16 * 64)
            started.wait()
            for _ in range(40):
                try:
                    results.append((key.seal_pages(pages, out, tags), bytes(out), bytes(tags)))
                except EnclaveClosedError:
                    return

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        key.close()
        for thread in threads:
            thread.join()
        again, opened_pages = _core.PageKey(KEY), bytearray(len(pages))
        for first, sealed, tags in results[-3:]:
            again.open_pages(sealed, tags, opened_pages, version=first)
            assert opened_pages == pages


def test_a_key_shows_nothing_and_is_not_copied() -> None:
    key = _core.PageKey(KEY)
    assert repr(key) == f"<PageKey {key.implementation}, 0 pages sealed>"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(key)
    with pytest.raises(TypeError):
        type("Sub", (_core.PageKey,), {})


def test_a_model_of_a_pager_agrees_with_a_simple_one() -> None:
    """PAG-08's sealing half: random evictions and loads, with every stale page offered again."""
    rng = random.Random(5)
    key = _core.PageKey(KEY)
    plain = {at: rng.randbytes(4096) for at in range(16)}
    outside: dict[int, tuple[bytes, int]] = {}
    stale: list[tuple[int, bytes]] = []
    for _ in range(2000):
        at = rng.randrange(16)
        if at in outside:
            sealed, version = outside.pop(at)
            assert opened(key, sealed, version=version, address=at * 4096) == plain[at]
            stale.append((at, sealed))
            plain[at] = rng.randbytes(4096)
        else:
            sealed, version = sealed_page(key, plain[at], address=at * 4096)
            outside[at] = bytes(sealed), version
            if stale:
                old_at, old = rng.choice(stale)
                refused(key, old, version=version, address=old_at * 4096)
