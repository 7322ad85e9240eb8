"""The handle for asyncio, with a real platform, zygote and worker."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import signal
import sys
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import pyenclave
from pyenclave.calls.signature import RESERVED_NAMES
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    ImageError,
    UnknownFunctionError,
)
from pyenclave.host._options import NO_OPTIONS
from pyenclave.host.aio import AsyncEnclave, AsyncEnclaveOptions
from pyenclave.host.enclave import Enclave

ENTRY = Path(__file__).with_name("aio_entry.py")


@pytest.fixture(scope="module")
def image():
    from pyenclave.image.build import build_script

    return build_script(ENTRY)


@pytest.fixture(scope="module")
def wide_image(tmp_path_factory):
    """Four threads."""
    from pyenclave.image.build import build

    folder = tmp_path_factory.mktemp("wide")
    (folder / "aio_entry.py").write_text(ENTRY.read_text())
    manifest = folder / "enclave.toml"
    manifest.write_text(
        '[enclave]\nname = "wide"\nentry = "aio_entry.py"\nproduct_id = 1\n'
        "security_version = 1\nthreads = 4\n"
    )
    return build(manifest)


@pytest.fixture(scope="module")
def state(tmp_path_factory, image):
    """A state directory whose platform and zygote stay warm."""
    path = tmp_path_factory.mktemp("state")
    with Enclave(image, state=path, quiet=True):
        yield path


@pytest.fixture
def make(image, state):
    def make(**options):
        return AsyncEnclave(options.pop("image", image), state=state, quiet=True, **options)

    return make


async def eventually(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.005)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def tasks():
    return len(os.listdir("/proc/self/task"))


def resources():
    """How many descriptors and threads there are, without what nobody has any more."""
    gc.collect()
    return descriptors() + tasks()


def lanes_of(enclave):
    return enclave._engine.lanes


def in_child(child):
    """Run *child* in a fork and return the text that it returns."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        text = "nothing"
        try:
            text = child()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


# ---- before and after ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, None, ["x"], object()])
def test_an_image_for_asyncio_is_a_path_or_bytes(bad):
    with pytest.raises(TypeError):
        AsyncEnclave(bad)
    with pytest.raises(TypeError):
        AsyncEnclave.from_file(bad)


def test_impossible_async_options_are_refused(make, image):
    enclave = make()
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout"):
            enclave.options(timeout=timeout)
    with pytest.raises(ValueError, match="kill_after"):
        enclave.options(kill_after=-0.1)
    with pytest.raises(TypeError, match="inline"):
        AsyncEnclave(image, inline=1)
    with pytest.raises(ValueError, match="queue"):
        AsyncEnclave(image, queue=-1)


def test_nothing_works_before_start_or_after_close(make):
    async def main():
        enclave = make()
        acts = [
            lambda: enclave.call("double", 1),
            lambda: enclave.double(1),
            lambda: enclave.options(timeout=1).double(1),
            lambda: enclave.attest(b"x"),
            enclave.ping,
        ]
        for act in acts:
            with pytest.raises(EnclaveClosedError, match="not started"):
                await act()
        assert repr(enclave) == "<AsyncEnclave, not started>"
        async with enclave:
            double = enclave.double
            assert await double(1) == 2
            pid = enclave.info.pid
            with pytest.raises(EnclaveStateError, match="already"):
                await enclave.start()
        await enclave.close()
        assert enclave.closed
        await eventually(lambda: gone(pid))
        for act in [*acts, lambda: double(1)]:
            with pytest.raises(EnclaveClosedError, match="closed"):
                await act()
        with pytest.raises(EnclaveClosedError):
            await enclave.start()

    asyncio.run(main())


def test_two_starts_at_once_make_one_enclave(make):
    async def main():
        enclave = make()
        first, second = await asyncio.gather(
            enclave.start(), enclave.start(), return_exceptions=True
        )
        assert first is enclave
        assert isinstance(second, EnclaveStateError)
        await enclave.close()

    asyncio.run(main())


def test_without_asyncio_s_loop_it_says_so(make):
    enclave = make()
    coroutine = enclave.start()
    with pytest.raises(EnclaveStateError, match="no asyncio event loop"):
        coroutine.send(None)


def test_a_handle_belongs_to_the_loop_that_first_used_it(make):
    enclave = make()

    async def use():
        return await enclave.double(2)

    with asyncio.Runner() as first:
        first.run(enclave.start())
        assert first.run(use()) == 4
        with asyncio.Runner() as second, pytest.raises(EnclaveStateError, match="event loop"):
            second.run(use())
        with asyncio.Runner() as third, pytest.raises(EnclaveStateError, match="event loop"):
            third.run(enclave.start())
        assert first.run(use()) == 4
        first.run(enclave.close())


def test_it_can_be_closed_from_another_loop_when_its_own_is_closed(make):
    before = resources()
    enclave = make()
    with asyncio.Runner() as first:
        first.run(enclave.start())
        pid = enclave.info.pid
        first.run(enclave.sleep(0.01))
    asyncio.run(enclave.close())
    asyncio.run(eventually(lambda: gone(pid)))
    del enclave
    end = time.monotonic() + 20
    while resources() > before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_bad_image_is_refused_at_start_and_leaves_nothing(make, image, tmp_path):
    async def main():
        before = resources()
        flipped = bytearray(image)
        flipped[len(image) // 2] ^= 1
        for bad in (tmp_path, tmp_path / "missing", b"junk", flipped):
            with pytest.raises(ImageError):
                await make(image=bad).start()
        with pytest.raises(ImageError):
            await AsyncEnclave.from_file(tmp_path / "missing.py").start()
        await eventually(lambda: resources() <= before)

    asyncio.run(main())


def test_launching_does_not_block_the_loop(make, monkeypatch):
    """The launch waits for something that only the loop can do: blocked, it would never end."""
    enclave = make()
    launch, allowed = enclave._launch, threading.Event()
    monkeypatch.setattr(enclave, "_launch", lambda: (allowed.wait(30), launch())[1])

    async def main():
        async def allow():
            for _ in range(100):
                await asyncio.sleep(0)
            allowed.set()

        async with asyncio.timeout(20):
            _, made = await asyncio.gather(allow(), enclave.start())
        assert await made.double(3) == 6
        await made.close()

    asyncio.run(main())


def test_other_tasks_run_while_a_script_is_built_and_launched(state):
    async def main():
        ticks, longest, last = 0, 0.0, time.perf_counter()

        async def tick():
            nonlocal ticks, longest, last
            while True:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                longest, last, ticks = max(longest, now - last), now, ticks + 1

        ticking = asyncio.create_task(tick())
        start = time.perf_counter()
        async with AsyncEnclave.from_file(ENTRY, state=state, quiet=True) as enclave:
            took = time.perf_counter() - start
            ticking.cancel()
            assert await enclave.double(1) == 2
        # Far above the 5 ms that are usual, far below the launch: machines are busy.
        assert longest < max(took / 2, 0.1)
        assert ticks > 3

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancelled_launch_leaves_no_enclave(make, monkeypatch, state, when):
    enclave = make()
    launch, allowed, done = enclave._launch, threading.Event(), threading.Event()
    pids = []

    def slow():
        if when == "before":
            allowed.wait(30)
        run = launch()
        pids.append(run.info.pid)
        done.set()
        if when == "after":
            allowed.wait(30)
        return run

    monkeypatch.setattr(enclave, "_launch", slow)

    async def main():
        before = tasks()
        starting = asyncio.create_task(enclave.start())
        await asyncio.sleep(0)
        if when == "after":
            await eventually(done.is_set)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        allowed.set()
        await eventually(done.is_set)
        await eventually(lambda: gone(pids[0]))
        await eventually(lambda: tasks() <= before)
        with pytest.raises(EnclaveClosedError, match="not started"):
            await enclave.call("double", 1)

    asyncio.run(main())


def test_a_launch_whose_loop_is_closed_leaves_no_enclave(make, monkeypatch):
    enclave = make()
    launch, allowed, pids = enclave._launch, threading.Event(), []

    def slow():
        allowed.wait(30)
        run = launch()
        pids.append(run.info.pid)
        return run

    monkeypatch.setattr(enclave, "_launch", slow)

    async def main():
        starting = asyncio.create_task(enclave.start())
        await asyncio.sleep(0)
        return starting

    asyncio.run(main())  # cancels what is left, and closes the loop
    allowed.set()
    end = time.monotonic() + 20
    while not pids or not gone(pids[0]):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_closing_while_it_starts_ends_the_enclave(make, monkeypatch):
    enclave = make()
    launch, allowed = enclave._launch, threading.Event()
    runs = []

    def slow():
        allowed.wait(30)
        runs.append(launch())
        return runs[0]

    monkeypatch.setattr(enclave, "_launch", slow)

    async def main():
        starting = asyncio.create_task(enclave.start())
        await asyncio.sleep(0)
        await enclave.close()
        allowed.set()
        with pytest.raises(EnclaveClosedError):
            await starting
        await eventually(lambda: gone(runs[0].info.pid))

    asyncio.run(main())


# ---- calls -----------------------------------------------------------------------------------


def test_the_forms_of_an_async_call(make):
    spec = spec_from_file_location("aio_entry", ENTRY)
    module = module_from_spec(spec)
    sys.modules["aio_entry"] = module

    async def main():
        async with make() as enclave:
            assert await enclave.double(21) == 42
            assert await enclave.double(x=21) == 42
            assert await enclave.call("double", 21) == 42
            assert await enclave.call(module.double, 21) == 42
            assert await enclave.options(timeout=5).double(4) == 8
            assert await enclave.options(timeout=5).call("double", 4) == 8
            assert await enclave.ping(b"x" * 1000) == b"x" * 1000
            assert await enclave.options(timeout=5).ping(b"y") == b"y"
            assert enclave.info.mrenclave in await enclave.attest(b"n" * 32)
            assert asyncio.iscoroutinefunction(enclave.double)
            assert enclave.double.__name__ == "double"
            assert "double" in dir(enclave)
            assert not hasattr(enclave, "nope")
            with pytest.raises(UnknownFunctionError):
                await enclave.call("nope")
            with pytest.raises(ArgumentError):
                await enclave.double("x")
            with pytest.raises(ArgumentError, match="nonce"):
                await enclave.attest(bytes(1025))
            with pytest.raises(EcallError) as caught:
                await enclave.fail("text")
            assert caught.value.type == "LookupError"
            with pytest.raises(ArgumentError, match="missing"):
                await enclave.double()
            assert lanes_of(enclave).busy == 0

    try:
        spec.loader.exec_module(module)
        asyncio.run(main())
    finally:
        del sys.modules["aio_entry"]


@pytest.mark.parametrize("inline", [True, False])
def test_arrays_of_many_fragments_cross_without_blocking(make, inline):
    async def main():
        async with make(inline=inline) as enclave:
            values, out = np.arange(400_000.0), np.empty(400_000)
            assert await enclave.twice(values, out=out) is out
            assert (out == values * 2).all()
            several = await asyncio.gather(*(enclave.twice(values + i) for i in range(5)))
            for i, one in enumerate(several):
                assert (one == (values + i) * 2).all()
            assert await enclave.ping(bytes(3_000_000)) == bytes(3_000_000)
            assert (await enclave.zeros(300_000)).sum() == 0

    asyncio.run(main())


def test_several_lanes_run_at_the_same_time(make, wide_image):
    async def main():
        async with make(image=wide_image) as enclave:
            most = 0
            calls = asyncio.gather(*(enclave.sleep(0.2) for _ in range(4)))
            while not calls.done():
                most = max(most, lanes_of(enclave).busy)
                await asyncio.sleep(0.005)
            assert most == 4
            answers = await asyncio.gather(*(enclave.double(i) for i in range(500)))
            assert answers == [2 * i for i in range(500)]

    asyncio.run(main())


def test_calls_in_task_groups_and_under_asyncio_s_timeout(make):
    async def main():
        async with make() as enclave:
            async with asyncio.TaskGroup() as group:
                made = [group.create_task(enclave.double(i)) for i in range(50)]
            assert [one.result() for one in made] == [2 * i for i in range(50)]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await enclave.sleep(1.0)
            assert await enclave.double(1) == 2

    asyncio.run(main())


def test_a_call_that_nobody_awaits_never_starts(make):
    async def main():
        async with make() as enclave:
            enclave.note(1).close()
            task = asyncio.create_task(enclave.note(2))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await enclave.notes() == []

    asyncio.run(main())


def test_a_long_run_of_inline_answers_lets_others_have_their_turn(make):
    async def main():
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with make() as enclave:
            task = asyncio.create_task(other())
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                assert await enclave.double(1) == 2
            task.cancel()
        assert turns > 20

    asyncio.run(main())


def test_functions_that_are_slow_are_not_looked_for(make):
    from pyenclave._core import AsyncFunction

    async def main():
        async with make() as enclave:
            engine, signature = enclave._engine, enclave._run.functions
            function = AsyncFunction(engine.lanes, signature.named("sleep"))
            assert function.patient
            for _ in range(10):
                answer = function.begin((0.001,), {})
                assert await engine.wait(answer, NO_OPTIONS) == 0.001
            assert not function.patient
        async with make(inline=False) as enclave:
            function = AsyncFunction(enclave._engine.lanes, enclave._run.functions.named("double"))
            assert not function.patient
            assert await enclave.double(4) == 8

    asyncio.run(main())


def test_mapping_on_a_loop_keeps_order_and_errors_of_items(make, wide_image):
    async def numbers(count):
        for i in range(count):
            if i % 100 == 0:
                await asyncio.sleep(0.001)
            yield i

    async def broken():
        yield 1
        raise KeyError("the source's own")

    async def main():
        async with make(image=wide_image) as enclave:
            expected = [2 * i for i in range(1000)]
            assert [one async for one in enclave.map("double", range(1000))] == expected
            assert [one async for one in enclave.map("double", numbers(1000))] == expected
            quick = enclave.options(timeout=5)
            assert [one async for one in quick.map("double", [1, 2])] == [2, 4]
            assert [one async for one in enclave.map("double", [])] == []
            assert [one async for one in enclave.map("double", numbers(0))] == []
            mixed = [one async for one in enclave.map("double", [1, "x", 3], errors="return")]
            assert mixed[::2] == [2, 6]
            assert isinstance(mixed[1], ArgumentError)
            results = enclave.map("double", [1, "x", 3])
            assert await anext(results) == 2
            with pytest.raises(ArgumentError):
                await anext(results)
            assert await anext(results) == 6
            results = enclave.map("double", broken())
            assert await anext(results) == 2
            with pytest.raises(KeyError):
                await anext(results)
            with pytest.raises(TypeError):
                enclave.map("double", 5)
            with pytest.raises(ValueError, match="errors"):
                enclave.map("double", [], errors="ignore")
            with pytest.raises(TypeError, match="native"):
                await enclave.map("double", [1]).array()
            with pytest.raises(CallTimeoutError):
                await anext(enclave.options(timeout=0.05).map("sleep", [0.8]))
            late = enclave.options(timeout=0.05).map("sleep", [0.8, 0.8, 0.8])
            for expected in (CallTimeoutError, StopAsyncIteration):  # and nothing is sent again
                with pytest.raises(expected):
                    await anext(late)
            await eventually(lambda: lanes_of(enclave).busy == 0)
            calls = {one.name: one.calls for one in enclave.stats.functions}
            assert calls["double"] >= 2000

    asyncio.run(main())


# ---- giving up ---------------------------------------------------------------------------------


def test_a_queued_call_that_is_cancelled_never_starts(make):
    async def main():
        async with make() as enclave:
            running = asyncio.create_task(enclave.note(1, 1.0))
            await asyncio.sleep(0)
            waiting = [asyncio.create_task(enclave.note(i)) for i in range(2, 30)]
            await asyncio.sleep(0)
            assert lanes_of(enclave).queued == 28
            assert enclave.stats.waiting == 28
            for task in waiting[:-1]:
                task.cancel()
            ended = await asyncio.gather(running, *waiting, return_exceptions=True)
            assert ended[0] is None
            assert ended[-1] is None
            assert all(isinstance(one, asyncio.CancelledError) for one in ended[1:-1])
            assert await enclave.notes() == [1, 29]
            assert lanes_of(enclave).queued == 0

    asyncio.run(main())


def test_a_running_call_that_is_cancelled_keeps_its_lane_until_it_returns(make):
    async def main():
        async with make() as enclave:
            task = asyncio.create_task(enclave.note(1, 1.0))
            await eventually(lambda: lanes_of(enclave).busy == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert lanes_of(enclave).busy == 1
            assert await enclave.notes() == [1]  # waits for the lane; the call went on
            assert lanes_of(enclave).busy == 0

    asyncio.run(main())


def test_a_lane_is_free_again_without_anybody_calling(make):
    async def main():
        async with make() as enclave:
            with pytest.raises(CallTimeoutError):
                await enclave.options(timeout=0.05).sleep(1.0)
            assert lanes_of(enclave).busy == 1
            await eventually(lambda: lanes_of(enclave).busy == 0)

    asyncio.run(main())


def test_a_call_can_be_cancelled_while_it_is_sent(make):
    """The worker stands still, so that the message is in the middle of crossing."""

    async def main():
        async with make() as enclave:
            pid = enclave.info.pid
            os.kill(pid, signal.SIGSTOP)
            try:
                task = asyncio.create_task(enclave.twice(np.zeros(1_000_000)))
                await eventually(lambda: lanes_of(enclave).busy == 1)
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert lanes_of(enclave).busy == 1
            finally:
                os.kill(pid, signal.SIGCONT)
            assert await enclave.double(2) == 4

    asyncio.run(main())


def test_calls_can_be_cancelled_at_any_moment(make, wide_image):
    """Sending, running, reading: wherever it hits, the enclave goes on and answers are right."""

    async def main():
        async with make(image=wide_image) as enclave:
            values = np.arange(200_000.0)
            start = time.monotonic()
            await enclave.twice(values)
            usual = time.monotonic() - start
            ended = 0
            for i in range(200):
                task = asyncio.create_task(enclave.twice(values))
                await asyncio.sleep(usual * (i % 50) / 40)
                task.cancel()
                try:
                    assert (await task)[3] == 6.0
                    ended += 1
                except asyncio.CancelledError:
                    pass
                if i % 20 == 0:
                    assert await enclave.double(i) == 2 * i
            assert (await enclave.twice(values) == values * 2).all()
            await eventually(lambda: lanes_of(enclave).busy == 0)
            assert ended < 200

    asyncio.run(main())


def test_async_deadlines(make):
    async def main():
        async with make() as enclave:
            quick = enclave.options(timeout=0.1)
            with pytest.raises(CallTimeoutError) as caught:
                await quick.sleep(1.5)
            assert isinstance(caught.value, TimeoutError)
            with pytest.raises(CallTimeoutError, match="before the call began"):
                await quick.double(1)
            assert lanes_of(enclave).busy == 1  # the first did not return
            assert await enclave.double(1) == 2
            assert await enclave.options(timeout=20).double(1) == 2
            assert enclave.stats.timeouts == 2

    asyncio.run(main())


@pytest.mark.parametrize("way", ["deadline", "cancelled"])
def test_kill_after_ends_the_worker_of_an_async_call_that_goes_on(make, way):
    async def main():
        async with make() as enclave:
            pid = enclave.info.pid
            start = time.monotonic()
            if way == "deadline":
                with pytest.raises(CallTimeoutError):
                    await enclave.options(timeout=0.05, kill_after=0.1).sleep(30.0)
            else:
                task = asyncio.create_task(enclave.options(kill_after=0.1).sleep(30.0))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            with pytest.raises(EnclaveLostError, match="kill_after") as caught:
                await enclave.double(1)  # waits for the lane
            assert caught.value.started is False
            assert time.monotonic() - start < 25
            await eventually(lambda: gone(pid))
            with pytest.raises(EnclaveLostError, match="kill_after"):
                await enclave.double(1)

    asyncio.run(main())


def test_kill_after_spares_an_async_call_that_returns_in_time(make):
    async def main():
        async with make() as enclave:
            pid = enclave.info.pid
            with pytest.raises(CallTimeoutError):
                await enclave.options(timeout=0.02, kill_after=1.0).sleep(0.1)
            for _ in range(4):
                assert await enclave.sleep(0.3) == 0.3  # another call has the lane at 1.02 s
            assert enclave.info.pid == pid

    asyncio.run(main())


def test_a_full_queue_raises_at_once(make):
    async def main():
        async with make(queue=3) as enclave:
            made = [asyncio.create_task(enclave.sleep(0.1)) for _ in range(10)]
            ended = await asyncio.gather(*made, return_exceptions=True)
            assert [type(one) for one in ended] == [float] * 4 + [BusyError] * 6
            assert await enclave.double(1) == 2
            assert enclave.stats.busy == 6
        async with make(queue=0) as enclave:
            made = asyncio.create_task(enclave.sleep(1.0))
            await eventually(lambda: lanes_of(enclave).busy == 1)
            with pytest.raises(BusyError):
                await enclave.double(1)
            await made

    asyncio.run(main())


# ---- ends --------------------------------------------------------------------------------------


def test_a_killed_worker_is_lost_for_all_pending_calls(make, wide_image):
    async def main():
        async with make(image=wide_image) as enclave:
            calls = [asyncio.create_task(enclave.sleep(30.0)) for _ in range(64)]
            await eventually(lambda: lanes_of(enclave).queued == 60)
            await asyncio.sleep(0.05)
            start = time.monotonic()
            os.kill(enclave.info.pid, signal.SIGKILL)
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - start < 20  # they would take 30 s
            assert {type(one) for one in ended} == {EnclaveLostError}
            assert [one.started for one in ended] == [True] * 4 + [False] * 60
            with pytest.raises(EnclaveLostError):
                await enclave.double(1)
            assert enclave.stats.lost == 64

    asyncio.run(main())


def test_a_worker_that_ends_itself_is_lost(make):
    async def main():
        async with make() as enclave:
            with pytest.raises(EnclaveLostError) as caught:
                await enclave.end()
            assert caught.value.started is True
            with pytest.raises(EnclaveLostError):
                await enclave.double(1)

    asyncio.run(main())


def test_a_poisoned_enclave_tells_every_pending_call(make, wide_image):
    async def main():
        async with make(image=wide_image) as enclave:
            others = [asyncio.create_task(enclave.sleep(30.0)) for _ in range(3)]
            others.append(asyncio.create_task(enclave.poison(0.05)))
            others += [asyncio.create_task(enclave.double(1)) for _ in range(5)]
            ended = await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 20)
            assert {type(one) for one in ended} == {EnclavePoisonedError}
            with pytest.raises(EnclavePoisonedError, match="MAC does not hold"):
                await enclave.double(1)

    asyncio.run(main())


def test_a_broken_answer_poisons_the_handle_with_the_check_s_name(make):
    """Another program of this user writes into the reply slot."""

    async def main():
        async with make() as enclave:
            pid = enclave.info.pid
            folder = f"/proc/{pid}/fd"
            ring = next(fd for fd in os.listdir(folder) if "ring" in os.readlink(f"{folder}/{fd}"))
            slot = (32 + 2 * 131072 + 127) // 128 * 128
            with open(f"{folder}/{ring}", "r+b", buffering=0) as file:
                task = asyncio.create_task(enclave.sleep(30.0))
                await eventually(lambda: lanes_of(enclave).busy == 1)
                await asyncio.sleep(0.02)
                file.seek(4096 + 256 + slot)
                file.write(b"\x77\x77\x77\x77")
            # The watcher looks at the word every 100 ms, whether somebody wakes it or not.
            with pytest.raises(EnclavePoisonedError) as caught:
                await asyncio.wait_for(task, 20)
            assert caught.value.found == "sequence"
            with pytest.raises(EnclavePoisonedError):
                await enclave.double(1)
            await eventually(lambda: gone(pid))

    asyncio.run(main())


def test_closing_ends_running_and_waiting_calls(make):
    async def main():
        enclave = await make().start()
        pid = enclave.info.pid
        calls = [asyncio.create_task(enclave.sleep(30.0)) for _ in range(5)]
        await eventually(lambda: lanes_of(enclave).queued == 4)
        start = time.monotonic()
        await enclave.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - start < 20  # they would take 30 s
        assert {type(one) for one in ended} == {EnclaveClosedError}
        await eventually(lambda: gone(pid))

    asyncio.run(main())


def test_a_loop_that_ends_with_calls_under_way_leaves_no_thread_or_descriptor(make):
    before = resources()

    async def main():
        enclave = await make().start()
        call = asyncio.create_task(enclave.sleep(30.0))
        await eventually(lambda: lanes_of(enclave).busy == 1)
        return enclave, call, enclave.info.pid

    enclave, call, pid = asyncio.run(main())
    assert call.cancelled()
    with pytest.raises(EnclaveStateError, match="loop"):
        asyncio.run(enclave.call("double", 1))
    del enclave, call
    gc.collect()
    end = time.monotonic() + 20
    while resources() > before or not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_forgotten_handle_ends_its_enclave_and_the_loop_goes_on(make):
    async def main():
        before = descriptors()
        enclave = await make().start()
        pid = enclave.info.pid
        assert await enclave.sleep(0.01) == 0.01
        del enclave
        gc.collect()
        await eventually(lambda: gone(pid))
        await eventually(lambda: descriptors() <= before)
        # New descriptors get the same numbers: the loop must have forgotten the old ones.
        reader, writer = os.pipe()
        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(reader, seen.set)
        os.write(writer, b"x")
        await asyncio.wait_for(seen.wait(), 20)
        loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)

    asyncio.run(main())


def test_a_thousand_calls_and_fifty_launches_leave_nothing(make):
    async def main():
        async with make() as enclave:
            assert await enclave.sleep(0.0) == 0.0
            await enclave.sleep(0.001)
            before = resources()
            for i in range(1000):
                if i % 10 == 0:
                    await enclave.sleep(0.0002)
                elif i % 100 == 1:
                    with pytest.raises(TimeoutError):
                        await enclave.options(timeout=0.001).sleep(0.3)
                else:
                    await enclave.double(i)
            assert resources() <= before
        before = resources()
        for i in range(50):
            async with make() as enclave:
                assert await enclave.double(i) == 2 * i
                if i % 2:
                    await enclave.sleep(0.0005)
        await eventually(lambda: resources() <= before)

    asyncio.run(main())


def test_a_forked_child_refuses_and_leaves_the_parent_s_calls_alone(make):
    async def main():
        async with make() as enclave:
            await enclave.sleep(0.001)
            double, running = enclave.double, asyncio.create_task(enclave.sleep(0.2))
            await asyncio.sleep(0.01)

            def child():
                seen = []
                for act in (
                    lambda: double(1),
                    lambda: enclave.call("double", 1),
                    lambda: enclave.attest(b""),
                    enclave.start,
                ):
                    try:
                        act().send(None)
                        seen.append("?")
                    except EnclaveStateError as error:
                        seen.append(str(error))
                try:
                    enclave.close().send(None)
                except StopIteration:
                    seen.append("left alone")
                return "|".join(seen)

            seen = in_child(child).split("|")
            assert len(seen) == 5, seen
            assert all("forked child" in one for one in seen[:4]), seen
            assert seen[4] == "left alone"
            assert await running == 0.2
            assert await double(2) == 4

    asyncio.run(main())


def test_an_async_handle_cannot_be_pickled(make):
    async def main():
        async with make() as enclave:
            for thing in (enclave, enclave.options(timeout=1)):
                for way in (pickle.dumps, copy.copy, copy.deepcopy):
                    with pytest.raises(TypeError):
                        way(thing)

    asyncio.run(main())


# ---- kernels, loops and names ------------------------------------------------------------------


def test_a_kernel_without_futex_waitv_does_as_well(make, wide_image, state):
    """In a process of its own, whose filter refuses that call as older container profiles do."""

    def child():
        from pyenclave._ffi import ffi, lib

        async def main():
            async with AsyncEnclave(wide_image, state=state, quiet=True) as enclave:
                assert await asyncio.gather(*(enclave.sleep(0.1) for _ in range(8)))
                for _ in range(20):
                    await enclave.sleep(0.001)
                os.kill(enclave.info.pid, signal.SIGKILL)
                try:
                    await enclave.sleep(1.0)
                except EnclaveLostError:
                    return "lost"

        lib.pye_harden_no_new_privs()
        assert lib.pye_seccomp_deny(ffi.new("int[]", [449]), 1, 38) == 0
        return asyncio.run(main())

    assert in_child(child) == "lost"


def test_it_works_on_uvloop(make):
    uvloop = pytest.importorskip("uvloop")

    async def main():
        async with make() as enclave:
            assert await enclave.double(2) == 4
            assert await enclave.sleep(0.01) == 0.01
            os.kill(enclave.info.pid, signal.SIGKILL)
            with pytest.raises(EnclaveLostError):
                await enclave.sleep(1.0)

    uvloop.run(main())


def test_every_name_of_an_async_handle_is_reserved():
    for cls in (AsyncEnclave, AsyncEnclaveOptions):
        names = {name for name in dir(cls) if not name.startswith("_")}
        assert names <= RESERVED_NAMES


def test_the_twins_have_the_same_names_and_keywords():
    import inspect

    public = [
        {name for name in dir(c) if not name.startswith("_")} for c in (Enclave, AsyncEnclave)
    ]
    assert public[0] == public[1]
    for name in ("__init__", "options", "attest", "ping", "call", "map"):
        ours, theirs = (inspect.signature(getattr(c, name)) for c in (Enclave, AsyncEnclave))
        assert set(ours.parameters) <= set(theirs.parameters)


def test_the_public_name_is_lazy():
    assert pyenclave.AsyncEnclave is AsyncEnclave
