"""Where debuggers and debug workers meet: who gets whom, and what a hostile worker does there."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from pyenclave._platform.debugging import Debuggee, wait_of
from pyenclave.errors import BusyError, EnclaveStateError


class Worker:
    """A worker's end, as the worker has it."""

    def __init__(self, debuggee: Debuggee) -> None:
        self.sock = socket.socket(fileno=os.dup(debuggee.worker_fd))
        self.sock.settimeout(5)
        debuggee.close_worker_end()

    def take(self) -> tuple[bytes, socket.socket | None]:
        data, fds, _, _ = socket.recv_fds(self.sock, 16, 4)
        return data, socket.socket(fileno=fds[0]) if fds else None

    @property
    def has_nothing(self) -> bool:
        return not select.select([self.sock], [], [], 0)[0]


@pytest.fixture
def debuggee() -> Iterator[Debuggee]:
    one = Debuggee()
    yield one
    one.close()


@pytest.fixture
def worker(debuggee: Debuggee) -> Iterator[Worker]:
    one = Worker(debuggee)
    yield one
    one.sock.close()


def meet(debugger: socket.socket, workers: socket.socket | None) -> None:
    """Check that the two are the ends of one connection."""
    assert workers is not None
    with debugger, workers:
        debugger.send(b"to the worker")
        assert workers.recv(64) == b"to the worker"
        workers.send(b"back")
        assert debugger.recv(64) == b"back"


@pytest.mark.parametrize("question", [b"?", b"n"])
def test_a_worker_that_asks_gets_the_debugger_that_waits(
    debuggee: Debuggee, worker: Worker, question: bytes
) -> None:
    debugger = debuggee.attach("one")
    assert debuggee.state == "attached"
    worker.sock.send(question)
    assert debuggee.answer()
    data, theirs = worker.take()
    assert data == b"!"
    meet(debugger, theirs)


def test_a_worker_that_waits_gets_the_debugger_that_comes(
    debuggee: Debuggee, worker: Worker
) -> None:
    worker.sock.send(b"?")
    assert debuggee.answer()
    assert worker.take() == (b"-", None)
    assert debuggee.state == "stopped"
    debugger = debuggee.attach("one")
    data, theirs = worker.take()
    assert data == b"!"
    meet(debugger, theirs)
    assert debuggee.state == "attached"


@pytest.mark.parametrize("last", [b"n", b"."])
def test_a_worker_that_waits_no_more_is_sent_nothing(
    debuggee: Debuggee, worker: Worker, last: bytes
) -> None:
    worker.sock.send(b"?")
    worker.sock.send(last)
    assert debuggee.answer()
    assert debuggee.answer()
    while not worker.has_nothing:
        assert worker.take() == (b"-", None)
    assert debuggee.state == ""
    with debuggee.attach("one"):
        assert worker.has_nothing


def test_a_debugger_that_left_before_it_was_needed_is_not_handed_on(
    debuggee: Debuggee, worker: Worker
) -> None:
    debuggee.attach("one").close()
    worker.sock.send(b"?")
    assert debuggee.answer()
    assert worker.take() == (b"-", None)


def test_one_debugger_at_a_time(debuggee: Debuggee, worker: Worker) -> None:
    with debuggee.attach("one"):
        for holder in ("one", "two"):
            with pytest.raises(BusyError, match="another debugger"):
                debuggee.attach(holder)
        debuggee.detach("two")
        with pytest.raises(BusyError):
            debuggee.attach("two")
    debuggee.detach("one")
    debuggee.attach("two").close()


def test_at_the_end_a_debugger_that_waits_hears_of_it(debuggee: Debuggee, worker: Worker) -> None:
    with debuggee.attach("one") as debugger:
        debuggee.close()
        debuggee.close()
        debugger.setblocking(True)
        assert debugger.recv(1) == b""
    with pytest.raises(EnclaveStateError, match="ended"):
        debuggee.attach("two")
    debuggee.detach("one")
    assert debuggee.state == ""
    assert not debuggee.answer()


@pytest.mark.parametrize("data", [b"x", b"??", b"?" * 100_000, b"\x00\xff", b""])
def test_a_worker_that_says_anything_else_is_not_listened_to(
    debuggee: Debuggee, worker: Worker, data: bytes
) -> None:
    worker.sock.send(data)
    assert not debuggee.answer()


def test_descriptors_of_a_worker_are_not_kept(debuggee: Debuggee, worker: Worker) -> None:
    """It may send what it likes: none of it becomes a descriptor of the platform."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        socket.send_fds(worker.sock, [b"n"], [0, 1, 2])
        assert debuggee.answer()
        assert worker.take() == (b"-", None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_worker_that_reads_nothing_holds_up_nobody(debuggee: Debuggee, worker: Worker) -> None:
    worker.sock.setblocking(False)
    for _ in range(5000):
        worker.sock.send(b"?")
        assert debuggee.answer()
    debuggee.attach("one").close()


def test_nothing_to_read_is_no_end(debuggee: Debuggee, worker: Worker) -> None:
    assert debuggee.answer()
    worker.sock.close()
    assert not debuggee.answer()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 60.0),
        ("", 60.0),
        ("five", 60.0),
        ("nan", 60.0),
        ("-1", 0.0),
        ("0", 0.0),
        ("2.5", 2.5),
        ("inf", 86400.0),
    ],
)
def test_the_wait_is_read_from_the_environment(text: str | None, seconds: float) -> None:
    assert wait_of(text) == seconds
