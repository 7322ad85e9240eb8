"""Images that a host sends again: which memory file may stand for which bytes."""

from __future__ import annotations

import hashlib
import os

import pytest

from pyenclave._memfd import sealed as sealed_memfd
from pyenclave._platform.held import HeldImages


@pytest.fixture
def held():
    found = HeldImages()
    yield found
    found.close()


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture
def query(held):
    """Skip where the kernel does not say whether two descriptors are one open file."""
    fd = sealed_memfd("a", b"a")
    held.add(fd, digest(b"a"), 1)
    known = held.find(fd)
    os.close(fd)
    if not known:
        pytest.skip("F_DUPFD_QUERY came with Linux 6.10")


def test_equal_bytes_in_another_file_are_not_recognised(held) -> None:
    """Only the hash says what they are."""
    first, second = sealed_memfd("a", b"bytes"), sealed_memfd("a", b"bytes")
    held.add(first, digest(b"bytes"), 5)
    assert held.find(second) == b""
    os.close(first)
    os.close(second)


def test_a_file_opened_anew_is_not_recognised(held) -> None:
    """One inode, but another open file: hashed again."""
    first = sealed_memfd("a", b"bytes")
    second = os.open(f"/proc/self/fd/{first}", os.O_RDONLY)
    held.add(first, digest(b"bytes"), 5)
    assert held.find(second) == b""
    os.close(first)
    os.close(second)


def test_a_number_that_is_used_again_is_not_recognised(held) -> None:
    first = sealed_memfd("a", b"first")
    held.add(first, digest(b"first"), 5)
    os.close(first)
    second = sealed_memfd("a", b"other")
    assert second == first
    assert held.find(second) == b""
    os.close(second)


@pytest.mark.usefixtures("query")
def test_the_same_open_file_is_recognised(held) -> None:
    fd = sealed_memfd("a", b"bytes")
    held.add(fd, digest(b"bytes"), 5)
    copy = os.dup(fd)
    os.close(fd)
    assert held.find(copy) == digest(b"bytes")
    os.close(copy)


def test_few_files_are_held_and_large_ones_are_not(held) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        fd = sealed_memfd("a", bytes([n]))
        held.add(fd, digest(bytes([n])), 1)
        held.add(fd, b"x" * 32, 1 << 40)
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before + 4
    held.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_descriptor_to_be_had_nothing_is_held_and_nothing_is_lost(
    held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An enclave was launched of it: that must not fail afterwards."""
    fd = sealed_memfd("a", b"bytes")

    def refuse(_fd: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", refuse)
        held.add(fd, digest(b"bytes"), 5)
    assert held.find(fd) == b""
    os.close(fd)
