"""Monotonic counters: owners, damage, files put back, crashes at every step."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyenclave._platform import counters as counters_module
from pyenclave._platform.counters import CounterStore, MemoryFiles
from pyenclave._platform.state import State
from pyenclave.errors import EnclaveError, RollbackError, SealingError, SealLimitError

KEY = b"k" * 32
ALICE, BOB = b"A" * 32, b"B" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def state(path: Path) -> Iterator[State]:
    with State.open(str(path)) as opened:
        yield opened


def store(state: State, key: bytes = KEY) -> CounterStore:
    return CounterStore(state, key, os.urandom)


def test_a_counter_only_goes_up_and_lasts(state: State) -> None:
    first = store(state)
    counter, value = first.create(ALICE)
    assert (len(counter), value) == (16, 0)
    assert [first.increment(ALICE, counter) for _ in range(3)] == [1, 2, 3]
    assert store(state).read(ALICE, counter) == 3
    assert store(state).destroy(ALICE, counter) == 3
    with pytest.raises(SealingError, match="no such counter"):
        store(state).read(ALICE, counter)


def test_an_expected_value_makes_a_retry_harmless(state: State) -> None:
    counters = store(state)
    counter, _ = counters.create(ALICE)
    assert counters.increment(ALICE, counter, 0) == 1
    with pytest.raises(RollbackError, match="expected 0; found 1"):
        counters.increment(ALICE, counter, 0)
    assert counters.read(ALICE, counter) == 1


def test_another_owner_sees_no_counter(state: State) -> None:
    counters = store(state)
    counter, _ = counters.create(ALICE)
    for attempt in (counters.read, counters.increment, counters.destroy):
        with pytest.raises(SealingError, match="no such counter"):
            attempt(BOB, counter)
    for wrong in (b"", b"x" * 16, counter[:15], counter + b"\0"):
        with pytest.raises(SealingError, match="no such counter"):
            counters.read(ALICE, wrong)
    with pytest.raises(ValueError, match="owner has 32 bytes"):
        counters.create(b"short")
    assert counters.read(ALICE, counter) == 0


def test_an_owner_has_a_limit_of_its_own(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters_module, "MAX_PER_OWNER", 3)
    monkeypatch.setattr(counters_module, "MAX_TOTAL", 5)
    counters = store(state)
    for _ in range(3):
        counters.create(ALICE)
    with pytest.raises(SealLimitError):
        counters.create(ALICE)
    for _ in range(2):
        counters.create(BOB)
    with pytest.raises(SealLimitError):
        counters.create(b"C" * 32)


def test_a_counter_at_its_end_stays_there(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters_module, "_MAX_VALUE", 2)
    counters = store(state)
    counter, _ = counters.create(ALICE)
    counters.increment(ALICE, counter)
    counters.increment(ALICE, counter)
    with pytest.raises(SealLimitError):
        counters.increment(ALICE, counter)
    assert counters.read(ALICE, counter) == 2


@pytest.mark.parametrize("name", ["counters", "counters.mark"])
def test_any_flipped_or_missing_byte_is_refused(state: State, path: Path, name: str) -> None:
    counters = store(state)
    counter, _ = counters.create(ALICE)
    counters.increment(ALICE, counter)
    good = (path / name).read_bytes()
    cases = [good[:size] for size in range(len(good))] + [good + b"\0"]
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 0x10
        cases.append(bytes(changed))
    for case in cases:
        (path / name).write_bytes(case)
        with pytest.raises(SealingError, match="is damaged"):
            store(state).increment(ALICE, counter)
        assert (path / name).read_bytes() == case
    (path / name).write_bytes(good)
    assert store(state).read(ALICE, counter) == 1


def test_another_roots_store_is_refused(state: State) -> None:
    counter, _ = store(state).create(ALICE)
    with pytest.raises(SealingError, match="of another root"):
        store(state, b"x" * 32).read(ALICE, counter)


def test_a_store_that_was_put_back_is_refused(state: State, path: Path) -> None:
    counters = store(state)
    counter, _ = counters.create(ALICE)
    old = (path / "counters").read_bytes()
    old_mark = (path / "counters.mark").read_bytes()
    for _ in range(3):
        counters.increment(ALICE, counter)
    new = (path / "counters").read_bytes()
    (path / "counters").write_bytes(old)
    with pytest.raises(RollbackError, match="store of counters was put back"):
        store(state).read(ALICE, counter)
    (path / "counters").write_bytes(new)
    (path / "counters.mark").write_bytes(old_mark)
    with pytest.raises(RollbackError, match="mark of the counters was put back"):
        store(state).read(ALICE, counter)
    # Both at once: seen by whoever was running, not after a restart. That is said in SECURITY.md.
    (path / "counters").write_bytes(old)
    with pytest.raises(RollbackError):
        counters.read(ALICE, counter)
    assert store(state).read(ALICE, counter) == 0


@pytest.mark.parametrize("gone", [("counters",), ("counters.mark",), ("counters", "counters.mark")])
def test_a_store_that_is_gone_never_counts_from_zero_again(
    state: State, path: Path, gone: tuple[str, ...]
) -> None:
    counters = store(state)
    counter, _ = counters.create(ALICE)
    counters.increment(ALICE, counter)
    for name in gone:
        (path / name).unlink()
    for other in (counters, store(state)):
        with pytest.raises(SealingError):
            other.read(ALICE, counter)


_STEPS = ("open", "write", "fsync", "rename")


def _killed_at(state_path: Path, counter: bytes, step: int) -> bool:
    """Increment in a child that dies before its *step*-th system call; whether it did."""
    pid = os.fork()
    if pid == 0:
        seen = 0
        try:
            with State.open(str(state_path)) as state:
                counters = store(state)

                def wrap(name: str) -> None:
                    original = getattr(os, name)

                    def call(*args: object, **kwargs: object) -> object:
                        nonlocal seen
                        if seen == step:
                            os.kill(os.getpid(), signal.SIGKILL)
                        seen += 1
                        return original(*args, **kwargs)

                    setattr(os, name, call)

                for name in _STEPS:
                    wrap(name)
                counters.increment(ALICE, counter)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_killed_at_every_step_the_value_is_old_or_new_and_never_less(
    state: State, path: Path
) -> None:
    counter, value = store(state).create(ALICE)
    kills = 0
    for step in range(200):
        killed = _killed_at(path, counter, step)
        found = store(state).read(ALICE, counter)
        assert found in (value, value + 1), f"step {step}"
        if not killed:
            assert found == value + 1
            break
        kills += 1
        # A second crash on top of the first, then a change that must work.
        if step % 3 == 0:
            _killed_at(path, counter, step)
            assert store(state).read(ALICE, counter) >= found
        value = store(state).increment(ALICE, counter)
        assert value > found
    assert kills >= 10


def test_no_room_is_a_typed_error_and_what_was_counted_stays(
    state: State, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = store(state)
    counter, _ = counters.create(ALICE)
    counters.increment(ALICE, counter)
    for name in ("write", "fsync", "rename"):
        with monkeypatch.context() as patch:

            def fail(*_args: object, **_kwargs: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, name, fail)
            with pytest.raises(SealingError, match="cannot be written: No space"):
                counters.increment(ALICE, counter)
        assert counters.read(ALICE, counter) == 1
    assert counters.increment(ALICE, counter) == 2


def test_values_are_unique_over_threads_and_processes(state: State, path: Path) -> None:
    counter, _ = store(state).create(ALICE)
    reads, write = os.pipe()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            with State.open(str(path)) as own:
                mine = store(own)
                for _ in range(10):
                    os.write(write, mine.increment(ALICE, counter).to_bytes(2, "little"))
            os._exit(0)
        children.append(pid)
    os.close(write)
    values: list[int] = []
    shared = store(state)

    def work() -> None:
        for _ in range(5):
            values.append(shared.increment(ALICE, counter))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pid in children:
        os.waitpid(pid, 0)
    data = os.read(reads, 4096)
    os.close(reads)
    values += [int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), 2)]
    assert sorted(values) == list(range(1, 36))


def test_an_unwritable_directory_is_a_typed_error(state: State, path: Path) -> None:
    counter, _ = store(state).create(ALICE)
    shutil.rmtree(path)
    with pytest.raises(EnclaveError):
        store(state).increment(ALICE, counter)


def test_counters_in_memory_work_and_end_with_it() -> None:
    files = MemoryFiles()
    counters = CounterStore(files, KEY, os.urandom)
    counter, _ = counters.create(ALICE)
    assert counters.increment(ALICE, counter) == 1
    with pytest.raises(SealingError):
        CounterStore(MemoryFiles(), KEY, os.urandom).read(ALICE, counter)
