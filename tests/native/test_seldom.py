"""What no other test happens to run, found by coverage (docs/coverage.md)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import batch_model
import pytest
from borders import aligned, feature_masks, features, noise

from pyenclave import _core
from pyenclave._ffi import ffi, lib

KINDS = {"sha256": _core.Sha256, "sha384": _core.Sha384}


def test_every_cpu_feature_has_a_name_of_its_own() -> None:
    bits = [getattr(lib, name) for name in dir(lib) if name.startswith("PYE_CPU_")]
    names = [lib.pye_cpu_feature_name(bit) for bit in bits]
    assert len(bits) >= 15
    assert ffi.NULL not in names
    assert len({ffi.string(name) for name in names}) == len(bits)
    for unknown in (0, 3, 1 << 31):
        assert lib.pye_cpu_feature_name(unknown) == ffi.NULL


def test_both_modules_choose_the_same_implementations() -> None:
    for mask in feature_masks().values():
        _core.cpu_set_mask(mask)
        try:
            with features(mask):
                assert ffi.string(lib.pye_sha256_variant()).decode() == _core.sha256_variant()
                assert ffi.string(lib.pye_snp_variant()).decode() in ("portable", "avx2", "avx512")
        finally:
            _core.cpu_set_mask(0xFFFFFFFF)


@pytest.mark.parametrize("name", KINDS)
def test_any_two_cuts_of_a_message_give_its_digest(name: str) -> None:
    """Cuts before, at and behind the ends of blocks, for a block of 64 and one of 128 bytes."""
    message = noise(300)
    near = [0, 1, 55, 56, 63, 64, 65, 111, 112, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300]
    want = hashlib.new(name, message).digest()
    for first in near:
        for second in near:
            if first <= second:
                digest = KINDS[name](message[:first])
                digest.update(message[first:second])
                digest.update(message[second:])
                assert digest.digest() == want, (first, second)


@pytest.mark.parametrize("mask", feature_masks().values(), ids=list(feature_masks()))
def test_registers_are_cleared_in_the_way_that_this_cpu_has(mask: int) -> None:
    """What clears looks at the CPU at each call, not when the key was made."""
    key = aligned(lib.pye_gcm_key_size(), "pye_gcm_key *")
    out, tag = ffi.new("uint8_t[100]"), ffi.new("uint8_t[16]")
    assert lib.pye_gcm_init(key, bytes(32), 32, lib.PYE_GCM_PORTABLE) == lib.PYE_OK
    with features(mask):
        status = lib.pye_gcm_seal(key, out, tag, bytes(12), bytes(100), 100, ffi.NULL, 0)
    assert status == lib.PYE_OK
    assert _core.Gcm(bytes(32)).seal(bytes(12), bytes(100)) == bytes(out) + bytes(tag)


def page_key() -> Any:
    key = aligned(lib.pye_page_key_size(), "pye_page_key *")
    assert lib.pye_page_key_init(key, bytes(32), 32, bytes(16), lib.PYE_GCM_ANY) == lib.PYE_OK
    return key


def tables(key: Any) -> bytes:
    return bytes(ffi.buffer(ffi.cast("uint8_t *", key) + 64, lib.pye_page_key_size() - 64))


def test_a_page_key_is_destroyed_once_and_nothing_is_no_key() -> None:
    lib.pye_page_key_destroy(ffi.NULL)
    empty = aligned(lib.pye_page_key_size(), "pye_page_key *")
    lib.pye_page_key_destroy(empty)
    key = page_key()
    assert any(tables(key))
    lib.pye_page_key_destroy(key)
    lib.pye_page_key_destroy(key)
    assert not any(tables(key))


def test_the_last_call_out_of_a_destroyed_key_wipes_it() -> None:
    """Destroyed while a batch is under way: the batch is whole, and then the tables are gone."""
    count = 2048
    pages, tags = ffi.new("uint8_t[]", 4096 * count), ffi.new("uint8_t[]", 16 * count)
    info = ffi.new("pye_page_info *", {"address": 0, "flags": 0, "type": 2})
    for _ in range(500):
        key, version, statuses = page_key(), ffi.new("uint64_t *"), []

        def seal(key: Any = key, version: Any = version, statuses: Any = statuses) -> None:
            statuses.append(lib.pye_pages_seal(key, pages, tags, version, pages, count, info))

        thread = threading.Thread(target=seal)
        thread.start()
        while lib.pye_page_key_idle(key) and thread.is_alive():
            pass
        lib.pye_page_key_destroy(key)
        under_way = not lib.pye_page_key_idle(key)
        thread.join()
        assert not any(tables(key))
        if under_way:
            assert statuses == [lib.PYE_OK]
            return
    pytest.fail("no batch was under way when its key was destroyed")


def test_a_forked_child_gives_up_secret_memory_that_it_does_not_have(in_child: Any) -> None:
    """In the child the range is a hole between two of its own pages: those are unmapped."""
    memory, kind = ffi.new("void **"), ffi.new("uint32_t *")
    assert lib.pye_secmem_new(memory, 10000, kind) == lib.PYE_OK

    def free() -> tuple[int, int]:
        live = lib.pye_secmem_live(memory[0])
        lib.pye_secmem_free(memory[0], 10000)
        return live, 1

    assert in_child(free).result() == [0, 1]
    assert lib.pye_secmem_live(memory[0]) == 1
    lib.pye_secmem_free(memory[0], 10000)
    lib.pye_secmem_free(ffi.NULL, 1)


def test_a_status_that_there_is_not_and_a_key_that_was_not_made_have_names() -> None:
    assert ffi.string(lib.pye_status_name(12345)) == b"PYE_E_UNKNOWN"
    assert ffi.string(lib.pye_status_message(-12345)) == b"unknown status"
    assert ffi.string(lib.pye_gcm_implementation(ffi.NULL)) == b"none"


def test_an_enclave_that_was_not_created_takes_nothing() -> None:
    measure, content = ffi.new("pye_sgx_measure *"), ffi.new("uint8_t[4096]")
    digest = ffi.new("uint8_t[32]", b"x" * 32)
    flags = lib.PYE_SGX_REG | lib.PYE_SGX_R
    assert lib.pye_sgx_add(measure, 0, flags) == lib.PYE_E_STATE
    assert lib.pye_sgx_add_pages(measure, content, 1, 0, flags, 1) == lib.PYE_E_STATE
    assert lib.pye_sgx_add_filled(measure, 7, 1, 0, flags) == lib.PYE_E_STATE
    assert lib.pye_sgx_extend(measure, 0, content) == lib.PYE_E_STATE
    assert lib.pye_sgx_digest(measure, digest) == lib.PYE_E_STATE
    assert bytes(digest) == bytes(32)


def test_no_pages_at_all_leave_a_measurement_as_it_was() -> None:
    measure, before = ffi.new("pye_sgx_measure *"), ffi.new("pye_sgx_measure *")
    flags = lib.PYE_SGX_REG | lib.PYE_SGX_R
    assert lib.pye_sgx_create(measure, 1 << 16, 1) == lib.PYE_OK
    before[0] = measure[0]
    assert lib.pye_sgx_add_filled(measure, 7, 0, 0, flags) == lib.PYE_OK
    assert bytes(ffi.buffer(measure)) == bytes(ffi.buffer(before))


def opened(data: bytes) -> tuple[Any, Any]:
    """Return a batch, and the memory that it points into."""
    batch, memory = ffi.new("pye_batch *"), ffi.new("uint8_t[]", data)
    assert lib.pye_batch_open(batch, memory, len(data), 64, 0) == lib.PYE_OK
    return batch, memory


def test_gathering_what_is_empty_or_taken_already() -> None:
    out = ffi.new("uint8_t[64]", b"x" * 64)
    empty, _keep = opened(batch_model.write([(0, b"")] * 3, 64))
    assert lib.pye_batch_gather(empty, out, 0, 0) == lib.PYE_OK
    assert bytes(out) == b"x" * 64
    # Nothing is left, so that nothing is asked for, of whatever size.
    assert lib.pye_batch_gather(empty, out, 0, 5) == lib.PYE_OK
    assert lib.pye_batch_gather(empty, out, 64, 64) == lib.PYE_E_LENGTH
    assert bytes(out) == bytes(64)
    two, _keep = opened(batch_model.write([(0, b"a" * 8), (0, b"b" * 8)], 64))
    assert lib.pye_batch_gather(two, out, 17, 8) == lib.PYE_E_LENGTH  # 17 is no two times 8
    assert lib.pye_batch_gather(two, out, 16, 1 << 63) == lib.PYE_E_LENGTH


@pytest.mark.parametrize(
    "data",
    [b"\xd6", b"\xd7", b"\xc7", b"\xc7\x0c", b"\xd7\x01" + bytes(8), b"\xd7\xff" + bytes(7),
     b"\xc7\x0d\xff" + bytes(12), b"\xc7\x0c\x01" + bytes(12), b"\xc7\x0c\xff" + bytes(11),
     b"\x92\xd9\x08x"],
)  # fmt: skip
def test_what_is_cut_or_no_time_is_no_messagepack(data: bytes) -> None:
    assert not _core.msgpack_check(data)


def test_each_form_of_a_time_is_messagepack() -> None:
    for head in (b"\xd6\xff" + bytes(4), b"\xd7\xff" + bytes(8), b"\xc7\x0c\xff" + bytes(12)):
        assert _core.msgpack_check(head)


def test_an_empty_memory_file_is_refused(make_memfd: Any) -> None:
    size = ffi.new("uint64_t *")
    sealed = lib.PYE_SEAL_SHRINK
    assert lib.pye_fd_check_memfd(make_memfd(0), 0, sealed, size) == lib.PYE_E_LENGTH
    assert lib.pye_fd_check_memfd(make_memfd(100), 99, sealed, size) == lib.PYE_E_LENGTH
    assert lib.pye_fd_check_memfd(make_memfd(100), 0, sealed, size) == lib.PYE_OK
    assert size[0] == 100


@pytest.fixture
def make_memfd() -> Iterator[Any]:
    made = []

    def make(size: int) -> int:
        fd = os.memfd_create("seldom", os.MFD_ALLOW_SEALING)
        made.append(fd)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return fd

    yield make
    for fd in made:
        os.close(fd)
