"""The handle for asyncio, with a real platform, zygote and worker."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
from aio_places import ENTRY, eventually, gone, in_child, lanes_of, resources, tasks

import pyenclave
from pyenclave.calls.signature import RESERVED_NAMES
from pyenclave.errors import (
    ArgumentError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
    ImageError,
    UnknownFunctionError,
)
from pyenclave.host._options import NO_OPTIONS
from pyenclave.host.aio import AsyncEnclave, AsyncEnclaveOptions
from pyenclave.host.enclave import Enclave

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
            assert inspect.iscoroutinefunction(enclave.double)
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
    from pyenclave._core import AsyncCall, AsyncFunction

    async def main():
        async with make() as enclave:
            engine, signature = enclave._engine, enclave._run.functions
            function = AsyncFunction(engine.lanes, signature._host_call("sleep")[0])
            assert function.patient
            for _ in range(10_000):
                if not function.patient:
                    break
                # A busy machine may have this process look when it is answered: patience is back.
                answer = function.begin((0.001,), {})
                if isinstance(answer, AsyncCall):
                    answer = await engine.wait(answer, NO_OPTIONS)
                assert answer == 0.001
            assert not function.patient
        async with make(inline=False) as enclave:
            function = AsyncFunction(
                enclave._engine.lanes, enclave._run.functions._host_call("double")[0]
            )
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
