"""Spares: how they are kept, and that nothing of them is kept after their end."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pyenclave._platform import spares as spares_module
from pyenclave._platform.spares import Spare, Spares
from pyenclave.errors import LaunchError


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class World:
    """A zygote that is a sleeping process, and spares that are, too."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.zygote, self.zygote_fd = self.process()
        self.ends: list[threading.Thread] = []
        self.forked: list[Spare] = []
        self.prepared: list[bytes] = []
        self.fail = False
        self.short_lived = False
        self.spares = Spares(self.fork, zygote=self.zygote_fd, ended=self.ended, name="spares")

    def process(self) -> tuple[subprocess.Popen[bytes], int]:
        process = subprocess.Popen(["sleep", "60"])
        self.processes.append(process)
        return process, os.pidfd_open(process.pid)

    def fork(self, fd: int | None, image: bytes) -> Spare:
        self.prepared.append(image)
        if self.fail:
            raise LaunchError("no process")
        process, pidfd = self.process()
        if self.short_lived:
            process.kill()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        spare = Spare(pid=process.pid, pidfd=pidfd, namespaces=(), sock=ours, image=image)
        self.forked.append(spare)
        return spare

    def ended(self) -> None:
        self.ends.append(threading.current_thread())
        self.spares.close()

    def waiting(self) -> list[Spare]:
        return list(self.spares._waiting)

    def close(self) -> None:
        self.spares.close()
        for process in self.processes:
            process.kill()
            process.wait()
        os.close(self.zygote_fd)


@pytest.fixture
def world() -> Iterator[World]:
    before = open_fds()
    made = World()
    yield made
    made.close()
    assert until(lambda: open_fds() <= before)


@pytest.fixture
def image() -> Iterator[int]:
    fd = os.memfd_create("image")
    yield fd
    os.close(fd)


def test_after_its_end_nothing_is_taken_and_nothing_kept(world: World, image: int) -> None:
    """A launch that comes too late must not leave its image in a zygote that is gone."""
    world.spares.start()
    assert until(world.waiting)
    world.spares.close()
    before = open_fds()
    assert world.spares.take(image, b"digest") is None
    assert open_fds() <= before


def test_the_end_of_the_zygote_is_told_once_and_nothing_is_kept(world: World, image: int) -> None:
    before = open_fds()
    world.spares.start()
    spare = world.spares.take(image, b"digest")
    world.spares.used()
    assert until(world.waiting)
    assert open_fds() > before
    world.zygote.kill()
    assert until(lambda: world.ends)
    taken = 0 if spare is None else 2
    assert until(lambda: open_fds() <= before + taken)
    if spare is not None:
        spare.close()
    world.spares.close()
    assert len(world.ends) == 1


def test_a_spare_that_ended_is_replaced_without_a_launch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares_module, "_RETRY", 0.05)
    world.spares.start()
    assert until(world.waiting)
    first = world.waiting()[0]
    world.processes[1].kill()
    assert until(lambda: world.waiting() and world.waiting()[0] is not first)
    assert first.sock.fileno() == -1


def test_spares_that_end_at_once_are_not_forked_without_pause(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares_module, "_RETRY", 60.0)
    world.short_lived = True
    world.spares.start()
    assert until(lambda: world.forked)
    time.sleep(0.4)
    assert len(world.forked) == 1


def test_a_fork_that_fails_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares_module, "_RETRY", 0.05)
    world.fail = True
    world.spares.start()
    assert until(lambda: len(world.prepared) > 1)
    world.fail = False
    assert until(world.waiting)


def test_a_spare_that_is_gone_begins_nothing(world: World, image: int) -> None:
    spare = world.fork(None, b"")
    spare.rouse()
    assert spare.begin([image] * 3, image=b"digest") is False
    assert not spare.began()
    spare.close()


def test_without_descriptors_or_threads_the_error_is_typed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(LaunchError, match="cannot keep a zygote"):
        world.spares.start()
