"""Measuring at four levels: an SGX enclave, and the firmware of a SEV-SNP guest."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from levels import Loops, Operation, Run, aligned, cases, check, hold, measure

from pyenclave._core import SgxMeasurement, SnpMeasurement
from pyenclave._ffi import ffi, lib
from pyenclave.benchmarks.launch_digest import _firmware
from pyenclave.benchmarks.measuring import _prebuilt_stream
from pyenclave.measurement import _launch, sev
from pyenclave.measurement.sgx import measure_pages

PAGES = 64
SIZE = 1 << 20
FLAGS = 0x203  # REG, R, W
CONTENT = bytes(range(256)) * (16 * PAGES)


def mrenclave(loops: Loops) -> dict[str, Run]:
    """MRENCLAVE of 64 measured pages: created, added, finished."""
    keep: list[Any] = []
    pages, out = aligned(len(CONTENT), keep), aligned(32, keep)
    ffi.memmove(pages, CONTENT, len(CONTENT))
    context = ffi.new("pye_sgx_measure *")
    functions = ("pye_sgx_create", "pye_sgx_add_pages", "pye_sgx_digest")

    def native(count: int) -> bytes:
        loops("mrenclave", *functions, context, out, pages, PAGES, FLAGS, SIZE, count)
        return bytes(ffi.buffer(out, 32))

    def by_cffi(count: int) -> bytes:
        for _ in range(count):
            check(lib.pye_sgx_create(context, SIZE, 1))
            check(lib.pye_sgx_add_pages(context, pages, PAGES, 0, FLAGS, 1))
            check(lib.pye_sgx_digest(context, out))
        return bytes(ffi.buffer(out, 32))

    def cython(count: int) -> bytes:
        value = b""
        for _ in range(count):
            context = SgxMeasurement(SIZE)
            context.add_pages(CONTENT, 0, FLAGS)
            value = context.digest()
        return value

    def public(count: int) -> bytes:
        value = b""
        for _ in range(count):
            value = measure_pages([(0, FLAGS, CONTENT)], size=SIZE)
        return value

    wanted = hashlib.sha256(_prebuilt_stream(CONTENT, SIZE)).digest()
    hold(keep, native, by_cffi)
    runs = {"native": native, "cffi": by_cffi, "cython": cython, "public": public}
    assert {name: run(1) for name, run in runs.items()} == dict.fromkeys(runs, wanted)
    return runs


def snp(loops: Loops) -> dict[str, Run]:
    """SEV-SNP's digest over the pages of a firmware of 2 MiB."""
    keep: list[Any] = []
    firmware = _firmware()
    gpa, num_pages = (1 << 32) - len(firmware), len(firmware) // 4096
    pages = aligned(len(firmware), keep)
    ffi.memmove(pages, firmware, len(firmware))
    context = ffi.new("pye_snp_measure *")

    def native(count: int) -> bytes:
        functions = ("pye_snp_begin", "pye_snp_add_pages")
        loops("snp", *functions, context, pages, num_pages, gpa, lib.PYE_SNP_NORMAL, count)
        return bytes(ffi.buffer(context.digest))

    def by_cffi(count: int) -> bytes:
        for _ in range(count):
            lib.pye_snp_begin(context, ffi.NULL)
            check(lib.pye_snp_add_pages(context, pages, num_pages, gpa, lib.PYE_SNP_NORMAL))
        return bytes(ffi.buffer(context.digest))

    def cython(count: int) -> bytes:
        value = b""
        for _ in range(count):
            context = SnpMeasurement()
            context.add_pages(firmware, gpa)
            value = context.digest()
        return value

    def public(count: int) -> bytes:
        value = b""
        for _ in range(count):
            value = sev.ovmf_hash(firmware)
        return value

    chain = _launch.PurePythonSnp()
    chain.add_pages(firmware, gpa)
    wanted = chain.digest()
    hold(keep, native, by_cffi)
    runs = {"native": native, "cffi": by_cffi, "cython": cython, "public": public}
    assert {name: run(1) for name, run in runs.items()} == dict.fromkeys(runs, wanted)
    return runs


@pytest.mark.parametrize(
    ("operation", "level"),
    cases(Operation("mrenclave_64", 5, mrenclave), Operation("snp_firmware", 1, snp)),
)
def test_measuring(benchmark: Any, loops: Loops, operation: Operation, level: str) -> None:
    """Time measuring."""
    measure(benchmark, loops, operation, level)
