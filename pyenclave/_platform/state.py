"""
The state directory: the root secret, its certificate, the counters and the meeting point.

The directory belongs to one user. It is opened once, without following a link, and everything in
it is reached through that descriptor, so that nobody can swap a path between a check and its use.
``docs/formats/state.md`` describes each file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from pyenclave.errors import PlatformUnavailableError

__all__ = ["ROOT_SIZE", "State", "default_state_directory"]

ROOT_SIZE: Final = 32  # bytes
_MAGIC: Final = b"PYEROOT\x01"
_ROOT_FILE: Final = "root"
_MAX_FILE: Final = 4 * 1024 * 1024
# Names of files on their way to their place, and how long one may take at most.
_ASIDE: Final = re.compile(r"\.[a-z0-9.-]+-(?:[0-9a-f]{16}|[0-9]+-[0-9a-f]{8})")
_ASIDE_SECONDS: Final = 60.0
# What the kernel says when a directory cannot be written, as opposed to being in disorder.
_UNWRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})


def default_state_directory() -> str:
    """
    Return the state directory of this user.

    Returns:
        ``PYENCLAVE_STATE`` if it is set, else ``pyenclave`` under ``XDG_STATE_HOME``, else
        ``~/.local/state/pyenclave``; always absolute.

    """
    named = os.environ.get("PYENCLAVE_STATE")
    if named:
        return os.path.abspath(named)
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: relative values are ignored
        home = os.path.expanduser("~")
        # A container's random user has no home; never take a folder of the working directory.
        base = os.path.join(home if os.path.isabs(home) else "/", ".local", "state")
    return os.path.join(os.path.abspath(base), "pyenclave")


class State:
    """
    An open state directory. Close it, or use it as a context manager.

    Attributes:
        path: The directory, for messages only.
        writable: Whether files can be made in it. If not, a root secret that is not already there
            lives in memory.

    """

    def __init__(self, path: str, fd: int | None, *, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self._fd = fd

    @classmethod
    def open(cls, path: str | None = None, *, create: bool = True) -> Self:
        """
        Open the state directory, making it (mode 0700) if it is not there.

        Args:
            path: The directory; None for :func:`default_state_directory`.
            create: Make the directory if it is missing.

        Raises:
            PlatformUnavailableError: It is not a directory, or others may use it, or it is
                another user's.

        """
        path = default_state_directory() if path is None else os.path.abspath(path)
        if "\0" in path:
            raise ValueError("the state directory's name contains a zero byte")
        if create:
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with contextlib.suppress(OSError):
                os.mkdir(path, 0o700)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP) and os.path.lexists(path):
                raise PlatformUnavailableError(
                    f"state directory {path} is not a directory",
                    expected="a directory, not a file or a link",
                    advice="Set PYENCLAVE_STATE to a directory of your own.",
                ) from None
            return cls(path, None, writable=False)
        state = cls(path, fd, writable=False)
        try:
            _check_owner(os.fstat(fd), path, directory=True)
            state.writable = state._try_writing()
        except BaseException:
            state.close()
            raise
        return state

    def _try_writing(self) -> bool:
        # The attempt is the only honest test: modes, mounts and quotas all have their say.
        try:
            fd = self.open_file("state.lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in _UNWRITABLE:
                return False
            raise
        os.close(fd)
        name = f".try-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            fd = self.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            if error.errno in _UNWRITABLE:
                return False
            raise
        os.close(fd)
        self.unlink(name)
        return True

    @property
    def fd(self) -> int:
        """The directory's descriptor."""
        if self._fd is None:
            raise PlatformUnavailableError(f"state directory {self.path} cannot be opened")
        return self._fd

    @property
    def exists(self) -> bool:
        """Whether the directory could be opened."""
        return self._fd is not None

    def open_file(self, name: str, flags: int) -> int:
        """
        Open *name* in the directory: no links, mode 0600, ours alone.

        Raises:
            OSError: As open(2).
            PlatformUnavailableError: It is no regular file, is another user's, or others may
                use it.

        """
        try:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise PlatformUnavailableError(
                    f"{self.path}/{name} is not a regular file",
                    advice="Remove it; nothing of pyenclave makes such a thing there.",
                ) from None
            raise
        try:
            _check_owner(os.fstat(fd), f"{self.path}/{name}", directory=False)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read_file(self, name: str, *, limit: int = _MAX_FILE) -> bytes | None:
        """
        Read the whole of *name*, or return None if it is not there.

        Raises:
            PlatformUnavailableError: It cannot be read, is longer than *limit*, or fails the
                checks of :meth:`open_file`.

        """
        try:
            fd = self.open_file(name, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PlatformUnavailableError(
                f"{self.path}/{name} cannot be read: {error.strerror}"
            ) from None
        try:
            with os.fdopen(fd, "rb", buffering=0) as file:
                data = bytearray()
                while len(data) <= limit:
                    piece = file.read(limit + 1 - len(data))
                    if not piece:
                        return bytes(data)
                    data += piece
        except OSError as error:
            raise PlatformUnavailableError(
                f"{self.path}/{name} cannot be read: {error.strerror}"
            ) from None
        raise PlatformUnavailableError(
            f"{self.path}/{name} is too long", expected=f"at most {limit} bytes"
        )

    def replace_file(self, name: str, data: bytes) -> None:
        """
        Put *data* into *name*, durably and all or nothing (write aside, fsync, rename, fsync).

        Raises:
            OSError: Nothing was changed, or (fsync of the directory alone) it may not last.

        """
        temporary = self._write_aside(name, data)
        try:
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            self.unlink(temporary)
            raise
        os.fsync(self.fd)

    def _write_aside(self, name: str, data: bytes) -> str:
        temporary = f".{name}-{secrets.token_hex(8)}"
        if self._write_nameless(temporary, data):
            return temporary
        fd = self.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                _write_whole(fd, data)
            finally:
                os.close(fd)
        except BaseException:
            self.unlink(temporary)
            raise
        return temporary

    def _write_nameless(self, name: str, data: bytes) -> bool:
        """Write a file that gets its name when it is whole: killed before, it leaves nothing."""
        try:
            flags = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
            fd = os.open(".", flags, 0o600, dir_fd=self.fd)
        except OSError:  # not every file system has it
            return False
        try:
            _write_whole(fd, data)
            try:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=self.fd)
            except OSError:  # nor every machine /proc
                return False
        finally:
            os.close(fd)
        return True

    def sweep(self) -> None:
        """Remove what killed processes were writing aside; never what may still be written."""
        now = time.time()
        with contextlib.suppress(OSError):
            for name in os.listdir(self.fd):
                if _ASIDE.fullmatch(name) is not None:
                    status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
                    if now - status.st_mtime > _ASIDE_SECONDS:
                        self.unlink(name)

    def unlink(self, name: str) -> None:
        """Remove *name* if it is there and can be removed."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.fd)

    @contextlib.contextmanager
    def lock(self, name: str = "state.lock", *, timeout: float = 10.0) -> Iterator[None]:
        """
        Hold the advisory lock *name*, against other processes and other threads.

        Raises:
            PlatformUnavailableError: It could not be had within *timeout* seconds.

        """
        fd = self.take_lock(name, timeout=timeout)
        _held.add(fd)
        try:
            yield
        finally:
            # Given back by name: a child that was forked meanwhile may have a copy of it.
            fcntl.flock(fd, fcntl.LOCK_UN)
            _held.discard(fd)
            os.close(fd)

    def take_lock(self, name: str, *, timeout: float) -> int:
        """Take the lock *name* and return the descriptor whose closing gives it back."""
        try:
            fd = self.open_file(name, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise PlatformUnavailableError(
                f"{self.path}/{name} cannot be locked: {error.strerror}"
            ) from None
        deadline = time.monotonic() + timeout
        pause = 0.001
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise PlatformUnavailableError(
                            f"{self.path}/{name} is locked by another process",
                            expected=f"free within {timeout:g} s",
                        ) from None
                    time.sleep(pause)
                    pause = min(pause * 2, 0.05)
                else:
                    return fd
        except BaseException:
            os.close(fd)
            raise

    def load_root(self) -> tuple[bytearray, bool]:
        """
        Return the root secret, making it if there is none.

        Returns:
            The 32 secret bytes (the caller wipes them) and whether they are *ephemeral*: in
            memory only, because the directory cannot be written.

        Raises:
            PlatformUnavailableError: The file is damaged or others may read it. A damaged root
                is never replaced: what was sealed under it would be lost silently.

        """
        if not self.exists:
            return bytearray(os.urandom(ROOT_SIZE)), True
        found = self._read_root()
        if found is None and self.writable:
            with self.lock():
                found = self._read_root() or self._create_root()
        if found is None:
            return bytearray(os.urandom(ROOT_SIZE)), True
        return found, False

    def _read_root(self) -> bytearray | None:
        data = self.read_file(_ROOT_FILE, limit=4096)
        if data is None:
            return None
        body, checksum = data[:-32], data[-32:]
        whole = len(data) == len(_MAGIC) + ROOT_SIZE + 32 and data.startswith(_MAGIC)
        if not whole or hashlib.sha256(body).digest() != checksum:
            raise PlatformUnavailableError(
                f"root secret {self.path}/{_ROOT_FILE} is damaged",
                expected="72 bytes with a matching checksum",
                found=f"{len(data)} bytes",
                advice="Restore it from a backup; if it is removed, a new one is made and "
                "nothing that was sealed before opens again.",
            )
        return bytearray(body[len(_MAGIC) :])

    def _create_root(self) -> bytearray | None:
        root = bytearray(os.urandom(ROOT_SIZE))
        body = _MAGIC + bytes(root)
        try:
            temporary = self._write_aside(_ROOT_FILE, body + hashlib.sha256(body).digest())
        except OSError as error:
            if error.errno in _UNWRITABLE or error.errno == errno.EFBIG:
                return None
            raise
        try:
            # link, not rename: it can never replace a root that is there.
            os.link(temporary, _ROOT_FILE, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)
        finally:
            self.unlink(temporary)
        return root

    def close(self) -> None:
        """Close the directory; may be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_held: set[int] = set()  # descriptors of locks that threads of this process hold


def _drop_inherited() -> None:
    """In a forked child: a lock that a thread of the parent holds ends with the parent."""
    for fd in list(_held):
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_drop_inherited)


def _write_whole(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def _check_owner(status: os.stat_result, name: str, *, directory: bool) -> None:
    want = "700" if directory else "600"
    if not directory and not stat.S_ISREG(status.st_mode):
        raise PlatformUnavailableError(f"{name} is not a regular file")
    if status.st_uid != os.geteuid():
        raise PlatformUnavailableError(
            f"{name} belongs to another user", expected=f"uid {os.geteuid()}", found=status.st_uid
        )
    if status.st_mode & 0o077:
        raise PlatformUnavailableError(
            f"{name} is open to other users",
            expected=f"mode {want}",
            found=f"mode {stat.S_IMODE(status.st_mode):o}",
            advice=f"If nobody else used it: chmod {want} {name}",
        )
