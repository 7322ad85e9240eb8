"""Memory files that nobody can change any more."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import Final

__all__ = ["ALL_SEALS", "seal", "sealed"]

#: No other size, no other bytes, no fewer seals (fcntl(2), "File Sealing").
ALL_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_PATIENCE: Final = 10.0  # seconds
_MFD_NOEXEC_SEAL: Final = 0x0008


def seal(fd: int, seals: int = ALL_SEALS) -> None:
    """
    Put *seals* on the memfd *fd*, which nobody may have mapped writable if one is F_SEAL_WRITE.

    While anybody holds on to one of its pages, the kernel waits for 0.15 s and then refuses with
    EBUSY (mm/memfd.c, memfd_wait_for_pins). Its own compaction does so for as long as it takes, on
    a machine that is busy for longer; so this asks again.

    Raises:
        OSError: EBUSY after ten seconds; EPERM: the memfd cannot be sealed.

    """
    begin = time.monotonic()
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() - begin > _PATIENCE:
                raise
        time.sleep(0.01)


def sealed(name: str, data: bytes, *, executable: bool = True) -> int:
    """
    Return the descriptor of a new sealed memfd that holds *data*.

    Args:
        name: What ``/proc`` shows.
        data: All of its bytes.
        executable: Whether it may be run; mapping it executable works either way. Kernels before
            Linux 6.3 make no difference.

    Raises:
        OSError: No descriptor or memory is left, or see `seal`.

    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags if executable else flags | _MFD_NOEXEC_SEAL)
    except OSError:
        if executable:
            raise
        fd = os.memfd_create(name, flags)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
