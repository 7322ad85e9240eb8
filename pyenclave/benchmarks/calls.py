"""
Rows ``ecall_worker`` and ``ecall_python``: a call, against what a Python program would use instead
to run a function in another process; ``ecall_map_256``, a batch of them, against single calls;
``ecall_array``, a large argument and result.

Both sides of a subject and of its peers are bound to the same two processors, subject and peers
take turns, and each answer is compared. How near two processors are is measured with a line that
goes to and fro; calls between far ones cost several times more, so rows say which they were.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

import pyenclave
from pyenclave import _core
from pyenclave.benchmarks import _echo
from pyenclave.benchmarks.rows import AbsentError, Row, figures, scratch
from pyenclave.calls.signature import Signature
from pyenclave.host import Enclave
from pyenclave.image import build

__all__ = ["ecall_array", "ecall_map_256", "ecall_python", "ecall_worker"]

_NEAR = 250.0  # ns for a line to go and come back: below, two processors are near
_ROUNDS = 15
_PARTS = 20  # of a round
_DATA = bytes(range(64))
_BUMPED = bytes(byte + 1 for byte in _DATA)
_FRAME_CALL = 1
_FRAME_PING = 2


# ---- processors ----------------------------------------------------------------------------------


def _line_round_trip(first: int, second: int) -> float:
    """Return how many ns a cache line takes from *first* to *second* and back."""
    count = 5_000
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        pid = os.fork()
        if pid == 0:
            try:
                os.sched_setaffinity(0, {second})
                _core.raw_spin(memory, False, count)
            finally:
                os._exit(0)
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {first})
            seconds = _core.raw_spin(memory, True, count)
        finally:
            os.sched_setaffinity(0, before)
            os.waitpid(pid, 0)
    return seconds / count * 1e9


def _processors() -> tuple[int, int, float]:
    """Return the nearest pair of processors that was found, and the round trip between them."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) == 1:
        return mine[0], mine[0], 0.0
    # The least of several: another program on one of the two can only make it longer.
    trips = [
        (min(_line_round_trip(mine[0], other) for _ in range(5)), other) for other in mine[1:9]
    ]
    trip, other = min(trips)
    return mine[0], other, trip


@contextlib.contextmanager
def _bound(host: int, *others: tuple[int, int]) -> Iterator[None]:
    """Bind this process to *host* and each process of *others* (pid, processor)."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {host})
        for pid, processor in others:
            os.sched_setaffinity(pid, {processor})
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- peers ---------------------------------------------------------------------------------------


def bump(data: bytes) -> bytes:
    """Do in Python what the native function does (for the peers)."""
    return bytes(byte + 1 for byte in data) if data != _DATA else _BUMPED


def _serve_bytes(connection: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            connection.send(bump(connection.recv()))


def _serve_sum(connection: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            a, b = connection.recv()
            connection.send(a + b)


@contextlib.contextmanager
def _pipe(serve: Callable[[Connection], None]) -> Iterator[tuple[Connection, int]]:
    """Start a process that answers on a ``multiprocessing.Pipe``."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        yield here, process.pid or 0
    finally:
        here.close()
        process.join(2)
        process.kill()


# ---- enclaves ------------------------------------------------------------------------------------


def _native_image(folder: Path, *, threads: int = 1) -> bytes:
    """Build an image of the native function, with the compiler that Python names."""
    source = Path(__file__).with_name("_native.c")
    named = (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = shutil.which(named) or shutil.which("cc")
    if compiler is None:
        raise AbsentError("a C compiler")
    library = folder / "libbump.so"
    include = f"-I{pyenclave.get_include()}"
    # Optimized as the project itself is: rows are about calls, so the function shall cost little.
    subprocess.run(
        [compiler, "-O3", "-shared", "-fPIC", include, "-o", library, source], check=True
    )
    manifest = folder / "enclave.toml"
    manifest.write_text(
        '[enclave]\nname = "bench"\nnative = "libbump.so"\nproduct_id = 1\n'
        f"security_version = 1\nthreads = {threads}\n"
    )
    return build.build(manifest)


@contextlib.contextmanager
def _launched(make: Callable[[Path], bytes]) -> Iterator[Enclave]:
    with (
        scratch() as folder,
        Enclave(make(folder), state=folder / "state", quiet=True) as enclave,
    ):
        yield enclave


def _script_image(folder: Path) -> bytes:
    del folder
    return build.build_script(Path(__file__).with_name("_echo.py"))


def _sharing_image(folder: Path) -> bytes:
    del folder
    return build.build_script(Path(__file__).with_name("_echo.py"), shared_memory="16 MiB")


# ---- measuring -----------------------------------------------------------------------------------


def _per_call(call: Callable[[], object], count: int, expected: object) -> float:
    """
    Return ns a call, the median over parts of *count* calls; the last answer must be as expected.

    A part that loses a processor to another program, for milliseconds, is one of many then.
    """
    answer = None
    size = max(1, count // _PARTS)
    times = []
    for _ in range(count // size):
        start = time.perf_counter_ns()
        for _ in range(size):
            answer = call()
        times.append((time.perf_counter_ns() - start) / size)
    _compare(answer, expected)
    return statistics.median(times)


def _middle_call(call: Callable[[], object], count: int, expected: object) -> float:
    """
    Return the median of ns of *count* calls, each timed; the last answer must be as expected.

    For calls so long that a clock costs nothing beside them.
    """
    answer = None
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        answer = call()
        times.append(time.perf_counter_ns() - start)
    _compare(answer, expected)
    return float(statistics.median(times))


def _round_trips(lanes: _core.HostLanes, kind: int, data: bytes) -> float:
    """Return ns of a round trip from C, as `_per_call` does of one from Python."""
    return statistics.median(
        _core.ring_round_trips(lanes, kind, 0, data, 100) / 100 * 1e9 for _ in range(_PARTS)
    )


def _compare(answer: object, expected: object) -> None:
    if isinstance(expected, np.ndarray):
        right = np.array_equal(np.asarray(answer), expected)
    else:
        right = answer == expected
    if not right:
        raise AssertionError(f"a wrong answer: {answer!r}")


def _take_turns(
    *cases: tuple[Callable[[], object], int, object],
    measure: Callable[[Callable[[], object], int, object], float] = _per_call,
) -> list[list[float]]:
    """Measure the cases round by round and return what each took, in ns a call."""
    for call, _, expected in cases:
        _per_call(call, 50, expected)
    seen: list[list[float]] = [[] for _ in cases]
    for _ in range(_ROUNDS):
        for times, (call, count, expected) in zip(seen, cases, strict=True):
            times.append(measure(call, count, expected))
    return seen


def _cores(host: int, worker: int, trip: float) -> Row:
    if host == worker:
        return {"cores": "same"}
    kind = "near" if trip < _NEAR else "far"
    return {"cores": kind, "line": round(trip)}


def ecall_worker() -> list[Row]:
    """Measure a native function, 64 bytes in and out, both sides awake on two processors."""
    host, worker, trip = _processors()
    with (
        _launched(_native_image) as enclave,
        _pipe(_serve_bytes) as (pipe, pipe_pid),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
    ):
        lanes = enclave._run.lanes  # type: ignore[union-attr] # noqa: SLF001 - the C loop's
        pool_pid = pool.submit(os.getpid).result()
        function = enclave.bump

        def through_pipe() -> object:
            pipe.send(_DATA)
            return pipe.recv()

        def in_c() -> float:
            return _round_trips(lanes, _FRAME_CALL, _DATA)

        others = ((enclave.info.pid, worker), (pipe_pid, worker), (pool_pid, worker))
        with _bound(host, *others):
            ring: list[float] = []
            in_c()

            def native() -> object:
                return function(_DATA)

            def rounds() -> object:
                ring.append(in_c())
                return None

            ours, _, by_pipe, by_pool = _take_turns(
                (native, 2000, _BUMPED),
                (rounds, 1, None),
                (through_pipe, 150, _BUMPED),
                (lambda: pool.submit(bump, _DATA).result(), 30, _BUMPED),
            )
    del ring[:-_ROUNDS]  # the others warmed up
    more = {**_cores(host, worker, trip), "native": statistics.median(ring)}
    return [
        figures("ecall_worker", ours, by_pipe, peer="multiprocessing.Pipe", **more),
        figures(
            "ecall_worker/ProcessPoolExecutor", ours, by_pool, peer="ProcessPoolExecutor", **more
        ),
        figures("ecall_worker/c_ring", ours, ring, peer="the same ring in C", **more),
    ]


def _in_process(a: int, b: float) -> Callable[[], object]:
    """
    Return a call with its serialisation both ways that crosses nowhere.

    By MessagePack of msgspec, the fastest that Python has: our own encoder writes into a ring, and
    its way in from Python alone is slower.
    """
    encode = msgspec.msgpack.Encoder().encode
    arguments = msgspec.msgpack.Decoder(tuple[int, float]).decode
    result = msgspec.msgpack.Decoder(float).decode
    function = _echo.add

    def call() -> object:
        return result(encode(function(*arguments(encode((a, b))))))

    return call


def ecall_python() -> list[Row]:
    """
    Measure a Python function of two scalars, both sides awake on two processors.

    The second row takes away what crossing alone costs, an echo of as many bytes by the worker's C
    loop, and compares what is left with the same call and serialisation in one process.
    """
    host, worker, trip = _processors()
    with _launched(_script_image) as enclave, _pipe(_serve_sum) as (pipe, pipe_pid):
        lanes = enclave._run.lanes  # type: ignore[union-attr] # noqa: SLF001 - the C loop's
        function = enclave.add
        sent = Signature.of(_echo.add).request_plan.encode((40, 2.0))
        crossing: list[float] = []

        def through_pipe() -> object:
            pipe.send((40, 2.0))
            return pipe.recv()

        def cross() -> object:
            crossing.append(_round_trips(lanes, _FRAME_PING, sent))
            return None

        with _bound(host, (enclave.info.pid, worker), (pipe_pid, worker)):
            ours, _, alone, by_pipe = _take_turns(
                (lambda: function(40, 2.0), 2000, 42.0),
                (cross, 1, None),
                (_in_process(40, 2.0), 2000, 42.0),
                (through_pipe, 150, 42.0),
            )
    del crossing[:-_ROUNDS]
    more = {**_cores(host, worker, trip), "native": statistics.median(crossing)}
    # A round whose crossing was disturbed can be longer than the call of that round.
    left = [max(call - echo, 1.0) for call, echo in zip(ours, crossing, strict=True)]
    beside = figures("ecall_python/in_process", left, alone, peer="the same in one process", **more)
    whole, crossed = statistics.median(ours), statistics.median(crossing)
    beside["note"] = f"a call takes {whole:.0f} ns, of which crossing is {crossed:.0f} ns"
    return [figures("ecall_python", ours, by_pipe, peer="multiprocessing.Pipe", **more), beside]


def ecall_map_256() -> Row:
    """Measure 256 native calls of 64 bytes in one packed batch, against as many single calls."""
    host, worker, trip = _processors()
    rows = np.tile(np.frombuffer(_DATA, np.uint8), (256, 1))
    want = rows + 1
    with _launched(_native_image) as enclave:
        function = enclave.bump

        def packed() -> object:
            return enclave.map("bump", rows).array()

        with _bound(host, (enclave.info.pid, worker)):
            ours, single = _take_turns((packed, 50, want), (lambda: function(_DATA), 2000, _BUMPED))
    cores = _cores(host, worker, trip)
    each = [value / len(rows) for value in ours]
    return figures("ecall_map_256", each, single, peer="ecall_worker", **cores)


def ecall_array() -> list[Row]:
    """
    Measure 1 MiB of float64 in and out, against two copies of 1 MiB made in this process.

    In the ordinary way, into ``out=``, and with both arrays in memory that the enclave maps too.
    """
    host, worker, trip = _processors()
    data = np.arange(1 << 17, dtype=np.float64)
    want = -data
    kept = np.zeros_like(data)
    first, second = np.zeros_like(data), np.zeros_like(data)
    with _launched(_sharing_image) as enclave:
        negate = enclave.negate
        there, back = enclave.shared.array(data), enclave.shared.zeros(data.shape)

        def copies() -> object:
            np.copyto(first, data)
            np.copyto(second, first)
            return second

        with _bound(host, (enclave.info.pid, worker)):
            ours, into, shared, copied = _take_turns(
                (lambda: negate(data), 20, want),
                (lambda: negate(data, out=kept), 20, want),
                (lambda: negate(there, out=back), 20, want),
                (copies, 20, data),
                measure=_middle_call,
            )
    cores = _cores(host, worker, trip)
    return [
        figures(f"ecall_array{way}", taken, copied, peer="two copies", **cores)
        for way, taken in (("", ours), ("/out", into), ("/shared", shared))
    ]
