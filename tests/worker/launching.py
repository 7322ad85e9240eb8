"""A platform for tests: launches workers of real images from a real zygote."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from pathlib import Path
from types import ModuleType
from typing import Self

from msgspec.structs import replace

from pyenclave import _core
from pyenclave._memfd import sealed as sealed_memfd
from pyenclave._platform.zygotes import Spawned, Zygotes
from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.calls.channel import Channel
from pyenclave.calls.signature import Signature, functions_of
from pyenclave.errors import EnclaveLostError
from pyenclave.formats import messages
from pyenclave.formats.image import FileEntry, Image, ImageInfo, assemble
from pyenclave.formats.lock import Lock
from pyenclave.host._options import Options
from pyenclave.host._run import token
from pyenclave.host.handle import Functions
from pyenclave.image.build import build, build_script

__all__ = [
    "Channel",
    "Image",
    "Launched",
    "build",
    "ended",
    "identity",
    "make",
    "replace",
    "ring",
    "sealed_memfd",
]
__all__ += ["take_lock"]

PREAMBLE = "from __future__ import annotations\nimport pyenclave\n"


def take_lock(folder: Path, source: str) -> Lock:
    """Return the lock of a script: the closure, taken by importing."""
    path = folder / "closure.py"
    path.write_text(PREAMBLE + source, encoding="utf-8")
    return Image.parse(build_script(path)).lock


def make(lock: Lock, source: str, *, functions: bool = True, **changes: object) -> bytes:
    """Return the image of an entry, without the second that taking its closure takes."""
    data = (PREAMBLE + source).encode()
    name = "entry/probe.py"
    module = ModuleType("probe")
    if functions:
        exec(compile(data, name, "exec"), module.__dict__)
    info = ImageInfo(
        name="probe",
        product_id=1,
        security_version=1,
        debug=True,
        threads=1,
        entry_kind="python",
        entry_module="probe",
        entry_file=name,
        functions=tuple(functions_of(module)) if functions else (),
        sealed_memory=1 << 20,
        message_limit=1 << 20,
        ocalls=(),
        blas_threads=1,
        jit=False,
        seal={},
        files=(FileEntry(name=name, size=len(data), executable=True),),
    )
    return assemble(replace(info, **changes), lock, {name: data})


def identity(*, debug: bool) -> messages.Identity:
    """Return an identity such as the platform would give."""
    body = bytearray(384)
    struct.pack_into("<Q", body, 48, 0x05 | (0x02 if debug else 0))
    body[64:96] = bytes(range(32))
    return messages.Identity(
        enclave_id=os.urandom(16),
        body=bytes(body),
        debug=debug,
        level="embedded",
        record=b"{}",
        seed=os.urandom(32),
    )


def give_output(channel: Channel) -> None:
    """Send what a debug worker wants first: where to print to (our stderr) and to ask, nobody."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        channel.send(messages.Output(wait=0), (2, theirs.fileno()))


def ended(pidfd: int, seconds: float) -> bool:
    """Whether a process ends within *seconds*."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Launched:
    """A worker, and this process's ends of its channel and ring."""

    def __init__(self, zygotes: Zygotes, image: bytes, *, debug: bool = True) -> None:
        self.image = Image.parse(image)
        self.lanes: _core.HostLanes | None = None
        self.debug = debug
        zygote = zygotes.get(self.image.lock_bytes, debug=debug)
        self.channel, theirs = Channel.pair()
        self.ring_fd = ring.create(self.image.info.threads)
        image_fd = sealed_memfd("test-image", image)
        if debug:
            give_output(self.channel)
        try:
            self.spawned: Spawned = zygote.spawn(
                image_fd=image_fd, ring_fd=self.ring_fd, channel_fd=theirs.fileno(), debug=debug
            )
            self.spawned.forget()
        finally:
            theirs.close()
            os.close(image_fd)

    @property
    def pid(self) -> int:
        return self.spawned.pid

    def first(self) -> messages.Message:
        """Return the worker's next message; that it may be tried from outside is none."""
        message = self.next()
        return self.next() if isinstance(message, messages.Shut) else message

    def next(self) -> messages.Message:
        """Return the worker's next message."""
        return self.channel.receive(20)[0]

    def run(self) -> messages.Closed:
        """Bring the worker to where it serves calls."""
        closed = self.first()
        assert isinstance(closed, messages.Closed), closed
        self.ready()
        self.identify()
        return closed

    def ready(self) -> messages.Ready:
        """Return the worker's word that it has a runtime key, which it says unasked."""
        ready = self.next()
        assert isinstance(ready, messages.Ready), ready
        return ready

    def identify(self, **changes: object) -> None:
        """Send the worker an identity."""
        self.channel.send(replace(identity(debug=self.debug), **changes))

    def function(self, name: str, *, timeout: float = 30):
        """Return an ecall, as the host would call it."""
        info = self.image.info

        def guard() -> None:
            if ended(self.spawned.pidfd, 0):
                raise EnclaveLostError("the worker ended")

        if self.lanes is None:  # a second handle on one ring would speak out of turn
            self.lanes = _core.HostLanes(
                ring.map_ring(self.ring_fd, info.threads),
                token(),
                info.threads,
                ring.DEFAULT_SLOT,
                info.message_limit,
                guard,
                RuntimeError,
                call_errors.from_frame,
                threading.Condition(),
                16,
            )
        signatures = tuple(Signature.from_wire(item) for item in info.functions)
        return Functions(signatures, self.lanes, Options(timeout=timeout)).named(name)

    def close(self) -> None:
        self.channel.close()
        assert ended(self.spawned.pidfd, 30)
        os.close(self.spawned.pidfd)
        os.close(self.ring_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
