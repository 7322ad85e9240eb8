"""
The code page of libffi for callbacks, which it makes when ``ctypes`` is imported.

libffi maps a page of its own code once more, so that no memory is ever writable and executable. It
looks for the file that it was loaded from, which in a zygote is a memfd without a path; then it
copies the page into a memfd of its own. CPython 3.14 makes the first one during ``import ctypes``;
3.11 to 3.13.5 make none before a callback is asked for.

It keeps the number of that memfd for ever, and maps what lies under it as code once more when
the page is full. So nothing that can be mapped may come to lie there.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from pyenclave._native import mapped_bytes, mapping_lines, parse_mapping
from pyenclave._worker.importer import read_locked

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["accept_trampolines", "hold_trampolines"]

_PATH = "/memfd:libffi (deleted)"
_MAX_SIZE = 1 << 16
# Who has libffi: the library itself, or an extension that it was linked into.
_EXTENSIONS = ("_ctypes", "_cffi_backend")


def hold_trampolines() -> list[int]:
    """
    Put a pipe, which cannot be mapped, under each number that libffi maps its code from.

    Its memfd is closed by that: from then on nobody can write to it. A worker without `jit` may map
    no code at all; in one with it the next memory to get that number, the ring, would be executed.

    Returns:
        The numbers, which must stay open here and in every worker.

    """
    copies = {
        (os.makedev(*mapping.device), mapping.inode)
        for mapping in map(parse_mapping, mapping_lines())
        if mapping.path == _PATH
    }
    held = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))) if copies else ():
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in copies:
                empty, other = os.pipe()
                os.close(other)
                os.dup2(empty, fd, inheritable=False)
                os.close(empty)
                held.append(fd)
    return held


def accept_trampolines(locked: Locked) -> None:
    """
    Count libffi's own copy of its code among what may be mapped, if it is one.

    To be called after :func:`hold_trampolines`, when this process has closed every descriptor that
    it does not know. A copy whose descriptor was not found is not accepted, nor is one that has
    other bytes than a locked libffi; ``check_mappings`` tells of it.
    """
    if not locked.held:
        return
    for line in mapping_lines():
        mapping = parse_mapping(line)
        size = mapping.end - mapping.start
        if mapping.path != _PATH or mapping.permissions != "r-xp" or size > _MAX_SIZE:
            continue
        if _is_of_libffi(mapped_bytes(mapping), locked):
            locked.sealed.add((os.makedev(*mapping.device), mapping.inode))


def _is_of_libffi(code: bytes, locked: Locked) -> bool:
    """Whether *code* is part of a locked object that has libffi in it."""
    libraries = [entry for name, entry in locked.libraries.items() if name.startswith("libffi.so")]
    extensions = [locked.modules[name] for name in _EXTENSIONS if name in locked.modules]
    return any(code in read_locked(entry) for entry in (*libraries, *extensions))
