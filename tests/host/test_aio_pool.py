"""The pool for asyncio, with a real platform, zygote and workers."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pool_places import until

from pyenclave import AsyncEnclavePool
from pyenclave.calls.stats import Registry
from pyenclave.errors import (
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
    ImageError,
    LaunchError,
)


@pytest.fixture
def run(pool_image, pool_state):
    """Run a coroutine function with a pool of its own."""

    def do(test, **options):
        async def body():
            async with AsyncEnclavePool(
                pool_image, state=pool_state, quiet=True, **options
            ) as pool:
                await asyncio.wait_for(test(pool), 25)

        asyncio.run(body())

    return do


def pids(pool: AsyncEnclavePool) -> list[int]:
    return [member.handle.info.pid for member in pool._book.members]


def test_calls_go_through_by_name_by_attribute_and_by_options(run) -> None:
    async def test(pool) -> None:
        assert await pool.call("add", 1, 2) == 3
        assert await pool.add(1, 2) == 3
        assert await pool.options(timeout=5).add(1, 2) == 3
        with pytest.raises(EcallError):
            await pool.fail()
        assert not hasattr(pool, "nothing")
        assert "add" in dir(pool)
        assert pool.stats.calls == 4

    run(test)


def test_the_metrics_know_what_waited_for_the_pool_and_was_refused(run, monkeypatch) -> None:
    registry = Registry()
    monkeypatch.setattr("pyenclave.host._pooled.registry", registry)

    async def test(pool) -> None:
        async with pool.enclave(), pool.enclave():
            with pytest.raises(CallTimeoutError, match="before an enclave was free"):
                await pool.options(timeout=0.05).add(1, 1)
            more = [asyncio.create_task(pool.add(1, 1)) for _ in range(64)]
            assert await until(lambda: pool.stats.waiting == 64)
            with pytest.raises(BusyError):
                await pool.add(1, 1)
            (total,) = registry.totals().values()
            assert (total.waiting, total.most_waiting) == (64, 64)
            assert (total.failures["busy"], total.failures["timeouts"]) == (1, 1)
        assert await asyncio.gather(*more) == [2] * 64

    run(test, queue=64)


def test_many_tasks_share_few_enclaves_in_order_and_the_queue_ends(run) -> None:
    async def test(pool) -> None:
        results = await asyncio.gather(*(pool.add(n, 1) for n in range(50)))
        assert results == [n + 1 for n in range(50)]
        tasks = [asyncio.create_task(pool.sleep(1.5)) for _ in range(2)]
        assert await until(lambda: pool.stats.running == 2)
        more = [asyncio.create_task(pool.add(1, 1)) for _ in range(64)]
        assert await until(lambda: pool.stats.waiting == 64)
        with pytest.raises(BusyError):
            await pool.add(1, 1)
        assert await asyncio.gather(*tasks) == [1.5, 1.5]
        assert await asyncio.gather(*more) == [2] * 64

    run(test, size=2, queue=64)


def test_deadlines_and_cancellation_leave_nothing_behind(run) -> None:
    async def test(pool) -> None:
        with pytest.raises(CallTimeoutError):
            await pool.options(timeout=0.05).sleep(1.5)
        with pytest.raises(CallTimeoutError):
            await pool.options(timeout=0.05).add(1, 1)
        waiting = asyncio.create_task(pool.add(1, 1))
        assert await until(lambda: pool.stats.waiting == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert pool.stats.waiting == 0
        assert await pool.options(timeout=20).add(1, 1) == 2
        running = asyncio.create_task(pool.sleep(0.3))
        assert await until(lambda: pool.stats.running == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await pool.options(timeout=20).add(2, 2) == 4
        assert pool.stats.lost == 0

    run(test, size=1)


def test_what_is_killed_is_replaced_and_started_calls_are_never_made_again(run) -> None:
    async def test(pool) -> None:
        before = pids(pool)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert await until(lambda: pool.stats.lost == 2 and pool.stats.enclaves == 2)
        assert not set(pids(pool)) & set(before)
        assert await pool.add(3, 4) == 7
        with pytest.raises(EnclaveLostError) as caught:
            await pool.leave()
        assert caught.value.started is True
        assert pool.stats.retried == 0
        assert await pool.add(3, 4) == 7

    run(test, size=2)


def test_a_call_whose_enclave_was_lost_before_it_began_is_made_again(run) -> None:
    async def test(pool) -> None:
        calls = []
        for member in pool._book.members:

            def lose(*args, real=member.handle.call, **kwargs):
                calls.append(args)
                if len(calls) == 1:
                    raise EnclaveLostError("gone", started=False)
                return real(*args, **kwargs)

            member.handle.call = lose
        assert await pool.add(2, 3) == 5
        assert len(calls) == 2
        assert pool.stats.retried == 1

    run(test, size=2)


def test_an_enclave_alone_and_a_fresh_one(run) -> None:
    async def test(pool) -> None:
        async with pool.enclave() as one:
            assert [await one.counted(), await one.counted()] == [1, 2]
            with pytest.raises(CallTimeoutError):
                await pool.options(timeout=0.05).add(1, 1)
        assert await pool.counted() == 3
        seen = set()
        for _ in range(2):
            async with pool.enclave(fresh=True) as one:
                assert await one.counted() == 1
                seen.add((one.info.enclave_id, one.info.runtime_public_key, one.info.pid))
            with pytest.raises(EnclaveClosedError):
                await one.counted()
        assert len({enclave_id for enclave_id, _, _ in seen}) == 2
        assert len({key for _, key, _ in seen}) == 2
        with pytest.raises(BusyError):
            async with pool.enclave(fresh=True), pool.enclave(fresh=True):
                raise AssertionError
        stats = pool.stats
        assert (stats.fresh, stats.launched, stats.lost) == (0, 4, 0)

    run(test, size=1, warm=2, max_fresh=1)


def test_it_grows_recycles_and_drains(run) -> None:
    async def test(pool) -> None:
        assert await asyncio.gather(*(pool.sleep(0.25) for _ in range(4))) == [0.25] * 4
        assert await until(lambda: pool.stats.launched >= 2)
        assert await until(lambda: pool.stats.enclaves == 1)
        for _ in range(12):
            await pool.add(1, 1)
        assert pool.stats.recycled >= 2
        running = asyncio.create_task(pool.sleep(1.5))
        assert await until(lambda: pool.stats.running == 1)
        assert not await pool.drain(0.05)
        with pytest.raises(EnclaveClosedError, match="draining"):
            await pool.add(1, 1)
        assert await pool.drain()
        assert await running == 1.5
        await pool.close()
        with pytest.raises(EnclaveClosedError, match="closed"):
            await pool.add(1, 1)

    run(test, size=1, max_size=2, shrink_after=0.2, max_calls=5)


def test_the_platform_is_killed_and_the_pool_goes_on(pool_image, tmp_path) -> None:
    async def body() -> None:
        async with AsyncEnclavePool(pool_image, state=tmp_path, quiet=True) as pool:
            before = set(pids(pool))
            client = pool._book.members[0].handle._running().client
            os.kill(client.hello.pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                try:
                    answer = await pool.options(timeout=10).add(20, 22)
                except EnclaveLostError:
                    continue  # it may have begun
                if not set(pids(pool)) & before:
                    break
            assert answer == 42
            assert await until(lambda: pool.stats.enclaves == 2)

    asyncio.run(body())


def test_it_gives_up_and_can_be_restarted(run, monkeypatch) -> None:
    async def test(pool) -> None:
        real = AsyncEnclavePool._launch

        async def refuse(self, **options):
            raise LaunchError("no memory for it")

        monkeypatch.setattr(AsyncEnclavePool, "_launch", refuse)
        os.kill(pids(pool)[0], signal.SIGKILL)
        assert await until(lambda: pool.stats.state == "failed")
        with pytest.raises(LaunchError, match=r"gave up.*no memory for it"):
            await pool.add(1, 1)
        monkeypatch.setattr(AsyncEnclavePool, "_launch", real)
        pool.restart()
        assert await until(lambda: pool.stats.enclaves == 1)
        assert await pool.add(1, 1) == 2

    run(test, size=1, give_up=2)


def test_a_pool_that_cannot_start_leaves_nothing_and_others_are_refused(pool_image, pool_state):
    async def body() -> None:
        pool = AsyncEnclavePool(b"no image", state=pool_state, quiet=True)
        with pytest.raises(EnclaveClosedError, match="not started"):
            await pool.call("add", 1, 1)
        with pytest.raises(ImageError):
            await pool.start()
        with pytest.raises(EnclaveStateError):
            await pool.start()

    asyncio.run(body())
    pool = AsyncEnclavePool(pool_image, state=pool_state, quiet=True, size=1)

    async def first() -> None:
        await pool.start()

    async def second() -> None:
        with pytest.raises(EnclaveStateError, match="another event loop"):
            await pool.add(1, 1)
        await pool.close()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    before = pids(pool)
    asyncio.run(second())
    loop.close()
    with pytest.raises(TypeError):
        pickle.dumps(pool)
    # Killed it is at once; the number is free when its parent has looked.
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in before):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_drains_and_then_ends_the_process(pool_image, pool_state, tmp_path) -> None:
    path = tmp_path / "image.pye"
    path.write_bytes(pool_image)
    script = f"""
import asyncio
from pyenclave import AsyncEnclavePool
async def main():
    options = dict(state={str(pool_state)!r}, quiet=True, size=1)
    async with AsyncEnclavePool({str(path)!r}, **options) as pool:
        pool.close_on_sigterm(timeout=20)
        async def call():
            print("got", await pool.sleep(1.5), flush=True)
        task = asyncio.create_task(call())
        while not pool.stats.running:
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "got 1.5\n"
        assert process.wait(20) == -signal.SIGTERM


def test_sigterm_drains_two_pools_and_runs_the_loops_own_handler(
    pool_image, pool_state, tmp_path
) -> None:
    path = tmp_path / "image.pye"
    path.write_bytes(pool_image)
    script = f"""
import asyncio, signal
from pyenclave import AsyncEnclavePool
def make():
    return AsyncEnclavePool({str(path)!r}, state={str(pool_state)!r}, quiet=True, size=1)
async def main():
    told = []
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.append, "told")
    async with make() as one, make() as two:
        one.close_on_sigterm(timeout=20)
        two.close_on_sigterm(timeout=20)
        calls = [asyncio.create_task(one.sleep(0.5)), asyncio.create_task(two.sleep(2.0))]
        while not (one.stats.running and two.stats.running):
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        print(await asyncio.gather(*calls), told, flush=True)
        while not one.stats.state == two.stats.state == "closed":
            await asyncio.sleep(0.01)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "[0.5, 2.0] ['told']\n"
        assert process.wait(20) == 0  # the loop's handler decides what follows


def test_a_close_that_is_cancelled_goes_on(pool_image, pool_state) -> None:
    async def body() -> None:
        pool = await AsyncEnclavePool(pool_image, state=pool_state, quiet=True, size=2).start()
        before = pids(pool)
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))
        await pool.close()
        assert pool.stats.state == "closed"
        assert pool._watched == {}

    asyncio.run(body())


def test_a_call_keeps_its_correlation(run) -> None:
    async def test(pool) -> None:
        running = asyncio.create_task(pool.sleep(0.3))
        assert await until(lambda: pool.stats.running == 1)
        for _ in range(2):  # one that waits, and one that does not
            with pytest.raises(EcallError) as caught:
                await pool.options(timeout=20, correlation="request-7").fail()
            assert caught.value.id == "request-7"
        assert await running == 0.3

    run(test, size=1)
