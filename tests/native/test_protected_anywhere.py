"""What of protected libraries needs no protection key: the gate's registers and stack, reading and
refusing shared objects, arguments, and the refusal where there is no key.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from core_build import compiler
from protected_files import NO_KEY, compile_library, files, try_new

import pyenclave
from pyenclave import ProtectedLibrary, _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import ImageError, ProtectionError
from pyenclave.formats.elf_protect import protectable

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="protection keys of x86-64"
)

EMPTY = "#include <pyenclave_trusted.h>\nPYE_ECALL(f) { (void)in; (void)out; (void)in_len; (void)out_len; return 0; }\n"  # noqa: E501


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files(tmp_path_factory.mktemp("protected"))


@pytest.fixture(scope="module")
def whole(made: Path) -> bytes:
    return (made / "library.so").read_bytes()


def build(folder: Path, text: str, *flags: str) -> bytes:
    source = folder / "made.c"
    source.write_text(EMPTY + text)
    return compile_library(folder / "made.so", source, *flags).read_bytes()


# ---- the gate, without a key -------------------------------------------------------------------


def through_gate(made: Path, clear: int) -> tuple[int, bytes, list[int], list[int]]:
    probe = ctypes.CDLL(str(made / "probe.so"))
    stack = (ctypes.c_uint8 * 65536)()
    top = (ctypes.addressof(stack) + 65536) // 64 * 64
    registers = (ctypes.c_uint8 * 2112)(*[1] * 2112)
    where = ctypes.c_uint64()
    integers = (ctypes.c_uint64 * 8)(*[1] * 8)
    mxcsr = (ctypes.c_uint32 * 2)()
    assert not probe.probe_gate(
        ctypes.c_void_p(top), clear, ctypes.byref(where), registers, integers, mxcsr
    )
    return top - where.value, bytes(registers), list(integers), list(mxcsr)


def test_the_gate_runs_a_function_on_the_other_stack(made: Path) -> None:
    """Its frame lies right below the top that was given."""
    assert through_gate(made, 0)[0] == 16


def test_the_gate_leaves_no_integer_register(made: Path) -> None:
    """rcx, rdx, rsi, rdi and r8 to r11, which the function filled."""
    assert through_gate(made, 0)[2] == [0] * 8


def test_clearing_leaves_no_vector_register(made: Path) -> None:
    """By the CPU's own set all of them; by a smaller one the part that it knows."""
    level = ctypes.CDLL(str(made / "probe.so")).probe_level()
    width = (16, 32, 64)[level]
    assert through_gate(made, 0)[1][:width] == b"\xa5" * width
    for clear in range(level + 1):
        registers = through_gate(made, clear + 1)[1]
        for number in range(16):
            cleared = (16, width, width)[clear]
            assert registers[64 * number :][:cleared] == bytes(cleared), (clear, number)
    if level == 2:
        assert through_gate(made, 3)[1] == bytes(2112)


def test_the_gate_gives_mxcsr_back(made: Path) -> None:
    """Its flags tell of what was computed; its modes would change what the caller computes."""
    before, after = through_gate(made, 0)[3]
    assert before == after != 0x9FBF


@pytest.mark.parametrize("tells_use", [0, 1])
def test_clearing_leaves_nothing_in_x87(made: Path, tells_use: int) -> None:
    """Neither what the function popped, nor flags and addresses; the control word stays."""
    probe = ctypes.CDLL(str(made / "probe.so"))
    if tells_use and "xgetbv1" not in Path("/proc/cpuinfo").read_text("utf-8"):
        pytest.skip("this CPU has no XGETBV with 1")
    images = (ctypes.c_uint8 * 1024)()
    probe.probe_other(tells_use, 1, images)
    before, after = bytes(images[:512]), bytes(images[512:])
    registers = slice(32, 160)
    assert before[registers].count(bytes.fromhex("35c26821a2da0fc90040")) == 8
    assert after[registers] == bytes(128)
    assert before[:2] == after[:2] == b"\x7f\x02"
    assert after[2:24] == bytes(22)
    probe.probe_other(tells_use, 0, images)
    assert bytes(images[512:])[registers] == bytes(128)


# ---- shared objects ----------------------------------------------------------------------------


def test_what_is_behind_the_key_is_what_the_library_can_write(whole: bytes) -> None:
    """Every page of .data and .bss, and none of the loader's."""
    found = protectable(whole, "library.so")
    assert found.first == 0
    assert {"echo", "keep", "kept"} <= set(found.functions)
    assert list(found.functions) == sorted(found.functions)
    (address, size), *rest = found.ranges
    assert not rest
    assert address % 4096 == size % 4096 == 0
    segments = rows(whole)
    relro = next(row for row in segments if row[0] == 0x6474E552)
    data = next(row for row in segments if row[0] == 1 and row[1] & 2)
    assert address == (relro[3] + relro[6]) // 4096 * 4096
    assert address + size >= data[3] + data[6]
    assert address + size - 4096 < data[3] + data[6]


def rows(data: bytes) -> list[tuple[int, ...]]:
    offset, number = struct.unpack_from("<32xQ16xH", data)
    return [struct.unpack_from("<IIQQQQQQ", data, offset + 56 * i) for i in range(number)]


def changed(data: bytes, kind: int, field: int, value: int, *, which: int = 0) -> bytes:
    """Return a file whose program header `which` of `kind` has another field (kind, flags, …)."""
    offset = struct.unpack_from("<32xQ", data)[0]
    indexes = [i for i, row in enumerate(rows(data)) if row[0] == kind]
    row = list(rows(data)[indexes[which]])
    row[field] = value
    out = bytearray(data)
    struct.pack_into("<IIQQQQQQ", out, offset + 56 * indexes[which], *row)
    return bytes(out)


LOAD, DYNAMIC, STACK, RELRO = 1, 2, 0x6474E551, 0x6474E552


@pytest.mark.parametrize(
    ("kind", "field", "value", "reason"),
    [
        (LOAD, 1, 7, "code that is written"),
        (STACK, 1, 7, "executable stacks"),
        (STACK, 0, 0, "executable stacks"),
        (RELRO, 0, 0, "not linked with -z relro"),
        (RELRO, 6, 0, "dynamic section"),
        (RELRO, 3, 1 << 40, "dynamic section"),
    ],
)
def test_headers_that_weaken_it_are_refused(
    whole: bytes, kind: int, field: int, value: int, reason: str
) -> None:
    with pytest.raises(ProtectionError, match=reason):
        protectable(changed(whole, kind, field, value), "library.so")


def test_segments_beyond_what_is_mapped_are_refused(whole: bytes) -> None:
    with pytest.raises(ProtectionError, match="not in order"):
        protectable(changed(whole, LOAD, 6, 1 << 41, which=-1), "library.so")


def test_pages_shared_with_other_segments_are_refused(whole: bytes) -> None:
    """A segment that says that it begins where the data lies."""
    data = next(row for row in rows(whole) if row[0] == LOAD and row[1] & 2)
    bad = changed(whole, LOAD, 3, data[3] + 0x300, which=2)
    with pytest.raises(ProtectionError, match="share pages"):
        protectable(bad, "library.so")
    # Of no size, but the loader maps its page.
    bad = changed(changed(whole, LOAD, 5, 0, which=2), LOAD, 6, 0, which=2)
    with pytest.raises(ProtectionError, match="share pages"):
        protectable(changed(bad, LOAD, 3, data[3] + 0x300, which=2), "library.so")


def test_text_relocations_are_refused_by_either_name(whole: bytes) -> None:
    """DT_TEXTREL, and DF_TEXTREL in DT_FLAGS, which the loader takes for the same."""
    section = next(row for row in rows(whole) if row[0] == DYNAMIC)
    tags = range(section[2], section[2] + section[5], 16)
    end = next(at for at in tags if struct.unpack_from("<Q", whole, at)[0] == 0)
    for entry, bad in (((22, 0), True), ((30, 4), True), ((30, 8), False)):
        changed_file = bytearray(whole)
        struct.pack_into("<QQ", changed_file, end, *entry)
        assert struct.unpack_from("<Q", changed_file, end + 16)[0] == 0
        if bad:
            with pytest.raises(ProtectionError, match="code that is written"):
                protectable(changed_file, "library.so")
        else:
            protectable(changed_file, "library.so")


def test_an_instruction_may_lie_in_two_segments(whole: bytes) -> None:
    """Begun at the end of one, ended by the next, which may come from anywhere in the file."""
    segments = rows(whole)
    text = next(i for i, row in enumerate(segments) if row[:2] == (LOAD, 5))
    after = next(i for i, row in enumerate(segments) if row[0] == LOAD and i > text)
    size = -(-segments[text][5] // 4096) * 4096
    last = segments[text][2] + size - 1
    bad = bytearray(whole)
    bad[last] = 0x0F
    bad[segments[after][2] : segments[after][2] + 2] = b"\x01\xef"
    place = struct.unpack_from("<32xQ", whole)[0] + 56 * after
    protectable(bad, "library.so")  # the next one is no code
    struct.pack_into("<I", bad, place + 4, 5)
    struct.pack_into("<Q", bad, place + 16, segments[text][3] + size)
    with pytest.raises(ProtectionError, match=rf"0f 01 ef at offset {last:#x}\b"):
        protectable(bad, "library.so")


def test_more_than_the_core_takes_is_refused(tmp_path: Path) -> None:
    """Functions, and bytes of variables."""
    text = "".join(
        f"PYE_ECALL(g{i}) {{ (void)in; (void)out; (void)in_len; (void)out_len; return 0; }}\n"
        for i in range(1024)
    )
    with pytest.raises(ProtectionError, match="too many functions"):
        protectable(build(tmp_path, text), "made.so")
    with pytest.raises(ProtectionError, match="too many variables"):
        protectable(build(tmp_path, "char large[(1u << 30) + 1];\n"), "made.so")


@pytest.mark.parametrize(
    "code",
    [
        "0f01ef",
        "0fae2c24",
        "480fae29",
        "0fae6c2440",
        "0faea80000000090",
        "0fc71c24",
        "0fc79f00000000",
        "d58001ef",
    ],
)
@pytest.mark.parametrize("where", ["plain", "inside", "end"])
def test_code_that_sets_rights_is_refused_with_its_offset(
    whole: bytes, code: str, where: str
) -> None:
    """WRPKRU, XRSTOR, XRSTOR64, XRSTORS: as an instruction, in another, and in a page's tail."""
    text = next(row for row in rows(whole) if row[0] == LOAD and row[1] & 1)
    begin, size = text[2], text[5]
    put = bytes.fromhex(code)
    at = {"plain": begin + 0x100, "inside": begin + 0x101, "end": begin + 0x1000 - len(put)}[where]
    assert where == "end" or at + len(put) < begin + size
    bad = whole[:at] + put + whole[at + len(put) :]
    shown = at + (put[0] == 0x48)
    with pytest.raises(ProtectionError, match=rf"offset {shown:#x}\b"):
        protectable(bad, "library.so")


@pytest.mark.parametrize("code", ["0f01ee", "0faee8", "0fae0c24", "0faef0", "0fc7f0", "0fc70c24"])
def test_its_neighbours_are_not(whole: bytes, code: str) -> None:
    """RDPKRU, LFENCE, FXRSTOR, MFENCE, RDRAND, CMPXCHG8B."""
    text = next(row for row in rows(whole) if row[0] == LOAD and row[1] & 1)
    at = text[2] + 0x100
    protectable(whole[:at] + bytes.fromhex(code) + b"\x90" + whole[at + len(code) // 2 + 1 :], "x")


def test_data_may_have_such_bytes(tmp_path: Path) -> None:
    data = build(
        tmp_path, "const unsigned char gate[] = {0x0f, 0x01, 0xef};\n", "-Wl,-z,separate-code"
    )
    assert protectable(data, "made.so").functions == ("f",)


@pytest.mark.parametrize(
    ("text", "flags", "reason"),
    [
        (
            'void gate(void) { __asm__(".byte 0x0f, 0x01, 0xef"); }\n',
            (),
            "rights of protection keys",
        ),
        ("", ("-Wl,-z,execstack",), "executable stacks"),
        ("", ("-Wl,-z,norelro",), "relro"),
        ("__thread int own; int *at(void) { return &own; }\n", (), "thread-local"),
    ],
)
def test_libraries_that_cannot_be_protected_are_refused(
    tmp_path: Path, text: str, flags: tuple[str, ...], reason: str
) -> None:
    """As compilers and linkers make them."""
    with pytest.raises(ProtectionError, match=reason):
        protectable(build(tmp_path, text, *flags), "made.so")


def test_a_library_without_functions_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "none.c"
    source.write_text("int f(void) { return 1; }\n")
    data = compile_library(tmp_path / "none.so", source).read_bytes()
    with pytest.raises(ProtectionError, match="no function of PYE_ECALL"):
        protectable(data, "none.so")


def test_another_machine_is_refused(whole: bytes) -> None:
    with pytest.raises(ProtectionError, match="x86-64"):
        protectable(whole[:18] + b"\xb7" + whole[19:], "library.so")
    with pytest.raises(ProtectionError, match="x86-64"):
        protectable(whole[:16] + b"\x02" + whole[17:], "library.so")


def test_changed_headers_are_errors_of_ours(whole: bytes) -> None:
    """Every byte of the headers, in turn, as 0 and as 255: a result or a typed error."""
    for at in range(64 + 56 * len(rows(whole))):
        for value in (0, 255):
            with contextlib.suppress(ProtectionError, ImageError):
                protectable(whole[:at] + bytes([value]) + whole[at + 1 :], "library.so")
    for size in (0, 3, 63, 64, 100, 500, 4095):
        with pytest.raises((ImageError, ProtectionError)):
            protectable(whole[:size], "library.so")


def test_the_example_of_the_page_can_be_protected(tmp_path: Path) -> None:
    """docs/protected.md shows a library that compiles without a warning."""
    compiler()
    page = (Path(__file__).resolve().parents[2] / "docs" / "protected.md").read_text("utf-8")
    source = tmp_path / "counter.c"
    source.write_text(page.split("```c\n")[1].split("```")[0])
    data = compile_library(tmp_path / "counter.so", source, "-Wall", "-Werror").read_bytes()
    assert protectable(data, "counter.so").functions == ("add",)


# ---- what the loader makes of it ---------------------------------------------------------------


def load(data: bytes, path: Path) -> _core.ProtectedCode:
    """Load a library as ProtectedLibrary does, but without asking for a key first."""
    path.write_bytes(data)
    found = protectable(data, path.name)
    return _core.ProtectedCode(
        os.open(path, os.O_RDONLY), found.functions, found.ranges, found.variables, found.first,
        0, 65536, 4096, 1, False,
    )  # fmt: skip


def comes_as_far_as_the_key(data: bytes, path: Path) -> bool:
    try:
        load(data, path)
    except ProtectionError as error:
        return "no protection key" in str(error)
    return True


def test_a_variable_that_the_loader_takes_from_elsewhere_is_refused(tmp_path: Path) -> None:
    """The C library has one of that name, and it is first in line: no key would protect it."""
    text = "%s int opterr = 7;\nint *at(void) { return &opterr; }\n"
    data = build(tmp_path, text % "")
    assert [name for name, _ in protectable(data, "made.so").variables] == ["opterr"]
    with pytest.raises(ProtectionError, match="'opterr' would be another object's"):
        load(data, tmp_path / "taken.so")
    hidden = '__attribute__((visibility("%s")))'
    own = [build(tmp_path, text % (hidden % kind)) for kind in ("hidden", "protected")]
    own.append(build(tmp_path, text % "", "-Wl,-Bsymbolic"))
    own.append(build(tmp_path, "int nobodys = 7;\nint *at(void) { return &nobodys; }\n"))
    for number, data in enumerate(own):
        assert comes_as_far_as_the_key(data, tmp_path / f"own{number}.so")


def test_a_variable_that_exists_once_in_a_process_is_refused_where_it_is_not_its_own(
    tmp_path: Path,
) -> None:
    """What C++ calls inline: the first library's is that of all, whatever their names."""
    text = (
        "#include <pyenclave_trusted.h>\ninline int once = 7;\n"
        "PYE_ECALL(f) { (void)in; (void)in_len; (void)out; *out_len = ++once; return 0; }\n"
    )
    source = tmp_path / "once.cc"
    source.write_text(text)
    paths = [tmp_path / f"once{number}.so" for number in range(2)]
    for path in paths:
        command = [compiler("g++"), "-std=c++17", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-I",
                   pyenclave.get_include(), str(source), "-o", str(path)]  # fmt: skip
        subprocess.run(command, check=True)
    held = ctypes.CDLL(str(paths[0]))
    with pytest.raises(ProtectionError, match="'once' would be another object's"):
        load(paths[1].read_bytes(), tmp_path / "second.so")
    assert held is not None


def test_a_function_of_another_library_is_none(tmp_path: Path) -> None:
    """An indirect function can lead anywhere; what is behind the key is counted from them."""
    data = build(
        tmp_path,
        "#include <unistd.h>\nstatic void *choose(void) { return (void *)getpid; }\n"
        'pye_status pye_ecall_a(void) __attribute__((ifunc("choose")));\n',
    )
    with pytest.raises(ImageError, match="no function 'a'"):
        load(data, tmp_path / "far.so")


def test_what_the_loader_says_may_be_no_text(tmp_path: Path) -> None:
    data = build(tmp_path, "void missing_here(void);\nvoid g(void) { missing_here(); }\n")
    assert data.count(b"missing_here") >= 1
    with pytest.raises(ImageError, match="cannot be loaded"):
        load(data.replace(b"missing_here", b"missing_\xff\xfe\xfd\xfc"), tmp_path / "lacks.so")


# ---- arguments, and machines without a key -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"memory": "4 apples"}, ValueError, "memory"),
        ({"memory": -1}, ValueError, "memory"),
        ({"memory": 1.5}, TypeError, "memory"),
        ({"memory": "2 GiB"}, ValueError, "memory"),
        ({"message": 0}, ValueError, "message"),
        ({"stack": 4095}, ValueError, "stack"),
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": 65}, ValueError, "threads"),
        ({"threads": True}, TypeError, "threads"),
        ({"threads": "4"}, TypeError, "threads"),
        ({"signals": "maybe"}, ValueError, "signals"),
    ],
)
def test_impossible_arguments_are_errors_that_name_them(
    made: Path, arguments: dict[str, Any], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=name):
        ProtectedLibrary(made / "library.so", **arguments)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no library")
    with pytest.raises(ImageError, match="not an ELF file"):
        ProtectedLibrary(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        ProtectedLibrary(tmp_path / "missing")


def test_the_native_core_refuses_wrong_sizes_before_it_looks_for_a_key() -> None:
    out = ffi.new("pye_protect **")
    sizes = ffi.new("pye_protect_sizes *", {"memory": 0, "stack": 0, "message": 1, "slots": 1})
    none = (ffi.NULL, 0, ffi.NULL, 0, ffi.NULL)
    assert lib.pye_protect_new(out, sizes, *none) == lib.PYE_E_LENGTH
    sizes.stack = 4096
    status = lib.pye_protect_new(out, sizes, *none)
    assert status == (lib.PYE_E_UNSUPPORTED if NO_KEY else lib.PYE_OK)
    assert lib.pye_protect_free(out[0], 0) == lib.PYE_OK


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"memory": (1 << 30) + 1}, "LENGTH"),
        ({"stack": 0}, "LENGTH"),
        ({"stack": (1 << 30) + 1}, "LENGTH"),
        ({"message": 0}, "LENGTH"),
        ({"message": (1 << 30) + 1}, "LENGTH"),
        ({"slots": 0}, "ARGUMENT"),
        ({"slots": 65}, "ARGUMENT"),
        ({"flags": 2}, "ARGUMENT"),
        ({"numbers": (17, 0)}, "ARGUMENT"),
        ({"numbers": (0, 1025)}, "ARGUMENT"),
        ({"ranges": ((1, 4096),)}, "ALIGNMENT"),
        ({"ranges": ((4096, 1),)}, "ALIGNMENT"),
        ({"ranges": ((4096, 0),)}, "LENGTH"),
        ({"ranges": ((4096, (1 << 30) + 4096),)}, "LENGTH"),
        ({"arena": ffi.new("pye_protect_arena *")}, "ARGUMENT"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], status: str) -> None:
    assert try_new(**wrong)[0] == getattr(lib, f"PYE_E_{status}")


@pytest.mark.skipif(not NO_KEY, reason="this CPU has protection keys")
def test_a_machine_without_keys_is_refused_by_name(made: Path) -> None:
    """There is nothing weaker to fall back to."""
    with pytest.raises(ProtectionError, match="PKU") as info:
        ProtectedLibrary(made / "library.so")
    assert info.value.code == "protection"


def test_memory_of_the_header_is_callocs_elsewhere(tmp_path: Path) -> None:
    """The same library in an enclave, or anywhere."""
    text = (
        "#include <pyenclave_protected.h>\nPYE_PROTECTED_MEMORY;\n"
        "int taken(size_t n) { uint8_t *p = pye_protected_take(n); return p && !p[0]; }\n"
    )
    build(tmp_path, text)
    assert ctypes.CDLL(str(tmp_path / "made.so")).taken(ctypes.c_size_t(100)) == 1


def test_the_headers_are_c_and_cxx(tmp_path: Path) -> None:
    cxx = compiler("c++", "g++")
    source = tmp_path / "both.cc"
    source.write_text(
        "#include <pyenclave_protected.h>\n#include <pyenclave_trusted.h>\nPYE_PROTECTED_MEMORY;\n"
        "PYE_ECALL(f) { (void)in; (void)in_len; (void)out; *out_len = 0; return PYE_ECALL_OK; }\n"
    )
    command = [cxx, "-shared", "-fPIC", "-Wall", "-Werror", "-I", pyenclave.get_include(),
               str(source), "-o", str(tmp_path / "both.so")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert protectable((tmp_path / "both.so").read_bytes(), "both.so").functions == ("f",)


def test_the_arena_of_the_header_is_the_cores(tmp_path: Path) -> None:
    """Two headers name one layout."""
    header = (Path(pyenclave.get_include()) / "pyenclave_protected.h").read_text("utf-8")
    fields = re.findall(
        r"^    uint64_t (\w+);", header.split("typedef struct {")[1].split("}")[0], re.M
    )
    assert fields == [name for name, _ in ffi.typeof("pye_protect_arena").fields]
