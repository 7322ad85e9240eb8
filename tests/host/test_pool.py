"""The pool for threads, with a real platform, zygote and workers."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
from pyenclave.host._pooled import _Lock

ENTRY = """
from __future__ import annotations
import os
import time
import pyenclave

count = 0

@pyenclave.ecall
def add(x: int, y: int) -> int:
    return x + y

@pyenclave.ecall
def counted() -> int:
    global count
    count += 1
    return count

@pyenclave.ecall
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds

@pyenclave.ecall
def fail() -> int:
    raise ValueError("no")

@pyenclave.ecall
def leave() -> int:
    os._exit(9)
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    from pyenclave.image.build import build_script

    script = tmp_path_factory.mktemp("entry") / "pooled.py"
    script.write_text(ENTRY)
    return build_script(str(script))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def shared(image, state):
    """Keeps the platform and the zygote warm."""
    with Enclave(image, state=state, quiet=True) as enclave:
        yield enclave


@pytest.fixture
def make(image, state, shared):
    with contextlib.ExitStack() as stack:

        def do(**options):
            pool = EnclavePool(image, state=state, quiet=True, **options)
            return stack.enter_context(pool)

        yield do


def wait_for(done, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.01)
    return False


def pids(pool: EnclavePool) -> list[int]:
    return [member.handle.info.pid for member in pool._book.members]


def test_calls_go_through_by_name_by_attribute_and_by_options(make) -> None:
    pool = make()
    assert pool.call("add", 1, 2) == pool.add(1, 2) == pool.options(timeout=5).add(1, 2) == 3
    assert pool.options(timeout=5).call("add", x=1, y=2) == 3
    assert pool.stats.enclaves == 2
    assert pool.stats.calls == 4
    assert "add" in dir(pool)


def test_errors_of_calls_are_those_of_an_enclave(make) -> None:
    pool = make(size=1)
    with pytest.raises(EcallError):
        pool.fail()
    with pytest.raises(ArgumentError):
        pool.add("x", 1)
    with pytest.raises(UnknownFunctionError):
        pool.call("nothing")
    assert not hasattr(pool, "nothing")
    assert pool.stats.enclaves == 1
    assert pool.add(1, 1) == 2


def test_each_enclave_has_its_own_identity_key_and_state(make) -> None:
    pool = make(size=2)
    infos = [member.handle.info for member in pool._book.members]
    for name in ("enclave_id", "pid", "record", "runtime_public_key"):
        assert getattr(infos[0], name) != getattr(infos[1], name)
    assert infos[0].mrenclave == infos[1].mrenclave


def test_the_metrics_know_what_waited_for_the_pool_and_was_refused(make, monkeypatch) -> None:
    """Else a dashboard is quiet while every caller gets 503."""
    registry = Registry()
    monkeypatch.setattr("pyenclave.host._pooled.registry", registry)
    pool = make(size=1, queue=1)
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


def test_calls_run_at_the_same_time_and_wait_in_a_queue_that_ends(make) -> None:
    pool = make(size=2, queue=1)
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


def test_a_deadline_counts_the_time_in_the_queue(make) -> None:
    pool = make(size=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.sleep, 1.5)
        assert wait_for(lambda: pool.stats.running == 1)
        with pytest.raises(CallTimeoutError):
            pool.options(timeout=0.1).add(1, 1)
        assert running.result() == 1.5
    assert pool.stats.waiting == 0
    assert pool.add(1, 1) == 2


def test_an_enclave_whose_caller_gave_up_is_not_used_until_it_is_free(make) -> None:
    pool = make(size=2)
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05).sleep(1.5)
    assert [pool.add(1, n) for n in range(20)] == [1 + n for n in range(20)]
    assert sum(m.free() for m in pool._book.members) == 1  # it still runs: none waited for it
    assert wait_for(lambda: sum(m.free() for m in pool._book.members) == 2)
    assert pool.stats.lost == 0


def test_kill_after_ends_the_enclave_and_the_pool_replaces_it(make) -> None:
    pool = make(size=1)
    (before,) = pids(pool)
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05, kill_after=0.05).sleep(60)
    assert pool.options(timeout=20).add(2, 2) == 4
    assert pids(pool) != [before]


def test_what_is_killed_while_idle_is_replaced_unseen(make) -> None:
    pool = make(size=2)
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: pool.stats.lost == 2 and pool.stats.enclaves == 2)
    assert not set(pids(pool)) & set(before)
    assert [pool.add(n, n) for n in range(10)] == [2 * n for n in range(10)]


def test_a_call_that_may_have_begun_is_never_made_again(make) -> None:
    pool = make(size=2)
    with pytest.raises(EnclaveLostError) as caught:
        pool.leave()
    assert caught.value.started is not False
    assert pool.stats.retried == 0
    assert pool.add(1, 2) == 3
    assert wait_for(lambda: pool.stats.enclaves == 2)


def test_a_call_whose_enclave_was_lost_before_it_began_is_made_again(make, monkeypatch) -> None:
    pool = make(size=2)
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


def test_an_enclave_alone_keeps_its_state_and_comes_back_with_it(make) -> None:
    pool = make(size=1)
    with pool.enclave() as one:
        assert [one.counted(), one.counted()] == [1, 2]
        with pytest.raises(CallTimeoutError):
            pool.options(timeout=0.05).add(1, 1)
        with pytest.raises(CallTimeoutError), pool.enclave(timeout=0.05):
            raise AssertionError
    assert pool.counted() == 3


def test_a_fresh_enclave_was_used_by_nobody_and_ends_with_the_block(make) -> None:
    pool = make(size=1, warm=2, max_fresh=2)
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


def test_a_map_has_one_enclave_to_itself(make) -> None:
    pool = make(size=1)
    results = pool.map("add", ((n, 1) for n in range(100)))
    assert next(results) == 1
    with pytest.raises(CallTimeoutError):
        pool.options(timeout=0.05).add(1, 1)
    assert list(results) == list(range(2, 101))
    assert pool.add(1, 1) == 2


def test_an_enclave_that_the_caller_closed_is_replaced(make) -> None:
    pool = make(size=1)
    with pool.enclave() as one:
        one.close()
    assert pool.add(1, 1) == 2


def test_enclaves_are_replaced_after_max_calls(make) -> None:
    pool = make(size=1, max_calls=5)
    counts = [pool.counted() for _ in range(20)]
    assert max(counts) <= 6
    assert counts.count(1) >= 3
    assert pool.stats.recycled >= 3
    assert pool.stats.lost == 0


def test_it_grows_under_load_and_shrinks_again(make) -> None:
    pool = make(size=1, max_size=3, shrink_after=0.3)
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(pool.sleep, [0.3] * 6))
    assert results == [0.3] * 6
    assert pool.stats.launched >= 2
    assert wait_for(lambda: pool.stats.enclaves == 1)


def test_draining_lets_calls_end_and_takes_no_new_ones(make) -> None:
    pool = make(size=1)
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


def test_closing_ends_running_calls_and_every_process(make) -> None:
    pool = make(size=2)
    before = pids(pool)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.sleep, 60)
        assert wait_for(lambda: pool.stats.running == 1)
        pool.close()
        with pytest.raises(EnclaveClosedError):
            running.result(30)
    pool.close()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))


def test_the_platform_is_killed_and_the_pool_goes_on(image, tmp_path) -> None:
    with EnclavePool(image, state=tmp_path, quiet=True, size=2) as pool:
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


def test_a_pool_that_cannot_start_says_why_and_leaves_nothing(state, shared) -> None:
    pool = EnclavePool(b"no image", state=state, quiet=True)
    with pytest.raises(ImageError):
        pool.start()
    with pytest.raises(EnclaveClosedError):
        pool.call("add", 1, 1)
    with pytest.raises(EnclaveStateError):
        pool.start()


def test_a_pool_that_gives_up_names_the_last_error_and_can_be_restarted(make, monkeypatch) -> None:
    pool = make(size=1, give_up=2)
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


def test_before_start_and_after_close_it_says_so(image, state, shared) -> None:
    pool = EnclavePool(image, state=state, quiet=True)
    for act in (lambda: pool.call("add", 1, 1), lambda: pool.add(1, 1)):
        with pytest.raises(EnclaveClosedError, match="not started"):
            act()
    pool.close()
    with pytest.raises(EnclaveStateError, match=r"started already|closed"):
        pool.start()


def test_a_forked_child_is_refused_and_ends_nothing(make) -> None:
    pool = make(size=1)
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


def test_a_pool_that_is_forgotten_ends_its_enclaves(image, state, shared) -> None:
    pool = EnclavePool(image, state=state, quiet=True, size=1).start()
    (pid,) = pids(pool)
    del pool
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_it_cannot_be_pickled(make) -> None:
    pool = make(size=1)
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
def test_impossible_arguments_are_refused(image, options, error) -> None:
    with pytest.raises(error):
        EnclavePool(image, **options)


def test_many_threads_and_a_killer(make) -> None:
    """Only typed errors, no wrong answer, and the pool is whole afterwards."""
    pool = make(size=2, warm=2)
    stop = time.monotonic() + 2.0
    wrong: list[object] = []
    lost = [0]

    def work(number: int) -> int:
        done = 0
        while time.monotonic() < stop:
            try:
                if pool.options(timeout=30).add(number, done) != number + done:
                    wrong.append((number, done))
                done += 1
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


SERVICE = """
import signal, sys, threading, time
from pyenclave import EnclavePool
from pyenclave.errors import EnclaveClosedError
{before}
with EnclavePool({image!r}, state={state!r}, quiet=True, size=1) as pool:
    pool.close_on_sigterm(timeout=20)
    done = []
    thread = threading.Thread(target=lambda: done.append(pool.sleep(1.5)))
    thread.start()
    while not pool.stats.running:
        time.sleep(0.01)
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.05)
            if {after}:
                break
    finally:
        thread.join(20)
        print("done", done, flush=True)
        try:
            pool.add(1, 1)
        except EnclaveClosedError as error:
            print("refused", flush=True)
"""


@pytest.mark.parametrize("handler", [False, True])
def test_sigterm_drains_and_then_does_what_was_done_before(
    image, state, shared, tmp_path, handler: bool
) -> None:
    path = tmp_path / "image.pye"
    path.write_bytes(image)
    before = "told = []\nsignal.signal(signal.SIGTERM, lambda *_: told.append(1))" * handler
    script = SERVICE.format(
        before=before,
        image=str(path),
        state=str(state),
        after="told and done and pool.stats.state == 'closed'" if handler else "False",
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
        assert process.wait(20) == (0 if handler else -signal.SIGTERM)
    assert time.monotonic() - sent > 0.2  # the call that was under way had its time
    if handler:
        assert out == "done [1.5]\nrefused\n"


def test_handlers_are_set_in_the_main_thread_only(make) -> None:
    pool = make(size=1)
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            pool.close_on_sigterm()
        except EnclaveStateError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert len(caught) == 1
    before = signal.getsignal(signal.SIGTERM)
    pool.close_on_sigterm()
    assert signal.getsignal(signal.SIGTERM) is not before
    pool.close()
    assert signal.getsignal(signal.SIGTERM) is before


class _Interrupter:
    """Raises KeyboardInterrupt where Python looks for signals, at the n-th such place."""

    FILES = ("pool.py", "_pooled.py", "_book.py")

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, frame, event, arg) -> None:
        # The interpreter looks after a call of C code and at the start of a function.
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(self.FILES):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


def interrupted(work) -> int:
    """Interrupt *work* at each place in turn until there is none left; return how often."""
    number = 0
    while True:
        number += 1
        interrupter = _Interrupter(number)
        try:
            sys.setprofile(interrupter)
            work()
        except KeyboardInterrupt:
            continue
        finally:
            sys.setprofile(None)
        if interrupter.left > 0:
            return number


@pytest.mark.parametrize("what", ["call", "options", "enclave", "fresh", "wait"])
def test_ctrl_c_at_any_moment_leaves_no_place_taken(make, what: str) -> None:
    pool = make(size=1, warm=1)

    def alone() -> None:
        with pool.enclave(timeout=1) as one:
            one.add(1, 1)

    def fresh() -> None:
        with contextlib.suppress(BusyError), pool.enclave(fresh=True) as one:
            one.add(1, 1)

    def wait() -> None:
        with contextlib.suppress(CallTimeoutError):
            pool.options(timeout=0.01).add(1, 1)

    work = {
        "call": lambda: pool.add(1, 1),
        "options": lambda: pool.options(timeout=5).add(1, 1),
        "enclave": alone,
        "fresh": fresh,
        "wait": wait,
    }[what]
    work()
    with pool.enclave() if what == "wait" else contextlib.nullcontext():
        assert interrupted(work) > 10
    assert wait_for(lambda: pool.stats.running == pool.stats.waiting == pool.stats.fresh == 0)
    assert pool.options(timeout=10).add(2, 2) == 4


class _Interrupt(BaseException):
    """What a signal raises."""


def test_a_pools_lock_is_given_back_whenever_a_signal_comes() -> None:
    """Also on CPython 3.14, which looks for signals before the block of a `with` begins."""
    lock = _Lock()
    armed = False
    interrupts = held = 0

    def raises(*_: object) -> None:
        if armed:
            raise _Interrupt

    before = signal.signal(signal.SIGVTALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0001, 0.0001)
        while interrupts < 100:
            try:
                armed = True
                while True:
                    with lock:
                        pass
            except _Interrupt:
                armed = False
                interrupts += 1
            if lock._is_owned():
                held += 1
                lock.release()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert held == 0


def test_a_call_that_waited_for_its_enclave_keeps_its_correlation(make) -> None:
    pool = make(size=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.sleep, 0.3)
        assert wait_for(lambda: pool.stats.running == 1)
        with pytest.raises(EcallError) as caught:
            pool.options(timeout=20, correlation="request-7").fail()
        assert running.result() == 0.3
    assert caught.value.id == "request-7"


def test_an_argument_that_does_not_fit_is_no_sign_of_life(make) -> None:
    """Else whoever sends such calls could keep a pool from asking its enclaves."""
    pool = make(size=1)
    (member,) = pool._book.members
    before = member.asked
    with pytest.raises(ArgumentError):
        pool.add("x", 1)
    assert member.asked == before
    with pytest.raises(EcallError):
        pool.fail()
    assert member.asked > before


def test_one_that_does_not_answer_is_replaced_and_holds_up_nothing(make) -> None:
    pool = make(size=2, health=0.2)
    stopped, other = pids(pool)
    os.kill(stopped, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        os.kill(other, signal.SIGKILL)  # while the first is being asked
        assert wait_for(lambda: pool.stats.launched == 3)
        assert pool.options(timeout=20).add(1, 1) == 2
        assert wait_for(lambda: stopped not in pids(pool))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    assert wait_for(lambda: pool.stats.enclaves == 2)


def test_a_pool_that_was_not_started_may_be_started_by_a_forked_child(image, state, shared) -> None:
    pool = EnclavePool(image, state=state, quiet=True, size=1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pool:
                code = 0 if pool.add(1, 1) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


TERMS = """
import os, signal, sys, threading, time
from pyenclave import EnclavePool
options = dict(state={state!r}, quiet=True, size=1)
with EnclavePool({image!r}, **options) as one, EnclavePool({image!r}, **options) as two:
    {order}[0].close_on_sigterm(timeout=20)
    {order}[1].close_on_sigterm(timeout=20)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"up")  # before, Python forgets the signals that come
        time.sleep(60)
        os._exit(7)
    os.read(read, 2)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
    def call(pool, seconds):
        print(pool.sleep(seconds), flush=True)
    threading.Thread(target=call, args=(one, 0.5)).start()
    threading.Thread(target=call, args=(two, 2.0)).start()
    while not (one.stats.running and two.stats.running):
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("order", ["(one, two)", "(two, one)"])
def test_sigterm_ends_the_process_when_the_last_pool_is_drained(
    image, state, shared, tmp_path, order: str
) -> None:
    """And at once a forked child, which has the handler but nothing that drains."""
    path = tmp_path / "image.pye"
    path.write_bytes(image)
    script = TERMS.format(image=str(path), state=str(state), order=order)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "0.5\n2.0\n"
        assert process.wait(20) == -signal.SIGTERM
