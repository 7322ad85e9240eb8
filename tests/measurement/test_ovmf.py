"""Reading firmware: hostile files first."""

from __future__ import annotations

import contextlib
import random
import struct
import uuid
from typing import TYPE_CHECKING

import pytest

from pyenclave.errors import MeasurementError
from pyenclave.measurement import ovmf, sev, tdx
from pyenclave.measurement.ovmf import Firmware, SevLayout, SevSection

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., bytearray]

RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
SEV_GUID = "dc886566-984a-4798-a75e-5585a7bf67cc"
MEMORY = (0x800000, 0x9000, 1)
BFV = (0, 16384, 0xFFFFC000, 16384, 0, 1)
HOB = (0, 0, 0x809000, 0x2000, 2, 0)


def test_an_empty_or_huge_file_is_refused() -> None:
    with pytest.raises(MeasurementError, match="impossible size"):
        Firmware(b"")
    with pytest.raises(MeasurementError, match="below its end"):
        Firmware(bytes(8192), end=4096)


def test_a_file_without_a_table_is_plain_bytes() -> None:
    for size in (1, 49, 50, 4096):
        image = Firmware(bytes(size))
        assert image.entries == {}
        assert image.sev == SevLayout(())
        with pytest.raises(MeasurementError, match="no TDX metadata"):
            _ = image.tdvf


@pytest.mark.parametrize("size", [0, 17, 0xFFFF])
def test_a_table_of_a_wrong_size_is_refused(firmware: Build, size: int) -> None:
    data = firmware()
    data[-50:-48] = struct.pack("<H", size)
    with pytest.raises(MeasurementError, match="does not fit"):
        Firmware(data)


def test_guids_are_written_as_the_standard_library_does(firmware: Build) -> None:
    source = random.Random(9)
    for raw in (bytes(15) + b"\1", bytes(range(16)), *(source.randbytes(16) for _ in range(20))):
        data = firmware(reset=4)
        data[-66:-50] = raw
        assert str(uuid.UUID(bytes_le=raw)) in Firmware(data).entries


@pytest.mark.parametrize("size", [0, 17, 23, 4000])
def test_an_entry_of_a_wrong_size_is_refused(firmware: Build, size: int) -> None:
    data = firmware(reset=4)
    data[-68:-66] = struct.pack("<H", size)
    with pytest.raises(MeasurementError, match=r"wrong size|twice"):
        Firmware(data)


def test_a_guid_that_is_twice_in_the_table_is_refused(
    firmware: Build, guid_entry: Callable[[str, bytes], bytes]
) -> None:
    with pytest.raises(MeasurementError, match="twice"):
        Firmware(firmware(extra=[guid_entry(RESET, bytes(4))]))


def test_an_entry_too_short_for_its_word_is_refused(
    firmware: Build, guid_entry: Callable[[str, bytes], bytes]
) -> None:
    image = Firmware(firmware(reset=None, extra=[guid_entry(RESET, b"abc")]))
    with pytest.raises(MeasurementError, match="short"):
        _ = image.sev


@pytest.mark.parametrize("distance", [0, 15, 16385, 0xFFFFFFFF])
def test_metadata_outside_the_file_is_refused(
    firmware: Build, guid_entry: Callable[[str, bytes], bytes], distance: int
) -> None:
    data = firmware(extra=[guid_entry(SEV_GUID, struct.pack("<I", distance))])
    with pytest.raises(MeasurementError, match="outside the file"):
        _ = Firmware(data).sev


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, b"BSEV", "not recognised"),
        (8, struct.pack("<I", 2), "not recognised"),
        (12, struct.pack("<I", 2), "number of sections"),
        (12, b"\xff" * 4, "number of sections"),
        (4, b"\xff" * 4, "number of sections"),
        (4, bytes(4), "number of sections"),
        (16, struct.pack("<I", 1), "whole pages"),
        (20, struct.pack("<I", 100), "whole pages"),
        (20, bytes(4), "whole pages"),
        (24, struct.pack("<I", 9), "unknown type"),
        (24, struct.pack("<I", 2), "wrong size"),
        (24, struct.pack("<I", 3), "wrong size"),
        (20, struct.pack("<I", 0xFFFFF000), "more memory"),
    ],
)
def test_sev_metadata_that_cannot_be_is_refused(
    firmware: Build, at: int, value: bytes, match: str
) -> None:
    data = firmware(sev=[MEMORY])
    begin = len(data) - 1024
    data[begin + at : begin + at + len(value)] = value
    with pytest.raises(MeasurementError, match=match):
        _ = Firmware(data).sev


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ((1, 16384, 0xFFFFC000, 16384, 0, 1), "past the end"),
        ((0xFFFFFFFF, 4096, 0xFFFFC000, 4096, 0, 1), "past the end"),
        ((0, 0, 4097, 4096, 3, 0), "whole pages"),
        ((0, 0, 4096, 4097, 3, 0), "whole pages"),
        ((0, 0, 1 << 52, 4096, 3, 0), "whole pages"),
        ((0, 0, (1 << 64) - 4096, (1 << 64) - 4096, 3, 0), "whole pages"),
        ((0, 0, 0, 1 << 44, 3, 0), "more memory"),
        ((0, 0, 0, 4096, 3, 4), "unknown attributes"),
        ((0, 4096, 0, 4096, 3, 3), "not there at launch"),
        ((0, 0, 0, 4096, 2, 1), "not all in the file"),
        ((0, 8192, 0, 4096, 1, 0), "more data than memory"),
    ],
)
def test_a_tdvf_section_that_cannot_be_is_refused(
    firmware: Build, section: tuple[int, ...], match: str
) -> None:
    with pytest.raises(MeasurementError, match=match):
        _ = Firmware(firmware(tdx=[BFV, section])).tdvf


def test_memory_that_is_added_later_may_be_of_any_size(firmware: Build) -> None:
    late = (0, 0, 0x100000000, 1 << 44, 4, 2)
    assert tdx.mrtd(firmware(tdx=[BFV, late])) == tdx.mrtd(firmware(tdx=[BFV, late]))
    assert [step.added for step in tdx.mrtd_steps(firmware(tdx=[BFV, late]))] == [4, 0]


def test_a_descriptor_without_sections_is_refused(firmware: Build) -> None:
    with pytest.raises(MeasurementError, match="no sections"):
        _ = Firmware(firmware(tdx=[])).tdvf


def test_no_mutation_of_the_tables_raises_anything_but_the_typed_error(firmware: Build) -> None:
    good = firmware(sev=[MEMORY, (0x80A000, 4096, 2)], tdx=[BFV, HOB], hashes=(0x80C00, 1024))
    generator = random.Random(11)
    tables = [*range(len(good) - 300, len(good) - 30)]
    tables += [
        *range(len(good) - 1024, len(good) - 980),
        *range(len(good) - 2048, len(good) - 1900),
    ]
    for _ in range(2500):
        data = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            data[generator.choice(tables)] = generator.randrange(256)
        with contextlib.suppress(MeasurementError):
            sev.snp_launch_digest(data, vcpus=2, vcpu_type="EPYC")
        with contextlib.suppress(MeasurementError):
            tdx.mrtd(data)


def test_what_the_firmware_states_is_read(firmware: Build) -> None:
    data = firmware(sev=[MEMORY, (0x810000, 4096, 16)], hashes=(0x810C00, 0x400), reset=0x80B004)
    image = Firmware(data)
    assert image.gpa == ovmf.FOUR_GIB - len(data)
    assert image.sev == SevLayout(
        (SevSection(*MEMORY), SevSection(0x810000, 4096, 16)),
        hashes_table_gpa=0x810C00,
        ap_reset_eip=0x80B004,
    )
    assert {entry.name for entry in image.entries.values()} == {
        "SEV metadata",
        "SEV-ES reset block",
        "kernel hashes table",
    }
    for item in image.entries.values():
        assert data[item.offset : item.offset + len(item.data)] == item.data
