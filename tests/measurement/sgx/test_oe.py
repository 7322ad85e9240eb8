"""Enclaves of Open Enclave: hostile files first, then synthetic ones against a slow reference."""

from __future__ import annotations

import random
import struct
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyenclave.errors import MeasurementError
from pyenclave.measurement import enclave, oe
from pyenclave.measurement.sgx_file import measure_sgx

R, RW, RX = 4, 6, 5
SYMBOLS = {
    "_enclave_rva": 0x100,
    "_reloc_rva": 0x3000,
    "_reloc_size": 0x3008,
    "_td_from_tcs_offset": 0x3FFC,  # over the end of a page of zeros
    "_tdata_rva": 0x2000,
    "_tdata_size": 0x2008,
    "_tdata_align": 0x2010,
    "_tbss_size": 0x2018,
    "_tbss_align": 0x2020,
    "unrelated": 0x30,
}


def small(make: SimpleNamespace, **changes: Any) -> Any:
    """A usual enclave: .oeinfo in the first segment, symbols in content and in zeros."""
    arguments: dict[str, Any] = {
        "segments": [
            make.Seg(0, random.Random(1).randbytes(5000), 5000, RX),
            make.Seg(0x2000, random.Random(2).randbytes(300), 0x3000, RW),
        ],
        "info_at": 0x400,
        "symbols": dict(SYMBOLS),
        "rela_dyn": [(0x2100, 8, 0x55), (0x2108, 3 << 32 | 18, 9), (0x2110, 1 << 32 | 6, 0)],
        "rela_plt": [(0x2118, 2 << 32 | 7, -5)],
    }
    return make.Oe(**(arguments | changes))


def check(make: SimpleNamespace, own: Any) -> enclave.Layout:
    layout = oe.layout(make.oe_file(own))
    wanted, size = make.oe_mrenclave(own)
    assert layout.size == size
    assert enclave.measure(layout) == wanted
    return layout


# ---- hostile files -------------------------------------------------------------------------------


def test_every_cut_off_file_is_refused(make: SimpleNamespace) -> None:
    data = make.oe_file(small(make))
    for length in (
        *range(300),
        *range(300, len(data) - 900, 37),
        *range(len(data) - 900, len(data)),
    ):
        with pytest.raises(MeasurementError):
            measure_sgx(data[:length])


@pytest.mark.parametrize("field", ["heap", "stack", "threads"])
@pytest.mark.parametrize("number", [1 << 32, 1 << 44, (1 << 64) - 1])
def test_huge_counts_are_refused_before_any_work(
    make: SimpleNamespace, field: str, number: int
) -> None:
    data = make.oe_file(small(make, **{field: number}))
    start = time.process_time()
    with pytest.raises(MeasurementError):
        measure_sgx(data)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("memsz", [1 << 40, 1 << 57, (1 << 64) - 1])
def test_a_huge_segment_is_refused_before_any_work(make: SimpleNamespace, memsz: int) -> None:
    own = small(make, symbols={})
    own.segments[1].memsz = memsz
    start = time.process_time()
    with pytest.raises(MeasurementError):
        measure_sgx(make.oe_file(own))
    assert time.process_time() - start < 1


@pytest.mark.parametrize("vaddr", [0, 0x1000, 0x1387])
def test_overlapping_segments_are_refused(make: SimpleNamespace, vaddr: int) -> None:
    own = small(make, symbols={}, rela_dyn=[])
    own.segments[1].vaddr = vaddr
    with pytest.raises(MeasurementError, match="overlaps"):
        measure_sgx(make.oe_file(own))


def test_an_image_that_does_not_begin_at_zero_is_refused(make: SimpleNamespace) -> None:
    own = small(make, symbols={}, info_at=0x2000)
    own.segments = [make.Seg(0x2000, bytes(3000), 3000, RX)]
    with pytest.raises(MeasurementError, match="address 0"):
        measure_sgx(make.oe_file(own))


def test_properties_of_other_sizes_and_types_are_refused(make: SimpleNamespace) -> None:
    data = make.oe_file(small(make))
    at = data.index(struct.pack("<IIQ", 1960, 2, 3))
    for bad in ((0, 2), (1959, 2), (1912, 2), (1 << 31, 2), (1960, 1), (1960, 3)):
        other = bytearray(data)
        struct.pack_into("<II", other, at, *bad)
        with pytest.raises(MeasurementError, match="known release"):
            measure_sgx(bytes(other))


def test_a_symbol_outside_the_image_is_refused(make: SimpleNamespace) -> None:
    for value in (0x5000, 0x4FF9, 1 << 63):
        own = small(make, symbols=SYMBOLS | {"_reloc_rva": value})
        with pytest.raises(MeasurementError, match="_reloc_rva lies outside"):
            measure_sgx(make.oe_file(own))


def test_odd_relocations_are_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="unsupported type"):
        measure_sgx(make.oe_file(small(make, rela_dyn=[(0, 5, 0)])))
    with pytest.raises(MeasurementError, match="does not exist"):
        measure_sgx(make.oe_file(small(make, rela_dyn=[(0, 99 << 32 | 18, 0)])))


def test_an_enclave_that_needs_a_module_is_refused(make: SimpleNamespace) -> None:
    own = small(make)
    make.oe_file(own)  # writes the properties into the segment
    dynamic = struct.pack("<qQqQ", 1, 5, 0, 0)
    other = make.elf_file(
        own.segments,
        [(".oeinfo", 1, 2, own.info_at, bytes(1960), 1, 0)],
        extra_headers=[(2, 6, 0x9000, 32, dynamic, 32, 8)],
    )
    with pytest.raises(MeasurementError, match="module"):
        measure_sgx(other)


def test_thread_local_sections_that_contradict_their_segment_are_refused(
    make: SimpleNamespace,
) -> None:
    data = make.oe_file(small(make, tdata=(0x2040, 24, 8)))
    header = struct.pack("<Q", 0x2040)
    other = data.replace(header, struct.pack("<Q", 0x2048), 1)
    with pytest.raises(MeasurementError, match="not where its segment is"):
        measure_sgx(other)


def test_an_impossible_alignment_is_refused(make: SimpleNamespace) -> None:
    for align in (0, 1 << 40):
        with pytest.raises(MeasurementError, match="alignment"):
            measure_sgx(make.oe_file(small(make, tbss=(8, align))))


# ---- what is right -------------------------------------------------------------------------------


def test_a_usual_enclave(make: SimpleNamespace) -> None:
    layout = check(make, small(make))
    assert layout.sigstruct is None  # not signed yet
    assert measure_sgx(make.oe_file(small(make))).verified


def test_the_signature_is_not_measured_and_the_rest_of_the_properties_is(
    make: SimpleNamespace,
) -> None:
    plain, _ = make.oe_mrenclave(small(make))
    signed = small(make, sigstruct=b"s" * 1808)
    layout = check(make, signed)
    assert layout.sigstruct == b"s" * 1808
    assert enclave.measure(layout) == plain
    assert make.oe_mrenclave(small(make, flags=1))[0] != plain
    check(make, small(make, flags=1))


@pytest.mark.parametrize("size", [1920, 1952, 1960])
def test_the_properties_of_each_release(make: SimpleNamespace, size: int) -> None:
    layout = check(make, small(make, info_size=size))
    assert layout.details["tls_pages"] == 0
    symbols = {name: at for name, at in SYMBOLS.items() if name != "_td_from_tcs_offset"}
    old = check(make, small(make, info_size=size, symbols=symbols))
    assert old.details["tls_pages"] == (1 if size == 1920 else 0)


def test_several_threads_and_none(make: SimpleNamespace) -> None:
    for threads in (0, 1, 2, 7, 32):
        check(make, small(make, threads=threads))


def test_a_zero_base_enclave(make: SimpleNamespace) -> None:
    for start in (0x20000, 0x10000000):
        layout = check(make, small(make, flags=2, start=start, threads=2))
        assert min(run.offset for run in layout.runs) == start
    # Without the flag the address means nothing.
    check(make, small(make, start=0x20000))
    with pytest.raises(MeasurementError, match="no page"):
        measure_sgx(make.oe_file(small(make, flags=2, start=0x20001)))


def test_relocations_without_rela_dyn_are_left_out(make: SimpleNamespace) -> None:
    layout = check(make, small(make, rela_dyn=[]))
    assert layout.details["reloc_size"] == 0
    layout = check(make, small(make, rela_dyn=[(at, 8, at) for at in range(400)]))
    assert layout.details["reloc_size"] == 0x3000


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_enclave_is_measured_as_the_loader_does(
    make: SimpleNamespace, data: st.DataObject
) -> None:
    source = random.Random(data.draw(st.integers(0, 99)))
    segments = [make.Seg(0, source.randbytes(5000), data.draw(st.integers(5000, 9000)), RX)]
    for _ in range(data.draw(st.integers(0, 3))):
        end = -(-(segments[-1].vaddr + segments[-1].memsz) // 4096) * 4096
        vaddr = end + data.draw(st.sampled_from([0, 1, 300, 4095, 8192]))
        length = data.draw(st.sampled_from([0, 1, 500, 4096, 7000]))
        memsz = length + data.draw(st.sampled_from([1, 4096, 5000]))
        segments.append(
            make.Seg(
                vaddr, source.randbytes(length), memsz, data.draw(st.sampled_from([R, RW, RX]))
            )
        )
    top = -(-(segments[-1].vaddr + segments[-1].memsz) // 4096) * 4096
    names = data.draw(st.sets(st.sampled_from(sorted(SYMBOLS))))
    # Apart from each other and from the properties, whose fields are written too.
    places = data.draw(
        st.lists(
            st.integers(0, (top - 8) // 8).filter(lambda at: not 0x400 - 8 < at * 8 < 0x400 + 1960),
            min_size=len(names), max_size=len(names), unique=True,
        )
    )  # fmt: skip
    symbols = {name: at * 8 for name, at in zip(sorted(names), places, strict=True)}
    kinds = st.sampled_from([1, 6, 7, 8, 18])
    infos = st.builds(lambda kind, at: at << 32 | kind, kinds, st.integers(0, len(symbols)))
    rows = st.lists(st.tuples(st.integers(0, 1 << 40), infos, st.integers(-9, 9)), max_size=200)
    own = make.Oe(
        segments=segments,
        info_at=0x400,
        info_size=data.draw(st.sampled_from([1920, 1952, 1960])),
        heap=data.draw(st.integers(0, 40)),
        stack=data.draw(st.integers(0, 5)),
        threads=data.draw(st.integers(0, 4)),
        symbols=symbols,
        rela_dyn=data.draw(rows),
        rela_plt=data.draw(rows),
        tdata=data.draw(st.sampled_from([None, (0x1010, 24, 16), (0x1000, 1, 1)])),
        tbss=data.draw(st.sampled_from([None, (4096, 8), (9, 64), (12345, 4096)])),
        entry=data.draw(st.integers(0, top)),
    )
    check(make, own)
