"""Counters in files: what they refuse, and that crashes and many processes lose nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyenclave.errors import RollbackError, SealingError, SealLimitError
from pyenclave.sealed import counter as module
from pyenclave.sealed.counter import MAX_STEP, Counter, FileCounter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store of counters may be made."""
    return tmp_path / "counters"


def test_a_value_below_the_counters_is_refused(path: Path) -> None:
    """It never goes back, and the attempt changes nothing."""
    counter = FileCounter(path)
    counter.advance(3)
    with pytest.raises(RollbackError, match="beyond this value"):
        counter.advance(2)
    assert FileCounter(path).read() == 3


def test_a_counter_is_not_advanced_further_than_a_step(path: Path) -> None:
    """A wrong value must not use up a counter."""
    counter = FileCounter(path)
    with pytest.raises(SealLimitError):
        counter.advance(MAX_STEP + 1)
    counter.advance(MAX_STEP)
    assert counter.read() == MAX_STEP


def test_a_counter_ends_at_its_largest_value(path: Path) -> None:
    """It does not wrap around."""
    counter = FileCounter(path)
    last = (1 << 63) - 1
    put(path, lambda store: store["counters"]["default"].update(value=last - 1))
    counter.advance(last)
    with pytest.raises(SealLimitError):
        counter.advance(last + 1)
    assert counter.read() == last


@pytest.mark.parametrize(("to", "mark"), [(True, b""), ("1", b""), (1.0, b""), (1, "mark")])
def test_values_and_marks_of_other_types_are_refused(path: Path, to: object, mark: object) -> None:
    """TypeError, and nothing is written."""
    counter = FileCounter(path)
    with pytest.raises(TypeError):
        counter.advance(to, mark)  # type: ignore[arg-type]
    assert counter.read() == 0


@pytest.mark.parametrize(("to", "mark"), [(-1, b""), (1, bytes(65))])
def test_impossible_values_and_marks_are_refused(path: Path, to: int, mark: bytes) -> None:
    """ValueError, and nothing is written."""
    counter = FileCounter(path)
    with pytest.raises(ValueError, match="a counter has values"):
        counter.advance(to, mark)
    assert counter.read() == 0


def test_of_two_states_for_one_value_only_the_first_is_committed(path: Path) -> None:
    """A writer that was stopped may have left another state for the same value."""
    counter = FileCounter(path)
    counter.advance(1, b"first")
    counter.advance(1, b"first")  # again, after a lost answer
    counter.advance(1)  # a look at the value alone
    with pytest.raises(RollbackError, match="another state"):
        counter.advance(1, b"second")
    assert counter.reading() == (1, b"first")


def test_an_unmarked_advance_commits_no_state(path: Path) -> None:
    """After it no state may claim the value."""
    counter = FileCounter(path)
    counter.advance(1, b"first")
    counter.advance(2)
    with pytest.raises(RollbackError, match="expected none"):
        counter.advance(2, b"second")


def test_counters_of_one_file_do_not_share_anything(path: Path) -> None:
    """Several named counters, each with its own identity and value."""
    first, second = FileCounter(path, "first"), FileCounter(path, "second")
    first.advance(5)
    assert (first.read(), second.read()) == (5, 0)
    assert first.id != second.id
    assert FileCounter(path, "first").id == first.id
    assert isinstance(first, Counter)


def test_a_store_that_was_put_back_is_noticed_by_who_saw_the_newer_one(path: Path) -> None:
    """Another process does not notice: the documentation says so, and so does this test."""
    counter = FileCounter(path)
    old = path.read_bytes()
    counter.advance(1)
    path.write_bytes(old)
    with pytest.raises(RollbackError, match="were put back"):
        counter.read()
    assert FileCounter(path).read() == 0


@pytest.mark.parametrize("gone", ["file", "counter", "other"])
def test_a_counter_that_is_gone_is_not_made_again(path: Path, gone: str) -> None:
    """A new one would accept whatever it is told to."""
    counter = FileCounter(path)
    counter.advance(1)
    if gone == "file":
        path.unlink()
    elif gone == "counter":
        put(path, lambda store: store["counters"].clear())
    else:
        path.unlink()
        FileCounter(path)
    with pytest.raises(RollbackError, match="is gone"):
        counter.read()
    with pytest.raises(RollbackError, match="is gone"):
        counter.advance(2)


def test_a_counter_that_must_exist_is_not_made(path: Path) -> None:
    """``create=False``."""
    with pytest.raises(SealingError, match="has no counter 'default'"):
        FileCounter(path, create=False)
    FileCounter(path)
    assert FileCounter(path, create=False).read() == 0


def test_a_file_holds_a_limited_number_of_counters(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read as a whole."""
    monkeypatch.setattr(module, "_MAX_COUNTERS", 2)
    FileCounter(path, "a")
    FileCounter(path, "b")
    with pytest.raises(SealLimitError):
        FileCounter(path, "c")
    assert FileCounter(path, "b").read() == 0


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb"])
def test_impossible_names_are_refused(path: Path, name: str) -> None:
    """Nothing is made."""
    with pytest.raises(ValueError, match="printable"):
        FileCounter(path, name)
    with pytest.raises(TypeError):
        FileCounter(path, b"bytes")  # type: ignore[arg-type]
    assert not path.exists()


def test_every_damaged_byte_of_a_store_is_noticed(path: Path) -> None:
    """A counter that lost its value must not go on with another."""
    FileCounter(path).advance(7, b"mark")
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(SealingError, match="is damaged"):
            FileCounter(path)
    for damaged in (b"", good[:-1], good + b"\n", b"x" * (9 << 20)):
        path.write_bytes(damaged)
        with pytest.raises(SealingError, match="is damaged"):
            FileCounter(path)
    path.write_bytes(good)
    assert FileCounter(path).reading() == (7, b"mark")


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.update(format="pyenclave-counters/2"),
        lambda store: store.update(more=1),
        lambda store: store["counters"]["default"].update(value=-1),
        lambda store: store["counters"]["default"].update(value=1 << 63),
        lambda store: store["counters"]["default"].update(id="AAAA"),
        lambda store: store["counters"].update({"": store["counters"]["default"]}),
    ],
)
def test_a_store_with_impossible_contents_is_refused(path: Path, change: object) -> None:
    """Its checksum is right: somebody wrote it so."""
    FileCounter(path)
    put(path, change)
    with pytest.raises(SealingError, match="is damaged"):
        FileCounter(path)


def test_a_link_in_the_place_of_the_store_is_refused(path: Path) -> None:
    """What is renamed into its place would be another file."""
    FileCounter(path)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(SealingError, match="cannot be read"):
        FileCounter(path)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_old_or_the_new_value(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The failure is told, and nothing in between is left."""
    counter = FileCounter(path)
    counter.advance(1)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, fail)
        with pytest.raises(SealingError, match=os.strerror(number)):
            counter.advance(2)
    assert counter.read() == 1
    assert FileCounter(path).read() == 1
    counter.advance(2)
    assert FileCounter(path).read() == 2


def test_a_short_write_is_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write() may take less than it is given."""
    counter = FileCounter(path)
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    counter.advance(1)
    assert FileCounter(path).read() == 1


def test_a_value_is_synced_before_it_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    File, then name, then folder; and a reader syncs what a killed writer may not have.

    Power that is lost after a value was told must not take it back.
    """
    done: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    def replace(*names: str) -> None:
        done.append("rename")
        real_replace(*names)

    counter = FileCounter(path)
    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "replace", replace)
    counter.advance(1)
    assert done == ["counters.new", "rename", path.parent.name]
    done.clear()
    assert counter.read() == 1
    assert done == []
    assert FileCounter(path).read() == 1
    assert done == ["counters", path.parent.name]


def test_threads_of_one_process_lose_nothing(path: Path) -> None:
    """The lock is one of open files, and each use opens its own."""
    counter = FileCounter(path)

    def work() -> None:
        done = 0
        while done < 10:
            try:
                counter.advance(counter.read() + 1, os.urandom(8))
            except RollbackError:
                continue
            done += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FileCounter(path).read() == 40


_WORKER = """
import os, sys
from pyenclave.errors import RollbackError
from pyenclave.sealed.counter import FileCounter

path, shared, own, count = sys.argv[1], *(FileCounter(sys.argv[1], n) for n in sys.argv[2:4]), \
    int(sys.argv[4])
won = 0
print("ready", flush=True)
while won < count:
    value = shared.read() + 1
    try:
        shared.advance(value, os.urandom(16))
    except RollbackError:
        continue
    won += 1
    own.advance(won)
    # Told only now: whoever reads this line may rely on it.
    print(value, won, flush=True)
"""


def start(path: Path, number: int, count: int) -> subprocess.Popen[str]:
    """Return a process that advances the shared counter and its own *count* times."""
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(path), "shared", f"own-{number}", str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_eight_processes_on_one_store_lose_nothing(path: Path) -> None:
    """Each value of the shared counter is given to one process only, and none is skipped."""
    workers = [start(path, number, 10) for number in range(8)]
    told = [
        [line.split() for line in worker.communicate()[0].splitlines()[1:]] for worker in workers
    ]
    assert [worker.returncode for worker in workers] == [0] * 8
    values = sorted(int(value) for lines in told for value, _ in lines)
    assert values == list(range(1, 81))
    assert FileCounter(path, "shared").read() == 80
    assert [FileCounter(path, f"own-{number}").read() for number in range(8)] == [10] * 8


def test_a_killed_process_takes_nothing_back_and_blocks_nobody(path: Path) -> None:
    """Kill -9 at any moment: what was told stays, at most one untold step is there besides."""
    killed = 0
    for round_ in range(8):
        worker = start(path, round_, 1_000_000)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(0.004 * (round_ % 4 + 1) + 0.0007 * round_)
        worker.send_signal(signal.SIGKILL)
        lines = worker.communicate()[0].splitlines()
        killed += worker.returncode == -signal.SIGKILL
        value, won = map(int, lines[-1].split()) if lines and " " in lines[-1] else (0, 0)
        assert FileCounter(path, "shared").read() in range(value, value + 2) or not lines
        assert FileCounter(path, f"own-{round_}").read() in (won, won + 1)
    assert killed == 8


def put(path: Path, change: object) -> None:
    """Change what the store says, with a checksum that is right."""
    store = json.loads(path.read_bytes().partition(b"\n")[0])
    change(store)  # type: ignore[operator]
    body = json.dumps(store).encode()
    path.write_bytes(body + b"\n" + module._checksum(body))
