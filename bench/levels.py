"""What the benchmarks of all levels share: the loops in C, operations, and their clock."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from cffi import FFI

from pyenclave._ffi import ffi, lib

HERE = Path(__file__).resolve().parent
LEVELS = ("native", "cffi", "cython", "public")

Run = Callable[[int], object]


class Loops:
    """``loops.c``, compiled; its functions call the core through pointers."""

    def __init__(self, folder: Path) -> None:
        named = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        compiler = shutil.which(named) or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler is installed")
        target = folder / "loops.so"
        source = HERE / "loops.c"
        include = HERE.parent / "csrc" / "include"
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", f"-I{include}", "-o", target, source], check=True
        )
        self._ffi = FFI()
        function = re.compile(r"^(?:pye_status|int) (loop_\w+)\(((?:[^()]|\([^()]*\))*)\)\n", re.M)
        for name, arguments in function.findall(source.read_text()):
            words = "" if arguments == "void" else ", ".join(map(_type, _split(arguments)))
            self._ffi.cdef(f"int {name}({words or 'void'});")
        self._lib = self._ffi.dlopen(str(target))
        self._cycles = self._lib.loop_cycles()

    def __call__(self, name: str, *arguments: object) -> None:
        """Call a loop; pointers may be of the core's cffi module, strings name its functions."""
        given = [self._argument(value) for value in arguments]
        check(getattr(self._lib, f"loop_{name}")(*given))

    def _argument(self, value: object) -> object:
        if isinstance(value, str):
            value = ffi.addressof(lib, value)
        if isinstance(value, ffi.CData):
            return self._ffi.cast("void *", int(ffi.cast("uintptr_t", value)))
        return value

    def address(self, name: str) -> int:
        """Return where a function of the loops is."""
        return int(self._ffi.cast("uintptr_t", self._ffi.addressof(self._lib, name)))

    def cycles(self) -> int | None:
        """Return how many core cycles this thread has used, where something counts them."""
        return int.from_bytes(os.read(self._cycles, 8), "little") if self._cycles >= 0 else None


def _split(arguments: str) -> list[str]:
    return [part.strip() for part in re.sub(r"\([^)]*\)", "", arguments).split(",")]


def _type(argument: str) -> str:
    pointer = "*" in argument or argument.startswith("__typeof__")
    return "void *" if pointer else argument.split(maxsplit=1)[0]


def check(status: int) -> None:
    """Raise for a status that is not PYE_OK."""
    if status:
        raise AssertionError(ffi.string(lib.pye_status_name(status)).decode())


def aligned(size: int, keep: list[Any]) -> Any:
    """Return zero memory aligned to 64 bytes; *keep* holds it."""
    memory = ffi.new("uint8_t[]", size + 64)
    keep.append(memory)
    return memory + -int(ffi.cast("uintptr_t", memory)) % 64


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
