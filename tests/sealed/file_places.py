"""Stores for tests: one that records what a disk is told, and one that fails when it is told to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyenclave.errors import RollbackError
from pyenclave.sealed.file_engine import SealedEngine
from pyenclave.sealed.file_tree import Node, Tree

SECTOR = 512


class MemoryStore:
    """A store in memory that outlives its openings."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)

    def pread(self, into: memoryview, offset: int) -> int:
        part = self.data[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)

    def pwrite(self, data: memoryview, offset: int) -> int:
        apply(self.data, ("write", offset, bytes(data)))
        return len(data)

    def truncate(self, size: int) -> None:
        apply(self.data, ("truncate", size, b""))

    def fsync(self) -> None:
        pass

    def size(self) -> int:
        return len(self.data)

    def lock(self, *, exclusive: bool) -> None:
        pass

    def close(self) -> None:
        pass


Step = tuple[str, int, bytes]


def apply(data: bytearray, step: Step) -> None:
    """Do one write or truncation."""
    kind, at, what = step
    if kind == "truncate":
        del data[at:]
        data.extend(bytes(at - len(data)))
    else:
        data.extend(bytes(max(0, at + len(what) - len(data))))
        data[at : at + len(what)] = what


class RecordingStore(MemoryStore):
    """Remembers every step; ``forget_fsync`` leaves out each n-th of a commit's fsyncs."""

    def __init__(self, data: bytes = b"", *, forget_fsync: int | None = None) -> None:
        super().__init__(data)
        self.first = bytes(data)
        self.steps: list[Step] = []
        self.fsyncs = 0
        self.forget = forget_fsync

    def pwrite(self, data: memoryview, offset: int) -> int:
        self.steps.append(("write", offset, bytes(data)))
        return super().pwrite(data, offset)

    def truncate(self, size: int) -> None:
        self.steps.append(("truncate", size, b""))
        super().truncate(size)

    def fsync(self) -> None:
        if self.forget is None or self.fsyncs % 2 != self.forget:
            self.steps.append(("fsync", 0, b""))
        self.fsyncs += 1

    def crashes(self, *, subsets: int, seed: int) -> Iterator[tuple[int, bytes]]:
        """
        Yield what a disk may hold after a crash, with the number of steps that were begun.

        Everything before the last fsync is there. Of what follows, any part may be, in any order:
        all of it, none, each write alone or missing, every subset of few, *subsets* random ones of
        more, reordered; and of any write any sectors.
        """
        choose = random.Random(seed)
        durable = bytearray(self.first)
        pending: list[Step] = []
        for count, step in enumerate([*self.steps, ("fsync", 0, b"")]):
            for state in self._states(durable, pending, subsets, choose):
                yield count, state
            if step[0] == "counter":
                continue  # durable at once, and not on this disk
            if step[0] == "fsync":
                for done in pending:
                    apply(durable, done)
                pending = []
            else:
                pending.append(step)

    def _states(
        self, durable: bytearray, pending: list[Step], subsets: int, choose: random.Random
    ) -> Iterator[bytes]:
        count = len(pending)
        chosen: set[tuple[int, ...]] = {(), tuple(range(count))}
        if count <= 3:
            for size in range(count + 1):
                chosen.update(itertools.permutations(range(count), size))
        elif count:
            last = count - 1
            chosen.add((last,))
            chosen.add(tuple(range(last)))
            for _ in range(subsets):
                some = [i for i in range(count) if choose.random() < 0.7]
                if choose.random() < 0.3:
                    choose.shuffle(some)
                chosen.add(tuple(some))
        for some_steps in sorted(chosen):
            state = bytearray(durable)
            for i in some_steps:
                apply(state, pending[i])
            yield bytes(state)
        if count and pending[-1][0] == "write":
            _, at, what = pending[-1]
            sectors = range(0, len(what), SECTOR)
            for _ in range(max(1, subsets // 2)):
                state = bytearray(durable)
                for step in pending[:-1]:
                    apply(state, step)
                for begin in sectors:
                    if choose.random() < 0.5:
                        apply(state, ("write", at + begin, what[begin : begin + SECTOR]))
                yield bytes(state)


@dataclass
class Fault:
    """Which call fails, and how."""

    call: int
    error: int


class FailingStore(MemoryStore):
    """Fails at one call, or writes and reads less than it was asked for."""

    def __init__(self, data: bytes = b"", *, short: bool = False) -> None:
        super().__init__(data)
        self.calls = 0
        self.fault: Fault | None = None
        self.short = short
        self.choose = random.Random(7)

    def _count(self) -> None:
        self.calls += 1
        if self.fault is not None and self.calls == self.fault.call:
            raise OSError(self.fault.error, "as the test wants it")

    def _less(self, size: int) -> int:
        return self.choose.randrange(1, size + 1) if self.short and size else size

    def pread(self, into: memoryview, offset: int) -> int:
        self._count()
        return super().pread(into[: self._less(len(into))], offset)

    def pwrite(self, data: memoryview, offset: int) -> int:
        try:
            self._count()
        except OSError:
            # A part of it is there all the same.
            super().pwrite(data[: len(data) // 2], offset)
            raise
        return super().pwrite(data[: self._less(len(data))], offset)

    def truncate(self, size: int) -> None:
        self._count()
        super().truncate(size)

    def fsync(self) -> None:
        self._count()


class CountedStore(RecordingStore):
    """Remembers between which steps counters were advanced; ``log`` has by which and to what."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(data)
        self.log: list[tuple[str, int, bytes]] = []

    def advanced(self, counter: str, to: int, mark: bytes) -> None:
        """Note that *counter* has another value from here on."""
        self.steps.append(("counter", len(self.log), b""))
        self.log.append((counter, to, mark))

    def counters(self, steps: int) -> dict[str, tuple[int, bytes]]:
        """Return what each counter had after so many steps."""
        now = {}
        for kind, number, _ in self.steps[:steps]:
            if kind == "counter":
                name, to, mark = self.log[number]
                now[name] = (to, mark)
        return now


class FakeCounter:
    """A counter with marks that the test may set back."""

    id = b"counter of the test"

    def __init__(self, value: int = 0, mark: bytes = b"") -> None:
        self.value, self.mark = value, mark
        self.log: list[tuple[int, bytes]] = []

    def read(self) -> int:
        return self.value

    def reading(self) -> tuple[int, bytes]:
        return self.value, self.mark

    def advance(self, to: int, mark: bytes = b"") -> None:
        if to < self.value or (to == self.value and mark != self.mark):
            raise RollbackError("the counter never goes back", expected=self.value, found=to)
        self.value, self.mark = to, mark
        self.log.append((to, mark))


class PlainCounter:
    """A counter of value and identity only."""

    id = b"plain counter"

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def read(self) -> int:
        return self.value

    def advance(self, to: int) -> None:
        if to < self.value:
            raise RollbackError("the counter never goes back")
        self.value = to


def content(engine: SealedEngine) -> bytes:
    """Return all that an opened file holds."""
    data = bytearray(engine.size)
    assert engine.read_into(0, memoryview(data)) == engine.size
    return bytes(data)


def audit(engine: SealedEngine) -> None:
    """Check that every slot of a committed file is used once or free, and not both."""
    tree: Tree = engine._tree
    geometry = engine.geometry
    owner: dict[int, str] = {}

    def own(slot: int, who: str) -> None:
        assert geometry.first_slot <= slot < engine.header.end, (slot, who)
        assert slot not in owner, (slot, who, owner[slot])
        owner[slot] = who

    def walk(node: Node) -> None:
        slots = node.columns(0, geometry.fanout)[0]
        for entry in slots.nonzero()[0].tolist():
            number = node.index * geometry.fanout + entry
            own(int(slots[entry]), f"level {node.level - 1} number {number}")
            if node.level > 1:
                below = tree._node(node.level - 1, number)
                assert below is not None
                walk(below)

    walk(tree.top)
    space: Any = tree.space
    free = 0
    while space.chain.slot:
        own(space.chain.slot, "free list")
        space._ready = []
        space._load_chain()
        for start, length in space._ready:
            free += length
            for slot in range(start, start + length):
                own(slot, "free")
    assert free == engine.header.free_slots
    assert len(owner) == engine.header.end - geometry.first_slot
