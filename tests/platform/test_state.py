"""The state directory: owners, modes, links, damage, no room."""

from __future__ import annotations

import os
import resource
import signal
import stat
import threading
from pathlib import Path

import pytest

from pyenclave._platform.state import State, default_state_directory
from pyenclave.errors import PlatformUnavailableError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a" / "state"


def in_child(action: object) -> int:
    """Run *action* in a child process; its exit status, 0 if it returned true."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if action() else 2  # type: ignore[operator]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_directory_and_its_files_are_for_the_user_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        with State.open(str(path)) as state:
            secret, ephemeral = state.load_root()
    finally:
        os.umask(old)
    assert len(secret) == 32
    assert not ephemeral
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_the_root_is_made_once_and_random(path: Path, tmp_path: Path) -> None:
    with State.open(str(path)) as first, State.open(str(path)) as second:
        assert first.load_root() == second.load_root()
    with State.open(str(tmp_path / "other")) as other:
        secret, _ = other.load_root()
    with State.open(str(path)) as again:
        assert again.load_root()[0] != secret


def test_threads_that_race_make_one_root(path: Path) -> None:
    found: list[bytes] = []

    def load() -> None:
        with State.open(str(path)) as state:
            found.append(bytes(state.load_root()[0]))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert not [name for name in os.listdir(path) if name.startswith(".")]


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o777, 0o755])
def test_a_directory_that_others_may_use_is_refused_by_name(path: Path, mode: int) -> None:
    path.mkdir(parents=True)
    path.chmod(mode)
    with pytest.raises(PlatformUnavailableError, match=f"{path} is open to other users"):
        State.open(str(path))


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o666])
def test_a_root_that_others_may_read_is_refused_by_name(path: Path, mode: int) -> None:
    with State.open(str(path)) as state:
        state.load_root()
        (path / "root").chmod(mode)
        with pytest.raises(PlatformUnavailableError, match=r"root is open to other users"):
            state.load_root()


def test_every_damage_to_the_root_is_refused_and_nothing_is_replaced(path: Path) -> None:
    with State.open(str(path)) as state:
        state.load_root()
        good = (path / "root").read_bytes()
        cases = [good[:size] for size in range(len(good))] + [good + b"\0", bytes(len(good))]
        for at in range(len(good)):
            changed = bytearray(good)
            changed[at] ^= 1
            cases.append(bytes(changed))
        for case in cases:
            (path / "root").write_bytes(case)
            with pytest.raises(PlatformUnavailableError, match=r"root secret .* is damaged"):
                state.load_root()
            assert (path / "root").read_bytes() == case
        (path / "root").write_bytes(good)
        assert bytes(state.load_root()[0]) == good[8:40]
        (path / "root").write_bytes(bytes(5000))
        with pytest.raises(PlatformUnavailableError, match="too long"):
            state.load_root()


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "dangling"])
def test_svc_08_what_is_not_a_regular_file_is_refused(path: Path, kind: str) -> None:
    with State.open(str(path)) as state:
        place = path / "root"
        if kind == "link":
            place.symlink_to("/etc/passwd")
        elif kind == "dangling":
            place.symlink_to("/nowhere/at/all")
        elif kind == "directory":
            place.mkdir()
        else:
            os.mkfifo(place, 0o600)
        with pytest.raises(PlatformUnavailableError):
            state.load_root()


def test_a_link_in_place_of_the_directory_is_refused(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    path.parent.mkdir()
    path.symlink_to(real)
    with pytest.raises(PlatformUnavailableError, match="is not a directory"):
        State.open(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_another_users_directory_or_file_is_refused(path: Path) -> None:
    with State.open(str(path)) as state:
        state.load_root()
        os.chown(path / "root", 65534, 65534)
        with pytest.raises(PlatformUnavailableError, match="belongs to another user"):
            state.load_root()
    os.chown(path, 65534, 65534)
    with pytest.raises(PlatformUnavailableError, match="belongs to another user"):
        State.open(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_other_users_cannot_read_the_root(path: Path) -> None:
    for folder in path.parents:
        if str(folder).startswith("/tmp/") and folder.exists() and folder.stat().st_uid == 0:
            folder.chmod(0o755)
    with State.open(str(path)) as state:
        state.load_root()

    def attempt() -> bool:
        os.setgid(65534)
        os.setuid(65534)
        try:
            (path / "root").read_bytes()
        except PermissionError:
            return True
        return False

    path.parent.chmod(0o755)
    assert in_child(attempt) == 0


def as_ordinary_user(path: Path, action: object) -> int:
    """Run *action* as one who owns *path* but has no rights beyond modes."""
    if os.geteuid() == 0:
        for folder in [path, *path.rglob("*")]:
            os.chown(folder, 65534, 65534)
        for folder in path.parents:
            if str(folder).startswith("/tmp/") and folder.stat().st_uid == 0:
                folder.chmod(0o755)

    def child() -> bool:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return bool(action())  # type: ignore[operator]

    return in_child(child)


def test_an_unwritable_directory_gives_an_ephemeral_root(path: Path) -> None:
    path.mkdir(parents=True, mode=0o700)
    path.chmod(0o500)

    def action() -> bool:
        with State.open(str(path)) as state:
            first, ephemeral = state.load_root()
            second, _ = state.load_root()
            return ephemeral and not state.writable and first != second and len(first) == 32

    assert as_ordinary_user(path, action) == 0
    path.chmod(0o700)
    assert list(path.iterdir()) == []


def test_an_unwritable_directory_with_a_root_still_gives_that_root(path: Path) -> None:
    with State.open(str(path)) as state:
        secret, _ = state.load_root()
    path.chmod(0o500)

    def action() -> bool:
        with State.open(str(path)) as state:
            return state.load_root() == (secret, False)

    assert as_ordinary_user(path, action) == 0
    path.chmod(0o700)


def test_disk_full_leaves_no_half_written_root(path: Path) -> None:
    with State.open(str(path)):
        pass

    def action() -> bool:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        with State.open(str(path)) as state:
            return state.load_root()[1]

    assert in_child(action) == 0
    assert sorted(os.listdir(path)) == ["state.lock"]
    with State.open(str(path)) as state:
        assert not state.load_root()[1]


def test_a_held_lock_is_a_typed_error_within_the_timeout(path: Path) -> None:
    with (
        State.open(str(path)) as first,
        State.open(str(path)) as second,
        first.lock(),
        pytest.raises(PlatformUnavailableError, match="is locked by another process"),
    ):
        second.take_lock("state.lock", timeout=0.05)
    with State.open(str(path)) as third:
        os.close(third.take_lock("state.lock", timeout=0.05))


def test_replacing_a_file_keeps_the_old_one_when_it_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with State.open(str(path)) as state:
        state.replace_file("x", b"old")
        for name in ("write", "fsync", "rename"):
            with monkeypatch.context() as patch:

                def fail(*_args: object, **_kwargs: object) -> None:
                    raise OSError(28, "No space left on device")

                patch.setattr(os, name, fail)
                with pytest.raises(OSError, match="No space"):
                    state.replace_file("x", b"new")
            assert state.read_file("x") == b"old"
            assert sorted(os.listdir(path)) == ["state.lock", "x"]


@pytest.mark.parametrize("missing", ["open", "link"])
def test_files_are_replaced_where_none_can_be_nameless(
    path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """A file system without O_TMPFILE, or a machine without /proc."""
    real = getattr(os, missing)

    def fail(name: str, *args: object, **kwargs: object) -> object:
        if name == "." or name.startswith("/proc/"):
            raise OSError(95, "Operation not supported")
        return real(name, *args, **kwargs)

    with State.open(str(path)) as state:
        with monkeypatch.context() as patch:
            patch.setattr(os, missing, fail)
            state.replace_file("x", b"new")
        assert state.read_file("x") == b"new"
        assert os.stat("x", dir_fd=state.fd).st_mode & 0o777 == 0o600
        assert sorted(os.listdir(path)) == ["state.lock", "x"]


def test_a_file_that_is_being_written_has_no_name_yet(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process killed meanwhile leaves nothing behind."""
    seen = []
    real = os.fsync

    def look(fd: int) -> None:
        seen.append(sorted(os.listdir(path)))
        real(fd)

    with State.open(str(path)) as state:
        monkeypatch.setattr(os, "fsync", look)
        state.replace_file("x", b"new")
    if len(seen[0]) == 2:
        pytest.skip("this file system has no files without names")
    assert seen[0] == ["state.lock"]


def test_the_default_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", "relative")
    assert default_state_directory() == os.path.abspath("relative")
    monkeypatch.delenv("PYENCLAVE_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert default_state_directory() == "/xdg/pyenclave"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_state_directory() == "/home/someone/.local/state/pyenclave"


def test_a_directory_is_not_made_when_only_looked_for(path: Path) -> None:
    with State.open(str(path), create=False) as state:
        assert not state.exists
    assert not path.exists()


def test_descriptors_are_given_back(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with State.open(str(path)) as state:
            state.load_root()
            state.read_file("nothing")
    path.chmod(0o755)
    for _ in range(20):
        with pytest.raises(PlatformUnavailableError):
            State.open(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
