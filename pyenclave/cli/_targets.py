"""What is to be written, looked at before the work: what cannot go there is refused at once."""

from __future__ import annotations

import os
from pathlib import Path

from pyenclave.image.build import check_replaceable

__all__ = ["check_jobs", "check_target"]


def check_target(path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """
    Refuse a place where no file can be put; whoever writes it finds out again.

    Args:
        path: Where a file is to be put.
        force: Whether one that is there is replaced.

    Raises:
        OSError: It cannot be put there, and why.

    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(21, "it is a directory", str(path))
    if not force and os.path.lexists(target):
        raise FileExistsError(17, "the file exists (--force replaces it)", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "no such directory", str(target.parent))
    check_replaceable(target)
    # A file that may only be read is replaced, not written.
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(13, "it cannot be written", str(path))
    return target


def check_jobs(jobs: int | None) -> None:
    """Refuse to work on no file at a time."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1")
