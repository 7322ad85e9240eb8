"""
Host, platform, zygote and worker, each killed at fifty random moments under load.

The others end or recover, nothing is left behind, and sealed data opens afterwards. The seed of
the moments is printed when a test fails; ``PYENCLAVE_FAULT_SEED`` sets it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyenclave._platform.ahead import MOST
from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveError, EnclaveLostError, LaunchError
from pyenclave.host import Enclave

# The gate has fewer; .ci/long has fifty of each.
MOMENTS = int(os.environ.get("PYENCLAVE_KILLS", "8"))
LANES = 2  # hosts with a platform each, so that both cores work
PAYLOAD = bytes(range(256)) * 1024  # longer than a slot of the ring


@pytest.fixture
def state(state: Path, used: Callable[[Path], Path]) -> Iterator[Path]:
    """One that was used before: the first start of all is not what is tried here."""
    yield used(state)
    # Left by who was killed while it tried whether it may write; a start a minute later removes it.
    for left in state.glob(".try-*"):
        left.unlink()


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("PYENCLAVE_FAULT_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"PYENCLAVE_FAULT_SEED={seed}")
    return random.Random(seed)


class Load:
    """Threads that call an enclave until it is gone, and check every answer."""

    def __init__(self, enclave: Enclave, threads: int = 3) -> None:
        self.enclave = enclave
        self.calls = 0
        self.ends: list[BaseException] = []
        self.threads = [threading.Thread(target=self._call) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def _call(self) -> None:
        try:
            while True:
                for number in range(20):
                    assert self.enclave.call("double", number) == 2 * number
                    self.calls += 1
                assert self.enclave.call("echo", PAYLOAD) == PAYLOAD
        except BaseException as error:
            self.ends.append(error)

    def check_lost(self, seconds: float = 20.0) -> None:
        """All threads end with EnclaveLostError in time, and so does any later call."""
        deadline = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"a call hangs {seconds:g} s after the kill"
        for end in self.ends:
            assert isinstance(end, EnclaveLostError), repr(end)
        with pytest.raises(EnclaveLostError):
            self.enclave.call("double", 1)


def seal(image: bytes) -> bytes:
    with Enclave(image, quiet=True) as enclave:
        return bytes(enclave.call("keep", b"worth keeping"))


def check_opens(image: bytes, blob: bytes) -> None:
    with Enclave(image, quiet=True) as enclave:
        assert enclave.call("recall", blob) == b"worth keeping"


@contextlib.contextmanager
def steady(helpers: Any, pid: int | None = None) -> Iterator[None]:
    """Descriptors and threads of this process, and descriptors of *pid*, are as before."""

    def counts() -> tuple[int, int, int]:
        theirs = 0
        if pid is not None:
            with contextlib.suppress(PermissionError):  # an ordinary user may not look
                theirs = helpers.fds(pid)
        gc.collect()  # what failed is held by tracebacks, and a mapped ring holds a descriptor
        return helpers.fds(), helpers.threads(), theirs

    before = counts()
    yield
    deadline = time.monotonic() + 20
    while any(now > then for now, then in zip(counts(), before, strict=True)):
        if time.monotonic() >= deadline:
            open_now = helpers.links(), helpers.links(pid) if pid is not None else ()
            pytest.fail(f"descriptors, threads: {before}, then {counts()}: {open_now}")
        time.sleep(0.02)


# ---- the worker --------------------------------------------------------------------------------


def test_SVC_11_a_worker_killed_at_any_moment_is_a_typed_error(
    platform: PlatformClient, images: Any, helpers: Any, rng: random.Random
) -> None:
    blob = seal(images.signed)

    def once() -> None:  # a handle keeps its ring mapped, so none may stay in a variable
        with Enclave(images.signed, quiet=True) as enclave:
            load = Load(enclave)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(enclave.info.pid, signal.SIGKILL)
            load.check_lost()

    with steady(helpers, platform.hello.pid):
        for _ in range(MOMENTS):
            once()
        assert platform.list() == ()
    check_opens(images.signed, blob)


def test_a_spare_worker_killed_while_it_waits_is_replaced(
    platform: PlatformClient, images: Any, helpers: Any, rng: random.Random
) -> None:
    """The zygote keeps a process ready; nobody notices if that one died, whenever it did."""
    with Enclave(images.signed, quiet=True):
        (zygote,) = helpers.zygotes(platform.hello.pid)
        for number in range(20):
            time.sleep(rng.uniform(0, 0.03))
            spares = helpers.descendants(zygote)
            for process in spares:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            if number % 2:
                dead = {process.pid for process in spares}
                helpers.until(
                    lambda dead=dead: not dead & {p.pid for p in helpers.descendants(zygote)},
                    2,
                    "the spare ends",
                )
            with Enclave(images.signed, quiet=True) as other:
                assert other.call("double", 4) == 8
        assert helpers.zygotes(platform.hello.pid) == [zygote]


def test_a_zygote_killed_at_rest_leaves_its_platform_nothing_to_hold(
    platform: PlatformClient, images: Any, helpers: Any
) -> None:
    """No launch is needed for that; only the image stays, which is the connection's."""
    pid = platform.hello.pid
    try:
        before = helpers.fds(pid), helpers.threads(pid)
    except PermissionError:
        pytest.skip("an ordinary user may not look")
    # Launches at a time make the zygote keep several spares.
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Enclave(images.signed, quiet=True))
        zygotes = helpers.zygotes(pid)
        for zygote in zygotes:
            os.kill(zygote, signal.SIGKILL)
    assert len(zygotes) == 1

    def now() -> bool:
        # Threads for enclaves to come are the platform's own, and stay.
        threads = before[1] + MOST + 1
        return helpers.fds(pid) <= before[0] + 1 and helpers.threads(pid) <= threads

    helpers.until(now, 5, "all of the zygote is given back")


def test_hosts_that_come_and_go_do_not_end_a_launch_of_another(
    platform: PlatformClient, images: Any, state: Path
) -> None:
    """The main thread looks at its hosts while one launches and others leave."""
    stop = threading.Event()
    wrong: list[BaseException] = []

    def come_and_go() -> None:
        try:
            while not stop.is_set():
                PlatformClient.connect(state).close()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            Enclave(images.signed, quiet=True).start().close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert wrong == []
    assert platform.list() == ()


# ---- the host ----------------------------------------------------------------------------------


def test_PRC_12_a_host_killed_at_any_moment_takes_its_workers_along(
    platform: PlatformClient,
    images: Any,
    host: Callable[..., Any],
    helpers: Any,
    rng: random.Random,
) -> None:
    blob = seal(images.signed)

    def serve(say: Callable[[Any], None]) -> None:
        with Enclave(images.signed, quiet=True) as enclave:
            say(enclave.info.pid)
            Load(enclave).threads[0].join()

    with steady(helpers, platform.hello.pid):
        for moment in range(MOMENTS):
            one = host(serve)
            if moment % 5:
                pidfd = os.pidfd_open(one.heard(10))
                time.sleep(rng.uniform(0, 0.02))
                one.kill()
                assert select.select([pidfd], [], [], 20)[0], "the worker outlives its host"
                os.close(pidfd)
            else:  # while it launches
                time.sleep(rng.uniform(0, 0.02))
                one.kill()
            helpers.until(lambda: platform.list() == (), 2, "the platform forgets the host")
            one.close()
    check_opens(images.signed, blob)


def test_PRC_12_with_its_only_host_killed_nothing_stays(
    state: Path, images: Any, host: Callable[..., Any], family: Any, rng: random.Random
) -> None:
    """Platform, zygote and workers end, and the socket goes with them."""

    def serve(say: Callable[[Any], None]) -> None:
        with Enclave(images.signed, quiet=True) as enclave:
            say(enclave.call("keep", b"worth keeping").hex())
            Load(enclave).threads[0].join()

    one = host(serve)
    blob = bytes.fromhex(one.heard(20))
    time.sleep(rng.uniform(0, 0.05))
    one.kill()
    family.check_gone(2.0)
    assert not list(state.glob("*.sock"))
    check_opens(images.signed, blob)


# ---- zygote and platform -----------------------------------------------------------------------


def in_lanes(
    host: Callable[..., Any], rng: random.Random, state: Path, lane: Callable[..., None]
) -> None:
    """Run ``lane(say, rng, count)`` in hosts with state directories of their own, the first new."""
    hosts = []
    for number in range(LANES):
        seed = rng.getrandbits(32)
        if number:
            shutil.copytree(state, state.with_name(f"lane{number}"))

        def run(say: Callable[[Any], None], number: int = number, seed: int = seed) -> None:
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # whoever is orphaned here shows here
            os.environ["PYENCLAVE_STATE"] = str(state.with_name(f"lane{number}"))
            lane(say, random.Random(seed), MOMENTS // LANES)
            say("done")

        hosts.append(host(run))
    for one in hosts:
        while (heard := one.heard(30)) != "done":
            assert heard is not None, "see the output of the host"
        assert one.wait(10) == 0


def launch_and_kill(
    image: bytes, find: Callable[[], int | None], delay: float, *, loaded: bool
) -> None:
    """
    Kill the process that *find* names, under load or while a launch is under way.

    A launch that was under way gives a typed error; one that came through, a lost enclave.
    """
    launched: list[Any] = []

    def launch() -> None:
        try:
            launched.append(Enclave(image, quiet=True).start())
        except EnclaveError as error:
            launched.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    if loaded:
        thread.join(60)
        assert isinstance(launched[0], Enclave), launched
        load = Load(launched[0])
    deadline = time.monotonic() + 60
    while (pid := find()) is None and thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    pid = pid or find()
    assert pid is not None, launched
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive(), "the launch hangs"
    if loaded:
        load.check_lost()
    if isinstance(launched[0], Enclave):
        launched[0].close()
    else:
        assert isinstance(launched[0], LaunchError | EnclaveLostError), repr(launched[0])


@pytest.mark.slow
def test_a_zygote_killed_at_any_moment_is_replaced(
    state: Path,
    images: Any,
    host: Callable[..., Any],
    helpers: Any,
    rng: random.Random,
) -> None:
    def lane(say: Callable[[Any], None], rng: random.Random, count: int) -> None:
        with PlatformClient.connect() as platform:
            blob = seal(images.signed)

            def find() -> int | None:
                return next(iter(helpers.zygotes(platform.hello.pid)), None)

            def gone() -> bool:
                # A launch whose zygote died between being found and forking takes a new one and
                # comes through: that one must end when it is killed, too.
                if (other := find()) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
                return helpers.descendants(platform.hello.pid) == []

            with steady(helpers, platform.hello.pid):
                for moment in range(count):
                    loaded = moment % 2 == 0
                    delay = rng.uniform(0, 0.05 if loaded else 0.6)
                    launch_and_kill(images.signed, find, delay, loaded=loaded)
                    helpers.until(gone, 2, "its workers end")
                    say(moment)
            check_opens(images.signed, blob)
        helpers.until(lambda: not helpers.descendants(os.getpid()), 3, "all end")

    in_lanes(host, rng, state, lane)


@pytest.mark.slow
def test_a_platform_killed_at_any_moment_is_replaced(
    state: Path,
    images: Any,
    host: Callable[..., Any],
    helpers: Any,
    rng: random.Random,
) -> None:
    def lane(say: Callable[[Any], None], rng: random.Random, count: int) -> None:
        folder = Path(os.environ["PYENCLAVE_STATE"])
        blob = seal(images.signed)
        helpers.until(lambda: not helpers.descendants(os.getpid()), 3, "the first platform ends")

        def find() -> int | None:
            # Direct children are the host's helpers; the platform has lost its maker.
            return next((p.pid for p in helpers.descendants(os.getpid())), None)

        with steady(helpers):
            for moment in range(count):
                loaded = moment % 2 == 0
                delay = rng.uniform(0, 0.05 if loaded else 0.8)
                launch_and_kill(images.signed, find, delay, loaded=loaded)
                helpers.until(lambda: not helpers.descendants(os.getpid()), 2, "all of it ends")
                say(moment)
        check_opens(images.signed, blob)
        helpers.until(lambda: not helpers.descendants(os.getpid()), 3, "the last platform ends")
        assert helpers.strange_files(folder, killed=True) == []

    in_lanes(host, rng, state, lane)
