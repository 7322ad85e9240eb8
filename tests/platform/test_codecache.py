"""Compiled code in the state directory: what is given back, and that all else is removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyenclave._core import hmac_sha256
from pyenclave._memfd import seal
from pyenclave._platform import codecache
from pyenclave._platform.codecache import CodeCache, binding_of
from pyenclave._platform.state import State

KEY = bytes(range(32))
LOCK = b'{"a lock":"in canonical form"}'
DIGEST = hashlib.sha256(LOCK).digest()
BINDING = binding_of(b"M\tname\tmodule\t/path\thash\t", debug=False)
TABLE = b"name\t" + b"0" * 64 + b"\t0\t9\n"
CODE = b"marshal!!"
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with State.open(str(tmp_path / "state")) as opened:
        yield opened


def parcel(data: bytes = CODE, table: bytes = TABLE, *, seals: int = SEALS) -> int:
    """What a zygote hands over."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, len(table).to_bytes(4, "little") + table + data)
    seal(fd, seals)
    return fd


def stored(state: State, *, lock: bytes = LOCK, debug: bool = False) -> Path:
    """Store a small parcel and return the file."""
    before = set(os.listdir(state.path))
    fd = parcel()
    try:
        cache = CodeCache(state, KEY, "runtime")
        cache.store(lock, fd, debug=debug, binding=BINDING)
    finally:
        os.close(fd)
    (name,) = {n for n in os.listdir(state.path) if n.startswith("code-")} - before
    return Path(state.path, name)


def load(state: State, *, key: bytes = KEY, runtime: str = "runtime", **changes: object) -> bytes:
    """What a new platform finds; empty: nothing."""
    wanted: dict[str, object] = {"digest": DIGEST, "debug": False, "binding": BINDING, **changes}
    digest = wanted.pop("digest")
    fd = CodeCache(state, key, runtime).load(digest, **wanted)  # type: ignore[arg-type]
    if fd < 0:
        return b""
    try:
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def test_what_was_stored_is_given_back_sealed(state: State) -> None:
    """To a platform with the same root, for the same lock, mode and binding."""
    path = stored(state)
    assert path.stat().st_mode & 0o777 == 0o600
    data = load(state)
    assert data == path.read_bytes()
    assert data[:8] == b"PYECODE\x01"
    assert data[8:40] == BINDING
    assert data[40:48] == len(LOCK).to_bytes(4, "little") + len(TABLE).to_bytes(4, "little")
    assert data[48:-32] == LOCK + TABLE + CODE
    assert data[-32:] == hmac_sha256(KEY, data[:-32])
    assert CodeCache(state, KEY, "runtime").lock_of(DIGEST, debug=False) == LOCK


def test_every_byte_is_authenticated(state: State) -> None:
    """A flip anywhere removes the file, and nothing of it is handed out."""
    path = stored(state)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        path.chmod(0o600)
        assert load(state) == b""
        assert not path.exists()


def test_every_cut_and_every_addition_is_refused(state: State) -> None:
    """So is an empty file."""
    path = stored(state)
    whole = path.read_bytes()
    for data in (*(whole[:size] for size in range(len(whole))), whole + b"\0"):
        path.write_bytes(data)
        path.chmod(0o600)
        assert load(state) == b""
        assert not path.exists()


def test_another_root_another_lock_and_another_python_find_nothing(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another root or Python is removed; of another lock or runtime it is not asked."""
    whole = stored(state).read_bytes()
    assert load(state, digest=bytes(32)) == b""
    assert load(state, debug=True) == b""
    assert load(state, runtime="another") == b""
    assert load(state) == whole
    assert load(state, key=bytes(32)) == b""
    assert [name for name in os.listdir(state.path) if name.startswith("code-")] == []
    path = stored(state)
    table = b"M\tname\tmodule\t/path\thash\t"
    other = [binding_of(table, debug=True), binding_of(b"M\tmoved", debug=False)]
    for name, value in (("MAGIC_NUMBER", b"\0\0\r\n"), ("START_FLAGS", ("-O",))):
        with monkeypatch.context() as patch:
            patch.setattr(codecache, name, value)
            other.append(binding_of(table, debug=False))
    monkeypatch.setattr(codecache.sys, "version", "3.99.0 (another build)")
    other.append(binding_of(table, debug=False))
    assert len({BINDING, *other}) == len(other) + 1
    for binding in other:
        path.write_bytes(whole)
        path.chmod(0o600)
        assert load(state, binding=binding) == b""
        assert not path.exists()


def test_code_of_debug_is_not_given_to_production(state: State) -> None:
    """Nor by another name: the mode is in the binding, and the binding is under the MAC."""
    debug = stored(state, debug=True)
    assert load(state) == b""
    production = stored(state)
    assert debug.name != production.name
    header = debug.read_bytes()
    fd = parcel()
    CodeCache(state, KEY, "runtime").store(
        LOCK, fd, debug=True, binding=binding_of(b"", debug=True)
    )
    os.close(fd)
    assert debug.read_bytes() != header
    os.replace(debug, production)
    assert load(state) == b""


def test_the_file_of_another_lock_by_this_name_is_refused(state: State) -> None:
    """Whoever swaps two files of the directory gains nothing, and breaks nothing."""
    other = stored(state, lock=b"another lock")
    own = stored(state)
    os.replace(other, own)
    assert CodeCache(state, KEY, "runtime").lock_of(DIGEST, debug=False) is None


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "open to others", "huge", "sparse"])
def test_what_is_no_file_of_ours_is_ignored_at_once(
    state: State, tmp_path: Path, kind: str
) -> None:
    """It is removed where that can be done, and what a link leads to is left alone."""
    path = stored(state)
    whole = path.read_bytes()
    path.unlink()
    target = tmp_path / "target"
    target.write_bytes(whole)
    target.chmod(0o600)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir(0o700)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.write_bytes(whole)
        path.chmod(0o644 if kind == "open to others" else 0o600)
        if kind != "open to others":
            os.truncate(path, 1 << (40 if kind == "huge" else 20))
    begun = time.monotonic()
    assert load(state) == b""
    assert time.monotonic() - begun < 30
    assert path.exists() == (kind == "folder")
    assert target.read_bytes() == whole


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_WRITE, SEALS & ~fcntl.F_SEAL_WRITE])
def test_code_that_could_still_change_is_not_kept(state: State, seals: int) -> None:
    """What gets a MAC is what was read."""
    fd = parcel(seals=seals)
    with pytest.raises(ValueError, match="could still be changed"):
        CodeCache(state, KEY, "runtime").store(LOCK, fd, debug=False, binding=BINDING)
    os.close(fd)
    assert load(state) == b""


def test_code_of_another_size_is_not_kept(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table longer than the parcel, an empty parcel, and more than there may be."""
    cache = CodeCache(state, KEY, "runtime")
    for data in (b"", b"\xff\xff\xff\xff", b"\x05\0\0\0four"):
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.write(fd, data)
        seal(fd, SEALS)
        with pytest.raises(ValueError, match="another size"):
            cache.store(LOCK, fd, debug=False, binding=BINDING)
        os.close(fd)
    monkeypatch.setattr(codecache, "_MAX_CODE", 16)
    fd = parcel()
    with pytest.raises(ValueError, match="another size"):
        cache.store(LOCK, fd, debug=False, binding=BINDING)
    os.close(fd)
    assert load(state) == b""


def test_a_full_disk_keeps_what_was_there_and_leaves_nothing_else(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All or nothing."""
    path = stored(state)
    whole = path.read_bytes()
    before = sorted(os.listdir(state.path))
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(state.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    fd = parcel(b"other code")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        CodeCache(state, KEY, "runtime").store(LOCK, fd, debug=False, binding=BINDING)
    monkeypatch.undo()
    os.close(fd)
    assert sorted(os.listdir(state.path)) == before
    assert load(state) == whole


def test_only_the_last_used_are_kept(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by bytes; a file that is used counts as new."""
    monkeypatch.setattr(codecache, "_MAX_FILES", 3)
    paths = []
    for index in range(3):
        paths.append(stored(state, lock=b"lock %d" % index))
        os.utime(paths[-1], (index, index))
    digest = hashlib.sha256(b"lock 0").digest()
    assert load(state, digest=digest)  # now it is the last used
    stored(state, lock=b"lock 3")
    assert [path.exists() for path in paths] == [True, False, True]
    monkeypatch.setattr(codecache, "_MAX_TOTAL", 1)
    last = stored(state, lock=b"lock 4")
    assert [name for name in os.listdir(state.path) if name.startswith("code-")] == [last.name]


def test_platforms_that_store_and_load_at_once_do_not_harm_each_other(state: State) -> None:
    """Whoever loads finds a whole file, or none."""
    wrong: list[bytes] = []
    stop = threading.Event()
    sizes = [1, 50_000, 200_000]

    def write(size: int) -> None:
        cache = CodeCache(state, KEY, "runtime")
        while not stop.is_set():
            fd = parcel(bytes([size & 0xFF]) * size)
            cache.store(LOCK, fd, debug=False, binding=BINDING)
            os.close(fd)

    threads = [threading.Thread(target=write, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    try:
        seen = 0
        deadline = time.monotonic() + 10
        while seen < 60 and time.monotonic() < deadline:
            data = load(state)
            if data:
                seen += 1
                body = data[48 + len(LOCK) + len(TABLE) : -32]
                if len(body) not in sizes or len(set(body)) != 1:
                    wrong.append(body)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen == 60
    assert wrong == []


def test_a_zygote_may_hand_over_twice_and_not_for_ever(state: State) -> None:
    """First what it imported, then all; and what is no parcel ends it."""
    cache = CodeCache(state, KEY, "runtime")
    with socket.socket(fileno=cache.expect(LOCK, debug=False, binding=BINDING)) as sock:
        for data in (b"first", b"second", b"third"):
            fd = parcel(data)
            try:
                socket.send_fds(sock, [b"K"], [fd])
            except BrokenPipeError:
                assert data == b"third"
            finally:
                os.close(fd)
        sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):  # the third lay there unread
            assert sock.recv(1) == b""
    assert load(state).endswith(b"second" + load(state)[-32:])
    with socket.socket(fileno=cache.expect(LOCK, debug=False, binding=BINDING)) as sock:
        sock.send(b"K")
        sock.settimeout(10)
        assert sock.recv(1) == b""


def test_what_a_killed_platform_was_writing_is_swept_away(state: State) -> None:
    """A file aside, a minute old."""
    path = Path(state.path, ".code-0123456789abcdef-0123456789abcdef")
    path.write_bytes(b"half")
    state.sweep()
    assert path.exists()
    os.utime(path, (1, 1))
    state.sweep()
    assert not path.exists()


def test_closing_waits_for_a_write_and_lets_none_begin(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after it, and with it every thread wherever it is."""
    cache = CodeCache(state, KEY, "runtime")
    writing, go = threading.Event(), threading.Event()
    replace = State.replace_file

    def slowly(self: State, name: str, data: bytes) -> None:
        writing.set()
        assert go.wait(10)
        replace(self, name, data)

    monkeypatch.setattr(State, "replace_file", slowly)
    sock = socket.socket(fileno=cache.expect(LOCK, debug=False, binding=BINDING))
    fd = parcel(b"code")
    with sock:
        socket.send_fds(sock, [b"K"], [fd])
        assert writing.wait(10)
        closing = threading.Thread(target=cache.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        go.set()
        closing.join(10)
        assert not closing.is_alive()
    (name,) = [name for name in os.listdir(state.path) if "code-" in name]
    assert name.startswith("code-"), "whole, and in its place"
    with pytest.raises(OSError, match="closed"):
        cache.store(LOCK, fd, debug=False, binding=BINDING)
    os.close(fd)
    cache.close()
