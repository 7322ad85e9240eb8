"""Files that the host lends its enclave. It keeps ciphertext; the enclave has the key."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pyenclave._locks import Ends
from pyenclave.calls import files
from pyenclave.errors import OcallError, SealingError
from pyenclave.sealed.file_store import FileStore

__all__ = ["LentFiles", "lend_files"]

_MAX_OPEN: Final = 256  # files that one enclave has open
_MAX_NAME: Final = 200


class _Open:
    """An open file. Its descriptor is not closed while somebody uses it: it could be another's."""

    def __init__(self, store: FileStore) -> None:
        self.store = store
        self.ends = Ends()

    def close(self) -> None:
        self.ends.end(self._close)

    def _close(self) -> None:
        with self.ends, self.ends.lock:
            self.store.close()


class LentFiles:
    """
    Answers the file functions of one enclave at a time, as far as it was lent files.

    Args:
        paths: The file, or the folder of files, for each name.

    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = dict(paths)
        self._ends = Ends()
        self._stores: dict[int, _Open] = {}
        self._numbers = itertools.count(1)
        self._closed = False

    def fresh(self) -> LentFiles:
        """Return the same files for another enclave: what each opens ends with it."""
        return LentFiles(self._paths)

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return what answers, by the names that images have."""
        answers = (self._control, self._open, self._read, self._write)
        return dict(zip(files.NAMES, answers, strict=True))

    def close(self) -> None:
        """Close everything; locks end. Nothing can be opened afterwards."""
        self._ends.end(self._close)

    def _close(self) -> None:
        with self._ends, self._ends.lock:
            self._closed = True
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()

    def _place(self, name: str) -> str:
        """The enclave is not asked which file of the host it means: it chooses among names."""
        top, _, rest = name.partition("/")
        path = self._paths.get(top)
        plain = len(name) <= _MAX_NAME and name.isprintable()
        if path is None or not plain:
            raise FileNotFoundError(2, "no file of this name was lent", name[:_MAX_NAME])
        if not rest:
            return path
        if rest in (".", "..") or "/" in rest or "\\" in rest or rest.startswith("."):
            raise PermissionError(1, "not a plain name of a file in a folder", name)
        return os.path.join(path, rest)

    def _open(self, name: str, write: bool, create: bool, exclusive: bool) -> int:
        path = self._place(name)
        if os.path.islink(path) and "/" in name:
            raise PermissionError(1, "a link in a folder that was lent", name)
        inside = "/" in name  # a link that somebody makes now is not followed either
        store = FileStore(path, write=write, create=create, exclusive=exclusive, follow=not inside)
        with self._ends, self._ends.lock:
            full = len(self._stores) >= _MAX_OPEN
            if not full and not self._closed:
                handle = next(self._numbers)
                self._stores[handle] = _Open(store)
                return handle
        store.close()
        raise OSError(24, "the enclave has too many files open" if full else "the enclave ended")

    @contextlib.contextmanager
    def _store(self, handle: int) -> Iterator[FileStore]:
        opened = self._stores.get(handle)
        if opened is None:
            raise OSError(9, "no open file has this handle")
        with opened.ends, opened.ends.lock:
            yield opened.store

    def _read(self, handle: int, offset: int, size: int) -> bytes:
        data = bytearray(min(size, _MOST))
        with self._store(handle) as store:
            count = store.pread(memoryview(data), offset)
        return bytes(memoryview(data)[:count])

    def _write(self, handle: int, offset: int, data: bytes) -> int:
        with self._store(handle) as store:
            return store.pwrite(memoryview(data), offset)

    def _control(self, handle: int, what: int, value: int) -> int:
        with self._store(handle) as store:
            if what == files.SIZE:
                return store.size()
            if what == files.TRUNCATE:
                store.truncate(value)
            elif what == files.SYNC:
                store.fsync()
            elif what in (files.LOCK_SHARED, files.LOCK_WRITER):
                store.lock(exclusive=what == files.LOCK_WRITER)
            elif what == files.CLOSE:
                self._stores.pop(handle, None)
                store.close()
            else:
                raise OSError(22, "no such operation on a file")
        return 0


_MOST: Final = 64 << 20  # bytes of one read


def lend_files(
    paths: Mapping[str, str | os.PathLike[str]] | None = None, /, **named: str | os.PathLike[str]
) -> dict[str, Callable[..., Any]]:
    """
    Lend files to an enclave: handlers for ``ocalls=``.

    The image names what it may be lent under ``[seal] files``. What the enclave writes is
    ciphertext under a key that only it has; what it reads is authenticated. Files end with the
    enclave that opened them, and so do their locks; each enclave of a pool opens for itself.

    Args:
        paths: The file for each name, or a folder: then the enclave opens files in it as
            ``"name/file"``. A file need not exist; a folder must.
        named: The same, as keywords.

    Returns:
        Handlers, to be given as ``ocalls=`` or merged with others.

    Raises:
        TypeError: A path is no path.
        ValueError: Nothing is lent.

    """
    given = {**(paths or {}), **named}
    if not given:
        raise ValueError("lend_files: name at least one file")
    lent = {}
    for name, path in given.items():
        if not isinstance(name, str):
            raise TypeError(f"lend_files: a name is a text, not {name!r}")
        lent[name] = os.path.abspath(os.fspath(path))
    return LentFiles(lent).handlers()


def for_launch(
    handlers: Mapping[str, Any],
) -> tuple[Mapping[str, Any], Callable[[], None]]:
    """
    Return handlers for one launch, and what closes the files that they open.

    Args:
        handlers: As they were given to the handle.

    """
    copies: dict[int, LentFiles] = {}
    own: dict[str, Any] = {}
    for name, handler in handlers.items():
        lent = getattr(handler, "__self__", None)
        if isinstance(lent, LentFiles):
            copy = copies.setdefault(id(lent), lent.fresh())
            own[name] = copy.handlers()[name]
        else:
            own[name] = handler
    if not copies:
        return handlers, _nothing

    def close() -> None:
        for copy in copies.values():
            with contextlib.suppress(OSError, SealingError, OcallError):
                copy.close()

    return own, close


def _nothing() -> None:
    """Nothing was lent."""
