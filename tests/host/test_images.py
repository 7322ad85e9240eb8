"""Images that a process launched before, and what must never be taken for one of them."""

from __future__ import annotations

import fcntl
import os

import pytest

from pyenclave.errors import ImageError
from pyenclave.formats.image import FileEntry, ImageInfo, assemble
from pyenclave.formats.lock import Lock, LockedFile, LockedModule
from pyenclave.host import _images

LOCK = Lock(
    python="cpython-3.11.7 x86_64-linux-gnu",
    bootstrap=(LockedFile(path="base:bin/python", sha256="0" * 64),),
    modules=(LockedModule(name="a", kind="module", path="stdlib:a.py", sha256="1" * 64, needs=()),),
    libraries=(),
    preload=(),
)


def image(source: bytes = b"pass\n", name: str = "a") -> bytes:
    info = ImageInfo(
        name=name,
        product_id=1,
        security_version=2,
        debug=True,
        threads=1,
        entry_kind="python",
        entry_module="entry",
        entry_file="entry/entry.py",
        functions=(),
        sealed_memory=0,
        message_limit=4096,
        ocalls=(),
        blas_threads=1,
        jit=False,
        seal={},
        files=(FileEntry(name="entry/entry.py", size=len(source), executable=True),),
    )
    return assemble(info, LOCK, {"entry/entry.py": source})


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(_images, "_kept", [])


def test_an_image_with_one_other_byte_is_not_the_one_that_is_known() -> None:
    data = image()
    _images.prepare(data)
    for place in (0, 4096, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(ImageError):
            _images.prepare(bytes(changed))


def test_a_prefix_of_a_known_image_is_refused() -> None:
    data = image()
    _images.prepare(data)
    with pytest.raises(ImageError):
        _images.prepare(data[:-1])


def test_nobody_can_change_the_copy_that_launches_share() -> None:
    found = _images.prepare(image())
    with pytest.raises(PermissionError):
        os.pwrite(found.fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(found.fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(found.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.pread(found.fd, len(found.data) + 1, 0) == found.data


def test_equal_bytes_are_read_once_and_others_again() -> None:
    data = image()
    first = _images.prepare(data)
    assert _images.prepare(data) is first
    assert _images.prepare(bytes(bytearray(data))) is first
    assert _images.prepare(image(name="b")) is not first


def test_what_was_not_used_for_long_is_given_back() -> None:
    first = _images.prepare(image())
    number = first.fd
    for name in "bcde":
        _images.prepare(image(name=name))
    assert len(_images._kept) == 4
    os.fstat(number)  # a launch that still uses it loses nothing
    del first
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
