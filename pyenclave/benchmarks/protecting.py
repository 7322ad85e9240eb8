"""
The gate of a protected library: ``protected_call`` against an empty cffi call.

Where the CPU has no protection keys the row is absent: there is nothing else to measure.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pyenclave
from pyenclave._native import cpu_features
from pyenclave.benchmarks.in_c import lib
from pyenclave.benchmarks.rows import AbsentError, Row, figures, scratch
from pyenclave.host.protected import ProtectedLibrary

__all__ = ["protected_call"]

_ROUNDS = 15
_CALLS = 20000
_DATA = bytes(range(64))
_BUMPED = bytes(byte + 1 for byte in _DATA)


def _compiled(folder: Path) -> Path:
    named = (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = shutil.which(named) or shutil.which("cc")
    if compiler is None:
        raise AbsentError("a C compiler")
    library = folder / "libbump.so"
    source = Path(__file__).with_name("_native.c")
    include = f"-I{pyenclave.get_include()}"
    subprocess.run(
        [compiler, "-O3", "-shared", "-fPIC", include, "-o", library, source], check=True
    )
    return library


def _per_call(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter_ns() - start) / _CALLS


def protected_call() -> list[Row]:
    """Measure empty calls and calls of 64 bytes, with signals left and blocked, against cffi's."""
    if "pku" not in cpu_features():
        raise AbsentError("a CPU with protection keys (PKU)")
    every = set(signal.Signals)
    with scratch() as folder:
        file = _compiled(folder)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
        try:
            with (
                ProtectedLibrary(file, signals="leave") as left,
                ProtectedLibrary(file) as blocking,
            ):
                if left.bump(_DATA) != _BUMPED or blocking.bump(_DATA) != _BUMPED:
                    raise AssertionError("a wrong answer")
                fast, slow = left.bump, blocking.bump
                cases: dict[str, Callable[[], object]] = {
                    "": lambda: fast(b""),
                    "/64": lambda: fast(_DATA),
                    "/block": lambda: slow(b""),
                    "cffi": lib.pye_cpu_features,
                }
                times: dict[str, list[float]] = {name: [] for name in cases}
                for _ in range(_ROUNDS):
                    for name, call in cases.items():
                        times[name].append(_per_call(call))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    empty = times.pop("cffi")
    return [
        figures(f"protected_call{name}", ours, empty, peer="an empty cffi call")
        for name, ours in times.items()
    ]
