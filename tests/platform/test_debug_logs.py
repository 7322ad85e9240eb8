"""Logs of debug enclaves: bounded, private, and never in the way of who prints."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyenclave._platform import debuglog
from pyenclave._platform.debuglog import MAX_LOG, MAX_LOGS, DebugLog, find_logs
from pyenclave._platform.state import State


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with State.open(str(tmp_path / "state")) as opened:
        yield opened


class Writer:
    """A log, and the end that a worker would have."""

    def __init__(self, state: State, number: int = 1, name: str = "one") -> None:
        self.log = DebugLog(state, name)
        self.log.start()
        self.log.name_after(number.to_bytes(16, "big"))
        self.fd = os.dup(self.log.write_fd)
        self.log.close_writer()
        self.log.close_writer()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def end(self) -> None:
        os.close(self.fd)
        self.log._thread.join(10)
        assert not self.log._thread.is_alive()


def write(state: State, data: bytes, number: int = 1, name: str = "one") -> None:
    writer = Writer(state, number, name)
    writer.write(data)
    writer.end()


def test_what_is_printed_is_kept_whole(state: State) -> None:
    data = b"first\nsecond \xff\x1b[31m\n" * 100
    write(state, data)
    (log,) = find_logs(state)
    assert log.read(state) == data
    assert (log.name, log.enclave_id) == ("one", "0" * 31 + "1")
    assert not log.running
    assert abs(log.started - time.time()) < 60


def test_what_was_printed_before_it_was_an_enclave_goes_with_it(state: State) -> None:
    log = DebugLog(state, "early")
    log.start()
    os.write(log.write_fd, b"before\n")
    deadline = time.monotonic() + 20
    while not find_logs(state) and time.monotonic() < deadline:
        time.sleep(0.01)
    log.name_after(bytes(15) + b"\7")
    os.write(log.write_fd, b"after\n")
    log.close_writer()
    log.join()
    (found,) = find_logs(state)
    assert found.enclave_id == "0" * 31 + "7"
    assert found.read(state) == b"before\nafter\n"


def test_a_silent_enclave_has_no_file(state: State) -> None:
    write(state, b"")
    assert find_logs(state) == []


def test_the_file_is_this_users_alone(state: State) -> None:
    write(state, b"x\n")
    (name,) = (name for name in os.listdir(state.fd) if name.startswith("debug-"))
    assert stat.S_IMODE(os.stat(name, dir_fd=state.fd).st_mode) == 0o600


def test_a_log_never_grows_beyond_its_bound(state: State) -> None:
    """A loop that prints for ever; the latest lines are there, and whole."""
    writer = Writer(state)
    sizes = set()
    for block in range(40):
        writer.write(b"".join(b"line %06d\n" % (block * 1000 + i) for i in range(1000)) * 3)
        sizes.update(log.size for log in find_logs(state))
    writer.end()
    (log,) = find_logs(state)
    assert max(sizes) <= MAX_LOG + 65536
    lines = log.read(state).split(b"\n")
    assert lines[0] == b"[earlier output was dropped]"
    assert lines[-2] == b"line 039999"
    assert all(len(line) == 11 for line in lines[1:-1])
    assert log.name == "one"


def test_one_endless_line_is_bounded_too(state: State) -> None:
    write(state, b"x" * (5 * MAX_LOG))
    (log,) = find_logs(state)
    assert log.size <= MAX_LOG + 65536
    assert log.name == "one"


def test_the_oldest_logs_make_room(state: State) -> None:
    for number in range(MAX_LOGS + 5):
        write(state, b"x\n", number, f"number {number}")
    names = [log.name for log in find_logs(state)]
    assert names == [f"number {n}" for n in range(MAX_LOGS + 4, 4, -1)]


def test_a_running_enclaves_log_says_so(state: State) -> None:
    writer = Writer(state)
    writer.write(b"x\n")
    deadline = time.monotonic() + 20
    while not find_logs(state) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert find_logs(state)[0].running
    writer.end()
    assert not find_logs(state)[0].running


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_does_not_hold_up_who_prints(
    state: State, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds is written, and nothing waits."""

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(debuglog.os, "pwrite", full)
    write(state, b"x" * 300_000)


def test_without_a_writable_directory_output_is_dropped(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "writable", False)
    write(state, b"x" * 300_000)
    assert find_logs(state) == []


def test_a_link_in_the_place_of_a_log_is_not_written_through(state: State, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    os.symlink(target, f"debug-{'0' * 31}1.log", dir_fd=state.fd)
    write(state, b"x\n")
    assert target.read_text() == "precious"
    assert find_logs(state) == []


def test_a_damaged_log_is_still_listed(state: State) -> None:
    for number, text in enumerate((b"", b"{}", b"\xff\n", b'{"name": 1}\nx\n')):
        fd = state.open_file(f"debug-{number:032x}.log", os.O_WRONLY | os.O_CREAT)
        os.write(fd, text)
        os.close(fd)
    logs = find_logs(state)
    assert len(logs) == 4
    assert {log.name for log in logs} == {""}
    assert all(isinstance(log.read(state), bytes) for log in logs)


def test_names_that_are_no_log_are_left_alone(state: State) -> None:
    for name in ("debug-1.log", "debug-.log", f"debug-{'A' * 32}.log", f"debug-{'0' * 32}.log.x"):
        os.close(state.open_file(name, os.O_WRONLY | os.O_CREAT))
    assert find_logs(state) == []
