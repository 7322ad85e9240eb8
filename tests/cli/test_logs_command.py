"""``pyenclave logs`` and ``top``, as people type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave._platform.debuglog import DebugLog, find_logs
from pyenclave._platform.state import State
from pyenclave.cli import main
from pyenclave.cli.top import Look, trips_per_second, use_of
from pyenclave.formats.messages import EnclaveInfo
from pyenclave.host import Enclave
from pyenclave.host.pool import EnclavePool
from pyenclave.image.build import build

TEXT = """loading
DEBUG mine: [req-1] a record
[req-1] a trusted function raised:
Traceback (most recent call last):
  File "/enclave/entry/one.py", line 9, in bad
ValueError: first

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/enclave/entry/one.py", line 11, in bad
KeyError: 'x'
unrelated \x1b[31m\x07 line
[0123456789abcdef] a trusted function raised:
Traceback (most recent call last):
TypeError: other
"""


@pytest.fixture
def state(used_state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYENCLAVE_STATE", str(used_state))
    return used_state


class Writer:
    def __init__(self, path: Path, number: int = 1, name: str = "one") -> None:
        self.state = State.open(str(path))
        self.log = DebugLog(self.state, name)
        self.log.start()
        self.log.name_after(bytes([number]) * 16)

    def write(self, text: str) -> None:
        os.write(self.log.write_fd, text.encode())

    def end(self) -> None:
        self.log.close_writer()
        self.log._thread.join(10)
        self.state.close()


def keep(path: Path, text: str, number: int = 1, name: str = "one") -> None:
    writer = Writer(path, number, name)
    writer.write(text)
    writer.end()


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    return capsys.readouterr().out


def test_without_logs_there_is_none(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no debug enclave" in run(capsys, "logs")
    assert json.loads(run(capsys, "logs", "--json")) == {"logs": []}
    run(capsys, "logs", "one", code=1)


def test_logs_are_found_by_name_and_by_the_beginning_of_their_identity(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, "of one\n", 1, "one")
    keep(state, "of two\n", 2, "two")
    assert run(capsys, "logs", "one") == "of one\n"
    assert run(capsys, "logs", "0202") == "of two\n"
    run(capsys, "logs", "020", code=1)
    listed = json.loads(run(capsys, "logs", "--json"))["logs"]
    assert [(log["name"], log["running"]) for log in listed] == [("two", False), ("one", False)]
    assert "one" in run(capsys, "logs")


def test_of_one_name_the_latest_is_shown(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(state, "earlier\n", 1)
    keep(state, "later\n", 2)
    assert run(capsys, "logs", "one") == "later\n"


def test_control_bytes_cannot_steer_the_terminal(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, TEXT)
    shown = run(capsys, "logs", "one")
    assert "unrelated \\x1b[31m\\x07 line" in shown
    assert not {c for c in shown if ord(c) < 32} - {"\n"}
    lines = json.loads(run(capsys, "logs", "one", "--json"))["logs"][0]["lines"]
    assert "\n".join(lines) + "\n" == TEXT


def test_an_id_finds_its_records_and_its_whole_traceback(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, "nothing\n", 2, "two")
    keep(state, TEXT)
    shown = run(capsys, "logs", "--id", "req-1")
    assert shown.startswith("DEBUG mine: [req-1] a record\n[req-1] a trusted function raised:\n")
    assert "ValueError: first" in shown
    assert shown.endswith("KeyError: 'x'\n")
    assert "unrelated" not in shown
    assert run(capsys, "logs", "--id", "0123456789abcdef").endswith("TypeError: other\n")
    run(capsys, "logs", "--id", "req-2", code=1)


def test_a_log_is_followed_until_its_enclave_ends(state: Path) -> None:
    writer = Writer(state)
    writer.write("first\n")
    with State.open(str(state)) as opened:
        while not find_logs(opened):
            time.sleep(0.01)
    command = [sys.executable, "-m", "pyenclave", "logs", "one", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "first\n"
        writer.write("second\n")
        assert follower.stdout.readline() == "second\n"
        writer.write("last, without an end")
        writer.end()
        assert follower.stdout.read() == "last, without an end"
        assert follower.wait(10) == 0


@pytest.mark.parametrize(
    "arguments", [("--follow",), ("one", "--follow", "--json"), ("one", "--follow", "--id", "x")]
)
def test_what_cannot_be_followed_is_wrong_usage(
    state: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "logs", *arguments, code=2)


def test_top_shows_what_an_enclave_uses(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(run(capsys, "top", "--json")) == {"enclaves": []}
    assert "no enclave" in run(capsys, "top", "--once")
    script = tmp_path / "idle.py"
    script.write_text("import pyenclave\n@pyenclave.ecall\ndef nothing() -> None: pass\n")
    with Enclave.from_file(script, quiet=True) as enclave:
        (row,) = json.loads(run(capsys, "top", "--json"))["enclaves"]
        check_row(row, enclave)
        assert row["round_trips_per_second"] == 0
        shown = run(capsys, "top", "--once")
        assert "idle" in shown
        assert str(enclave.info.pid) in shown
        (listed,) = json.loads(run(capsys, "ps", "--json"))["enclaves"]
        assert listed["host_pid"] == os.getpid()


def test_top_names_an_enclave_that_nobody_may_look_at(
    state: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where /proc is mounted with hidepid, a hardened worker's files are not this user's."""

    def hidden(path: str, *rest: Any, **more: Any) -> Any:
        if path.startswith("/proc/"):
            raise PermissionError(1, "Operation not permitted", path)
        return open(path, *rest, **more)

    script = tmp_path / "idle.py"
    script.write_text("import pyenclave\n@pyenclave.ecall\ndef nothing() -> None: pass\n")
    with Enclave.from_file(script, quiet=True) as enclave:
        monkeypatch.setattr("pyenclave.cli.top.open", hidden, raising=False)
        (row,) = json.loads(run(capsys, "top", "--json"))["enclaves"]
        assert (row["pid"], row["memory"], row["cpu_percent"]) == (enclave.info.pid, None, None)
        assert str(enclave.info.pid) in run(capsys, "top", "--once")


def check_row(row: dict[str, Any], enclave: Enclave) -> None:
    assert (row["name"], row["pid"]) == ("idle", enclave.info.pid)
    assert 0 <= row["cpu_percent"] < 200
    assert row["memory"] > 1 << 20
    assert row["memory_kind"] in ("pss", "rss")
    assert row["threads"] >= 1


def test_top_shows_the_round_trips_of_all_lanes(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly as many as there were calls, of a warm worker too; a batch is one."""
    (tmp_path / "idle.py").write_text(
        "import pyenclave\n@pyenclave.ecall\ndef add(x: int) -> int: return x + 1\n"
    )
    (tmp_path / "enclave.toml").write_text(
        '[enclave]\nname = "idle"\nentry = "idle.py"\nproduct_id = 1\nsecurity_version = 1\n'
        "threads = 3\n"
    )
    image = build(tmp_path / "enclave.toml")

    def trips(enclave: Enclave) -> int:
        with PlatformClient.connect(start=False) as client:
            (found,) = [x for x in client.list() if x.enclave_id == enclave.info.enclave_id]
        return found.round_trips

    with Enclave(image) as enclave:
        before = trips(enclave)
        threads = [Thread(target=lambda: [enclave.add(x) for x in range(50)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert trips(enclave) - before == 150
        assert list(enclave.map("add", range(100))) == list(range(1, 101))
        assert 150 < trips(enclave) - before < 250
    with EnclavePool(image, size=1) as pool, pool.enclave() as member:
        before = trips(member)
        member.call("add", 1)
        assert trips(member) - before == 1


def test_a_count_that_wraps_is_no_flood() -> None:
    def look(when: float, trips: int) -> Look:
        info = EnclaveInfo(
            enclave_id=bytes(16),
            name="one",
            pid=1,
            host_pid=1,
            debug=True,
            mrenclave=bytes(32),
            started=0.0,
            round_trips=trips,
        )
        return Look(when=when, info=info, use=None)

    assert trips_per_second(look(0, 2**32 - 10), look(5, 5)) == 3
    assert trips_per_second(look(0, -1), look(5, 5)) is None
    assert trips_per_second(look(0, 5), look(5, -1)) is None
    assert trips_per_second(look(5, 5), look(5, 6)) is None


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
def test_an_impossible_interval_is_wrong_usage(
    state: Path, interval: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "top", "--interval", interval, code=2)


def test_a_process_that_is_gone_uses_nothing() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert use_of(pid) is None
    assert use_of(os.getpid()) is not None
