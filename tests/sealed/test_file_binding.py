"""A file is bound to another counter: whatever is cut off when, no two states of it open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from file_places import CountedStore, FakeCounter, MemoryStore, PlainCounter, content

from pyenclave.errors import RollbackError, SealingError, UnsealError
from pyenclave.sealed import file_commits, file_engine
from pyenclave.sealed.file import Rebinding, open_sealed
from pyenclave.sealed.file_engine import SealedEngine
from pyenclave.sealed.file_store import Store

KEY = bytes(range(32))
OLD, NEW = b"before the move " * 300, b"after it" * 1000


def engine(store: Any, **options: Any) -> SealedEngine:
    return SealedEngine(store, **({"key": KEY} | options))


class Named(FakeCounter):
    """A counter that tells the store when it is advanced."""

    def __init__(self, name: str, value: int = 0, mark: bytes = b"", store: Any = None) -> None:
        super().__init__(value, mark)
        self.name, self.store = name, store
        self.id = name.encode()  # type: ignore[misc]

    def advance(self, to: int, mark: bytes = b"") -> None:
        moves = to > self.value
        super().advance(to, mark)
        if moves and self.store is not None:
            self.store.advanced(self.name, to, mark)


class Plain(PlainCounter):
    """The same without marks."""

    def __init__(self, name: str, value: int = 0, mark: bytes = b"", store: Any = None) -> None:
        super().__init__(value)
        self.name, self.store = name, store
        self.id = name.encode()  # type: ignore[misc]

    def advance(self, to: int) -> None:
        moves = to > self.value
        super().advance(to)
        if moves and self.store is not None:
            self.store.advanced(self.name, to, b"")


@dataclass
class Crash:
    """What is there after a crash: the disk, and the counters by name."""

    kind: Any
    disk: bytes
    values: dict[str, tuple[int, bytes]]
    returned: bool

    def counters(self) -> dict[str, Any]:
        return {name: self.kind(name, *now) for name, now in self.values.items()}


class Move:
    """Binds a file to another counter, and knows every state that a crash leaves."""

    def __init__(self, kind: Any = Named, *, then: Any = "new") -> None:
        store = MemoryStore()
        self.kind, first = kind, kind("old")
        file = engine(store, write=True, create=True, counter=first)
        file.write(0, memoryview(b"x"))
        file.commit()
        file.write(0, memoryview(OLD))
        file.close()
        self.copy = bytes(store.data)  # who keeps this is who attacks
        self.store = CountedStore(self.copy)
        mark = first.reading()[1] if isinstance(first, FakeCounter) else b""
        self.first = {"old": (first.read(), mark), "new": (7, b"")}
        old = kind("old", *self.first["old"], store=self.store)
        file = engine(self.store, write=True, counter=old)
        file.truncate(0)
        file.write(0, memoryview(NEW))
        file.bind(None if then is None else kind(then, 7, store=self.store))
        self.end = len(self.store.steps)
        file.close()

    def crashes(self, subsets: int = 4) -> Iterator[Crash]:
        for steps, disk in self.store.crashes(subsets=subsets, seed=5):
            values = self.first | self.store.counters(steps)
            yield Crash(self.kind, disk, values, steps >= self.end)


def ways(counters: dict[str, Any]) -> list[Any]:
    """Whatever somebody may bring."""
    old, new = counters["old"], counters["new"]
    return [None, old, new, Rebinding(old, new), Rebinding(new, old)]


def read(disk: bytes, counter: Any) -> bytes | None:
    """Return what opens, or None."""
    try:
        file = engine(MemoryStore(disk), counter=counter)
    except (SealingError, UnsealError):
        return None
    try:
        return content(file)
    finally:
        file.close()


def faults(move: Move, *, unbinds: bool = False) -> list[str]:
    """Judge every crash state; return what is wrong."""
    wrong: list[str] = []
    for crash in move.crashes():
        # Somebody who has both counters gets the file, the old state or the new one.
        counters = crash.counters()
        whole: Any = Rebinding(counters["old"], counters["new"])
        found = read(crash.disk, whole)
        if found is None and unbinds:
            found = read(crash.disk, None)
        if found not in ((NEW,) if crash.returned else (OLD, NEW)):
            wrong.append("nothing opens")
        # Once the new state was opened, by whatever was brought, the copy opens with nothing.
        for way in range(5):
            counters = crash.counters()
            if read(crash.disk, ways(counters)[way]) != NEW:
                continue
            for attack in range(5):
                now = {name: crash.kind(name, *state(one)) for name, one in counters.items()}
                if read(move.copy, ways(now)[attack]) is not None:
                    wrong.append("both open")
        # And once the copy was, the new state opens with nothing.
        counters = crash.counters()
        if read(move.copy, counters["old"]) is not None:
            if crash.returned:
                wrong.append("the copy opens afterwards")
            writer = engine(MemoryStore(move.copy), write=True, counter=counters["old"])
            writer.write(0, memoryview(b"goes on"))
            writer.close()
            for attack in range(5):
                now = {name: crash.kind(name, *state(one)) for name, one in counters.items()}
                if crash.kind is Named and read(crash.disk, ways(now)[attack]) is not None:
                    wrong.append("the new one opens, too")
    return wrong


def state(counter: Any) -> tuple[int, bytes]:
    return counter.read(), counter.reading()[1] if isinstance(counter, FakeCounter) else b""


@pytest.mark.parametrize("kind", [Named, Plain], ids=["marks", "no-marks"])
def test_a_crash_of_bind_never_leaves_two_states_that_open(kind: Any) -> None:
    """SEA-11: every crash, everything that may be brought: the copy from before or the new one."""
    move = Move(kind)
    assert len(list(move.crashes())) > 40
    assert faults(move) == []


def test_a_crash_of_unbinding_retires_what_was_before_first() -> None:
    move = Move(then=None)
    assert faults(move, unbinds=True) == []
    assert read(bytes(move.store.data), None) == NEW


def _new_first(real: Callable[..., None]) -> Callable[..., None]:
    held: list[Any] = []

    def advance(counter: Any, to: int, mark: bytes) -> None:
        if counter.name == "old" and to > 2:
            held.append((counter, to, mark))
            return
        real(counter, to, mark)
        while held:
            real(*held.pop())

    return advance


def _never_retired(real: Callable[..., None]) -> Callable[..., None]:
    def advance(counter: Any, to: int, mark: bytes) -> None:
        if counter.name != "old" or to <= 2:
            real(counter, to, mark)

    return advance


@pytest.mark.parametrize(
    ("without", "found"),
    [
        ("the order", "both open"),
        ("retiring", "the copy opens afterwards"),
        ("the header's fsync", "nothing opens"),
        ("the header's second name", "both open"),
        ("the check of the old counter", "both open"),
    ],
)
def test_binding_without_one_of_its_steps_is_caught(
    monkeypatch: pytest.MonkeyPatch, without: str, found: str
) -> None:
    """The crash test can fail: each step is one that it finds missing."""
    if without == "the order":
        monkeypatch.setattr(file_engine, "advance", _new_first(file_engine.advance))
    elif without == "retiring":
        monkeypatch.setattr(file_engine, "advance", _never_retired(file_engine.advance))
    elif without == "the header's fsync":
        real = CountedStore.fsync

        def fsync(store: CountedStore) -> None:
            if store.fsyncs % 2 == 0:
                real(store)
            else:
                store.fsyncs += 1

        monkeypatch.setattr(CountedStore, "fsync", fsync)
    elif without == "the header's second name":
        header = file_engine.FileHeader

        def one_name(**fields: Any) -> Any:
            return header(**fields | {"old_counter_id": None, "old_counter_value": 0})

        monkeypatch.setattr(file_engine, "FileHeader", one_name)
        monkeypatch.setattr(file_engine.FileHeader, "from_bytes", header.from_bytes, raising=False)
    else:
        monkeypatch.setattr(file_commits, "_retire", lambda *_: None)
    assert found in faults(Move())


def test_what_was_cut_off_says_what_to_bring(tmp_path: Any) -> None:
    """Between header and retirement neither counter alone opens the file; both together do."""
    move = Move()
    seen = []
    for crash in move.crashes(subsets=1):
        counters = crash.counters()
        if (counters["old"].read(), counters["new"].read()) != (3, 7):
            continue
        with pytest.raises(RollbackError, match="cut off"):
            engine(MemoryStore(crash.disk), counter=counters["new"])
        with pytest.raises(RollbackError, match="bound to another counter"):
            engine(MemoryStore(crash.disk), counter=counters["old"])
        other = Rebinding(Named("third", 3), counters["new"])
        with pytest.raises(RollbackError, match="cut off"):
            engine(MemoryStore(crash.disk), counter=other)
        both = Rebinding(counters["old"], counters["new"])
        path = tmp_path / f"file{len(seen)}"
        path.write_bytes(crash.disk)
        with open_sealed(path, "r+b", key=KEY, counter=both) as file:
            assert file.read() == NEW
            assert file.bind(counters["new"]) == 4
        with open_sealed(path, key=KEY, counter=counters["new"]) as reader:
            assert reader.read() == NEW
        seen.append(crash)
    assert seen


def test_both_counters_are_for_files_that_are_there(tmp_path: Any) -> None:
    both = Rebinding(Named("old"), Named("new"))
    for mode in ("wb", "xb", "w+b"):
        with pytest.raises(ValueError, match="one counter"):
            open_sealed(tmp_path / "file", mode, key=KEY, counter=both)
    with pytest.raises(FileNotFoundError):
        open_sealed(tmp_path / "file", "ab", key=KEY, counter=both)
    with pytest.raises(UnsealError, match="no commit"):
        open_sealed(MemoryStore(), "ab", key=KEY, counter=both)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="counter"):
        open_sealed(MemoryStore(), key=KEY, counter=Rebinding(Named("old"), None))  # type: ignore[arg-type]
    store: Store = MemoryStore()
    with (
        open_sealed(store, "wb", key=KEY, counter=both.old) as file,
        pytest.raises(TypeError, match="the new one only"),
    ):
        file.bind(both)  # type: ignore[arg-type]


def test_a_counter_that_fails_while_binding_leaves_what_both_open() -> None:
    class Broken(Named):
        broken = True

        def advance(self, to: int, mark: bytes = b"") -> None:
            if self.broken:
                raise SealingError("the counter store is gone")
            super().advance(to, mark)

    store, old, new = MemoryStore(), Named("old"), Broken("new", 4)
    file = engine(store, write=True, create=True, counter=old)
    file.write(0, memoryview(b"data"))
    with pytest.raises(SealingError, match="gone"):
        file.bind(new)
    with pytest.raises(SealingError, match="earlier write failed"):
        file.commit()
    file.close(commit=False)
    new.broken = False
    assert read(bytes(store.data), old) is None
    assert read(bytes(store.data), new) is None
    assert read(bytes(store.data), Rebinding(old, new)) == b"data"
    assert read(bytes(store.data), new) == b"data"
