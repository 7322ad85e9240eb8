"""Crashes, faults and what they leave: the old state or the new one, and no nonce twice."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from file_places import (
    FailingStore,
    FakeCounter,
    Fault,
    MemoryStore,
    RecordingStore,
    audit,
    content,
)

from pyenclave.errors import SealingError, UnsealError
from pyenclave.sealed import file_crypto, file_store
from pyenclave.sealed.file import open_sealed
from pyenclave.sealed.file_engine import SealedEngine

KEY = bytes(range(32))
Commit = Callable[[SealedEngine, bytes], None]


def engine(store: Any, **options: Any) -> SealedEngine:
    return SealedEngine(store, key=KEY, **({"write": True, "create": True} | options))


def scenario(store: Any, commit: Commit, *, counter: Any = None, pages: int = 6) -> bytes:
    """Make a file and change it in every way, over three openings. *commit* commits."""
    choose = random.Random(3)
    model = bytearray()

    def write(file: SealedEngine, at: int, size: int) -> None:
        data = choose.randbytes(size)
        file.write(at, memoryview(data))
        model.extend(bytes(max(0, at + size - len(model))))
        model[at : at + size] = data

    def truncate(file: SealedEngine, size: int) -> None:
        file.truncate(size)
        del model[size:]
        model.extend(bytes(size - len(model)))

    file = engine(store, counter=counter)
    write(file, 0, pages * 4096 + 100)
    commit(file, bytes(model))
    write(file, 4096, 2 * 4096)
    write(file, pages * 4096 + 100, 5000)
    commit(file, bytes(model))
    write(file, 100, 50)
    truncate(file, 3 * 4096 + 7)
    commit(file, bytes(model))
    file.close()
    file = engine(store, counter=counter, create=False)
    write(file, 90 * 4096, 4096)
    commit(file, bytes(model))
    file.write(0, memoryview(b"not to stay" * 3000))
    file.discard()
    write(file, 2 * 4096, 3 * 4096)
    write(file, 2 * 4096, 3 * 4096)
    commit(file, bytes(model))
    file.close()
    file = engine(store, counter=counter, truncate=True)
    model.clear()
    write(file, 0, 5000)
    commit(file, bytes(model))
    truncate(file, 0)
    write(file, 4096, 4096)
    commit(file, bytes(model))
    file.close()
    return bytes(model)


class Watched:
    """Runs the scenario on a recording store, and knows what may be found at each step."""

    def __init__(self, forget_fsync: int | None = None, *, counter: bool = False) -> None:
        self.store = RecordingStore(forget_fsync=forget_fsync)
        self.counter = FakeCounter() if counter else None
        self.commits: list[tuple[int, int, bytes]] = []  # steps before and after, the content
        self.counted: list[tuple[int, int, bytes]] = [(0, 0, b"")]
        scenario(self.store, self.commit, counter=self.counter)

    def commit(self, file: SealedEngine, model: bytes) -> None:
        before = len(self.store.steps)
        file.commit()
        # The counter is advanced after the last fsync, before what comes then.
        self.commits.append((before, len(self.store.steps), model))
        if self.counter is not None:
            last = max(i for i, step in enumerate(self.store.steps) if step[0] == "fsync")
            self.counted.append((last + 1, *self.counter.log[-1]))

    def allowed(self, steps: int) -> list[bytes | None]:
        """What a file may be after a crash with so many steps begun; None is no file."""
        now: bytes | None = None
        for before, after, model in self.commits:
            if after <= steps:
                now = model
            elif before < steps:
                return [now, model]
        return [now]

    def wrong(self, *, subsets: int, deep: int = 0) -> tuple[int, int]:
        """Return how many crash states there are, and how many open as something else."""
        seen: dict[bytes, Any] = {}
        states = bad = 0
        for steps, state in self.store.crashes(subsets=subsets, seed=1):
            states += 1
            if state not in seen:
                seen[state] = self.opened(state, steps)
            found = seen[state]
            if found == "refused" or found not in self.allowed(steps):
                bad += 1
            elif deep and states % deep == 0 and found is not None:
                self.write_on(state, found, steps)
        return states, bad

    def counter_at(self, steps: int) -> FakeCounter | None:
        if self.counter is None:
            return None
        value, mark = [(v, m) for at, v, m in self.counted if at <= steps][-1]
        return FakeCounter(value, mark)

    def opened(self, state: bytes, steps: int) -> bytes | str | None:
        counter = self.counter_at(steps)
        try:
            file = engine(MemoryStore(state), write=False, create=False, counter=counter)
            found = content(file)
        except UnsealError as error:
            return None if "holds no commit" in str(error) else "refused"
        except SealingError:
            return "refused"
        file.close()
        return found

    def write_on(self, state: bytes, model: bytes, steps: int) -> None:
        """After a crash the file can be written as before, and every slot has one use."""
        store = MemoryStore(state)
        counter = self.counter_at(steps)
        file = engine(store, create=False, counter=counter)
        audit(file)
        file.discard()
        file.write(len(model), memoryview(b"more" * 5000))
        file.close()
        file = engine(store, write=False, create=False, counter=counter)
        assert content(file) == model + b"more" * 5000
        audit(file)


@pytest.mark.parametrize("counter", [False, True], ids=["alone", "counted"])
def test_every_crash_leaves_the_old_or_the_new_state(counter: bool) -> None:
    """PAG-11, SEA-11: prefixes, subsets, reorderings and torn sectors between fsyncs."""
    watched = Watched(counter=counter)
    states, bad = watched.wrong(subsets=25, deep=40)
    assert states > 500
    assert bad == 0


@pytest.mark.parametrize("fsync", [0, 1], ids=["data", "header"])
def test_a_commit_without_one_of_its_fsyncs_is_caught(fsync: int) -> None:
    """The crash test can fail: without an fsync there are states that are neither."""
    _, bad = Watched(forget_fsync=fsync).wrong(subsets=6)
    assert bad > 0


@pytest.mark.long
def test_many_more_crashes_leave_the_old_or_the_new_state() -> None:
    states, bad = Watched(counter=True).wrong(subsets=400, deep=15)
    assert states > 5000
    assert bad == 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_call_loses_nothing_committed(error: int) -> None:
    """PAG-10: the error comes out, the object says so, and closing does not commit the rest."""
    whole = FailingStore()
    scenario(whole, lambda file, _: file.commit() and None)
    failed = 0
    for call in range(1, whole.calls + 1, 1 if error == errno.EIO else 3):
        store = FailingStore()
        store.fault = Fault(call, error)
        seen = Seen()
        try:
            scenario(store, seen.commit)
        except OSError as raised:
            failed += raised.errno == error
            if seen.files and not seen.files[-1].closed:
                after_a_fault(seen.files[-1])
        try:
            file = engine(MemoryStore(bytes(store.data)), write=False, create=False)
            found: bytes | None = content(file)
        except UnsealError as refused:
            found = None if "holds no commit" in str(refused) else b"refused"
        assert found in [*seen.committed[-1:], *seen.under_way], call
    assert failed > 20


class Seen:
    """What was committed, and what was about to be."""

    def __init__(self) -> None:
        self.committed: list[bytes | None] = [None]
        self.under_way: list[bytes] = []
        self.files: list[SealedEngine] = []

    def commit(self, file: SealedEngine, model: bytes) -> None:
        self.files.append(file)
        self.under_way = [model]
        file.commit()
        self.committed.append(model)
        self.under_way = []


def after_a_fault(file: SealedEngine) -> None:
    if file._failed is None:
        file.close(commit=False)
        return
    with pytest.raises(SealingError, match="earlier write failed"):
        file.write(0, memoryview(b"x"))
    with pytest.raises(SealingError, match="earlier write failed"):
        file.commit()
    with pytest.raises(SealingError, match="earlier write failed"):
        file.close()
    assert file.closed


def test_after_a_fault_discard_goes_on_from_the_last_commit() -> None:
    store = FailingStore()
    file = engine(store)
    file.write(0, memoryview(b"first" * 1000))
    file.commit()
    store.fault = Fault(store.calls + 1, errno.ENOSPC)
    with pytest.raises(OSError, match="as the test wants it"):
        file.write(0, memoryview(bytes(100_000)))
    with pytest.raises(SealingError, match="earlier write failed"):
        content(file)
    file.discard()
    assert content(file) == b"first" * 1000
    file.write(5000, memoryview(b"second" * 1000))
    file.close()
    found = engine(store, write=False, create=False)
    assert content(found) == b"first" * 1000 + b"second" * 1000
    audit(found)


def test_short_reads_and_writes_are_continued() -> None:
    store = FailingStore(short=True)
    model = scenario(store, lambda file, _: file.commit() and None)
    assert content(engine(store, write=False, create=False)) == model


def test_a_full_disk_is_said_by_the_file_object(tmp_path: Path) -> None:
    """What a buffered file could not hand on is not committed by closing it."""
    store = FailingStore()
    with open_sealed(store, "wb", key=KEY) as file:
        file.write(b"old")
    file = open_sealed(store, "r+b", key=KEY)
    store.fault = Fault(store.calls + 2, errno.ENOSPC)
    with pytest.raises(OSError, match="as the test wants it"):
        file.write(b"new" * 400_000)
    with pytest.raises(SealingError, match="earlier write failed"):
        file.close()
    with open_sealed(store, key=KEY) as reader:
        assert reader.read() == b"old"


def test_a_limit_of_the_system_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    """The same through descriptors: the kernel writes a part and then refuses (EFBIG)."""
    path = tmp_path / "file"
    with open_sealed(path, "wb", key=KEY) as file:
        file.write(b"old" * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = os.urandom(1_000_000)
    file = open_sealed(path, "r+b", key=KEY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_001, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            file.write(data)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(SealingError, match="earlier write failed"):
            file.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.discard()
    file.seek(0)
    assert file.read() == b"old" * 1000
    file.seek(0)
    file.write(data)
    file.close()
    with open_sealed(path, key=KEY) as reader:
        assert reader.read() == data
        os.truncate(path, 500_000)
        reader.seek(0)
        with pytest.raises(UnsealError, match="ends within"):
            reader.read()


def test_a_new_file_is_durable_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is synchronised too, after the data and before the commit returns."""
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(file_store.os, "fsync", fsync)
    with open_sealed(tmp_path / "file", "wb", key=KEY) as file:
        file.write(b"data")
        file.commit()
        assert synced[:3] == [str(tmp_path / "file"), str(tmp_path), str(tmp_path / "file")]


class Nonces:
    """Every (key, nonce) that pages were sealed with, by any opening."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: set[tuple[bytes, int]] = set()
        self.keys: set[bytes] = set()
        real = file_crypto.PageKey
        nonces = self

        class Counting:
            def __init__(self, secret: bytes, *, enclave: bytes) -> None:
                self.secret = bytes(secret) + bytes(enclave)
                self.key = real(secret, enclave=enclave)

            def seal_pages(self, pages: Any, out: Any, tags: Any, **info: Any) -> int:
                first = self.key.seal_pages(pages, out, tags, **info)
                nonces.keys.add(self.secret)
                for i in range(len(pages) // 4096):
                    assert (self.secret, first + i) not in nonces.used
                    nonces.used.add((self.secret, first + i))
                return first

            def __getattr__(self, name: str) -> Any:
                return getattr(self.key, name)

        monkeypatch.setattr(file_crypto, "PageKey", Counting)


@pytest.mark.parametrize("repeats", [False, True], ids=["random", "repeating"])
def test_no_nonce_is_ever_used_twice(monkeypatch: pytest.MonkeyPatch, repeats: bool) -> None:
    """SEA-05: crashes, rewrites, discards, copies written apart; also if random bytes repeat."""
    nonces = Nonces(monkeypatch)
    choose: dict[str, Any] = {"random": bytes} if repeats else {}
    watched = Watched()
    states = [state for _, state in watched.store.crashes(subsets=2, seed=2)]
    for number, state in enumerate(states):
        if number % 4:
            continue
        for _ in range(2):  # two copies of one state, written apart
            try:
                file = engine(MemoryStore(state), create=False, **choose)
            except UnsealError:
                continue
            for at in (0, 0, 8192):
                file.write(at, memoryview(os.urandom(8192)))
            file.commit()
            file.write(4096, memoryview(os.urandom(4096)))
            file.discard()
            file.write(4096, memoryview(os.urandom(4096)))
            file.close()
    assert len(nonces.keys) > 50
    assert len(nonces.used) > 1000


def test_a_used_up_salt_is_replaced_while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of a key a new one goes on, and all that was sealed still opens."""
    nonces = Nonces(monkeypatch)
    store = MemoryStore()
    file = engine(store)
    file._live_keys().limit = 40
    data = os.urandom(4096 * 300)
    for at in range(0, len(data), 4096 * 7):
        file.write(at, memoryview(data[at : at + 4096 * 7]))
    file.write(4096, memoryview(data[4096:8192]))
    file.commit()
    file.write(0, memoryview(data[:8192]))
    file.close()
    assert len(nonces.keys) > 5
    found = engine(store, write=False, create=False)
    assert content(found) == data
    audit(found)
