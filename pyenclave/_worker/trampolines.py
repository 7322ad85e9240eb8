"""
The code page of libffi for callbacks, which it makes when ``ctypes`` is imported.

libffi maps a page of its own code once more, so that no memory is ever writable and executable. It
looks for the file that it was loaded from, which in a zygote is a memfd without a path; then it
copies the page into a memfd of its own. CPython 3.14, and later releases of 3.13, make the first
one during ``import ctypes``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyenclave._native import mapped_bytes, mapping_lines, parse_mapping
from pyenclave._worker.importer import read_locked

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["accept_trampolines"]

_PATH = "/memfd:libffi (deleted)"
_MAX_SIZE = 1 << 16
# Who has libffi: the library itself, or an extension that it was linked into.
_EXTENSIONS = ("_ctypes", "_cffi_backend")


def accept_trampolines(locked: Locked) -> None:
    """
    Count libffi's own copy of its code among what may be mapped, if it is one.

    To be called when this process has closed every descriptor that it does not know, that memfd's
    among them: then nobody can write to it any more. What is not accepted is told by
    ``check_mappings``.
    """
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
