"""
Sealed files through fsspec: ``sealed::file://…``, ``sealed::s3://…``, over any other file system.

    with fsspec.open("sealed::file:///data/x.parquet", sealed={"key": key}) as file: ...
    pandas.read_parquet("sealed::s3://b/x.parquet", storage_options={"sealed": {"key": key}})

Content is ciphertext where it rests and on its way there; names, folders, sizes (to a page) and
times are not hidden. Paths are those of the file system below, and sizes are those of the
plaintext. What holds and what does not is in ``docs/sealed-files.md``.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import fsspec
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem

from pyenclave.errors import SealingError
from pyenclave.sealed._held import HeldKey, read_key_file
from pyenclave.sealed._remote import BLOCK, Outgoing, RangeReader
from pyenclave.sealed.file import open_sealed

__all__ = ["SealedFileSystem"]

_THREADS: Final = 8  # that ask for the sizes of a folder's files
_HAVE_SIZES: Final = 4  # files; fewer are asked for one after the other


class _Guarded(type(ChainedFileSystem)):  # type: ignore[misc]  # fsspec has no types
    """fsspec makes its cache's token from the text of all arguments: no key may be among them."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        key = kwargs.get("key")
        if isinstance(key, bytes | bytearray | memoryview):
            kwargs["key"] = HeldKey(key)
        elif key is not None and not isinstance(key, HeldKey):
            raise TypeError(f"key= takes 32 bytes, not {type(key).__name__}; a path is key_file=")
        return super().__call__(*args, **kwargs)


class SealedFileSystem(ChainedFileSystem, metaclass=_Guarded):  # type: ignore[misc]
    """
    A file system of sealed files over another one.

    Args:
        fs: The file system below; or it is made of the two that follow (as chained URLs do).
        target_protocol: Its protocol.
        target_options: Its options.
        fo: Not used: fsspec's name for the path below.
        key: The 32 bytes of the files' key. It is neither shown nor pickled nor written as JSON.
        key_file: Or a file that is this key. Only the path is pickled and written.
        name: What the files are bound to (the ``name=`` of `open_sealed`).
        page_size: Of files that are made: bytes, a power of two.
        auto_mkdir: Make folders that are missing when a file is written, as on object stores,
            which have none (zarr and partitioned data sets rely on it).

    Raises:
        TypeError: There is no key, or both; or no file system below.
        ValueError: The key has not 32 bytes.

    """

    protocol = "sealed"
    storage_options: dict[str, Any]  # fsspec sets it
    _strip_tokenize_options = ("fo",)  # one instance for all paths, so one key in memory

    def __init__(
        self,
        fs: Any = None,
        *,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        fo: Any = None,
        key: HeldKey | None = None,
        key_file: str | os.PathLike[str] | None = None,
        name: bytes = b"",
        page_size: int | None = None,
        auto_mkdir: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (key is None) == (key_file is None):
            raise TypeError(
                'sealed files need one key: sealed={"key": 32 bytes} or {"key_file": path}'
            )
        if fs is None:
            if target_protocol is None:
                raise TypeError("which file system below? fs=…, or a URL such as sealed::file://…")
            fs = fsspec.filesystem(target_protocol, **(target_options or {}))
        self.fs = fs
        self._key = HeldKey(read_key_file(key_file)) if key_file is not None else key
        self._name = bytes(name)
        self._page_size = page_size
        self._auto_mkdir = auto_mkdir
        self._local = isinstance(fs, LocalFileSystem)

    # ---- what is shown, kept and sent ------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<SealedFileSystem over {type(self.fs).__name__}, {self._key!r}>"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        if "key" in self.storage_options:
            raise TypeError(
                "a key is never pickled: give key_file= instead of key=, and each process reads it"
            )
        return super().__reduce__()

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:
        """Return what makes the same file system again: ``key_file``, but never the key."""
        kept: dict[str, Any] = self.storage_options
        try:
            self.storage_options = {name: kept[name] for name in kept if name != "key"}
            made: dict[str, Any] = super().to_dict(include_password=include_password)
        finally:
            self.storage_options = kept
        return made

    # ---- paths -----------------------------------------------------------------------------------

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        text = str(fsspec.utils.stringify_path(path))
        for lead in ("sealed://", "sealed::"):
            text = text.removeprefix(lead)
        return text.rstrip("/") or text[:1]

    def unstrip_protocol(self, name: str) -> str:
        """Return the URL of a path, as `fsspec.open` takes it."""
        return f"sealed::{self.fs.unstrip_protocol(self._below(name))}"

    def _below(self, path: Any) -> Any:
        return self.fs._strip_protocol(self._strip_protocol(path))  # noqa: SLF001 - fsspec's own way

    # ---- files -----------------------------------------------------------------------------------

    def _sealed(self, target: Any, mode: str, options: dict[str, Any]) -> Any:
        assert self._key is not None
        given: dict[str, Any] = {"name": self._name}
        if self._page_size is not None and "r" not in mode:
            given["page_size"] = self._page_size
        return open_sealed(target, mode, key=self._key.reveal(), **{**given, **options})

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """
        Open a sealed file.

        Local files are read and changed in place. Of other file systems ranges are read, and what
        is written is made aside, sealed, in a local temporary file, and sent when it is closed;
        ``ab`` and ``r+b`` fetch it first.

        Args:
            path: The file.
            mode: ``rb``, ``wb``, ``xb``, ``ab`` or ``r+b``.
            block_size: Bytes that one request to another machine asks for at least.
            autocommit: False inside a transaction: the file gets its name at the transaction's end.
            cache_options: Not used.
            options: ``name=``, ``page_size=``, ``counter=`` of `open_sealed`, for this file; a file
                that is written has a counter only where that is in place.

        Raises:
            UnsealError: The content is not authentic, or for another key or name.

        """
        below = self._below(path)
        if mode == "rb":
            return self._sealed(
                below if self._local else self._ranges(below, block_size), mode, options
            )
        if options.get("counter") is not None and not (self._local and autocommit):
            # The counter would be advanced before the file is in its place: if it never gets there,
            # no file that the counter accepts is left.
            raise ValueError("counter= is for files that are written in place, on a local disk")
        if self._local:
            parent = os.path.dirname(below)
            if self._auto_mkdir and mode[0] in "wxa":
                os.makedirs(parent, exist_ok=True)
            if autocommit:
                return self._sealed(below, mode, options)
            aside = os.path.join(parent, f".{os.path.basename(below)}.{secrets.token_hex(8)}.part")
        else:
            aside = os.path.join(tempfile.gettempdir(), f"pyenclave-{secrets.token_hex(16)}.part")
        there = mode != "wb" and self.fs.exists(below)
        if mode[0] == "x" and there:
            raise FileExistsError(17, "the file exists", below)
        if mode[0] == "r" and not there:
            raise FileNotFoundError(2, "there is no such file", below)
        if mode[0] in "ar" and there:
            self.fs.get_file(below, aside)
        else:
            mode = mode.replace("w", "x")

        def place(done: str) -> None:
            if self._local:
                os.replace(done, below)
            else:
                self.fs.put_file(done, below)

        try:
            inner = self._sealed(aside, mode, options)
            return Outgoing(inner, aside, place, autocommit=autocommit)
        except BaseException:
            if os.path.lexists(aside):
                os.unlink(aside)
            raise

    def _ranges(self, below: str, block_size: int | None) -> RangeReader:
        def fetch(start: int, stop: int) -> bytes:
            data: bytes = self.fs.cat_file(below, start=start, end=stop)
            return data

        size = self.fs.info(below)["size"]
        if not isinstance(size, int) or size < 0:
            raise OSError(5, "the file system does not say how long the file is", below)
        return RangeReader(fetch, size, block_size if block_size and block_size > 0 else BLOCK)

    # ---- listings --------------------------------------------------------------------------------

    def _size(self, below: str) -> int:
        with self._open(below) as file:
            return int(file.seek(0, os.SEEK_END))

    def _told(self, info: dict[str, Any], *, strict: bool) -> dict[str, Any]:
        """Return what the file system below tells of a path, with the plaintext's size."""
        if info.get("type") != "file":
            return dict(info)
        told = {**info, "sealed_size": info.get("size"), "size": None, "sealed": True}
        try:
            told["size"] = self._size(info["name"])
        except SealingError:
            if strict:
                raise
            told["sealed"] = False  # another key, another name, or no sealed file at all
        except FileNotFoundError:
            if strict:
                raise
        return told

    def _all_told(self, infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(infos) <= _HAVE_SIZES:
            return [self._told(info, strict=False) for info in infos]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(lambda info: self._told(info, strict=False), infos))

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Return what is known of a path; ``size`` is the plaintext's, ``sealed_size`` the file's.

        Raises:
            UnsealError: It is a file that does not open with this key and name.

        """
        return self._told(self.fs.info(self._below(path), **kwargs), strict=True)

    def ls(self, path: Any, detail: bool = True, **kwargs: Any) -> Any:
        """
        List a folder. A file that does not open here has ``size`` None and ``sealed`` False.

        With *detail* each file is opened for its size; without, none is.
        """
        found = self.fs.ls(self._below(path), detail=detail, **kwargs)
        return self._all_told(found) if detail else found

    def find(
        self,
        path: Any,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **kwargs: Any,
    ) -> Any:
        """List all files below *path*; each is opened for its size if *detail* is asked for."""
        found = self.fs.find(
            self._below(path), maxdepth=maxdepth, withdirs=withdirs, detail=detail, **kwargs
        )
        if not detail:
            return found
        return dict(zip(found, self._all_told(list(found.values())), strict=True))

    def glob(self, path: Any, maxdepth: int | None = None, **kwargs: Any) -> Any:
        """List what matches a pattern; opened are only files of a listing with ``detail=True``."""
        detail = kwargs.pop("detail", False)
        found = self.fs.glob(self._below(path), maxdepth=maxdepth, detail=detail, **kwargs)
        if not detail:
            return found
        return dict(zip(found, self._all_told(list(found.values())), strict=True))

    def walk(self, path: Any, maxdepth: int | None = None, **kwargs: Any) -> Iterator[Any]:
        """Walk over folders, as the file system below does."""
        detail = kwargs.pop("detail", False)
        for root, folders, files in self.fs.walk(
            self._below(path), maxdepth=maxdepth, detail=detail, **kwargs
        ):
            if detail:
                told = self._all_told(list(files.values()))
                yield root, folders, dict(zip(files, told, strict=True))
            else:
                yield root, folders, files

    # ---- everything else is the file system's below ---------------------------------------------

    def exists(self, path: Any, **kwargs: Any) -> bool:
        """Whether there is something, whatever key it has."""
        return bool(self.fs.exists(self._below(path), **kwargs))

    def lexists(self, path: Any, **kwargs: Any) -> bool:
        """Whether there is something, a link that leads nowhere too."""
        return bool(self.fs.lexists(self._below(path), **kwargs))

    def isfile(self, path: Any) -> bool:
        """Whether it is a file, whatever key it has."""
        return bool(self.fs.isfile(self._below(path)))

    def isdir(self, path: Any) -> bool:
        """Whether it is a folder."""
        return bool(self.fs.isdir(self._below(path)))

    def mkdir(self, path: Any, create_parents: bool = True, **kwargs: Any) -> None:
        """Make a folder."""
        self.fs.mkdir(self._below(path), create_parents=create_parents, **kwargs)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        self.fs.makedirs(self._below(path), exist_ok=exist_ok)

    def rmdir(self, path: Any) -> None:
        """Remove an empty folder."""
        self.fs.rmdir(self._below(path))

    def rm_file(self, path: Any) -> None:
        """Remove a file."""
        self.fs.rm_file(self._below(path))

    _rm = rm_file

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files and folders."""
        paths = path if isinstance(path, list) else [path]
        self.fs.rm([self._below(item) for item in paths], recursive=recursive, maxdepth=maxdepth)

    def cp_file(self, path1: Any, path2: Any, **kwargs: Any) -> None:
        """Copy a sealed file as it is: nothing is opened."""
        self.fs.cp_file(self._below(path1), self._below(path2), **kwargs)

    def mv(self, path1: Any, path2: Any, **kwargs: Any) -> None:
        """Move a sealed file as it is: nothing is opened."""
        self.fs.mv(self._below(path1), self._below(path2), **kwargs)

    def created(self, path: Any) -> Any:
        """Return when the file below was made."""
        return self.fs.created(self._below(path))

    def modified(self, path: Any) -> Any:
        """Return when the file below was changed."""
        return self.fs.modified(self._below(path))

    def ukey(self, path: Any) -> str:
        """Return a text that changes when the file below does."""
        return str(self.fs.ukey(self._below(path)))

    def checksum(self, path: Any) -> Any:
        """Return a number that changes when the file below does."""
        return self.fs.checksum(self._below(path))

    def invalidate_cache(self, path: Any = None) -> None:
        """Forget listings of the file system below."""
        self.fs.invalidate_cache(None if path is None else self._below(path))
