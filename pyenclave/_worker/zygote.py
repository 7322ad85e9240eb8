"""
The zygote: one process a runtime lock, loaded and verified, that forks workers.

It never has a key, and it never runs code of an enclave. Packets with the platform (no decoder is
needed for them; see ``_platform/zygotes.py`` for the other end):

====== =============================================== =========================
from   bytes                                           descriptors
====== =============================================== =========================
zygote ``R`` seconds of reading NUL of importing       none; once, when it is ready
zygote ``E`` code NUL message NUL files                none
host   ``S``                                           image, ring, worker's channel
zygote ``P`` pid (4 bytes, little-endian) namespaces   pidfd of the worker
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
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from pyenclave import _native
from pyenclave._worker import main
from pyenclave._worker.importer import failure
from pyenclave._worker.mappings import check_mappings, check_modules
from pyenclave.calls.channel import close_all
from pyenclave.calls.signature import functions_of
from pyenclave.errors import EnclaveError, LaunchError, RuntimeLockError
from pyenclave.formats.image import FileEntry, ImageInfo, assemble
from pyenclave.formats.lock import Lock

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["Zygote", "serve"]

_MAX_PACKET = 64
_LAUNCH_FDS = 3
_SPARE_DELAY = 20  # milliseconds


def serve(control: int, locked: Locked, seconds: tuple[float, float]) -> NoReturn:
    """
    Check what was loaded, say that the zygote is ready, and fork workers until the platform ends.

    Args:
        control: Descriptor of the socket to the platform.
        locked: What the importer verified.
        seconds: How long reading and importing took, for the platform's log.

    Raises:
        RuntimeLockError: The process holds a file or module that is not in the lock.
        LaunchError: The process cannot serve as a zygote; the message says why.

    """
    zygote = Zygote(control, locked)
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

    def __init__(self, control: int, locked: Locked) -> None:
        self.locked = locked
        self.socket = socket.socket(fileno=control)
        self.socket.setblocking(True)
        self.parent = os.pidfd_open(locked.platform)
        self.workers: dict[int, int] = {}  # pidfd: pid
        self.spare: Spare | None = None
        self.rehearsal = b""

    def settle(self) -> None:
        """Undo whatever odd state was inherited, and tie this process to the platform's life."""
        _native.reset_signals()
        _native.harden_early(parent=self.locked.platform)
        os.umask(0o077)
        keep = (0, 1, 2, self.socket.fileno(), self.parent, self.locked.sources)
        _native.close_fds(keep)

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
        wanted = True  # a spare; made when the worker that was just started had its time
        while True:
            poll = select.poll()
            for fd in (self.socket.fileno(), self.parent, *self.workers):
                poll.register(fd, select.POLLIN)
            events = poll.poll(_SPARE_DELAY if wanted else None)
            if wanted and not events:
                wanted = False
                with contextlib.suppress(OSError, EnclaveError):
                    self.spare = self._fork()
            for fd, _ in events:
                if fd == self.parent:
                    os._exit(0)
                elif fd == self.socket.fileno():
                    self._request()
                    wanted = self.spare is None
                else:
                    self._reap(fd)

    def _reap(self, pidfd: int) -> None:
        pid = self.workers.pop(pidfd)
        if self.spare is not None and self.spare.pidfd == pidfd:
            self.spare.socket.close()
            self.spare = None
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
            if data != b"S" or len(fds) != _LAUNCH_FDS or flags & socket.MSG_CTRUNC:
                raise LaunchError("malformed request to the zygote")
            self._spawn(fds)
        except EnclaveError as error:
            self.socket.send(failure(error.code, str(error), []))
        except OSError as error:
            self.socket.send(failure("launch", f"cannot start a worker: {error}", []))
        finally:
            close_all(fds)

    def _spawn(self, fds: list[int]) -> None:
        """Give the descriptors to the spare, or to a new process if there is none that lives."""
        worker = self.spare
        self.spare = None
        if worker is None or not worker.alive():
            worker = self._fork()
        data = b"P" + worker.pid.to_bytes(4, "little") + ",".join(worker.namespaces).encode()
        # The answer first: once it has its descriptors, the worker competes for the processor. A
        # worker that ends before it takes them is a worker that ended, as the platform sees it.
        socket.send_fds(self.socket, [data], [worker.pidfd])
        worker.begin(fds)

    def _fork(self) -> Spare:
        """
        Fork a process that waits to become a worker.

        Most of a launch is the kernel copying pages that parent and child shared until then. A
        spare does that, and everything else that needs no image, before it is asked for.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            spawned = _native.spawn()
            if spawned.pid == 0:
                # Nothing of the zygote's stack may run in the worker.
                try:
                    main.stand_by(theirs.detach(), locked=self.locked, rehearsal=self.rehearsal)
                finally:
                    os._exit(70)
        self.workers[spawned.pidfd] = spawned.pid
        return Spare(ours, spawned)


class Spare:
    """A process that waits to become a worker."""

    def __init__(self, sock: socket.socket, spawned: _native.Spawned) -> None:
        self.socket = sock
        self.pid = spawned.pid
        self.pidfd = spawned.pidfd
        self.namespaces = spawned.namespaces

    def alive(self) -> bool:
        """Whether the process runs."""
        return not _native.pidfd_wait(self.pidfd, 0)

    def begin(self, fds: list[int]) -> None:
        """Hand over image, ring and channel."""
        with self.socket, contextlib.suppress(OSError):
            socket.send_fds(self.socket, [b"S"], fds)


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


def rehearsal_image(locked: Locked) -> bytes:
    """Return an image that does nothing, for a spare to parse before there is a real one."""
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
        sys.excepthook = lambda kind, value, traceback: None
        sys.unraisablehook = lambda unraisable: None
        threading.excepthook = lambda arguments: None
