"""Calls from event loops that are given up, and enclaves that end under them."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import signal
import time

import numpy as np
import pytest
from aio_places import descriptors, eventually, gone, in_child, lanes_of, resources

from pyenclave.calls.ring import slot_stride
from pyenclave.errors import (
    BusyError,
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
)

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


def test_a_call_can_be_cancelled_while_it_is_sent(make, stop):
    """The worker stands still, so that the message is in the middle of crossing."""

    async def main():
        async with make() as enclave:
            pid = enclave.info.pid
            stop(pid)
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


def test_a_killed_worker_is_lost_for_all_pending_calls(make, wide_image, begun):
    async def main():
        async with make(image=wide_image) as enclave:
            calls = [asyncio.create_task(enclave.sleep(30.0)) for _ in range(64)]
            await eventually(lambda: lanes_of(enclave).queued == 60)
            await eventually(lambda: begun(enclave._run.lanes.memory, 4) == 4)
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
            slot = slot_stride()
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
            await eventually(lambda: resources() <= before)
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
