"""
Rings: shared memory of fixed size in which host and worker call each other.

``docs/formats/ring.md`` gives the bytes. The host makes the memory and fixes its size; the worker
maps it only after it has checked the seals and the size, since a peer that shrinks memory under a
mapping kills the process that touches it (SIGBUS).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import Final

from pyenclave import _core
from pyenclave.errors import EnclaveStateError

__all__ = ["DEFAULT_SLOT", "SEALS", "check", "create", "layout", "map_ring", "slot_stride"]

# Payload bytes of a slot. Longer messages cross in fragments of this size.
DEFAULT_SLOT = 128 * 1024
_AREA: Final = 128  # where in a slot long messages lie; a multiple of the alignment
_FRAGMENTS: Final = 16  # for so many there is room
_ALIGNMENT: Final = 128
_PAGE = 4096  # on every machine: what an image says does not depend on it
# Seals of a ring: its size is fixed and no seal can be added. It stays writable by both sides.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def layout(lanes: int, slot_size: int = DEFAULT_SLOT, *, shared: int = 0) -> int:
    """
    Return the size in bytes of a ring.

    Args:
        lanes: One a thread of the enclave.
        slot_size: Payload bytes each way, a multiple of 32.
        shared: Bytes of memory for arrays behind the lanes; whole pages.

    Raises:
        ValueError: There is no such ring.

    """
    size = _core.ring_size(lanes, slot_size)
    if size == 0:
        raise ValueError(f"no ring of {lanes} lanes with slots of {slot_size} bytes")
    if shared < 0 or shared % _PAGE:
        raise ValueError(f"shared memory of {shared} bytes is not whole pages")
    return size + shared


def slot_stride(slot_size: int = DEFAULT_SLOT) -> int:
    """Return the bytes of one slot with header and padding (docs/formats/ring.md, "Memory")."""
    return -(-(_AREA + _FRAGMENTS * (slot_size // 2)) // _ALIGNMENT) * _ALIGNMENT


def create(lanes: int, slot_size: int = DEFAULT_SLOT, *, shared: int = 0) -> int:
    """Make a ring of zeroes with fixed size and return its descriptor (the caller's)."""
    size = layout(lanes, slot_size, shared=shared)
    fd = os.memfd_create("pyenclave-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check(fd: int, lanes: int, slot_size: int = DEFAULT_SLOT, *, shared: int = 0) -> None:
    """
    Check that *fd* is a ring of that layout whose size can never change.

    Raises:
        EnclaveStateError: It is another kind of file, not sealed, or of another size.

    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise EnclaveStateError("the ring is not a memory file", found=oct(status.st_mode))
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # an ordinary file
        raise EnclaveStateError("the ring is not a memory file that can be sealed") from None
    # A ring sealed against writing would fault under us as well.
    if seals != SEALS:
        raise EnclaveStateError("the ring's size is not fixed", expected=SEALS, found=seals)
    size = layout(lanes, slot_size, shared=shared)
    if os.fstat(fd).st_size != size:
        raise EnclaveStateError("the ring has another size", expected=size, found=status.st_size)


def map_ring(fd: int, lanes: int, slot_size: int = DEFAULT_SLOT, *, shared: int = 0) -> mmap.mmap:
    """Check and map a ring, shared and writable. The descriptor may be closed afterwards."""
    check(fd, lanes, slot_size, shared=shared)
    return mmap.mmap(fd, layout(lanes, slot_size, shared=shared), mmap.MAP_SHARED)
