"""The thread that keeps warm workers goes on, whatever goes wrong in it."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pyenclave._platform.reserves import Reserves
from pyenclave.calls import ring


@pytest.mark.timeout(60)
def test_a_flaw_while_a_worker_is_started_leaves_nobody_waiting() -> None:
    tried = threading.Event()

    class Launcher:
        def warm(self, *args: Any, **kwargs: Any) -> Any:
            tried.set()
            raise RuntimeError("a flaw")

    reserves = Reserves(
        Launcher(),  # type: ignore[arg-type]
        book=lambda: None,
        unbook=lambda: None,
        wanted=lambda: True,
        slow=lambda: None,
        most=4,
        name="keeper",
    )
    wish: Any = SimpleNamespace(
        judged=SimpleNamespace(info=SimpleNamespace(threads=1, shared_memory=0))
    )
    image_fd = os.memfd_create("image")
    ring_fd = ring.create(1)
    try:
        kind = reserves.reserve(wish, image_fd).reserve_id
        slot = reserves.offer(kind, ring_fd).slots[0]
        assert tried.wait(30)
        taken = reserves.take(kind)  # and no worker: whoever takes it starts one
        assert (taken.slot, taken.candidate) == (slot, None)
        assert "a flaw" in reserves.ask(kind).error
        reserves.used(kind, slot)
    finally:
        reserves.close()
        os.close(ring_fd)
        os.close(image_fd)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_keeper_that_ended_by_a_flaw_has_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a new reserve: an offer that nobody serves would be waited for in vain."""
    tried = threading.Event()

    class Launcher:
        def warm(self, *args: Any, **kwargs: Any) -> Any:
            tried.set()
            raise RuntimeError("a flaw")

    reserves = Reserves(
        Launcher(),  # type: ignore[arg-type]
        book=lambda: None,
        unbook=lambda: None,
        wanted=lambda: True,
        slow=lambda: None,
        most=4,
        name="keeper that ends",
    )
    wish: Any = SimpleNamespace(
        judged=SimpleNamespace(info=SimpleNamespace(threads=1, shared_memory=0))
    )
    watch = reserves._watch

    def fail(wake: int) -> bool:
        monkeypatch.setattr(reserves, "_watch", watch)
        raise RuntimeError("a flaw of the keeper")

    monkeypatch.setattr(reserves, "_watch", fail)
    image_fd = os.memfd_create("image")
    ring_fd = ring.create(1)
    try:
        kind = reserves.reserve(wish, image_fd).reserve_id
        while any(thread.name == "keeper that ends" for thread in threading.enumerate()):
            time.sleep(0.01)
        assert reserves.offer(kind, ring_fd).slots
        assert tried.wait(30)
    finally:
        reserves.close()
        os.close(ring_fd)
        os.close(image_fd)
