"""One launch of an enclave, whoever uses it: its lanes, its process, and why it ended."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import select
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from pyenclave import _core
from pyenclave._files import read_file
from pyenclave._locks import RLock
from pyenclave._platform.client import PlatformClient
from pyenclave.calls import ring
from pyenclave.calls.stats import registry
from pyenclave.errors import (
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    ImageError,
    LaunchError,
    PlatformUnavailableError,
)
from pyenclave.formats.image import MAX_IMAGE
from pyenclave.formats.messages import Launched
from pyenclave.formats.record import ProtectionRecord
from pyenclave.host import _fork, _images, _ocalls, _shared, files
from pyenclave.host._arena import SharedMemory
from pyenclave.host._held import Held
from pyenclave.host._lanes import token
from pyenclave.host._reserve import Begun, Reserve, Slot, make_slot
from pyenclave.host.handle import EnclaveInfo

__all__ = ["Run", "read_image", "token"]

_ATTEMPTS = 3  # platforms that may end one after the other while a launch is under way
_FRAME_PING = 2
# Milliseconds between two looks whether there is an enclave: while one is on its way, and then.
_AHEAD_MS = 5
_SLICE_MS = 100
# Platform and worker take a processor each: who looks for an answer meanwhile takes it from them.
_CROWDED = len(os.sched_getaffinity(0)) <= 2
_START_SECONDS = 60.0  # for all on_start functions together

_log = logging.getLogger("pyenclave")
_log.addHandler(logging.NullHandler())


def read_image(source: Any) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    try:
        return read_file(source, limit=MAX_IMAGE)
    except OSError as error:
        raise ImageError(f"the image cannot be read: {error}") from None


class Run:
    """
    One launch: its lanes, its process, and why it ended.

    *begun*: an enclave that the platform was asked for already, now this run's, or will be before
    :meth:`asked` is called. Calls may be made before it answers: they are served when the enclave
    has its identity, or raise what the launch would have raised.
    """

    _held: Held

    def __init__(
        self,
        data: bytes,
        debug: bool | None,
        require: tuple[str, ...],
        state: str | os.PathLike[str] | None,
        queue: int,
        ocalls: Mapping[str, Any] | None = None,
        reserve: Reserve | None = None,
        begun: Begun | None = None,
    ) -> None:
        image = self._image = _images.prepare(data)
        self._handlers, self._close_files = files.for_launch(ocalls or {})
        _ocalls.check(image.ocalls, self._handlers)
        self.handles = bool(image.ocalls)
        self.name = image.info.name
        self.unsigned = not image.signed
        self._ended: Callable[[], EnclaveError] | None = None
        self._lock = RLock()  # a signal's handler may close what this thread finds ended
        self.names = image.names
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with contextlib.ExitStack() as failed:
                    if begun is not None:
                        self._adopt(failed, begun)
                    elif reserve is None:
                        self._launch(failed, debug, require, state, queue)
                    else:
                        self._take(failed, reserve)
                    self._owner.set(self)
                    if self._held.known and self._held.launched().starting:
                        self._await_start()
                    failed.pop_all()
                break
            except EnclaveLostError as error:
                # The platform ended, perhaps long ago; whatever it began ends with it.
                if attempt == _ATTEMPTS:
                    raise PlatformUnavailableError(
                        "the platform ended while it launched the enclave", found=error.message
                    ) from None
        self.shared = self._share()
        self.lanes.report = functools.partial(_report, self.name, self.names)
        self._finalizer = weakref.finalize(
            self,
            _finish,
            self._held,
            os.getpid(),
            self._close_files,
        )
        _fork.watch(self)
        if self._held.asked:
            self.asked()

    def asked(self) -> None:
        """There is an enclave, or will be: it counts from now on."""
        registry.add(self.launch, self)
        if not self._held.known:
            self.lanes.slice_ms = _AHEAD_MS
            if _CROWDED:
                self.lanes.rest()

    @property
    def client(self) -> PlatformClient:
        """The connection to the platform."""
        return self._held.client

    @property
    def known(self) -> bool:
        """Whether the platform's answer was read, and was an enclave."""
        return self._held.known

    @property
    def pidfd(self) -> int:
        """Of the worker."""
        self._settle()
        return self._held.pidfd

    @property
    def enclave_id(self) -> bytes:
        """Its name at the platform."""
        return self._settle().enclave_id

    def _share(self) -> SharedMemory | None:
        """Return what hands out the memory that the enclave maps too; None if it has none."""
        size = self._image.info.shared_memory
        memory: Any = self.lanes.memory
        return SharedMemory(memory, size, self._owner.guard) if size else None

    def _after_fork(self) -> None:
        """In a forked child: the worker is the parent's, and so is all that leads to it."""
        # Else the number is somebody else's by now, or nobody knows it yet.
        if self._finalizer.alive and self._held.pidfd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._held.pidfd)

    def _launch(
        self,
        failed: contextlib.ExitStack,
        debug: bool | None,
        require: tuple[str, ...],
        state: str | os.PathLike[str] | None,
        queue: int,
    ) -> None:
        image = self._image
        made: Future[Slot] = Future()
        ring_fd = ring.create(image.info.threads, shared=image.info.shared_memory)

        def make() -> Slot:
            slot = make_slot(image, ring_fd, queue)
            self._answer_ocalls(slot.lanes)
            return slot

        try:
            client = _shared.acquire(state, image.expect(debug))
            failed.callback(_shared.release, client)
            launched, pidfd = client.launch(
                image.fd,
                ring_fd,
                debug=debug,
                require=require,
                meanwhile=lambda: _resolve(made, make),
            )
        finally:
            os.close(ring_fd)
        failed.pop_all()
        self._held = Held(client, launched=launched, pidfd=pidfd)
        failed.callback(self._held.end)
        self._use(made.result())

    def _take(self, failed: contextlib.ExitStack, reserve: Reserve) -> None:
        started = reserve.launch()
        self._held = Held(started.client, launched=started.launched, pidfd=started.pidfd)
        failed.callback(self._held.end)
        self._use(started.slot)
        self._answer_ocalls(self.lanes)

    def _adopt(self, failed: contextlib.ExitStack, begun: Begun) -> None:
        self._held = begun.held
        failed.callback(self._held.end)
        self._use(begun.slot)
        self._answer_ocalls(self.lanes)

    def _use(self, slot: Slot) -> None:
        self._owner, self.lanes = slot.owner, slot.lanes
        self.functions, self.launch = slot.functions, slot.launch

    def _answer_ocalls(self, lanes: _core.HostLanes) -> None:
        image = self._image
        if image.ocalls:
            limit = image.info.message_limit
            table = _ocalls.make_table(image.ocalls, self._handlers, limit)
            lanes.set_ocalls(table, _ocalls.submit)

    def _await_start(self) -> None:
        """Wait until the entry's on_start functions have returned: then a lane answers."""
        try:
            self.lanes.request(_FRAME_PING, b"", _START_SECONDS)
        except CallTimeoutError:
            raise LaunchError(
                "the entry's on_start functions take too long",
                expected=f"at most {_START_SECONDS:g} s",
            ) from None
        except EnclavePoisonedError:
            raise
        except EnclaveStateError:
            why = self.client.why(self.enclave_id)
            raise LaunchError(
                f"the enclave did not start: {why.reason or 'it ended'}", type=why.type
            ) from None

    @functools.cached_property
    def info(self) -> EnclaveInfo:
        """What the platform says, read when somebody asks."""
        return _describe(self._image, self._settle())

    def _settle(self) -> Launched:
        """Return what the platform says of the launch, waiting for it."""
        try:
            launched = self._held.launched()
        except EnclaveError as error:
            self._refused(error)
            raise
        self.lanes.slice_ms = _SLICE_MS
        return launched

    def confirm(self) -> None:
        """Raise what the launch raises, unless a call did so before."""
        if self._ended is None:
            self._settle()

    def _refused(self, error: EnclaveError) -> None:
        """There is no enclave and never was."""
        lost = isinstance(error, EnclaveLostError)
        self._end_as("lost" if lost else "closed", functools.partial(copy.copy, error))

    def guard(self) -> None:
        """Raise if there is no worker to wait for."""
        ended = self._ended
        if ended is None and self._worker_ended():
            self._learn()
        ended = self._ended
        if ended is not None:
            raise ended()

    def _worker_ended(self) -> bool:
        held = self._held
        if not held.known:
            try:
                if not held.look():
                    return False
            except EnclaveError as error:
                self._refused(error)
                return False
            self.lanes.slice_ms = _SLICE_MS
        # A poll object of its own: one must not be used by two threads at once.
        poll = select.poll()
        poll.register(held.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _learn(self) -> None:
        """The worker's process ended: ask the platform why."""
        state, reason = "lost", ""
        with contextlib.suppress(EnclaveError):
            for _ in range(20):
                why = self.client.why(self.enclave_id)
                state, reason = why.state, why.reason
                if state != "running":
                    break
                time.sleep(0.01)  # the platform is about to notice as well
        if state == "poisoned":
            self._end_as(
                "poisoned", lambda: EnclavePoisonedError(f"the enclave is poisoned: {reason}")
            )
        else:
            text = f"the enclave's process ended: {reason}" if reason else ""
            self._end_as("lost", lambda: EnclaveLostError(text or "the enclave's process ended"))

    def _end_as(self, state: str, make: Callable[[], EnclaveError]) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = make
                self.launch.state = state
            else:
                state = "closed"  # and told before
        self.lanes.close()
        self._close_files()
        if state != "closed":
            told = (_one_line(self.name), state, _one_line(make().message))
            _log.error("the enclave %s is %s: %s", *told, extra={"enclave": self.name})

    def end_late(self, lane: int, epoch: int, seconds: float) -> None:
        """End the worker if the given-up call on *lane* has not returned."""
        with contextlib.suppress(EnclaveError):
            if self._ended is not None or not self.lanes.still_late(lane, epoch):
                return
            self.mark_late(seconds)
            self._finalizer()

    def mark_late(self, seconds: float) -> EnclaveError:
        """Refuse for ever, because a given-up call went on for *seconds*; ends nothing yet."""
        return self._mark(
            "lost",
            lambda: EnclaveLostError(
                "the enclave was ended: a call went on after its caller had stopped waiting",
                expected=f"a return within kill_after={seconds:g} s",
            ),
        )

    def mark_broken(self, check: str) -> EnclaveError:
        """Refuse for ever, because the worker broke the protocol; ends nothing yet."""
        return self._mark(
            "poisoned",
            lambda: EnclavePoisonedError(
                "the enclave is poisoned: its answer broke the call protocol", found=check
            ),
        )

    def mark_closed(self) -> EnclaveError:
        """Refuse for ever; ends nothing yet."""
        return self._mark("closed", lambda: EnclaveClosedError("the enclave was closed"))

    def _mark(self, state: str, make: Callable[[], EnclaveError]) -> EnclaveError:
        self._end_as(state, make)
        ended = self._ended
        return make() if ended is None else ended()

    def broken(self, check: str) -> EnclaveError:
        """The worker broke the protocol: end it and refuse for ever."""
        error = self.mark_broken(check)
        self._finalizer()
        return error

    def close(self) -> None:
        self.mark_closed()
        self._finalizer()


def _resolve(future: Future[Slot], make: Callable[[], Slot]) -> None:
    """Keep what *make* returns or raises."""
    try:
        future.set_result(make())
    except (EnclaveError, OSError, ValueError, MemoryError) as error:
        future.set_exception(error)  # whoever asks for the result hears of it, after the answer


def _report(enclave: str, functions: tuple[str, ...], index: int, error: BaseException) -> None:
    """Tell the host's log of an error that crossed: its type and id, never its text."""
    if isinstance(error, EcallError):
        function = functions[index] if index < len(functions) else str(index)
        fields = {"enclave": enclave, "function": function, "correlation": error.id}
        told = tuple(_one_line(text) for text in (function, enclave, error.type, error.id))
        _log.warning("%s of the enclave %s raised %s [%s]", *told, extra=fields)


def _one_line(text: str) -> str:
    """Return *text* without what would begin another line, or steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000])


def _finish(held: Held, pid: int, close_files: Callable[[], None]) -> None:
    if os.getpid() != pid:
        return
    held.end()
    close_files()


def _describe(image: _images.Prepared, launched: Launched) -> EnclaveInfo:
    record = ProtectionRecord.from_bytes(launched.record)
    info = image.info
    return EnclaveInfo(
        name=info.name,
        enclave_id=launched.enclave_id,
        pid=launched.pid,
        debug=launched.debug,
        mrenclave=launched.mrenclave,
        mrsigner=launched.mrsigner,
        product_id=info.product_id,
        security_version=info.security_version,
        threads=info.threads,
        functions=image.functions,
        level=record.level,
        protections={name: bit.value for name, bit in record.bits.items()},
        record=launched.record,
        runtime_public_key=launched.runtime_public_key,
    )
