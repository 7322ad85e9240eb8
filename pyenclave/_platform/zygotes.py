"""
Starting zygotes and having them fork workers: the platform's end.

A zygote serves one runtime lock, in debug or in production, never both. It is started by a thread
of its own that lives as long as the platform: the kernel's parent-death signal follows the thread
that started a process, not the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyenclave._native import sanitizer_environment
from pyenclave._platform.runtime import verify_runtime
from pyenclave._platform.spares import Spare, Spares, readable
from pyenclave.calls.channel import close_all
from pyenclave.errors import BusyError, EnclaveError, LaunchError, RuntimeLockError, by_code
from pyenclave.formats.lock import START_ENVIRONMENT, START_FLAGS, Roots

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyenclave._platform.codecache import CodeCache

__all__ = ["Spawned", "Zygote", "Zygotes"]

# Nothing can ever lie below a device, so Python finds no bytecode there.
_NO_BYTECODE = "/dev/null/pyenclave"
_BOOT = (
    "import sys,posix;"
    "exec(compile(posix.pread(int(sys.argv[1]),1<<24,0),'pyenclave/_worker/boot.py','exec'))"
)
_START_SECONDS = 60.0
_SPAWN_SECONDS = 10.0
_SLICE = 0.1
_MAX_PACKET = 64 * 1024
MAX_ZYGOTES = 16  # at a time; each lock list of an image is one, in debug and in production
_FRESH = 2  # tries of a launch with a process of its own, after the spares
_FILES = 4096  # descriptors that a zygote may number; one for each shared object


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """
    A new worker.

    Attributes:
        pid: Its pid in the platform's pid namespace.
        pidfd: Its pidfd, now the caller's.
        namespaces: The namespaces that it got of its own, by name.
        spare: What it was until now.

    """

    pid: int
    pidfd: int
    namespaces: tuple[str, ...]
    spare: Spare

    def began(self) -> bool:
        """Whether the worker took what it was given, as far as it said so yet."""
        return self.spare.began()

    def forget(self) -> None:
        """Close what :meth:`began` needs: the worker spoke. May be called twice."""
        self.spare.sock.close()


class Zygote:
    """
    A running zygote; made by ``Zygotes.get``. Any thread may use it.

    Attributes:
        debug: Whether it serves debug enclaves (production otherwise).
        pid: Its pid.
        pidfd: Its pidfd.
        seconds: How long it took to read and verify, and to import.

    """

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes], *, debug: bool):
        self._sock = sock
        self._process = process
        self._lock = threading.Lock()
        self._ended = False
        self._mutex = threading.Lock()
        self._spawning = 0
        self._workers: set[int] = set()  # pidfds of our own, of workers that may have ended
        self._ends = select.epoll()  # which of them did; asking each would take longer and longer
        self.debug = debug
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self.seconds = (0.0, 0.0)
        self._spares = Spares(
            self._fork,
            zygote=self.pidfd,
            ended=self.close,
            look=lambda: not self.idle(),
            name=f"spares-{process.pid}",
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        with self._mutex:
            return not self._ended and not readable(self.pidfd, 0)

    @property
    def has_spare(self) -> bool:
        """Whether a process waits to become a worker, so that none need be forked now."""
        return self.alive and self._spares.waiting

    def idle(self) -> bool:
        """Whether none of its workers lives, and none is being started."""
        with self._mutex:
            self._prune()
            return not self._workers and not self._spawning

    def _prune(self) -> None:
        if not self._ended:
            ended = [pidfd for pidfd, _ in self._ends.poll(0)]
            self._workers.difference_update(ended)
            for pidfd in ended:  # by name: the same process is open under other numbers
                self._ends.unregister(pidfd)
                os.close(pidfd)

    def spawn(
        self, *, image_fd: int, ring_fd: int, channel_fd: int, debug: bool, image: bytes = b""
    ) -> Spawned:
        """
        Start a worker.

        Args:
            image_fd: The image, a write-sealed memfd; stays the caller's.
            ring_fd: The rings, a size-sealed memfd; stays the caller's.
            channel_fd: The worker's end of its channel; stays the caller's, to be closed.
            debug: Must be what this zygote serves.
            image: SHA-256 of the image, so that later workers may read it ahead; empty: do not.

        Returns:
            The worker; its pidfd is the caller's, and ``forget`` is to be called. It may have
            ended before it took what it is given: then its channel ends, and ``began`` says so.

        Raises:
            LaunchError: The zygote is gone, or could not make a worker.

        """
        if debug != self.debug:
            raise LaunchError(
                "debug and production never share a zygote", expected=self.debug, found=debug
            )
        if not self.alive:
            raise LaunchError("the zygote ended")
        with self._mutex:
            self._spawning += 1
        try:
            spare = self._begin([image_fd, ring_fd, channel_fd], image)
            try:
                self._watch_end(spare.pidfd)
            except OSError as error:
                with contextlib.suppress(OSError):  # an entry that loops never looks at its channel
                    signal.pidfd_send_signal(spare.pidfd, signal.SIGKILL)
                spare.close()
                raise LaunchError(f"cannot keep a worker: {error.strerror}") from None
        finally:
            with self._mutex:
                self._spawning -= 1
        return Spawned(pid=spare.pid, pidfd=spare.pidfd, namespaces=spare.namespaces, spare=spare)

    def rouse(self) -> None:
        """Have a process that waits to become a worker wake up, if there is one."""
        self._spares.rouse()

    def _watch_end(self, pidfd: int) -> None:
        own = fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 0)
        with self._mutex:
            self._prune()
            try:
                if not self._ended:  # else the worker has as well, which its channel will say
                    self._ends.register(own, select.EPOLLIN)
                    self._workers.add(own)
            finally:
                if own not in self._workers:
                    os.close(own)

    def _begin(self, fds: list[int], image: bytes) -> Spare:
        """Return a process that was sent what it needs to become a worker."""
        fresh = 0
        try:
            while fresh < _FRESH:
                spare = self._spares.take(fds[0], image)
                if spare is None:
                    spare = self._fork(None, b"")
                    fresh += 1
                if spare.begin(fds, image=image):
                    return spare
                spare.close()
            raise LaunchError("the worker ended at once")
        finally:
            self._spares.used()

    def keep_spares(self) -> None:
        """Fork processes ahead of time from now on."""
        self._spares.start()

    def _fork(self, image_fd: int | None, image: bytes) -> Spare:
        """Have the zygote fork a spare. Raises LaunchError."""
        with self._lock:
            if not self.alive:
                raise LaunchError("the zygote ended")
            try:
                socket.send_fds(self._sock, [b"F"], [] if image_fd is None else [image_fd])
            except OSError as error:
                raise LaunchError(f"the zygote is gone: {error.strerror}") from None
            data, fds = self._receive(_SPAWN_SECONDS)
        if data[:1] == b"P" and len(data) >= 5 and len(fds) == 2:
            names = data[5:].decode("ascii", "replace")
            return Spare(
                pid=int.from_bytes(data[1:5], "little"),
                pidfd=fds[0],
                namespaces=tuple(names.split(",")) if names else (),
                sock=socket.socket(fileno=fds[1]),
                image=image,
            )
        close_all(fds)
        raise _error(data)

    def _receive(self, seconds: float) -> tuple[bytes, list[int]]:
        """Receive one packet. Raises LaunchError if the process ends or is too slow."""
        deadline = time.monotonic() + seconds
        while not readable(self._sock.fileno(), _SLICE):
            if time.monotonic() > deadline:
                # Its next answer would be taken for that of another request.
                self._process.kill()
                self._process.wait()
                raise LaunchError(f"the zygote did not answer within {seconds:.0f} s")
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._sock, _MAX_PACKET, 4, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise LaunchError(f"the zygote is gone: {error.strerror}") from None
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(fds)
            raise LaunchError("the zygote ended without an answer")
        return data, fds

    def wait_ready(self) -> None:
        """Wait until everything is verified and loaded. Raises as ``Zygotes.get``."""
        data, fds = self._receive(_START_SECONDS)
        close_all(fds)
        if data[:1] != b"R":
            raise _error(data)
        with contextlib.suppress(ValueError):
            read, imported = (float(part) for part in data[1:].split(b"\0"))
            self.seconds = (read, imported)

    def close(self) -> None:
        """
        End the process, and with it its workers. May be called twice.

        Called without delay when the process ends by itself: its spares, its image and its
        sockets are not kept until the next launch.
        """
        with self._mutex:
            first, self._ended = not self._ended, True
        if not first:
            self._spares.close()  # waits for the thread, which may be in here
            return
        self._process.kill()
        self._process.wait()
        self._spares.close()
        # A descriptor is closed when nobody waits for it any more: its number is used again.
        with self._lock:
            self._sock.close()
        with self._mutex:
            os.close(self.pidfd)
            self._ends.close()
            close_all(list(self._workers))
            self._workers.clear()


class Zygotes:
    """
    All zygotes of a platform. Any thread may use it.

    Args:
        roots: Where this machine keeps what a lock names.
        executable: The interpreter of the zygotes.
        codes: Where their compiled code is kept; None: nowhere.

    """

    def __init__(
        self,
        roots: Roots,
        *,
        executable: str = sys.executable,
        codes: CodeCache | None = None,
    ) -> None:
        self._roots = roots
        self._executable = executable
        self._codes = codes
        self._lock = threading.Lock()
        self._running: dict[tuple[bytes, bool], Future[Zygote]] = {}
        self._closed = False
        self._last = (b"", hashlib.sha256().digest())
        self._latest: Zygote | None = None
        self._starting: subprocess.Popen[bytes] | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._starter = threading.Thread(target=self._serve, name="zygotes", daemon=True)
        self._starter.start()

    def ready(self, lock_bytes: bytes, *, debug: bool) -> bool:
        """Whether ``get`` with these arguments, and then ``spawn``, are likely not to wait."""
        with self._lock:
            future = self._running.get((self._digest(lock_bytes), debug))
        if future is None or not future.done() or future.exception() is not None:
            return False
        return future.result().has_spare

    def _digest(self, lock_bytes: bytes) -> bytes:
        # Launches pass the very same object; hashing it takes longer than all else here.
        known, digest = self._last
        if known is not lock_bytes:
            digest = hashlib.sha256(lock_bytes).digest()
            self._last = (lock_bytes, digest)
        return digest

    def begin(self, lock_bytes: bytes, *, debug: bool) -> None:
        """Begin to start the zygote of a lock, which somebody will ask for; errors are for them."""
        with contextlib.suppress(EnclaveError):
            self._find(lock_bytes, debug=debug)

    def get(self, lock_bytes: bytes, *, debug: bool) -> Zygote:
        """
        Return the zygote of a lock; started if there is none.

        Args:
            lock_bytes: The lock's canonical bytes.
            debug: Debug and production never share one.

        Returns:
            A zygote that is ready.

        Raises:
            ImageError: The bytes are not a lock.
            RuntimeLockError: The runtime differs from the lock; ``files`` names each file.
            LaunchError: The process could not be started.
            BusyError: There are MAX_ZYGOTES, and each has workers.

        """
        zygote = self._find(lock_bytes, debug=debug).result()
        self._latest = zygote
        return zygote

    def rouse(self) -> None:
        """Somebody wants an enclave, most likely of the same kind as the last: wake a spare."""
        zygote = self._latest
        if zygote is not None:
            zygote.rouse()

    def _find(self, lock_bytes: bytes, *, debug: bool) -> Future[Zygote]:
        with self._lock:
            key = (self._digest(lock_bytes), debug)
            if self._closed:
                raise LaunchError("the platform is closing")
            future = self._running.get(key)
            if future is not None and future.done():
                usable = future.exception() is None and future.result().alive
                if not usable:
                    if future.exception() is None:
                        future.result().close()
                    future = None
            if future is None:
                self._running.pop(key, None)
                self._make_room()
                future = self._running[key] = Future()
                self._work.put(lambda: self._start(key, lock_bytes))
        return future

    def _make_room(self) -> None:
        """End the oldest zygote without workers if there are as many as there may be."""
        for key, future in list(self._running.items()):
            if future.done() and future.exception() is not None:
                del self._running[key]
        if len(self._running) < MAX_ZYGOTES:
            return
        for key, future in list(self._running.items()):
            if future.done() and future.result().idle():
                del self._running[key]
                future.result().close()
                return
        raise BusyError(
            "too many runtimes are in use",
            expected=f"enclaves of at most {MAX_ZYGOTES} different lock lists at a time",
            advice="Close enclaves that are not needed, or build their images together.",
        )

    def close(self) -> None:
        """End every zygote, and with it every worker. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._starting is not None:
                self._starting.kill()
        self._work.put(None)
        self._starter.join()
        for future in self._running.values():
            if future.done() and future.exception() is None:
                future.result().close()
            elif not future.done():
                future.set_exception(LaunchError("the platform is closing"))

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _began(self, process: subprocess.Popen[bytes] | None) -> None:
        """Keep the process that is starting, so that close() need not wait for it."""
        with self._lock:
            if process is not None and self._closed:
                raise LaunchError("the platform is closing")
            self._starting = process

    def _start(self, key: tuple[bytes, bool], lock_bytes: bytes) -> None:
        future = self._running[key]
        try:
            zygote = _start(
                lock_bytes,
                self._roots,
                self._executable,
                debug=key[1],
                codes=self._codes,
                began=self._began,
            )
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(zygote)


def _start(
    lock_bytes: bytes,
    roots: Roots,
    executable: str,
    *,
    debug: bool,
    codes: CodeCache | None,
    began: Callable[[subprocess.Popen[bytes] | None], None],
) -> Zygote:
    kit = verify_runtime(
        lock_bytes, roots, executable, debug=debug, platform=os.getpid(), codes=codes
    )
    with kit:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = (*START_FLAGS, "-X", f"pycache_prefix={_NO_BYTECODE}", "-c", _BOOT)
        fds = (str(kit.boot), str(theirs.fileno()), *kit.arguments)
        try:
            with theirs:
                process = subprocess.Popen(
                    [kit.executable, *flags, *fds],
                    pass_fds=(theirs.fileno(), *kit.fds),
                    env=_environment(sanitized=kit.sanitized),
                    cwd="/",
                    umask=0o077,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=None if debug else subprocess.DEVNULL,
                    stderr=None if debug else subprocess.DEVNULL,
                )
        except OSError as error:
            ours.close()
            few = error.errno in (errno.EMFILE, errno.ENFILE)
            advice = "Raise the limit of open files (ulimit -Hn)." if few else None
            raise LaunchError(f"cannot start a zygote: {error}", advice=advice) from None
    try:
        zygote = Zygote(ours, process, debug=debug)
    except BaseException:
        process.kill()
        process.wait()
        ours.close()
        raise
    limit = _FILES
    try:
        hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
        files = max(_FILES, 2 * max(kit.fds))
        limit = files if hard == resource.RLIM_INFINITY else min(hard, files)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))
        began(process)
        zygote.wait_ready()
        zygote.keep_spares()
    except BaseException as error:
        began(None)
        if codes is not None and isinstance(error, EnclaveError) and _failed_by_itself(process):
            # Compiled code that no zygote starts with must not refuse every launch to come.
            codes.forget(lock_bytes, debug=debug)
        zygote.close()
        if isinstance(error, LaunchError) and limit < _FILES:
            # What fails for want of a number says so in other words: EBADF of dup2, for one.
            raise LaunchError(
                "no worker starts where so few files may be open",
                expected=f"a limit of {_FILES} open files (ulimit -Hn)",
                found=f"{limit} ({error})",
            ) from None
        raise
    began(None)
    return zygote


def _failed_by_itself(process: subprocess.Popen[bytes]) -> bool:
    """Whether a zygote ended, and not because somebody killed it."""
    try:
        return process.wait(1) != -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


def _environment(*, sanitized: bool) -> dict[str, str]:
    """Return the whole environment of a zygote: nothing of the host's gets through."""
    environment = dict(START_ENVIRONMENT)
    return environment | sanitizer_environment() if sanitized else environment


def _error(data: bytes) -> EnclaveError:
    """Turn an error packet of a zygote into the error."""
    if data[:1] != b"E":
        return LaunchError("the zygote sent what is no answer")
    code, _, rest = data[1:].decode("utf-8", "replace").partition("\0")
    message, _, lines = rest.partition("\0")
    files = tuple(lines.split("\n")) if lines else ()
    cls = by_code().get(code, LaunchError)
    if issubclass(cls, RuntimeLockError):
        return cls(message, files=files)
    return cls(message if not files else f"{message}: {', '.join(files)}")
