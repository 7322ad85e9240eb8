"""The file that protects keys in a database."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pyenclave.errors import StorageError, UnsealError
from pyenclave.services.storage import Secrets


def test_what_is_protected_opens_for_the_same_use_only(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "s")
    blob = secrets.protect(b"key", b"tokens")
    assert b"key" not in blob
    assert blob != secrets.protect(b"key", b"tokens")
    assert Secrets(tmp_path / "s").open(blob, b"tokens") == b"key"
    with pytest.raises(UnsealError, match="another use"):
        secrets.open(blob, b"token")


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "s")
    blob = secrets.protect(b"key", b"")
    for at in range(len(blob)):
        wrong = bytearray(blob)
        wrong[at] ^= 1
        with pytest.raises(UnsealError):
            secrets.open(bytes(wrong), b"")
    for length in range(len(blob)):
        with pytest.raises(UnsealError):
            secrets.open(blob[:length], b"")


def test_other_secrets_say_whose_blob_it_is(tmp_path: Path) -> None:
    blob = Secrets(tmp_path / "a").protect(b"key", b"")
    with pytest.raises(UnsealError, match="of another service key"):
        Secrets.ephemeral().open(blob, b"")


def test_rotation_keeps_older_blobs_readable(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "s")
    old = secrets.protect(b"old", b"")
    before = Secrets(tmp_path / "s")
    secrets.rotate()
    new = secrets.protect(b"new", b"")
    again = Secrets(tmp_path / "s")
    assert (again.open(old, b""), again.open(new, b"")) == (b"old", b"new")
    with pytest.raises(UnsealError):
        before.open(new, b"")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_the_file_is_for_its_owner_and_no_link(tmp_path: Path) -> None:
    file = tmp_path / "s"
    old = os.umask(0)
    try:
        Secrets(file)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o604)
    with pytest.raises(StorageError, match=r"open to others.*0604"):
        Secrets(file)
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(StorageError, match="cannot be read"):
        Secrets(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(StorageError, match="no ordinary file"):
        Secrets(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"pyenclave-secrets 1",
        b"pyenclave-secrets 1\n00\n",
        b"pyenclave-secrets 2\n" + b"a" * 64,
    ],
)
def test_a_malformed_file_is_refused_and_never_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(StorageError, match="malformed"):
        Secrets(file)
    assert file.read_bytes() == content
