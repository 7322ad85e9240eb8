"""Ctrl-C while a thread is started: before there is one, and when it runs already."""

from __future__ import annotations

import contextlib
import gc
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pool_places import wait_for

from pyenclave.collateral import http
from pyenclave.host import _ocalls
from pyenclave.host.pool import EnclavePool
from pyenclave.sealed.heap import SealedHeap

START = threading.Thread.start


@pytest.fixture(params=["before", "after"])
def interrupt(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Interrupt the next start of a thread of that name, once."""

    @contextlib.contextmanager
    def interrupt(name: str) -> Iterator[None]:
        left = [1]

        def start(thread: threading.Thread) -> None:
            wanted = left and thread.name.startswith(name)
            if wanted:
                left.clear()
            if not wanted or request.param == "after":
                START(thread)
            if wanted:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(KeyboardInterrupt):
                yield
        assert not left

    return interrupt


def running(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def test_a_pool_whose_start_is_interrupted_leaves_no_thread(
    pool_image, pool_state, interrupt
) -> None:
    before = running("pyenclave-pool")
    pool = EnclavePool(pool_image, state=pool_state, quiet=True, size=1)
    with interrupt("pyenclave-pool"):
        pool.start()
    assert pool.stats.state == "closed"
    del pool
    gc.collect()
    assert wait_for(lambda: running("pyenclave-pool") <= before)
    with EnclavePool(pool_image, state=pool_state, quiet=True, size=1) as pool:
        assert pool.add(1, 2) == 3


def test_a_handlers_thread_whose_start_is_interrupted_is_not_waited_for(
    interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ocalls, "_IDLE_SECONDS", 0.05)
    before = running("pyenclave-ocall")
    threads, done = _ocalls._Threads(), []
    with interrupt("pyenclave-ocall"):
        threads.submit(lambda: done.append("first"))
    for number in range(3):
        threads.submit(lambda number=number: done.append(number))
    assert wait_for(lambda: {0, 1, 2} <= set(done))
    # Each knows that nobody waits for it, and ends when it had nothing to do for a while.
    assert wait_for(lambda: running("pyenclave-ocall") <= before)
    assert threads._waiting == 0


def test_a_watch_whose_start_is_interrupted_takes_no_samples(interrupt) -> None:
    with SealedHeap("1 MiB", "256 KiB") as heap:
        watch = heap.watch(interval=0.001, file=io.StringIO())
        with interrupt("sealed-heap-watch"):
            watch.__enter__()
        assert wait_for(lambda: not running("sealed-heap-watch"))


def test_a_guard_whose_start_is_interrupted_is_cancelled(
    interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards: list[threading.Timer] = []

    class Timer(threading.Timer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            guards.append(self)

    monkeypatch.setattr("threading.Timer", Timer)
    attempt = http._Request.__new__(http._Request)
    attempt._deadline = time.monotonic() + 1000
    attempt._connection = type("Connection", (), {"close": lambda self: None, "sock": None})()
    with interrupt("Thread"):
        attempt.run()
    assert [guard.finished.is_set() for guard in guards] == [True]
