"""
What may be mapped, and which modules may be loaded, in a zygote and in a worker.

Code comes from two places only: bootstrap files whose hash was checked, and memfds that were
write-sealed before they were mapped. One page is neither: libffi's own copy of its code, to which
no descriptor is left (``trampolines.py``). Everything else that has a file behind it is refused,
and so is memory that is writable and executable.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from pyenclave._core import new_lines
from pyenclave._native import mapping_text, parse_mapping
from pyenclave.errors import RuntimeLockError

if TYPE_CHECKING:
    from pyenclave._native import Mapping
    from pyenclave._worker.importer import Locked

__all__ = ["check_mappings", "check_modules", "foreign_mappings"]

# Memory that has no file. [vdso] and [vsyscall] are the kernel's code.
_KERNEL = ("[heap]", "[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")
_SECRETMEM = "/secretmem (deleted)"


def foreign_mappings(
    lines: Iterable[bytes],
    locked: Locked,
    *,
    jit: bool = False,
    data: Collection[tuple[int, int]] = (),
) -> list[str]:
    """
    List the mappings that should not be there.

    Args:
        lines: What is mapped, as ``_native.mapping_lines`` gives it.
        locked: What was verified.
        jit: Whether memory may be executable without a file, and writable and executable.
        data: (device, inode) of further files that may be mapped, never executable: image, ring.

    Returns:
        One line a mapping, each with its reason; empty if all is well.

    """

    @functools.cache  # most often nobody asks
    def hashed() -> dict[str, tuple[int, int]]:
        return {path: identity for identity, path in locked.files.items()}

    wrong = []
    for line in lines:
        mapping = parse_mapping(line)
        reason = _reason(mapping, locked, hashed, data, jit=jit)
        if reason:
            wrong.append(
                f"{mapping.path or 'anonymous memory'} at {mapping.start:#x} "
                f"({mapping.permissions}): {reason}"
            )
    return wrong


def _reason(
    mapping: Mapping,
    locked: Locked,
    hashed: Callable[[], dict[str, tuple[int, int]]],
    data: Collection[tuple[int, int]],
    *,
    jit: bool,
) -> str:
    """Return why *mapping* should not be there, or nothing."""
    path = mapping.path
    identity = (os.makedev(*mapping.device), mapping.inode)
    executable = "x" in mapping.permissions
    if executable and "w" in mapping.permissions and not jit:
        return "writable and executable"
    if not path or path in _KERNEL or path.startswith("[anon"):
        if executable and path not in ("[vdso]", "[vsyscall]") and not jit:
            return "executable without a file"
        return ""
    if identity in locked.sealed:
        return ""
    if path == _SECRETMEM or identity in data:
        return "executable data" if executable else ""
    known = hashed().get(path)
    if known is not None:
        # Where stat and the mapping agree on the device (not on every overlay), the inode tells
        # a file that was put in the place of the one that was mapped.
        device, inode = known
        if device == identity[0] and inode != mapping.inode:
            return "not the file whose hash was checked"
        return ""
    # In a mount namespace of its own, a process that was in a chroot is shown the paths of what it
    # had mapped before from the root outside. The file itself must be the one that was hashed.
    inside = locked.files.get(identity)
    if inside is not None and path.endswith(inside):
        return ""
    return "not in the lock"


def check_mappings(
    fd: int | None,
    locked: Locked,
    *,
    jit: bool = False,
    data: Collection[tuple[int, int]] = (),
) -> None:
    """
    Refuse mappings that are neither locked nor sealed.

    A mapping that this process or its zygote accepted once, and that is as it was to the last
    character (addresses, rights, file, inode), is not judged again: a worker has 350 of them and
    ten of its own.

    Args:
        fd: A descriptor of ``_native.open_mappings``, or None to open one.
        locked: What was verified; remembers what was accepted.
        jit: As for ``foreign_mappings``.
        data: As for ``foreign_mappings``.

    Raises:
        RuntimeLockError: With one line a mapping.

    """
    text = mapping_text(fd)
    lines = set(new_lines(locked.snapshot, text, plain=False)) - locked.accepted
    wrong = foreign_mappings(sorted(lines), locked, jit=jit, data=data)
    if wrong:
        raise RuntimeLockError(
            "memory is mapped that is not in the lock",
            found=f"{len(wrong)} mappings",
            files=tuple(wrong),
        )
    locked.accepted |= lines
    locked.snapshot = text


def check_modules(locked: Locked) -> None:
    """
    Refuse loaded modules that have a file which the lock does not list.

    Raises:
        RuntimeLockError: With one line a module.

    """
    frozen = sys.modules["_frozen_importlib"].FrozenImporter
    wrong = []
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        spec = getattr(module, "__spec__", None)
        if path is None or path in locked.paths or getattr(spec, "loader", None) is frozen:
            continue
        wrong.append(f"{path} ({name}): loaded, but not in the lock")
    if wrong:
        raise RuntimeLockError(
            "modules are loaded that are not in the lock",
            found=f"{len(wrong)} modules",
            files=tuple(wrong),
        )
