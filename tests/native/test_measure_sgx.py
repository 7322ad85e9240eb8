"""The record stream behind MRENCLAVE, against a second writing of it and hashlib."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

RW, RX, TCS = 0x203, 0x205, 0x100
SIZE = 1 << 20


@pytest.fixture(params=[0xFFFFFFFF, 0], ids=["best", "portable"])
def variant(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every implementation in turn."""
    _core.cpu_set_mask(request.param)
    yield request.param
    _core.cpu_set_mask(0xFFFFFFFF)


class Stream:
    """The same by hand, record for record, as Intel's SDM has it."""

    def __init__(self, size: int, ssa_frame_size: int = 1) -> None:
        self.data = bytearray(struct.pack("<8sIQ44x", b"ECREATE", ssa_frame_size, size))

    def eadd(self, offset: int, flags: int) -> None:
        self.data += struct.pack("<8sQQ40x", b"EADD", offset, flags)

    def eextend(self, offset: int, chunk: bytes) -> None:
        assert len(chunk) == 256
        self.data += struct.pack("<8sQ48x", b"EEXTEND", offset) + chunk

    def pages(self, content: bytes, offset: int, flags: int, measured: bool = True) -> None:
        for page in range(0, len(content), 4096):
            self.eadd(offset + page, flags)
            for chunk in range(page, page + 4096, 256) if measured else ():
                self.eextend(offset + chunk, content[chunk : chunk + 256])

    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 8191, 8193, 12288, (1 << 63) + 1, 3 << 62])
def test_a_size_that_hardware_refuses_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="ECREATE"):
        _core.SgxMeasurement(size)


@pytest.mark.parametrize("size", [-1, 1 << 64])
def test_a_size_that_is_no_u64_is_refused(size: int) -> None:
    with pytest.raises(OverflowError):
        _core.SgxMeasurement(size)


def test_an_empty_ssa_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="SSA"):
        _core.SgxMeasurement(SIZE, 0)


@pytest.mark.parametrize(
    "flags",
    [0, 0x3, 0x101, 0x103, 0x202, 0x206, 0x20B, 0x213, 0x223, 0x240, 0x280, 0x300, 0x400, 0x10203]
    + [0x203 | 1 << bit for bit in range(10, 64)],
)
def test_flags_that_hardware_refuses_are_refused(flags: int) -> None:
    """Write without read, a TCS with access, other page types, reserved bits."""
    measurement = _core.SgxMeasurement(SIZE)
    before = measurement.digest()
    for attempt in (
        lambda: measurement.add(0, flags),
        lambda: measurement.add_pages(bytes(4096), 0, flags),
        lambda: measurement.add_unmeasured(1, 0, flags),
        lambda: measurement.add_filled(1, 0, flags),
    ):
        with pytest.raises(ValueError, match="flags"):
            attempt()
    assert measurement.digest() == before
    assert measurement.num_pages == 0


@pytest.mark.parametrize("flags", [TCS, 0x200, 0x201, 0x203, 0x204, 0x205, 0x207])
def test_flags_that_hardware_takes_are_taken(flags: int) -> None:
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add(0, flags)
    stream = Stream(SIZE)
    stream.eadd(0, flags)
    assert measurement.digest() == stream.digest()


@pytest.mark.parametrize("offset", [1, 64, 256, 4095, 4097])
def test_pages_off_a_page_boundary_are_refused(offset: int) -> None:
    measurement = _core.SgxMeasurement(SIZE)
    with pytest.raises(ValueError, match="PYE_E_ALIGNMENT"):
        measurement.add(offset, RW)
    with pytest.raises(ValueError, match="PYE_E_ALIGNMENT"):
        measurement.add_pages(bytes(4096), offset, RW)


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        (SIZE, 1),
        (SIZE - 4096, 2),
        (0, SIZE // 4096 + 1),
        (4096, 1 << 52),
        ((1 << 64) - 4096, 1),
        (4096, (1 << 64) - 1),
    ],
)
def test_pages_outside_the_enclave_are_refused(offset: int, count: int) -> None:
    """No sum may wrap around; nothing is hashed before the check."""
    measurement = _core.SgxMeasurement(SIZE)
    before = measurement.digest()
    with pytest.raises(ValueError, match="PYE_E_ARGUMENT"):
        measurement.add_unmeasured(count, offset, RW)
    with pytest.raises(ValueError, match="PYE_E_ARGUMENT"):
        measurement.add_filled(count, offset, RW)
    assert measurement.digest() == before


@pytest.mark.parametrize("size", [1, 255, 4095, 4097, 8191])
def test_content_that_is_not_whole_pages_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        _core.SgxMeasurement(SIZE).add_pages(bytes(size), 0, RW)


def test_an_extend_without_its_page_is_refused() -> None:
    measurement = _core.SgxMeasurement(SIZE)
    with pytest.raises(errors.EnclaveStateError):
        measurement.extend(0, bytes(256))
    measurement.add_pages(bytes(4096), 0, RW)
    with pytest.raises(errors.EnclaveStateError):
        measurement.extend(0, bytes(256))


@pytest.mark.parametrize("offset", [256, 0x1100, 4097, 0x2000])
def test_chunks_out_of_order_are_refused(offset: int) -> None:
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add(4096, RW)
    with pytest.raises(errors.EnclaveStateError):
        measurement.extend(offset, bytes(256))
    measurement.extend(4096, bytes(256))
    with pytest.raises(errors.EnclaveStateError):
        measurement.extend(4096, bytes(256))


@pytest.mark.parametrize("size", [0, 255, 257, 4096])
def test_a_chunk_of_another_size_is_refused(size: int) -> None:
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add(0, RW)
    with pytest.raises(ValueError, match="256"):
        measurement.extend(0, bytes(size))


def test_a_page_half_measured_is_neither_left_nor_digested() -> None:
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add(0, RW)
    for chunk in range(15):
        measurement.extend(256 * chunk, bytes(256))
        with pytest.raises(errors.EnclaveStateError):
            measurement.digest()
        with pytest.raises(errors.EnclaveStateError):
            measurement.add(4096, RW)
        with pytest.raises(errors.EnclaveStateError):
            measurement.add_pages(bytes(4096), 4096, RW)
    measurement.extend(3840, bytes(256))
    whole = _core.SgxMeasurement(SIZE)
    whole.add_pages(bytes(4096), 0, RW)
    assert measurement.digest() == whole.digest()


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "frame"), [(8192, 1), (SIZE, 2), (1 << 36, 7), (1 << 63, 1 << 31)]
)
def test_an_empty_enclave_is_its_ecreate_record(variant: int, size: int, frame: int) -> None:
    measurement = _core.SgxMeasurement(size, frame)
    assert measurement.digest() == Stream(size, frame).digest()
    assert measurement.size == size


@pytest.mark.parametrize("count", [0, 1, 2, 3, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("measured", [True, False])
def test_runs_of_pages(variant: int, count: int, measured: bool) -> None:
    content = random.Random(count).randbytes(count * 4096)
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add_pages(content, 0x3000, RX, measured)
    stream = Stream(SIZE)
    stream.pages(content, 0x3000, RX, measured)
    assert measurement.digest() == stream.digest()
    assert measurement.num_pages == count
    if not measured:
        other = _core.SgxMeasurement(SIZE)
        other.add_unmeasured(count, 0x3000, RX)
        assert other.digest() == stream.digest()


@pytest.mark.parametrize("word", [0, 0xCCCCCCCC, 0x01020304])
def test_filled_pages_hash_like_pages_that_exist(variant: int, word: int) -> None:
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add_filled(3, 0x1000, RW, word)
    stream = Stream(SIZE)
    stream.pages(struct.pack("<I", word) * 1024 * 3, 0x1000, RW)
    assert measurement.digest() == stream.digest()


@pytest.mark.parametrize("shift", [1, 3, 8, 33, 63])
def test_content_may_lie_anywhere(variant: int, shift: int) -> None:
    noise = random.Random(4).randbytes(8192 + 64)
    measurement = _core.SgxMeasurement(SIZE)
    measurement.add_pages(memoryview(noise)[shift : shift + 8192], 0, RW)
    stream = Stream(SIZE)
    stream.pages(noise[shift : shift + 8192], 0, RW)
    assert measurement.digest() == stream.digest()


def test_any_bit_of_the_content_counts(variant: int) -> None:
    content = bytearray(random.Random(5).randbytes(4096))

    def value() -> bytes:
        measurement = _core.SgxMeasurement(SIZE)
        measurement.add_pages(content, 0, RW)
        return measurement.digest()

    seen = {value()}
    for at in range(0, 4096, 37):
        content[at] ^= 1 << at % 8
        seen.add(value())
        content[at] ^= 1 << at % 8
    assert len(seen) == 1 + len(range(0, 4096, 37))


def test_a_copy_goes_its_own_way() -> None:
    first = _core.SgxMeasurement(SIZE)
    first.add_pages(bytes(4096), 0, RW)
    second = first.copy()
    second.add_pages(bytes(4096), 4096, RX)
    stream = Stream(SIZE)
    stream.pages(bytes(4096), 0, RW)
    assert first.digest() == stream.digest()
    stream.pages(bytes(4096), 4096, RX)
    assert second.digest() == stream.digest()
    assert (first.num_pages, second.num_pages) == (1, 2)


steps = st.lists(
    st.tuples(
        st.sampled_from(["pages", "unmeasured", "filled", "records"]),
        st.integers(1, 3),
        st.integers(0, 200),
        st.sampled_from([RW, RX, 0x201, TCS]),
        st.integers(0, 0xFFFFFFFF),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(steps=steps, portable=st.booleans())
def test_any_sequence_of_calls(steps: list[tuple[str, int, int, int, int]], portable: bool) -> None:
    """However an enclave is put together, the value is that of the stream written by hand."""
    _core.cpu_set_mask(0 if portable else 0xFFFFFFFF)
    try:
        measurement = _core.SgxMeasurement(SIZE, 2)
    finally:
        _core.cpu_set_mask(0xFFFFFFFF)
    stream = Stream(SIZE, 2)
    for kind, count, page, flags, word in steps:
        offset = page * 4096
        content = random.Random(word).randbytes(count * 4096)
        if kind == "pages":
            measurement.add_pages(content, offset, flags)
            stream.pages(content, offset, flags)
        elif kind == "unmeasured":
            measurement.add_unmeasured(count, offset, flags)
            stream.pages(content, offset, flags, measured=False)
        elif kind == "filled":
            measurement.add_filled(count, offset, flags, word)
            stream.pages(struct.pack("<I", word) * 1024 * count, offset, flags)
        else:
            measurement.add(offset, flags)
            stream.eadd(offset, flags)
            for chunk in range(0, 4096, 256):
                measurement.extend(offset + chunk, content[chunk : chunk + 256])
                stream.eextend(offset + chunk, content[chunk : chunk + 256])
        assert measurement.digest() == stream.digest()
