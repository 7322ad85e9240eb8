"""Ctrl-C at any moment leaves no lock of a sealed file taken: it can be used and closed."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from interrupts import in_another_thread, interrupted, is_taken

from pyenclave import open_sealed
from pyenclave.errors import SealingError, UnsealError
from pyenclave.sealed._remote import RangeReader
from pyenclave.sealed.envelope import Together
from pyenclave.sealed.stream import StreamWriter

KEY = bytes(range(32))
FILES = (
    "file.py",
    "file_commits.py",
    "file_engine.py",
    "file_store.py",
    "file_tree.py",
    "stream.py",
    "test_file_interrupts.py",
)
# Files that belong to nobody after an interrupt are closed as they go.
# An interrupt in a finalizer, or in what it drops half-made, Python tells and goes on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("where", ["file", "object"])
def test_a_file(where: str, tmp_path: Path) -> None:
    numbers = itertools.count()
    files: list[Any] = []

    def work() -> None:
        number = next(numbers)
        place = tmp_path / str(number) if where == "file" else io.BytesIO()
        files.append(open_sealed(place, "w+b", key=KEY))
        file = files[-1]
        # What was interrupted may be told as a transaction that failed.
        with contextlib.suppress(SealingError):
            file.write(b"x" * 5000)
            file.flush()
            file.seek(0)
            assert len(file.read()) == 5000
            file.truncate(100)
            file.raw.commit()
            file.write(b"y")
            file.raw.discard()
            file.close()

    def close() -> None:
        file = files.pop()  # its finalizer closes it too, after this
        with contextlib.suppress(SealingError):
            file.raw.close()

    def after() -> None:
        while files:
            engine = files[-1].raw.engine
            assert not is_taken(engine._lock)
            if where == "object":
                assert not is_taken(engine._store._lock)
            in_another_thread(close)

    assert interrupted(work, FILES, after) > 100


def test_a_file_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    with open_sealed(tmp_path / "x", "w+b", key=KEY) as file:
        raw = file.raw
        raw.write(b"before")
        raw.commit()
        found = bytearray(6)

        def work() -> None:
            raw.engine.read_into(0, memoryview(found))

        def after() -> None:
            found[:] = bytes(6)
            in_another_thread(work)
            assert found == b"before"

        assert interrupted(work, FILES, after) > 5


def test_a_stream() -> None:
    stream = StreamWriter(io.BytesIO(), key=KEY, chunk_size=100)

    def work() -> None:
        stream.write(bytes(250))
        stream.flush()
        stream.close()

    def after() -> None:
        nonlocal stream
        assert not is_taken(stream._lock)
        in_another_thread(stream.abandon)
        stream = StreamWriter(io.BytesIO(), key=KEY, chunk_size=100)

    assert interrupted(work, FILES, after) > 20


class _Key:
    """Wraps to what it got."""

    def fresh(self) -> tuple[bytes, Any]:
        return KEY, None


def test_what_files_are_read_through() -> None:
    reader = RangeReader(lambda start, stop: bytes(stop - start), 1000, 100)
    together = Together(_Key())  # type: ignore[arg-type]

    def work() -> None:
        with contextlib.suppress(UnsealError):
            assert reader.pread(150, 200) == bytes(200)
            assert together.fresh()[0] == KEY

    def after() -> None:
        assert not is_taken(reader._lock)
        assert not is_taken(together._lock)

    assert interrupted(work, (*FILES, "_remote.py", "envelope.py"), after) > 5
