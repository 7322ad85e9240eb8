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
    blob = secrets.protect(b"a key to keep", b"tokens")
    assert b"a key to keep" not in blob
    assert blob != secrets.protect(b"a key to keep", b"tokens")
    assert Secrets(tmp_path / "s").open(blob, b"tokens") == b"a key to keep"
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
    # Who had it open looks at the file again: for a blob that he does not know, and to protect.
    assert before.open(new, b"") == b"new"
    other = Secrets(tmp_path / "s")
    secrets.rotate()
    assert other.is_newest(other.protect(b"", b""))
    assert secrets.ids == other.ids
    assert not other.is_newest(new)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_two_that_rotate_at_once_lose_no_key(tmp_path: Path) -> None:
    """Each reads the file before it writes: a key that was put there meanwhile stays."""
    first, second = Secrets(tmp_path / "s"), Secrets(tmp_path / "s")
    blobs = []
    for secrets in (first, second, first, second):
        secrets.rotate()
        blobs.append(secrets.protect(b"x", b""))
    assert len(Secrets(tmp_path / "s").ids) == 5
    for blob in blobs:
        assert (first.open(blob, b""), second.open(blob, b"")) == (b"x", b"x")


def test_a_key_that_is_forgotten_is_gone_for_everybody(tmp_path: Path) -> None:
    secrets, other = Secrets(tmp_path / "s"), Secrets(tmp_path / "s")
    old = secrets.protect(b"old", b"")
    (first,) = secrets.ids
    with pytest.raises(StorageError, match="another newest key"):
        secrets.forget([first], newest=first)
    secrets.rotate()
    newest = secrets.ids[0]
    other.rotate()
    with pytest.raises(StorageError, match="another newest key"):
        secrets.forget([first], newest=newest)  # the other one's was not looked at
    assert secrets.open(old, b"") == b"old"
    left = tmp_path / f".s.{'0' * 16}"
    left.write_bytes(b"keys of a process that was killed while it wrote")
    (tmp_path / ".s.backup").write_bytes(b"somebody's")
    newest, *older = other.ids
    secrets.forget(older, newest=newest)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".s.backup", "s"]
    for each in (secrets, Secrets(tmp_path / "s")):
        with pytest.raises(UnsealError, match="of another service key"):
            each.open(old, b"")
    assert other.protect(b"", b"")[8:16] == newest
    with pytest.raises(UnsealError, match="of another service key"):
        other.open(old, b"")


def test_a_file_that_went_away_costs_a_running_process_nothing(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "s")
    blob = secrets.protect(b"x", b"")
    for damage in (lambda file: file.write_bytes(b"no secrets"), Path.unlink):
        damage(tmp_path / "s")
        assert secrets.open(secrets.protect(b"y", b""), b"") == b"y"
        assert secrets.open(blob, b"") == b"x"
        with pytest.raises(StorageError):
            secrets.rotate()


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
