"""Enclaves of Intel's SDK: hostile files first, then synthetic ones against a slow reference."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyenclave.errors import ImageError, MeasurementError, SignatureError
from pyenclave.measurement import enclave, sgx_elf
from pyenclave.measurement.sgx_file import measure_sgx

R, RW, RX = 4, 6, 5
TCS = struct.pack("<QQQIIQQQQII", 0, 0, 0x1000, 0, 2, 0x40, 0, 0x3000, 0x3000, 0xFFF, 0xFFF)


def small(make: SimpleNamespace, **changes: Any) -> Any:
    """A usual enclave: two segments, heap, stack, TCS, and a second thread."""
    arguments: dict[str, Any] = {
        "segments": [
            make.Seg(0, random.Random(1).randbytes(5000), 5000, RX),
            make.Seg(0x2100, random.Random(2).randbytes(4000), 9000, RW),
        ],
        "table": [
            (1, 4, 0x10000, 0, 0x203),
            (3, 2, 0x20000, 0xCCCCCCCC, 0x203),
            (0, 1, 0x22000, 0, 0),
            (3, 1, 0x23000, TCS, 0x100),
            (3, 1, 0x24000, 0, 0x203),
            ("group", 4, 2, 0x10000),
        ],
        "patches": [(0, 0x28, bytes(8)), (1, 4090 - 0x100, b"patched over two pages"[:8])],
    }
    return make.Sdk(**(arguments | changes))


def measured(data: bytes) -> list[bytes]:
    return [enclave.measure(layout) for layout in sgx_elf.blocks(data)]


# ---- hostile files -------------------------------------------------------------------------------


def test_every_cut_off_file_is_refused(make: SimpleNamespace) -> None:
    data = make.sdk_file(small(make))
    for length in (
        *range(600),
        *range(600, len(data) - 600, 61),
        *range(len(data) - 600, len(data)),
    ):
        with pytest.raises(MeasurementError):
            measure_sgx(data[:length])


def test_overlapping_segments_are_refused(make: SimpleNamespace) -> None:
    for vaddr in (0, 1, 0xFFF, 0x1000, 0x1387):
        segments = [make.Seg(0, bytes(5000), 5000, RX), make.Seg(vaddr, b"x" * 10, 10, RW)]
        with pytest.raises(MeasurementError, match="twice"):
            measured(make.sdk_file(small(make, segments=segments, patches=[])))


def test_a_page_of_heap_over_a_segment_is_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="twice"):
        measured(make.sdk_file(small(make, table=[(1, 1, 0x1000, 0, 0x203)])))


@pytest.mark.parametrize("size", [0, 4096, (1 << 24) + 4096, 3 << 20])
def test_an_enclave_size_that_is_no_power_of_two_is_refused(
    make: SimpleNamespace, size: int
) -> None:
    with pytest.raises(MeasurementError):
        measured(make.sdk_file(small(make, size=size)))


@pytest.mark.parametrize("times", [1 << 13, 1 << 20, (1 << 32) - 1])
@pytest.mark.parametrize("step", [0, 1 << 12, 1 << 20, 1 << 63])
def test_a_huge_repeat_count_is_refused_before_any_work(
    make: SimpleNamespace, times: int, step: int
) -> None:
    table = [(3, 1, 0x40000, 0, 0x203), ("group", 1, times, step)]
    data = make.sdk_file(small(make, table=table))
    start = time.process_time()
    with pytest.raises(MeasurementError):
        measured(data)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pages", [1 << 13, 1 << 31, (1 << 32) - 1])
def test_a_huge_page_count_is_refused_before_any_work(make: SimpleNamespace, pages: int) -> None:
    for attributes in (0, 1, 3):
        data = make.sdk_file(small(make, table=[(attributes, pages, 0x40000, 0, 0x203)]))
        start = time.process_time()
        with pytest.raises(MeasurementError, match="outside the enclave"):
            measured(data)
        assert time.process_time() - start < 1


def test_more_work_than_the_limit_is_refused_before_it_is_done(make: SimpleNamespace) -> None:
    """An enclave of 16 TiB of measured zeros is possible on paper."""
    table = [(3, (1 << 32) - 1, 0x40000, 0, 0x203)]
    data = make.sdk_file(small(make, size=1 << 46, table=table))
    start = time.process_time()
    with pytest.raises(MeasurementError, match="too large to be measured"):
        measured(data)
    assert time.process_time() - start < 1
    segments = [make.Seg(0, b"x", 1 << 45, RW)]
    with pytest.raises(MeasurementError, match="too large to be measured"):
        measured(make.sdk_file(small(make, size=1 << 46, table=[], patches=[], segments=segments)))


def test_a_group_in_a_group_and_one_of_missing_entries_are_refused(make: SimpleNamespace) -> None:
    entry = (3, 1, 0x40000, 0, 0x203)
    table = [entry, ("group", 1, 1, 0x1000), ("group", 2, 1, 0x10000)]
    with pytest.raises(MeasurementError, match="a group holds a group"):
        measured(make.sdk_file(small(make, table=table)))
    with pytest.raises(MeasurementError, match="not there"):
        measured(make.sdk_file(small(make, table=[entry, ("group", 2, 1, 0x1000)])))


def test_a_patch_outside_the_file_and_too_many_are_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="outside the file"):
        measured(make.sdk_file(small(make, patches=[(0, 1 << 40, b"x")])))
    many = [(0, 0, bytes(4096))] * 40
    with pytest.raises(MeasurementError, match="too much is patched"):
        measured(make.sdk_file(small(make, patches=many)))


def test_a_tcs_longer_than_a_page_is_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="longer than a page"):
        measured(make.sdk_file(small(make, table=[(3, 1, 0x40000, bytes(4097), 0x100)])))


@pytest.mark.parametrize("flags", [0x202, 0x300, 0x101, 0x1203, 1 << 63])
def test_page_flags_that_hardware_refuses_are_refused(make: SimpleNamespace, flags: int) -> None:
    with pytest.raises(MeasurementError, match="flags"):
        measured(make.sdk_file(small(make, table=[(3, 1, 0x40000, 0, flags)])))


def test_a_segment_without_access_is_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="without any access"):
        measured(make.sdk_file(small(make, segments=[make.Seg(0, b"x", 1, 0)], patches=[])))


@pytest.mark.parametrize(
    "elrange",
    [
        (0x1000, 0x2000, 1 << 25),
        (0x1001, 0, 1 << 25),
        (0, 0, (1 << 25) + 4096),
        (0, 0, 0),
        (1 << 25, 0, 1 << 25),
        (1 << 24, 1 << 24, 1 << 25),
        ((1 << 64) - 4096, 0, 1 << 25),
    ],
)
def test_an_impossible_elrange_is_refused(
    make: SimpleNamespace, elrange: tuple[int, int, int]
) -> None:
    with pytest.raises(MeasurementError, match="ELRANGE"):
        measured(make.sdk_file(small(make, version=(13, 3), elrange=elrange)))


@pytest.mark.parametrize("version", [(0, 1), (4, 0), (9, 1), (21, 4), (1 << 31, 0)])
def test_unknown_versions_are_refused(make: SimpleNamespace, version: tuple[int, int]) -> None:
    with pytest.raises(MeasurementError, match="version"):
        measured(make.sdk_file(small(make, version=version)))


def test_too_many_blocks_and_blocks_of_odd_sizes_are_refused(make: SimpleNamespace) -> None:
    with pytest.raises(MeasurementError, match="too many"):
        measured(make.sdk_file(small(make, blocks=17)))
    data = make.sdk_file(small(make))
    at = data.index(b"sgx_metadata\0") + 13 + 16
    for size in (0, 1, 1887, 1 << 20, (1 << 32) - 1):
        bad = bytearray(data)
        struct.pack_into("<I", bad, at, size)
        with pytest.raises(MeasurementError, match="impossible size"):
            measured(bytes(bad))


def test_two_metadata_sections_are_refused(make: SimpleNamespace) -> None:
    note = (".note.sgxmeta", 7, 0, 0, bytes(100), 1, 0)
    with pytest.raises(MeasurementError, match="two sections"):
        measure_sgx(make.elf_file([make.Seg(0, b"x", 1, R)], [note, note]))


def test_an_unsigned_enclave_is_refused_with_advice(make: SimpleNamespace) -> None:
    note = struct.pack("<III", 13, 64, 0) + b"sgx_metadata\0" + bytes(64)
    data = make.elf_file([make.Seg(0, b"x", 1, R)], [(".note.sgxmeta", 7, 0, 0, note, 1, 0)])
    with pytest.raises(MeasurementError, match="not signed") as caught:
        measure_sgx(data)
    assert "signed file" in (caught.value.advice or "")


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_file_is_refused_or_measured_in_time(
    make: SimpleNamespace, edits: list[tuple[int, bytes]]
) -> None:
    data = bytearray(make.sdk_file(small(make, relocations=[(0x10, 8)])))
    for at, octets in edits:
        place = at % len(data)
        # Content of segments cannot be wrong: aim at headers and metadata.
        if 300 < place < 9200:
            place = len(data) - 1 - place % 3000
        data[place : place + len(octets)] = octets
    start = time.process_time()
    # By its first bytes a file may also become one of the other kinds that are measured.
    with contextlib.suppress(MeasurementError, ImageError, SignatureError):
        measure_sgx(bytes(data))
    assert time.process_time() - start < 5


# ---- what is right -------------------------------------------------------------------------------


def test_a_usual_enclave(make: SimpleNamespace) -> None:
    sdk = small(make, blocks=3)
    data = make.sdk_file(sdk)
    assert measured(data) == [make.sdk_mrenclave(sdk)] * 3
    found = measure_sgx(data)
    assert found.mrenclave == make.sdk_mrenclave(sdk)
    assert found.claims()["eadd_count"] == len(make.sdk_pages(sdk))
    assert found.details["metadata_blocks"][0]["offset_in_note_desc"] == 0
    assert not found.verified  # a SIGSTRUCT of zeros is none


def test_stripping_the_section_table_does_not_matter_to_the_measurement(
    make: SimpleNamespace,
) -> None:
    """Patches put zeros where it was named, so that debug sections can go after signing."""
    sdk = small(make)
    assert measured(make.sdk_file(sdk) + b"debug sections") == [make.sdk_mrenclave(sdk)]


def test_each_byte_of_each_segment_counts_unless_it_is_patched(make: SimpleNamespace) -> None:
    sdk = small(make)
    data = bytearray(make.sdk_file(sdk))
    wanted = measured(bytes(data))
    start = data.index(sdk.segments[0].content)
    for at in range(0, 5000, 7):
        data[start + at] ^= 0xFF
        assert (measured(bytes(data)) == wanted) == (0x28 <= at < 0x30)
        data[start + at] ^= 0xFF


def test_blocks_that_disagree_are_told(make: SimpleNamespace) -> None:
    data = bytearray(make.sdk_file(small(make, blocks=2)))
    second = data.index(b"sgx_metadata\0") + 13
    second += struct.unpack_from("<I", data, second + 16)[0]
    struct.pack_into("<I", data, second + 24, 2)  # another SSA frame size
    found = measure_sgx(bytes(data))
    assert any("different enclaves" in text for text in found.warnings)
    values = [row["mrenclave"] for row in found.details["metadata_blocks"]]
    assert values[0] == found.mrenclave.hex() != values[1]


@st.composite
def enclaves(draw: st.DrawFn) -> dict[str, Any]:
    version = draw(st.sampled_from([(1, 3), (1, 4), (1, 5), (2, 1), (2, 4), (3, 3), (13, 3)]))
    random_bytes = random.Random(draw(st.integers(0, 99)))
    segments, at = [], 0
    for number in range(draw(st.integers(1, 4))):
        vaddr = at + draw(st.sampled_from([0, 0, 1, 16, 2048, 4095]))
        length = draw(st.sampled_from([0, 1, 100, 4095, 4096, 4097, 9000]))
        memsz = length + draw(st.sampled_from([0, 0, 1, 4000, 4096, 12345]))
        segments.append(
            (vaddr, random_bytes.randbytes(length), memsz, draw(st.sampled_from([4, 5, 6, 7])))
        )
        at = -(-(vaddr + memsz) // 4096) * 4096 + 4096 * draw(st.integers(0, 2))
        at += 4096 if number % 2 else 0
    patches = []
    for _ in range(draw(st.integers(0, 4))):
        number = draw(st.integers(0, len(segments) - 1))
        room = len(segments[number][1])
        if room:
            place = draw(st.integers(0, room - 1))
            size = draw(st.integers(0, min(5000, room - place)))
            patches.append((number, place, random_bytes.randbytes(size)))
    table: list[tuple[Any, ...]] = []
    at += 8192
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["heap", "stack", "zero", "tcs", "guard", "data", "none"]))
        pages = draw(st.integers(1, 3))
        if kind == "tcs":
            table.append((draw(st.sampled_from([1, 3])), 1, at, TCS, 0x100))
        elif kind == "data":
            content = random_bytes.randbytes(draw(st.integers(1, 4096 * pages)))
            table.append((3, pages, at, content, 0x205))
        else:
            attributes = {"heap": 1, "guard": 0}.get(kind, draw(st.sampled_from([3, 7])))
            flags = 0 if kind in ("guard", "none") else 0x203
            fill = {"stack": 0xCCCCCCCC, "zero": 0}.get(kind, 0)
            table.append((attributes, pages, at, fill, flags))
        at += pages * 4096
    if table and draw(st.booleans()):
        count = draw(st.integers(0, len(table)))
        first = table[len(table) - count][2] if count else at
        table.append(("group", count, draw(st.integers(0, 4)), at - first))
    relocations = None
    if draw(st.booleans()):
        places = st.tuples(st.integers(0, at), st.sampled_from([0, 1, 8]))
        relocations = draw(st.lists(places, max_size=6))
    elrange = (3 << 24, 2 << 24, 1 << 25) if version[0] > 10 else None
    return {
        "version": version,
        "segments": segments,
        "patches": patches,
        "table": table,
        "relocations": relocations,
        "elrange": elrange,
        "ssa": draw(st.integers(1, 4)),
    }


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=enclaves())
def test_any_enclave_is_measured_as_the_loader_does(
    make: SimpleNamespace, words: dict[str, Any]
) -> None:
    words = words | {"segments": [make.Seg(*row) for row in words["segments"]]}
    sdk = make.Sdk(**words)
    assert measured(make.sdk_file(sdk)) == [make.sdk_mrenclave(sdk)]


def test_the_extra_page_of_version_1_3(make: SimpleNamespace) -> None:
    """Only there, and only where the segment's end and its rounded size disagree."""
    segments = [make.Seg(0x1800, b"x" * 4096, 4096, R), make.Seg(0x9800, b"y" * 4000, 4096, RW)]
    counts = {}
    for version in ((1, 2), (1, 3), (1, 4), (2, 3)):
        sdk = small(make, version=version, segments=segments, patches=[], table=[])
        assert measured(make.sdk_file(sdk)) == [make.sdk_mrenclave(sdk)]
        counts[version] = len(make.sdk_pages(sdk))
    assert set(counts.values()) == {4}
    segments = [make.Seg(0x1800, b"x" * 100, 100, R), make.Seg(0x9800, b"y" * 100, 100, RW)]
    for version, pages in (((1, 3), 4), ((1, 4), 2)):
        sdk = small(make, version=version, segments=segments, patches=[], table=[])
        assert len(make.sdk_pages(sdk)) == pages
        assert measured(make.sdk_file(sdk)) == [make.sdk_mrenclave(sdk)]


def test_text_relocations_make_their_pages_writable(make: SimpleNamespace) -> None:
    for at, touched in ((0, {0}), (4088, {0}), (4089, {0, 4096}), (4095, {0, 4096})):
        sdk = small(make, relocations=[(at, 8)])
        assert {page[0] for page in make.sdk_pages(sdk) if page[1] == 0x207} == touched
        assert measured(make.sdk_file(sdk)) == [make.sdk_mrenclave(sdk)]
    data = make.sdk_file(small(make, relocations=[(0, 8)]))
    data = data.replace(struct.pack("<qQ", 7, 0x7000000), struct.pack("<qQ", 7, 0x7000001))
    with pytest.raises(MeasurementError, match="no section"):
        measured(data)
