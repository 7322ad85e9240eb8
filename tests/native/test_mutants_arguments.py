"""What the core's own argument checks refuse when nothing above them has looked first.

Python's layers check before the core does, so these checks are reached only from C. Each of them
was one that no test noticed when it was switched off (docs/proofs.md).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyenclave._ffi import ffi, lib

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@contextmanager
def at_the_edge(data: bytes) -> Iterator[Any]:
    """Give *data* at the end of a page after which nothing can be read."""
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * size)
    pin = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(pin)
    assert libc.mprotect(ctypes.c_void_p(address + size), size, 0) == 0
    memory[size - len(data) : size] = data
    try:
        yield ffi.cast("uint8_t *", address + size - len(data))
    finally:
        assert libc.mprotect(ctypes.c_void_p(address + size), size, 3) == 0
        del pin
        memory.close()


def aligned(size: int, align: int = 64) -> tuple[Any, Any]:
    """Return memory of *size* bytes at *align*, and what keeps it."""
    whole = ffi.new("uint8_t[]", size + align)
    return whole + (-int(ffi.cast("uintptr_t", whole)) % align), whole


# ---- AES-GCM and pages ----


def test_a_key_of_nothing_or_in_nothing_is_refused():
    key, _keep = aligned(lib.pye_gcm_key_size())
    secret = ffi.new("uint8_t[32]")
    to = ffi.cast("pye_gcm_key *", key)
    assert lib.pye_gcm_init(ffi.NULL, secret, 16, 0xFFFF) == lib.PYE_E_ARGUMENT
    assert lib.pye_gcm_init(to, ffi.NULL, 16, 0xFFFF) == lib.PYE_E_ARGUMENT


@pytest.fixture
def key():
    memory, keep = aligned(lib.pye_page_key_size())
    made = ffi.cast("pye_page_key *", memory)
    secret, enclave = ffi.new("uint8_t[16]"), ffi.new("uint8_t[16]")
    assert lib.pye_page_key_init(made, secret, 16, enclave, 0xFFFF) == lib.PYE_OK
    yield made
    lib.pye_page_key_destroy(made)
    del keep


def test_a_page_key_of_nothing_or_in_the_wrong_place_is_refused():
    memory, _keep = aligned(lib.pye_page_key_size() + 64)
    to = ffi.cast("pye_page_key *", memory)
    secret, enclave = ffi.new("uint8_t[16]"), ffi.new("uint8_t[16]")
    init = lib.pye_page_key_init
    assert init(ffi.NULL, secret, 16, enclave, 0xFFFF) == lib.PYE_E_ARGUMENT
    assert init(to, secret, 16, ffi.NULL, 0xFFFF) == lib.PYE_E_ARGUMENT
    assert init(to, ffi.NULL, 16, enclave, 0xFFFF) == lib.PYE_E_ARGUMENT
    beside = ffi.cast("pye_page_key *", memory + 8)
    assert init(beside, secret, 16, enclave, 0xFFFF) == lib.PYE_E_ALIGNMENT
    for length, allowed, status in ((17, 0xFFFF, lib.PYE_E_LENGTH), (16, 0, lib.PYE_E_UNSUPPORTED)):
        assert init(to, secret, length, enclave, allowed) == status
        assert lib.pye_page_key_sealed(to) == 0
        assert lib.pye_page_key_skip(to, 5) == lib.PYE_E_STATE  # it is no key


def test_sealing_and_opening_without_an_argument_is_refused(key):
    out, tag = ffi.new("uint8_t[4096]"), ffi.new("uint8_t[16]")
    data, info = ffi.new("uint8_t[4096]"), ffi.new("pye_page_info *")
    version = ffi.new("uint64_t *")
    null = ffi.NULL
    seal, open_ = lib.pye_page_seal, lib.pye_page_open
    for arguments in (
        (null, out, tag, version, data, info),
        (key, null, tag, version, data, info),
        (key, out, null, version, data, info),
        (key, out, tag, null, data, info),
        (key, out, tag, version, null, info),
        (key, out, tag, version, data, null),
    ):
        assert seal(*arguments) == lib.PYE_E_ARGUMENT
    for arguments in (
        (null, out, data, tag, 1, info),
        (key, null, data, tag, 1, info),
        (key, out, null, tag, 1, info),
        (key, out, data, null, 1, info),
        (key, out, data, tag, 1, null),
    ):
        assert open_(*arguments) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_key_sealed(key) == 0


def test_batches_without_an_argument_are_refused(key):
    out, tags = ffi.new("uint8_t[8192]"), ffi.new("uint8_t[32]")
    data, info = ffi.new("uint8_t[8192]"), ffi.new("pye_page_info *")
    first = ffi.new("uint64_t *")
    null = ffi.NULL
    seal, open_ = lib.pye_pages_seal, lib.pye_pages_open
    for arguments in (
        (null, out, tags, first, data, 2, info),
        (key, null, tags, first, data, 2, info),
        (key, out, null, first, data, 2, info),
        (key, out, tags, null, data, 2, info),
        (key, out, tags, first, null, 2, info),
        (key, out, tags, first, data, 2, null),
    ):
        assert seal(*arguments) == lib.PYE_E_ARGUMENT
    for count in (0, 2**52, 2**64 - 1):
        assert seal(key, out, tags, first, data, count, info) == lib.PYE_E_LENGTH
    assert open_(null, out, data, tags, null, 1, 2, info) == lib.PYE_E_ARGUMENT
    assert open_(key, out, data, null, null, 1, 2, info) == lib.PYE_E_ARGUMENT
    assert open_(key, out, data, tags, null, 1, 0, info) == lib.PYE_E_LENGTH
    assert lib.pye_page_jobs_seal(null, null, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_jobs_seal(key, null, 1) == lib.PYE_E_ARGUMENT
    jobs = ffi.new("pye_page_job[1]", [{"in": data, "out": out, "tag": tags}])
    assert lib.pye_page_jobs_seal(null, jobs, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_jobs_open(null, jobs, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_jobs_open(key, null, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_jobs_seal(key, jobs, 0) == lib.PYE_E_LENGTH
    jobs[0].tag = null
    assert lib.pye_page_jobs_open(key, jobs, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_page_key_sealed(key) == 0


def every_use(key) -> set[int]:
    """Use *key* in every way; return the statuses."""
    out, tags = ffi.new("uint8_t[8192]"), ffi.new("uint8_t[32]")
    data, info = ffi.new("uint8_t[8192]"), ffi.new("pye_page_info *")
    version = ffi.new("uint64_t *")
    jobs = ffi.new("pye_page_job[1]", [{"in": data, "out": out, "tag": tags}])
    return {
        lib.pye_page_seal(key, out, tags, version, data, info),
        lib.pye_page_open(key, out, data, tags, 1, info),
        lib.pye_pages_seal(key, out, tags, version, data, 2, info),
        lib.pye_pages_open(key, out, data, tags, ffi.NULL, 1, 2, info),
        lib.pye_page_jobs_seal(key, jobs, 1),
        lib.pye_page_jobs_open(key, jobs, 1),
    }


def test_a_closed_key_is_closed_for_every_use(key):
    lib.pye_page_key_destroy(key)
    assert every_use(key) == {lib.PYE_E_CLOSED}


def test_zeroed_memory_is_no_key():
    memory, _keep = aligned(lib.pye_page_key_size())
    assert every_use(ffi.cast("pye_page_key *", memory)) == {lib.PYE_E_STATE}


def test_more_users_than_can_be_counted_are_refused(key):
    word = ffi.cast("uint64_t *", key)  # the next version, the calls under way, the end
    before = word[0]
    word[0] = before | ((2**25 - 1) << 38)
    assert every_use(key) == {lib.PYE_E_BUSY}
    word[0] = before


# ---- hashes, signatures, measurements ----


def test_hkdf_gives_neither_nothing_nor_more_than_its_counter_can():
    prk, out = ffi.new("uint8_t[32]"), ffi.new("uint8_t[8192]", b"\xa5" * 8192)
    expand = lib.pye_hkdf_sha256_expand
    assert expand(out, 0, prk, 32, ffi.NULL, 0) == lib.PYE_E_LENGTH
    assert expand(out, 255 * 32 + 1, prk, 32, ffi.NULL, 0) == lib.PYE_E_LENGTH
    assert bytes(out[0 : 255 * 32 + 1]) == bytes(255 * 32 + 1)  # zeroed on failure
    assert expand(out, 255 * 32, prk, 32, ffi.NULL, 0) == lib.PYE_OK


def test_without_its_instructions_the_wide_verification_refuses():
    verdict = ffi.new("uint8_t *")
    claim = ffi.new("pye_p256_claim *")
    lib.pye_cpu_set_mask(0)
    try:
        assert lib.pye_p256_table_new(ffi.NULL) == ffi.NULL
        assert lib.pye_p256_verify(verdict, ffi.NULL, claim, 1) == lib.PYE_E_UNSUPPORTED
        assert lib.pye_p256_self_test(ffi.NULL) == lib.PYE_E_UNSUPPORTED
    finally:
        lib.pye_cpu_set_mask(0xFFFFFFFF)
    assert verdict[0] == lib.PYE_P256_DOUBT


P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)


def added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    if a == b:
        slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, P) % P
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P) % P
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def times(k: int, point: tuple[int, int]) -> tuple[int, int]:
    found = point
    for bit in bin(k)[3:]:
        found = added(found, found)
        if bit == "1":
            found = added(found, point)
    return found


def test_a_coordinate_that_is_not_below_the_prime_is_not_reduced():
    """The point is on the curve once it is reduced, and the signature is good for it."""
    generator = lib.pye_p256_table_new(ffi.NULL)
    if generator == ffi.NULL:
        pytest.skip("this CPU lacks AVX-512 IFMA")
    generator = ffi.gc(generator, lib.pye_p256_table_free)
    x = 1
    while pow(x**3 - 3 * x + B, (P - 1) // 2, P) != 1:
        x += 1
    q = (x, pow(x**3 - 3 * x + B, (P + 1) // 4, P))
    u1, u2 = 12345, 67891
    r = added(times(u1, G), times(u2, q))[0] % N
    s, e = r * pow(u2, -1, N) % N, u1 * r * pow(u2, -1, N) % N
    signature = ffi.new("uint8_t[64]", r.to_bytes(32) + s.to_bytes(32))
    digest = ffi.new("uint8_t[32]", e.to_bytes(32))
    verdict = ffi.new("uint8_t *")

    def judged(x: int, y: int) -> int:
        key = ffi.new("uint8_t[64]", x.to_bytes(32) + y.to_bytes(32))
        claim = ffi.new("pye_p256_claim *", {"key": key, "signature": signature, "digest": digest})
        assert lib.pye_p256_verify(verdict, generator, claim, 1) == lib.PYE_OK
        return int(verdict[0])

    assert judged(*q) == lib.PYE_P256_VALID
    assert judged(q[0] + P, q[1]) == lib.PYE_P256_DOUBT
    beyond = ffi.new("uint8_t[64]", (q[0] + P).to_bytes(32) + q[1].to_bytes(32))
    assert lib.pye_p256_table_new(beyond) == ffi.NULL


def test_a_chunk_after_no_page_is_refused_even_where_no_chunk_is():
    measure = ffi.new("pye_sgx_measure *")
    chunk = ffi.new("uint8_t[256]")
    assert lib.pye_sgx_extend(measure, 0, chunk) == lib.PYE_E_STATE
    assert lib.pye_sgx_create(measure, 8192, 1) == lib.PYE_OK
    for offset in (0, 2**64 - 1):  # the latter stands for none
        assert lib.pye_sgx_extend(measure, offset, chunk) == lib.PYE_E_STATE


BEYOND = 2**52


def measure(kind: str) -> tuple[Any, Any]:
    """Return a measurement of *kind*, and the memory that it is in (cffi cannot make one)."""
    memory = ffi.new("uint8_t[512]")
    return ffi.cast(f"{kind} *", memory), memory


@pytest.mark.parametrize(
    ("count", "gpa", "status"),
    [
        (1, 1, lib.PYE_E_ALIGNMENT),
        (1, 4095, lib.PYE_E_ALIGNMENT),
        (1, BEYOND, lib.PYE_E_ARGUMENT),
        (1, 2**64 - PAGE, lib.PYE_E_ARGUMENT),
        (2, BEYOND - PAGE, lib.PYE_E_ARGUMENT),
        (2**64 - 1, 0, lib.PYE_E_ARGUMENT),
    ],
)
def test_a_place_outside_a_guest_s_memory_is_not_measured(count, gpa, status):
    pages = ffi.new("uint8_t[8192]")
    (snp, snp_memory), (tdx, tdx_memory) = measure("pye_snp_measure"), measure("pye_tdx_measure")
    lib.pye_snp_begin(snp, ffi.NULL)
    lib.pye_tdx_begin(tdx)
    before = bytes(snp_memory), bytes(tdx_memory)
    assert lib.pye_snp_add_pages(snp, pages, count, gpa, lib.PYE_SNP_NORMAL) == status
    assert lib.pye_snp_add_empty(snp, count, gpa, lib.PYE_SNP_ZERO) == status
    if count == 1:
        assert lib.pye_snp_add_same(snp, pages, 3, gpa, lib.PYE_SNP_VMSA) == status
    assert lib.pye_tdx_add_pages(tdx, count, gpa) == status
    assert lib.pye_tdx_extend(tdx, pages, count, gpa, 1) == status
    assert (bytes(snp_memory), bytes(tdx_memory)) == before


def test_a_kind_of_page_that_does_not_fit_is_not_measured():
    pages = ffi.new("uint8_t[4096]")
    snp, memory = measure("pye_snp_measure")
    lib.pye_snp_begin(snp, ffi.NULL)
    before = bytes(memory)
    for kind in (0, 3, 7, 2**32 - 1):
        assert lib.pye_snp_add_pages(snp, pages, 1, 0, kind) == lib.PYE_E_ARGUMENT
        assert lib.pye_snp_add_same(snp, pages, 1, 0, kind) == lib.PYE_E_ARGUMENT
    for kind in (0, 1, 2, 7):
        assert lib.pye_snp_add_empty(snp, 1, 0, kind) == lib.PYE_E_ARGUMENT
    assert bytes(memory) == before


# ---- what crosses ----


@LINUX
def test_SER_02_nothing_after_the_end_is_read():
    cut = [b"", b"\xa4abc", b"\xc4", b"\xc5\x01", b"\xda\x00", b"\xcf\x00", b"\x92\x01", b"\x81"]
    cut += [
        b"\xde",
        b"\xdf",
        b"\x92\xa4ab",
        b"\x92\xc4\xff",
        b"\xc4\x05abcd",
        b"\xdd\x00\x00",
        b"\xde\x00",
        b"\xc7\x0c",
        b"\xd6\xff\x00",
    ]
    for data in cut:
        with at_the_edge(data) as at:
            assert lib.pye_msgpack_check(at, len(data), 10) == lib.PYE_E_ARGUMENT


def test_SER_02_more_items_than_bytes_are_a_wrong_message_not_a_long_one():
    for data in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        assert lib.pye_msgpack_check(data, len(data), 10) == lib.PYE_E_ARGUMENT


def test_SER_02_a_depth_that_the_stack_cannot_hold_is_refused():
    for depth in (0, 65, 2**32 - 1):
        assert lib.pye_msgpack_check(b"\xc0", 1, depth) == lib.PYE_E_ARGUMENT
    assert lib.pye_msgpack_check(b"\xc0", 1, 64) == lib.PYE_OK


@LINUX
def test_BND_02_a_batch_is_not_read_beyond_its_end():
    whole = ffi.new("uint8_t[]", 64 + 64)
    lib.pye_batch_head(whole, lib.PYE_BATCH_EVEN, 1, 0, 0)
    head = bytes(whole[0:64])
    batch = ffi.new("pye_batch *")
    for size in (0, 1, 20, 63):
        with at_the_edge(head[:size]) as at:
            assert lib.pye_batch_open(batch, at, size, 64, 0) == lib.PYE_E_ARGUMENT
    # One item of a table whose padding should follow, but the message ends.
    lib.pye_batch_head(whole, lib.PYE_BATCH_TABLE, 1, 0, 0)
    lib.pye_batch_set(whole, 0, lib.PYE_BATCH_ITEM, 5)
    data = bytes(whole[0:128]) + b"12345"
    with at_the_edge(data) as at:
        assert lib.pye_batch_open(batch, at, len(data), 64, 0) == lib.PYE_E_ARGUMENT


def test_BND_06_what_a_native_function_leaves_after_a_failure_is_wiped():
    out, length = ffi.new("uint8_t[16]"), ffi.new("size_t *")

    @ffi.callback("int32_t(uint8_t *, size_t, uint8_t *, size_t *)")
    def fails(_data, size, to, _to_len):
        to[0] = 7
        return 9 if size else 0

    @ffi.callback("int32_t(uint8_t *, size_t, uint8_t *, size_t *)")
    def boasts(_data, _size, to, to_len):
        to[0] = 7
        to_len[0] = 17
        return 0

    assert lib.pye_native_call(ffi.cast("void *", fails), out, 16, length, b"x", 1) == 9
    assert (bytes(out[0:16]), length[0]) == (bytes(16), 0)
    status = lib.pye_native_call(ffi.cast("void *", boasts), out, 16, length, b"x", 1)
    assert status == lib.PYE_E_LENGTH
    assert (bytes(out[0:16]), length[0]) == (bytes(16), 0)
    assert lib.pye_native_call(ffi.cast("void *", fails), out, 16, length, b"", 0) == 0
    assert length[0] == 16


@LINUX
def test_a_signal_that_does_not_exist_is_no_parent_s_death():
    for signal in (-1, 65, 2**31 - 1):
        assert lib.pye_harden_parent_death(signal, -1) == lib.PYE_E_ARGUMENT


@LINUX
def test_flags_that_do_not_exist_close_nothing(in_child):
    def run() -> list[int]:
        sandbox = ffi.new("pye_sandbox *")
        sandbox.step = 1
        return [lib.pye_sandbox_after(sandbox, 1 << 7), sandbox.step, sandbox.proved]

    assert in_child(run).result() == [lib.PYE_E_ARGUMENT, 1, 0]
