"""The pool for threads, with a real platform, zygote and workers."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pool_places import wait_for

from pyenclave.calls.stats import Registry
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    ImageError,
    LaunchError,
    UnknownFunctionError,
)
from pyenclave.host import Enclave, EnclavePool


def pids(pool: EnclavePool) -> list[int]:
    return [member.handle.info.pid for member in pool._book.members]


def test_calls_go_through_by_name_by_attribute_and_by_options(make_pool) -> None:
    pool = make_pool()
    assert pool.call("add", 1, 2) == pool.add(1, 2) == pool.options(timeout=5).add(1, 2) == 3
    assert pool.options(timeout=5).call("add", x=1, y=2) == 3
    assert pool.stats.enclaves == 2
    assert pool.stats.calls == 4
    assert "add" in dir(pool)


def test_errors_of_calls_are_those_of_an_enclave(make_pool) -> None:
    pool = make_pool(size=1)
    with pytest.raises(EcallError):
        pool.fail()
    with pytest.raises(ArgumentError):
        pool.add("x", 1)
    with pytest.raises(UnknownFunctionError):
        pool.call("nothing")
    assert not hasattr(pool, "nothing")
    assert pool.stats.enclaves == 1
    assert pool.add(1, 1) == 2


def test_each_enclave_has_its_own_identity_key_and_state(make_pool) -> None:
    pool = make_pool(size=2)
    infos = [member.handle.info for member in pool._book.members]
    for name in ("enclave_id", "pid", "record", "runtime_public_key"):
        assert getattr(infos[0], name) != getattr(infos[1], name)
    assert infos[0].mrenclave == infos[1].mrenclave


def test_the_metrics_know_what_waited_for_the_pool_and_was_refused(make_pool, monkeypatch) -> None:
    """Else a dashboard is quiet while every caller gets 503."""
    registry = Registry()
    monkeypatch.setattr("pyenclave.host._pooled.registry", registry)
    pool = make_pool(size=1, queue=1)
    with ThreadPoolExecutor(1) as threads:
        with pool.enclave():
            with pytest.raises(CallTimeoutError, match="before an enclave was free"):
                pool.options(timeout=0.05).sleep(0.0)
            waiting = threads.submit(pool.sleep, 0.0)
            assert wait_for(lambda: pool.stats.waiting == 1)
            with pytest.raises(BusyError):
                pool.sleep(0.0)
            ((name, total),) = registry.totals().items()
            assert (name, total.waiting, total.most_waiting) == ("pooled", 1, 1)
            assert (total.failures["busy"], total.failures["timeouts"]) == (1, 1)
        waiting.result()


def test_calls_run_at_the_same_time_and_wait_in_a_queue_that_ends(make_pool) -> None:
    pool = make_pool(size=2, queue=1)
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(pool.sleep, 1.5) for _ in range(2)]
        assert wait_for(lambda: pool.stats.running == 2)
        third = threads.submit(pool.sleep, 0.0)
        assert wait_for(lambda: pool.stats.waiting == 1)
        with pytest.raises(BusyError, match="too many calls wait"):
            pool.add(1, 1)
        assert [future.result() for future in running] == [1.5, 1.5]
        assert third.result() == 0.0
    assert pool.stats.refused == 1


def test_a_deadline_counts_the_time_in_the_queue(make_pool) -> None:
    pool = make_pool(size=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.sleep, 1.5)
        assert wait_for(lambda: pool.stats.running == 1)
        with pytest.raises(CallTimeoutError):
            pool.options(timeout=0.1).add(1, 1)
        assert running.result() == 1.5
    assert pool.stats.waiting == 0
    assert pool.add(1, 1) == 2


def test_an_enclave_whose_caller_gave_up_is_not_used_until_it_is_free(make_pool) -> None:
    pool = make_pool(size=2)
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05).sleep(1.5)
    assert [pool.add(1, n) for n in range(20)] == [1 + n for n in range(20)]
    assert sum(m.free() for m in pool._book.members) == 1  # it still runs: none waited for it
    assert wait_for(lambda: sum(m.free() for m in pool._book.members) == 2)
    assert pool.stats.lost == 0


def test_kill_after_ends_the_enclave_and_the_pool_replaces_it(make_pool) -> None:
    pool = make_pool(size=1)
    (before,) = pids(pool)
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05, kill_after=0.05).sleep(60)
    assert pool.options(timeout=20).add(2, 2) == 4
    assert pids(pool) != [before]


def test_what_is_killed_while_idle_is_replaced_unseen(make_pool) -> None:
    pool = make_pool(size=2)
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: pool.stats.lost == 2 and pool.stats.enclaves == 2)
    assert not set(pids(pool)) & set(before)
    assert [pool.add(n, n) for n in range(10)] == [2 * n for n in range(10)]


def test_a_call_that_may_have_begun_is_never_made_again(make_pool) -> None:
    pool = make_pool(size=2)
    with pytest.raises(EnclaveLostError) as caught:
        pool.leave()
    assert caught.value.started is not False
    assert pool.stats.retried == 0
    assert pool.add(1, 2) == 3
    assert wait_for(lambda: pool.stats.enclaves == 2)


def test_a_call_whose_enclave_was_lost_before_it_began_is_made_again(
    make_pool, monkeypatch
) -> None:
    pool = make_pool(size=2)
    lost = []
    real = Enclave._running

    class Functions:
        def named(self, name):
            lost.append(name)
            raise EnclaveLostError("gone", started=False)

    class Run:
        functions = Functions()

        def guard(self) -> None:
            pass

    def running(self):
        if not lost and threading.current_thread() is threading.main_thread():
            run = real(self)
            fake = Run()
            fake.pidfd, fake.lanes = run.pidfd, run.lanes
            return fake
        return real(self)

    monkeypatch.setattr(Enclave, "_running", running)
    assert pool.add(2, 3) == 5
    assert lost == ["add"]
    assert pool.stats.retried == 1
    assert pool.stats.lost == 1


def test_an_enclave_alone_keeps_its_state_and_comes_back_with_it(make_pool) -> None:
    pool = make_pool(size=1)
    with pool.enclave() as one:
        assert [one.counted(), one.counted()] == [1, 2]
        with pytest.raises(CallTimeoutError):
            pool.options(timeout=0.05).add(1, 1)
        with pytest.raises(CallTimeoutError), pool.enclave(timeout=0.05):
            raise AssertionError
    assert pool.counted() == 3


def test_a_fresh_enclave_was_used_by_nobody_and_ends_with_the_block(make_pool) -> None:
    pool = make_pool(size=1, warm=2, max_fresh=2)
    assert wait_for(lambda: pool._reserve.told().ready == 2)
    seen = set()
    for _ in range(3):
        with pool.enclave(fresh=True) as one:
            assert one.counted() == 1
            assert one.info.pid not in pids(pool)
            seen.add((one.info.pid, one.info.enclave_id, one.info.runtime_public_key))
            assert one.attest(b"nonce")
        with pytest.raises(EnclaveClosedError):
            one.counted()
    assert len({pid for pid, _, _ in seen}) == len({key for _, _, key in seen}) == 3
    with pool.enclave(fresh=True), pool.enclave(fresh=True):
        assert pool.stats.fresh == 2
        with pytest.raises(BusyError, match="fresh"), pool.enclave(fresh=True):
            raise AssertionError
    stats = pool.stats
    assert (stats.fresh, stats.launched, stats.calls, stats.lost) == (0, 6, 5, 0)
    with pool.enclave(fresh=True) as one:
        end = os.pidfd_open(one.info.pid)
        os.kill(one.info.pid, signal.SIGKILL)
        assert select.select([end], [], [], 30)[0]
        os.close(end)
        with pytest.raises(EnclaveLostError):
            one.counted()
    stats = pool.stats
    assert (stats.fresh, stats.launched, stats.calls, stats.lost) == (0, 7, 6, 1)


def test_a_map_has_one_enclave_to_itself(make_pool) -> None:
    pool = make_pool(size=1)
    results = pool.map("add", ((n, 1) for n in range(100)))
    assert next(results) == 1
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05).add(1, 1)
    assert list(results) == list(range(2, 101))
    assert pool.add(1, 1) == 2


def test_an_enclave_that_the_caller_closed_is_replaced(make_pool) -> None:
    pool = make_pool(size=1)
    with pool.enclave() as one:
        one.close()
    assert pool.add(1, 1) == 2


def test_enclaves_are_replaced_after_max_calls(make_pool) -> None:
    pool = make_pool(size=1, max_calls=5)
    counts = [pool.counted() for _ in range(20)]
    assert max(counts) <= 6
    assert counts.count(1) >= 3
    assert pool.stats.recycled >= 3
    assert pool.stats.lost == 0


def test_it_grows_under_load_and_shrinks_again(make_pool) -> None:
    pool = make_pool(size=1, max_size=3, shrink_after=0.3)
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(pool.sleep, [0.3] * 6))
    assert results == [0.3] * 6
    assert pool.stats.launched >= 2
    assert wait_for(lambda: pool.stats.enclaves == 1)


def test_draining_lets_calls_end_and_takes_no_new_ones(make_pool) -> None:
    pool = make_pool(size=1)
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(pool.sleep, 1.5)
        assert wait_for(lambda: pool.stats.running == 1)
        waiting = threads.submit(pool.add, 1, 1)
        assert wait_for(lambda: pool.stats.waiting == 1)
        assert not pool.drain(0.05)
        with pytest.raises(EnclaveClosedError, match="draining"):
            waiting.result()
        with pytest.raises(EnclaveClosedError, match="draining"):
            pool.add(1, 1)
        assert pool.drain()
        assert running.result() == 1.5
    pool.close()
    with pytest.raises(EnclaveClosedError, match="closed"):
        pool.add(1, 1)
    assert pool.stats.state == "closed"
    assert pool.stats.enclaves == 0


def test_closing_ends_running_calls_and_every_process(make_pool) -> None:
    pool = make_pool(size=2)
    before = pids(pool)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.sleep, 60)
        assert wait_for(lambda: pool.stats.running == 1)
        pool.close()
        with pytest.raises(EnclaveClosedError):
            running.result(30)
    pool.close()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))


def test_the_platform_is_killed_and_the_pool_goes_on(pool_image, tmp_path) -> None:
    with EnclavePool(pool_image, state=tmp_path, quiet=True, size=2) as pool:
        before = pids(pool)
        platform = pool._book.members[0].handle._running().client.hello.pid
        os.kill(platform, signal.SIGKILL)

        def works() -> bool:
            try:
                return pool.add(20, 22) == 42
            except EnclaveLostError:
                return False  # it may have begun

        assert wait_for(lambda: works() and not set(pids(pool)) & set(before))
        assert wait_for(lambda: pool.stats.enclaves == 2)
        with pool.enclave(fresh=True) as one:
            assert one.counted() == 1


def test_a_pool_that_cannot_start_says_why_and_leaves_nothing(pool_state) -> None:
    pool = EnclavePool(b"no image", state=pool_state, quiet=True)
    with pytest.raises(ImageError):
        pool.start()
    with pytest.raises(EnclaveClosedError):
        pool.call("add", 1, 1)
    with pytest.raises(EnclaveStateError):
        pool.start()


def test_a_pool_that_gives_up_names_the_last_error_and_can_be_restarted(
    make_pool, monkeypatch
) -> None:
    pool = make_pool(size=1, give_up=2)
    real = EnclavePool._launch

    def refuse(self, **options):
        raise LaunchError("no memory for it")

    monkeypatch.setattr(EnclavePool, "_launch", refuse)
    os.kill(pids(pool)[0], signal.SIGKILL)
    assert wait_for(lambda: pool.stats.state == "failed")
    with pytest.raises(LaunchError, match=r"gave up.*no memory for it"):
        pool.add(1, 1)
    monkeypatch.setattr(EnclavePool, "_launch", real)
    pool.restart()
    assert wait_for(lambda: pool.stats.enclaves == 1)
    assert pool.add(1, 1) == 2


def test_before_start_and_after_close_it_says_so(pool_image, pool_state) -> None:
    pool = EnclavePool(pool_image, state=pool_state, quiet=True)
    for act in (lambda: pool.call("add", 1, 1), lambda: pool.add(1, 1)):
        with pytest.raises(EnclaveClosedError, match="not started"):
            act()
    pool.close()
    with pytest.raises(EnclaveStateError, match=r"started already|closed"):
        pool.start()


def test_a_forked_child_is_refused_and_ends_nothing(make_pool) -> None:
    pool = make_pool(size=1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        for act in (lambda: pool.add(1, 1), lambda: pool.enclave().__enter__(), pool.drain):
            try:
                act()
            except EnclaveStateError as error:
                told.append(str(error))
            except BaseException as error:
                told.append(repr(error))
        pool.close()
        os.write(write, "\n".join(told).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    told = os.read(read, 10000).decode().split("\n")
    os.close(read)
    assert len(told) == 3
    assert all("belongs to the process that made it" in line for line in told)
    assert pool.add(1, 1) == 2


def test_a_pool_that_is_forgotten_ends_its_enclaves(pool_image, pool_state) -> None:
    pool = EnclavePool(pool_image, state=pool_state, quiet=True, size=1).start()
    (pid,) = pids(pool)
    del pool
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_it_cannot_be_pickled(make_pool) -> None:
    pool = make_pool(size=1)
    for thing in (pool, pool.options(timeout=1)):
        with pytest.raises(TypeError):
            pickle.dumps(thing)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": 0}, ValueError),
        ({"size": "2"}, TypeError),
        ({"max_size": 1}, ValueError),
        ({"require": "seccomp"}, TypeError),
        ({"debug": 1}, TypeError),
        ({"max_calls": -1}, ValueError),
    ],
)
def test_impossible_arguments_are_refused(pool_image, options, error) -> None:
    with pytest.raises(error):
        EnclavePool(pool_image, **options)


def test_many_threads_and_a_killer(make_pool) -> None:
    """Only typed errors, no wrong answer, and the pool is whole afterwards."""
    pool = make_pool(size=2, warm=2)
    stop = time.monotonic() + 2.0
    wrong: list[object] = []
    lost, total = [0], [0]

    def work(number: int) -> int:
        done = 0
        while time.monotonic() < stop or (total[0] <= 100 and time.monotonic() < stop + 60):
            try:
                if pool.options(timeout=30).add(number, done) != number + done:
                    wrong.append((number, done))
                done += 1
                total[0] += 1
            except EnclaveLostError:
                lost[0] += 1
            except EnclaveError as error:
                wrong.append(error)
        return done

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(work, number) for number in range(4)]
        while time.monotonic() < stop:
            for pid in pids(pool)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.15)
        done = sum(future.result() for future in futures)
    assert wrong == []
    assert done > 100
    assert wait_for(lambda: pool.stats.enclaves == 2)
    assert pool.stats.state == "running"


def test_a_call_that_waited_for_its_enclave_keeps_its_correlation(make_pool) -> None:
    pool = make_pool(size=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.sleep, 0.3)
        assert wait_for(lambda: pool.stats.running == 1)
        with pytest.raises(EcallError) as caught:
            pool.options(timeout=20, correlation="request-7").fail()
        assert running.result() == 0.3
    assert caught.value.id == "request-7"


def test_an_argument_that_does_not_fit_is_no_sign_of_life(make_pool) -> None:
    """Else whoever sends such calls could keep a pool from asking its enclaves."""
    pool = make_pool(size=1)
    (member,) = pool._book.members
    before = member.asked
    with pytest.raises(ArgumentError):
        pool.add("x", 1)
    assert member.asked == before
    with pytest.raises(EcallError):
        pool.fail()
    assert member.asked > before


def test_one_that_does_not_answer_is_replaced_and_holds_up_nothing(make_pool, stop) -> None:
    pool = make_pool(size=2, health=0.2)
    stopped, other = pids(pool)
    stop(stopped)
    try:
        time.sleep(0.5)
        os.kill(other, signal.SIGKILL)  # while the first is being asked
        assert wait_for(lambda: pool.stats.launched >= 3)
        assert pool.options(timeout=20).add(1, 1) == 2
        assert wait_for(lambda: stopped not in pids(pool))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    assert wait_for(lambda: pool.stats.enclaves == 2)


def test_a_pool_that_was_not_started_may_be_started_by_a_forked_child(
    pool_image, pool_state
) -> None:
    pool = EnclavePool(pool_image, state=pool_state, quiet=True, size=1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pool:
                code = 0 if pool.add(1, 1) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
