"""Every implementation at every length, offset and border: it may not read or write one byte more.

The implementations are asked for, not listed: one that is added is tested here without an edit.
Buffers end or begin at a page that nobody may touch, so each test runs in a child of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import resource
import signal
from collections.abc import Callable
from typing import Any

import pytest
from borders import (
    PAGE,
    Fenced,
    aligned,
    feature_masks,
    features,
    gcm_implementations,
    lengths,
    noise,
    taken,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

from pyenclave._ffi import ffi, lib

GCM = gcm_implementations()
MASKS = feature_masks()
KEYS = {16: noise(16, 3), 32: noise(32, 4)}
IV = noise(12, 5)
AAD = noise(600, 6)
DATA = noise(20000, 7)
# Four blocks; a vector of 128, 256 and 512 bits, four and eight of them; a page; two.
SIZES = lengths(block=16, batches=(64, 96, 128, 192, 256, 384, 512, 576, 1024, 1536, 4096, 8192))
FIRST, LAST = 0, -1  # where a buffer touches a forbidden page


@pytest.fixture(params=list(GCM))
def gcm(request: pytest.FixtureRequest) -> int:
    return GCM[request.param]


@pytest.fixture(params=list(MASKS))
def mask(request: pytest.FixtureRequest) -> int:
    return MASKS[request.param]


def test_a_byte_beyond_a_fence_kills_the_child(in_child: Any) -> None:
    """Without this, the fences of this file could be none."""

    def touch(at: int, *, write: bool) -> int:
        area = Fenced(100)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # a sanitizer would catch it
        if write:
            area.first[at] = 1
        return int(area.first[at])

    for at in (-1, PAGE):
        for write in (True, False):
            died = in_child(lambda at=at, write=write: touch(at, write=write))
            assert died.signal == signal.SIGSEGV
    assert in_child(lambda: touch(0, write=True)).result() == 1
    area = Fenced(100)
    where = area.place(50, b"x" * 20)
    assert area.untouched_but(where, 20)
    where[20] = 1
    assert not area.untouched_but(where, 20)


# ---- AES-GCM ----------------------------------------------------------------------------------


def gcm_key(secret: bytes, bit: int) -> Any:
    key = aligned(lib.pye_gcm_key_size(), "pye_gcm_key *")
    assert lib.pye_gcm_init(key, secret, len(secret), bit) == lib.PYE_OK
    return key


def one_message(key: Any, sealed: bytes, aad: Any, aad_len: int, where: tuple[Any, ...]) -> None:
    """Seal and open what lies at ``where``: input, output, tag; see that only those change."""
    (source, data), (target, out), (tags, tag) = where
    size = len(sealed) - 16
    plain = taken(data, size)
    assert lib.pye_gcm_seal(key, out, tag, IV, data, size, aad, aad_len) == lib.PYE_OK
    assert taken(out, size) == sealed[:size]
    assert taken(tag, 16) == sealed[size:]
    assert lib.pye_gcm_open(key, data, IV, out, size, tag, aad, aad_len) == lib.PYE_OK
    assert taken(data, size) == plain
    tag[15] ^= 0x80
    assert lib.pye_gcm_open(key, data, IV, out, size, tag, aad, aad_len) == lib.PYE_E_AUTH
    assert not any(taken(data, size))
    assert source.untouched_but(data, size)
    assert target.untouched_but(out, size)
    assert tags.untouched_but(tag, 16)


@pytest.mark.parametrize("key_size", KEYS)
def test_gcm_of_every_length_stays_between_the_fences(
    gcm: int, key_size: int, in_child: Any
) -> None:
    def run() -> None:
        key, other = gcm_key(KEYS[key_size], gcm), AESGCM(KEYS[key_size])
        source, target, tags = Fenced(SIZES[-1]), Fenced(SIZES[-1]), Fenced(16)
        headers = Fenced(len(AAD))
        for size in SIZES:
            aad_len = size * 7 % 131
            sealed = other.encrypt(IV, DATA[:size], AAD[:aad_len])
            for begin in (FIRST, LAST):
                aad = headers.place(begin, AAD[:aad_len])
                data = source.place(begin, DATA[:size])
                out = target.place(begin, bytes(size))
                tag = tags.place(begin, bytes(16))
                where = (source, data), (target, out), (tags, tag)
                one_message(key, sealed, aad, aad_len, where)

    in_child(run).result()


def test_gcm_in_place_of_every_length_stays_between_the_fences(gcm: int, in_child: Any) -> None:
    def run() -> None:
        key, other = gcm_key(KEYS[32], gcm), AESGCM(KEYS[32])
        area, tags = Fenced(SIZES[-1]), Fenced(16)
        for size in SIZES:
            sealed = other.encrypt(IV, DATA[:size], AAD[:20])
            for begin in (FIRST, LAST):
                data, tag = area.place(begin, DATA[:size]), tags.place(begin, bytes(16))
                status = lib.pye_gcm_seal(key, data, tag, IV, data, size, AAD, 20)
                assert status == lib.PYE_OK
                assert taken(data, size) + taken(tag, 16) == sealed
                status = lib.pye_gcm_open(key, data, IV, data, size, tag, AAD, 20)
                assert status == lib.PYE_OK
                assert taken(data, size) == DATA[:size]
                assert area.untouched_but(data, size)

    in_child(run).result()


def test_gcm_headers_of_every_length_stay_between_the_fences(gcm: int, in_child: Any) -> None:
    """The header, and everything of a fixed size: key, IV and tag."""

    def run() -> None:
        other = AESGCM(KEYS[32])
        secrets, ivs, tags, headers = Fenced(32), Fenced(12), Fenced(16), Fenced(len(AAD))
        sizes = [size for size in SIZES if size <= len(AAD)]
        for begin in (FIRST, LAST):
            key = gcm_key(bytes(32), gcm)
            secret = secrets.place(begin, KEYS[32])
            assert lib.pye_gcm_init(key, secret, 32, gcm) == lib.PYE_OK
            iv, tag = ivs.place(begin, IV), tags.place(begin, bytes(16))
            out = ffi.new("uint8_t[33]")
            for size in sizes:
                aad = headers.place(begin, AAD[:size])
                status = lib.pye_gcm_seal(key, out, tag, iv, DATA[:33], 33, aad, size)
                assert status == lib.PYE_OK
                assert bytes(out) + taken(tag, 16) == other.encrypt(IV, DATA[:33], AAD[:size])
                again = ffi.new("uint8_t[33]")
                status = lib.pye_gcm_open(key, again, iv, out, 33, tag, aad, size)
                assert status == lib.PYE_OK
                assert bytes(again) == DATA[:33]

    in_child(run).result()


@pytest.mark.parametrize("size", [5, 77, 523, 1100])
def test_gcm_takes_all_64_offsets_of_input_and_output(gcm: int, size: int, in_child: Any) -> None:
    """Each offset of the input with each of the output."""

    def run() -> None:
        key = gcm_key(KEYS[16], gcm)
        sealed = AESGCM(KEYS[16]).encrypt(IV, DATA[:size], None)
        source, target, tags = Fenced(size + 64), Fenced(size + 64), Fenced(16)
        tag = tags.place(LAST, bytes(16))
        for i in range(64):
            data = source.place(i, DATA[:size])
            for j in range(64):
                out = target.place(j, bytes(size))
                status = lib.pye_gcm_seal(key, out, tag, IV, data, size, ffi.NULL, 0)
                assert status == lib.PYE_OK
                assert taken(out, size) + taken(tag, 16) == sealed
                status = lib.pye_gcm_open(key, data, IV, out, size, tag, ffi.NULL, 0)
                assert status == lib.PYE_OK
                assert taken(data, size) == DATA[:size]
                assert target.untouched_but(out, size)
            assert source.untouched_but(data, size)

    in_child(run).result()


def test_all_gcm_implementations_agree_at_every_length() -> None:
    """Not with another library but with each other, tags of every length of the header included."""
    keys = [gcm_key(KEYS[32], bit) for bit in GCM.values()]
    out, tag = ffi.new("uint8_t[1200]"), ffi.new("uint8_t[16]")
    for size in range(1200):
        results = set()
        for key in keys:
            status = lib.pye_gcm_seal(key, out, tag, IV, DATA, size, AAD, size % 600)
            assert status == lib.PYE_OK
            results.add(taken(out, size) + bytes(tag))
        assert len(results) == 1, size


# ---- pages ------------------------------------------------------------------------------------


def page_key(bit: int) -> Any:
    key = aligned(lib.pye_page_key_size(), "pye_page_key *")
    assert lib.pye_page_key_init(key, KEYS[32], 32, bytes(16), bit) == lib.PYE_OK
    return key


def sealed_page(page: bytes, version: int, address: int) -> bytes:
    """One sealed page by another library (docs/formats/page.md)."""
    header = b"PYEPAGE1" + bytes(16) + address.to_bytes(8, "little")
    header += version.to_bytes(8, "little") + (3).to_bytes(4, "little") + b"\2" + bytes(19)
    return AESGCM(KEYS[32]).encrypt(version.to_bytes(8, "big") + bytes(4), page, header)


def test_a_page_takes_all_64_offsets_between_the_fences(gcm: int, in_child: Any) -> None:
    def run() -> None:
        key = page_key(gcm)
        info = ffi.new("pye_page_info *", {"address": 0x5000, "flags": 3, "type": 2})
        source, target, tags = Fenced(2 * PAGE), Fenced(2 * PAGE), Fenced(16)
        version = ffi.new("uint64_t *")
        offsets = [*range(64), PAGE]  # the last one: up to the fence
        for number, i in enumerate(offsets):
            j = offsets[(number * 7 + 3) % len(offsets)]
            data = source.place(i, DATA[i : i + PAGE])
            out, tag = target.place(j, bytes(PAGE)), tags.place(LAST if i % 2 else FIRST, bytes(16))
            assert lib.pye_page_seal(key, out, tag, version, data, info) == lib.PYE_OK
            assert taken(out, PAGE) + taken(tag, 16) == sealed_page(
                DATA[i : i + PAGE], version[0], 0x5000
            )
            assert lib.pye_page_open(key, data, out, tag, version[0], info) == lib.PYE_OK
            assert taken(data, PAGE) == DATA[i : i + PAGE]
            assert lib.pye_page_open(key, data, out, tag, version[0] + 1, info) == lib.PYE_E_AUTH
            assert not any(taken(data, PAGE))
            assert source.untouched_but(data, PAGE)
            assert target.untouched_but(out, PAGE)
            assert tags.untouched_but(tag, 16)

    in_child(run).result()


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in-place"])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 65, lib.PYE_PAGE_STREAM_PAGES + 1])
def test_batches_of_pages_stay_between_the_fences(
    gcm: int, count: int, in_place: bool, in_child: Any
) -> None:
    def run() -> None:
        size = count * PAGE
        plain, key = noise(size, 8), page_key(gcm)
        info = ffi.new("pye_page_info *", {"address": 0, "flags": 3, "type": 2})
        target, tags, versions = Fenced(size), Fenced(16 * count), Fenced(8 * count)
        source = target if in_place else Fenced(size)
        version = ffi.new("uint64_t *")
        for begin in (FIRST, LAST):
            tag = tags.place(begin, bytes(16 * count))
            out = target.first
            data = source.place(FIRST, plain)
            assert lib.pye_pages_seal(key, out, tag, version, data, count, info) == lib.PYE_OK
            first = version[0]
            for i in {0, 1, count // 2, count - 1} & set(range(count)):
                assert taken(out + PAGE * i, PAGE) + taken(tag + 16 * i, 16) == sealed_page(
                    plain[PAGE * i : PAGE * (i + 1)], first + i, PAGE * i
                )
            each = b"".join((first + i).to_bytes(8, "little") for i in range(count))
            kept = ffi.cast("uint64_t *", versions.place(begin, each))
            status = lib.pye_pages_open(key, data, out, tag, kept, 0, count, info)
            assert status == lib.PYE_OK
            assert taken(data, size) == plain
            assert tags.untouched_but(tag, 16 * count)

    in_child(run).result()


# ---- hashes, MACs and key derivation -------------------------------------------------------------

HASHES: dict[str, tuple[Callable[..., Any], int, int]] = {
    "sha256": (lib.pye_sha256, 32, 64),
    "sha384": (lib.pye_sha384, 48, 128),
    "sha512": (lib.pye_sha512, 64, 128),
}


@pytest.mark.parametrize("name", HASHES)
def test_hashes_of_every_length_stay_between_the_fences(
    mask: int, name: str, in_child: Any
) -> None:
    function, digest_size, block = HASHES[name]

    def run() -> None:
        source, target = Fenced(1100), Fenced(64)
        with features(mask):
            for size in lengths(block=block, batches=(1024,)):
                want = hashlib.new(name, DATA[:size]).digest()
                for begin in (FIRST, LAST, size % 64):
                    data, out = source.place(begin, DATA[:size]), target.place(begin, want)
                    ffi.memmove(out, bytes(digest_size), digest_size)
                    function(out, data, size)
                    assert taken(out, digest_size) == want, size
                    assert source.untouched_but(data, size)
                    assert target.untouched_but(out, digest_size)

    in_child(run).result()


def test_hashes_take_all_64_offsets(mask: int) -> None:
    source, out = Fenced(1000), ffi.new("uint8_t[64]")
    with features(mask):
        for offset in range(64):
            data = source.place(offset, DATA[:777])
            for name, (function, digest_size, _) in HASHES.items():
                function(out, data, 777)
                assert taken(out, digest_size) == hashlib.new(name, DATA[:777]).digest()


def cmac_of(key: bytes, data: bytes) -> bytes:
    mac = CMAC(AES(key))
    mac.update(data)
    return mac.finalize()


def test_macs_of_every_length_stay_between_the_fences(mask: int, in_child: Any) -> None:
    """CMAC and HMAC: message, key and result each touch a fence."""

    def run() -> None:
        source, keys, target = Fenced(1000), Fenced(300), Fenced(32)
        with features(mask):
            for size in lengths(block=64, batches=(512,)):
                for begin in (FIRST, LAST, size % 64):
                    data = source.place(begin, DATA[:size])
                    key = keys.place(begin, KEYS[16])
                    out = target.place(begin, bytes(16))
                    lib.pye_aes128_cmac(out, key, data, size)
                    assert taken(out, 16) == cmac_of(KEYS[16], DATA[:size]), size
                    assert target.untouched_but(out, 16)
                    key_size = size % 150
                    key = keys.place(begin, DATA[:key_size])
                    out = target.place(begin, bytes(32))
                    lib.pye_hmac_sha256(out, key, key_size, data, size)
                    want = hmac.digest(DATA[:key_size], DATA[:size], hashlib.sha256)
                    assert taken(out, 32) == want, size
                    assert source.untouched_but(data, size)

    in_child(run).result()


def test_hkdf_of_every_length_stays_between_the_fences(mask: int, in_child: Any) -> None:
    def run() -> None:
        target, inputs = Fenced(8160), Fenced(200)
        whole = ffi.new("uint8_t[8160]")
        with features(mask):
            status = lib.pye_hkdf_sha256(whole, 8160, DATA[:77], 77, AAD[:40], 40, IV, 12)
            assert status == lib.PYE_OK
            for size in [*range(1, 161), 8159, 8160]:
                for begin in (FIRST, LAST):
                    out, secret = target.place(begin, bytes(size)), inputs.place(begin, DATA[:77])
                    status = lib.pye_hkdf_sha256(out, size, secret, 77, AAD[:40], 40, IV, 12)
                    assert status == lib.PYE_OK
                    assert taken(out, size) == taken(whole, size)
                    assert target.untouched_but(out, size)

    in_child(run).result()


def test_comparison_reads_what_it_is_told_to_and_finds_every_difference(in_child: Any) -> None:
    def run() -> None:
        one, two = Fenced(300), Fenced(300)
        for size in range(130):
            for begin in (FIRST, LAST):
                a, b = one.place(begin, DATA[:size]), two.place(begin, DATA[:size])
                assert lib.pye_ct_equal(a, b, size) == 1
                for at in range(size):
                    b[at] ^= 1 << at % 8
                    assert lib.pye_ct_equal(a, b, size) == 0
                    b[at] ^= 1 << at % 8

    in_child(run).result()


# ---- measuring ----------------------------------------------------------------------------------


def test_page_digests_of_every_count_stay_between_the_fences(mask: int, in_child: Any) -> None:
    """SHA-384 of several pages at a time: whole and broken groups of lanes."""

    def run() -> None:
        count = 19
        pages = noise(count * PAGE, 9)
        digests = [hashlib.sha384(pages[PAGE * i : PAGE * (i + 1)]).digest() for i in range(count)]
        source, target = Fenced(count * PAGE), Fenced(48 * count)
        with features(mask):
            for num in range(count + 1):
                for begin in (FIRST, LAST, 2 * num + 1):
                    if begin > 0 and num == count:
                        continue  # no room for an offset
                    data = source.place(begin, pages[: num * PAGE])
                    out = target.place(begin, bytes(48 * num))
                    lib.pye_snp_page_digests(out, data, num)
                    assert taken(out, 48 * num) == b"".join(digests[:num])
                    assert target.untouched_but(out, 48 * num)

    in_child(run).result()


def sgx_record(tag: bytes, *numbers: tuple[int, int]) -> bytes:
    text = tag.ljust(8, b"\0") + b"".join(value.to_bytes(size, "little") for value, size in numbers)
    return text.ljust(64, b"\0")


def test_mrenclave_of_pages_at_every_offset_reads_no_byte_beyond(mask: int, in_child: Any) -> None:
    def run() -> None:
        pages = DATA[: 3 * PAGE]
        source = Fenced(4 * PAGE)
        right = hashlib.sha256(sgx_record(b"ECREATE", (1, 4), (1 << 20, 8)))
        for at in range(0, 3 * PAGE, PAGE):
            right.update(sgx_record(b"EADD", (at, 8), (0x203, 8)))
            for chunk in range(at, at + PAGE, 256):
                right.update(sgx_record(b"EEXTEND", (chunk, 8)) + pages[chunk : chunk + 256])
        want, out = right.digest(), ffi.new("uint8_t[32]")
        with features(mask):
            for begin in (LAST, *range(64)):
                data = source.place(begin, pages)
                ctx = ffi.new("pye_sgx_measure *")
                assert lib.pye_sgx_create(ctx, 1 << 20, 1) == lib.PYE_OK
                assert lib.pye_sgx_add_pages(ctx, data, 3, 0, 0x203, 1) == lib.PYE_OK
                assert lib.pye_sgx_digest(ctx, out) == lib.PYE_OK
                assert bytes(out) == want

    in_child(run).result()
