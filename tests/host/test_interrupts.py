"""Ctrl-C at any moment leaves no lock of a handle, or of its way to the platform, taken."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from typing import Any

import pytest
from interrupts import in_another_thread, interrupted, is_taken
from pool_places import wait_for

from pyenclave import _locks
from pyenclave._platform import endpoint
from pyenclave._platform.client import PlatformClient
from pyenclave._platform.taking import Taking
from pyenclave.calls.stats import registry
from pyenclave.errors import CallTimeoutError, EnclaveError
from pyenclave.host import Enclave, _images, _shared
from pyenclave.host._map import Results
from pyenclave.host._reserve import Reserve

FILES = (
    "enclave.py",
    "_base.py",
    "_held.py",
    "_images.py",
    "_lanes.py",
    "_reserve.py",
    "_run.py",
    "_shared.py",
    "client.py",
    "endpoint.py",
    "stats.py",
    "taking.py",
)
# Sockets that belong to nobody after an interrupt are closed as they go.
# An interrupt in a finalizer, or in what it drops half-made, Python tells and goes on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_KINDS = _locks.Lock, _locks.RLock, _locks.Condition, _locks._SureLock, _locks._SureRLock
LOCKS = list(dict.fromkeys(_KINDS))


@pytest.fixture(scope="module")
def platform(state):
    """A connection of its own, so that the platform stays when others are given up."""
    with PlatformClient.connect(state) as client:
        yield client


def shared_locks() -> list[Any]:
    found = [_shared._ends.lock, _images._lock, registry._lock, endpoint.no_fork]
    return [*found, *(client._lock for client, _ in _shared._clients.values())]


# ---- the locks themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOCKS, ids=lambda kind: kind.__name__)
def test_a_lock(kind: Any) -> None:
    """Raised at each place, in the function that has the `with` and in those of the lock."""
    lock = kind()

    def work() -> None:
        with lock:
            pass

    def after() -> None:
        assert not is_taken(lock)

    assert interrupted(work, ["test_interrupts.py", "threading.py"], after) > 0


class _Interrupt(BaseException):
    """What a signal raises."""


@pytest.mark.parametrize("kind", LOCKS, ids=lambda kind: kind.__name__)
def test_a_lock_is_given_back_whenever_a_signal_comes(kind: Any) -> None:
    """As above, with the interpreter's own idea of where it looks for signals."""
    lock = kind()
    armed = False
    interrupts = held = 0

    def raises(*_: object) -> None:
        if armed:
            raise _Interrupt

    before = signal.signal(signal.SIGVTALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0001, 0.0001)
        while interrupts < 100:
            try:
                armed = True
                while True:
                    with lock:
                        pass
            except _Interrupt:
                armed = False
                interrupts += 1
            if is_taken(lock):
                held += 1
                lock.release()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert held == 0


def test_who_has_a_sure_lock_is_told_instead_of_waiting_for_ever() -> None:
    lock = _locks._SureLock()
    with lock:
        assert not lock.acquire(blocking=False)
        with pytest.raises(RuntimeError, match="already"):
            lock.acquire()
        with pytest.raises(RuntimeError, match="already"), lock:
            pass
        assert is_taken(lock)
    assert not is_taken(lock)
    assert lock.acquire(timeout=10)
    lock.release()
    with _locks._SureRLock() as first:
        assert first


def test_a_condition_wakes_who_waits() -> None:
    condition = _locks.Condition()
    told: list[bool] = []
    ready = threading.Event()

    def waits() -> None:
        with condition:
            ready.set()
            told.append(condition.wait(60))

    thread = threading.Thread(target=waits)
    thread.start()
    assert ready.wait(60)
    with condition:  # it waits already, else this had to wait
        condition.notify()
    thread.join(60)
    assert told == [True]
    with condition:
        assert not condition.wait(0.001)
    with pytest.raises(RuntimeError):
        condition.wait(0.001)
    assert not is_taken(condition)


def test_a_condition_is_had_again_whatever_interrupts_it() -> None:
    condition = _locks.Condition()

    def work() -> None:
        with condition:
            condition.notify()
            condition.wait(0.001)
            assert condition._is_owned()

    def after() -> None:
        assert not is_taken(condition)

    assert interrupted(work, ["threading.py", "test_interrupts.py"], after) > 10


# ---- who has them --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_handle(image, state, platform) -> None:
    handles: list[Enclave] = []

    def work() -> None:
        handles.append(Enclave(image, state=state, quiet=True))
        with handles[-1] as handle:
            handle.ping(b"x")

    def after() -> None:
        locks = shared_locks()
        for handle in handles:
            locks.append(handle._lock)
            if handle._run is not None:
                locks += handle._run._lock, handle._run._held._lock
        assert not any(map(is_taken, locks))
        while handles:
            in_another_thread(handles.pop().close)

    assert interrupted(work, FILES, after) > 100
    with Enclave(image, state=state, quiet=True) as handle:
        assert handle.double(4) == 8


def test_calls_that_wait_for_a_thread_of_the_enclave(image, state, platform) -> None:
    """Another thread has the only one; who waits is interrupted, and others go on waiting."""
    with Enclave(image, state=state, quiet=True) as handle:

        def hold() -> None:
            with contextlib.suppress(EnclaveError):
                handle.sleep(100)

        def waits() -> None:
            with pytest.raises(CallTimeoutError):
                handle.options(timeout=0.01).double(1)

        holder = threading.Thread(target=hold)
        holder.start()
        try:
            assert wait_for(lambda: handle._run.lanes.busy)
            after = lambda: in_another_thread(waits)  # noqa: E731
            assert interrupted(waits, ["threading.py"], after) > 5
        finally:
            in_another_thread(handle.close)
            holder.join()


def test_the_connection_to_the_platform(state, platform) -> None:
    clients: list[PlatformClient] = []

    def work() -> None:
        client = PlatformClient.connect(state, start=False)
        clients.append(client)
        client.list()
        client.look_for(Taking(client))
        client.wait_for(Taking(client))
        client.close()

    def after() -> None:
        assert not is_taken(endpoint.no_fork)
        while clients:
            client = clients.pop()
            assert not is_taken(client._lock)
            in_another_thread(client.close)

    assert interrupted(work, FILES, after) > 20
    with PlatformClient.connect(state, start=False) as client:
        assert client.list() is not None


def test_a_reserve(image, state, platform) -> None:
    reserves: list[Reserve] = []

    def work() -> None:
        reserve = Reserve(image, debug=None, require=(), state=state, queue=1)
        reserves.append(reserve)
        reserve.told()
        reserve.close()

    def after() -> None:
        assert not any(map(is_taken, shared_locks()))
        while reserves:
            reserve = reserves.pop()
            assert not is_taken(reserve._lock)
            in_another_thread(reserve.close)

    assert interrupted(work, FILES, after) > 50


def test_results_of_a_map(image, state, platform) -> None:
    with Enclave(image, state=state, quiet=True) as handle:
        results: list[Results] = []

        def work() -> None:
            results.append(handle.map("double", itertools.repeat(3, 2)))
            assert list(results[-1]) == [6, 6]

        def after() -> None:
            while results:
                assert not is_taken(results.pop()._lock)

        assert interrupted(work, ["_map.py"], after) > 10
