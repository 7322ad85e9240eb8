"""
Row ``ecall_sleeping``: a call to a worker that sleeps, all on one processor.

The peer is a bare round trip over two ``os.pipe``, 64 bytes each way, to a process that only sends
back what it reads: no function, no types, no check. The second row is ``multiprocessing.Pipe``,
with the work. Every call is timed alone, with the other side asleep: ours once the worker is seen
to sleep, the others after the processor was given up, which a process that waits for a pipe uses
to go to sleep.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator

from pyenclave.benchmarks.calls import (
    _BUMPED,
    _DATA,
    _ROUNDS,
    _bound,
    _launched,
    _native_image,
    _pipe,
    _serve_bytes,
)
from pyenclave.benchmarks.rows import Row, figures

__all__ = ["ecall_sleeping"]

_CALLS = 150


@contextlib.contextmanager
def _bare_pipe() -> Iterator[tuple[Callable[[], bytes], int]]:
    """Start a process that sends back what it reads; give a call of it, and its pid."""
    there_read, there_write = os.pipe()
    back_read, back_write = os.pipe()
    size = len(_DATA)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(there_write)
            os.close(back_read)
            while data := os.read(there_read, size):
                os.write(back_write, data)
        finally:
            os._exit(0)
    os.close(there_read)
    os.close(back_write)

    def call() -> bytes:
        os.write(there_write, _DATA)
        return os.read(back_read, size)

    try:
        yield call, pid
    finally:
        os.close(there_write)
        os.close(back_read)
        os.waitpid(pid, 0)


def _asleep(
    call: Callable[[], object], sleeps: Callable[[], bool], expected: bytes = _BUMPED
) -> float:
    """Time single calls, each made when the other side sleeps; return the median in ns."""
    times = []
    for _ in range(_CALLS):
        while not sleeps():
            os.sched_yield()
        start = time.perf_counter_ns()
        answer = call()
        times.append(float(time.perf_counter_ns() - start))
        if answer != expected:
            raise AssertionError("a wrong answer")
    return statistics.median(times)


def _given_up() -> bool:
    """Let the other side run until it waits for its pipe."""
    os.sched_yield()
    return True


def ecall_sleeping() -> list[Row]:
    """Measure a native function whose worker sleeps: the wake is in the figure."""
    host = min(os.sched_getaffinity(0))
    ours: list[float] = []
    bare: list[float] = []
    library: list[float] = []
    with (
        _bare_pipe() as (round_trip, bare_pid),
        _pipe(_serve_bytes) as (pipe, pipe_pid),
        _launched(_native_image) as enclave,
    ):
        lanes = enclave._run.lanes  # type: ignore[union-attr] # noqa: SLF001
        function = enclave.bump

        def through_pipe() -> object:
            pipe.send(_DATA)
            return pipe.recv()

        with _bound(host, (enclave.info.pid, host), (bare_pid, host), (pipe_pid, host)):
            for number in range(_ROUNDS + 1):
                found = (
                    _asleep(lambda: function(_DATA), lambda: lanes.asleep(0)),
                    _asleep(round_trip, _given_up, _DATA),
                    _asleep(through_pipe, _given_up),
                )
                if number:  # the first warms up
                    for times, taken in zip((ours, bare, library), found, strict=True):
                        times.append(taken)
    return [
        figures("ecall_sleeping", ours, bare, peer="a bare os.pipe", cores="same"),
        figures(
            "ecall_sleeping/multiprocessing",
            ours,
            library,
            peer="multiprocessing.Pipe",
            cores="same",
        ),
    ]
