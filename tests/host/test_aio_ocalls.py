"""Ocalls and streams on an event loop, with a real worker."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pyenclave.errors import (
    BusyError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    OcallError,
)
from pyenclave.host.aio import AsyncEnclave
from pyenclave.host.enclave import Enclave

ENTRY = Path(__file__).with_name("aio_ocalls_entry.py")


async def nothing(*rest):
    return 0


@pytest.fixture(scope="module")
def image():
    from pyenclave.image.build import build_script

    return build_script(ENTRY)


@pytest.fixture(scope="module")
def state(tmp_path_factory, image, used):
    path = used(tmp_path_factory.mktemp("state"))
    with Enclave(image, state=path, quiet=True, ocalls={"fetch": len, "again": int}):
        yield path


@pytest.fixture
def make(image, state):
    def make(fetch=nothing, again=nothing):
        handlers = {"fetch": fetch, "again": again}
        return AsyncEnclave(image, state=state, quiet=True, ocalls=handlers)

    return make


async def idle(enclave):
    lanes = enclave._engine.lanes
    end = time.monotonic() + 20
    while lanes.busy:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_handlers_that_do_not_fit_the_image_are_refused(image, state):
    async def main():
        with pytest.raises(OcallError, match="no handler"):
            await AsyncEnclave(image, state=state, quiet=True).start()
        with pytest.raises(TypeError):
            AsyncEnclave(image, ocalls={"fetch": 5})

    asyncio.run(main())


def test_a_coroutine_function_answers_on_the_loop(make):
    async def fetch(name):
        assert threading.current_thread() is threading.main_thread()
        await asyncio.sleep(0.01)
        return len(name)

    async def main():
        async with make(fetch) as enclave:
            assert await enclave.ask("abc") == 4
            assert await asyncio.gather(*(enclave.ask("x" * i) for i in range(20))) == list(
                range(1, 21)
            )
            assert enclave._engine.lanes.busy == 0

    asyncio.run(main())


def test_a_plain_function_answers_in_a_thread_and_may_block(make):
    allowed = threading.Event()

    def fetch(name):
        assert threading.current_thread() is not threading.main_thread()
        assert allowed.wait(10)
        return len(name)

    async def main():
        async with make(fetch) as enclave:
            task = asyncio.create_task(enclave.ask("abc"))
            await asyncio.sleep(0.02)
            allowed.set()  # which a blocked loop could not do
            assert await task == 4

    asyncio.run(main())


def test_what_a_handler_raises_crosses_as_the_name_of_its_class(make):
    async def fetch(name):
        if name == "wrong":
            return "not a number"
        raise KeyError("the text stays here")

    async def main():
        async with make(fetch) as enclave:
            with pytest.raises(OcallError) as caught:
                await enclave.ask("x")
            assert "the text" not in str(caught.value)
            assert isinstance(caught.value.__cause__, KeyError)
            assert "KeyError" in await enclave.caught("x")
            assert await enclave.caught("wrong") != "nothing"
            assert await enclave.double(2) == 4

    asyncio.run(main())


def test_a_handler_makes_nested_calls_on_the_same_lane(make):
    async def main():
        async def fetch(name):
            return await enclave.secret(len(name)) + await enclave.call("secret", 1)

        async def again(depth):
            return await enclave.ask("d")

        enclave = make(fetch, again)
        async with enclave:  # which has one thread only
            assert await enclave.ask("abc") == 103 + 101 + 1
            assert await enclave.deep(1) == 101 + 101 + 1
            with pytest.raises(CallError):
                await enclave.secret(1)  # private: only from the handler

    asyncio.run(main())


def test_nested_calls_that_are_not_allowed_are_refused(make):
    async def main():
        async def fetch(name):
            return await enclave.double(3)

        enclave = make(fetch)
        async with enclave:
            with pytest.raises(OcallError) as caught:
                await enclave.ask("abc")
            assert isinstance(caught.value.__cause__, CallError)
            assert await enclave.double(3) == 6

    asyncio.run(main())


def test_two_nested_calls_at_once_are_refused_and_a_late_one_is_an_ordinary_call(make):
    async def main():
        late = []

        async def later():
            await asyncio.sleep(0.05)
            return await enclave.double(5)

        async def fetch(name):
            late.append(asyncio.create_task(later()))
            ended = await asyncio.gather(
                enclave.secret(1), enclave.secret(2), return_exceptions=True
            )
            return sum(one if isinstance(one, int) else 1000 for one in ended)

        enclave = make(fetch)
        async with enclave:
            assert await enclave.ask("x") in (102 + 1000, 101 + 102 + 1)
            assert await late[0] == 10

    asyncio.run(main())


def test_a_call_that_is_cancelled_in_its_ocall_frees_the_lane(make):
    async def main():
        seen = []
        begun = asyncio.Event()

        async def fetch(name):
            if name == "fast":
                return 4
            begun.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        async with make(fetch) as enclave:
            task = asyncio.create_task(enclave.ask("slow"))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(enclave)
            assert seen == ["cancelled"]
            with pytest.raises(CallTimeoutError):
                await enclave.options(timeout=1.0).ask("slow")
            await idle(enclave)
            assert await enclave.ask("fast") == 5
            assert seen == ["cancelled"] * 2

    asyncio.run(main())


def test_a_cancelled_nested_call_leaves_the_outer_call_whole(make):
    async def main():
        async def fetch(name):
            task = asyncio.create_task(enclave.secret(1))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return 7

        enclave = make(fetch)
        async with enclave:
            for _ in range(20):
                assert await enclave.ask("x") == 8

    asyncio.run(main())


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_an_enclave_that_ends_while_a_handler_runs_tells_the_caller_at_once(make, how):
    async def main():
        started = asyncio.Event()

        async def fetch(name):
            started.set()
            await asyncio.sleep(30)

        enclave = await make(fetch).start()
        task = asyncio.create_task(enclave.ask("x"))
        await started.wait()
        start = time.monotonic()
        if how == "killed":
            os.kill(enclave.info.pid, signal.SIGKILL)
        else:
            await enclave.close()
        with pytest.raises(EnclaveLostError if how == "killed" else EnclaveClosedError):
            await task
        assert time.monotonic() - start < 20  # the handler would take 30 s
        await enclave.close()

    asyncio.run(main())


# ---- streams -----------------------------------------------------------------------------------


def test_a_stream_is_read_item_by_item(make):
    async def main():
        async with make() as enclave:
            assert [item async for item in enclave.count(500)] == list(range(500))
            assert [item async for item in enclave.count(0)] == []
            assert [item async for item in enclave.call("count", 3)] == [0, 1, 2]
            assert [item async for item in enclave.options(timeout=5).count(3)] == [0, 1, 2]
            stream = enclave.count_badly(3)
            assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(EcallError):
                await anext(stream)
            assert enclave._engine.lanes.busy == 0

    asyncio.run(main())


def test_a_stream_can_be_left_early(make):
    async def main():
        async with make() as enclave:
            async with enclave.count(10**9) as stream:
                async for item in stream:
                    if item == 5:
                        break
            assert await enclave.double(1) == 2
            stream = enclave.count(10**9)
            assert await anext(stream) == 0
            await stream.aclose()
            await stream.aclose()
            assert enclave._engine.lanes.busy == 0
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            stream = enclave.count(10**9)
            assert await anext(stream) == 0
            del stream  # dropped
            gc.collect()
            assert await enclave.double(1) == 2

    asyncio.run(main())


def test_a_stream_is_for_one_task_at_a_time_and_can_be_cancelled(make):
    async def main():
        async with make(fetch=lambda name: time.sleep(0.1) or 1) as enclave:
            stream = enclave.fetched(["a", "b"])
            first, second = await asyncio.gather(
                anext(stream), anext(stream), return_exceptions=True
            )
            assert first == 1
            assert isinstance(second, EnclaveStateError)
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert await enclave.double(1) == 2

    asyncio.run(main())


def test_a_stream_s_function_may_ask_the_host(make):
    async def fetch(name):
        return len(name)

    async def main():
        async with make(fetch) as enclave:
            names = ["a", "bb", "ccc"]
            assert [item async for item in enclave.fetched(names)] == [1, 2, 3]

    asyncio.run(main())


def test_a_handler_reads_a_stream_on_the_lane_of_the_call_that_asks(make):
    """With one thread of the enclave there is no other lane: it would wait for itself."""

    async def main():
        left = []

        async def fetch(name):
            if name == "all":
                return sum([item async for item in enclave.count(5)])
            if name == "some":
                async with enclave.count(10**9) as stream:
                    return await anext(stream) + await anext(stream)
            stream = enclave.count(10**9)
            first = await anext(stream)
            if name == "kept":
                left.append(stream)
            if name == "busy":
                with pytest.raises(BusyError, match="another nested call"):
                    await enclave.secret(1)
                await stream.aclose()
                return first + await enclave.secret(1)
            if name == "raised":
                left.append(stream)
                raise KeyError
            return first

        async with make(fetch) as enclave:
            for name, expected in (("all", 10), ("some", 1), ("dropped", 0), ("busy", 101)):
                assert await asyncio.wait_for(enclave.ask(name), 10) == expected + 1, name
            assert await asyncio.wait_for(enclave.ask("kept"), 10) == 1
            assert "KeyError" in await asyncio.wait_for(enclave.caught("raised"), 10)
            for stream in left:
                with pytest.raises(EnclaveStateError, match="has answered its ocall"):
                    await anext(stream)
                await stream.aclose()
            assert [item async for item in enclave.fetched(["all", "kept"])] == [10, 0]
            assert await enclave.double(4) == 8
            await idle(enclave)

    asyncio.run(main())


def test_a_call_that_is_given_up_ends_the_streams_of_its_handler(make):
    async def main():
        opened = asyncio.Event()
        ended = []

        async def fetch(name):
            stream = enclave.count(10**9)
            await anext(stream)
            opened.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(name)

        async with make(fetch) as enclave:
            task = asyncio.create_task(enclave.ask("x"))
            await asyncio.wait_for(opened.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await enclave.options(timeout=5).double(4) == 8
            assert ended == ["x"]
            await idle(enclave)

    asyncio.run(main())


def test_a_killed_worker_ends_a_stream(make):
    async def main():
        async with make() as enclave:
            stream = enclave.count(10**9)
            assert await anext(stream) == 0
            os.kill(enclave.info.pid, signal.SIGKILL)
            with pytest.raises(EnclaveError):
                async for _ in stream:
                    pass

    asyncio.run(main())
