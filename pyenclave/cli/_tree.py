"""
Folders as ``pyenclave seal`` and ``unseal`` walk and fill them: nothing leads out of them.

Every path is opened name by name from the folder's own descriptor, and no link is followed at any
step, so that whoever changes the folder meanwhile cannot turn a command to other files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Self

from pyenclave.errors import ArgumentError

__all__ = ["Found", "Item", "Tree"]

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_ITEMS: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Item:
    """A regular file below a folder: its relative path, size in bytes and owner's bits."""

    path: str
    size: int
    executable: bool


@dataclass(slots=True)
class Found:
    """What is below a folder; ``special`` are links and all else that is no file."""

    files: list[Item] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)


def check_relative(path: str) -> str:
    """
    Return *path* if it is a plain relative path, as lists of files have them.

    Raises:
        ArgumentError: It is absolute, empty, or leads upwards.

    """
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ArgumentError("a path of the list leads out of the folder", found=repr(path[:200]))
    return path


class Tree:
    """
    An open folder.

    Args:
        path: The folder; a link to one may be named.

    Raises:
        OSError: There is none.

    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def lock(self) -> None:
        """
        Keep other commands from writing here, until the folder is closed.

        Raises:
            ArgumentError: Another one does.

        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArgumentError(f"another command is writing to {self.path}") from None

    @contextlib.contextmanager
    def folder(self, path: str, *, make: bool = False) -> Iterator[int]:
        """
        Open the folder *path* below this one (empty: this one), name by name.

        Args:
            path: Relative, of plain names.
            make: Make what is missing, of mode 0700.

        """
        fd = os.dup(self._fd)
        try:
            for name in check_relative(path).split("/") if path else ():
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=fd)
                try:
                    inner = os.open(name, _FOLDER, dir_fd=fd)
                except NotADirectoryError:
                    raise ArgumentError(
                        f"{self.path}/{path} leads over a link or a file",
                        expected="folders only",
                        found=name,
                    ) from None
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def open(self, path: str) -> int:
        """
        Return a descriptor of the regular file *path*, for reading.

        Raises:
            ArgumentError: It is a link or no regular file, or lies behind one.
            OSError: It cannot be opened.

        """
        parent, _, name = check_relative(path).rpartition("/")
        with self.folder(parent) as folder:
            try:
                fd = os.open(name, _FILE, dir_fd=folder)
            except OSError as error:
                with contextlib.suppress(OSError):
                    mode = os.lstat(name, dir_fd=folder).st_mode
                    if stat.S_ISLNK(mode):
                        raise ArgumentError(f"{self.path}/{path} is a link") from None
                    if stat.S_ISSOCK(mode):
                        raise ArgumentError(f"{self.path}/{path} is no regular file") from None
                raise OSError(error.errno, error.strerror, f"{self.path}/{path}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ArgumentError(f"{self.path}/{path} is no regular file")
        return fd

    def exists(self, path: str) -> bool:
        """Whether there is anything of that name, a link too."""
        parent, _, name = path.rpartition("/")
        try:
            with self.folder(parent) as folder:
                os.lstat(name, dir_fd=folder)
        except FileNotFoundError:
            return False
        return True

    def scan(self) -> Found:
        """
        List all that is below, sorted, by relative path.

        Raises:
            ArgumentError: There is more than any list holds.
            OSError: A folder cannot be read.

        """
        found = Found()
        waiting = [""]
        while waiting:
            here = waiting.pop()
            with self.folder(here) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    path = f"{here}/{entry.name}" if here else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        found.folders.append(path)
                        waiting.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        info = entry.stat(follow_symlinks=False)
                        found.files.append(
                            Item(path, info.st_size, bool(info.st_mode & stat.S_IXUSR))
                        )
                    else:
                        found.special.append(path)
            if len(found.files) + len(found.folders) + len(found.special) > _MAX_ITEMS:
                raise ArgumentError(f"{self.path} holds too much", expected=f"{_MAX_ITEMS} names")
        for names in (found.folders, found.special):
            names.sort()
        found.files.sort(key=lambda item: item.path)
        return found
