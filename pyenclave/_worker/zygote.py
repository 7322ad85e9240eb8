"""
The zygote: one process a runtime lock, loaded and verified, that forks workers.

It never has a key, and it never runs code of an enclave. Packets with the platform (no decoder is
needed for them; see ``_platform/zygotes.py`` for the other end):

====== =============================================== =========================
from   bytes                                           descriptors
====== =============================================== =========================
zygote ``R`` seconds of reading NUL of importing       none; once, when it is ready
zygote ``E`` code NUL message NUL files                none
host   ``F``                                           image to prepare for, or none
zygote ``P`` pid (4 bytes, little-endian) namespaces   pidfd and socket of a spare
====== =============================================== =========================

Over a socket of its own it hands over compiled code (``codes.py``).

A *spare* is a process that waits to become a worker. The platform keeps it and, when a host wants
an enclave, gives it through its socket what a launch needs, without asking the zygote again.

====== =============================================== =========================
host   ``W``: a launch may follow at once              none
host   ``S``                                           image, ring, worker's channel
host   ``A``: the image is the one prepared for        image, ring, worker's channel
spare  ``B``: it has them; read if it ended early      none
====== =============================================== =========================
"""

from __future__ import annotations

import contextlib
import gc
import linecache
import os
import select
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from pyenclave import _native
from pyenclave._worker import files
from pyenclave._worker.codes import CodeWriter, compile_ahead, sources_of
from pyenclave._worker.importer import failure
from pyenclave._worker.mappings import check_mappings, check_modules
from pyenclave._worker.rehearsal import rehearsal_image
from pyenclave._worker.standby import stand_by
from pyenclave._worker.trampolines import accept_trampolines, hold_trampolines
from pyenclave.calls.channel import close_all
from pyenclave.errors import EnclaveError, LaunchError, RuntimeLockError
from pyenclave.formats.lock import Lock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyenclave._worker.importer import Locked

__all__ = ["Zygote", "serve"]

_QUIET_MS = 1000  # without a request, before sources are compiled ahead

_MAX_PACKET = 64


def serve(control: int, locked: Locked, seconds: tuple[float, float], wanted: int = -1) -> NoReturn:
    """
    Check what was loaded, say that the zygote is ready, and fork workers until the platform ends.

    Args:
        control: Descriptor of the socket to the platform.
        locked: What the importer verified.
        seconds: How long reading and importing took, for the platform's log.
        wanted: Descriptor of the socket for compiled code; -1: the platform wants none.

    Raises:
        RuntimeLockError: The process holds a file or module that is not in the lock.
        LaunchError: The process cannot serve as a zygote; the message says why.

    """
    files.install(locked)
    zygote = Zygote(control, locked, wanted)
    zygote.settle()
    zygote.check()
    warm_up()
    zygote.check()
    _quiet_down(locked)
    zygote.rehearsal = rehearsal_image(locked)
    gc.collect()
    gc.freeze()
    gc.disable()
    zygote.socket.send(f"R{seconds[0]:.6f}\0{seconds[1]:.6f}".encode())
    zygote.loop()


class Zygote:
    """State of this process besides what is loaded."""

    def __init__(self, control: int, locked: Locked, wanted: int = -1) -> None:
        self.locked = locked
        self.wanted = wanted
        self.socket = socket.socket(fileno=control)
        self.socket.setblocking(True)
        self.parent = os.pidfd_open(locked.platform)
        self.workers: dict[int, int] = {}  # pidfd: pid
        self.rehearsal = b""

    def settle(self) -> None:
        """Undo whatever odd state was inherited, and tie this process to the platform's life."""
        _native.reset_signals()
        _native.harden_early(parent=self.locked.platform)
        os.umask(0o077)
        self.locked.held = hold_trampolines()
        keep = [0, 1, 2, self.socket.fileno(), self.parent, self.locked.sources, *self.locked.held]
        _native.close_fds((*keep, self.wanted) if self.wanted >= 0 else tuple(keep))
        accept_trampolines(self.locked)

    def check(self) -> None:
        """
        Check the lock's own bytes, modules, mappings and threads.

        Raises:
            RuntimeLockError: Something is loaded that the lock does not list.
            LaunchError: There are threads: a fork would lose them.

        """
        _check_table(self.locked)
        check_modules(self.locked)
        check_mappings(None, self.locked)
        threads = _native.thread_count()
        if threads != 1:
            raise LaunchError("the zygote has threads", expected=1, found=threads)

    def loop(self) -> NoReturn:
        """Serve requests and reap workers; ends with the platform."""
        chores: Iterator[None] | None = self._chores()
        wait = _QUIET_MS
        while True:
            poll = select.poll()
            for fd in (self.socket.fileno(), self.parent, *self.workers):
                poll.register(fd, select.POLLIN)
            ready = poll.poll(wait if chores is not None else None)
            # Who launches must not wait behind this: it begins, and goes on, in quiet moments.
            wait = _QUIET_MS if ready else 0
            if not ready and chores is not None:
                try:
                    next(chores)
                except StopIteration:
                    chores = None
            for fd, _ in ready:
                if fd == self.parent:
                    os._exit(0)
                elif fd == self.socket.fileno():
                    self._request()
                else:
                    self._reap(fd)

    def _chores(self) -> Iterator[None]:
        """What is done between requests, in small steps."""
        locked = self.locked
        sources = sources_of(locked)
        writer = None
        if self.wanted >= 0:
            writer = CodeWriter(locked, self.wanted)
        # First what every start needs, so that the next one has it if this one does not last long.
        for entry in [entry for entry in sources if entry.name in sys.modules]:
            if writer is not None:
                writer.add(entry)
            entry.code = None
            yield
        locked.keep_code = False
        if writer is not None:
            writer.send()
        # Compiling is most of what importing a large package takes.
        for entry in [entry for entry in sources if entry.name not in sys.modules]:
            compile_ahead(locked, entry)
            if writer is not None:
                writer.add(entry)
            yield
        if writer is not None:
            writer.send()
            writer.close()

    def _reap(self, pidfd: int) -> None:
        pid = self.workers.pop(pidfd)
        os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    def _request(self) -> None:
        fds: list[int] = []
        try:
            data, fds, flags, _ = socket.recv_fds(
                self.socket, _MAX_PACKET, 8, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                os._exit(0)
            if data != b"F" or len(fds) > 1 or flags & socket.MSG_CTRUNC:
                raise LaunchError("malformed request to the zygote")
            self._fork(fds[0] if fds else None)
        except EnclaveError as error:
            self.socket.send(failure(error.code, str(error), []))
        except OSError as error:
            self.socket.send(failure("launch", f"cannot start a worker: {error}", []))
        finally:
            close_all(fds)

    def _fork(self, image_fd: int | None) -> None:
        """
        Fork a spare and hand it over.

        Most of a launch is the kernel copying pages that parent and child shared until then. A
        spare does that, and everything else that comes before an enclave's own code, before it is
        asked for.

        Args:
            image_fd: An image that it prepares for, None for none.

        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                spawned = _native.spawn()
                if spawned.pid == 0:
                    # Nothing of the zygote's stack may run in the worker.
                    try:
                        stand_by(
                            theirs.detach(),
                            image_fd,
                            locked=self.locked,
                            rehearsal=self.rehearsal,
                        )
                    finally:
                        os._exit(70)
            self.workers[spawned.pidfd] = spawned.pid
            data = b"P" + spawned.pid.to_bytes(4, "little") + ",".join(spawned.namespaces).encode()
            socket.send_fds(self.socket, [data], [spawned.pidfd, ours.fileno()])


def _check_table(locked: Locked) -> None:
    """Compare the table that was loaded from with the lock itself, now that there is a decoder."""
    if locked.locks:
        return
    lock = Lock.from_bytes(locked.lock)
    expected: set[tuple[str, str, str]] = {(m.name, m.kind, m.sha256) for m in lock.modules}
    expected |= {(x.soname, "library", x.sha256) for x in lock.libraries}
    entries = [*locked.modules.values(), *locked.libraries.values()]
    found = {(entry.name, entry.kind, entry.sha256) for entry in entries}
    hashes = sorted(file.sha256 for file in lock.bootstrap)
    if (
        found != expected
        or hashes != sorted(entry.sha256 for entry in locked.bootstrap.values())
        or sorted(file.sha256 for file in lock.data)
        != sorted(entry.sha256 for entry in locked.data.values())
        or locked.preload != list(lock.preload)
        or locked.python != lock.python
    ):
        raise RuntimeLockError("the zygote was not loaded from this lock")
    locked.locks[lock.digest] = lock


def warm_up() -> None:
    """
    Do once what each worker would pay for after the fork.

    OpenSSL fetches its algorithms at first use, 12 ms; the key made here is dropped and nothing
    derives from it.
    """
    from cryptography.hazmat.primitives import hpke
    from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

    key = hpke.MLKEM768X25519PrivateKey(
        mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
    )
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    suite.decrypt(suite.encrypt(b"", key.public_key(), b""), key, b"")


def _quiet_down(locked: Locked) -> None:
    """Keep tracebacks from reading files; outside debug, keep them from being written at all."""

    def update(filename: str, module_globals: dict[str, Any] | None = None) -> list[str]:
        if not locked.debug:
            return []
        for entry in locked.modules.values():
            if entry.path == filename and entry.kind in ("module", "package"):
                text = locked.source(entry).decode("utf-8", "replace")
                lines = text.splitlines(keepends=True)
                linecache.cache[filename] = (len(text), None, lines, filename)
                return lines
        return []

    linecache.updatecache = update
    linecache.checkcache = lambda filename=None: None
    if not locked.debug:
        # Also where pdb is on the lock list: there is nobody to talk to.
        sys.breakpointhook = lambda *arguments, **options: None
        sys.excepthook = lambda kind, value, traceback: None
        sys.unraisablehook = lambda unraisable: None
        threading.excepthook = lambda arguments: None
