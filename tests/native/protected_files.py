"""The library and the probe of the tests of protected libraries: compiled, or found ready-made."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from core_build import CSRC, INCLUDES, compiler

import pyenclave
from pyenclave._ffi import ffi, lib
from pyenclave._native import cpu_features

HERE = Path(__file__).resolve().parent
# Where there is no compiler (an emulated machine), a folder with what `python protected_files.py
# FOLDER` made elsewhere.
READY = "PYENCLAVE_PROTECTED_FILES"
NAMES = ("library.so", "probe.so")
GATE = [CSRC / "src/linux" / f"protect_{part}.c" for part in ("gate", "avx", "avx512")]

NO_KEY = "" if "pku" in cpu_features() else "this CPU has no protection keys (PKU)"


def compile_library(target: Path, source: Path, *flags: str) -> Path:
    """Compile a library of trusted functions; return *target*."""
    include = ("-I", pyenclave.get_include())
    _run(compiler(), "-std=c11", "-O2", "-shared", "-fPIC", *include, *flags, str(source),
         "-o", str(target))  # fmt: skip
    return target


def files(folder: Path) -> Path:
    """Return a folder with ``library.so`` and ``probe.so``: *folder*, unless there is one."""
    ready = os.environ.get(READY)
    if ready:
        return Path(ready)
    compile_library(folder / NAMES[0], HERE / "protected_library.c")
    _run(compiler(), "-std=gnu11", "-O1", "-mno-avx", "-mno-red-zone", "-shared", "-fPIC",
         "-fvisibility=hidden", *INCLUDES, str(HERE / "protected_probe.c"), *map(str, GATE),
         "-o", str(folder / NAMES[1]))  # fmt: skip
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def sizes(**other: int) -> Any:
    """Return sizes for the C interface."""
    return ffi.new(
        "pye_protect_sizes *",
        {"memory": 4096, "stack": 65536, "message": 4096, "slots": 2, "flags": 0} | other,
    )


def try_new(
    *,
    functions: tuple[int, ...] = (),
    ranges: tuple[tuple[int, int], ...] = (),
    arena: Any = ffi.NULL,
    numbers: tuple[int, int] | None = None,
    **other: int,
) -> tuple[int, Any]:
    """Return the status of ``pye_protect_new``, and what it made."""
    out = ffi.new("pye_protect **")
    num_ranges, num_functions = numbers or (len(ranges), len(functions))
    status = lib.pye_protect_new(
        out, sizes(**other), ffi.new("pye_protect_range[]", ranges or 1), num_ranges,
        ffi.new("uint64_t[]", functions or 1), num_functions, arena,
    )  # fmt: skip
    assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
    return status, out[0]


def new(**arguments: Any) -> Any:
    """Return what ``pye_protect_new`` makes."""
    status, code = try_new(**arguments)
    assert status == lib.PYE_OK
    return code


if __name__ == "__main__":
    files(Path(sys.argv[1]))
