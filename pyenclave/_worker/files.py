"""
What packages open by path: data files of the lock, and shared objects that are mapped already.

Inside, no path can be opened. A package that reads a file of its own while it is imported, or
loads a library through ``ctypes`` by its path, gets the copy that was hashed instead. Nothing else
changes: any other path goes to the system, which refuses it.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["adapt_ctypes", "install", "open_locked"]

_real_open = builtins.open


def open_locked(locked: Locked, file: Any, mode: str, encoding: Any, errors: Any) -> IO[Any] | None:
    """Return a locked data file, opened for reading; None: *file* is no such file."""
    if not locked.data or not isinstance(file, str | os.PathLike) or set(mode) & set("wax+"):
        return None
    path = os.fspath(file)
    entry = locked.data.get(path) or locked.data.get(os.path.normpath(path))
    if entry is None:
        return None
    data = io.BytesIO(locked.source(entry))
    return data if "b" in mode else io.TextIOWrapper(data, encoding or "utf-8", errors)


def mapped_path(locked: Locked, name: Any) -> Any:
    """Return the path by which the loader knows a locked object; *name* itself if it is none."""
    if not isinstance(name, str | os.PathLike) or "/" not in os.fspath(name):
        return name
    path = os.path.realpath(name)
    for entries in (locked.libraries, locked.modules):
        for entry in entries.values():
            if entry.path == path and entry.kind in ("library", "extension") and entry.place[0]:
                return f"/proc/self/fd/{entry.place[0]}"
    return name


def install(locked: Locked) -> None:
    """Have this process's ``open`` and ``ctypes`` know the lock's files."""

    def open_file(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> IO[Any]:
        found = open_locked(locked, file, mode, encoding, errors)
        if found is not None:
            return found
        return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)

    builtins.open = open_file  # type: ignore[assignment]
    io.open = open_file  # type: ignore[assignment]
    if "ctypes" in sys.modules:  # numpy imports it
        adapt_ctypes(locked, sys.modules["ctypes"])


def adapt_ctypes(locked: Locked, module: Any) -> None:
    """Have ``ctypes.CDLL`` take the mapped copy of a locked library for its path."""
    real = module._dlopen  # noqa: SLF001 - there is no public one

    def dlopen(name: Any, mode: int) -> Any:
        return real(mapped_path(locked, name), mode)

    module._dlopen = dlopen  # noqa: SLF001
