"""Several MRENCLAVEs side by side: each value is that of its stream alone, on every CPU class."""

from __future__ import annotations

import hashlib
import random
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import BusyError, EnclaveStateError

if TYPE_CHECKING:
    from collections.abc import Iterator

RW, RX = 0x203, 0x205
SIZE = 1 << 22
ALL = 0xFFFFFFFF
CLASSES = {
    "all": ALL,
    "avx512": ALL & ~lib.PYE_CPU_SHANI_FAST,
    "avx512-without-sha-ni": ALL & ~lib.PYE_CPU_SHANI,
    "fours": ALL & ~lib.PYE_CPU_AVX512,
    "pairs": ALL & ~lib.PYE_CPU_AVX512 & ~lib.PYE_CPU_SHANI_FAST,
    "pairs-without-avx": ALL & ~lib.PYE_CPU_AVX512 & ~lib.PYE_CPU_AVX & ~lib.PYE_CPU_AVX2,
    "avx2": ALL & ~lib.PYE_CPU_AVX512 & ~lib.PYE_CPU_SHANI,
    "portable": 0,
}
Runs = list[tuple[int, int, bytes | None]]


@pytest.fixture(params=list(CLASSES))
def cpu_class(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.cpu_set_mask(CLASSES[request.param])
    yield request.param
    _core.cpu_set_mask(ALL)


def by_hand(runs: Runs, size: int = SIZE) -> bytes:
    """The stream as Intel's SDM has it, record for record."""
    stream = bytearray(struct.pack("<8sIQ44x", b"ECREATE", 1, size))
    for offset, flags, content in runs:
        for page in range(0, 4096 if content is None else len(content), 4096):
            stream += struct.pack("<8sQQ40x", b"EADD", offset + page, flags)
            for chunk in range(page, page + 4096, 256) if content is not None else ():
                stream += struct.pack("<8sQ48x", b"EEXTEND", offset + chunk)
                stream += content[chunk : chunk + 256]
    return hashlib.sha256(stream).digest()


def digests(many: list[Runs]) -> list[bytes]:
    measurements = [_core.SgxMeasurement(SIZE) for _ in many]
    _core.sgx_add_many(list(zip(measurements, many, strict=True)))
    for one, runs in zip(measurements, many, strict=True):
        pages = sum(1 if content is None else len(content) // 4096 for _, _, content in runs)
        assert one.num_pages == pages
    return [one.digest() for one in measurements]


def content(pages: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(4096 * pages)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, 15])
@pytest.mark.parametrize(
    "wrong",
    [
        (1, RW, bytes(4096)),
        (SIZE, RW, bytes(4096)),
        (SIZE - 4096, RW, bytes(8192)),
        (0, 0x202, bytes(4096)),
        (SIZE, RW, None),
        (0, RW, bytes(100)),
    ],
)
def test_one_refused_run_leaves_every_measurement_as_it_was(
    at: int, wrong: tuple[int, int, bytes | None]
) -> None:
    measurements = [_core.SgxMeasurement(SIZE) for _ in range(16)]
    before = [one.digest() for one in measurements]
    jobs: list[tuple[Any, Runs]] = [(one, [(0, RW, bytes(4096))]) for one in measurements]
    jobs[at][1].append(wrong)
    with pytest.raises(ValueError, match=r"sgx_add_many|whole pages"):
        _core.sgx_add_many(jobs)
    assert [one.digest() for one in measurements] == before
    jobs[at][1].pop()
    _core.sgx_add_many(jobs)
    assert {one.digest() for one in measurements} == {by_hand([(0, RW, bytes(4096))])}


def test_a_measurement_that_occurs_twice_is_refused() -> None:
    one = _core.SgxMeasurement(SIZE)
    runs: Runs = [(0, RW, bytes(4096))]
    with pytest.raises(ValueError, match="twice"):
        _core.sgx_add_many([(one, runs), (_core.SgxMeasurement(SIZE), runs), (one, runs)])
    assert one.num_pages == 0


@pytest.mark.parametrize("state", ["fresh", "after a page", "a page without chunks"])
def test_the_c_interface_sees_a_measurement_that_occurs_twice(state: str) -> None:
    contexts = ffi.new("pye_sgx_measure[2]")
    for i in range(2):
        assert lib.pye_sgx_create(ffi.addressof(contexts, i), SIZE, 1) == lib.PYE_OK
        if state == "after a page":
            page = bytes(4096)
            rc = lib.pye_sgx_add_pages(ffi.addressof(contexts, i), page, 1, 0, RW, 1)
            assert rc == lib.PYE_OK
        elif state == "a page without chunks":
            assert lib.pye_sgx_add(ffi.addressof(contexts, i), 0, RW) == lib.PYE_OK
    before = bytes(ffi.buffer(contexts))
    jobs = ffi.new("pye_sgx_job[3]")
    for i, which in enumerate((0, 1, 0)):
        jobs[i].ctx = ffi.addressof(contexts, which)
    assert lib.pye_sgx_add_many(jobs, 3) == lib.PYE_E_ARGUMENT
    assert bytes(ffi.buffer(contexts)) == before
    assert lib.pye_sgx_add_many(jobs, 2) == lib.PYE_OK
    assert bytes(ffi.buffer(contexts)) == before
    jobs[1].num_runs = 1
    assert lib.pye_sgx_add_many(jobs, 2) == lib.PYE_E_ARGUMENT
    jobs[1].ctx = ffi.NULL
    assert lib.pye_sgx_add_many(jobs, 2) == lib.PYE_E_ARGUMENT
    assert lib.pye_sgx_add_many(ffi.NULL, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_sgx_add_many(ffi.NULL, 0) == lib.PYE_OK
    assert bytes(ffi.buffer(contexts)) == before


def test_a_page_half_measured_is_refused() -> None:
    half = _core.SgxMeasurement(SIZE)
    half.add(0, RW)
    half.extend(0, bytes(256))
    whole = _core.SgxMeasurement(SIZE)
    with pytest.raises(EnclaveStateError):
        _core.sgx_add_many([(whole, [(0, RW, bytes(4096))]), (half, [])])
    assert whole.num_pages == 0
    half.extend(256, bytes(256))


@pytest.mark.parametrize(
    "jobs",
    [
        [(1, [])],
        [(None, [])],
        [("text", [])],
        [5],
        None,
        [(lambda: 0, [(0, RW, b"")])],
    ],
)
def test_what_is_no_job_is_refused(jobs: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        _core.sgx_add_many(jobs)


@pytest.mark.parametrize("run", [(), (0, RW), (0, RW, b"", 1), (0, RW, "text"), ("0", RW, None)])
def test_what_is_no_run_is_refused_and_every_buffer_is_let_go(run: Any) -> None:
    held = bytearray(4096)
    one = _core.SgxMeasurement(SIZE)
    with pytest.raises((TypeError, ValueError)):
        _core.sgx_add_many([(one, [(0, RW, held), run])])
    held.append(1)  # a buffer that is still exported could not grow
    assert one.num_pages == 0


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_a_number_that_is_no_u64_is_refused(number: int) -> None:
    one = _core.SgxMeasurement(SIZE)
    for run in ((number, RW, None), (0, number, None)):
        with pytest.raises(OverflowError):
            _core.sgx_add_many([(one, [run])])


def test_measurements_in_use_elsewhere_are_refused_not_mixed_up() -> None:
    """Two threads on the same sixteen: each call does all of its work, or refuses."""
    measurements = [_core.SgxMeasurement(SIZE) for _ in range(16)]
    data = bytes(4096 * 64)
    jobs = [(one, [(0, RW, data)]) for one in measurements]
    done: list[int] = []

    def work() -> None:
        for _ in range(6):
            try:
                _core.sgx_add_many(jobs)
                done.append(1)
            except BusyError:
                pass

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.digest() for one in measurements} == {by_hand([(0, RW, data)] * len(done))}


def test_masking_selects_each_code() -> None:
    """Without this, the classes of this file might all be the same one."""
    names = {"avx512": "avx512", "avx512-without-sha-ni": "avx512", "pairs": "pairs"}
    names |= {"pairs-without-avx": "pairs", "avx2": "avx2", "portable": "none"}
    offered = _core.cpu_features()
    names |= {"all": "avx512", "fours": "sha-ni" if offered & lib.PYE_CPU_SHANI_FAST else "pairs"}
    wanted = lib.PYE_CPU_AVX512 | lib.PYE_CPU_AVX2 | lib.PYE_CPU_SHANI
    if offered & wanted != wanted:
        pytest.skip("this CPU lacks one of AVX-512, AVX2 and the SHA extensions")
    for cpu, name in names.items():
        _core.cpu_set_mask(CLASSES[cpu])
        try:
            assert _core.sgx_many_variant() == name
        finally:
            _core.cpu_set_mask(ALL)


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 33])
def test_enclaves_of_one_layout(cpu_class: str, count: int) -> None:
    many: list[Runs] = [[(0x1000, RX, content(3, i))] for i in range(count)]
    assert digests(many) == [by_hand(runs) for runs in many]


@pytest.mark.parametrize("count", [2, 9, 16, 21])
def test_enclaves_of_different_layouts(cpu_class: str, count: int) -> None:
    """Offsets, flags, lengths and pages that are not measured differ from lane to lane."""
    numbers = random.Random(count)
    many: list[Runs] = []
    for i in range(count):
        runs: Runs = []
        for _ in range(numbers.randrange(4)):
            offset = 4096 * numbers.randrange(500)
            flags = numbers.choice([RW, RX, 0x201])
            run = content(numbers.randrange(5), i) if numbers.random() < 0.7 else None
            runs.append((offset, flags, run))
        many.append(runs)
    assert digests(many) == [by_hand(runs) for runs in many]


@pytest.mark.parametrize("step", [0, 4096])
def test_offsets_beyond_four_gigabytes(cpu_class: str, step: int) -> None:
    size = 1 << 40
    measurements = [_core.SgxMeasurement(size) for _ in range(16)]
    many: list[Runs] = [
        [(0x12_3456_7000 + step * (i % 2), RW, content(1, i))] for i in range(len(measurements))
    ]
    _core.sgx_add_many(list(zip(measurements, many, strict=True)))
    assert [one.digest() for one in measurements] == [by_hand(runs, size) for runs in many]


def test_measurements_go_on_before_and_after(cpu_class: str) -> None:
    measurements = [_core.SgxMeasurement(SIZE) for _ in range(16)]
    runs: list[Runs] = [[] for _ in measurements]
    for step in range(3):
        for i, one in enumerate(measurements):
            data = content(1, 100 * step + i)
            one.add_pages(data, 0, RW)
            runs[i].append((0, RW, data))
        data = content(2, step)
        _core.sgx_add_many([(one, [(0x5000, RX, data)]) for one in measurements])
        for each in runs:
            each.append((0x5000, RX, data))
    assert [one.digest() for one in measurements] == [by_hand(each) for each in runs]


def test_content_may_lie_anywhere(cpu_class: str) -> None:
    noise = content(3, 1)
    many = [[(0, RW, noise[i * 7 : i * 7 + 4096])] for i in range(16)]
    measurements = [_core.SgxMeasurement(SIZE) for _ in many]
    _core.sgx_add_many(
        [
            (one, [(0, RW, memoryview(noise)[i * 7 : i * 7 + 4096])])
            for i, one in enumerate(measurements)
        ]
    )
    assert [one.digest() for one in measurements] == [by_hand(list(runs)) for runs in many]


def test_contexts_begun_for_different_code_go_together() -> None:
    """The code of a context is chosen when it begins; its value does not depend on that."""
    measurements = []
    for i in range(6):
        _core.cpu_set_mask(ALL if i % 2 else 0)
        measurements.append(_core.SgxMeasurement(SIZE))
    _core.cpu_set_mask(ALL)
    many: list[Runs] = [[(0, RW, content(1 + i % 3, i))] for i in range(6)]
    _core.sgx_add_many(list(zip(measurements, many, strict=True)))
    assert [one.digest() for one in measurements] == [by_hand(runs) for runs in many]


runs_of_one = st.lists(
    st.tuples(
        st.integers(0, 12).map(lambda page: 4096 * page),
        st.sampled_from([RW, RX]),
        st.one_of(st.none(), st.integers(0, 3)),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(layout=st.lists(runs_of_one, max_size=20), name=st.sampled_from(list(CLASSES)))
def test_any_layouts(layout: list[list[tuple[int, int, int | None]]], name: str) -> None:
    many: list[Runs] = [
        [(offset, flags, None if n is None else content(n, i)) for offset, flags, n in runs]
        for i, runs in enumerate(layout)
    ]
    _core.cpu_set_mask(CLASSES[name])
    try:
        assert digests(many) == [by_hand(runs) for runs in many]
    finally:
        _core.cpu_set_mask(ALL)
