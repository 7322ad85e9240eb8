"""Streams and nested calls through pools: each stream has its place until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from pathlib import Path

import pytest
from pool_places import until, wait_for

from pyenclave import AsyncEnclavePool
from pyenclave.errors import (
    BusyError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
)
from pyenclave.host import Enclave, EnclavePool
from pyenclave.image.build import build_script

ENTRY = Path(__file__).with_name("pooled_entry.py")
FAR = 10**9


@pytest.fixture(scope="module")
def image():
    return build_script(str(ENTRY))


@pytest.fixture(scope="module")
def state(tmp_path_factory, used):
    return used(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def shared(image, state):
    """Keeps the platform and the zygote warm."""
    with Enclave(image, state=state, quiet=True, ocalls={"fetch": abs}) as enclave:
        yield enclave


@pytest.fixture
def make(image, state, shared):
    with contextlib.ExitStack() as stack:

        def do(fetch=abs, **options):
            pool = EnclavePool(image, state=state, quiet=True, ocalls={"fetch": fetch}, **options)
            return stack.enter_context(pool)

        yield do


@pytest.fixture
def run(image, state, shared):
    """Run a coroutine function with a pool of its own."""

    def do(test, fetch=abs, **options):
        async def body():
            async with AsyncEnclavePool(
                image, state=state, quiet=True, ocalls={"fetch": fetch}, **options
            ) as pool:
                await asyncio.wait_for(test(pool), 90)

        asyncio.run(body())

    return do


def refused(pool: EnclavePool) -> bool:
    """Whether a call waits in vain."""
    try:
        pool.options(timeout=0.05).double(1)
    except CallTimeoutError:
        return True
    return False


async def refused_there(pool: AsyncEnclavePool) -> bool:
    try:
        await pool.options(timeout=0.05).double(1)
    except CallTimeoutError:
        return True
    return False


# ---- threads -----------------------------------------------------------------------------------


def test_a_stream_has_its_place_until_its_last_item(make) -> None:
    pool = make(size=1)
    stream = pool.count(3)
    assert pool.stats.running == 1
    assert next(stream) == 0
    assert refused(pool)
    assert list(stream) == [1, 2]
    assert stream.closed
    assert pool.stats.running == 0
    assert pool.double(1) == 2
    assert next(stream, None) is None


def test_a_stream_that_is_left_gives_its_place_back(make) -> None:
    pool = make(size=1)
    for leave in ("close", "with", "raise", "drop", "drop unread", "collect"):
        stream = pool.options(timeout=20).call("count", FAR)
        if leave != "drop unread":
            assert [next(stream), next(stream)] == [0, 1], leave
        assert pool.stats.running == 1
        if leave == "close":
            stream.close()
            stream.close()
        elif leave == "with":
            with stream:
                assert next(stream) == 2
        elif leave == "raise":
            with contextlib.suppress(KeyError), stream:
                raise KeyError
        elif leave == "collect":
            circle = [stream]
            circle.append(circle)
            del circle
        del stream
        gc.collect()
        assert pool.stats.running == 0, leave
        assert pool.options(timeout=20).double(1) == 2, leave
    assert pool.stats.lost == 0
    assert pool.stats.launched == 1


def test_calls_go_to_other_enclaves_than_the_streams(make) -> None:
    pool = make(size=2)
    with pool.count(FAR) as stream:
        assert next(stream) == 0
        assert [pool.double(n) for n in range(20)] == [2 * n for n in range(20)]
        assert next(stream) == 1


def test_a_thread_that_has_every_place_itself_is_refused(make) -> None:
    """It would wait for ever; with a deadline it waits as long, for others may close them."""
    pool = make(size=2)
    first, second = pool.count(FAR), pool.count(FAR)
    with pytest.raises(BusyError, match="this thread itself"):
        pool.double(1)
    with pytest.raises(BusyError, match="this thread itself"), pool.enclave():
        raise AssertionError
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05).double(1)
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.double(4)))
    thread.start()
    assert wait_for(lambda: pool.stats.waiting == 1)
    first.close()
    thread.join(30)
    assert got == [8]
    second.close()
    with pool.enclave(), pool.enclave(), pytest.raises(BusyError, match="this thread itself"):
        pool.double(1)
    assert pool.stats.running == pool.stats.waiting == 0


def test_errors_of_streams_are_those_of_an_enclave(make) -> None:
    pool = make(size=1)
    stream = pool.badly(1)
    assert next(stream) == 0
    with pytest.raises(EcallError):
        next(stream)
    stream = pool.options(timeout=1.0).slowly(3.0)
    assert next(stream) == 0
    with pytest.raises(CallTimeoutError):
        next(stream)
    assert stream.closed
    assert pool.stats.running == 0
    assert refused(pool)  # its thread is busy inside
    assert pool.options(timeout=20).double(1) == 2
    stream = pool.leaves(2)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(EnclaveLostError) as caught:
        next(stream)
    assert caught.value.started is True
    assert pool.stats.retried == 0
    assert pool.options(timeout=20).double(1) == 2
    assert pool.stats.failures == 0


def test_draining_waits_for_streams_and_closing_ends_them(make) -> None:
    pool = make(size=1)
    stream = pool.count(FAR)
    assert not pool.drain(0.05)
    assert next(stream) == 0  # what is under way goes on
    stream.close()
    assert pool.drain(20)
    pool = make(size=1)
    stream = pool.count(FAR)
    assert next(stream) == 0
    pool.close()
    with pytest.raises(EnclaveClosedError):
        next(stream)
    stream.close()


def test_an_enclave_that_comes_back_with_an_open_stream_is_used_when_that_ends(make) -> None:
    pool = make(size=1)
    with pool.enclave() as one:
        stream = one.count(FAR)
        assert next(stream) == 0
    assert refused(pool)
    stream.close()
    assert pool.options(timeout=20).double(1) == 2


def test_a_handler_calls_the_enclave_that_asks(make) -> None:
    """Not another one, for which it would wait while the caller has the only one."""
    pids = []

    def fetch(x: int) -> int:
        pids.append(pool.stats.running)
        return pool.double(x) + sum(pool.count(x))

    pool = make(fetch, size=1)
    assert pool.ask(3) == 2 * 3 + 3 + 1
    assert pool.options(timeout=20).ask(3) == 2 * 3 + 3 + 1  # in a thread of its own
    assert list(pool.fetched(3)) == [0, 2, 5]
    assert pool.stats.running == 0
    assert set(pids) == {1}

    def forbidden(x: int) -> int:
        return strict.ask(x)  # which the ocall does not allow

    strict = make(forbidden, size=1)
    with pytest.raises(CallError):
        strict.ask(1)


# ---- asyncio -----------------------------------------------------------------------------------


def test_a_stream_on_a_loop_has_its_place_from_its_first_item_to_its_last(run) -> None:
    async def test(pool) -> None:
        stream = pool.count(3)
        assert pool.stats.running == 0
        assert await anext(stream) == 0
        assert pool.stats.running == 1
        assert await refused_there(pool)
        assert [item async for item in stream] == [1, 2]
        assert pool.stats.running == 0
        assert await pool.double(1) == 2
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert [item async for item in pool.call("count", 2)] == [0, 1]

    run(test, size=1)


@pytest.mark.parametrize("leave", ["close", "with", "drop", "drop unread", "cancel"])
def test_a_stream_on_a_loop_that_is_left_gives_its_place_back(run, leave: str) -> None:
    async def test(pool) -> None:
        stream = pool.options(timeout=20).slowly(1.5) if leave == "cancel" else pool.count(FAR)
        if leave != "drop unread":
            assert await anext(stream) == 0
        if leave == "close":
            await stream.aclose()
            await stream.aclose()
        elif leave == "with":
            async with stream:
                assert await anext(stream) == 1
        elif leave == "cancel":
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            with pytest.raises(EnclaveStateError, match="in use"):
                await anext(stream)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert pool.stats.running == 0
            assert await refused_there(pool)  # its thread is busy inside
        del stream
        gc.collect()
        assert await until(lambda: pool.stats.running == 0)
        assert await pool.options(timeout=20).double(1) == 2
        assert pool.stats.lost == 0

    run(test, size=1)


def test_errors_of_streams_on_a_loop_and_tasks_that_wait_for_themselves(run) -> None:
    async def test(pool) -> None:
        stream = pool.badly(1)
        assert await anext(stream) == 0
        with pytest.raises(EcallError):
            await anext(stream)
        stream = pool.leaves(1)
        assert await anext(stream) == 0
        with pytest.raises(EnclaveLostError):
            await anext(stream)
        assert pool.stats.running == 0
        async with pool.options(timeout=10).count(FAR) as stream:
            assert await anext(stream) == 0
            with pytest.raises(BusyError, match="itself"):
                await pool.double(1)
            waiting = asyncio.create_task(pool.double(1))
            assert await until(lambda: pool.stats.waiting == 1)
        assert await waiting == 2
        assert [one async for one in pool.map("double", [1, 2])] == [2, 4]

    run(test, size=1)


def test_a_stream_whose_enclave_was_killed_before_it_began_begins_elsewhere(run) -> None:
    async def test(pool) -> None:
        calls = []
        for member in pool._book.members:

            def lose(*args, real=member.handle.call, **kwargs):
                calls.append(args)
                if len(calls) == 1:
                    raise EnclaveLostError("gone", started=False)
                return real(*args, **kwargs)

            member.handle.call = lose
        assert [one async for one in pool.count(3)] == [0, 1, 2]
        assert len(calls) == 2
        assert pool.stats.retried == 1

    run(test, size=2)


def test_draining_a_pool_on_a_loop_waits_for_streams_and_closing_ends_them(run) -> None:
    async def test(pool) -> None:
        stream = pool.count(FAR)
        assert await anext(stream) == 0
        assert not await pool.drain(0.05)
        assert await anext(stream) == 1
        await pool.close()
        with pytest.raises(EnclaveClosedError):
            await anext(stream)

    run(test, size=1)


def test_a_handler_on_a_loop_calls_the_enclave_that_asks(run) -> None:
    pools = []

    async def fetch(x: int) -> int:
        (pool,) = pools
        assert pool.stats.running == 1
        return await pool.double(x) + 1

    async def test(pool) -> None:
        pools.append(pool)
        assert await pool.ask(3) == 2 * 3 + 2
        assert [one async for one in pool.fetched(3)] == [1, 3, 5]
        assert pool.stats.running == 0

    run(test, fetch, size=1)
