"""
Handles under stress: hammering threads, stopped workers, forks, signals, and any order of use.

A handle answers rightly or with a typed error, in time, whatever happens to it (BND-14, BND-15,
SVC-09, SVC-11).
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pyenclave._platform.client import PlatformClient
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
    UnknownFunctionError,
)
from pyenclave.host import Enclave


@pytest.fixture
def state(state: Path, used: Callable[[Path], Path]) -> Path:
    """One that was used before: the first start of all is not what is tried here."""
    return used(state)


def in_time(action: Callable[[], Any], kind: type[BaseException], seconds: float = 20.0) -> Any:
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        action()
    assert time.monotonic() - begin < seconds
    return caught.value


def leave_the_signal_stack() -> None:
    """Let this thread's handlers run on its own stack."""

    class Stack(ctypes.Structure):
        _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    ss_disable = 2
    none = Stack(None, ss_disable, 0)
    assert ctypes.CDLL(None, use_errno=True).sigaltstack(ctypes.byref(none), None) == 0


# ---- wrong arguments ---------------------------------------------------------------------------


def test_what_is_no_image_is_refused_with_a_typed_error(
    platform: PlatformClient, images: Any, tmp_path: Path
) -> None:
    for image in (None, 7, 1.5, ["x"], object()):
        in_time(lambda image=image: Enclave(image), TypeError)  # type: ignore[misc]
    whole = images.signed
    garbage = random.Random(1).randbytes(4096)
    for data in (b"", b"x", garbage, whole[:100], whole[:-1], whole + b"\0", b"\x7fELF" + whole):
        in_time(lambda data=data: Enclave(data, quiet=True).start(), ImageError)  # type: ignore[misc]
    for path in (tmp_path, tmp_path / "missing", "/dev/null", "a\0b"):
        in_time(lambda path=path: Enclave(path).start(), (ImageError, ValueError))  # type: ignore[misc,arg-type]
    flips = random.Random(2)
    for _ in range(60):
        at = flips.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << flips.randrange(8)
        in_time(lambda data=bytes(flipped): Enclave(data).start(), ImageError)  # type: ignore[misc]


def test_impossible_options_are_refused_before_anything_starts(images: Any, state: Path) -> None:
    before = sorted(os.listdir(state))
    for options, kind in (
        ({"require": "seccomp"}, TypeError),
        ({"require": [1]}, TypeError),
        ({"require": 5}, TypeError),
        ({"queue": -1}, ValueError),
        ({"queue": "many"}, TypeError),
        ({"debug": "yes"}, TypeError),
        ({"state": 7}, TypeError),
        ({"unknown": 1}, TypeError),
    ):
        in_time(lambda options=options: Enclave(images.signed, **options), kind)  # type: ignore[misc]
    assert sorted(os.listdir(state)) == before
    enclave = Enclave(images.signed)
    for timeout in (0, -1, float("nan"), "soon"):
        in_time(lambda timeout=timeout: enclave.options(timeout=timeout), (ValueError, TypeError))  # type: ignore[misc,arg-type]


def test_wrong_calls_are_typed_errors_and_the_enclave_lives(
    platform: PlatformClient, images: Any
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        for name in ("nothing", "", "doubl", "__init__", "double\0", "é" * 10_000):
            in_time(lambda name=name: enclave.call(name, 1), UnknownFunctionError)  # type: ignore[misc]
        for name in (None, 7, b"double"):
            in_time(lambda name=name: enclave.call(name, 1), (TypeError, UnknownFunctionError))  # type: ignore[misc,arg-type]
        assert not hasattr(enclave, "nothing")
        for arguments in (
            (),
            (1, 2),
            ("1",),
            (1.5,),
            (None,),
            (True,),
            (1 << 64,),
            (-(1 << 63) - 1,),
            ([1],),
        ):
            in_time(
                lambda arguments=arguments: enclave.call("double", *arguments),  # type: ignore[misc]
                (ArgumentError, TypeError),
            )
        for value in ("text", 5, None, [1, 2], {1: 2}):
            in_time(lambda value=value: enclave.call("echo", value), (ArgumentError, TypeError))  # type: ignore[misc]
        for array in (
            np.zeros(3, np.float32),
            np.zeros(3, object),
            [1.0],
        ):
            in_time(lambda array=array: enclave.call("total", array), (ArgumentError, TypeError))  # type: ignore[misc]
        in_time(lambda: enclave.call("double", 1, y=2), (ArgumentError, TypeError))
        in_time(lambda: enclave.call("nap", float("nan")), EcallError)
        in_time(lambda: enclave.call("fail", "x"), EcallError)
        in_time(lambda: enclave.attest(nonce=bytes(1025)), ArgumentError)
        in_time(lambda: enclave.attest(nonce="text"), TypeError)  # type: ignore[arg-type]
        assert enclave.call("double", 21) == 42


def test_messages_beyond_the_limit_are_refused_in_both_directions(
    platform: PlatformClient, images: Any
) -> None:
    """The image says 2 MiB; nobody allocates more because the other side asked for it."""
    limit = 2 << 20
    with Enclave(images.signed, quiet=True) as enclave:
        for size in (limit + 1, 4 * limit):
            in_time(lambda size=size: enclave.call("echo", bytes(size)), ArgumentError)  # type: ignore[misc]
            in_time(lambda size=size: enclave.call("many", size), (ArgumentError, EcallError))  # type: ignore[misc]
            in_time(lambda size=size: enclave.call("total", np.zeros(size // 8 + 1)), ArgumentError)  # type: ignore[misc]
        for size in (0, 1, limit - 4096):
            assert enclave.call("echo", bytes(size)) == bytes(size)
            assert enclave.call("many", size) == bytes(size)
        assert enclave.call("double", 21) == 42


# ---- stopped and slow workers ------------------------------------------------------------------


def test_SVC_11_a_stopped_worker_meets_the_deadline_and_comes_back(
    platform: PlatformClient, images: Any, helpers: Any, stop: Callable[[int], None]
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        quick = enclave.options(timeout=0.3)
        pid = enclave.info.pid
        stop(pid)
        for _ in range(5):  # more than there are lanes: the last cannot even begin
            begin = time.monotonic()
            in_time(lambda: quick.call("double", 4), CallTimeoutError)
            assert time.monotonic() - begin >= 0.29
        in_time(lambda: quick.attest(b"n"), CallTimeoutError)
        os.kill(pid, signal.SIGCONT)

        def answers() -> bool:
            try:
                return bool(quick.call("double", 4) == 8)
            except CallTimeoutError:
                return False

        helpers.until(answers, 5, "late lanes come back")
        for number in range(100):
            assert enclave.call("double", number) == 2 * number, "a late answer was taken for this"
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20, "closing waits for a stopped worker"


def test_a_deadline_does_not_disturb_the_calls_after_it(
    platform: PlatformClient, images: Any
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        quick = enclave.options(timeout=0.05)
        for round_ in range(5):
            in_time(lambda: quick.call("nap", 0.8), CallTimeoutError)
            assert enclave.call("double", round_) == 2 * round_


def test_a_full_queue_is_busy_and_not_a_wait(
    platform: PlatformClient, images: Any, helpers: Any, stop: Callable[[int], None]
) -> None:
    with Enclave(images.signed, quiet=True, queue=2) as enclave:
        outcomes: list[object] = []

        def call() -> None:
            try:
                outcomes.append(enclave.call("double", 4))
            except EnclaveError as error:
                outcomes.append(type(error))

        stop(enclave.info.pid)  # no call ends meanwhile
        threads = [threading.Thread(target=call) for _ in range(12)]
        for thread in threads:
            thread.start()
        helpers.until(lambda: len(outcomes) >= 6, 5, "those that find no place")
        assert outcomes == [BusyError] * 6
        os.kill(enclave.info.pid, signal.SIGCONT)
        for thread in threads:
            thread.join(30)
        assert outcomes[6:] == [8] * (4 + 2)


def test_a_worker_that_ends_itself_is_lost_with_its_call_started(
    platform: PlatformClient, images: Any
) -> None:
    for _ in range(5):
        with Enclave(images.signed, quiet=True) as enclave:
            error = in_time(lambda: enclave.call("vanish"), EnclaveLostError)
            assert error.started
            later = in_time(lambda: enclave.call("double", 1), EnclaveLostError)
            assert not later.started


# ---- threads and forks -------------------------------------------------------------------------


def test_many_threads_and_many_enclaves_get_their_own_answers(
    platform: PlatformClient, images: Any
) -> None:
    enclaves = [Enclave(images.signed, quiet=True).start() for _ in range(8)]
    wrong: list[object] = []

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                enclave = rng.choice(enclaves)
                kind = rng.randrange(4)
                if kind == 0:
                    number = rng.randrange(-(1 << 60), 1 << 60)
                    good = enclave.call("double", number) == 2 * number
                elif kind == 1:
                    data = rng.randbytes(rng.choice((0, 1, 5000, 131072, 131073, 400_000)))
                    good = enclave.call("echo", data) == data
                elif kind == 2:
                    values = np.arange(rng.randrange(1000), dtype=np.float64)
                    good = enclave.call("total", values) == float(values.sum())
                else:
                    try:
                        enclave.call("fail", "x")
                        good = False
                    except EcallError:
                        good = True
                if not good:
                    wrong.append((seed, kind))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert len(platform.list()) == 8
    for enclave in enclaves:
        enclave.close()
    assert platform.list() == ()


def test_closing_ends_running_calls_at_once(platform: PlatformClient, images: Any) -> None:
    for _ in range(10):
        enclave = Enclave(images.signed, quiet=True).start()
        ends: list[BaseException] = []

        def call(enclave: Enclave = enclave, ends: list[BaseException] = ends) -> None:
            try:
                enclave.call("nap", 30.0)
            except BaseException as error:
                ends.append(error)

        threads = [threading.Thread(target=call) for _ in range(6)]  # two of them queue
        for thread in threads:
            thread.start()
        begin = time.monotonic()
        enclave.close()
        for thread in threads:
            thread.join(25)
            assert not thread.is_alive()
        assert time.monotonic() - begin < 20  # the calls would take 30 s
        assert len(ends) == 6
        assert all(isinstance(end, EnclaveClosedError) for end in ends), ends
        enclave.close()


def test_a_forked_child_may_neither_use_nor_end_the_enclave(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        double = enclave.double
        assert double(1) == 2

        def child(say: Callable[[Any], None]) -> None:
            kinds = []
            for action in (
                lambda: enclave.call("double", 1),
                lambda: double(1),
                lambda: enclave.attest(b""),
                enclave.start,
                lambda: enclave.info,
                lambda: enclave.options(timeout=1).call("double", 1),
            ):
                try:
                    action()
                    kinds.append("worked")
                except EnclaveStateError as error:
                    kinds.append(type(error).__name__)
            enclave.close()
            with Enclave(images.signed, quiet=True) as own:
                kinds.append(str(own.call("double", 4)))
            say(kinds)

        one = host(child)
        assert one.heard(10) == ["EnclaveStateError"] * 6 + ["8"]
        assert one.wait(5) == 0
        assert enclave.call("double", 21) == 42
        assert len(platform.list()) == 1


# ---- signals -----------------------------------------------------------------------------------


def test_BND_14_a_storm_of_signals_in_the_host_disturbs_no_call(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    """30,000 calls under two timers and a sender of everything that can be handled."""

    def stormy(say: Callable[[Any], None]) -> None:
        hits = [0]

        def handler(*_: object) -> None:
            hits[0] += 1

        # pytest's faulthandler brings a stack on which some processors have room for no more than
        # four handlers; any process of Python dies of the next.
        leave_the_signal_stack()
        numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE)
        for number in (*numbers, signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, handler)
        with Enclave(images.signed, quiet=True) as enclave:
            parent = os.getpid()
            sender = os.fork()
            if sender == 0:
                while os.getppid() == parent:
                    for number in numbers:
                        os.kill(parent, number)
                    time.sleep(0.0005)
                os._exit(0)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
            for number in range(30_000):
                if enclave.call("double", number) != 2 * number:
                    raise AssertionError(number)
            for size in (0, 1000, 131_072, 1_000_000):
                data = os.urandom(size)
                if enclave.call("echo", data) != data:
                    raise AssertionError(size)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.kill(sender, signal.SIGKILL)
            os.waitpid(sender, 0)
        say(hits[0])

    one = host(stormy)
    assert one.heard(100) > 100
    assert one.wait(5) == 0


def test_BND_14_a_handler_that_raises_ends_the_wait_and_not_the_enclave(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    def interrupted(say: Callable[[Any], None]) -> None:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with Enclave(images.signed, quiet=True) as enclave:
            for _ in range(10):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.01)
                    enclave.call("nap", 0.1)
                    say("not interrupted")
                except KeyboardInterrupt:
                    pass
                if enclave.call("double", 4) != 8:
                    say("the late answer was taken")
        say("done")

    one = host(interrupted)
    assert one.heard(20) == "done"


def test_BND_14_signals_to_the_worker_change_no_answer(
    platform: PlatformClient, images: Any
) -> None:
    """Whoever may signal the worker may end it; but an answer is right or the enclave is lost."""
    numbers = [signal.SIGUSR1, signal.SIGPROF, signal.SIGALRM, signal.SIGSEGV, signal.SIGINT]
    numbers += [signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD]
    for number in numbers:
        with Enclave(images.signed, quiet=True) as enclave:
            try:
                for value in range(400):
                    if value % 20 == 0:
                        os.kill(enclave.info.pid, number)
                    assert enclave.call("double", value) == 2 * value
            except EnclaveLostError:
                pass
            except ProcessLookupError:
                in_time(lambda: enclave.call("double", 1), EnclaveLostError)


# ---- any order of use --------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """An enclave's handle against what it should be: new, running, lost or closed."""

    image: bytes

    def __init__(self) -> None:
        super().__init__()
        self.enclave = Enclave(self.image, quiet=True)
        self.state = "new"
        self.was_lost = False  # the first reason stands, even after close()

    def expect(self, action: Callable[[], Any], *states: str) -> Any:
        """*action* works in these states and is a typed state error in all others."""
        if self.state in states:
            return action()
        error = in_time(action, EnclaveStateError)
        assert self.was_lost or not isinstance(error, EnclaveLostError)
        return None

    @rule()
    def start(self) -> None:
        self.expect(self.enclave.start, "new")
        if self.state == "new":
            self.state = "running"

    @rule(number=st.integers(-(1 << 62), 1 << 62))
    def call(self, number: int) -> None:
        assert self.expect(lambda: self.enclave.call("double", number), "running") in (
            None,
            2 * number,
        )

    @rule(data=st.binary(max_size=300))
    def ping(self, data: bytes) -> None:
        assert self.expect(lambda: self.enclave.ping(data), "running") in (None, data)

    @rule()
    def attest(self) -> None:
        self.expect(lambda: self.enclave.attest(b"nonce"), "running")

    @rule()
    def timed(self) -> None:
        self.expect(lambda: self.enclave.options(timeout=5).call("double", 1), "running")

    @rule()
    def fail(self) -> None:
        def failing() -> None:
            with pytest.raises(EcallError):
                self.enclave.call("fail", "x")

        if self.state == "running":
            failing()

    @precondition(lambda self: self.state == "running")
    @rule()
    def kill(self) -> None:
        os.kill(self.enclave.info.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                self.enclave.call("double", 1)
            except EnclaveLostError:
                break
        self.state = "lost"
        self.was_lost = True

    @rule()
    def close(self) -> None:
        self.enclave.close()
        self.state = "closed"

    @rule()
    def enter(self) -> None:
        if self.state != "lost":
            self.expect(self.enclave.__enter__, "new", "running")
            if self.state == "new":
                self.state = "running"

    @rule()
    def look(self) -> None:
        assert repr(self.enclave).startswith("<Enclave")
        assert self.enclave.closed == (self.state == "closed")
        dir(self.enclave)

    def teardown(self) -> None:
        self.enclave.close()


def test_BND_15_any_order_of_use_works_or_is_a_state_error(
    platform: PlatformClient, images: Any
) -> None:
    class Machine(AnyOrder):
        image = images.signed

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=15,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert platform.list() == ()


def test_BND_15_any_order_from_many_threads_is_a_state_error_at_worst(
    platform: PlatformClient, images: Any
) -> None:
    wrong: list[object] = []

    def use(enclave: Enclave, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            step = rng.choice(("start", "call", "call", "call", "echo", "info", "kill", "close"))
            try:
                if step == "start":
                    enclave.start()
                elif step == "call":
                    wrong.extend([] if enclave.call("double", seed) == 2 * seed else [seed])
                elif step == "echo":
                    data = bytes(200_000)
                    wrong.extend([] if enclave.call("echo", data) == data else [seed])
                elif step == "info":
                    _ = enclave.info
                elif step == "kill" and rng.random() < 0.2:
                    os.kill(enclave.info.pid, signal.SIGKILL)
                elif step == "close" and rng.random() < 0.2:
                    enclave.close()
            except (EnclaveStateError, ProcessLookupError):
                pass
            except BaseException as error:
                wrong.append(error)

    for round_ in range(25):
        enclave = Enclave(images.signed, quiet=True)
        threads = [threading.Thread(target=use, args=(enclave, 10 * round_ + n)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"round {round_} hangs"
        enclave.close()
    assert wrong == []
    assert platform.list() == ()


# ---- leaks -------------------------------------------------------------------------------------


@pytest.mark.no_asan(reason="what is freed stays in its quarantine for a while")
def test_SVC_09_failing_calls_and_launches_leak_nothing(
    platform: PlatformClient, images: Any, helpers: Any
) -> None:
    """Thousands of failing calls, a hundred failing launches: descriptors, threads, memory."""
    import gc

    pid = platform.hello.pid

    def count(action: Callable[[], int]) -> int:
        try:
            return action()
        except PermissionError:  # an ordinary user may not look into the platform
            return 0

    def measured() -> tuple[int, ...]:
        gc.collect()
        return (
            helpers.fds(),
            helpers.threads(),
            count(lambda: helpers.fds(pid)),
            count(lambda: helpers.threads(pid)),
        )

    flipped = bytearray(images.signed)
    flipped[5000] ^= 1

    def failing_calls(enclave: Enclave, times: int) -> None:
        for number in range(times):
            with pytest.raises(EcallError):
                enclave.call("fail", "x")
            with pytest.raises(ArgumentError):
                enclave.call("double", "x")
            with pytest.raises(UnknownFunctionError):
                enclave.call("nothing")
            with pytest.raises(ArgumentError):
                enclave.call("double", 1 << 70)
            if number % 250 == 0:
                with pytest.raises(CallTimeoutError):
                    enclave.options(timeout=0.002).call("nap", 0.4)

    def failing_launches(times: int) -> None:
        for number in range(times):
            with pytest.raises(ImageError):
                Enclave(bytes(flipped)).start()
            with pytest.raises(EnclaveError):
                Enclave(images.signed, require=["unobtainium"]).start()
            if number % 5 == 0:
                lost = Enclave(images.signed, quiet=True).start()
                with pytest.raises(EnclaveLostError):
                    lost.call("vanish")
                lost.close()

    with Enclave(images.signed, quiet=True) as enclave:
        worker = enclave.info.pid
        failing_calls(enclave, 300)
        failing_launches(20)
        time.sleep(0.5)  # the platform makes threads for launches to come
        before = measured()
        memory = helpers.resident(), helpers.resident(pid), helpers.resident(worker)
        failing_calls(enclave, 1000)
        failing_launches(40)
        # What the platform makes ahead (spares, threads) comes and goes, a few at a time; what a
        # launch left behind would be there forty times, what a call did a thousand times.
        allowed = (before[0], before[1], before[2] + 16, before[3] + 16)
        helpers.until(
            lambda: all(n <= b for n, b in zip(measured(), allowed, strict=True)),
            5,
            f"descriptors and threads within {allowed}: before {before}, now {measured()}",
        )
        grown = [
            now - then
            for now, then in zip(
                (helpers.resident(), helpers.resident(pid), helpers.resident(worker)),
                memory,
                strict=True,
            )
        ]
        assert max(grown) < 12 << 20, f"host, platform, worker grew by {grown} bytes"
