"""
The one reader of files that users name: commands, services and the library read them with it.

A regular file is read, up to a limit. So is a pipe, where its name is one of an open descriptor, as
a shell writes for ``<(…)``: somebody holds its other end. Everything else is refused before it is
opened: a named pipe would hold up who opens it, a device has no end, and opening may do something.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Final

__all__ = ["open_file", "read_file"]

_CHUNK: Final = 1 << 20
# Names of what this process has open: opening one waits for nobody.
_OPEN: Final = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")
_KINDS: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _check(path: str, mode: int, *, pipes: bool) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    piped = stat.S_ISFIFO(mode) and _OPEN.fullmatch(path) is not None
    if piped and pipes:
        return
    found = next((name for is_one, name in _KINDS if is_one(mode)), "something else")
    expected = "a file, or a pipe by /dev/stdin or /dev/fd/N" if pipes else "a file"
    raise OSError(
        errno.EINVAL,
        f"it is no regular file; expected {expected}; found {'a pipe' if piped else found}",
        path,
    )


def open_file(path: str | os.PathLike[str], *, pipes: bool = False) -> int:
    """
    Open a file for reading.

    Args:
        path: Where it is.
        pipes: Take a pipe too, if *path* is ``/dev/stdin``, ``/dev/fd/N`` or ``/proc/self/fd/N``.

    Returns:
        A descriptor that children do not inherit.

    Raises:
        OSError: It cannot be opened, or is no regular file.

    """
    name = os.fsdecode(path)
    _check(name, os.stat(name).st_mode, pipes=pipes)
    # What was looked at may be something else by now: no pipe is waited for, no terminal taken.
    flags = os.O_RDONLY
    for flag in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    fd = os.open(name, flags)
    try:
        mode = os.fstat(fd).st_mode
        _check(name, mode, pipes=pipes)
        if stat.S_ISFIFO(mode):
            os.set_blocking(fd, True)  # of this descriptor only: opened anew, not copied
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """
    Read a whole file, or a pipe that the shell has open.

    Args:
        path: Where it is.
        limit: The most bytes that it may have; not much more memory is taken.

    Raises:
        OSError: It cannot be read, is no regular file, or is longer.

    """
    fd = open_file(path, pipes=True)
    with open(fd, "rb", buffering=0) as file:
        # As much as the file has: read(n) sets n bytes aside before it reads any. Files of /proc
        # say that they have none.
        size = os.fstat(fd).st_size
        parts: list[bytes] = []
        length = 0
        while size <= limit and length <= limit:
            part = file.read(min(limit + 1 - length, max(size + 1 - length, _CHUNK)))
            if not part:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            parts.append(part)
            length += len(part)
    found = f"{size}" if size > limit else "more"
    raise OSError(
        errno.EFBIG,
        f"it is too long; expected at most {limit} bytes; found {found}",
        os.fsdecode(path),
    )
