"""libffi's code page for callbacks: which copy of it a zygote accepts."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyenclave._native import mapping_lines
from pyenclave._worker.importer import Entry
from pyenclave._worker.mappings import foreign_mappings
from pyenclave._worker.trampolines import accept_trampolines, hold_trampolines

PAGE = mmap.PAGESIZE
CODE = os.urandom(PAGE)
LIBRARY = os.urandom(2 * PAGE) + CODE + os.urandom(PAGE)


@pytest.fixture
def locked(tmp_path: Path) -> Any:
    """A lock with a libffi, as far as it is asked for."""
    path = tmp_path / "libffi.so.8"
    path.write_bytes(LIBRARY)
    entry = Entry("library", "libffi.so.8", str(path), hashlib.sha256(LIBRARY).hexdigest(), "")
    return SimpleNamespace(
        libraries={"libffi.so.8": entry}, modules={}, files={}, sealed=set(), held=[]
    )


@contextlib.contextmanager
def mapped(code: bytes, *, name: str = "libffi", prot: int = 0, flags: int = 0) -> Iterator[int]:
    """Map *code* as libffi does; the number of its memfd, which it keeps open."""
    fd = os.memfd_create(name)
    try:
        os.write(fd, code)
        with mmap.mmap(
            fd,
            len(code),
            flags=flags or mmap.MAP_PRIVATE,
            prot=prot or mmap.PROT_READ | mmap.PROT_EXEC,
        ):
            yield fd
    finally:
        os.close(fd)


def accepted(locked: Any, fd: int) -> bool:
    inode = os.fstat(fd).st_ino
    locked.held = hold_trampolines()
    accept_trampolines(locked)
    lines = [line for line in mapping_lines() if f" {inode} ".encode() in line]
    assert lines
    return not foreign_mappings(lines, locked)


def test_a_page_of_libffis_own_code_is_accepted(locked: Any) -> None:
    with mapped(CODE) as fd:
        assert accepted(locked, fd)
        assert len(locked.sealed) == 1


@pytest.mark.parametrize("name", ["_ctypes", "_cffi_backend"])
def test_so_is_that_of_an_extension_that_has_libffi_in_it(locked: Any, name: str) -> None:
    entry = locked.libraries.pop("libffi.so.8")
    locked.modules[name] = entry
    with mapped(CODE) as fd:
        assert accepted(locked, fd)


def test_other_code_under_its_name_is_not(locked: Any) -> None:
    with mapped(bytes([CODE[0] ^ 1]) + CODE[1:]) as fd:
        assert not accepted(locked, fd)


def test_nor_is_its_code_under_another_name(locked: Any) -> None:
    with mapped(CODE, name="other") as fd:
        assert not accepted(locked, fd)


@pytest.mark.parametrize(
    ("prot", "flags"),
    [
        (mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, mmap.MAP_PRIVATE),
        (mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED),
        (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED),
    ],
)
def test_nor_what_may_still_change(locked: Any, prot: int, flags: int) -> None:
    with mapped(CODE, prot=prot, flags=flags) as fd:
        assert not accepted(locked, fd)


def test_nor_where_the_library_is_not_the_locked_one(locked: Any) -> None:
    Path(locked.libraries["libffi.so.8"].path).write_bytes(LIBRARY + b"x")
    with mapped(CODE) as fd:
        assert not accepted(locked, fd)


def test_nor_where_no_libffi_is_locked(locked: Any) -> None:
    locked.libraries = {"libother.so.1": locked.libraries["libffi.so.8"]}
    with mapped(CODE) as fd:
        assert not accepted(locked, fd)


def test_nothing_that_can_be_mapped_is_left_under_its_number() -> None:
    with mapped(CODE) as fd, mapped(CODE, name="other") as other:
        held = hold_trampolines()  # and the duplicate that Python's mmap keeps
        assert fd in held
        assert other not in held
        with pytest.raises(OSError, match="Errno"):
            mmap.mmap(fd, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        assert os.read(fd, 1) == b""
        assert not os.get_inheritable(fd)
        mmap.mmap(other, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close()


def test_a_copy_whose_descriptor_was_not_found_is_not_accepted(locked: Any) -> None:
    """Somebody may still write to it."""
    with mapped(CODE):
        accept_trampolines(locked)
        assert locked.sealed == set()


@pytest.mark.parametrize("jit", [False, True])
def test_more_callbacks_than_a_page_has_execute_no_other_memory(
    launching: Any, zygotes: Any, base: Any, jit: bool
) -> None:
    """libffi maps the next page from whatever lies under its memfd's number: the ring, once."""
    source = (
        "import ctypes\n"
        "@pyenclave.ecall\n"
        "def answer() -> list[int]:\n"
        "    kind, made = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int), []\n"
        "    try:\n"
        "        for place in range(700):\n"
        "            made.append(kind(lambda x, place=place: x + place))\n"
        "    except MemoryError:\n"
        "        pass\n"
        "    return [one(1) for one in made]\n"
    )
    image = launching.make(base, source, jit=jit)
    with launching.Launched(zygotes, image) as worker:
        worker.run()
        for _ in range(2):
            found = worker.function("answer")()
            assert found == list(range(1, len(found) + 1))
