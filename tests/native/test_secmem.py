"""Secret memory: kinds, guards, forks, wiping, and what a closed one refuses."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path

import pytest

from pyenclave import errors
from pyenclave._core import SecretMemory
from pyenclave._ffi import ffi, lib

PAGE = os.sysconf("SC_PAGESIZE")
LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
pytestmark = LINUX


def new(size: int) -> tuple[int, int]:
    out = ffi.new("void **")
    kind = ffi.new("uint32_t *")
    assert lib.pye_secmem_new(out, size, kind) == lib.PYE_OK
    return int(ffi.cast("uintptr_t", out[0])), kind[0]


def peek(address: int, size: int = 1) -> bytes:
    return ctypes.string_at(address, size)


def die_of_touching(address: int, write: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    if write:
        ctypes.memset(address, 1, 1)
    else:
        peek(address)


@pytest.mark.parametrize("size", [0, -1, -(2**63)])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        SecretMemory(size)


@pytest.mark.parametrize("size", [2**46 + 1, 2**62, 2**63 - 1])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match="length"):
        SecretMemory(size)


def test_a_size_that_is_no_number_is_refused():
    with pytest.raises(TypeError):
        SecretMemory("4096")


@pytest.mark.parametrize(
    ("offset", "data"),
    [(-1, b"x"), (100, b"x"), (99, b"xy"), (2**63 - 1, b"x"), (0, bytes(101)), (101, b"")],
)
def test_BND_01_writing_outside_is_refused(offset, data):
    with SecretMemory(100) as memory:
        with pytest.raises(ValueError, match="outside"):
            memory.write(offset, data)
        assert memory.read(0, 100) == bytes(100)


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 1), (0, 101), (100, 1), (1, 2**63 - 1), (50, -1), (101, 0)]
)
def test_BND_01_reading_outside_is_refused(offset, size):
    with SecretMemory(100) as memory, pytest.raises(ValueError, match="outside"):
        memory.read(offset, size)


def test_closed_memory_refuses_and_closes_twice():
    memory = SecretMemory(10)
    memory.close()
    memory.close()
    with pytest.raises(errors.EnclaveClosedError):
        memory.read(0, 1)
    with pytest.raises(errors.EnclaveClosedError):
        memory.write(0, b"x")
    with pytest.raises(errors.EnclaveClosedError):
        memory.__enter__()


def test_it_cannot_be_pickled():
    import copy
    import pickle

    with SecretMemory(10) as memory:
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                way(memory)


def test_what_is_written_is_read_and_the_rest_is_zero():
    with SecretMemory(3 * PAGE + 5) as memory:
        assert len(memory) == 3 * PAGE + 5
        memory.write(PAGE - 2, b"secret")
        assert memory.read(PAGE - 2, 6) == b"secret"
        assert memory.read(0, PAGE - 2) == bytes(PAGE - 2)
        memory.write(3 * PAGE, memoryview(b"12345"))
        assert memory.read(3 * PAGE, 5) == b"12345"


def test_this_kernel_gives_memfd_secret_where_it_has_it():
    fd = ctypes.CDLL(None, use_errno=True).syscall(447, 0)
    if fd < 0:
        pytest.skip("the kernel offers no memfd_secret")
    os.close(fd)
    with SecretMemory(PAGE) as memory:
        assert memory.kind == lib.PYE_SECMEM_SECRET
        mapped = Path("/proc/self/maps").read_text()
        assert "secretmem" in mapped


def test_PRC_03_no_descriptor_of_secret_memory_stays_open():
    before = set(os.listdir("/proc/self/fd"))
    with SecretMemory(PAGE):
        assert len(os.listdir("/proc/self/fd")) == len(before)
        links = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in before
            if os.path.lexists(f"/proc/self/fd/{fd}")
        ]
        assert not any("secretmem" in link for link in links)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("where", ["before", "after"])
def test_the_guard_pages_fault(in_child, where, write):
    size = 2 * PAGE
    address, _ = new(size)
    try:
        outside = address - 1 if where == "before" else address + size

        def touch_after_fork():
            # The child's own memory: the parent's would not be there at all.
            mine, _ = new(size)
            assert peek(mine) == b"\0"
            die_of_touching(mine + (outside - address), write)

        assert in_child(touch_after_fork).signal == signal.SIGSEGV
    finally:
        lib.pye_secmem_free(ffi.cast("void *", address), size)


def test_PRC_06_a_forked_child_does_not_have_the_pages(in_child):
    """Ordinary memory is inherited; secret memory is gone."""
    ordinary = ctypes.create_string_buffer(b"inherited")
    address, _ = new(PAGE)
    ctypes.memmove(address, b"secret", 6)
    try:
        assert in_child(ordinary.value.decode).result() == "inherited"
        assert in_child(die_of_touching, address, False).signal == signal.SIGSEGV
        assert in_child(die_of_touching, address, True).signal == signal.SIGSEGV
        assert peek(address, 6) == b"secret"
    finally:
        lib.pye_secmem_free(ffi.cast("void *", address), PAGE)


def test_PRC_06_a_forked_child_gets_a_typed_error_and_may_close(in_child):
    memory = SecretMemory(PAGE)
    memory.write(0, b"parent")

    def use() -> list[str]:
        seen = []
        for act in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
            try:
                act()
            except errors.EnclaveStateError as error:
                seen.append(str(error))
        memory.close()
        return seen

    seen = in_child(use).result()
    assert len(seen) == 2
    assert all("PYE_E_FORKED" in text for text in seen)
    assert memory.read(0, 6) == b"parent"
    memory.close()


def test_closing_in_a_child_spares_what_the_child_mapped_there(in_child):
    """The hole that MADV_DONTFORK leaves may hold another mapping by then."""
    size = 16 * PAGE
    address, _ = new(size)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def use() -> str:
        there = libc.mmap(address, size, 3, 0x22 | 0x10, -1, 0)  # private, anonymous, fixed
        assert there == address
        ctypes.memmove(there, b"mine", 4)
        lib.pye_secmem_free(ffi.cast("void *", address), size)
        return peek(there, 4).decode()

    assert in_child(use).result() == "mine"
    lib.pye_secmem_free(ffi.cast("void *", address), size)


def test_live_tells_the_creator_from_a_child(in_child):
    address, _ = new(1)
    pointer = ffi.cast("void *", address)
    assert lib.pye_secmem_live(pointer) == 1
    assert in_child(lambda: lib.pye_secmem_live(pointer)).result() == 0
    lib.pye_secmem_free(pointer, 1)


def test_many_of_them_leave_nothing_mapped():
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    SecretMemory(PAGE).close()
    before = mappings()
    for _ in range(300):
        SecretMemory(3 * PAGE).close()
    assert mappings() <= before + 2


def test_the_lock_limit_is_the_one_of_the_system():
    soft, hard = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    assert lib.pye_secmem_limit(soft, hard) == lib.PYE_OK
    want = [
        2**64 - 1 if value == resource.RLIM_INFINITY else value
        for value in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    ]
    assert [soft[0], hard[0]] == want
