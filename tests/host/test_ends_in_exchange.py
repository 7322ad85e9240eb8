"""
An enclave that ends wherever its thread is just then: a finalizer, a handler of a signal.

A function that the interpreter calls at each call stands for both: it runs in the thread, in the
middle of whatever that does.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from interrupts import interrupted, is_taken

from pyenclave._locks import Ends
from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveClosedError, EnclaveError, EnclaveStateError
from pyenclave.host import _shared
from pyenclave.host._reserve import Reserve
from pyenclave.host.enclave import Enclave
from pyenclave.host.files import lend_files

PLACES = (
    "PlatformClient._ask",
    "PlatformClient._judge",
    "PlatformClient._settle",
    "Channel.receive",
    "Channel.send",
    "Held.launched",
    "Run._launch",
    "release",
)


@pytest.fixture(scope="module")
def platform(state):
    """A connection of its own, so that the platform stays when others are given up."""
    with PlatformClient.connect(state) as client:
        yield client


def started(image: bytes, state: Any) -> tuple[Enclave, int]:
    enclave = Enclave(image, state=state, quiet=True).start()
    return enclave, os.pidfd_open(enclave.info.pid)


def ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        return bool(poll.poll(20_000))
    finally:
        os.close(pidfd)


def within(work: Callable[[], Any], place: str, then: Callable[[], Any]) -> int:
    """
    Do *work* in a thread, and *then* at the first call of *place* there; return how often: once.

    Raises what *work* raises, and AssertionError if it waits for itself.
    """
    times: list[str] = []
    raised: list[BaseException] = []

    def look(frame: Any, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_qualname == place and not times:
            times.append(place)
            then()

    def run() -> None:
        sys.setprofile(look)
        try:
            work()
        except BaseException as error:
            raised.append(error)
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    if raised:
        raise raised[0]
    return len(times)


# ---- handles that are collected ------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_handle_that_is_collected_where_another_is_launched(
    image, state, platform, place: str
) -> None:
    enclave, pidfd = started(image, state)
    dropped = [enclave]
    del enclave

    def work() -> None:
        with Enclave(image, state=state, quiet=True) as other:
            assert other.double(2) == 4
            assert other.info.name

    assert within(work, place, dropped.clear) == 1
    assert ended(pidfd)


def test_a_cycle_that_is_collected_in_an_exchange(image, state, platform) -> None:
    """As Python's own collector does it, which runs where something is allocated."""
    enclave, pidfd = started(image, state)
    cycle: list[Any] = [enclave]
    cycle.append(cycle)
    del enclave, cycle

    def work() -> None:
        with Enclave(image, state=state, quiet=True) as other:
            assert other.double(2) == 4

    assert within(work, "Channel.receive", gc.collect) == 1
    assert ended(pidfd)


def test_many_that_are_collected_at_once(image, state, platform) -> None:
    """One after the other: what is done for one does not begin with the next."""
    dropped, pidfds = map(list, zip(*(started(image, state) for _ in range(4)), strict=True))

    def work() -> None:
        with Enclave(image, state=state, quiet=True) as other:
            assert other.double(2) == 4

    assert within(work, "Channel.receive", dropped.clear) == 1
    assert all(list(map(ended, pidfds)))


def test_the_last_handle_of_a_connection(image, state, platform, tmp_path) -> None:
    """Its connection is given back while this thread makes one to another platform."""
    enclave, pidfd = started(image, state)
    key = (os.getpid(), os.fsdecode(state))
    others = _shared._clients[key][1]
    dropped = [enclave]
    del enclave

    def work() -> None:
        with Enclave(image, state=tmp_path, quiet=True) as other:
            assert other.double(2) == 4

    assert within(work, "PlatformClient.connect", dropped.clear) == 1
    assert ended(pidfd)
    assert _shared._clients[key][1] == others - 1  # nothing is kept for it


def test_a_reserve_that_is_collected_in_an_exchange(image, state, platform) -> None:
    reserve = Reserve(image, debug=None, require=(), state=state, queue=1)
    reserve.fill(1)
    client, number = reserve._client, reserve._id
    dropped = [reserve]
    del reserve
    assert client is not None
    assert within(client.list, "Channel.receive", dropped.clear) == 1
    with pytest.raises(EnclaveError):
        client.ask_reserve(number)


def test_two_threads_that_end_each_others(image, state, platform, tmp_path) -> None:
    """Each is in an exchange with one platform when it drops an enclave of the other."""
    first, first_pidfd = started(image, state)
    second, second_pidfd = started(image, tmp_path)
    dropped: list[list[Enclave]] = [[first], [second]]
    del first, second
    together = threading.Barrier(2)

    def end(which: int) -> None:
        together.wait(30)
        dropped[which].clear()

    with PlatformClient.connect(tmp_path):  # so that it stays
        clients = [dropped[0][0]._run.client, dropped[1][0]._run.client]
        others = threading.Thread(
            target=within, args=(clients[0].list, "Channel.receive", lambda: end(1)), daemon=True
        )
        others.start()
        assert within(clients[1].list, "Channel.receive", lambda: end(0)) == 1
        others.join(60)
        assert not others.is_alive()
        assert ended(first_pidfd)
        assert ended(second_pidfd)


def test_an_ocall_that_drops_the_last_reference(tmp_path) -> None:
    from pyenclave.image.build import build

    (tmp_path / "entry.py").write_text(
        "import pyenclave\n"
        "@pyenclave.ocall\n"
        "def drop() -> int: ...\n"
        "@pyenclave.ecall\n"
        "def ask() -> int:\n"
        "    return drop()\n"
    )
    manifest = tmp_path / "enclave.toml"
    manifest.write_text(
        '[enclave]\nname = "drops"\nentry = "entry.py"\nproduct_id = 1\nsecurity_version = 1\n'
    )
    kept: list[Enclave] = []

    def drop() -> int:
        kept.clear()
        return 1

    kept.append(Enclave(build(manifest), state=tmp_path, quiet=True, ocalls={"drop": drop}).start())
    pidfd = os.pidfd_open(kept[0].info.pid)
    ask = kept[0].ask
    found: list[object] = []

    def work() -> None:
        try:
            found.append(ask())
        except EnclaveClosedError:
            found.append("closed")

    within(work, "", lambda: None)
    assert found in ([1], ["closed"])
    assert ended(pidfd)


def test_a_stream_that_is_collected_where_its_thread_waits_for_it(tmp_path) -> None:
    """It has the only thread of the enclave, for which this call waits, with the queue's lock."""
    entry = tmp_path / "entry.py"
    entry.write_text(
        "from collections.abc import Iterator\n"
        "import pyenclave\n"
        "@pyenclave.ecall\n"
        "def count(stop: int) -> Iterator[int]:\n"
        "    yield from range(stop)\n"
        "@pyenclave.ecall\n"
        "def add(a: int, b: int) -> int:\n"
        "    return a + b\n"
    )
    with Enclave.from_file(entry, state=tmp_path, quiet=True) as enclave:
        streams: list[Any] = []
        begun, over = threading.Event(), threading.Event()

        def begin() -> None:
            streams.append(enclave.count(1 << 40))
            next(streams[0])
            begun.set()
            over.wait()  # a lane knows who has it by his number, which must not be another's

        beginning = threading.Thread(target=begin)
        beginning.start()
        found: list[int] = []
        try:
            assert begun.wait(30)
            call = lambda: found.append(enclave.add(1, 2))  # noqa: E731
            assert within(call, "Condition.wait", streams.clear) == 1
        finally:
            over.set()
            beginning.join()
        assert found == [3]


# ---- close() by a handler of a signal ------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["Run._launch", "PlatformClient._judge", "Channel.receive", "Run.asked", "acquire", "release"],
)
def test_closing_what_this_thread_starts(image, state, platform, place: str) -> None:
    enclave = Enclave(image, state=state, quiet=True)
    closed: list[bool] = []

    def close() -> None:
        enclave.close()
        closed.append(enclave.closed)

    def work() -> None:
        try:
            enclave.start()
        finally:
            enclave.close()

    assert within(work, place, close) == 1
    assert enclave.closed
    with pytest.raises(EnclaveClosedError):
        enclave.double(1)
    row = enclave._run
    assert row is None or not row._finalizer.alive


def test_a_signal_that_closes_what_the_main_thread_starts(image, state, platform) -> None:
    """The real thing: its handler runs where the main thread waits for the platform's answer."""
    enclave = Enclave(image, state=state, quiet=True)
    before = signal.signal(signal.SIGUSR1, lambda *_: enclave.close())
    send, sent = PlatformClient.launch, []

    def launch(self: PlatformClient, *args: Any, **options: Any) -> Any:
        meanwhile = options["meanwhile"]

        def signalled() -> None:
            meanwhile()
            sent.append(1)
            signal.raise_signal(signal.SIGUSR1)

        return send(self, *args, **{**options, "meanwhile": signalled})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlatformClient, "launch", launch)
        try:
            enclave.start()
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert sent
    assert enclave.closed
    with pytest.raises(EnclaveClosedError):
        enclave.double(1)


@pytest.mark.parametrize("place", ["PlatformClient._ask", "Channel.receive", "make_slot"])
def test_closing_a_reserve_that_this_thread_fills(image, state, platform, place: str) -> None:
    reserve = Reserve(image, debug=None, require=(), state=state, queue=1)
    assert within(lambda: reserve.fill(1), place, reserve.close) == 1
    assert reserve.open == 0
    with pytest.raises(EnclaveClosedError):
        reserve.told()


def test_closing_a_connection_in_its_own_exchange(state, platform) -> None:
    client = PlatformClient.connect(state)
    assert within(client.list, "Channel.receive", client.close) == 1
    assert client.closed


def test_asking_in_ones_own_exchange_is_refused_by_name(state, platform) -> None:
    """Else it would wait for itself, or read the answer to the other request."""
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(EnclaveStateError) as caught:
            client.list()
        told.append(caught.value.message)

    with PlatformClient.connect(state) as client:
        assert within(client.list, "Channel.receive", ask) == 1
        assert told == ["this thread is in the middle of another request to the platform"]
        assert client.list() is not None  # the exchange was not disturbed


def test_files_that_were_lent_close_in_their_own_reading(tmp_path) -> None:
    (tmp_path / "data").write_bytes(b"abc")
    read, lent = None, lend_files(data=tmp_path / "data")
    for name, handler in lent.items():
        read = handler if name.endswith("read") else read
    assert read is not None
    owner = read.__self__
    handle = owner._open("data", False, False, False)
    assert within(lambda: owner._read(handle, 0, 3), "FileStore.pread", owner.close) == 1
    assert owner._stores == {}
    opened = lambda: owner._open("data", False, False, False)  # noqa: E731
    with pytest.raises(OSError, match="ended"):
        opened()


# ---- the lock itself -----------------------------------------------------------------------------


def test_what_ends_is_left_and_then_done_in_turn() -> None:
    ends, done = Ends(), []

    def first() -> None:
        done.append("first")
        with ends, ends.lock:
            ends.end(lambda: done.append("third"))
        done.append("second")

    with ends, ends.lock:
        ends.end(first)
        assert done == []
    assert done == ["first", "second", "third"]
    ends.end(lambda: done.append("at once"))
    assert done[-1] == "at once"


def test_a_thousand_ends_do_not_nest() -> None:
    ends, depths = Ends(), set()

    def work() -> None:
        depths.add(len(_frames()))
        with ends, ends.lock:
            pass

    with ends, ends.lock:
        for _ in range(1000):
            ends.end(work)
    assert len(depths) == 1


def _frames() -> list[Any]:
    found, frame = [], sys._getframe()
    while frame is not None:
        found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def test_who_has_the_lock_and_wants_it_again_does_nothing_of_what_was_left() -> None:
    ends, done = Ends(), []
    with ends, ends.lock:
        ends.end(lambda: done.append(1))
        with pytest.raises(RuntimeError), ends, ends.lock:
            pass
        assert done == []
    assert done == [1]


def test_what_an_end_raises_is_told_and_hides_nothing(monkeypatch) -> None:
    """Who had the lock has what it did, or its own error; the other ends are done."""
    told: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda _, error, __: told.append(error))
    ends, done = Ends(), []

    def fail() -> None:
        raise OSError(5, "of the end")

    def work(then: Callable[[], Any]) -> str:
        with ends, ends.lock:
            ends.end(fail)
            ends.end(lambda: done.append(1))
            then()
        return "answer"

    assert work(lambda: None) == "answer"
    with pytest.raises(ZeroDivisionError):
        work(lambda: 1 // 0)
    assert done == [1, 1]
    assert [error.args for error in told] == [(5, "of the end")] * 2
    assert not ends._left
    assert not ends._busy


def test_an_interrupted_end_leaves_the_others_not_undone() -> None:
    """There may be nobody else who uses it, and do what was left."""
    ends, done = Ends(), []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def work() -> None:
        with ends, ends.lock:
            ends.end(interrupt)
            ends.end(lambda: done.append(1))
            ends.end(interrupt)
            ends.end(lambda: done.append(2))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1, 2]
    assert not ends._left
    assert not ends._busy


def test_starting_an_enclave_that_this_thread_starts_is_refused_by_name(
    image, state, platform
) -> None:
    enclave = Enclave(image, state=state, quiet=True)
    told: list[str] = []

    def again() -> None:
        with pytest.raises(EnclaveStateError) as caught:
            enclave.start()
        told.append(caught.value.message)

    assert within(enclave.start, "make_slot", again) == 1
    assert told == ["this thread is in the middle of starting or closing this enclave"]
    with enclave:
        assert enclave.double(2) == 4


def test_starting_an_enclave_where_this_thread_connects_is_refused_by_name(
    image, state, platform, tmp_path
) -> None:
    enclave = Enclave(image, state=tmp_path, quiet=True)
    told: list[str] = []

    def another() -> None:
        with pytest.raises(EnclaveStateError) as caught:
            Enclave(image, state=state, quiet=True).start()
        told.append(caught.value.message)

    assert within(enclave.start, "PlatformClient.connect", another) == 1
    assert told == ["this thread is in the middle of connecting to a platform"]
    with enclave:
        assert enclave.double(2) == 4


def test_another_thread_waits_for_the_lock() -> None:
    ends, done = Ends(), []

    def work() -> None:
        with ends, ends.lock:
            done.append(1)

    with ends, ends.lock:
        thread = threading.Thread(target=lambda: ends.end(work))
        thread.start()
        assert done == []
        assert is_taken(ends.lock)
    thread.join(20)
    assert done == [1]


def test_what_was_left_is_forgotten_in_a_forked_child() -> None:
    ends, done = Ends(), []
    with ends, ends.lock:
        ends.end(lambda: done.append(1))
        ends.forget()
    assert done == []


def test_an_interrupt_leaves_neither_the_lock_taken_nor_what_was_left_undone() -> None:
    ends, done = Ends(), []

    def work() -> None:
        done.clear()
        with ends, ends.lock:
            ends.end(lambda: done.append(1))

    def after() -> None:
        assert not is_taken(ends.lock)
        assert not ends._busy
        with ends, ends.lock:  # the next who uses it
            pass
        assert not ends._left

    assert interrupted(work, ["test_ends_in_exchange.py"], after) > 5
