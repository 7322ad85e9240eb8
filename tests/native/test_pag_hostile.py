"""
PAG-10 and PAG-11: the file of a heap is somebody else's.

Another process changes, cuts, extends, replays and exchanges what a heap keeps in its file, while
the heap works. Whoever reads the heap gets the right data, or zeros and SealingError from then on:
never anything else.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyenclave._core import Pages
from pyenclave.errors import SealingError

PAGE = 4096
PAGES = 384
RESIDENT = 64
KINDS: dict[str, dict[str, Any]] = {"flat": {}, "tree": {"tree_above": 0, "tree_cache": 1}}
# Where the nodes end: a header, the pages, four nodes and the topmost of them.
END = PAGE * (1 + PAGES + 4)


def work(path: str, kind: str, seed: int, seconds: float, most: int = 0) -> str:
    """
    Write and read pages at random, and say how it went: right, refused, or what was wrong.

    Until the file `path`.end is there, or `seconds` are over. The file of the heap cannot grow
    beyond `most` bytes, unless that is 0.
    """
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    heap = Pages(PAGES * PAGE, RESIDENT * PAGE, fd=fd, **KINDS[kind])
    os.close(fd)
    if most:  # EFBIG stands for ENOSPC
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    words = np.frombuffer(heap, np.uint64).reshape(PAGES, -1)
    model = np.zeros(PAGES, np.uint64)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end and not os.path.exists(f"{path}.end"):
        page = rng.randrange(PAGES)
        try:
            if rng.random() < 0.4:
                count += 1
                words[page] = count
                model[page] = count
            elif rng.random() < 0.02:
                heap.discard(page * PAGE, PAGE)
                model[page] = 0
            found = np.unique(words[page])
        except SealingError:
            return "refused" if heap.poisoned else "refused, and not poisoned"
        if heap.poisoned:
            # A page that was copied while the heap ended may be right in part.
            return "refused" if set(found.tolist()) <= {0, int(model[page])} else f"got {found}"
        if found.tolist() != [int(model[page])]:
            return f"got {found} for {model[page]}"
    return "right"


def flip(fd: int, rng: random.Random, _kept: dict[int, bytes]) -> None:
    at = rng.randrange(PAGE, END)
    byte = os.pread(fd, 1, at)
    if byte:
        os.pwrite(fd, bytes([byte[0] ^ 1 << rng.randrange(8)]), at)


def replay(fd: int, rng: random.Random, kept: dict[int, bytes]) -> None:
    """Keep what lies there now, or put back what was kept."""
    for at in rng.sample(range(PAGE, END, PAGE), 50):
        if at in kept:
            os.pwrite(fd, kept.pop(at), at)
        else:
            kept[at] = os.pread(fd, PAGE, at)


def exchange(fd: int, rng: random.Random, _kept: dict[int, bytes]) -> None:
    one, other = rng.sample(range(PAGE, END, PAGE), 2)
    a, b = os.pread(fd, PAGE, one), os.pread(fd, PAGE, other)
    os.pwrite(fd, b, one)
    os.pwrite(fd, a, other)


def cut(fd: int, rng: random.Random, _kept: dict[int, bytes]) -> None:
    os.ftruncate(fd, rng.randrange(END))


def zero(fd: int, rng: random.Random, _kept: dict[int, bytes]) -> None:
    os.pwrite(fd, bytes(PAGE), rng.randrange(PAGE, END, PAGE))


def extend(fd: int, rng: random.Random, _kept: dict[int, bytes]) -> None:
    os.pwrite(fd, os.urandom(PAGE), END + rng.randrange(100) * PAGE)


def nothing(_fd: int, _rng: random.Random, _kept: dict[int, bytes]) -> None:
    time.sleep(0.001)


ATTACKS = {
    attack.__name__: attack for attack in (flip, replay, exchange, cut, zero, extend, nothing)
}
# What harms no heap.
HARMLESS = {"extend", "nothing"}
LONG = 60.0  # seconds: nothing ends by them


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "heap"
    path.touch(0o600)
    return str(path)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize(
    "rounds", [1, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_PAG_10_a_hostile_file_gives_right_data_or_an_error(
    file: str, kind: str, attack: str, rounds: int, start_child: Callable[..., Any]
) -> None:
    """Attacks that harm go on until the heap has noticed one; the others for a moment."""
    end = Path(f"{file}.end")
    for turn in range(rounds):
        os.truncate(file, 0)
        end.unlink(missing_ok=True)
        victim = start_child(work, file, kind, turn, LONG)
        rng, kept = random.Random(turn), dict[int, bytes]()
        fd = os.open(file, os.O_RDWR)
        # First it shall have something to lose.
        while os.fstat(fd).st_size < END // 2:
            assert not has_ended(victim.pid), victim.wait()
            time.sleep(0.005)
        until = time.monotonic() + 0.3
        while not has_ended(victim.pid) and (attack not in HARMLESS or time.monotonic() < until):
            ATTACKS[attack](fd, rng, kept)
        os.close(fd)
        end.touch()
        assert victim.wait().result() == ("right" if attack in HARMLESS else "refused")


@pytest.mark.parametrize("kind", list(KINDS))
def test_PAG_10_a_file_that_cannot_grow_ends_the_heap(
    file: str, kind: str, in_child: Callable[..., Any]
) -> None:
    assert in_child(work, file, kind, 1, LONG, END // 2).result() == "refused"
    assert os.stat(file).st_size <= END // 2


@pytest.mark.parametrize("kind", list(KINDS))
def test_PAG_11_what_a_killed_process_left_is_never_accepted(
    file: str, kind: str, start_child: Callable[..., Any]
) -> None:
    """Killed between pages and their versions, too: the next heap begins with zeros."""
    for turn in range(3):
        os.truncate(file, 0)
        victim = start_child(work, file, kind, turn, LONG)
        while os.stat(file).st_size < END // 2:
            time.sleep(0.002)
        time.sleep(0.013 * turn)
        victim.kill()
        left = Path(file).read_bytes()
        assert any(left)
        fd = os.open(file, os.O_RDWR)
        with Pages(PAGES * PAGE, RESIDENT * PAGE, fd=fd, **KINDS[kind]) as heap:
            words = np.frombuffer(heap, np.uint64)
            assert not words.any()
            words[:] = 7
            heap.evict()
            assert (words == 7).all()
            # What the other left, put back under this one's versions, is refused.
            heap.evict()
            at = PAGE * 11
            os.pwrite(fd, left[at : at + PAGE].ljust(PAGE, b"\0"), at)
            assert 7 not in words[10 * 512 : 11 * 512] or heap.poisoned is not None
            assert heap.poisoned is not None
            del words
        os.close(fd)
