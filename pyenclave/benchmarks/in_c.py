"""
The same work in a loop of C: what Python adds is the difference.

``_loops.c`` is compiled once a process, when it is first needed; it calls the functions of the
extension module through pointers. Where core cycles are counted (``perf_event_open``; most virtual
machines count none), they are given too. Nothing is derived from clock ticks.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cffi import FFI  # type: ignore[import-untyped]

from pyenclave import _native
from pyenclave.benchmarks.rows import AbsentError, Row

__all__ = ["Loops", "aligned", "beside", "check", "counts_cycles", "ffi", "lib", "loops"]

ffi: Any = _native.ffi  # type: ignore[attr-defined] # cffi's one door, for its declarations
lib: Any = _native.lib  # type: ignore[attr-defined]

_SOURCE: Final = Path(__file__).with_name("_loops.c")
_FUNCTION: Final = re.compile(r"^pye_status (loop_\w+)\(((?:[^()]|\([^()]*\))*)\)\n", re.M)
_ROUNDS: Final = 101
_PAGE: Final = 4096
_SECRET: Final = bytes(range(32))


class Loops:
    """
    ``_loops.c``, compiled.

    Args:
        folder: Where the library is written.

    Raises:
        AbsentError: There is no C compiler that can.
    """

    def __init__(self, folder: Path) -> None:
        named = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        compiler = shutil.which(named) or shutil.which("cc")
        if compiler is None:
            raise AbsentError("a C compiler")
        target = folder / "loops.so"
        command: list[str | Path] = [compiler, "-O2", "-shared", "-fPIC", "-o", target, _SOURCE]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise AbsentError(f"a C compiler that compiles {_SOURCE.name}")
        self._ffi: Any = FFI()
        for name, arguments in _FUNCTION.findall(_SOURCE.read_text("utf-8")):
            self._ffi.cdef(f"int {name}({_types(arguments)});")
        self._lib = self._ffi.dlopen(str(target))
        self._cycles: int = self._lib.loop_cycles()

    def __call__(self, name: str, *arguments: object) -> None:
        """Run a loop. Pointers are those of the core's cffi module; a str names its function."""
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


def _types(arguments: str) -> str:
    """Return the types of a C function's arguments, all pointers as ``void *``."""
    plain = re.sub(r"\(\*\w+\)\([^()]*\)", "* ", arguments)
    types = ["void *" if "*" in part else part.rsplit(maxsplit=1)[0] for part in plain.split(",")]
    return "void" if arguments == "void" else ", ".join(types)


@functools.cache
def loops() -> Loops:
    """Return the loops of this process."""
    with tempfile.TemporaryDirectory(prefix="pyenclave-bench-") as folder:
        return Loops(Path(folder))  # a library that is loaded needs its file no more


def counts_cycles() -> bool:
    """Whether core cycles are counted on this machine."""
    try:
        return loops().cycles() is not None
    except AbsentError:
        return False


def check(status: int) -> None:
    """
    Raise for a status that is not ``PYE_OK``.

    Raises:
        AssertionError: It is another; the message names it.
    """
    if status:
        raise AssertionError(ffi.string(lib.pye_status_name(status)).decode())


def aligned(size: int, keep: list[Any]) -> Any:
    """Return zero memory aligned to 64 bytes, as cffi has it; *keep* holds it."""
    memory = ffi.new("uint8_t[]", size + 64)
    keep.append(memory)
    return memory + -int(ffi.cast("uintptr_t", memory)) % 64


# ---- beside rows ---------------------------------------------------------------------------------


def _random(size: int, keep: list[Any]) -> Any:
    memory = aligned(size, keep)
    ffi.memmove(memory, os.urandom(size), size)
    return memory


def _page_key(keep: list[Any]) -> Any:
    key = ffi.cast("pye_page_key *", aligned(lib.pye_page_key_size(), keep))
    check(lib.pye_page_key_init(key, _SECRET, len(_SECRET), bytes(16), lib.PYE_GCM_ANY))
    return key


def _seal(pages: int, keep: list[Any]) -> tuple[Any, ...]:
    info, version = ffi.new("pye_page_info *", {"type": 2}), ffi.new("uint64_t *")
    keep += [info, version]
    size = pages * _PAGE
    out, tags = aligned(size, keep), aligned(16 * pages, keep)
    given = (_page_key(keep), out, tags, version, _random(size, keep))
    if pages == 1:
        return ("page_seal", "pye_page_seal", *given, info)
    return ("pages_seal", "pye_pages_seal", *given, pages, info)


def _open(keep: list[Any]) -> tuple[Any, ...]:
    _, _, key, sealed, tag, version, plain, info = _seal(1, keep)
    check(lib.pye_page_seal(key, sealed, tag, version, plain, info))
    out = aligned(_PAGE, keep)
    return ("page_open", "pye_page_open", key, out, sealed, tag, version[0], info)


def _mrenclave(pages: int, keep: list[Any]) -> tuple[Any, ...]:
    context = ffi.new("pye_sgx_measure *")
    keep.append(context)
    functions = ("pye_sgx_create", "pye_sgx_add_pages", "pye_sgx_digest")
    flags = lib.PYE_SGX_REG | lib.PYE_SGX_R | lib.PYE_SGX_W
    content = _random(pages * _PAGE, keep)
    out = aligned(32, keep)
    return ("mrenclave", *functions, context, out, content, pages, flags, 2 * pages * _PAGE)


def _digests(pages: int, keep: list[Any]) -> tuple[Any, ...]:
    out = aligned(48 * pages, keep)
    return ("digests", "pye_snp_page_digests", out, _random(pages * _PAGE, keep), pages)


# Row → what its loop is called with, how often a round, and pages of one turn of the loop.
_BESIDE: Final[dict[str, tuple[Callable[[list[Any]], tuple[Any, ...]], int, int]]] = {
    "seal_page": (functools.partial(_seal, 1), 200, 1),
    "open_page": (_open, 200, 1),
    "seal_pages_64": (functools.partial(_seal, 64), 4, 64),
    "mrenclave": (functools.partial(_mrenclave, 512), 1, 512),
    "sha384_pages": (functools.partial(_digests, 512), 1, 512),
}


def beside(row: Row) -> Row:
    """
    Measure what a row is about in C.

    Args:
        row: A measured row, in nanoseconds or GB/s.

    Returns:
        ``native`` in the row's unit, and ``cycles`` of one page where they are counted. Nothing for
        a row that has no such loop.

    Raises:
        AbsentError: There is no C compiler.
    """
    if row["name"] not in _BESIDE:
        return {}
    make, count, pages = _BESIDE[row["name"]]
    run = loops()
    keep: list[Any] = []
    call = make(keep)
    times: list[float] = []
    cycles: list[float] = []
    for number in range(_ROUNDS + 2):
        before = run.cycles()
        start = time.perf_counter_ns()
        run(*call, count)
        taken = time.perf_counter_ns() - start
        after = run.cycles()
        if number >= 2:  # the first two warm up
            times.append(taken / count / pages)
            if before is not None and after is not None:
                cycles.append((after - before) / count / pages)
    # Rows in GB/s count the fastest round, the others the median: as they do, so does this.
    each = min(times) if row["unit"] == "GB/s" else statistics.median(times)
    found: Row = {"native": _PAGE / each if row["unit"] == "GB/s" else each}
    return {**found, "cycles": statistics.median(cycles)} if cycles else found
