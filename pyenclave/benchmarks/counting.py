"""
Row ``ecall_counted``: what the counters of calls cost an ecall.

The very loop of ``ecall_worker``, with counting on and off in short turns, so that whatever else
the machine does hits both alike. The counters' own time, in a loop without any call, is told in the
note: it is what a difference lost in noise can be checked against.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from pyenclave import _core
from pyenclave.benchmarks.calls import (  # of the same rows
    _DATA,
    _bound,
    _cores,
    _launched,
    _native_image,
    _processors,
)
from pyenclave.benchmarks.rows import figures

__all__ = ["ecall_counted"]

_TURNS = 400
_CALLS = 250  # a turn
_ALONE = 2_000_000


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter_ns() - start) / _CALLS


def ecall_counted() -> dict[str, Any]:
    """Measure a native ecall of 64 bytes with and without counting."""
    host, worker, trip = _processors()
    with _launched(_native_image) as enclave:
        function = enclave.bump
        counters = enclave._run.lanes.stats  # type: ignore[union-attr] # noqa: SLF001 - the switch

        def call() -> object:
            return function(_DATA)

        times: dict[bool, list[float]] = {True: [], False: []}
        with _bound(host, (enclave.info.pid, worker)):
            for turn in range(_TURNS):
                for on in (True, False) if turn % 2 else (False, True):
                    counters.enable(on)
                    _seconds(call)
                    times[on].append(_seconds(call))
            alone = min(_core.stats_cost(_ALONE) for _ in range(3)) / _ALONE * 1e9
    counted, bare = (statistics.median(times[on]) for on in (True, False))
    peer, cores = "the same without counters", _cores(host, worker, trip)
    row = figures("ecall_counted", times[True], times[False], peer=peer, **cores)
    share = (counted - bare) / bare
    row["note"] = f"counting adds {share:.2%}; in a loop of its own it takes {alone:.1f} ns"
    return row
