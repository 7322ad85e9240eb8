"""An ecall at four levels: 64 bytes to a native function of a worker that is awake, and back."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from levels import LEVELS, Loops, Operation, Run, cases, check, measure

from pyenclave._ffi import ffi, lib
from pyenclave.benchmarks.calls import (
    _BUMPED,
    _DATA,
    _FRAME_CALL,
    _bound,
    _launched,
    _native_image,
    _processors,
)
from pyenclave.calls import ring

LANES = 2  # one for HostLanes, which takes the first; one for the levels below it


class LaneMemory:
    """The host's end of the second lane, as C has it."""

    def __init__(self, lanes: Any, limit: int, loops: Loops) -> None:
        self.memory = ffi.from_buffer(lanes.memory, require_writable=True)
        functions = {
            name: ffi.addressof(lib, function)
            for name, function in (
                ("wait", "pye_wait_futex"),
                ("wake", "pye_wake_futex"),
                ("yield", "pye_wait_yield"),
            )
        }
        cpu = ffi.cast("int (*)(void)", loops.address("loop_cpu"))
        self.ops = ffi.new("pye_wait_ops *", {**functions, "cpu": cpu})
        made = ffi.new("pye_lane **")
        host, slot = lib.PYE_SIDE_HOST, ring.DEFAULT_SLOT
        size = len(self.memory)
        check(lib.pye_lane_new(made, self.memory, size, LANES, slot, 1, host, limit, self.ops))
        self.lane = ffi.gc(made[0], lib.pye_lane_free)
        self.data = ffi.new("uint8_t[]", _DATA)
        self.out = ffi.new("uint8_t[]", len(_DATA))


@pytest.fixture(scope="module")
def ecall(loops: Loops) -> Iterator[Operation]:
    """The operation, while an enclave runs."""
    host, worker, _ = _processors()
    image = functools.partial(_native_image, threads=LANES)
    with _launched(image) as enclave, _bound(host, (enclave.info.pid, worker)):
        # The thread of the second lane too: what serves every level runs on one processor.
        for task in Path(f"/proc/{enclave.info.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {worker})
        lanes, function = enclave._run.lanes, enclave.bump  # noqa: SLF001 - below the handle
        c = LaneMemory(lanes, 1 << 20, loops)
        length = len(_DATA)
        segment = ffi.new("pye_segment *", {"data": c.data, "len": length})
        head = ffi.new("pye_lane_header *")

        def native(count: int) -> bytes:
            functions = ("pye_lane_write", "pye_lane_wait", "pye_lane_read")
            loops("calls", *functions, c.lane, _FRAME_CALL, segment, head, c.out, length, count)
            return bytes(c.out)

        def by_cffi(count: int) -> bytes:
            for _ in range(count):
                check(lib.pye_lane_write(c.lane, _FRAME_CALL, 0, segment, 1, 1000))
                check(lib.pye_lane_wait(c.lane, head, 1000))
                check(lib.pye_lane_read(c.lane, c.out, length, 1000))
            return bytes(c.out)

        def cython(count: int) -> bytes:
            call, value = lanes.raw_call, b""
            for _ in range(count):
                value = call(_FRAME_CALL, 0, _DATA)
            return value

        def public(count: int) -> bytes:
            value = b""
            for _ in range(count):
                value = function(_DATA)
            return value

        runs: dict[str, Run] = dict(zip(LEVELS, (native, by_cffi, cython, public), strict=True))
        assert {name: run(3) for name, run in runs.items()} == dict.fromkeys(runs, _BUMPED)
        yield Operation("ecall_64", 500, lambda loops: runs)


@pytest.mark.parametrize(
    ("operation", "level"), cases(Operation("ecall_64", 500, lambda loops: {}))
)
def test_calls(
    benchmark: Any, loops: Loops, ecall: Operation, operation: Operation, level: str
) -> None:
    """Time a call."""
    assert (operation.name, operation.count) == (ecall.name, ecall.count)
    measure(benchmark, loops, ecall, level)
