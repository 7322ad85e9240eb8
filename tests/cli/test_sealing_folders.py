"""Files and folders sealed with a key file: ``pyenclave seal``, ``unseal`` and ``reseal``."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest

import pyenclave
from pyenclave import cli
from pyenclave.cli import _folders, _place, _sealers, _tree
from pyenclave.cli._bar import Bar
from pyenclave.errors import ArgumentError


def run(capsys, *arguments: object) -> tuple[int, dict]:
    code = cli.main([*map(str, arguments), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0])


def new_key(path: Path) -> Path:
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    return path


@pytest.fixture
def key(tmp_path, monkeypatch):
    monkeypatch.setattr("pyenclave.cli._tool.tool_enclave", None)  # nothing here launches one
    monkeypatch.chdir(tmp_path)
    return new_key(tmp_path / "key")


@pytest.fixture
def plain(tmp_path):
    folder = tmp_path / "plain"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "a" / "one").write_bytes(b"planted secret one " * 3000)
    (folder / "a" / "two").write_bytes(b"planted secret two " * 3000)
    (folder / "a" / "b" / "run.sh").write_bytes(b"#!/bin/sh\n")
    (folder / "a" / "b" / "run.sh").chmod(0o755)
    (folder / "nothing").write_bytes(b"")
    (folder / os.fsdecode(b"na\xffme\n.sealed")).write_bytes(b"odd")
    return folder


@pytest.fixture
def sealed(plain, key, capsys):
    code, report = run(capsys, "seal", plain, "--key-file", key)
    assert (code, report["done"], report["failed"]) == (0, 5, [])
    return plain.with_name("plain.sealed")


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_folder_comes_back_as_it_was(plain, sealed, key, capsys):
    assert b"planted secret" not in b"".join(
        path.read_bytes() for path in sealed.rglob("*") if path.is_file()
    )
    code, report = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)
    assert (code, report["done"]) == (0, 5)
    assert content(Path("back")) == content(plain)
    assert stat.S_IMODE(Path("back/a/b/run.sh").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path("back/a/one").stat().st_mode) == 0o600


def test_a_file_sealed_with_a_key_is_an_ordinary_sealed_file(sealed, key):
    """What the command makes opens in Python, and the other way round."""
    with pyenclave.open_sealed(sealed / "a" / "one.sealed", key=key.read_bytes()) as file:
        assert file.read() == b"planted secret one " * 3000


def test_sealing_goes_on_where_it_stopped_and_verifies_what_is_there(plain, sealed, key, capsys):
    """A part that is finished is compared, one that is missing or by half is done."""
    (sealed / "a" / "one.sealed").unlink()
    (sealed / "a" / ".two.sealed.part").write_bytes(b"by half")
    (sealed / _folders.LIST).unlink()
    code, report = run(capsys, "seal", plain, "--key-file", key)
    assert (code, report["done"], report["verified"]) == (0, 1, 4)
    (plain / "a" / "two").write_bytes(b"changed since")
    code, report = run(capsys, "seal", plain, "--key-file", key)
    assert (code, report["done"], report["verified"]) == (2, 0, 4)
    assert "--force" in report["failed"][0]["message"]
    code, report = run(capsys, "seal", plain, "--key-file", key, "--force")
    assert (code, report["done"], report["verified"]) == (0, 1, 4)
    assert run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)[0] == 0
    assert content(Path("back")) == content(plain)


def test_an_interrupted_folder_is_not_taken_for_a_whole_one(plain, sealed, key, capsys):
    (sealed / _folders.LIST).unlink()
    code, document = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)
    assert code == 1
    assert "no list" in document["error"]["message"]
    code, report = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key, "--no-list")
    assert (code, report["done"]) == (0, 5)


def test_opening_goes_on_where_it_stopped(sealed, key, capsys):
    for _ in range(2):
        code, report = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)
        assert code == 0
    assert (report["done"], report["verified"]) == (0, 5)
    Path("back/a/one").write_bytes(b"mine")
    code, report = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)
    assert code == 2
    assert Path("back/a/one").read_bytes() == b"mine"


def test_files_exchanged_removed_added_or_changed_are_found(sealed, key, capsys):
    one, two = sealed / "a" / "one.sealed", sealed / "a" / "two.sealed"
    kept = one.read_bytes(), two.read_bytes()
    changed = bytes([kept[0][20000] ^ 1])
    cases = {
        "exchanged": lambda: (one.write_bytes(kept[1]), two.write_bytes(kept[0])),
        "removed": one.unlink,
        "added": lambda: (sealed / "three.sealed").write_bytes(kept[0]),
        "cut": lambda: one.write_bytes(kept[0][:-4096]),
        "changed": lambda: one.write_bytes(kept[0][:20000] + changed + kept[0][20001:]),
    }
    for number, (name, attack) in enumerate(cases.items()):
        attack()
        target = f"back{number}"
        code, report = run(capsys, "unseal", sealed, "-o", target, "--key-file", key)
        assert code == 1, name
        assert {item["code"] for item in report["failed"]} == {"sealing.unseal"}, name
        for item in report["failed"]:
            assert not Path(target, item["file"].removesuffix(".sealed")).exists(), name
        one.write_bytes(kept[0])
        two.write_bytes(kept[1])
        (sealed / "three.sealed").unlink(missing_ok=True)
    assert run(capsys, "unseal", sealed, "-o", "good", "--key-file", key)[0] == 0


def test_a_sealed_file_is_not_taken_for_the_list(plain, sealed, key, capsys):
    """Whoever gets a text of their own sealed cannot make a list of it."""
    (plain / "forged").write_text('{"version":1,"files":{},"folders":[]}')
    assert run(capsys, "seal", plain, "--key-file", key)[0] == 0
    (sealed / "forged.sealed").replace(sealed / _folders.LIST)
    code, document = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)
    assert (code, document["error"]["code"]) == (1, "sealing.unseal")


def test_a_name_is_bound(plain, key, capsys):
    seal = ("seal", plain, "--key-file", key, "-o", "s", "--name", "july")
    assert run(capsys, *seal)[0] == 0
    for wrong in ((), ("--name", "june")):
        assert run(capsys, "unseal", "s", "-o", "back", "--key-file", key, *wrong)[0] == 1
    assert run(capsys, "unseal", "s", "-o", "back", "--key-file", key, "--name", "july")[0] == 0


@pytest.mark.parametrize("kind", ["link out", "link in", "fifo", "dangling"])
def test_links_and_special_files_are_refused_or_left_out_by_name(plain, key, capsys, kind):
    Path("outside").write_bytes(b"not to be sealed")
    odd = plain / "a" / "odd"
    if kind == "fifo":
        os.mkfifo(odd)
    else:
        odd.symlink_to({"link out": "../../outside", "link in": "one"}.get(kind, "nowhere"))
    code, document = run(capsys, "seal", plain, "--key-file", key)
    assert (code, document["error"]["code"]) == (2, "call.argument")
    assert "a/odd" in document["error"]["message"]
    assert not Path("plain.sealed").exists()
    code, report = run(capsys, "seal", plain, "--key-file", key, "--skip-special")
    assert (code, report["left_out"]) == (0, ["a/odd"])
    assert not list(Path("plain.sealed").rglob("odd*"))


def test_nothing_is_written_or_read_through_a_link(plain, sealed, key, capsys):
    """A folder of the target that somebody made a link leads nowhere."""
    outside = Path("elsewhere")
    outside.mkdir()
    Path("back").mkdir()
    Path("back/a").symlink_to(outside.resolve())
    code, _ = run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)
    assert code == 2
    assert list(outside.iterdir()) == []
    (sealed / "a" / "one.sealed").rename("moved")
    (sealed / "a" / "one.sealed").symlink_to(Path("moved").resolve())
    code, _ = run(capsys, "unseal", sealed, "-o", "other", "--key-file", key)
    assert code == 1  # on the list, and not there
    assert not Path("other/a/one").exists()


def test_a_file_replaced_by_a_fifo_does_not_hang(plain):
    with _tree.Tree(str(plain)) as tree:
        os.mkfifo(plain / "pipe")
        with pytest.raises(ArgumentError, match="regular"):
            tree.open("pipe")
        for path in ("../key", "/etc/passwd", "a/../../key", "", "a//one", "."):
            with pytest.raises(ArgumentError):
                tree.open(path)


def test_a_failed_write_leaves_no_trace(plain, key, capsys):
    """Disk full, in the middle: the final name is not there, nor a part, and the rest is done."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # EFBIG, as ENOSPC would be
    try:
        code, report = run(capsys, "seal", plain, "--key-file", key)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert sorted(item["file"] for item in report["failed"]) == ["a/one", "a/two"]
    names = {path.name for path in Path("plain.sealed").rglob("*") if path.is_file()}
    assert names == {"nothing.sealed", "run.sh.sealed", "na\udcffme\n.sealed.sealed"}
    code, report = run(capsys, "seal", plain, "--key-file", key)
    assert (code, report["done"], report["verified"]) == (0, 2, 3)


def test_an_interruption_leaves_no_half_file(plain, key, capsys, monkeypatch):
    def interrupt(self, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "next", interrupt)
        code, document = run(capsys, "seal", plain, "--key-file", key)
    assert (code, document["error"]["code"]) == (2, "interrupted")
    assert not [path for path in Path("plain.sealed").rglob("*") if path.is_file()]


def test_a_file_changed_meanwhile_is_not_sealed(plain, key):
    sealer = _sealers.KeySealer(_sealers.HeldKey(key.read_bytes()), b"")
    source = os.open(plain / "a" / "one", os.O_RDWR)

    def change(count):
        os.pwrite(source, b"!", 0)
        os.utime(plain / "a" / "one", ns=(1, 1))

    with (
        _tree.Tree(str(plain)) as tree,
        tree.folder("") as folder,
        pytest.raises(ArgumentError, match="changed"),
    ):
        _place.seal_to(sealer, source, folder, "x", force=False, tick=change)
    os.close(source)
    assert not list(plain.glob("*x*"))


def test_two_commands_do_not_write_to_one_folder(plain, sealed, key, capsys):
    other = os.open(sealed, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    code, document = run(capsys, "seal", plain, "--key-file", key)
    os.close(other)
    assert (code, document["error"]["code"]) == (2, "call.argument")


def test_wrong_use_is_told(plain, sealed, key, capsys):
    Path("short").write_bytes(bytes(31))
    Path("long").write_bytes(bytes(33))
    Path("file").write_bytes(b"x")
    for arguments in (
        ("seal", plain, "--key-file", "short"),
        ("seal", plain, "--key-file", "long"),
        ("seal", plain, "--key-file", "/dev/zero"),
        ("seal", plain, "--key-file", "missing"),
        ("seal", plain, "--key-file", key, "--policy", "unique"),
        ("seal", plain, "--key-file", key, "--jobs", "0"),
        ("seal", plain, "--key-file", key, "-o", plain / "inside"),
        ("seal", "missing", "--key-file", key),
        ("unseal", "file", "--key-file", key),
        ("unseal", sealed, "-o", "-", "--key-file", key),
        ("reseal", sealed, "--key-file", key),
        ("reseal", sealed, "--image", "x"),
        ("info", "file"),
    ):
        code, document = run(capsys, *arguments)
        assert code == (1 if arguments[:2] == ("unseal", "file") else 2), arguments
        assert document["error"]["message"]


def test_a_file_sealed_with_a_key_is_not_asked_of_the_enclave(sealed, capsys):
    code, document = run(capsys, "unseal", sealed / "a" / "one.sealed", "-o", "x")
    assert code == 1
    assert "--key-file" in document["error"]["message"]


def test_info_shows_the_header_of_a_sealed_file(sealed, capsys):
    code, document = run(capsys, "info", sealed / "a" / "one.sealed")
    assert code == 0
    assert document["form"] == "sealed file"
    assert (document["length"], document["generation"], document["verified"]) == (57000, 1, False)
    assert (document["page_size"], len(document["file_id"])) == (4096, 32)


# ---- reseal ------------------------------------------------------------------------------------


def reseal(capsys, folder, key, other):
    return run(capsys, "reseal", folder, "--key-file", key, "--new-key-file", other)


def test_a_folder_gets_another_key(plain, sealed, key, capsys):
    other = new_key(Path("other"))
    before = {path: run(capsys, "info", path)[1]["file_id"] for path in sealed.rglob("*.sealed")}
    code, report = reseal(capsys, sealed, key, other)
    assert (code, report["done"]) == (0, 5)
    assert before == {p: run(capsys, "info", p)[1]["file_id"] for p in sealed.rglob("*.sealed")}
    assert run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)[0] == 1
    assert run(capsys, "unseal", sealed, "-o", "back", "--key-file", other)[0] == 0
    assert content(Path("back")) == content(plain)
    code, report = reseal(capsys, sealed, key, other)
    assert (code, report["done"], report["verified"]) == (0, 0, 5)


@pytest.mark.parametrize("after", range(5))
def test_resealing_that_stops_anywhere_goes_on(plain, sealed, key, capsys, monkeypatch, after):
    """Each file is under the old key or the new one, and running it again ends it."""
    other = new_key(Path("other"))
    real, done = _sealers.KeySealer.copy, 0

    def stop(self, *arguments, **options):
        nonlocal done
        if done == after:
            raise KeyboardInterrupt
        done += 1
        real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(_sealers.KeySealer, "copy", stop)
        code = reseal(capsys, sealed, key, other)[0]
        assert code == 2
    for path in plain.rglob("*"):
        if path.is_file():
            file = sealed / f"{path.relative_to(plain)}.sealed"
            opened = []
            for one in (key, other):
                try:
                    with pyenclave.open_sealed(file, key=one.read_bytes()) as data:
                        opened.append(data.read())
                except pyenclave.errors.UnsealError:
                    continue
            assert opened == [path.read_bytes()]
    code, report = reseal(capsys, sealed, key, other)
    assert (code, report["done"] + report["verified"]) == (0, 5)
    assert run(capsys, "unseal", sealed, "-o", "back", "--key-file", other)[0] == 0
    assert content(Path("back")) == content(plain)


def test_what_opens_under_neither_key_is_left_as_it_is(sealed, key, capsys):
    before = (sealed / "a" / "one.sealed").read_bytes()
    code, report = reseal(capsys, sealed, new_key(Path("x")), new_key(Path("y")))
    assert (code, report["done"], len(report["failed"])) == (1, 0, 5)
    assert (sealed / "a" / "one.sealed").read_bytes() == before


# ---- progress ----------------------------------------------------------------------------------


def test_progress_is_for_terminals_only(plain, key, capsys, monkeypatch):
    monkeypatch.setattr("pyenclave.cli._bar._EVERY", 0.0)
    cli.main(["seal", str(plain), "--key-file", str(key)])
    assert "%" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "250")
    cli.main(["unseal", "plain.sealed", "-o", "back", "--key-file", str(key)])
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert "a/one" in shown.err
    assert "na\\udcffme\\n" in shown.err
    assert "%" not in shown.out


def test_no_file_of_the_users_is_taken_for_a_temporary_one(tmp_path, key, capsys):
    """A folder may hold ``x`` and ``.x.part``, as downloads do, and names alike for 200 letters."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    names = ["x", ".x.part", ".x.sealed.part", "n" * 200 + "a", "n" * 200 + "b"]
    for name in names:
        (folder / name).write_bytes(name.encode() * 1000)
    assert run(capsys, "seal", folder, "--key-file", key)[0] == 0
    for extra in ((), ("--force",)):
        arguments = ("unseal", "downloads.sealed", "-o", "back", "--key-file", key, *extra)
        assert run(capsys, *arguments)[0] == 0
        assert content(Path("back")) == content(folder)
    Path(".x.sealed.part").write_bytes(b"mine")
    assert run(capsys, "seal", folder / "x", "-o", "x.sealed", "--key-file", key)[0] == 0
    assert Path(".x.sealed.part").read_bytes() == b"mine"


def test_two_writers_of_one_name_never_share_a_temporary_file(tmp_path):
    """Neither puts what the other has half written into its place."""
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with _place.aside(folder, "out", force=True) as first:
            with _place.aside(folder, "out", force=True) as second:
                _place.write_all(first, b"the first, whole")
                _place.write_all(second, b"by half")
            assert (tmp_path / "out").read_bytes() == b"by half"
        assert (tmp_path / "out").read_bytes() == b"the first, whole"
        assert os.listdir(tmp_path) == ["out"]
    finally:
        os.close(folder)


def test_what_a_killed_command_left_behind_is_removed(plain, sealed, key, capsys):
    left = f".pyenclave-{'0' * 32}.part"
    for place in (sealed / "a" / left, Path("back") / left):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"planted secret by half")
    assert run(capsys, "seal", plain, "--key-file", key)[0] == 0
    assert run(capsys, "unseal", sealed, "-o", "back", "--key-file", key)[0] == 0
    assert not list(Path().rglob(left))
    (sealed / "a" / left).write_bytes(b"by half")
    assert reseal(capsys, sealed, key, new_key(Path("other")))[0] == 0
    assert not (sealed / "a" / left).exists()


@pytest.mark.parametrize("force", [False, True])
def test_where_proc_is_not_mounted_files_get_their_place_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    isdir, link = os.path.isdir, os.link

    def no_link(source: str, *args: Any, **more: Any) -> None:
        if source.startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", source)
        link(source, *args, **more)

    monkeypatch.setattr(
        os.path, "isdir", lambda path: not str(path).startswith("/proc") and isdir(path)
    )
    monkeypatch.setattr(os, "link", no_link)
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _place.aside(folder, "out", force=force) as fd:
            _place.write_all(fd, b"whole")
    finally:
        os.close(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == b"whole"
