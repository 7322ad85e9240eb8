"""Each allocation of Python's in a call into the core fails once: MemoryError, then as ever."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from pyenclave import _core

_testcapi = pytest.importorskip("_testcapi", reason="this Python has no _testcapi.set_nomemory")

KEY, IV, PAGE = bytes(16), bytes(12), bytes(4096)
MOST = 200  # allocations of one call


def page_key() -> object:
    key = _core.PageKey(KEY, enclave=bytes(16))
    sealed, opened = bytearray(4096 + 16), bytearray(4096)
    version = key.seal_page(PAGE, sealed)
    key.open_page(sealed, opened, version)
    return opened == PAGE


def secret_memory() -> object:
    memory = _core.SecretMemory(100)
    memory.close()
    return True


OPERATIONS: dict[str, Callable[[], object]] = {
    "gcm": lambda: _core.Gcm(KEY).open(IV, _core.Gcm(KEY).seal(IV, b"data", b"aad"), b"aad"),
    "secret memory": secret_memory,
    "hashes": lambda: [f(b"x") for f in (_core.sha256, _core.sha384, _core.sha512)],
    "hmac": lambda: _core.hmac_sha256(KEY, b"x"),
    "hkdf": lambda: _core.hkdf_sha256(KEY, b"", b"", 42),
    "cmac": lambda: _core.aes128_cmac(KEY, b"x"),
    "measurement": lambda: _core.SgxMeasurement(8192).digest(),
    "counters": lambda: _core.CallStats(4, 10) is not None,
    "page key": page_key,
    "batch": lambda: len(_core.snp_page_digests(PAGE * 3)),
}


@pytest.mark.no_asan  # allocators that fail are the sanitizer's own business
@pytest.mark.parametrize("name", OPERATIONS)
def test_without_memory_a_call_raises_and_the_next_one_works(in_child, name):
    operation = OPERATIONS[name]

    def run() -> list[int]:
        expected = operation()
        descriptors = len(os.listdir("/proc/self/fd"))
        failed = 0
        for at in range(MOST):
            error: BaseException | None = None
            found = None
            _testcapi.set_nomemory(at, at + 1)
            try:
                found = operation()
            except MemoryError as raised:
                error = raised
            finally:
                _testcapi.remove_mem_hooks()
            failed += error is not None
            assert error is not None or found == expected, f"allocation {at}: another answer"
            assert operation() == expected, f"allocation {at}: it does not work afterwards"
        return [failed, len(os.listdir("/proc/self/fd")) - descriptors]

    failed, descriptors = in_child(run).result()
    assert failed > 0
    assert descriptors == 0
