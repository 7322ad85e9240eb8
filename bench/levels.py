"""What the benchmarks of all levels share: operations, and their clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest

from pyenclave.benchmarks.in_c import Loops, aligned, check

__all__ = ["LEVELS", "Loops", "Operation", "Run", "aligned", "cases", "check", "hold", "measure"]

LEVELS = ("native", "cffi", "cython", "public")

Run = Callable[[int], object]


def per(count: int) -> Callable[[], float]:
    """Return a clock on which *count* operations take the time of one."""

    def clock() -> float:
        return perf_counter() / count

    clock.__name__ = f"perf_counter / {count}"
    return clock


@dataclass(frozen=True)
class Operation:
    """
    One piece of work at several levels.

    Attributes:
        name: Its name.
        count: How many are measured in one go.
        make: Gives a loop for each level; each was compared with another implementation.
        levels: Those that there are.
    """

    name: str
    count: int
    make: Callable[[Loops], Mapping[str, Run]]
    levels: tuple[str, ...] = LEVELS


def hold(memory: list[Any], *runs: Run) -> None:
    """Keep memory for as long as *runs* live, whose pointers into it own nothing."""
    for run in runs:
        vars(run)["memory"] = memory


def cases(*operations: Operation) -> list[Any]:
    """Return what to parametrize a test with: each operation at each of its levels."""
    return [
        pytest.param(
            operation,
            level,
            id=f"{operation.name}-{level}",
            marks=pytest.mark.benchmark(
                group=operation.name, timer=per(operation.count), disable_gc=True
            ),
        )
        for operation in operations
        for level in operation.levels
    ]


def measure(benchmark: Any, loops: Loops, operation: Operation, level: str) -> None:
    """Measure one operation at one level."""
    runs = operation.make(loops)
    assert tuple(runs) == operation.levels
    run = runs[level]
    if not benchmark.enabled:
        run(2)
    before = loops.cycles()
    run(operation.count)
    after = loops.cycles()
    if level == "native":
        benchmark.extra_info["cycles"] = (
            "absent" if before is None or after is None else (after - before) / operation.count
        )
    benchmark.extra_info["level"] = level
    benchmark.pedantic(run, args=(operation.count,), rounds=30, warmup_rounds=2)
