"""Commands that are killed in the middle: what they leave, and what the next one does with it."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from pyenclave import cli
from pyenclave.cli import _place

PIPE = "a pipe"
LEFT = f".pyenclave-{'0' * 32}.part"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").write_bytes(os.urandom(32))
    Path("key").chmod(0o600)
    Path("plain").write_bytes(b"planted secret " * 1000)


def killed(change: Callable[[], None], *arguments: str, feed: bytes = b"") -> None:
    """Run a command in a child until it is killed: by itself, or once it has read *feed* (PIPE)."""
    reader, writer = os.pipe()
    arguments = tuple(f"/dev/fd/{reader}" if word == PIPE else word for word in arguments)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            change()
            code = cli.main([*arguments, "--key-file", "key", "--json"])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:
        view = memoryview(feed)
        while view:
            view = view[pipe.write(view) :]
        if feed:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status)


def parts() -> list[str]:
    return [name for name in os.listdir() if _place.LEFT_BEHIND.fullmatch(name)]


def commit_suicide(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def nameless(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fd = _place._nameless(folder, 0o600)
    finally:
        os.close(folder)
    if fd is None:
        pytest.skip("the temporary folder's file system has no files without names")
    os.close(fd)


@pytest.mark.usefixtures("nameless")
def test_a_command_that_is_killed_leaves_nothing() -> None:
    killed(lambda: None, "seal", PIPE, "-o", "out", feed=os.urandom(4 << 20))
    assert sorted(os.listdir()) == ["key", "plain"]


def test_a_pipe_of_the_shell_is_sealed_whole() -> None:
    """Longer than the pipe holds, and than what is sealed at once."""
    plain = os.urandom((3 << 20) + 7)
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(plain)

    feeding = threading.Thread(target=feed)
    feeding.start()
    seal = ["seal", f"/dev/fd/{reader}", "-o", "out", "--key-file", "key", "--json"]
    assert cli.main(seal) == 0
    feeding.join()
    os.close(reader)
    assert cli.main(["unseal", "out", "-o", "back", "--key-file", "key", "--json"]) == 0
    assert Path("back").read_bytes() == plain


def no_nameless() -> None:
    _place._nameless = lambda *_: None


def dies_at_the_end() -> None:
    os.replace = commit_suicide  # type: ignore[assignment]


@pytest.mark.usefixtures("nameless")
@pytest.mark.parametrize("how", ["named from the start", "at the moment of replacing"])
def test_what_is_left_is_removed_by_the_next_command(how: str) -> None:
    """seal, unseal and reseal, each in the folder of its result."""
    assert cli.main(["seal", "plain", "-o", "out", "--key-file", "key", "--json"]) == 0
    before = Path("out").read_bytes()
    Path("new").write_bytes(os.urandom(32))
    commands = (
        ["seal", "plain", "-o", "other", "--key-file", "key"],
        ["unseal", "out", "-o", "back", "--key-file", "key"],
        ["reseal", "out", "--key-file", "key", "--new-key-file", "new"],
    )
    for command in commands:
        if how.startswith("named"):
            killed(no_nameless, "seal", PIPE, "-o", "third", feed=os.urandom(2 << 20))
        else:
            killed(dies_at_the_end, "seal", "plain", "-o", "out", "--force")
        assert len(parts()) == 1
        assert Path("out").read_bytes() == before
        assert cli.main([*command, "--json"]) == 0
        assert parts() == []
    assert Path("back").read_bytes() == Path("plain").read_bytes()


@pytest.mark.usefixtures("nameless")
def test_what_somebody_is_about_to_put_into_its_place_stays(tmp_path: Path) -> None:
    """A living command has it locked; a folder, a link and another name are nobody's leavings."""
    Path(LEFT).write_bytes(b"about to be whole")
    kept = [LEFT.replace("0", "1", 32), LEFT.replace("0", "a", 32), f"{LEFT}.x", f"x{LEFT}"]
    os.mkdir(kept[0])
    os.symlink("plain", kept[1])
    for name in kept[2:]:
        Path(name).write_bytes(b"mine")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with open(LEFT, "rb") as living:
            fcntl.flock(living, fcntl.LOCK_EX)
            for alone in (False, True):
                _place.sweep(folder, alone=alone)
                assert set(kept) | {LEFT} <= set(os.listdir())
        _place.sweep(folder)
        assert set(kept) <= set(os.listdir())
        assert not os.path.exists(LEFT)
    finally:
        os.close(folder)


def test_without_nameless_files_only_who_is_alone_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, a living command's file has a name and no lock; sealing works as ever."""
    monkeypatch.setattr(_place, "_nameless", lambda *_: None)
    Path(LEFT).write_bytes(b"somebody writes this")
    command = ["seal", "plain", "-o", "out", "--key-file", "key", "--json"]
    assert cli.main(command) == 0
    assert cli.main(command) == 2
    assert cli.main([*command, "--force"]) == 0
    assert parts() == [LEFT]
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        _place.sweep(folder, alone=True)
    finally:
        os.close(folder)
    assert parts() == []
