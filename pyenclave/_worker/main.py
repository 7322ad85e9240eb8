"""
The worker: from the fork to serving calls.

The order is the point (design, section 3): harden, seed again, import the entry, close the
sandbox, try it; only then identity and keys. Whatever fails before the worker runs is told to the
platform as ``Ending``; a broken protocol or a failed integrity check ends it as ``Poisoned``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import select
import sys
import threading
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, NoReturn

from pyenclave import _core, _native
from pyenclave._core import SecretMemory
from pyenclave._worker import dispatch, output
from pyenclave._worker.entry import EntryLoader, load_entry, set_blas_threads
from pyenclave._worker.life import Life
from pyenclave._worker.mappings import check_mappings
from pyenclave._worker.reseed import reseed_openssl
from pyenclave.calls.channel import Channel, close_all
from pyenclave.calls.errors import cut
from pyenclave.calls.signature import compile_annotations
from pyenclave.errors import (
    EnclaveError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    LaunchError,
    RuntimeLockError,
)
from pyenclave.formats import messages
from pyenclave.formats.image import Image, ImageInfo
from pyenclave.sealed.provision import RuntimeKey
from pyenclave.trusted import _runtime

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["Prepared", "Start", "Worker", "run"]

_SPIN = 0.002  # seconds to look for an identity that was announced
_WAIT = 5.0  # seconds of one look whether the platform sent an identity
# Seconds between two looks of a lane that nobody uses. No end waits for them: the kernel kills a
# worker whose zygote ends, and that ends with the platform, which kills workers itself.
_PATIENCE = 2.0
# Said by the handler of faults itself, when a page is not as it was sealed.
_LAST_WORDS = messages.encode(
    messages.Poisoned(reason="a page of its sealed memory was changed from outside")
)
_NOBODY = messages.encode(
    messages.Identity(
        enclave_id=bytes(16), body=bytes(384), debug=False, level="", record=b"", seed=bytes(32)
    )
)
_TEXT = 8 * 1024  # bytes of the longest message that is told to the platform


class Prepared:
    """
    An image as this process read it, and the code of its entry.

    Args:
        fd: A write-sealed memfd: nobody changes it afterwards.
        locked: What the zygote verified.

    Attributes:
        identity: (device, inode) of the memfd, which stays mapped.
        image: The image.
        code: The entry's code; None if it is native, or no Python.
        measured: The functions that it says it has; None if it says no such thing.

    Raises:
        ImageError: It is not an image.

    """

    def __init__(self, fd: int, locked: Locked) -> None:
        _native.check_memfd(fd, seals=_native.SEALED)
        data = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.identity = _identity(fd)
        self.image = Image.parse(data, locks=locked.locks)
        self.code: CodeType | None = None
        if self.image.info.entry_kind == "python":
            # What is no Python fails when it is launched.
            with contextlib.suppress(Exception):
                self.code = EntryLoader(self.image).get_code(self.image.info.entry_module)
                compile_annotations(self.code)
        self.measured: dispatch.Measured | None = None
        with contextlib.suppress(EnclaveError):  # when it is launched this is told
            self.measured = dispatch.Measured(self.image.info)


@dataclass(slots=True, kw_only=True)
class Start:
    """
    What a spare did before it became a worker.

    Attributes:
        early: What hardening this process right after the fork found.
        memory: Fresh secret memory, for the launch secret; the platform sees that it is locked.
        maps: A descriptor of this process's mappings.
        prepared: The image, if it was read before.
        error: Why the file system could not be closed.

    """

    early: dict[str, bool]
    memory: SecretMemory
    maps: int
    prepared: Prepared | None = None
    error: Exception | None = None


def run(worker: Worker, image_fd: int, ring_fd: int, channel_fd: int, *, start: Start) -> NoReturn:
    """
    Be a worker; never returns.

    Args:
        worker: The worker, which has nothing yet.
        image_fd: The image, a write-sealed memfd.
        ring_fd: The rings, a size-sealed memfd.
        channel_fd: The channel to the platform.
        start: What was done before.

    """
    worker.connect(Channel.from_fd(channel_fd), ring_fd)
    try:
        worker.start(image_fd, start)
        worker.serve()
    except EnclaveLostError:
        pass  # the platform is gone, and so is whoever might hear why
    except EnclavePoisonedError as error:
        worker.poisoned(error)
    except BaseException as error:
        worker.failed(error)
    os._exit(0)


class Worker:
    """State of this process; one a process. Its channel and ring come with :meth:`connect`."""

    channel: Channel
    ring_fd: int

    def __init__(self, locked: Locked) -> None:
        self.locked = locked
        self.table: dispatch.Table | None = None
        self.go = threading.Event()
        self.threads: list[threading.Thread] = []
        self.running = False
        self.life = Life(None, debug=locked.debug)
        self._lane_0: _core.WorkerLane | None = None
        self._hangup = select.poll()

    def connect(self, channel: Channel, ring_fd: int) -> None:
        """Take the channel to the platform, and the ring that it is to serve."""
        self.channel = channel
        self.ring_fd = ring_fd
        self._hangup.register(channel.fileno(), 0)

    # ---- start --------------------------------------------------------------------------------

    def start(self, image_fd: int, start: Start) -> None:
        """
        Do everything up to taking the identity.

        Raises:
            EnclaveError: A check failed; nothing secret was received yet.

        """
        if self.locked.debug:
            self._redirect()
        if start.error is not None:
            raise start.error
        prepared = start.prepared or Prepared(image_fd, self.locked)
        os.close(image_fd)
        image = prepared.image
        info = image.info
        if image.lock_digest not in self.locked.locks:
            raise RuntimeLockError(
                "the image has another lock than its zygote",
                expected=" ".join(digest.hex() for digest in self.locked.locks),
                found=image.lock_digest.hex(),
            )
        entry = load_entry(image, self.locked, prepared.code)
        if self.locked.debug:
            self._keep_records()
        self.table = dispatch.build_table(entry, info, prepared.measured)
        inside = self._close(info)
        self.channel.send(messages.Shut())
        inside.update({name: inside.get(name, True) and ok for name, ok in start.early.items()})
        self._lane_0 = dispatch.open_lane(self.ring_fd, self.table, 0)
        files = {_identity(self.ring_fd), prepared.identity}
        check_mappings(start.maps, self.locked, jit=info.jit, data=files)
        inside["mappings"] = True
        os.close(start.maps)
        self.channel.send(
            messages.Closed(inside=inside, secret_memory=_native.secret_memory_kind())
        )
        self.life = Life(entry, debug=self.locked.debug)
        self.take_identity(info, start)

    def _redirect(self) -> None:
        output.redirect(self.channel)
        faulthandler.enable()

    def _keep_records(self) -> None:
        output.keep_records()

    def take_identity(self, info: ImageInfo, start: Start) -> None:
        """
        Make the runtime key, say that this worker is ready, and wait for what it is.

        The platform may have sent the identity meanwhile, or sends it to a warm worker when
        somebody asks for an enclave, if ever: until then the channel's end is all that ends this.
        What the entry starts with runs afterwards: it may ask for keys.

        Raises:
            EnclaveError: The platform sent something else, or an identity that is none; or the
                entry refuses to start.

        """
        key = RuntimeKey()
        self.channel.send(
            messages.Ready(
                runtime_public_key=key.public,
                starting=self.life.starting,
                grace=self.life.grace,
            )
        )
        identity, fds = self._await(info, start.memory, key)
        if not isinstance(identity, messages.Identity) or fds:
            raise EnclaveStateError(
                "protocol with the platform is broken",
                expected="Identity",
                found=type(identity).__name__,
            )
        reseed_openssl(identity.seed)
        if info.sealed_memory:
            _core.heap_ends(self.channel.fileno(), _LAST_WORDS)
        _runtime.start(self.channel, identity, info, start.memory, key)
        gc.enable()
        self.running = True
        self.life.begin()

    def _await(
        self, info: ImageInfo, memory: SecretMemory, key: RuntimeKey
    ) -> tuple[messages.Message, list[int]]:
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        bell = -1
        while True:
            while not (ready := poll.poll(_WAIT * 1000)):
                pass  # its other end is the platform's alone: it closes with the platform
            if ready == [(bell, select.POLLIN)]:
                with contextlib.suppress(BlockingIOError):  # the host took the ring back
                    os.eventfd_read(bell)
            else:
                message, fds = self.channel.receive(_WAIT)
                if not isinstance(message, messages.Soon):
                    break
                if fds:
                    # Kept warm: what the entry made is looked through now, and not in somebody's
                    # first call.
                    gc.collect(0)
                    self._limber_up(info, memory, key)
                    bell = fds[0]
                    poll.register(bell, select.POLLIN)
                    continue
            if not self.channel.readable():
                self._limber_up(info, memory, key)
            with contextlib.suppress(TimeoutError):
                message, fds = self.channel.receive(_SPIN, spin=_SPIN)
                if not isinstance(message, messages.Soon):
                    break
                close_all(fds)
        if bell >= 0:
            os.close(bell)
        return message, fds

    def _limber_up(self, info: ImageInfo, memory: SecretMemory, key: RuntimeKey) -> None:
        """Do what follows the identity, with one that means nothing, and drop what comes of it."""
        reseed_openssl()
        identity = messages.decode(_NOBODY)
        if isinstance(identity, messages.Identity):
            _runtime.Runtime(self.channel, identity, info, memory, key)

    def _close(self, info: ImageInfo) -> dict[str, bool | int]:
        """Close the rest of the sandbox around all threads that there will be."""
        set_blas_threads(info.blas_threads)
        for lane in range(1, info.threads):
            thread = threading.Thread(target=self._lane, args=(lane,), daemon=True)
            self.threads.append(thread)
            thread.start()
        return _native.sandbox_after_threads(jit=info.jit, sealed=info.sealed_memory > 0)

    # ---- serving ------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve calls in every lane until the platform's end of the channel is gone."""
        if self.threads:
            self.go.set()
        self._serve_lane(0)

    def forget_lane(self) -> None:
        """Let go of the ring, after a rehearsal."""
        self._lane_0 = None

    def _lane(self, lane: int) -> None:
        self.go.wait()
        try:
            self._serve_lane(lane)
        except EnclavePoisonedError as error:
            self.poisoned(error)
        except BaseException as error:
            self.failed(error)
        os._exit(0)

    def _serve_lane(self, lane: int) -> None:
        if self.table is None:
            raise EnclaveStateError("the worker has not started")
        dispatch.serve(
            self.ring_fd,
            self.table,
            lane=lane,
            idle=self.idle,
            poisoned=self.poisoned,
            opened=self._lane_0 if lane == 0 else None,
            patience=_PATIENCE,
        )

    def idle(self) -> bool:
        """Whether to go on waiting: the platform still holds its end of the channel."""
        return not self._hangup.poll(0)

    # ---- last words ---------------------------------------------------------------------------

    def poisoned(self, error: EnclavePoisonedError) -> NoReturn:
        """Tell why, and end; what secrets there are go with the process's memory."""
        with contextlib.suppress(Exception):
            _runtime.stop()
        with contextlib.suppress(BaseException):
            self.channel.send(messages.Poisoned(reason=cut(str(error), _TEXT)))
        os._exit(3)

    def failed(self, error: BaseException) -> NoReturn:
        """Tell what failed, and end."""
        with contextlib.suppress(Exception):
            _runtime.stop()
        if self.locked.debug:
            with contextlib.suppress(Exception):
                sys.excepthook(type(error), error, error.__traceback__)
        with contextlib.suppress(BaseException):
            self.channel.send(_ending(error, debug=self.locked.debug, running=self.running))
        os._exit(4)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _ending(error: BaseException, *, debug: bool, running: bool) -> messages.Ending:
    """
    Describe an error for the platform.

    Before the worker runs it has no secrets, and its own checks may speak in full; the text of any
    other exception crosses in debug only.
    """
    if isinstance(error, EnclaveError):
        files = tuple(cut(line, 512) for line in getattr(error, "files", ())[:64])
        code, text = error.code, EnclaveError.__str__(error)
    elif isinstance(error, ModuleNotFoundError):
        files = (cut(str(getattr(error, "module", "") or error.name), 512),)
        code, text = RuntimeLockError.code, str(error)
    else:
        files = ()
        code = "launch"
        text = type(error).__name__
        text = f"the entry could not be loaded: {text}: {error}" if debug or not running else text
    kind = error.type if isinstance(error, LaunchError) else ""
    return messages.Ending(code=code, message=cut(text, _TEXT), files=files, type=kind)
