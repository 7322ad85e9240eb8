"""Zygotes: who shares one, what becomes of those that are killed, and how they end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyenclave._platform import candidate as candidate_module
from pyenclave._platform import zygotes as zygotes_module
from pyenclave._platform.candidate import Candidate, NotBegunError, await_shut
from pyenclave._platform.held import HeldImages
from pyenclave._platform.launch import Launcher
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.spares import MAX_SPARES
from pyenclave._platform.state import State
from pyenclave._platform.zygotes import Zygote, Zygotes
from pyenclave.errors import BusyError, EnclaveError, LaunchError
from pyenclave.formats import messages
from pyenclave.formats.lock import Lock, Roots

Start = Callable[[], Candidate]


def own(roots: Roots | None = None) -> contextlib.closing[Zygotes]:
    """Zygotes of this test alone."""
    return contextlib.closing(Zygotes(roots or Roots.of_this_process()))


def test_threads_that_ask_for_one_lock_get_one_zygote(base) -> None:
    """It is started once."""
    with own() as zygotes:
        got: list[int] = []
        lock = base.to_bytes()
        threads = [
            threading.Thread(target=lambda: got.append(zygotes.get(lock, debug=True).pid))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 4
        assert len(set(got)) == 1


def test_zygotes_are_limited_and_the_idle_ones_make_room(
    launching, base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image may bring a lock of its own; they must not fill the machine with processes."""
    monkeypatch.setattr(zygotes_module, "MAX_ZYGOTES", 2)
    code = "@pyenclave.ecall\ndef answer() -> str:\n    return ''\n"
    fewer = launching.replace(base, modules=base.modules[:-1], preload=())
    locks = [base, launching.replace(base, preload=base.preload[:-1])]
    with own() as zygotes:
        first = zygotes.get(locks[0].to_bytes(), debug=True)
        with launching.Launched(zygotes, launching.make(locks[0], code)) as worker:
            worker.run()
            second = zygotes.get(locks[1].to_bytes(), debug=True)
            # The second has no worker and goes; the first has one and stays.
            third = zygotes.get(locks[0].to_bytes(), debug=False)
            assert (first.alive, second.alive, third.alive) == (True, False, True)
            with launching.Launched(zygotes, launching.make(locks[0], code), debug=False) as other:
                other.run()
                with pytest.raises(BusyError, match="too many runtimes"):
                    zygotes.get(locks[1].to_bytes(), debug=True)
        assert zygotes.get(locks[1].to_bytes(), debug=True).alive
        # One that cannot start leaves nothing behind.
        for _ in range(4):
            with pytest.raises(EnclaveError):
                zygotes.get(fewer.to_bytes(), debug=True)
        assert len(zygotes._running) <= 2


def test_a_zygote_that_was_killed_takes_its_workers_along_and_is_replaced(launching, base) -> None:
    """Within a second; the next request starts a new one."""
    with own() as zygotes:
        first = zygotes.get(base.to_bytes(), debug=True)
        worker = launching.Launched(zygotes, launching.make(base, ""))
        worker.run()
        os.kill(first.pid, signal.SIGKILL)
        assert launching.ended(worker.spawned.pidfd, 20)
        assert not first.alive
        with pytest.raises(LaunchError):
            first.spawn(image_fd=0, ring_fd=0, channel_fd=0, debug=True)
        worker.close()
        assert zygotes.get(base.to_bytes(), debug=True).pid != first.pid


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def wait_for(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_spare_that_was_killed_costs_nobody_a_launch(launching, base) -> None:
    """The zygote notices and forks another."""
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        assert wait_for(lambda: len(children(zygote.pid)) == 1)
        spare = os.pidfd_open(children(zygote.pid)[0])
        signal.pidfd_send_signal(spare, signal.SIGKILL)
        assert launching.ended(spare, 20)
        os.close(spare)
        with launching.Launched(zygotes, launching.make(base, "")) as worker:
            worker.run()


@contextlib.contextmanager
def stopped_spare(zygote: Zygote) -> Iterator[int]:
    """The pidfd of the spare, which is there, looks alive and does nothing."""
    assert wait_for(lambda: len(zygote._spares._waiting) == 1)
    spare = os.pidfd_open(zygote._spares._waiting[0].pid)
    try:
        signal.pidfd_send_signal(spare, signal.SIGSTOP)
        yield spare
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(spare, signal.SIGKILL)
        os.close(spare)


@contextlib.contextmanager
def starter(launching, base: Lock, zygotes: Zygotes, tmp_path: Path) -> Iterator[Start]:
    """A platform's launcher: what is called starts a worker, which gets no identity."""
    root = PlatformRoot(bytearray(range(32)), level="embedded", ephemeral=True)
    image_fd = launching.sealed_memfd("x", launching.make(base, ""))
    ring_fd = launching.ring.create(1)
    bell = os.eventfd(0)
    with State.open(str(tmp_path / "state")) as state:
        launcher = Launcher(root, zygotes, state)
        held = HeldImages()
        request = messages.Launch(debug=True, require=(), allow_ephemeral=False)
        wish = launcher.judge(request, image_fd, held=held)

        def start() -> Candidate:
            return launcher.warm(
                wish, image_fd, ring_fd, bell, wanted=lambda: True, slow=lambda: None
            )

        yield start
        launcher.close()
    root.close()
    for fd in (image_fd, ring_fd, bell):
        os.close(fd)


def test_a_spare_that_dies_when_it_was_chosen_costs_nobody_a_launch(
    launching, base, tmp_path
) -> None:
    """It was alive when it was taken and got all that it needs; another one starts instead."""
    with own() as zygotes, starter(launching, base, zygotes, tmp_path) as start:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        with stopped_spare(zygote) as spare:
            dead = zygote._spares._waiting[0].pid

            def kill_it() -> None:
                assert wait_for(lambda: dead not in [one.pid for one in zygote._spares._waiting])
                time.sleep(0.05)  # image, ring and channel are on their way
                signal.pidfd_send_signal(spare, signal.SIGKILL)

            thread = threading.Thread(target=kill_it)
            thread.start()
            candidate = start()
            thread.join()
            assert candidate.worker.pid != dead
            candidate.end()


def test_a_worker_that_dies_after_it_began_is_not_started_again(launching, base, tmp_path) -> None:
    """What an entry may have begun must not be done twice behind its host's back."""
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        data = launching.make(base, "import os\nos._exit(0)\n", functions=False)
        image_fd, ring_fd = launching.sealed_memfd("x", data), launching.ring.create(1)
        assert wait_for(lambda: zygote.has_spare)
        ours, theirs = launching.Channel.pair()
        with ours:
            with theirs:
                launching.give_output(ours)
                worker = zygote.spawn(
                    image_fd=image_fd, ring_fd=ring_fd, channel_fd=theirs.fileno(), debug=True
                )
            with pytest.raises(LaunchError, match="ended while it started") as caught:
                await_shut(ours, worker, lambda: True)
            assert not isinstance(caught.value, NotBegunError)
        for number in (image_fd, ring_fd, worker.pidfd):
            os.close(number)


def test_a_spare_that_does_not_begin_is_a_typed_error(
    launching, base, tmp_path, monkeypatch
) -> None:
    """And it is killed: what it was given reaches nobody later."""
    monkeypatch.setattr(candidate_module, "_BEGIN_TIMEOUT", 0.2)
    with own() as zygotes, starter(launching, base, zygotes, tmp_path) as start:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        with stopped_spare(zygote) as spare:
            with pytest.raises(LaunchError, match="did not begin"):
                start()
            assert launching.ended(spare, 20)


def test_whoever_is_roused_for_nothing_goes_back_to_sleep(launching, base) -> None:
    """A host that asks without end for what is refused keeps no processor busy."""
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        assert wait_for(lambda: zygote.has_spare)
        spare = zygote._spares._waiting[0]
        for _ in range(1000):
            zygotes.rouse()
        used = processor_time(spare.pid)
        time.sleep(0.3)
        assert processor_time(spare.pid) - used <= 0.1
        with launching.Launched(zygotes, launching.make(base, "")) as worker:
            assert worker.pid == spare.pid
            worker.run()


def test_a_worker_whose_end_cannot_be_watched_is_killed(launching, base, monkeypatch) -> None:
    """Out of descriptors, say: nobody would ever give back what belongs to it."""
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        assert wait_for(lambda: zygote.has_spare)
        before = len(os.listdir("/proc/self/fd"))
        spare = os.pidfd_open(zygote._spares._waiting[0].pid)

        def refuse(pidfd: int) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(zygote, "_watch_end", refuse)
        monkeypatch.setattr(zygote._spares, "_wanted", 0)
        data = launching.make(base, "while True: pass\n", functions=False)
        image_fd, ring_fd = launching.sealed_memfd("x", data), launching.ring.create(1)
        ours, theirs = launching.Channel.pair()
        with ours, theirs:
            launching.give_output(ours)
            fds = {"image_fd": image_fd, "ring_fd": ring_fd, "channel_fd": theirs.fileno()}
            with pytest.raises(LaunchError, match="cannot keep a worker"):
                zygote.spawn(**fds, debug=True)
        assert launching.ended(spare, 20)
        for number in (spare, image_fd, ring_fd):
            os.close(number)
        # The spare's pidfd and socket are closed too, and no other came.
        assert len(os.listdir("/proc/self/fd")) <= before


def test_a_zygotes_line_to_its_platform_keeps_clear_of_the_objects(launching, base) -> None:
    """Mapped objects get fixed numbers from 128 on; a busy platform hands over such numbers."""
    occupied = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(160)]
    try:
        assert max(occupied) >= 128
        with (
            own() as zygotes,
            launching.Launched(zygotes, launching.make(base, "")) as worker,
        ):
            worker.run()
    finally:
        for fd in occupied:
            os.close(fd)


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_zygote_that_ends_by_itself_gives_everything_back_at_once(launching, base) -> None:
    """Spares, image, sockets and thread go without another launch."""

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    image = launching.make(base, "")
    with own() as zygotes:
        before = counts()
        zygote = zygotes.get(base.to_bytes(), debug=True)
        zygote._spares._wanted = 3
        image_fd, ring_fd = launching.sealed_memfd("x", image), launching.ring.create(1)
        ours, theirs = launching.Channel.pair()
        with ours, theirs:
            fds = {"image_fd": image_fd, "ring_fd": ring_fd, "channel_fd": theirs.fileno()}
            digest = hashlib.sha256(image).digest()
            spawned = zygote.spawn(**fds, debug=True, image=digest)
            spawned.forget()
        assert wait_for(lambda: len(zygote._spares._waiting) >= 3)
        os.close(spawned.pidfd)
        os.close(image_fd)
        os.close(ring_fd)
        assert counts()[0] > before[0]
        os.kill(zygote.pid, signal.SIGKILL)
        given_back = wait_for(lambda: counts()[0] <= before[0] and counts()[1] <= before[1])
        assert given_back, (before, counts())
        assert not zygote.alive
        assert zygotes.get(base.to_bytes(), debug=True).pid != zygote.pid


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_zygote_that_ends_while_it_is_asked_is_a_typed_error(launching, base, end: str) -> None:
    """Whoever waits for its answer hears of it, and no descriptor is used after its end."""
    with own() as zygotes:
        before = len(os.listdir("/proc/self/fd"))
        zygote = zygotes.get(base.to_bytes(), debug=True)
        assert wait_for(lambda: len(zygote._spares._waiting) == 1)
        os.kill(zygote.pid, signal.SIGSTOP)
        zygote._spares._waiting[0].close()
        zygote._spares._waiting.clear()
        got: list[BaseException] = []

        def ask() -> None:
            try:
                zygote.spawn(image_fd=0, ring_fd=0, channel_fd=0, debug=True)
            except BaseException as error:
                got.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert wait_for(lambda: zygote._spawning == 3)
        if end == "kill":
            os.kill(zygote.pid, signal.SIGKILL)
        else:
            zygote.close()
        for thread in threads:
            thread.join(30)
        assert [type(error) for error in got] == [LaunchError] * 3, got
        assert wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_zygote_is_ready_while_it_has_a_spare_and_runs(base) -> None:
    """Whoever finds it not ready may wait for long, and has to see to it that its host is there."""
    lock = base.to_bytes()
    with own() as zygotes:
        assert not zygotes.ready(lock, debug=True)
        zygote = zygotes.get(lock, debug=True)
        assert not zygotes.ready(lock, debug=False)
        assert not zygotes.ready(lock + b" ", debug=True)
        assert wait_for(lambda: zygotes.ready(lock, debug=True))
        os.kill(zygote.pid, signal.SIGKILL)
        assert wait_for(lambda: not zygotes.ready(lock, debug=True))


def test_spares_are_replaced_after_a_launch_that_failed(base, monkeypatch) -> None:
    """The keeper sleeps until somebody says that one was taken."""

    def refuse(*rest: object) -> None:
        raise LaunchError("no more")

    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=True)
        assert wait_for(lambda: zygote.has_spare)
        taken = zygote._spares._waiting.popleft()
        monkeypatch.setattr(zygote, "_fork", refuse)  # the keeper goes on with the real one
        with pytest.raises(LaunchError, match="no more"):
            zygote.spawn(image_fd=0, ring_fd=1, channel_fd=2, debug=True)
        assert wait_for(lambda: zygote.has_spare)
        taken.close()


def test_no_process_descriptor_or_file_is_left_behind(launching, base) -> None:
    """After close() this process is as it was, and every child is gone."""

    def files() -> set[Path]:
        # Other processes use these folders too; libffi is who would leave something there.
        return {*Path("/dev/shm").glob("*ffi*"), *Path("/tmp").glob("*ffi*")}

    before = files()
    fds = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=False)
        worker = launching.Launched(zygotes, launching.make(base, ""), debug=False)
        worker.run()
        assert wait_for(lambda: len(children(zygote.pid)) >= 2)
        pids = [zygote.pid, *children(zygote.pid)]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        zygotes.close()
        for pidfd in pidfds:
            assert launching.ended(pidfd, 20)
            os.close(pidfd)
        worker.close()
        zygotes.close()
    assert wait_for(lambda: threading.active_count() <= threads)
    assert wait_for(lambda: len(os.listdir("/proc/self/fd")) <= fds)
    assert files() <= before


def test_a_zygote_reaps_its_workers(launching, base) -> None:
    """No zombies, and no descriptors that grow with the number of launches."""
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=False)
        data = launching.make(base, "")
        for _ in range(2 * MAX_SPARES):
            with launching.Launched(zygotes, data, debug=False) as worker:
                worker.first()
        time.sleep(0.1)
        assert wait_for(lambda: len(children(zygote.pid)) <= MAX_SPARES)
        assert not [pid for pid in children(zygote.pid) if state(pid) == "Z"]


def test_what_ended_workers_held_is_given_back_while_others_run(launching, base) -> None:
    """Without another launch; numbers of descriptors that are used again mean nobody else."""
    with own() as zygotes:
        zygote = zygotes.get(base.to_bytes(), debug=False)
        data = launching.make(base, "")
        with launching.Launched(zygotes, data, debug=False) as stays:
            stays.first()
            for _ in range(2):
                gone = [launching.Launched(zygotes, data, debug=False) for _ in range(3)]
                assert len(zygote._workers) == 4
                for worker in gone[1:]:
                    worker.close()
                assert wait_for(lambda: len(zygote._workers) == 2)
                assert not launching.ended(gone[0].spawned.pidfd, 0)
                gone[0].close()
                assert wait_for(lambda: len(zygote._workers) == 1)
            assert not zygote.idle()
        assert wait_for(zygote.idle)


PLATFORM = """
import importlib.util, os, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
spec = importlib.util.spec_from_file_location("launching", {helper!r})
launching = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launching)
from pyenclave._platform import zygotes as zygotes_module
from pyenclave._platform.zygotes import Zygotes
from pyenclave.formats.lock import Lock, Roots
lock = Lock.from_bytes(Path({lock!r}).read_bytes())
zygotes = Zygotes(Roots.of_this_process())
workers = [launching.Launched(zygotes, launching.make(lock, ""), debug=d) for d in (True, False)]
for worker in workers:
    worker.run()
found = [zygotes.get(lock.to_bytes(), debug=d) for d in (True, False)]
print(*[w.pid for w in workers], *[z.pid for z in found], flush=True)
time.sleep(60)
"""


def test_everything_ends_with_the_platform(launching, base, tmp_path) -> None:
    """Killed without a chance to clean up: zygotes and workers are gone soon."""
    (tmp_path / "lock").write_bytes(base.to_bytes())
    code = PLATFORM.format(
        path=sys.path, helper=launching.__spec__.origin, lock=str(tmp_path / "lock")
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as platform:
        assert platform.stdout is not None
        pids = [int(word) for word in platform.stdout.readline().split()]
        assert len(pids) == 4
        pidfds = [os.pidfd_open(pid) for pid in pids]
        platform.kill()
        for pidfd in pidfds:
            assert launching.ended(pidfd, 20)
            os.close(pidfd)


def test_close_does_not_wait_for_a_zygote_that_is_starting(base) -> None:
    """Who waits for it gets an error; the process is gone."""
    zygotes = Zygotes(Roots.of_this_process())
    errors: list[BaseException] = []

    def get() -> None:
        try:
            zygotes.get(base.to_bytes(), debug=False)
        except LaunchError as error:
            errors.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    assert wait_for(lambda: zygotes._starting is not None)
    process = zygotes._starting
    zygotes.close()
    thread.join()
    assert len(errors) == 1
    assert process.returncode is not None


def test_nothing_starts_after_close(base) -> None:
    """And close() may be called twice."""
    with own() as zygotes:
        zygotes.close()
        zygotes.close()
        with pytest.raises(LaunchError, match="closing"):
            zygotes.get(base.to_bytes(), debug=False)
