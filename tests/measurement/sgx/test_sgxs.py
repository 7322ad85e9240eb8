"""SGXS streams: hostile and non-canonical ones first."""

from __future__ import annotations

import hashlib
import struct
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import MeasurementError
from pyenclave.measurement import enclave
from pyenclave.measurement.sgx_file import measure_sgx
from pyenclave.measurement.sgxs import Stream

RW, TCS = 0x203, 0x100


def create(size: int = 1 << 20, frame: int = 1, tag: bytes = b"ECREATE") -> bytes:
    return struct.pack("<8sIQ44x", tag, frame, size)


def add(offset: int, flags: int = RW) -> bytes:
    return struct.pack("<8sQQ40x", b"EADD", offset, flags)


def chunk(offset: int, content: bytes = bytes(256), tag: bytes = b"EEXTEND") -> bytes:
    return struct.pack("<8sQ48x", tag, offset) + content


def page(offset: int, flags: int = RW) -> bytes:
    return add(offset, flags) + b"".join(
        chunk(offset + at, bytes([at // 256]) * 256) for at in range(0, 4096, 256)
    )


GOOD = create() + page(0) + add(4096) + page(8192, TCS)


def test_every_cut_off_stream_is_refused_or_ends_between_records() -> None:
    ends = {64, 64 + 5184, 64 + 5184 + 64, len(GOOD)}
    ends |= {start + 64 + 320 * count for start in (64, 64 + 5184 + 64) for count in range(17)}
    for length in range(len(GOOD)):
        if length in ends:
            Stream(GOOD[:length])
        else:
            with pytest.raises(MeasurementError, match=r"cut off|not a file of SGX"):
                measure_sgx(GOOD[:length])


@pytest.mark.parametrize(
    ("stream", "what"),
    [
        (add(0), "not an ECREATE"),
        (create() + create(), "unknown kind"),
        (create() + b"EINIT\0\0\0" + bytes(56), "unknown kind"),
        (create() + chunk(0), "before any page"),
        (create() + add(0) + add(0), "do not ascend"),
        (create() + add(8192) + add(4096), "do not ascend"),
        (create() + add(1), "outside"),
        (create() + add(1 << 20), "outside"),
        (create() + add(0, 0x202), "flags"),
        (create() + add(0, TCS | 1), "flags"),
        (create() + add(0, 0x300), "flags"),
        (create() + add(0)[:-1] + b"\1", "flags"),
        (create() + add(0) + chunk(4096), "another page"),
        (create() + add(4096) + chunk(0), "another page"),
        (create() + add(0) + chunk(1), "another page"),
        (create() + add(0) + chunk(0) + chunk(0), "twice"),
        (create() + add(0) + chunk(256) + chunk(256, tag=b"UNMEASRD"), "twice"),
        (create(0), "cannot be built"),
        (create(4096), "cannot be built"),
        (create(3 << 20), "cannot be built"),
        (create(1 << 60), "cannot be built"),
        (create(frame=0), "cannot be built"),
        (create()[:-1] + b"\1", "not an ECREATE"),
    ],
)
def test_streams_that_are_not_canonical_are_refused(stream: bytes, what: str) -> None:
    with pytest.raises(MeasurementError, match=what):
        Stream(stream)


def test_the_value_is_the_hash_of_a_canonical_stream(make: SimpleNamespace) -> None:
    stream = Stream(GOOD)
    assert stream.mrenclave() == hashlib.sha256(GOOD).digest() == enclave.measure(stream.layout())
    assert stream.record_counts == {"ECREATE": 1, "EADD": 3, "EEXTEND": 32}
    found = measure_sgx(GOOD)
    assert (found.kind, found.verified, found.signed) == ("sgx-sgxs", True, None)
    content = b"".join(bytes([at]) * 256 for at in range(16))
    pages = [(0, RW, content, True), (4096, RW, b"", False), (8192, TCS, content, True)]
    assert make.stream(1 << 20, 1, pages) == GOOD


def test_chunks_that_are_not_measured_are_left_out() -> None:
    quiet = chunk(512, b"x" * 256, b"UNMEASRD")
    loud = chunk(0, b"y" * 256)
    for middle in ((quiet, loud), (loud, quiet), (quiet,), (quiet, chunk(256, tag=b"UNMEASRD"))):
        data = create() + add(0) + b"".join(middle) + page(4096)
        wanted = create() + add(0) + b"".join(x for x in middle if x is loud) + page(4096)
        stream = Stream(data)
        assert stream.mrenclave() == hashlib.sha256(wanted).digest()
        run = stream.layout().runs[0]
        assert run.page(0)[512:514] == b"xx"
        assert run.chunks == (loud in middle)


def test_a_stream_without_a_size_is_measured_with_the_one_given() -> None:
    open_stream = create(256 + 16, tag=b"UNSIZED") + page(0)
    with pytest.raises(MeasurementError, match="size open") as caught:
        measure_sgx(open_stream)
    assert "--size" in (caught.value.advice or "")
    closed = bytearray(create(1 << 16) + page(0))
    at = 64 + 64 + 320 + 64 + 16
    struct.pack_into("<Q", closed, at, 1 << 16)
    stream = Stream(open_stream, size=1 << 16)
    assert stream.mrenclave() == hashlib.sha256(closed).digest()
    assert enclave.measure(stream.layout()) == stream.mrenclave()
    for place, what in ((1, "aligned"), (4096, "not in a measured chunk")):
        with pytest.raises(MeasurementError, match=what):
            Stream(create(place, tag=b"UNSIZED") + page(0), size=1 << 16)
    for size in (0, 1, 4096, 3 << 16, 1 << 70):
        with pytest.raises(MeasurementError, match="cannot be built"):
            Stream(open_stream, size=size)


def test_another_size_than_the_stream_says_is_refused() -> None:
    assert Stream(GOOD, size=1 << 20).sized
    with pytest.raises(MeasurementError, match="another size"):
        Stream(GOOD, size=1 << 21)
    with pytest.raises(ValueError, match="SGXS"):
        measure_sgx(b"\x7fELF" + bytes(100), size=1 << 20)


def test_many_unmeasured_pages_take_one_run_and_little_time() -> None:
    data = create(1 << 30) + b"".join(add(at << 12) for at in range(1 << 15))
    start = time.process_time()
    found = measure_sgx(data)
    assert time.process_time() - start < 3
    assert found.mrenclave == hashlib.sha256(data).digest()
    assert found.layout is not None
    assert len(found.layout.runs) == 1


@settings(max_examples=200, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), max_size=3))
def test_a_mutated_stream_is_refused_or_hashed_as_it_stands(edits: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in edits:
        data[at] ^= value
    try:
        stream = Stream(bytes(data))
    except MeasurementError:
        return
    if "UNMEASRD" not in stream.record_counts:
        assert stream.mrenclave() == hashlib.sha256(data).digest()
