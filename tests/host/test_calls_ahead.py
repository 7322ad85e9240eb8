"""Calls that are on the ring before the platform answered whether there is an enclave."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_places import wait_for

from pyenclave.calls.stats import registry
from pyenclave.errors import (
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveLostError,
    LaunchError,
    LaunchRefusedError,
)
from pyenclave.host import EnclavePool
from pyenclave.image.build import build_script

ENTRY = """
from __future__ import annotations
import os
import pyenclave

count = 0

@pyenclave.ecall
def counted() -> int:
    global count
    count += 1
    return count

@pyenclave.ecall
def leave() -> int:
    os._exit(9)
"""
STARTS = """
from __future__ import annotations
import pyenclave
from pyenclave import trusted

@trusted.on_start
def start() -> None:
    pass

@pyenclave.ecall
def counted() -> int:
    return 1
"""
_TAKEN = 4096 + 128 + 64  # docs/formats/ring.md: the last request that the worker took


def script(folder: Path, text: str) -> bytes:
    path = folder / "ahead.py"
    path.write_text(text)
    return build_script(str(path))


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    return script(tmp_path_factory.mktemp("entry"), ENTRY)


@pytest.fixture(scope="module")
def pools(image: bytes, tmp_path_factory, used) -> Iterator[tuple[EnclavePool, Path]]:
    state = used(tmp_path_factory.mktemp("state"))
    with EnclavePool(image, state=state, quiet=True, size=1, warm=1) as pool:
        yield pool, state


@pytest.fixture
def pool(pools) -> EnclavePool:
    """A pool with a warm worker, of whose image an enclave was launched before."""
    pool = pools[0]
    assert wait_for(lambda: pool._reserve.told().ready == 1)
    return pool


def platform_of(pool: EnclavePool) -> int:
    return pool._reserve._connect().hello.pid


def state_of(process: Path) -> str:
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[0]


@contextlib.contextmanager
def stopped(pool: EnclavePool) -> Iterator[int]:
    pid = platform_of(pool)
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    assert wait_for(lambda: all(state_of(task) == "T" for task in tasks.iterdir()))
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Background:
    """One call in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.value = self._work()
        except BaseException as error:
            self.error = error

    def join(self) -> Background:
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self


def taken(run: Any) -> int:
    return int.from_bytes(run.lanes.memory[_TAKEN : _TAKEN + 4], "little")


def test_a_call_waits_on_its_ring_for_the_enclave_and_is_made_once(pool) -> None:
    with stopped(pool) as pid, pool.enclave(fresh=True) as one:
        run = one._run
        assert not run._held.known  # the platform said nothing yet
        assert repr(one).endswith(", asked for>")  # and nobody waits for it to see a name
        call = Background(one.counted)
        assert wait_for(lambda: run.lanes.busy == 1)
        assert taken(run) == 0  # and nobody took the call
        os.kill(pid, signal.SIGCONT)
        assert call.join().value == 1
        assert one.info.pid > 0
        assert one.counted() == 2
        assert one.info.enclave_id in [row.enclave_id for row in run.client.list()]
    with pytest.raises(EnclaveClosedError):
        one.counted()


def prepared(pool: EnclavePool) -> Any:
    """The handle of the next fresh enclave, which was made ahead."""
    slots = pool._reserve._slots
    assert wait_for(lambda: any(one.handle is not None for one in slots.values()))
    return next(iter(slots.values())).handle


def test_a_handle_made_ahead_is_no_enclave_until_it_is_asked_for(pool) -> None:
    handle = prepared(pool)
    counted = [launch for launch in registry.launches() if launch is handle._run.launch]
    assert counted == []
    with pool.enclave(fresh=True) as one:
        assert one is handle
        assert one._run.launch in registry.launches()
        assert one.counted() == 1
        assert one.stats.state == "running"
    assert one.closed


def test_a_handle_made_ahead_and_never_used_ends_nothing(pool) -> None:
    handle = prepared(pool)
    held = handle._run._held
    client = held.client
    pool._reserve.fill(0)
    del handle
    gc.collect()
    assert not held.asked
    assert not client.closed
    held.end()
    assert pool.counted() > 0  # the pool's own enclave is still there
    pool._poke()
    with pool.enclave(fresh=True) as one:
        assert one.counted() == 1


def test_a_replacement_takes_the_ring_of_a_handle_made_ahead(pool) -> None:
    handle = prepared(pool)
    (member,) = pool._book.members
    pidfd = os.pidfd_open(member.handle.info.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)

    def replaced() -> bool:
        members = pool._book.members
        return len(members) == 1 and members[0] is not member

    assert wait_for(replaced)
    assert pool._book.members[0].handle is not handle
    del handle
    gc.collect()
    assert pool.counted() == 1
    assert pool.counted() == 2


def test_requests_in_between_get_their_own_answers(pool) -> None:
    with pool.enclave(fresh=True) as one:
        client = one._run.client
        rows = client.list()  # whose answer comes after that of the hand-out
        assert one.info.enclave_id in [row.enclave_id for row in rows]
        assert client.why(one.info.enclave_id).state == "running"


def test_what_the_launch_is_refused_for_is_raised_by_its_call_which_nobody_made(pools) -> None:
    pool, state = pools
    policy = state / "launch-policy.toml"
    assert wait_for(lambda: pool._reserve.told().ready == 1)
    before = pool.stats
    policy.touch(0o600)
    policy.write_text("allow_debug = false\n")
    try:
        with pool.enclave(fresh=True) as one:
            for _ in range(2):
                with pytest.raises(LaunchRefusedError, match="allow_debug"):
                    one.counted()
            assert taken(one._run) == 0
            with pytest.raises(LaunchRefusedError, match="allow_debug"):
                _ = one.info
        # Who did not ask for anything hears of it at the end.
        with pytest.raises(LaunchRefusedError, match="allow_debug"), pool.enclave(fresh=True):
            pass
    finally:
        policy.unlink()
    assert (pool.stats.launched, pool.stats.calls) == (before.launched, before.calls)
    assert "allow_debug" in pool.stats.last_error
    with pool.enclave(fresh=True) as one:
        assert one.counted() == 1
    assert (pool.stats.launched, pool.stats.calls) == (before.launched + 1, before.calls + 1)


def test_when_the_warm_worker_was_killed_another_one_serves_the_call_once(pool) -> None:
    told = pool._reserve._connect()
    with stopped(pool):
        killed = [
            pid for pid in children(platform_of(pool)) if pid not in {r.pid for r in rows(pool)}
        ]
        assert killed
        with pool.enclave(fresh=True) as one:
            call = Background(one.counted)
            ends = [os.pidfd_open(pid) for pid in killed]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            for end in ends:
                assert select.select([end], [], [], 30)[0]
                os.close(end)
            os.kill(told.hello.pid, signal.SIGCONT)
            assert call.join().value == 1
            assert one.info.pid not in killed
            assert one.counted() == 2


def rows(pool: EnclavePool) -> tuple[Any, ...]:
    """The enclaves, as their handles know them: the platform does not answer."""
    return tuple(member.handle.info for member in pool._book.members)


def children(pid: int) -> list[int]:
    """Workers of the platform *pid*: processes with a pid namespace of their own below it."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{entry}/status").read_text().splitlines()
                if ":\t" in line
            )
        except OSError:
            continue
        if int(status["PPid"]) == zygote_of(pid) and len(status["NSpid"].split()) > 1:
            found.append(int(entry))
    return found


def zygote_of(pid: int) -> int:
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                return int(entry)
    raise AssertionError("the platform has no zygote")


def test_a_worker_that_ends_in_the_first_call_is_a_lost_enclave(pool) -> None:
    with pool.enclave(fresh=True) as one:
        with pytest.raises(EnclaveLostError) as caught:
            one.leave()
        assert caught.value.started is True
        assert not isinstance(caught.value, LaunchError)


def test_a_deadline_holds_before_the_platform_answered(pool) -> None:
    with stopped(pool) as pid, pool.enclave(fresh=True) as one:
        with pytest.raises(CallTimeoutError):
            one.options(timeout=0.3).counted()
        os.kill(pid, signal.SIGCONT)
        assert one.counted() == 2  # the first was made, after its caller had left


def test_closing_before_the_platform_answered_ends_the_enclave(pool) -> None:
    with stopped(pool) as pid, pool.enclave(fresh=True) as one:
        call = Background(one.counted)
        assert wait_for(lambda: one._run.lanes.busy == 1), (call.value, call.error)
        close = Background(one.close)
        assert isinstance(call.join().error, EnclaveClosedError)
        os.kill(pid, signal.SIGCONT)
        assert close.join().error is None
        client = one._run.client
    named = {row.enclave_id for row in pool._reserve._connect().list()}
    assert named == {row.enclave_id for row in rows(pool)}
    assert client is pool._reserve._connect()


def test_a_handle_that_is_forgotten_before_the_answer_ends_its_enclave(pool) -> None:
    begun = pool._launch_ahead()
    known = begun._run._held
    del begun
    gc.collect()
    assert known._ended
    pool._poke()  # a worker was taken behind its back
    named = {row.enclave_id for row in pool._reserve._connect().list()}
    assert named == {row.enclave_id for row in rows(pool)}


def test_a_forked_child_neither_waits_for_the_answer_nor_ends_the_enclave(pool) -> None:
    with stopped(pool) as pid, pool.enclave(fresh=True) as one:
        child = os.fork()
        if child == 0:
            refused = False
            try:
                one.counted()
            except BaseException as error:
                refused = "forked child" in str(error)
            os._exit(0 if refused else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.kill(pid, signal.SIGCONT)
        assert one.counted() == 1


def test_images_with_on_start_are_launched_as_before(pools, tmp_path: Path) -> None:
    """What a start function raises is an error of the launch, not of a call."""
    image = script(tmp_path, STARTS)
    with EnclavePool(image, state=pools[1], quiet=True, size=1, warm=1) as pool:
        assert pool._reserve.begin() is None
        with pool.enclave(fresh=True) as one:
            assert one._run._held.known
            assert one.counted() == 1


def test_the_platform_is_killed_before_it_answered(pool) -> None:
    with stopped(pool) as pid, pool.enclave(fresh=True) as one:
        run = one._run
        call = Background(one.counted)
        assert wait_for(lambda: run.lanes.busy == 1)
        os.kill(pid, signal.SIGKILL)
        error = call.join().error
        assert isinstance(error, EnclaveLostError)
        assert error.started is False
    with pool.enclave(fresh=True) as one:
        assert one.counted() == 1
