"""
A spare: a process that the zygote forked ahead of time and that waits to become a worker.

It does what needs no launch: hardening, fresh randomness, secret memory, reading an image that is
likely to be launched, and closing the file system. It has no identity and no key, and it runs
nothing of an image. What it rehearses it does with data that means nothing and drops.
"""

from __future__ import annotations

import contextlib
import os
import socket
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from pyenclave import _native
from pyenclave._core import SecretMemory
from pyenclave._worker import dispatch
from pyenclave._worker.entry import EntryLoader
from pyenclave._worker.main import Prepared, Start, Worker, run
from pyenclave._worker.mappings import check_mappings, foreign_mappings
from pyenclave._worker.reseed import reseed
from pyenclave.calls import ring
from pyenclave.calls.channel import Channel
from pyenclave.calls.signature import functions_of
from pyenclave.formats import messages
from pyenclave.formats.image import FileEntry, Image, ImageInfo, assemble
from pyenclave.sealed.provision import RuntimeKey
from pyenclave.trusted import _runtime

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["rehearsal_image", "stand_by"]

_LAUNCH_FDS = 3


def stand_by(sock_fd: int, image_fd: int | None, *, locked: Locked, rehearsal: bytes) -> NoReturn:
    """
    Wait, in a child that the zygote has just forked, to become a worker; never returns.

    Args:
        sock_fd: Where the platform will send image, ring and channel.
        image_fd: An image that is likely to be launched: a write-sealed memfd that the platform
            judged. It is read now; nothing of it is executed before it is launched.
        locked: What the zygote verified.
        rehearsal: An image that does nothing.

    """
    early = _native.harden_early()
    # A new user namespace gave this process every capability inside it.
    _native.drop_capabilities()
    _native.close_fds((0, 1, 2, sock_fd, locked.sources, *([] if image_fd is None else [image_fd])))
    reseed()
    memory = SecretMemory(_runtime.SECRET_SIZE)
    with contextlib.suppress(Exception):
        rehearse(rehearsal, locked)
    prepared = None
    if image_fd is not None:
        with contextlib.suppress(Exception):
            prepared = Prepared(image_fd, locked)
        os.close(image_fd)
    start = Start(early=early, memory=memory, maps=_native.open_mappings())
    try:
        # Before the first line of any image's code: whatever it imports or runs while it loads
        # finds no file of this user, neither to read nor to write nor to map.
        _native.sandbox_before_threads()
        files = {prepared.identity} if prepared is not None else ()
        check_mappings(start.maps, locked, data=files)
    except Exception as error:
        start.error = error  # whoever launches this worker hears of it
    with socket.socket(fileno=sock_fd) as sock:
        data, fds, _, _ = socket.recv_fds(sock, 1, _LAUNCH_FDS, socket.MSG_CMSG_CLOEXEC)
        if data not in (b"S", b"A") or len(fds) != _LAUNCH_FDS:
            os._exit(0)  # the platform ended
        # From here on this process is the worker; without a word, the launch takes another one.
        sock.send(b"B")
    if data == b"A":
        start.prepared = prepared
    prepared = None  # if another image came, this unmaps what was read
    run(*fds, locked=locked, start=start)


def rehearse(data: bytes, locked: Locked) -> None:
    """
    Do what a start does, with an image that does nothing, and drop the result.

    The process gets its own copy of the pages that this writes to, and its page table the entries
    of those that it reads: up to three microseconds for each of a thousand, which the launch then
    does not wait for.
    """
    image = Image.parse(data, locks=locked.locks)
    info = image.info
    entry = ModuleType(info.entry_module)
    exec(EntryLoader(image).get_code(entry.__name__), entry.__dict__)  # noqa: S102 - our own
    foreign_mappings(set(_native.mapping_lines()) - locked.accepted, locked)
    table = dispatch.build_table(entry, info)
    ring_fd = ring.create(info.threads, shared=info.shared_memory)
    ours, theirs = Channel.pair()
    with ours, theirs:
        worker = Worker(theirs, ring_fd, locked)
        worker.idle()
        ours.send(messages.Closed(inside={"rehearsal": True}, secret_memory=""))
        theirs.receive(1)
        identity = messages.Identity(
            enclave_id=bytes(16),
            body=bytes(384),
            debug=False,
            level="",
            record=b"",
            seed=bytes(32),
        )
        theirs.send(identity)
        ours.receive(1)
        _runtime.Runtime(theirs, identity, info, key=RuntimeKey()).wipe()
        dispatch.open_lane(ring_fd, table, 0)
    os.close(ring_fd)


def rehearsal_image(locked: Locked) -> bytes:
    """Return an image that does nothing, for a spare to start before there is a real one."""
    source = (
        b"from __future__ import annotations\n"
        b"import numpy as np\n"
        b"import pyenclave\n"
        b"@pyenclave.ecall\n"
        b"def nothing(x: int, y: bytes = b'', *, z: list[float] | None = None) -> np.ndarray:\n"
        b"    return np.zeros(x)\n"
    )
    name = "entry/pyenclave_rehearsal.py"
    module = ModuleType("pyenclave_rehearsal")
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - our own
    info = ImageInfo(
        name="rehearsal",
        product_id=0,
        security_version=0,
        debug=True,
        threads=1,
        entry_kind="python",
        entry_module="pyenclave_rehearsal",
        entry_file=name,
        functions=tuple(functions_of(module)),
        sealed_memory=0,
        message_limit=1,
        ocalls=(),
        blas_threads=1,
        jit=False,
        seal={},
        files=(FileEntry(name=name, size=len(source), executable=True),),
    )
    (lock,) = locked.locks.values()
    return assemble(info, lock, {name: source})
