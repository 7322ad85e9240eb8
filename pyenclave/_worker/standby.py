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
import time
from typing import TYPE_CHECKING, NoReturn

from pyenclave import _native
from pyenclave._core import SecretMemory
from pyenclave._worker.main import Prepared, Start, Worker, run
from pyenclave._worker.mappings import check_mappings
from pyenclave._worker.rehearsal import rehearse
from pyenclave._worker.reseed import reseed
from pyenclave.calls.channel import Channel, close_all
from pyenclave.trusted import _runtime

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["stand_by"]

_LAUNCH_FDS = 3
# Seconds to look for a launch before this sleeps again, if the platform has a processor besides.
_AWAKE = 0.001 if len(os.sched_getaffinity(0)) > 1 else 0.0


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
    image = () if image_fd is None else (image_fd,)
    _native.close_fds((0, 1, 2, sock_fd, locked.sources, *locked.held, *image))
    reseed()
    memory = SecretMemory(_runtime.SECRET_SIZE)
    memory.write(0, bytes(_runtime.SECRET_SIZE))  # its page is made now
    with contextlib.suppress(Exception):
        rehearse(rehearsal, locked)
        _rehearse_request()
    prepared = None
    if image_fd is not None:
        with contextlib.suppress(Exception):
            prepared = Prepared(image_fd, locked)
        os.close(image_fd)
    worker = Worker(locked)
    start = Start(early=early, memory=memory, maps=_native.open_mappings())
    try:
        # Before the first line of any image's code: whatever it imports or runs while it loads
        # finds no file of this user, neither to read nor to write nor to map.
        _native.sandbox_before_threads()
        files = {prepared.identity} if prepared is not None else ()
        check_mappings(start.maps, locked, data=files)
    except Exception as error:
        start.error = error  # whoever launches this worker hears of it
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, sock_fd) as sock:
        data, fds = _request(sock)
        if data not in (b"S", b"A") or len(fds) != _LAUNCH_FDS:
            os._exit(0)  # the platform ended
        # From here on this process is the worker. Nobody waits for this word: if the process ends,
        # the platform finds it, or takes another one.
        with contextlib.suppress(OSError):  # it is gone, or does not want to know
            sock.send(b"B")
    if data == b"A":
        start.prepared = prepared
    prepared = None  # if another image came, this unmaps what was read
    run(worker, *fds, start=start)


def _request(sock: socket.socket) -> tuple[bytes, list[int]]:
    """
    Wait for what this process is to become, and return it with its descriptors.

    The platform says ``W`` when a host asks for an enclave, before it has looked at what it asks
    for. To wake takes this process as long as that; then it looks for the launch for a moment.
    """
    awake = 0.0
    while True:
        flags = socket.MSG_CMSG_CLOEXEC | (socket.MSG_DONTWAIT if awake else 0)
        try:
            data, fds, _, _ = socket.recv_fds(sock, 1, _LAUNCH_FDS, flags)
        except BlockingIOError:
            os.sched_yield()
            if time.monotonic() > awake:
                awake = 0.0
            continue
        if data != b"W":
            return data, fds
        close_all(fds)
        awake = time.monotonic() + _AWAKE


def _rehearse_request() -> None:
    """Be asked, as :func:`stand_by` is, by nobody."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(b"W")
        socket.send_fds(ours, [b"S"], [ours.fileno()] * _LAUNCH_FDS)
        kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
        with socket.socket(*kind, 0, theirs.detach()) as sock:
            _, fds = _request(sock)
            sock.send(b"B")
        with Channel.from_fd(fds.pop()):
            close_all(fds)
