"""A host and a worker joined by a ring, without a platform: the worker is a forked child."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from pyenclave import _core
from pyenclave._worker import dispatch
from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.calls.ocalls import declared_in
from pyenclave.calls.signature import Signature
from pyenclave.errors import EnclaveLostError, EnclavePoisonedError
from pyenclave.host import _ocalls
from pyenclave.host._arena import SharedMemory
from pyenclave.host.handle import Functions

MADV_WIPEONFORK = 18


class Info:
    """What build_table reads of an image's info."""

    def __init__(
        self,
        functions: list[dict[str, Any]],
        threads: int,
        message_limit: int,
        ocalls: tuple[dict[str, Any], ...] = (),
        shared_memory: int = 0,
    ) -> None:
        self.functions = tuple(functions)
        self.ocalls = ocalls
        self.threads = threads
        self.message_limit = message_limit
        self.shared_memory = shared_memory


def ecall(function: Callable[..., Any]) -> Callable[..., Any]:
    """What trusted.ecall does, with the name that a function of a module would have."""
    function.__pyenclave_ecall__ = True  # type: ignore[attr-defined]
    function.__qualname__ = function.__name__
    return function


class Pair:
    """The host's lanes and functions, and the worker's process."""

    def __init__(
        self,
        *functions: Callable[..., Any],
        library: str | None = None,
        native: dict[str, str] | None = None,
        lanes: int = 1,
        limit: int = 1 << 20,
        debug: bool = False,
        queue: int = 1024,
        cpu: int | None = None,
        stubs: tuple[Callable[..., Any], ...] = (),
        handlers: dict[str, Callable[..., Any]] | None = None,
        shared: int = 0,
    ) -> None:
        module = ModuleType("entry")
        for function in functions:
            setattr(module, function.__name__, ecall(function))
        for stub in stubs:
            setattr(module, stub.__name__, stub)
        if library is None:
            from pyenclave.calls.signature import functions_of

            wires = functions_of(module)
        else:
            from pyenclave.calls.signature import native_functions

            wires = native_functions(native or {})
        declared = tuple(declared_in(module))
        info = Info(wires, lanes, limit, tuple(item.to_wire() for item in declared), shared)
        fd = ring.create(lanes, shared=shared)
        self.ring_fd = fd
        self.memory = ring.map_ring(fd, lanes, shared=shared)
        self.lane_stride = 256 + 2 * ring.slot_stride()
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            self._work(module, library, info, writer, debug, cpu)
        os.close(writer)
        self._reader = reader
        self._status: int | None = None
        self._pidfd = os.pidfd_open(self.pid)
        token = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        token.madvise(MADV_WIPEONFORK)
        self.closed = False
        self.lanes = _core.HostLanes(
            self.memory,
            token,
            lanes,
            ring.DEFAULT_SLOT,
            limit,
            self.guard,
            lambda check: EnclavePoisonedError("host: " + check),
            call_errors.from_frame,
            threading.Condition(),
            queue,
            functions=len(wires),
            shared=shared,
        )
        self.shared = SharedMemory(self.memory, shared, self.guard) if shared else None
        if declared:
            _ocalls.check(declared, handlers or {})
            self.lanes.set_ocalls(
                _ocalls.make_table(declared, handlers or {}, limit), _ocalls.submit
            )
        self.signatures = tuple(map(Signature.from_wire, wires))
        self.functions = Functions(self.signatures, self.lanes)

    def _work(self, module, library, info, writer, debug, cpu) -> None:
        code = 4
        parent = os.getppid()
        try:
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            entry = module if library is None else dispatch.NativeLibrary(library)
            table = dispatch.build_table(entry, info)
            table.debug = debug

            def idle() -> bool:
                return os.getppid() == parent

            def lane(number: int) -> None:
                try:
                    dispatch.serve(self.ring_fd, table, lane=number, idle=idle)
                except EnclavePoisonedError as error:
                    os.write(writer, str(error).encode())
                    os._exit(3)
                except BaseException as error:
                    os.write(writer, repr(error).encode())
                    os._exit(5)

            for number in range(1, info.threads):
                threading.Thread(target=lane, args=(number,), daemon=True).start()
            lane(0)
            code = 0
        finally:
            os._exit(code)

    def poll(self, timeout: float) -> bool:
        """Whether the worker ended (a poll object must not be used by two threads at once)."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout))

    def guard(self) -> None:
        if self.poll(0):
            raise EnclaveLostError("the worker ended")

    def __getattr__(self, name: str) -> Any:
        return self.functions.named(name)

    def header(self, side: str, lane: int = 0) -> int:
        """Offset of a slot's header in the ring."""
        base = 4096 + lane * self.lane_stride + 256
        return base if side == "request" else base + (self.lane_stride - 256) // 2

    def ended(self, timeout: float = 20.0) -> tuple[int, str]:
        """Wait for the worker's end; return its exit code (negative: signal) and last words."""
        if self._status is None:
            assert self.poll(timeout * 1000), "the worker did not end"
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
            with open(self._reader, "rb") as file:
                self._words = file.read().decode()
        return self._status, self._words

    @property
    def alive(self) -> bool:
        return not self.poll(0)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._status is None:
                os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.kill()
        self.ended()
        self.lanes.close()
        os.close(self._pidfd)
        os.close(self.ring_fd)


@pytest.fixture
def pair():
    """Make pairs that end with the test."""
    made: list[Pair] = []

    def make(*functions: Callable[..., Any], **options: Any) -> Pair:
        made.append(Pair(*functions, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


class Gate:
    """Where a function of the worker waits until the test lets it go on."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 2)  # shared with the workers, which are forked later

        def held(result: int = 7) -> int:
            memory[1] = 1
            while not memory[0]:
                time.sleep(0.002)
            return result

        self.held = held
        self._memory = memory

    def open(self) -> None:
        self._memory[0] = 1

    def shut(self) -> None:
        self._memory[:] = bytes(2)

    def reached(self) -> bool:
        """Whether somebody came to it since it was shut."""
        return self._memory[1] == 1


@pytest.fixture
def gate():
    """A gate, shut; its *held* is one more function for a pair."""
    return Gate()


@pytest.fixture
def until():
    """Wait for a condition, looking every few milliseconds."""

    def wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)

    return wait
