"""Handlers that run on after the nested call that waits for them was given up."""

from __future__ import annotations

import threading
import time

import pytest

from pyenclave import trusted
from pyenclave.errors import CallTimeoutError
from pyenclave.host.handle import Options


@trusted.ocall(allow=["inner", "add"])
def outer_host(key: str) -> str:
    raise AssertionError


@trusted.ocall
def inner_host(key: str) -> str:
    raise AssertionError


@trusted.ocall
def other_host(key: str) -> str:
    raise AssertionError


def outer(key: str) -> str:
    return outer_host(key)


def inner(key: str) -> str:
    return inner_host(key)


def other(key: str) -> str:
    return other_host(key)


def add(a: int, b: int) -> int:
    return a + b


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pytest.fixture
def make(pair):
    def one(lanes, **handlers):
        return pair(
            outer,
            inner,
            other,
            add,
            sleep,
            stubs=(outer_host, inner_host, other_host),
            handlers={"other_host": str.upper, **handlers},
            lanes=lanes,
        )

    return one


def inner_given_up(one) -> None:
    with pytest.raises(CallTimeoutError):
        one.functions.with_options(Options(timeout=0.1)).named("inner")("x")


@pytest.mark.timeout(60)
def test_a_handler_calls_again_on_its_lane_while_the_inner_one_still_runs(make):
    def outer_handler(key: str) -> str:
        inner_given_up(one)
        return str(one.add(1, 2))

    def inner_handler(key: str) -> str:
        time.sleep(1.0)
        return key

    one = make(1, outer_host=outer_handler, inner_host=inner_handler)
    assert one.outer("x") == "3"
    assert one.add(2, 2) == 4


@pytest.mark.timeout(60)
def test_a_lane_that_was_let_go_is_no_longer_the_thread_s_of_its_last_handler(make, until):
    """Two threads on one lane would get each other's answers."""
    release = threading.Event()
    started = threading.Event()

    def outer_handler(key: str) -> str:
        inner_given_up(one)
        return "given up"

    def inner_handler(key: str) -> str:
        time.sleep(1.0)
        return key

    def other_handler(key: str) -> str:
        started.set()
        release.wait(10)
        return key

    one = make(2, outer_host=outer_handler, inner_host=inner_handler, other_host=other_handler)
    assert one.outer("x") == "given up"  # on lane 0, by this thread
    found: list[object] = []
    sleeper = threading.Thread(target=lambda: found.append(one.sleep(0.5)))
    sleeper.start()  # takes lane 0
    until(lambda: one.lanes.busy == 1)
    asker = threading.Thread(target=lambda: found.append(one.other("k")))
    asker.start()  # takes lane 1, and a handler runs
    assert started.wait(20)
    assert one.add(20, 22) == 42  # as soon as lane 0 is free
    release.set()
    sleeper.join()
    asker.join()
    assert sorted(map(str, found)) == ["0.5", "k"]
    assert one.lanes.busy == 0
    assert one.add(2, 2) == 4
