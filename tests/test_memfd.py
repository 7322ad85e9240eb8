"""Memory files are sealed even while the kernel holds on to one of their pages for a while."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator

import pytest

from pyenclave import _memfd
from pyenclave._worker import importer

PAGE = 4096


@pytest.fixture
def memfd() -> Iterator[int]:
    """One of a page."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, bytes(PAGE))
    yield fd
    os.close(fd)


@pytest.fixture
def held(memfd: int) -> Callable[[], None]:
    """The page is held by a pipe that it was spliced into, until what this returns is called."""
    reader, writer = os.pipe()
    assert os.splice(memfd, writer, PAGE, offset_src=0) == PAGE
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _memfd.ALL_SEALS)

    def let_go() -> None:
        os.close(reader)
        os.close(writer)

    return let_go


def in_the_worker(fd: int) -> None:
    importer.Locked(b"", b"")._seal(fd)


@pytest.mark.parametrize("seal", [_memfd.seal, in_the_worker])
def test_a_page_that_is_held_for_longer_than_the_kernel_waits(
    memfd: int, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch, seal: Callable[..., None]
) -> None:
    """It is let go once sealing was refused: by the first sleep before another try."""
    let_go = [held]

    def sleep(_seconds: float) -> None:
        if let_go:
            let_go.pop()()

    monkeypatch.setattr("time.sleep", sleep)
    seal(memfd)
    assert not let_go
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == _memfd.ALL_SEALS
    with pytest.raises(PermissionError):
        os.write(memfd, b"a")


@pytest.mark.parametrize("seal", [_memfd.seal, in_the_worker])
def test_patience_ends(
    memfd: int, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch, seal: Callable[..., None]
) -> None:
    monkeypatch.setattr(_memfd, "_PATIENCE", 0.2)
    monkeypatch.setattr(importer, "_PATIENCE", 0.2)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        seal(memfd)
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == 0
    held()


@pytest.mark.parametrize("seal", [_memfd.seal, in_the_worker])
def test_other_refusals_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, seal: Callable[..., None]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: pytest.fail("waits"))
    fd = os.memfd_create("test", os.MFD_CLOEXEC)  # sealed against seals
    try:
        with pytest.raises(PermissionError):
            seal(fd)
    finally:
        os.close(fd)


def test_a_sealed_copy_has_all_bytes_and_no_descriptor_stays_after_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = os.urandom(3 * PAGE + 1)
    fd = _memfd.sealed("test", data)
    assert os.pread(fd, len(data) + 1, 0) == data
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _memfd.ALL_SEALS == _memfd.ALL_SEALS
    os.close(fd)

    def refuse(fd: int) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), fd)

    monkeypatch.setattr(_memfd, "seal", refuse)
    with pytest.raises(OSError, match="busy") as caught:
        _memfd.sealed("test", data)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(int(caught.value.filename))


def test_a_file_that_is_not_to_be_run_cannot_be() -> None:
    fd = _memfd.sealed("test", b"#!/bin/true\n", executable=False)
    try:
        mode = os.fstat(fd).st_mode
        if mode & 0o111:
            pytest.skip("MFD_NOEXEC_SEAL came with Linux 6.3")
        with pytest.raises(PermissionError):
            os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
