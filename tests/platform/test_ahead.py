"""What is made ahead of launches: never given out twice, never kept when it is outdated."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from pyenclave._platform import ahead as module
from pyenclave._platform.ahead import MOST, Ahead
from pyenclave.errors import LaunchError


def within(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def ahead() -> Iterator[Ahead[int]]:
    made: Ahead[int] = Ahead()
    yield made
    made.close()


def stock(ahead: Ahead[int]) -> tuple[int, int]:
    return len(ahead._attendants), len(ahead._drafts)


def test_drafts_and_threads_are_made_after_a_launch_and_each_is_given_out_once(
    ahead: Ahead[int],
) -> None:
    numbers = itertools.count()
    given = [ahead.draft("kind", lambda: next(numbers))]
    assert stock(ahead) == (0, 0)
    ahead.refill()
    assert within(lambda: stock(ahead) == (MOST, MOST))
    threads = [ahead.attendant() for _ in range(MOST + 2)]
    given += [ahead.draft("kind", lambda: next(numbers)) for _ in range(MOST + 2)]
    assert len(set(given)) == len(given) == MOST + 3
    assert len({attendant.thread for attendant in threads}) == MOST + 2
    ran = threading.Event()
    threads[0].begin(ran.set)
    assert ran.wait(20)
    for attendant in threads[1:]:
        attendant.dismiss()


def test_drafts_of_another_kind_are_dropped(ahead: Ahead[int]) -> None:
    ahead.draft("old", lambda: 1)
    ahead.refill()
    assert within(lambda: stock(ahead)[1] == MOST)
    assert ahead.draft("new", lambda: 2) == 2
    assert stock(ahead)[1] == 0
    ahead.refill()
    assert within(lambda: stock(ahead)[1] == MOST)
    assert [ahead.draft("new", lambda: 3) for _ in range(MOST + 1)] == [2] * MOST + [3]


def test_a_draft_that_was_begun_for_another_kind_is_not_kept(ahead: Ahead[int]) -> None:
    entered, go = threading.Event(), threading.Event()
    calls = itertools.count()

    def slow() -> int:
        if next(calls):  # the first is the launch's own
            entered.set()
            go.wait(30)
        return 1

    ahead.draft("old", slow)
    ahead.refill()
    assert entered.wait(20)
    assert ahead.draft("new", lambda: 2) == 2
    go.set()
    ahead.refill()
    assert within(lambda: stock(ahead) == (MOST, MOST))
    assert set(ahead._drafts) == {2}


def test_nothing_is_made_while_launches_follow_each_other(
    ahead: Ahead[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(module, "time", clock)
    for _ in range(20):
        ahead.draft("kind", lambda: 1)
        ahead.refill()
        now[0] += 0.9 * module._QUIET
        time.sleep(0.005)  # for what would make some
        assert stock(ahead) == (0, 0)
    now[0] += module._QUIET
    assert within(lambda: stock(ahead) == (MOST, MOST))


def test_without_threads_to_be_had_a_launch_is_told(
    ahead: Ahead[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise LaunchError("no thread")

    monkeypatch.setattr(module, "Attendant", refuse)
    ahead.draft("kind", lambda: 1)
    ahead.refill()
    with pytest.raises(LaunchError, match="no thread"):
        ahead.attendant()
    time.sleep(0.1)
    assert stock(ahead) == (0, 0)
    assert ahead._thread is not None
    assert ahead._thread.is_alive()


def test_closing_ends_every_thread_that_waits() -> None:
    ahead: Ahead[int] = Ahead()
    ahead.draft("kind", lambda: 1)
    ahead.refill()
    assert within(lambda: stock(ahead) == (MOST, MOST))
    threads = [attendant.thread for attendant in ahead._attendants]
    assert ahead._thread is not None
    threads.append(ahead._thread)
    ahead.close()
    ahead.close()
    assert not any(thread.is_alive() for thread in threads)
    ahead.refill()
    assert stock(ahead) == (0, 0)
