"""The handle for asyncio where things go wrong: forks, no descriptors, no memory, late answers."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pyenclave.errors import (
    CallTimeoutError,
    EcallError,
    EnclaveLostError,
)
from pyenclave.host.aio import AsyncEnclave

OCALLS = Path(__file__).with_name("aio_ocalls_entry.py")


@pytest.fixture(scope="module")
def images(image, wide_image):
    """One thread, four threads, and one that makes ocalls."""
    from pyenclave.image.build import build_script

    return {"one": image, "wide": wide_image, "ocalls": build_script(OCALLS)}


@pytest.fixture
def make(images, state):
    def make(image="one", **options):
        return AsyncEnclave(images[image], state=state, quiet=True, **options)

    return make


async def soon(awaitable):
    """What is waited for comes, and if it does not, the test does not hang."""
    return await asyncio.wait_for(awaitable, 30)


def in_child(work):
    """Run *work* in a forked child, and wait for that."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


# ---- forked children ---------------------------------------------------------------------------


def test_a_forked_child_that_drops_a_call_leaves_the_parent_s_alone(make):
    """The answer has many fragments, the first of which is there: the child may not touch it."""

    async def main():
        async with make(inline=False) as enclave:
            task = asyncio.create_task(enclave.zeros(300_000))
            await asyncio.sleep(0)
            time.sleep(0.2)  # the loop stands still
            in_child(lambda: task.get_coro().close())
            assert (await soon(task)).shape == (300_000,)
            assert await soon(enclave.double(4)) == 8

    asyncio.run(main())


def test_a_forked_child_does_not_take_the_parent_s_wake_ups(make):
    async def main():
        async with make() as enclave:
            task = asyncio.create_task(enclave.sleep(0.1))
            await asyncio.sleep(0.02)  # the loop waits for it
            time.sleep(0.3)  # the loop stands still; the call returned
            in_child(enclave._engine.ready)
            assert await soon(task) == 0.1

    asyncio.run(main())


def test_a_forked_child_s_loop_goes_on_hearing_of_the_worker_s_end(make):
    async def main():
        async with make() as enclave:
            task = asyncio.create_task(enclave.sleep(30.0))
            await asyncio.sleep(0.02)
            in_child(enclave._engine.worker_ended)  # its epoll is the parent's too
            os.kill(enclave.info.pid, signal.SIGKILL)
            with pytest.raises(EnclaveLostError):
                await soon(task)

    asyncio.run(main())


# ---- what runs out -----------------------------------------------------------------------------


def test_calls_are_answered_where_no_descriptor_is_left(make):
    async def main():
        async with make() as enclave:
            before = descriptors()
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + 16, limits[1]))
            filling = []
            try:
                while True:
                    filling.append(os.dup(0))
            except OSError:
                pass
            try:
                calls = [asyncio.create_task(enclave.sleep(0.02)) for _ in range(3)]
                assert await soon(asyncio.gather(*calls)) == [0.02] * 3
            finally:
                for fd in filling:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert await soon(enclave.sleep(0.02)) == 0.02
            assert await soon(enclave.double(2)) == 4

    asyncio.run(main())


def test_a_loop_that_cannot_watch_descriptors_loses_none(make, monkeypatch):
    async def main():
        async with make() as enclave:
            before = descriptors()

            def full(*rest):
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "add_reader", full)
                for _ in range(3):
                    assert await soon(enclave.sleep(0.03)) == 0.03
                assert descriptors() == before
            assert await soon(enclave.sleep(0.02)) == 0.02

    asyncio.run(main())


@pytest.mark.no_asan(reason="its runtime ends a process that has no memory left")
def test_an_answer_for_which_there_is_no_memory_frees_its_lane(make):
    async def main():
        async with make() as enclave:
            kept = [await soon(enclave.zeros(2_000_000))]
            assert kept[0].size == 2_000_000
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits = resource.getrlimit(resource.RLIMIT_AS)
            seen = 0
            for i in range(20):
                resource.setrlimit(
                    resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**22, limits[1])
                )
                try:
                    kept.append(await soon(enclave.zeros(2_000_000)))
                except MemoryError:
                    seen += 1
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, limits)
                assert await soon(enclave.double(i)) == 2 * i
            assert seen

    asyncio.run(main())


# ---- exceptions of others ----------------------------------------------------------------------


def test_a_logging_filter_that_raises_frees_the_lane(make):
    """The host's log is told of an error that crossed, and its filters are anybody's."""

    def broken(record):
        raise ZeroDivisionError("a filter")

    async def main():
        async with make() as enclave:
            logger = logging.getLogger("pyenclave")
            logger.addFilter(broken)
            try:
                for inline in (True, False):
                    calls = [enclave.fail("x")] if inline else [enclave.fail("x") for _ in "abc"]
                    ended = await soon(asyncio.gather(*calls, return_exceptions=True))
                    assert {type(one) for one in ended} == {ZeroDivisionError}
            finally:
                logger.removeFilter(broken)
            with pytest.raises(EcallError):
                await soon(enclave.fail("x"))
            assert enclave._engine.lanes.busy == 0

    asyncio.run(main())


def test_a_handler_that_was_cancelled_itself_does_not_cancel_the_caller(make):
    async def fetch(name):
        raise asyncio.CancelledError

    async def again(depth):
        return 0

    async def main():
        async with make("ocalls", ocalls={"fetch": fetch, "again": again}) as enclave:
            assert "CancelledError" in await soon(enclave.caught("x"))
            assert await soon(enclave.double(2)) == 4

    asyncio.run(main())


ASKING = """
import pyenclave
from pyenclave import trusted

@trusted.ocall
def read(count: int) -> bytes: ...

@pyenclave.ecall
def size(count: int) -> int:
    return len(read(count))
"""


def test_a_deadline_while_an_ocall_s_result_is_sent_does_not_say_that_nothing_began(
    make, state, tmp_path, stop
):
    """The worker stands still, so that the result is in the middle of crossing."""
    pid = 0

    async def read(count):
        stop(pid)
        return bytes(count)

    async def main():
        nonlocal pid
        script = tmp_path / "asking.py"
        script.write_text(ASKING)
        async with AsyncEnclave.from_file(
            script, state=state, quiet=True, ocalls={"read": read}
        ) as enclave:
            pid = enclave.info.pid
            try:
                with pytest.raises(CallTimeoutError) as caught:
                    await soon(enclave.options(timeout=0.3).size(1_000_000))
            finally:
                os.kill(pid, signal.SIGCONT)
            assert "before" not in str(caught.value)

    asyncio.run(main())


def test_a_stream_whose_enclave_ended_between_two_items_says_so(make):
    async def answer(*rest):
        return 0

    async def main():
        async with make("ocalls", ocalls={"fetch": answer, "again": answer}) as enclave:
            stream = enclave.count(100)
            assert await soon(anext(stream)) == 0
            await asyncio.sleep(0.05)
            os.kill(enclave.info.pid, signal.SIGKILL)
            await asyncio.sleep(0.3)
            with pytest.raises(EnclaveLostError):
                await soon(anext(stream))

    asyncio.run(main())


# ---- maps --------------------------------------------------------------------------------------


def test_a_map_over_a_generator_that_still_runs_can_be_closed(make):
    closed = []

    async def items():
        try:
            for i in range(3):
                yield i
            await asyncio.sleep(30)
        finally:
            closed.append(True)

    async def main():
        async with make() as enclave:
            results = enclave.map("double", items())
            assert await soon(anext(results)) == 0
            await asyncio.sleep(0.01)
            await soon(results.aclose())
            assert closed == [True]

    asyncio.run(main())


# ---- turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
def test_short_calls_of_one_task_do_not_keep_the_others_from_running(make, inline):
    async def main():
        async with make(inline=inline) as enclave:
            await enclave.double(1)
            ticks = []

            async def tick():
                while True:
                    ticks.append(time.perf_counter())
                    await asyncio.sleep(0)

            ticking = asyncio.create_task(tick())
            end = time.perf_counter() + 0.5
            while time.perf_counter() < end:
                assert await enclave.double(3) == 6
            ticking.cancel()
            assert len(ticks) > 10  # every 1 ms if the machine is not busy

    asyncio.run(main())


def test_a_burst_of_calls_is_answered_in_order_and_to_whom_it_belongs(make):
    async def main():
        for image in ("one", "wide"):
            async with make(image, queue=1000) as enclave:
                ended = []

                async def call(i, enclave=enclave, ended=ended):
                    if i % 7 == 0:
                        got = (await enclave.twice(np.full(3, i)))[1]
                    else:
                        got = await enclave.double(i)
                    ended.append(i)
                    return got

                got = await soon(asyncio.gather(*(call(i) for i in range(600))))
                assert got == [2 * i for i in range(600)]
                if image == "one":
                    assert ended == sorted(ended)

    asyncio.run(main())
