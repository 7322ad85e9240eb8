"""Blobs and counters inside an enclave: one blob is the newest one, whatever crashes."""

from __future__ import annotations

import pytest

from pyenclave import trusted
from pyenclave.errors import RollbackError, UnsealError
from pyenclave.trusted import _runtime


def test_sea_11_only_the_newest_blob_of_a_counter_opens(inside):
    inside()
    counter = trusted.Counter.create()
    old = trusted.seal(b"100", counter=counter)
    new = trusted.seal(b"0", counter=counter)
    assert trusted.unseal(new, counter=counter) == b"0"
    with pytest.raises(RollbackError, match="newest"):
        trusted.unseal(old, counter=counter)
    with pytest.raises(RollbackError, match="newest"):
        trusted.unseal(old)  # a bound blob is always compared
    inside()
    assert trusted.unseal(new) == b"0"
    with pytest.raises(RollbackError):
        trusted.unseal(old)


def test_sea_11_a_crash_between_storing_and_incrementing_loses_nothing(inside):
    inside()
    counter = trusted.Counter.create()
    first = trusted.seal(b"first", counter=counter)
    stored = trusted.seal(b"second", counter=counter, advance=False)
    assert trusted.unseal(first) == b"first"  # the second is not the newest yet
    inside()  # the writer died here
    assert trusted.unseal(stored) == b"second"
    assert counter.read() == 2  # opening caught up
    with pytest.raises(RollbackError):
        trusted.unseal(first)


def test_sea_11_a_counter_that_was_rolled_back_is_noticed(inside):
    platform = inside()
    counter = trusted.Counter.create()
    for _ in range(3):
        blob = trusted.seal(b"data", counter=counter)
    _, mark = platform.counters[counter.counter_id]
    platform.counters[counter.counter_id] = (1, mark)
    with pytest.raises(RollbackError):
        trusted.unseal(blob)


def two_pending():
    """A counter, its newest blob, and two that were sealed for its next value."""
    counter = trusted.Counter.create()
    newest = trusted.seal(b"B0", counter=counter)
    first = trusted.seal(b"B1", counter=counter, advance=False)
    assert trusted.unseal(newest) == b"B0"  # the writer died and began again from what it had
    second = trusted.seal(b"B2", counter=counter, advance=False)
    return counter, newest, first, second


def test_sea_11_two_blobs_pending_at_once_are_never_both_the_newest(inside):
    inside()
    for commit in (
        lambda counter, blob: counter.increment(blob=blob),
        lambda counter, blob: trusted.unseal(blob, counter=counter),
    ):
        for winner in (0, 1):
            counter, newest, *pending = two_pending()
            commit(counter, pending[winner])
            assert counter.read() == 2
            for _ in range(2):
                assert trusted.unseal(pending[winner]) == (b"B1", b"B2")[winner]
                with pytest.raises(RollbackError, match="another one took its place"):
                    trusted.unseal(pending[1 - winner])
                with pytest.raises(RollbackError):
                    counter.increment(blob=pending[1 - winner])
                with pytest.raises(RollbackError, match="newest"):
                    trusted.unseal(newest)
                inside()
            assert counter.read() == 2


def test_sea_11_an_increment_without_a_blob_leaves_no_newest_blob(inside):
    inside()
    counter, *blobs = two_pending()
    assert counter.increment() == 2
    for blob in blobs:
        with pytest.raises(RollbackError, match="newest"):
            trusted.unseal(blob)
    last = trusted.seal(b"B3", counter=counter)
    assert trusted.unseal(last) == b"B3"


def test_a_pending_blob_is_not_committed_once_the_counter_went_on(inside):
    inside()
    counter, _, first, _ = two_pending()
    later = trusted.seal(b"B3", counter=counter)
    last = trusted.seal(b"B4", counter=counter)
    for blob in (first, later):
        with pytest.raises(RollbackError):
            trusted.unseal(blob)
        with pytest.raises(RollbackError):
            counter.increment(blob=blob)
    assert trusted.unseal(last) == b"B4"


def test_an_increment_with_its_blob_may_be_repeated_after_a_lost_answer(inside):
    inside()
    counter = trusted.Counter.create()
    blob = trusted.seal(b"data", counter=counter, advance=False)
    assert [counter.increment(blob=blob, expected=0) for _ in range(3)] == [1, 1, 1]
    assert trusted.unseal(blob) == b"data"


def test_two_threads_that_open_one_pending_blob_both_succeed(inside, monkeypatch):
    inside()
    counter, _, first, second = two_pending()
    runtime = _runtime.current()
    ask = runtime.counter

    def raced(operation, *arguments):
        reading = ask(operation, *arguments)
        if operation == "read":  # the other one is faster, between reading and committing
            monkeypatch.setattr(runtime, "counter", ask)
            assert trusted.unseal(first) == b"B1"
        return reading

    monkeypatch.setattr(runtime, "counter", raced)
    assert trusted.unseal(first) == b"B1"
    assert counter.read() == 2
    with pytest.raises(RollbackError):
        trusted.unseal(second)


def test_two_threads_that_open_two_pending_blobs_do_not_both_succeed(inside, monkeypatch):
    inside()
    _, _, first, second = two_pending()
    runtime = _runtime.current()
    ask = runtime.counter

    def raced(operation, *arguments):
        reading = ask(operation, *arguments)
        if operation == "read":
            monkeypatch.setattr(runtime, "counter", ask)
            assert trusted.unseal(first) == b"B1"
        return reading

    monkeypatch.setattr(runtime, "counter", raced)
    with pytest.raises(RollbackError):
        trusted.unseal(second)
    assert trusted.unseal(first) == b"B1"


def test_a_blob_that_does_not_belong_to_the_counter_does_not_move_it(inside):
    inside()
    counter, other = trusted.Counter.create(), trusted.Counter.create()
    bound = trusted.seal(b"data", counter=other, advance=False)
    pending = trusted.seal(b"data", counter=counter, advance=False)
    for blob, error in (
        (bound, RollbackError),
        (trusted.seal(b"unbound"), RollbackError),
        (pending[:-1], UnsealError),
        (b"", UnsealError),
        (pending[:144] + bytes(8) + pending[152:], RollbackError),  # value 0: before it is -1
    ):
        with pytest.raises(error):
            counter.increment(blob=blob)
    with pytest.raises(RollbackError, match="another value"):
        counter.increment(blob=pending, expected=1)
    assert (counter.read(), other.read()) == (0, 0)
    # A header that lies about its value commits nothing that opens: the mark covers the value.
    old = trusted.seal(b"old", counter=counter)
    trusted.seal(b"new", counter=counter)
    raised = old[:144] + (3).to_bytes(8, "little") + old[152:]
    assert counter.increment(blob=raised) == 3
    with pytest.raises(UnsealError):
        trusted.unseal(raised)
    with pytest.raises(RollbackError):
        trusted.unseal(old)


def test_sea_11_a_blob_of_another_or_no_counter_is_refused_where_one_is_named(inside):
    inside()
    one, other = trusted.Counter.create(), trusted.Counter.create()
    unbound = trusted.seal(b"data")
    bound = trusted.seal(b"data", counter=one)
    for blob in (unbound, bound):
        with pytest.raises(RollbackError, match="not bound"):
            trusted.unseal(blob, counter=other)


def test_two_writers_at_once_do_not_both_become_the_newest(inside, monkeypatch):
    inside()
    counter = trusted.Counter.create()
    monkeypatch.setattr(counter, "read", lambda: 0)
    trusted.seal(b"one", counter=counter)
    with pytest.raises(RollbackError):
        trusted.seal(b"two", counter=counter)


def test_a_destroyed_counter_opens_nothing(inside):
    inside()
    counter = trusted.Counter.create()
    blob = trusted.seal(b"data", counter=counter)
    counter.destroy()
    with pytest.raises(RollbackError):
        trusted.unseal(blob)


def test_a_counter_identity_of_another_size_is_refused():
    with pytest.raises(ValueError, match="16 bytes"):
        trusted.Counter(b"short")
