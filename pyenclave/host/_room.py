"""
Whether a pool could ever have as many enclaves as it was made for.

Only what is certain is refused, before the first launch: totals are compared with the least that an
enclave takes, whatever else runs. What lies between is found by the launch that meets it.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyenclave._platform.policy import MAX_ENCLAVES, POLICY_FILE, load_policy
from pyenclave._platform.state import State
from pyenclave.errors import EnclaveError, LaunchError
from pyenclave.host._limits import Limits

__all__ = ["Room", "check", "rooms"]

_FILES: Final = 2  # descriptors of this process: the ring, and the worker's pidfd
_THREADS: Final = 2  # of the platform
_MEMORY: Final = 6 << 20  # bytes; measured with a thousand (docs/load.md)


@dataclass(frozen=True, slots=True)
class Room:
    """
    Something that enclaves share.

    Attributes:
        name: What it is and who sets it, for people.
        total: How much there is.
        each: What one enclave takes of it at least.

    """

    name: str
    total: int
    each: int = 1


def check(
    limits: Limits, lanes: int, state: str | os.PathLike[str] | None, *, root: Path = Path("/")
) -> None:
    """
    Refuse a pool that cannot come to its size.

    Args:
        limits: The pool's.
        lanes: Threads of an enclave.
        state: The state directory.
        root: Where ``proc`` and ``sys`` are.

    Raises:
        LaunchError: It names the limit, how many enclaves that has room for, and the number wanted.

    """
    for room in rooms(lanes, state, root=root):
        fit = room.total // room.each
        for name in ("size", "max_size"):
            wanted = getattr(limits, name)
            if wanted > fit:
                each = f", of which an enclave takes {room.each}" if room.each > 1 else ""
                raise LaunchError(
                    f"{name} of the pool: there is no room for so many enclaves; "
                    f"{room.name} is {room.total}{each}",
                    expected=f"at most {fit}",
                    found=wanted,
                    advice="Make the pool smaller, or raise that limit where it can be.",
                )


def rooms(
    lanes: int, state: str | os.PathLike[str] | None, *, root: Path = Path("/")
) -> Iterator[Room]:
    """Give what enclaves of so many threads share, as far as it can be read."""
    yield Room(f"max_enclaves of {POLICY_FILE}", _most_enclaves(state))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        yield Room("the number of open files (RLIMIT_NOFILE, ulimit -n)", files, _FILES)
    tasks = lanes + _THREADS
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY and os.getuid() != 0:  # the kernel lets root pass
        yield Room("the user's number of threads (RLIMIT_NPROC, ulimit -u)", processes, tasks)
    for name in ("pid_max", "threads-max"):
        number = _number(root / "proc/sys/kernel" / name)
        if number is not None:
            yield Room(f"the machine's number of threads (kernel.{name})", number, tasks)
    memory, swap = _memory(root / "proc/meminfo")
    if memory:
        yield Room("the machine's memory with swap in bytes", memory + swap, _MEMORY)
    for group in _groups(root):
        for file, name, more, each in (
            ("pids.max", "the group's number of threads", 0, tasks),
            ("memory.max", "the group's memory with swap in bytes", swap, _MEMORY),
            ("memory.limit_in_bytes", "the group's memory with swap in bytes", swap, _MEMORY),
        ):
            number = _number(group / file)
            if number is not None:
                yield Room(f"{name} ({file} of its control group)", number + more, each)


def _most_enclaves(state: str | os.PathLike[str] | None) -> int:
    # What is wrong with directory or policy is the platform's to say, at the launch.
    with contextlib.suppress(EnclaveError, OSError, ValueError):
        path = None if state is None else os.fspath(state)
        with State.open(path, create=False) as opened:
            return load_policy(opened).max_enclaves
    return MAX_ENCLAVES


def _number(path: Path) -> int | None:
    """Return the number in a file; None: there is no such file, or no limit."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _memory(path: Path) -> tuple[int, int]:
    """Return the bytes of memory and of swap; 0 if they are not told."""
    found = {"MemTotal": 0, "SwapTotal": 0}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text("ascii").splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) << 10
    return found["MemTotal"], found["SwapTotal"]


def _groups(root: Path) -> Iterator[Path]:
    """Give the folders of this process's control groups, and of those that they are in."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            top = root / "sys/fs/cgroup" / kinds
            here = top / path.strip("/")
            if ".." not in here.parts:  # else it is in a group that is not seen from here
                yield from (top / part for part in _ways(here.relative_to(top)))


def _ways(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents if path.parts else ()
