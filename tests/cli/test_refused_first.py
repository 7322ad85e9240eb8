"""What cannot work is refused before a command builds, launches or asks anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pyenclave.cli import _tool, main
from pyenclave.cli._targets import check_target
from pyenclave.host import Enclave


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files, in a process in which nothing that takes long can be done."""
    work: list[str] = []

    def worked(*_: object, **__: object) -> Any:
        work.append("work")
        raise AssertionError("it worked before it looked")

    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_tool, "_image", worked)
    monkeypatch.setattr(Enclave, "start", worked)
    monkeypatch.setattr("pyenclave.image.build.build", worked)
    monkeypatch.setattr("pyenclave.image.build.build_script", worked)
    monkeypatch.setattr("pyenclave.providers.obtain", worked)
    monkeypatch.setattr("pyenclave.collateral.plan.fetch_sync", worked)
    monkeypatch.setattr("pyenclave.cli._vault_sealers.opened_key", worked)
    monkeypatch.setattr("pyenclave.cli.audit.check", worked)
    (tmp_path / "there").write_bytes(b"data")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"data")
    (tmp_path / "entry.py").write_text("")
    return tmp_path


NOWHERE = os.path.join("nowhere", "file")
REFUSED = {
    "evidence: no folder": (["evidence", "-o", NOWHERE], "no such directory"),
    "evidence: a folder": (["evidence", "-o", "folder"], "a directory"),
    "evidence: it is there": (["evidence", "-o", "there"], "--force"),
    "evidence: root": (["evidence", "-o", "new", "--root-out", NOWHERE], "no such directory"),
    "evidence: root there": (["evidence", "-o", "new", "--root-out", "there"], "--force"),
    "evidence: twice": (["evidence", "-o", "new", "--root-out", "new"], "the same file"),
    "evidence: nonce": (["evidence", "-o", "new", "--nonce", "00" * 1025], "1024"),
    "evidence: files": (["evidence", "-o", "new", "--endorsements", "there"], "no directory"),
    "reseal: no file": (["reseal", "missing"], "missing"),
    "reseal: no sealed file": (["reseal", "there"], "no sealed"),
    "reseal: no key": (["reseal", "sealed", "--new-signing-key", "missing"], "missing"),
    "reseal: a wrong key": (["reseal", "sealed", "--signing-key", "there"], "key"),
    "reseal: jobs": (["reseal", "folder", "--jobs", "0"], "--jobs 0"),
    "reseal: one key": (["reseal", "sealed", "--key-file", "there"], "go together"),
    "seal: no folder": (["seal", "there", "-o", NOWHERE], "no such directory"),
    "seal: jobs": (["seal", "folder", "--jobs", "-1"], "--jobs -1"),
    "seal: a file": (["seal", "folder", "-o", "there"], "no folder"),
    "seal: within": (["seal", "folder", "-o", "folder/x"], "within"),
    "unseal: no folder": (["unseal", "sealed", "-o", NOWHERE], "no such directory"),
    "unseal: jobs": (["unseal", "sealed", "-o", "new", "--jobs", "0"], "--jobs 0"),
    "unseal: a file": (["unseal", "folder", "-o", "there"], "no folder"),
    "encrypt: no folder": (["encrypt", "there", "--key", "K", "-o", NOWHERE], "no such directory"),
    "encrypt: rewrap": (["encrypt", "there", "--key", "K", "--rewrap"], "not encrypted"),
    "encrypt: rewrap jobs": (
        ["encrypt", "folder", "--key", "K", "--rewrap", "--jobs", "0"],
        "--jobs 0",
    ),
    "build: no folder": (["build", "entry.py", "-o", NOWHERE], "no such directory"),
    "build: lock": (["build", "entry.py", "--write-lock", NOWHERE], "no such directory"),
    "build: key": (["build", "entry.py", "--data-key-file", NOWHERE], "no such directory"),
    "build: a folder": (["build", "entry.py", "-o", "folder"], "a directory"),
    "run: timeout": (["run", "entry.py", "f", "--timeout", "nan"], "timeout"),
    "run: negative": (["run", "entry.py", "f", "--timeout=-1"], "timeout"),
    "collateral: no folder": (["collateral", "fetch", "there", "-o", NOWHERE], "no such directory"),
    "prune: it is there": (
        [
            "audit",
            "prune",
            "--database",
            "there",
            "--before",
            "2020-01-01T00:00:00Z",
            "-o",
            "there",
        ],
        "exists",
    ),
    "prune: no folder": (
        [
            "audit",
            "prune",
            "--database",
            "there",
            "--before",
            "2020-01-01T00:00:00Z",
            "-o",
            NOWHERE,
        ],
        "no such directory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_first(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments, told = REFUSED[name]
    golden = Path(__file__).parents[1] / "golden" / "data.wrapped-file"
    (place / "sealed").write_bytes(golden.read_bytes())
    before = sorted(os.listdir(place))
    assert main([*arguments, "--json"]) in (1, 2)
    out = capsys.readouterr().out
    assert told in json.loads(out)["error"]["message"]
    assert sorted(os.listdir(place)) == before


def test_a_key_from_a_pipe_is_read_once(place: Path) -> None:
    """As a shell gives it by ``<(…)``: what was looked at would be gone when it is used."""
    read, write = os.pipe()
    try:
        os.write(write, b"key")
        os.close(write)
        _tool.check_key(f"/dev/fd/{read}")
        assert os.read(read, 10) == b"key"
    finally:
        os.close(read)


def test_a_file_that_may_only_be_read_is_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another file afterwards; whether its folder may be written is what counts."""
    there = place / "there"
    there.chmod(0o400)
    # Who is root may write it anyway.
    allowed = lambda path, _: bool(os.stat(path).st_mode & 0o200)  # noqa: E731
    monkeypatch.setattr(os, "access", allowed)
    assert check_target("there") == Path("there")
    place.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            check_target("there")
    finally:
        place.chmod(0o700)
