"""Does this machine have what an image's lock lists?"""

from __future__ import annotations

import hashlib

from pyenclave._files import open_file
from pyenclave.errors import RuntimeLockError
from pyenclave.formats.lock import Lock, Roots, this_python

__all__ = ["check", "differences"]

_CHUNK = 1 << 20


def differences(lock: Lock, roots: Roots) -> tuple[str, ...]:
    """
    Compare a lock with the files of this machine.

    Args:
        lock: The lock list of an image.
        roots: Where this machine keeps its Python.

    Returns:
        One line for each file that is missing or changed, and one for another Python.

    """
    lines = []
    if lock.python != this_python():
        lines.append(f"python: expected {lock.python}, found {this_python()}")
    wanted: dict[str, tuple[str, str]] = {}
    for file in lock.bootstrap:
        wanted[file.path] = (file.sha256, "file")
    for module in lock.modules:
        if module.kind != "namespace":
            wanted.setdefault(module.path, (module.sha256, f"module {module.name}"))
    for library in lock.libraries:
        wanted[library.path] = (library.sha256, f"library {library.soname}")
    for file in lock.data:
        wanted[file.path] = (file.sha256, "data file")
    for name, (digest, what) in wanted.items():
        path = roots.resolve(name)
        try:
            found = _hash(path)
        except FileNotFoundError:
            lines.append(f"{name}: {what} is missing ({path})")
        except OSError as error:
            lines.append(f"{name}: {what} cannot be read: {error.strerror} ({path})")
        else:
            if found != digest:
                lines.append(
                    f"{name}: {what} is changed: SHA-256 {found[:16]}…, not {digest[:16]}…"
                )
    return tuple(lines)


def check(lock: Lock, roots: Roots) -> None:
    """
    Refuse a machine whose runtime differs from a lock.

    Args:
        lock: The lock list of an image.
        roots: Where this machine keeps its Python.

    Raises:
        RuntimeLockError: With a line for each file that is missing or changed.

    """
    files = differences(lock, roots)
    if files:
        raise RuntimeLockError(
            "the runtime differs from the image's lock list",
            found=f"{len(files)} difference{'s' if len(files) > 1 else ''}",
            advice="Install what the image was built with, or build it again here.",
            files=files,
        )


def _hash(path: str) -> str:
    with open(open_file(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
