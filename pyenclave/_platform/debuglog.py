"""
What debug enclaves print: kept by the platform, one bounded file each, for ``pyenclave logs``.

A debug worker's standard output and error are a pipe whose other end is here. The file is made when
the first byte comes: ``debug-<identity>.log`` in the state directory, mode 0600, locked while the
enclave lives. A production worker gets no such pipe: its output is /dev/null since its zygote
started, and nothing here ever hears of it.

Where the state directory cannot be written, the output is read and dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from dataclasses import dataclass
from typing import Final

import msgspec

from pyenclave._platform.debugging import Debuggee
from pyenclave._platform.state import State
from pyenclave.calls.errors import cut
from pyenclave.errors import PlatformUnavailableError

__all__ = ["MAX_LOG", "MAX_LOGS", "DebugLog", "LogFile", "find_logs"]

MAX_LOG: Final = 256 * 1024  # bytes of one log; then its older half goes
MAX_LOGS: Final = 64  # files kept; the oldest go first
_NAME: Final = re.compile(r"debug-([0-9a-f]{32})\.log")
_DROPPED: Final = b"[earlier output was dropped]\n"
_HEADER: Final = 512
_END_SECONDS: Final = 2.0


def _name_of(enclave_id: str) -> str:
    return f"debug-{enclave_id}.log"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a log, as JSON."""

    name: str
    started: float  # seconds since the epoch


class DebugLog:
    """
    The log of one debug worker that is about to be started.

    Args:
        state: Where the file goes.
        name: The image's name.

    Attributes:
        debuggee: Where the worker finds a debugger, if that was made.

    Raises:
        OSError: There are no descriptors for another pipe.

    """

    debuggee: Debuggee | None = None

    def __init__(self, state: State, name: str) -> None:
        header = Header(name=cut(name, 64), started=time.time())
        self._header = msgspec.json.encode(header) + b"\n"
        self._lock = threading.Lock()  # around name and file
        self._name = _name_of(os.urandom(16).hex())
        self._state = state
        self._file = -1
        self._failed = not state.writable
        self._size = 0
        self._read, self.write_fd = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._pump, name="debug-log", daemon=True)

    def start(self) -> None:
        """Read until every writer is gone. Raises RuntimeError if there are no more threads."""
        try:
            self._thread.start()
        except RuntimeError:
            os.close(self._read)
            self.close_writer()
            raise

    def close_writer(self) -> None:
        """Close our copy of the writer's end, once the worker's is on its way. Twice is fine."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def name_after(self, enclave_id: bytes) -> None:
        """Give the log the name of the enclave that the worker is now; before, it has any."""
        with self._lock:
            before, self._name = self._name, _name_of(enclave_id.hex())
            if self._file >= 0:
                with contextlib.suppress(OSError):
                    directory = self._state.fd
                    os.rename(before, self._name, src_dir_fd=directory, dst_dir_fd=directory)

    def join(self) -> None:
        """Wait until everything is kept; only when the worker has ended."""
        self.close_debuggee()
        self._thread.join(_END_SECONDS)

    def close_debuggee(self) -> None:
        """Tell a debugger that the worker has ended."""
        if self.debuggee is not None:
            self.debuggee.close()

    def _pump(self) -> None:
        try:
            # Read always: a worker that prints must not wait for a disk that is full.
            while data := os.read(self._read, 64 * 1024):
                with contextlib.suppress(OSError, PlatformUnavailableError):
                    self._keep(data)
        finally:
            os.close(self._read)
            if self._file >= 0:
                os.close(self._file)

    def _keep(self, data: bytes) -> None:
        if self._failed:
            return
        if self._file < 0:
            self._failed = True  # unless what follows succeeds
            with self._lock:
                self._open()
            self._failed = False
        self._append(data[-MAX_LOG // 2 :])
        if self._size > MAX_LOG:
            self._shorten()

    def _open(self) -> None:
        for old in find_logs(self._state)[MAX_LOGS - 1 :]:
            self._state.unlink(_name_of(old.enclave_id))
        self._file = self._state.open_file(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._say_that_it_runs()
        self._append(self._header)

    def _say_that_it_runs(self) -> None:
        for _ in range(20):
            # Whoever lists logs holds the lock for a moment. Without it the log only looks ended.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.005)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file, view, self._size)
            self._size += done
            view = view[done:]

    def _shorten(self) -> None:
        """Drop the older half, up to the end of a line."""
        kept = os.pread(self._file, MAX_LOG // 2, self._size - MAX_LOG // 2)
        kept = kept[kept.find(b"\n") + 1 :]
        # Shorter first: who follows the file sees that it begins anew.
        os.ftruncate(self._file, 0)
        self._size = 0
        self._append(self._header + _DROPPED + kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """
    A log that there is.

    Attributes:
        enclave_id: Identity of the launch, in hexadecimal.
        name: Name of the enclave.
        started: When it was launched, in seconds since the epoch.
        size: Bytes of the file.
        running: Whether the enclave still runs.

    """

    enclave_id: str
    name: str
    started: float
    size: int
    running: bool

    def read(self, state: State) -> bytes:
        """
        Return what the enclave printed, as far as it is kept.

        Raises:
            PlatformUnavailableError: The file cannot be read.

        """
        data = state.read_file(_name_of(self.enclave_id), limit=4 * MAX_LOG) or b""
        return data.partition(b"\n")[2]


def find_logs(state: State) -> list[LogFile]:
    """Return the logs in *state*, the latest first."""
    if not state.exists:
        return []
    found = []
    for name in os.listdir(state.fd):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        with contextlib.suppress(OSError, PlatformUnavailableError, msgspec.MsgspecError):
            found.append(_look(state, name, match[1]))
    return sorted(found, key=lambda log: log.started, reverse=True)


def _look(state: State, name: str, enclave_id: str) -> LogFile:
    fd = state.open_file(name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        header = Header(name="", started=os.fstat(fd).st_mtime)
        with contextlib.suppress(msgspec.MsgspecError):
            line = os.pread(fd, _HEADER, 0).partition(b"\n")[0]
            header = msgspec.json.decode(line, type=Header)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            running = False
        except BlockingIOError:
            running = True
        return LogFile(
            enclave_id=enclave_id,
            name=header.name,
            started=header.started,
            size=os.fstat(fd).st_size,
            running=running,
        )
    finally:
        os.close(fd)
