"""Shared objects: malformed files first."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave.errors import ImageError
from pyenclave.formats import elf

BASE = 0x1000


def small(
    *, soname: bytes = b"libx.so.1", needs: tuple[bytes, ...] = (b"libc.so.6",), symbols: int = 2
) -> bytes:
    """Return a shared object of one segment, made by hand."""
    names = [soname, *needs, *(b"pye_ecall_%d" % at for at in range(symbols))]
    strings, places = b"\0", []
    for name in names:
        places.append(len(strings))
        strings += name + b"\0"
    symtab = bytes(24)
    for at in range(symbols):
        symtab += struct.pack("<IBBHQQ", places[1 + len(needs) + at], 0x12, 0, 1, BASE, 8)
    hashes = struct.pack("<IIII", 1, symbols + 1, 0, 0) + bytes(4 * symbols)
    head = 64 + 2 * 56
    at_strings = head
    at_symbols = at_strings + len(strings)
    at_hash = at_symbols + len(symtab)
    at_dynamic = at_hash + len(hashes)
    entries = [(1, places[1 + at]) for at in range(len(needs))]
    entries += [(14, places[0]), (5, BASE + at_strings), (10, len(strings))]
    entries += [(6, BASE + at_symbols), (11, 24), (4, BASE + at_hash), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    total = at_dynamic + len(dynamic)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, total, total, 0x1000)
    place = struct.pack(
        "<IIQQQQQQ", 2, 4, at_dynamic, BASE + at_dynamic, 0, len(dynamic), len(dynamic), 8
    )
    return header + load + place + strings + symtab + hashes + dynamic


GOOD = small()


def test_every_cut_off_file_is_refused_or_read_without_harm() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ImageError):
            elf.parse(GOOD[:length], "cut")


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (0, b"\x7fELG", "not an ELF"),
        (4, b"\x01", "64-bit"),
        (5, b"\x02", "64-bit"),
        (16, b"\x01\0", "shared object"),
        (18, b"\x03\0", "machine"),
        (32, b"\xff" * 8, "outside"),
        (54, b"\x01\0", "odd sizes"),
        (56, b"\xff\xff", "odd sizes"),
        (56, b"\0\0", "odd sizes"),
        (64 + 32, b"\xff" * 8, "segment lies outside"),
        (64 + 56 + 16, b"\xff" * 8, "in no segment"),
        (64 + 56 + 32, b"\xff" * 8, "too long"),
        (64 + 56 + 32, struct.pack("<Q", 16), "no end"),
    ],
)
def test_malformed_headers_are_refused_by_name(at: int, value: bytes, what: str) -> None:
    bad = bytearray(GOOD)
    bad[at : at + len(value)] = value
    with pytest.raises(ImageError, match=what):
        elf.parse(bytes(bad), "bad")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"x" * 5000, b""])
def test_sonames_that_are_not_plain_text_are_refused(name: bytes) -> None:
    with pytest.raises(ImageError):
        elf.parse(small(soname=name), "bad")


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)), max_size=5
    )
)
def test_a_mutated_file_is_refused_or_read(edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for at, text in edits:
        data[at : at + len(text)] = text
    for read in (elf.parse, elf.exported):
        with contextlib.suppress(ImageError):
            read(bytes(data), "fuzz")


def test_a_huge_symbol_count_is_refused_before_it_is_walked() -> None:
    data = bytearray(small(symbols=0))
    at = bytes(data).index(struct.pack("<IIII", 1, 1, 0, 0))
    struct.pack_into("<I", data, at + 4, 0xFFFFFFFF)
    with pytest.raises(ImageError, match="too many symbols"):
        elf.exported(bytes(data), "many")
    struct.pack_into("<I", data, at + 4, 999_999)
    with pytest.raises(ImageError, match="too long"):
        elf.exported(bytes(data), "many")


def test_a_small_file_is_read() -> None:
    shared = elf.parse(GOOD, "good")
    assert (shared.machine, shared.soname, shared.needs) == ("x86_64", "libx.so.1", ("libc.so.6",))
    assert not shared.executable
    assert not shared.writable_code
    assert elf.exported(GOOD, "good", "pye_ecall_") == ("0", "1")


def test_our_own_extension_is_read() -> None:
    data = Path(_core.__file__).read_bytes()
    shared = elf.parse(data, "_core")
    assert "libc.so.6" in shared.needs
    assert "PyInit__core" in elf.exported(data, "_core")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("style", ["gnu", "sysv"])
def test_a_compiled_library_exports_what_is_visible(tmp_path: Path, style: str) -> None:
    source = tmp_path / "x.c"
    source.write_text(
        "int pye_ecall_b(void){return 1;}\nint pye_ecall_a(void){return 2;}\n"
        '__attribute__((visibility("hidden"))) int pye_ecall_hidden(void){return 3;}\n'
        "static int pye_ecall_static(void){return 4;} int other(void){return pye_ecall_static();}\n"
        "int pye_ecall_undefined(void); int user(void){return pye_ecall_undefined();}\n"
    )
    out = tmp_path / "libx.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-Wl,--hash-style={style}", "-Wl,-soname,libx.so.3",
         "-o", str(out), str(source)],
        check=True,
    )  # fmt: skip
    assert elf.exported(out.read_bytes(), "libx", "pye_ecall_") == ("a", "b")
    assert elf.parse(out.read_bytes(), "libx").soname == "libx.so.3"
