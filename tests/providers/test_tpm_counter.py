"""Counters of a TPM: the protocol, crashes at each command, other writers, sealed files."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pyenclave.errors import (
    RollbackError,
    SealingError,
    SealLimitError,
    TpmError,
    UnsealError,
)
from pyenclave.formats import tpm_wire
from pyenclave.providers import counter as module
from pyenclave.providers.counter import FIRST_INDEX, LAST_INDEX, TpmCounter
from pyenclave.sealed.counter import MAX_STEP, Counter, FileCounter
from pyenclave.sealed.file import open_sealed
from pyenclave.testing.vtpm import Swtpm
from pyenclave.tpm import Tpm

INDEX = FIRST_INDEX + 0x100


@pytest.fixture
def counter(swtpm: Swtpm) -> Iterator[TpmCounter]:
    made = TpmCounter(swtpm.address, INDEX)
    yield made
    made.destroy()


def again(counter: TpmCounter) -> TpmCounter:
    return TpmCounter(counter._address, counter._index, create=False)


# ---- the protocol of counters -----------------------------------------------------------------


def test_it_is_a_counter_and_another_object_sees_the_same(counter):
    assert isinstance(counter, Counter)
    start = counter.read()
    counter.advance(start + 1, b"first")
    assert again(counter).reading() == (start + 1, b"first")
    assert again(counter).id == counter.id
    assert len(counter.id) == 16


def test_a_value_below_the_counters_is_refused_and_changes_nothing(counter):
    counter.advance(counter.read() + 1, b"mark")
    now = counter.reading()
    with pytest.raises(RollbackError, match="beyond this value"):
        counter.advance(now.value - 1)
    assert counter.reading() == now


def test_of_two_states_for_one_value_only_the_first_is_committed(counter):
    to = counter.read() + 1
    counter.advance(to, b"first")
    counter.advance(to, b"first")  # again, after a lost answer
    counter.advance(to)
    with pytest.raises(RollbackError, match="another state"):
        counter.advance(to, b"second")
    assert counter.reading() == (to, b"first")


def test_an_unmarked_advance_commits_no_state(counter):
    to = counter.read() + 1
    counter.advance(to, b"first")
    counter.advance(to + 1)
    assert counter.reading() == (to + 1, b"")
    with pytest.raises(RollbackError, match="expected none"):
        counter.advance(to + 1, b"second")


def test_steps_and_types_are_those_of_every_counter(counter):
    start = counter.read()
    with pytest.raises(SealLimitError):
        counter.advance(start + MAX_STEP + 1)
    with pytest.raises(TypeError):
        counter.advance("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="marks"):
        counter.advance(start + 1, bytes(65))
    counter.advance(start + 3, b"m" * 64)
    assert counter.reading() == (start + 3, b"m" * 64)


@pytest.mark.parametrize("index", [0, FIRST_INDEX - 1, LAST_INDEX, 0x01400001])
def test_an_index_that_is_not_an_owners_is_refused(index):
    with pytest.raises(ValueError, match="index of a counter"):
        TpmCounter("swtpm:path=/nowhere", index)


def test_a_tpm_that_is_not_there_is_a_sealing_error(tmp_path):
    with pytest.raises(SealingError, match="cannot be opened"):
        TpmCounter(str(tmp_path / "tpmrm0"), INDEX)


def test_a_counter_that_is_not_there_is_not_made_unless_asked(swtpm):
    with pytest.raises(SealingError, match="no such counter"):
        TpmCounter(swtpm.address, INDEX + 8, create=False)


# ---- who removes or changes it ----------------------------------------------------------------


def test_a_counter_that_was_removed_is_noticed_and_made_anew_it_is_another_and_higher(swtpm):
    first = TpmCounter(swtpm.address, INDEX + 16)
    first.advance(first.read() + 1, b"mark")
    value = first.read()
    first.destroy()
    with pytest.raises(RollbackError, match="gone"):
        first.read()
    second = TpmCounter(swtpm.address, INDEX + 16)
    assert second.id != first.id
    assert second.read() > value
    with pytest.raises(RollbackError, match="another counter"):
        first.advance(value + 1)
    second.destroy()


def test_an_index_of_somebody_else_is_left_alone(swtpm):
    with swtpm.open() as tpm:
        tpm.nv_define(INDEX + 24, 8)
        tpm.nv_define(INDEX + 27, 32)
    for index, words in ((INDEX + 24, "somebody else"), (INDEX + 26, "beside it")):
        with pytest.raises(SealingError, match=words):
            TpmCounter(swtpm.address, index)
    with swtpm.open() as tpm:
        assert tpm.nv_public(INDEX + 24).size == 8
        tpm.nv_undefine(INDEX + 24)
        tpm.nv_undefine(INDEX + 27)


def test_who_puts_back_the_mark_cannot_lower_the_value(swtpm, counter):
    start = counter.read()
    counter.advance(start + 1, b"old")
    with swtpm.open() as tpm:
        old = tpm.nv_read(INDEX + 1)
    counter.advance(start + 2, b"new")
    with swtpm.open() as tpm:
        tpm.nv_write(INDEX + 1, old)
    assert again(counter).reading() == (start + 2, b"")
    with swtpm.open() as tpm:
        tpm.nv_write(INDEX + 1, b"\xff" * len(old))
    with pytest.raises(SealingError, match="not one of ours"):
        counter.read()


@pytest.mark.parametrize("byte", [24, 31, 32, 33, 96, 97, 112])
def test_a_damaged_mark_counts_as_none(swtpm, counter, byte):
    """A write that was cut off by a power failure leaves a slot that its check does not fit."""
    start = counter.read()
    counter.advance(start + 1, b"mark")
    with swtpm.open() as tpm:
        data = bytearray(tpm.nv_read(INDEX + 1))
        data[byte] ^= 1
        tpm.nv_write(INDEX + 1, bytes(data))
    assert counter.reading() == (start + 1, b"")


# ---- crashes and others -----------------------------------------------------------------------


class StoppedError(Exception):
    """The process ends here."""


def stopping(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End with the command of NV that would be number *after* among those that change something."""
    left = [after]
    for name in ("nv_define", "nv_write", "nv_increment"):
        usual = getattr(Tpm, name)

        def step(self: Tpm, *args: object, usual=usual, **options: object) -> None:
            if left[0] == 0:
                raise StoppedError
            left[0] -= 1
            usual(self, *args, **options)

        monkeypatch.setattr(Tpm, name, step)


@pytest.mark.parametrize("after", [0, 1])
def test_a_writer_that_was_stopped_leaves_the_old_state(counter, monkeypatch, after):
    start = counter.read()
    counter.advance(start + 1, b"old")
    with monkeypatch.context() as patch:
        stopping(after, patch)
        with pytest.raises(StoppedError):
            counter.advance(start + 2, b"never")
    assert again(counter).reading() == (start + 1, b"old")
    counter.advance(start + 2, b"new")  # what the stopped one wrote for the same value is nothing
    assert again(counter).reading() == (start + 2, b"new")
    with pytest.raises(RollbackError):
        counter.advance(start + 2, b"never")


@pytest.mark.parametrize("after", range(5))
def test_a_making_that_was_cut_off_is_finished_by_the_next(swtpm, monkeypatch, after):
    index = INDEX + 32
    with monkeypatch.context() as patch:
        stopping(after, patch)
        if after < 4:
            with pytest.raises(StoppedError):
                TpmCounter(swtpm.address, index)
        else:
            TpmCounter(swtpm.address, index)
    made = TpmCounter(swtpm.address, index)
    made.advance(made.read() + 1, b"mark")
    assert again(made).reading().mark == b"mark"
    made.destroy()


def test_an_answer_that_was_lost_is_found_out_by_asking_again(counter, monkeypatch):
    start = counter.read()
    usual = Tpm.nv_increment

    def lost(self: Tpm, *args: object, **options: object) -> None:
        usual(self, *args, **options)
        raise TpmError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Tpm, "nv_increment", lost)
        with pytest.raises(SealingError, match="no answer"):
            counter.advance(start + 1, b"mark")
    counter.advance(start + 1, b"mark")  # nothing is done: it was
    assert counter.reading() == (start + 1, b"mark")


def test_somebody_who_takes_no_lock_is_noticed_and_nothing_is_committed_twice(counter, monkeypatch):
    start = counter.read()
    usual = Tpm.nv_increment

    def twice(self: Tpm, *args: object, **options: object) -> None:
        usual(self, *args, **options)
        usual(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Tpm, "nv_increment", twice)
        with pytest.raises(RollbackError, match="somebody else"):
            counter.advance(start + 1, b"mark")


WORKER = """
import os
import sys
from pyenclave.errors import RollbackError
from pyenclave.providers.counter import TpmCounter

address, index, lock, times = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
counter = TpmCounter(address, index, create=False, lock=lock)
while times:
    try:
        counter.advance(counter.read() + 1, b"process %d" % os.getpid())
        times -= 1
    except RollbackError as error:  # another was faster
        assert "beyond" in str(error) or "another state" in str(error), error
"""


def test_processes_and_threads_lose_no_step(swtpm, counter, tmp_path):
    start, times = counter.read(), 10
    arguments = [swtpm.address, str(INDEX), str(tmp_path / "lock"), str(times)]
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    mine = TpmCounter(swtpm.address, INDEX, create=False, lock=tmp_path / "lock")

    def work() -> None:
        done = 0
        while done < times:
            try:
                mine.advance(mine.read() + 1, b"thread %d" % threading.get_ident())
                done += 1
            except RollbackError:
                continue

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for process in processes:
        assert process.communicate(timeout=60) == (None, b"")
        assert process.returncode == 0
    assert counter.read() == start + 4 * times


def test_a_lock_that_is_held_for_ever_ends_in_an_error(swtpm, counter, tmp_path):
    import fcntl

    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SealingError, match="another process held the TPM"):
            TpmCounter(swtpm.address, INDEX, lock=tmp_path / "lock", timeout=0.05)


def test_a_broken_transport_is_a_sealing_error(swtpm, counter, monkeypatch):
    monkeypatch.setattr(module.Tpm, "nv_counter", lambda *_, **__: 1 << 63)
    with pytest.raises(RollbackError, match="went back"):
        counter.read()


# ---- sealed files -----------------------------------------------------------------------------


def test_an_older_copy_of_a_sealed_file_is_refused(counter, tmp_path):
    path, key = tmp_path / "file", bytes(range(32))
    with open_sealed(path, "wb", key=key, counter=counter) as file:
        file.write(b"first")
    old = path.read_bytes()
    with open_sealed(path, "r+b", key=key, counter=counter) as file:
        file.write(b"later")
    with open_sealed(path, key=key, counter=again(counter)) as file:
        assert file.read() == b"later"
    path.write_bytes(old)
    with pytest.raises(RollbackError):
        open_sealed(path, key=key, counter=again(counter))


def test_a_sealed_file_moves_from_one_counter_to_another(counter, tmp_path):
    path, key = tmp_path / "file", bytes(range(32))
    mine = FileCounter(tmp_path / "counters")
    with open_sealed(path, "wb", key=key, counter=mine) as file:
        file.write(b"data")
    old = path.read_bytes()
    with open_sealed(path, "r+b", key=key, counter=mine) as file:
        file.bind(counter)
    with open_sealed(path, "rb", key=key, counter=again(counter)) as file:
        assert file.read() == b"data"
    path.write_bytes(old)
    with pytest.raises((RollbackError, UnsealError)):
        open_sealed(path, "rb", key=key, counter=mine)


def test_a_tpm_that_wants_a_password_gets_it(swtpm):
    """Owners of other TPMs than a cloud's may have set one."""
    auth = b"owner password"
    with swtpm.open() as tpm:
        _set_owner_password(tpm, b"", auth)
    try:
        with pytest.raises(SealingError, match="authorisation is wrong"):
            TpmCounter(swtpm.address, INDEX + 64)
        counter = TpmCounter(swtpm.address, INDEX + 64, owner_password=auth)
        counter.advance(counter.read() + 1, b"mark")
        assert counter.reading().mark == b"mark"
        counter.destroy()
    finally:
        with swtpm.open() as tpm:
            _set_owner_password(tpm, auth, b"")


def _set_owner_password(tpm: Tpm, old: bytes, new: bytes) -> None:
    """TPM2_HierarchyChangeAuth."""
    tpm.run(0x129, (0x40000001,), tpm_wire.sized(new), passwords=(old,)).end()
