"""
A file key as the storage options of fsspec hold it: nothing that shows or copies them has the key.

fsspec keeps the arguments of each file system, makes its cache's token from their text, and pickles
and writes them as JSON; dask does the same once more. So the key is put into this object before
fsspec sees it.
"""

from __future__ import annotations

import hmac
import os
import stat
from typing import Final, NoReturn

__all__ = ["KEY_SIZE", "HeldKey", "read_key_file"]

KEY_SIZE: Final = 32
_LABEL: Final = b"pyenclave/key-fingerprint/1"


class HeldKey:
    """
    32 secret bytes. Two that hold the same key are equal, and have the same text.

    Args:
        key: The bytes; a copy is kept.

    Raises:
        TypeError: *key* is no bytes.
        ValueError: They are not 32.

    """

    __slots__ = ("_fingerprint", "_key")

    def __init__(self, key: bytes | bytearray | memoryview) -> None:
        if not isinstance(key, bytes | bytearray | memoryview):
            raise TypeError(f"a key is {KEY_SIZE} bytes, not {type(key).__name__}")
        self._key = bytearray(key)
        if len(self._key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(self._key)}")
        self._fingerprint = hmac.digest(self._key, _LABEL, "sha256")[:8].hex()

    @property
    def fingerprint(self) -> str:
        """What tells keys apart and gives none away: 16 hexadecimal digits."""
        return self._fingerprint

    def reveal(self) -> bytes:
        """Return the key."""
        return bytes(self._key)

    def __repr__(self) -> str:
        return f"<key {self._fingerprint}>"

    def __dask_tokenize__(self) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeldKey):
            return NotImplemented
        return hmac.compare_digest(self._key, other._key)

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a key is never pickled: give key_file= instead of key=, and each process reads it"
        )

    def __copy__(self) -> HeldKey:
        return self

    def __deepcopy__(self, memo: object) -> HeldKey:
        return self


def read_key_file(path: str | os.PathLike[str]) -> bytes:
    """
    Return the 32 bytes that a key file is.

    Raises:
        ValueError: It is no regular file, or has another length.
        OSError: It cannot be read.

    """
    regular = stat.S_ISREG(os.stat(path).st_mode)  # opening a device may do something
    if regular:
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        fd = os.open(path, os.O_RDONLY | flags)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if not regular:
            os.close(fd)
    if not regular:
        raise ValueError(f"{os.fspath(path)!r} is no regular file, so no key file")
    with os.fdopen(fd, "rb") as file:
        key = file.read(KEY_SIZE + 1)
    if len(key) != KEY_SIZE:
        found = f"more than {KEY_SIZE}" if len(key) > KEY_SIZE else str(len(key))
        raise ValueError(
            f"the key file {os.fspath(path)!r} has {found} bytes; a key file is {KEY_SIZE} random "
            "bytes and nothing else"
        )
    return key
