"""Calls that are given up, interrupted or refused, and what ends with the worker or the lanes."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time

import pytest

from pyenclave.errors import (
    BusyError,
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
)
from pyenclave.host._options import Options


def add(a: int, b: int = 10) -> int:
    return a + b


def echo(data: bytes) -> bytes:
    return data


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- giving up -------------------------------------------------------------------------------


def test_a_deadline_passes_and_the_lane_is_free_when_the_call_returns(pair, gate, until):
    one = pair(add, echo, gate.held)
    quick = one.functions.with_options(Options(timeout=0.1))
    start = time.monotonic()
    with pytest.raises(CallTimeoutError):
        quick.named("held")()
    assert time.monotonic() - start > 0.09
    assert one.lanes.busy == 1
    with pytest.raises(CallTimeoutError, match="before"):
        quick.named("add")(1)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(one.add(1)))
    thread.start()
    until(lambda: one.lanes.queued == 1)  # it waits for the lane
    assert found == []
    gate.open()
    thread.join()
    assert found == [11]
    assert one.lanes.busy == 0


def test_a_large_call_given_up_is_aborted_and_the_lane_recovers(pair, until):
    one = pair(add, echo, limit=1 << 28)
    data = bytes(100 << 20)
    for _ in range(3):
        with pytest.raises(CallTimeoutError):
            one.functions.with_options(Options(timeout=0.005)).named("echo")(data)
        assert one.add(1) == 11


def test_an_interrupt_ends_the_wait(pair, gate, until):
    one = pair(add, echo, gate.held)

    def interrupt() -> None:
        until(gate.reached)
        time.sleep(0.1)  # most often the caller waits in the kernel by now
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        one.held()  # which would not return
    thread.join()
    gate.open()
    assert one.add(1) == 11


def test_more_calls_than_may_wait_are_refused(pair, gate, until):
    one = pair(add, echo, gate.held, queue=2)
    results: list[object] = []

    def call() -> None:
        try:
            results.append(one.held())
        except BusyError as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(results) == 3)
    assert results == ["BusyError"] * 3
    gate.open()
    for thread in threads:
        thread.join()
    assert results[3:] == [7] * 3


def test_lanes_serve_at_the_same_time(pair):
    here = mmap.mmap(-1, 4)  # shared with the worker

    def meet(place: int) -> bool:
        """Whether all four calls run."""
        here[place] = 1
        end = time.monotonic() + 30
        while here[:] != b"\1\1\1\1" and time.monotonic() < end:
            time.sleep(0.002)
        return here[:] == b"\1\1\1\1"

    one = pair(meet, lanes=4)
    met: list[bool] = []
    threads = [
        threading.Thread(target=lambda place=place: met.append(one.meet(place)))
        for place in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [True] * 4


def test_many_threads_get_their_own_answers(pair):
    one = pair(add, echo, lanes=2)
    wrong: list[object] = []

    def call(seed: int) -> None:
        for i in range(300):
            if one.add(seed, i) != seed + i:
                wrong.append((seed, i))

    threads = [threading.Thread(target=call, args=(seed * 1000,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_BND_22_code_that_runs_while_encoding_may_itself_call(pair):
    one = pair(add, echo)

    class Calls:
        def __index__(self) -> int:
            return one.add(1)

    assert one.add(Calls()) == 21


# ---- ends ------------------------------------------------------------------------------------


def test_a_worker_killed_in_a_call_is_lost(pair, gate, until):
    one = pair(add, echo, gate.held)

    def kill() -> None:
        until(gate.reached)
        one.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(EnclaveLostError) as caught:
        one.held()  # which would not return
    thread.join()
    assert caught.value.started is True


def test_a_worker_that_kills_itself_is_lost(pair):
    one = pair(die, add)
    with pytest.raises(EnclaveLostError):
        one.die()


def test_closing_ends_waiting_calls(pair, gate, until):
    one = pair(add, echo, gate.held)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            one.held()
        except EnclaveClosedError as error:
            caught.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: one.lanes.busy == 1 and one.lanes.queued == 2)
    one.lanes.close()
    for thread in threads:
        thread.join()
    assert len(caught) == 3
    with pytest.raises(EnclaveClosedError):
        one.add(1)


def test_a_forked_child_refuses_and_the_parent_goes_on(pair):
    one = pair(add, echo)
    assert one.add(1) == 11
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = b"?"
        try:
            one.add(1)
        except EnclaveStateError as error:
            text = str(error).encode()
        finally:
            os.write(writer, text)
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"forked child" in os.read(reader, 1000)
    assert one.add(2) == 12
    os.close(reader)
    os.close(writer)


def test_SER_10_the_ring_stays_mapped_while_lanes_live(pair):
    one = pair(add, echo)
    with pytest.raises(BufferError):
        one.memory.close()
    assert one.add(1) == 11


def test_nothing_of_a_call_can_be_pickled(pair):
    import copy
    import pickle

    one = pair(add, echo)
    for thing in (one.lanes, one.functions.named("add")):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                way(thing)
