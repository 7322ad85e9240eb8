"""
Row ``ecall_async``: a call from asyncio, one at a time and with 64 in flight, against what an
asyncio program would use instead.

The peers do the same work on the same 64 bytes: a C program behind pipes, whose client matches
answers to callers in order (frames have one size, so nothing is parsed), and a ProcessPoolExecutor
behind ``run_in_executor``. Both sides are bound to the same two processors; subject and peers take
turns; each answer is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sysconfig
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pyenclave.benchmarks.calls import (
    _BUMPED,
    _DATA,
    _bound,
    _cores,
    _native_image,
    _processors,
    bump,
)
from pyenclave.benchmarks.rows import Row, figures, scratch
from pyenclave.host.aio import AsyncEnclave

__all__ = ["ecall_async"]

Call = Callable[[], Awaitable[bytes]]

_ROUNDS = 11
_FLIGHT = 64
_SIZE = 64
_PIPE_SOURCE = r"""
#include <unistd.h>
int main(void)
{
    unsigned char data[65536];
    size_t have = 0;
    for (;;) {
        ssize_t got = read(0, data + have, sizeof(data) - have);
        if (got <= 0) {
            return 0;
        }
        have += (size_t)got;
        size_t whole = have / 64 * 64;
        for (size_t i = 0; i < whole; i++) {
            data[i]++;
        }
        for (size_t at = 0; at < whole;) {
            ssize_t put = write(1, data + at, whole - at);
            if (put <= 0) {
                return 1;
            }
            at += (size_t)put;
        }
        for (size_t i = whole; i < have; i++) {
            data[i - whole] = data[i];
        }
        have -= whole;
    }
}
"""


class _Piped:
    """A client of a child behind pipes: calls may overlap, answers come in order."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise AssertionError("no pipes")
        self._write = process.stdin.write
        self._read = process.stdout.readexactly
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._loop = asyncio.get_running_loop()
        self._reader = self._loop.create_task(self._serve())

    async def _serve(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                data = await self._read(_SIZE)
                self._waiting.popleft().set_result(data)

    async def call(self) -> bytes:
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting.append(future)
        self._write(_DATA)
        return await future


class _Alone:
    """The same for one call at a time: nothing but a write and a read."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise AssertionError("no pipes")
        self._write = process.stdin.write
        self._read = process.stdout.readexactly

    async def call(self) -> bytes:
        self._write(_DATA)
        answer: bytes = await self._read(_SIZE)
        return answer


@contextlib.asynccontextmanager
async def _child(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    source, program = folder / "child.c", folder / "child"
    source.write_text(_PIPE_SOURCE)
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or "cc"
    subprocess.run([compiler, "-O2", "-o", program, source], check=True)
    process = await asyncio.create_subprocess_exec(
        program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def _one(call: Call, count: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        answer = await call()
    total = time.perf_counter_ns() - start
    if answer != _BUMPED:
        raise AssertionError(f"a wrong answer: {answer!r}")
    return total / count


async def _many(call: Call, count: int) -> float:
    """Return ns a call with 64 tasks, each of which makes its calls one after the other."""
    each = max(1, count // _FLIGHT)

    async def caller() -> None:
        for _ in range(each):
            if await call() != _BUMPED:
                raise AssertionError("a wrong answer")

    start = time.perf_counter_ns()
    await asyncio.gather(*(caller() for _ in range(_FLIGHT)))
    return (time.perf_counter_ns() - start) / (each * _FLIGHT)


async def _take_turns(
    measure: Callable[[Call, int], Awaitable[float]], *cases: tuple[Call, int]
) -> list[list[float]]:
    for call, _ in cases:
        await measure(call, 2 * _FLIGHT)
    seen: list[list[float]] = [[] for _ in cases]
    for _ in range(_ROUNDS):
        for times, (call, count) in zip(seen, cases, strict=True):
            times.append(await measure(call, count))
    return seen


async def _measure() -> list[Row]:
    host, worker, trip = _processors()
    loop = asyncio.get_running_loop()
    rows = []
    with (
        scratch() as folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
    ):
        pool_pid = pool.submit(os.getpid).result()  # forked before there is anything to copy
        image = _native_image(folder)
        async with (
            _child(folder) as alone,
            _child(folder) as piped,
            AsyncEnclave(image, state=folder / "state", quiet=True) as enclave,
        ):
            function = enclave.bump

            def ours() -> Awaitable[bytes]:
                made: Awaitable[bytes] = function(_DATA)
                return made

            def executor() -> Awaitable[bytes]:
                return loop.run_in_executor(pool, bump, _DATA)

            others = [(pid, worker) for pid in (enclave.info.pid, alone.pid, piped.pid, pool_pid)]
            with _bound(host, *others):
                one = await _take_turns(
                    _one, (ours, 2000), (_Alone(alone).call, 200), (executor, 60)
                )
                many = await _take_turns(
                    _many, (ours, 6400), (_Piped(piped).call, 1280), (executor, 256)
                )
    cores = _cores(host, worker, trip)
    for suffix, (value, pipe, pooled) in (("", one), (f"/{_FLIGHT}", many)):
        rows += [
            figures(f"ecall_async{suffix}", value, pipe, peer="asyncio subprocess pipes", **cores),
            figures(
                f"ecall_async{suffix}/ProcessPoolExecutor",
                value,
                pooled,
                peer="ProcessPoolExecutor via run_in_executor",
                **cores,
            ),
        ]
    return rows


def ecall_async() -> list[Row]:
    """Measure asyncio round trips of a native function, 64 bytes each way, 1 and 64 in flight."""
    return asyncio.run(_measure())
