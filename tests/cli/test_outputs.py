"""Where commands write: whole or not at all, and never in the place of what is no file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyenclave.cli
from pyenclave.cli import _tool, main
from pyenclave.image import build, keygen, sign
from pyenclave.image.build import write_image

PLACE = Path(pyenclave.cli.__file__).resolve().parents[2]
SCRIPT = """
import pyenclave

{more}
@pyenclave.ecall
def greet(name: str) -> str:
    return "hail " + name
"""

# A file system that is full after so many bytes.
PROGRAM = """
import resource, sys
from pyenclave.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read."""
    folder = tmp_path_factory.mktemp("place")
    script = folder / "hail.py"
    many = "\n".join(
        f"@pyenclave.ecall\ndef number_{i}(value: int) -> int:\n    return value\n"
        for i in range(40)
    )
    script.write_text(SCRIPT.format(more=many))
    image = build.build_script(str(script))
    key = keygen()
    (folder / "key.pem").write_bytes(key)
    (folder / "hail.enclave").write_bytes(sign.sign(image, key))
    rows = [
        {"name": f"row{i}", "value": 1.0, "unit": "ns", "peer": "x", "peer_value": 2.0,
         "ratio": 2.0, "better": "less"}
        for i in range(60)
    ]  # fmt: skip
    kept = {"machine": {}, "results": rows, "when": "", "version": "0"}
    (folder / "run.json").write_text(json.dumps(kept))
    return folder


def audit_log(folder: Path) -> Path:
    """A database with a log."""
    pytest.importorskip("sqlalchemy", reason="audit logs need the extra services")
    from pyenclave.services.audit import Event
    from pyenclave.services.storage import Database, Secrets

    file = folder / "vault.db"
    with Database.open(
        f"sqlite:///{file}", parts=[], secrets=Secrets(folder / "secrets"), checkpoint_rows=100
    ) as db:
        written = []
        for number in range(400):
            event = Event("keys/read", "allowed", caller="bob", resource=f"/keys/{number}")
            written.append(db.submit(lambda tx, event=event: tx.audit(event)))
        for row in written:
            row.result()
    return file


COMMANDS = {
    "policy": ["policy", "from-image", "{}/hail.enclave", "--authority", "https://a.example"],
    "stubs": ["stubs", "{}/hail.enclave"],
    "build": ["build", "{}/hail.py"],
    "sign": ["sign", "{}/hail.enclave", "--key", "{}/key.pem"],
    "keygen": ["keygen"],
    "bench": ["bench", "--from", "{}/run.json"],
}
OPTION = {"bench": "--plot"}
NAMES = {"bench": "out.svg", "stubs": "out.pyi"}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_does_not_fit_leaves_what_was_there(place: Path, tmp_path: Path, command: str) -> None:
    target = tmp_path / NAMES.get(command, "out")
    arguments = [word.format(place) for word in COMMANDS[command]]
    arguments += [OPTION.get(command, "-o"), str(target)]
    there = command != "keygen"  # which replaces nothing
    if there:
        target.write_text("what was there")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "256", *arguments],
        env={**os.environ, "PYTHONPATH": str(PLACE)},
        capture_output=True,
        timeout=120,
        check=False,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"pyenclave: error [unreadable]: File too large: {target}\n"
    assert os.listdir(tmp_path) == ([target.name] if there else [])
    assert not there or target.read_text() == "what was there"


@pytest.mark.parametrize("command", ["export", "prune"])
def test_an_export_that_does_not_fit_is_none(tmp_path: Path, command: str) -> None:
    log = audit_log(tmp_path)
    folder = tmp_path / "to"
    folder.mkdir()
    more = [] if command == "export" else ["--before", "2100-01-01T00:00:00Z"]
    done = subprocess.run(
        [
            sys.executable, "-c", PROGRAM, "40000",  # SQLite itself needs 32 KiB
            "audit", command, "--database", str(log), *more, "-o", str(folder / "log.jsonl"),
        ],
        env={**os.environ, "PYTHONPATH": str(PLACE)},
        capture_output=True,
        timeout=120,
        check=False,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == (f"pyenclave: error [unreadable]: File too large: {folder}/log.jsonl\n")
    assert os.listdir(folder) == []


def test_an_export_replaces_nothing_and_names_what_it_was_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = str(audit_log(tmp_path))
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    there.symlink_to("nowhere")
    for name, why in (
        ("there", "the file exists: there"),
        ("nothing/out", "No such file or directory: nothing/out"),
        ("secrets/", "it names no file: secrets/"),
    ):
        assert main(["audit", "export", "--database", log, "-o", name]) == 2
        assert capsys.readouterr().err == f"pyenclave: error [unreadable]: {why}\n"
    before = sorted(os.listdir(tmp_path))
    assert main(["audit", "export", "--database", log, "--after", "999", "-o", "out"]) == 2
    assert sorted(os.listdir(tmp_path)) == before
    assert main(["audit", "export", "--database", log, "-o", "out"]) == 0
    assert main(["audit", "verify", "--database", "out"]) == 0
    assert stat.S_IMODE(Path("out").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "write", [write_image, lambda path, data: _tool.write_file(path, data, force=True)]
)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "name of an open file", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, write: Any, kind: str) -> None:
    """Root, who writes to /dev/null or /dev/stdout, would end the device for all."""
    path = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/proc/self/exe")
    before = path.lstat()
    with pytest.raises(OSError, match=r"no file that could be replaced|Is a directory") as caught:
        write(path, b"text")
    assert caught.value.filename == str(path)
    now = path.lstat()
    assert (now.st_ino, now.st_mode) == (before.st_ino, before.st_mode)
    assert len(os.listdir(tmp_path)) == (2 if kind == "link to a pipe" else 1)


def test_a_link_to_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    path = tmp_path / "out"
    path.symlink_to("other")
    write_image(path, b"text")
    assert path.read_text() == "text"
    assert (tmp_path / "other").read_text() == "other"


def test_seal_does_not_replace_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("text")
    Path("key").write_bytes(bytes(32))
    Path("key").chmod(0o600)
    os.mkfifo("out")
    assert main(["seal", "text", "--key-file", "key", "-o", "out", "--force"]) == 2
    assert "no file that could be replaced: out" in capsys.readouterr().err
    assert stat.S_ISFIFO(Path("out").stat().st_mode)


def test_an_empty_name_is_not_taken_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else an export goes to the screen, and a benchmark runs for an hour."""
    log = str(audit_log(tmp_path))
    assert main(["audit", "export", "--database", log, "-o", ""]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "it names no file" in told.err
    assert main(["bench", "no_such_row_*", "--from", ""]) == 2
    assert main(["bench", "seal_page", "--from", ""]) == 2
    assert capsys.readouterr().err.endswith("No such file or directory\n")


def test_more_rows_than_there_can_be_are_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(audit_log(tmp_path))
    assert main(["audit", "show", "--database", log, "--last", str(10**30)]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 400
