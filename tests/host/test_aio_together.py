"""Calls that cross together, with a real platform and worker: what each of them still is."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from pyenclave.errors import CallTimeoutError, EcallError, EnclaveLostError
from pyenclave.host.aio import AsyncEnclave
from pyenclave.host.enclave import Enclave

ENTRY = '''
import time
import pyenclave

_seen = []


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x


@pyenclave.ecall
def odd(x: int, seconds: float = 0.0) -> int:
    """Refuses what is even."""
    time.sleep(seconds)
    _seen.append(x)
    if x % 2 == 0:
        raise LookupError(str(x))
    return x


@pyenclave.ecall
def late(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pyenclave.ecall
def seen() -> list[int]:
    return _seen
'''
THREADS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from pyenclave.image.build import build, build_script

    folder = tmp_path_factory.mktemp("together")
    script = folder / "together_entry.py"
    script.write_text(ENTRY)
    manifest = folder / "enclave.toml"
    manifest.write_text(
        '[enclave]\nname = "wide"\nentry = "together_entry.py"\nproduct_id = 1\n'
        f"security_version = 1\nthreads = {THREADS}\n"
    )
    return {1: build_script(script), THREADS: build(manifest)}


@pytest.fixture(scope="module")
def state(tmp_path_factory, images, used):
    path = used(tmp_path_factory.mktemp("state"))
    with Enclave(images[1], state=path, quiet=True):
        yield path


@pytest.fixture
def make(images, state):
    def make(threads=1, **options):
        return AsyncEnclave(images[threads], state=state, quiet=True, **options)

    return make


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, 20)


async def sent(enclave):
    """How many messages the host has written on the first lane."""
    memory = enclave._run.lanes.memory
    return int.from_bytes(memory[4096 + 256 : 4096 + 260], "little")


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("threads", [1, THREADS])
def test_many_tasks_calls_cross_together_and_each_has_its_own_answer(make, inline, threads):
    async def main():
        async with make(threads, inline=inline) as enclave:

            async def caller(start):
                for i in range(20):
                    await asyncio.sleep(0)
                    x = start * 100 + i
                    if i % 3:
                        assert await enclave.double(x) == 2 * x
                    elif x % 2:
                        assert await enclave.odd(x) == x
                    else:
                        with pytest.raises(EcallError) as caught:
                            await enclave.odd(x)
                        assert caught.value.type == "LookupError"
                        assert len(caught.value.id) == 16

            await soon(asyncio.gather(*(caller(start) for start in range(40))))
            assert enclave._engine.lanes.busy == 0
            stats = enclave.stats
            assert {f.name: f.calls for f in stats.functions} | {"odd": 280, "double": 520} == {
                f.name: f.calls for f in stats.functions
            }
            if threads == 1:
                assert await sent(enclave) < 800

    asyncio.run(main())


def test_slow_calls_use_all_threads_and_wait_for_none_of_another(make):
    async def main():
        async with make(THREADS) as enclave:
            await enclave.odd(1)
            calls = asyncio.gather(*(enclave.odd(2 * i + 1, 0.2) for i in range(2 * THREADS)))
            most = 0
            while not calls.done():
                most = max(most, enclave._engine.lanes.busy)
                await asyncio.sleep(0.005)
            assert await calls == [2 * i + 1 for i in range(2 * THREADS)]
            assert most == THREADS

    asyncio.run(main())


def test_a_deadline_and_a_cancelled_task_end_their_own_call_only(make):
    async def main():
        async with make() as enclave:
            for i in range(50):
                await enclave.double(i)
            slow = asyncio.create_task(enclave.odd(1, 1.0))
            await asyncio.sleep(0.01)
            calls = [asyncio.create_task(enclave.double(i)) for i in range(10)]
            late = asyncio.create_task(enclave.options(timeout=0.1).double(7))
            await asyncio.sleep(0.01)
            calls[3].cancel()
            with pytest.raises(CallTimeoutError, match="before the call began"):
                await soon(late)
            assert await soon(slow) == 1
            done = await soon(asyncio.gather(*calls, return_exceptions=True))
            assert isinstance(done.pop(3), asyncio.CancelledError)
            assert done == [0, 2, 4, *(2 * i for i in range(4, 10))]

    asyncio.run(main())


def test_the_worker_s_end_is_the_error_of_each_call_that_waits(make, stop):
    async def main():
        async with make() as enclave:
            for i in range(50):
                await enclave.double(i)
            stop(enclave.info.pid)
            first = asyncio.create_task(enclave.double(1))
            await asyncio.sleep(0.05)
            calls = [asyncio.create_task(enclave.double(i)) for i in range(5)]
            await asyncio.sleep(0.01)
            os.kill(enclave.info.pid, signal.SIGKILL)
            ended = await soon(asyncio.gather(first, *calls, return_exceptions=True))
            assert {type(one) for one in ended} == {EnclaveLostError}
            assert not any(one.started for one in ended)
            assert len({id(one) for one in ended}) == 6

    asyncio.run(main())


def test_answers_of_a_map_that_came_before_a_crossing_failed_are_given_out(make):
    async def main():
        async with make(THREADS) as enclave:
            results = enclave.options(timeout=1.0).map("late", [0.0, 0.0, 2.5])
            assert [await soon(anext(results)) for _ in range(2)] == [0.0, 0.0]
            with pytest.raises(CallTimeoutError):
                await soon(anext(results))
            assert [one async for one in results] == []

    asyncio.run(main())


def test_state_sees_calls_in_the_order_in_which_they_were_made(make):
    async def main():
        async with make() as enclave:
            await enclave.odd(1)
            calls = [asyncio.create_task(enclave.odd(2 * i + 1)) for i in range(1, 60)]
            await soon(asyncio.gather(*calls))
            assert await enclave.seen() == [2 * i + 1 for i in range(60)]

    asyncio.run(main())
