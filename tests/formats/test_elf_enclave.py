"""ELF files as enclave loaders read them: malformed ones first."""

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import MeasurementError
from pyenclave.formats.elf_enclave import EnclaveElf


def small() -> bytes:
    """Two segments, a dynamic section, symbols and three more sections, made by hand."""
    names = b"\0.dynsym\0.dynstr\0.rela.dyn\0.odd\n\0.shstrtab\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x11, 0, 1, 0x1234, 8)
    rela = struct.pack("<QQq", 0x1000, 1 << 32 | 18, -1)
    dynamic = struct.pack("<qQqQqQ", 7, 0x500, 7, 0x600, 0, 0)
    parts = [symbols, b"\0_one\0", rela, b"odd", names, dynamic]
    places, at = [], 64 + 4 * 56
    for part in parts:
        places.append(at)
        at += len(part)
    headers = [
        (1, 5, 0, 0, 0, 64, 4096, 4096),
        (1, 6, places[0], 0x1000, 0, 48, 8192, 4096),
        (2, 6, places[5], 0, 0, 48, 48, 8),
        (0x6474E551, 6, 1 << 60, 0, 0, 1 << 60, 0, 16),  # PT_GNU_STACK may say anything
    ]
    sections = [
        (0,) * 10,
        (1, 11, 2, 0, places[0], 48, 0, 0, 8, 24),
        (9, 3, 2, 0, places[1], 6, 0, 0, 1, 0),
        (17, 4, 2, 0x600, places[2], 24, 0, 0, 8, 24),
        (27, 1, 2, 0x700, places[3], 3, 0, 0, 1, 0),
        (33, 3, 0, 0, places[4], len(names), 0, 0, 1, 0),
    ]
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 3, 62, 1, 0x40, 64, at, 0, 64, 56, 4, 64, len(sections), 5
    )
    body = b"".join(struct.pack("<IIQQQQQQ", *row) for row in headers) + b"".join(parts)
    return head + body + b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in sections)


GOOD = small()
AT = struct.unpack_from("<Q", GOOD, 40)[0]  # of the section headers


def read_all(data: bytes) -> None:
    elf = EnclaveElf(data)
    for section in elf.sections:
        elf.section_content(section)
        elf.section(section.name)
    elf.symbols(frozenset({"_one"}))
    elf.symbol_value(1)
    list(elf.relocations(elf.dynamic.get(7, 0), 24))


def test_every_cut_off_file_is_refused() -> None:
    read_all(GOOD)
    for length in range(len(GOOD)):
        with pytest.raises(MeasurementError):
            read_all(GOOD[:length])


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (0, b"\x7fELG", "not an ELF"),
        (4, b"\x01", "64-bit"),
        (5, b"\x02", "64-bit"),
        (6, b"\x02", "64-bit"),
        (16, b"\x02\0", "shared object"),
        (18, b"\xb7\0", "x86-64"),
        (32, b"\xff" * 8, "program headers lies outside"),
        (54, b"\x01\0", "odd size or number"),
        (56, b"\0\0", "odd size or number"),
        (56, b"\x01\x02", "odd size or number"),
        (40, b"\xff" * 8, "section headers lies outside"),
        (58, b"\x28\0", "odd size"),
        (60, b"\xff\xff", "lies outside"),
        (62, b"\0\0", "does not exist"),
        (62, b"\x06\0", "does not exist"),
        (64 + 8, b"\xff" * 8, "program header 0 lies outside"),
        (64 + 32, b"\xff" * 8, "program header 0 lies outside"),
        (64 + 40, bytes(8), "impossible size"),
        (64 + 40, b"\xff" * 8, "impossible size"),
        (64 + 16, b"\xff" * 8, "impossible size"),
        (64 + 112 + 32, struct.pack("<Q", 32), "no end"),
        (64 + 112 + 8, b"\xff" * 8, "lies outside"),
        (AT + 64 + 24, b"\xff" * 8, "section .dynsym lies outside"),
        (AT + 64 + 32, b"\xff" * 8, "lies outside|too many"),
        (AT + 64 + 32, struct.pack("<Q", 24), "does not exist"),
        (AT + 64 + 56, struct.pack("<Q", 16), "odd size"),
        (AT + 5 * 64 + 24, b"\xff" * 8, "section names lies outside"),
        (AT + 3 * 64 + 16, bytes(8), "lies outside|no section"),
    ],
)
def test_malformed_headers_are_refused_by_name(at: int, value: bytes, what: str) -> None:
    bad = bytearray(GOOD)
    bad[at : at + len(value)] = value
    with pytest.raises(MeasurementError, match=what):
        read_all(bytes(bad))


def test_two_thread_local_segments_are_refused() -> None:
    bad = bytearray(GOOD)
    for number in (2, 3):
        struct.pack_into("<IIQQQQQQ", bad, 64 + 56 * number, 7, 4, 0, 0, 0, 1, 1, 1)
    with pytest.raises(MeasurementError, match="two thread-local"):
        EnclaveElf(bytes(bad))


def test_huge_tables_are_refused_before_they_are_walked() -> None:
    data = GOOD + bytes(150 << 20)
    elf = EnclaveElf(data)
    start = time.process_time()
    with pytest.raises(MeasurementError, match="too many relocations"):
        list(elf.relocations(0x600, 140 << 20))
    bad = bytearray(data)
    struct.pack_into("<Q", bad, AT + 64 + 32, 140 << 20)
    with pytest.raises(MeasurementError, match="too many symbols"):
        EnclaveElf(bad).symbols(frozenset({"x"}))
    assert time.process_time() - start < 2


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)), max_size=5
    )
)
def test_a_mutated_file_is_refused_or_read(edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for at, octets in edits:
        data[at : at + len(octets)] = octets
    with contextlib.suppress(MeasurementError):
        read_all(bytes(data))


def test_what_is_there_is_read() -> None:
    elf = EnclaveElf(GOOD)
    assert [(segment.vaddr, segment.end, segment.flags) for segment in elf.segments] == [
        (0, 4096, 5),
        (0x1000, 0x3000, 6),
    ]
    assert elf.entry == 0x40
    assert elf.dynamic == {7: 0x600}  # the last of a tag counts
    assert list(elf.relocations(0x600, 24)) == [(0x1000, 1 << 32 | 18, -1)]
    assert elf.symbols(frozenset({"_one", "_on", "one"})) == {"_one": 0x1234}
    assert elf.symbol_value(1) == 0x1234
    assert elf.section(".nothing") is None
    # A name that could steer a terminal is escaped.
    assert [section.name for section in elf.sections if "odd" in section.name] == ["'.odd\\n'"]
    assert bytes(elf.at_address(0x1004, 4, "x")) == GOOD[64 + 4 * 56 + 4 :][:4]
    with pytest.raises(MeasurementError, match="not in the content"):
        elf.at_address(0x102D, 4, "x")
