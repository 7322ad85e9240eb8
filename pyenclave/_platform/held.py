"""
Which memory files were hashed before.

A host that launches an image again sends the very same memory file. The kernel says whether two
descriptors are one open file (F_DUPFD_QUERY, Linux 6.10; elsewhere nothing is found here), and
its seals keep the bytes as they were when they were hashed. Names and inode numbers would not do:
numbers are used again.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from typing import Final

__all__ = ["HeldImages"]

_F_DUPFD_QUERY: Final = 1027
_MOST: Final = 4
_LARGEST: Final = 64 << 20  # bytes; what is held stays in memory


class HeldImages:
    """The images that one host launched last, by their open file. Not thread-safe."""

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, int] = OrderedDict()

    def find(self, fd: int) -> bytes:
        """Return the SHA-256 of a memory file that was added before, else nothing."""
        for digest, held in self._held.items():
            try:
                same = fcntl.fcntl(held, _F_DUPFD_QUERY, fd)
            except OSError:
                return b""
            if same == 1:
                self._held.move_to_end(digest)
                return digest
        return b""

    def add(self, fd: int, digest: bytes, size: int) -> None:
        """
        Hold a memory file, in the place of an earlier one with the same bytes.

        Args:
            fd: Write-sealed; stays the caller's.
            digest: SHA-256 of its bytes, taken after the seals were checked.
            size: Of the file, in bytes.

        """
        if size > _LARGEST or self.find(fd) == digest:
            return
        try:
            new = os.dup(fd)
        except OSError:
            return  # no descriptors left: the bytes are hashed again next time, no launch is lost
        old = self._held.pop(digest, None)
        self._held[digest] = new
        if old is not None:
            os.close(old)
        while len(self._held) > _MOST:
            os.close(self._held.popitem(last=False)[1])

    def close(self) -> None:
        """Hold nothing any more."""
        while self._held:
            os.close(self._held.popitem()[1])
