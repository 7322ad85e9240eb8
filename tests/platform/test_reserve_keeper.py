"""The thread that keeps warm workers goes on, whatever goes wrong in it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyenclave._platform.reserves import Reserves
from pyenclave.calls import ring

NAME = "keeper of the test"
WISH: Any = SimpleNamespace(
    judged=SimpleNamespace(info=SimpleNamespace(threads=1, shared_memory=0))
)


class Launcher:
    """Starts no worker: there is a flaw in it."""

    def __init__(self) -> None:
        self.tried = threading.Event()

    def warm(self, *args: Any, **kwargs: Any) -> Any:
        self.tried.set()
        raise RuntimeError("a flaw")


@pytest.fixture
def launcher() -> Launcher:
    return Launcher()


@pytest.fixture
def reserves(launcher: Launcher) -> Iterator[Reserves]:
    made = Reserves(
        launcher,  # type: ignore[arg-type]
        book=lambda: None,
        unbook=lambda: None,
        wanted=lambda: True,
        slow=lambda: None,
        most=4,
        name=NAME,
    )
    yield made
    made.close()


@pytest.fixture
def image_fd() -> Iterator[int]:
    fd = os.memfd_create("image")
    yield fd
    os.close(fd)


@pytest.fixture
def ring_fd() -> Iterator[int]:
    fd = ring.create(1)
    yield fd
    os.close(fd)


@pytest.mark.timeout(60)
def test_a_flaw_while_a_worker_is_started_leaves_nobody_waiting(
    image_fd: int, ring_fd: int, reserves: Reserves, launcher: Launcher
) -> None:
    kind = reserves.reserve(WISH, image_fd).reserve_id
    slot = reserves.offer(kind, ring_fd)[0].slots[0]
    assert launcher.tried.wait(30)
    taken = reserves.take(kind)  # and no worker: whoever takes it starts one
    assert (taken.slot, taken.candidate) == (slot, None)
    assert "a flaw" in reserves.ask(kind).error
    reserves.used(kind, slot)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_keeper_that_ended_by_a_flaw_has_a_successor(
    image_fd: int,
    ring_fd: int,
    reserves: Reserves,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a new reserve: an offer that nobody serves would be waited for in vain."""
    watch = reserves._watch

    def fail(wake: int) -> bool:
        monkeypatch.setattr(reserves, "_watch", watch)
        raise RuntimeError("a flaw of the keeper")

    monkeypatch.setattr(reserves, "_watch", fail)
    kind = reserves.reserve(WISH, image_fd).reserve_id
    while any(thread.name == NAME for thread in threading.enumerate()):
        time.sleep(0.01)
    assert reserves.offer(kind, ring_fd)[0].slots
    assert launcher.tried.wait(30)
