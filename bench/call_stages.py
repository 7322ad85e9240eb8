"""
Instructions of each stage of a call of a Python function, and of the same call in one process.

    python bench/call_stages.py

Needs valgrind. Makes the calls of ``ecall_python`` under callgrind, which counts once they are
warm, and prints the instructions by the call. Host and worker are two processes on one processor,
joined by a ring as a launch makes it, without its walls: between two messages each sleeps, so that
the looking that two processors would do is not in it. What a function calls is in its figure; the
kernel's part is not.
"""

from __future__ import annotations

import mmap
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL
from types import SimpleNamespace

WARM, CALLS = 300, 30_000
# What is counted: pattern of a function's name → what it is.
HOST = {
    r"call_quickly$": "the host's part of a call, in all",
    r"8HostCall_\d+__call__$": "the host's part of a call, in all (with a tuple)",
    r"4Plan_put": "encode the arguments",
    r"9HostLanes_acquire": "take a lane",
    r"9HostLanes_release": "give it back",
    r"9HostLanes_post": "send, and wait for the answer",
    r"^pye_lane_write": "write the message",
    r"^pye_lane_wait": "look for the answer, sleep",
    r"^pye_lane_read": "read the answer",
    r"4Plan_get": "decode the answer",
    r"^PyEval_SaveThread": "give up the GIL",
    r"^PyEval_RestoreThread": "take it again",
    r"_glance$": "look without giving it up",
    r"^pye_stats": "count",
}
WORKER = {
    r"10WorkerLane_answer": "the worker's part of a call, in all",
    r"4Plan_get": "decode the arguments",
    r"^PyObject_Call$": "the function",
    r"10WorkerLane_pack": "encode its result",
    r"^pye_lane_write": "write the answer",
    r"^pye_lane_wait": "look for the next call, sleep",
    r"^pye_lane_read": "read it",
    r"^PyEval_SaveThread": "give up the GIL",
    r"^PyEval_RestoreThread": "take it again",
    r"_glance$": "look without giving it up",
}


# ---- what runs under valgrind --------------------------------------------------------------------


def _valgrind(out: str, *what: object) -> list[str]:
    """Return the command that runs this file under callgrind, which does not count yet."""
    return [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "-q",
        sys.executable, __file__, *map(str, what),
    ]  # fmt: skip


def _image() -> SimpleNamespace:
    from pyenclave.benchmarks import _echo
    from pyenclave.calls.signature import functions_of

    return SimpleNamespace(
        functions=tuple(functions_of(_echo)), ocalls=(), threads=1, message_limit=1 << 20,
        shared_memory=0,
    )  # fmt: skip


def _serve(fd: str, word: str) -> None:
    """Serve until the other end of the pipe *word* is closed."""
    from pyenclave._worker import dispatch
    from pyenclave.benchmarks import _echo

    table = dispatch.build_table(_echo, _image())  # type: ignore[arg-type]
    dispatch.serve(
        int(fd), table, lane=0, idle=lambda: not select.select([int(word)], [], [], 0)[0]
    )


def _counted(call: Callable[[], object], *others: int) -> None:
    """Make the calls, and have this process and *others* count those that are warm."""

    def switch(how: str) -> None:
        for pid in (os.getpid(), *others):
            subprocess.run(["callgrind_control", "-i", how, str(pid)], check=True, stdout=DEVNULL)

    for _ in range(WARM):
        call()
    switch("on")
    for _ in range(CALLS):
        call()
    switch("off")


def _call(out: str) -> None:
    """Make calls over a ring; the worker is another process, which counts into *out*."""
    from pyenclave import _core
    from pyenclave.calls import ring
    from pyenclave.calls.errors import from_frame
    from pyenclave.calls.signature import Signature
    from pyenclave.host.handle import Functions

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    wires = _image().functions
    fd = ring.create(1)
    word, end = os.pipe()
    worker = subprocess.Popen(_valgrind(out, "serve", fd, word), pass_fds=(fd, word))
    token = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    lanes = _core.HostLanes(
        ring.map_ring(fd, 1), token, 1, ring.DEFAULT_SLOT, 1 << 20, lambda: None, ValueError,
        from_frame, threading.Condition(), 1, functions=len(wires),
    )  # fmt: skip
    function = Functions(tuple(map(Signature.from_wire, wires)), lanes).named("add")
    _counted(lambda: function(40, 2.0), worker.pid)
    os.close(end)
    worker.wait()


def _alone() -> None:
    from pyenclave.benchmarks.calls import _in_process

    _counted(_in_process(40, 2.0))


# ---- counting ------------------------------------------------------------------------------------


def _inclusive(file: Path) -> dict[str, int]:
    """Return the instructions of each function with those that it calls, and of the program."""
    told = subprocess.run(
        ["callgrind_annotate", "--inclusive=yes", "--threshold=100", "--auto=no", file],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found: dict[str, int] = {}
    for line in told.splitlines():
        row = re.match(r"\s*([\d,]+) \([^)]*\)\s+(?:[^:]*:)?(.*?)(?: \[[^\]]*\])?$", line)
        if row:
            name = row[2].split("'")[0].strip()
            found[name] = max(found.get(name, 0), int(row[1].replace(",", "")))
    return found


def _count(file: Path) -> dict[str, float]:
    return {name: count / CALLS for name, count in _inclusive(file).items()}


def _show(title: str, counts: dict[str, float], names: dict[str, str]) -> None:
    print(f"\n{title}: {counts.get('PROGRAM TOTALS', 0):.0f} instructions a call")
    for pattern, says in names.items():
        for name, each in sorted(counts.items(), key=lambda item: -item[1]):
            if re.search(pattern, name) and each >= 1:
                print(f"  {each:7.0f}  {says} ({name.rpartition('5_core_')[2]})")


def main() -> None:
    """Count, or be what is counted."""
    if len(sys.argv) > 1:
        {"call": _call, "serve": _serve, "alone": _alone}[sys.argv[1]](*sys.argv[2:])
        return
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed")
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / side for side in ("host", "worker", "alone")]
        subprocess.run(_valgrind(str(files[0]), "call", files[1]), check=True)
        subprocess.run(_valgrind(str(files[2]), "alone"), check=True)
        host, worker, alone = map(_count, files)
    _show("host", host, HOST)
    _show("worker", worker, WORKER)
    _show("the same in one process", alone, {})


if __name__ == "__main__":
    main()
