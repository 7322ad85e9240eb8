"""
How many round trips an enclave's ring has seen, for ``pyenclave top``.

Read where the ring has them anyway: the sequence of each lane's request slot (docs/formats/ring.md)
is one more with every message of the host. So nobody counts anything for it, and a call costs
nothing more. The host may write there what it likes: the number is its word.
"""

from __future__ import annotations

import os
from typing import Final

from pyenclave.calls.ring import slot_stride

__all__ = ["WRAP", "Traffic"]

WRAP: Final = 1 << 32  # the count goes on at 0
_FIRST: Final = 4096  # offset of lane 0
_STATES: Final = 256  # bytes of a lane before its request slot
_LANE: Final = _STATES + 2 * slot_stride()


class Traffic:
    """
    The ring of one enclave.

    Args:
        fd: Its memory, whose size was checked; this object's own.
        lanes: Their number.

    """

    def __init__(self, fd: int, lanes: int) -> None:
        self._fd = fd
        self._lanes = lanes

    def round_trips(self) -> int:
        """Return the count of all lanes, modulo ``WRAP``; -1: closed."""
        if self._fd < 0:
            return -1
        total = 0
        for lane in range(self._lanes):
            try:
                word = os.pread(self._fd, 4, _FIRST + lane * _LANE + _STATES)
            except OSError:
                return -1  # closed meanwhile by another thread
            total += int.from_bytes(word, "little")
        return total % WRAP

    def close(self) -> None:
        """Give the memory back. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
