"""One file into its place: made aside, whole, durable, and never over another unless asked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Final

from pyenclave.cli._sealers import Give, Sealer, Take, from_descriptor
from pyenclave.errors import ArgumentError, UnsealError

__all__ = [
    "LEFT_BEHIND",
    "aside",
    "compare",
    "content_of",
    "seal_to",
    "sweep",
    "unseal_to",
    "write_all",
]

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_NAMELESS: Final = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
_LOOK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# What a command that was killed may leave: no other file has, or in time gets, such a name.
LEFT_BEHIND: Final = re.compile(r"\.pyenclave-[0-9a-f]{32}\.part")

Tick = Callable[[int], None]


class _DifferentError(Exception):
    """The two contents differ."""


@contextlib.contextmanager
def aside(folder: int, name: str, *, force: bool, executable: bool = False) -> Iterator[int]:
    """
    Give a new file that becomes *name* in *folder* if all goes well, and else is removed.

    Until then it has no name at all: whoever is killed leaves nothing. To replace a file it has one
    for a moment, which nothing else has, and is locked then (`sweep`); and where the file system
    knows no files without names, all the time.

    Raises:
        FileExistsError: *name* is there and *force* is not given.

    """
    part = f".pyenclave-{secrets.token_hex(16)}.part"
    mode = 0o700 if executable else 0o600
    nameless = _nameless(folder, mode)
    fd = os.open(part, _NEW, mode, dir_fd=folder) if nameless is None else nameless
    try:
        yield fd
        os.fsync(fd)
        if nameless is not None and force:
            fcntl.flock(fd, fcntl.LOCK_EX)  # nobody else can have it yet
            os.link(f"/proc/self/fd/{fd}", part, dst_dir_fd=folder)
        if force:
            os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            try:
                if nameless is not None:
                    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder)
                else:
                    os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                    os.unlink(part, dir_fd=folder)
            except FileExistsError:
                raise FileExistsError(17, "the file exists (--force replaces it)", name) from None
        os.fsync(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise
    finally:
        os.close(fd)


def _nameless(folder: int, mode: int) -> int | None:
    """Return a new file of *folder* without a name; None where there is no such thing."""
    if not os.path.isdir("/proc/self/fd"):  # without it no name can be given later
        return None
    try:
        return os.open(".", _NAMELESS, mode, dir_fd=folder)
    except OSError as error:
        # EISDIR is what kernels and file systems say that do not know the flag.
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None
        raise


def sweep(folder: int, *, alone: bool = False) -> None:
    """
    Remove what commands that were killed left behind in a folder.

    A file that somebody is about to put into its place is locked, and stays. On file systems where
    files have names from the start they are not locked: there only who is alone may remove them.

    Args:
        folder: Descriptor of the folder.
        alone: Whether the caller has the folder's lock.

    """
    left = [name for name in os.listdir(folder) if LEFT_BEHIND.fullmatch(name)]
    if not left:
        return
    probe = _nameless(folder, 0o600)
    if probe is not None:
        os.close(probe)
    for name in left:
        with contextlib.suppress(OSError):  # gone, somebody else's, or no file at all
            fd = os.open(name, _LOOK, dir_fd=folder)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode) or (probe is None and not alone):
                    continue
                if probe is not None:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data*."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _writer(fd: int, tick: Tick) -> Give:
    def give(data: bytes) -> None:
        write_all(fd, data)
        tick(len(data))

    return give


def seal_to(
    sealer: Sealer, source: int, folder: int, name: str, *, force: bool, tick: Tick
) -> tuple[bytes, int]:
    """
    Seal the content of *source*.

    Returns:
        The id of the file that was made, and the bytes of its content.

    Raises:
        ArgumentError: The content changed meanwhile.

    """
    before = os.fstat(source)
    size = 0

    def count(number: int) -> None:
        nonlocal size
        size += number
        tick(number)

    with aside(folder, name, force=force) as fd:
        made = sealer.seal(from_descriptor(source, count), fd)
        after = os.fstat(source)
        same = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
        if stat.S_ISREG(before.st_mode) and not same:
            raise ArgumentError("the file was changed while it was sealed", found=name)
    return made, size


def unseal_to(
    sealer: Sealer,
    source: int,
    folder: int,
    name: str,
    *,
    force: bool,
    tick: Tick,
    executable: bool = False,
    wanted: bytes | None = None,
) -> int:
    """
    Open *source* into a file; return its length.

    Args:
        sealer: What opens it.
        source: Descriptor of the sealed file.
        folder: Where the result goes.
        name: What it is called there.
        force: Replace what is there.
        tick: Called with the bytes that are done.
        executable: Whether the result may be executed by its owner.
        wanted: The id that the file must have.

    Raises:
        UnsealError: Not authentic, or another file than the wanted one.

    """
    size = 0

    def count(number: int) -> None:
        nonlocal size
        size += number
        tick(number)

    with aside(folder, name, force=force, executable=executable) as fd:
        check_id(sealer.open(source, _writer(fd, count)), wanted, name)
    return size


def check_id(found: bytes, wanted: bytes | None, name: str) -> None:
    """
    Compare the id of a file with that of the list.

    Raises:
        UnsealError: It is another file.

    """
    if wanted is not None and found != wanted:
        raise UnsealError(
            "another sealed file stands in this one's place",
            expected=wanted.hex(),
            found=found.hex() or name,
        )


def content_of(sealer: Sealer, source: int, limit: int, *, listing: bool = False) -> bytes:
    """
    Return what is in a sealed file.

    Raises:
        UnsealError: Not authentic, or longer than *limit* bytes.

    """
    parts: list[bytes] = []
    left = limit

    def give(data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise UnsealError("the list of files is too long", expected=f"at most {limit} bytes")
        parts.append(data)

    sealer.open(source, give, listing=listing)
    return b"".join(parts)


def compare(sealer: Sealer, source: int, take: Take) -> bytes | None:
    """
    Return the id of the sealed file *source* if its content is what *take* gives, else None.

    What does not open with this key or enclave is not the same, whatever is in it.
    """

    def give(data: bytes) -> None:
        view = memoryview(data)
        while view:
            other = take(len(view))
            if not other or other != view[: len(other)]:
                raise _DifferentError
            view = view[len(other) :]

    try:
        found = sealer.open(source, give)
    except (_DifferentError, UnsealError):
        return None
    return None if take(1) else found
