"""
Keys of sealed files, and the sealing of their pages.

Everything derives from the file key by HKDF-SHA-256 (RFC 5869) over distinct labels and the file's
id. Pages are sealed under keys of one *salt* each; a salt is new for every opening for writing, so
that two copies of a file that are written apart never share a key, and the page key itself counts
its versions. Where the native core is missing (a system without it), pages are sealed with
``cryptography``, to the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

from pyenclave.errors import NotInEnclaveError, SealingError
from pyenclave.formats.sealed_file import MAX_VERSION
from pyenclave.sealed.policy import SealPolicy

try:
    from pyenclave._core import PageKey
except ImportError:  # pragma: no cover - systems without the native core
    from pyenclave.sealed.file_portable import PageKey  # type: ignore[assignment]

__all__ = ["KEY_CONTEXT", "FileKeys", "KeyObject", "SealKey", "key_root"]

_LABEL: Final = b"pyenclave/file/1"
KEY_CONTEXT: Final = _LABEL  # what a key object is asked for
_KEPT: Final = 64  # page keys of other salts that stay ready
_sessions = iter(range(1 << 62))

NODE_TYPE: Final = 3  # page types: SGX's 2 is an ordinary page, 3 one that holds versions
FREE_TYPE: Final = 4
DATA_TYPE: Final = 2


@runtime_checkable
class KeyObject(Protocol):
    """What can be given as ``key`` instead of 32 bytes."""

    def derive(self, context: bytes) -> bytes:
        """Return 32 secret bytes, always the same for one *context*."""


SealKey = bytes | bytearray | memoryview | KeyObject


def key_root(key: object) -> bytearray:
    """
    Return the secret that all keys of files under *key* derive from; the caller wipes it.

    Args:
        key: 32 bytes, or an object with ``derive``.

    Raises:
        NotInEnclaveError: A SealPolicy: its keys are only inside an enclave.
        TypeError, ValueError: Not a key.

    """
    if isinstance(key, SealPolicy):
        raise NotInEnclaveError(
            "a SealPolicy is a key only inside an enclave",
            expected="32 bytes or a key object",
            found=str(key),
            advice="Open the file in trusted code, or give 32 bytes.",
        )
    if isinstance(key, KeyObject):
        secret: bytes | bytearray | memoryview = key.derive(KEY_CONTEXT)
        if not isinstance(secret, bytes | bytearray) or len(secret) != 32:
            raise SealingError("the key object did not derive 32 bytes")
    elif isinstance(key, bytes | bytearray | memoryview):
        secret = key
    else:
        raise TypeError(f"key: expected 32 bytes or a key object, found {type(key).__name__}")
    if memoryview(secret).nbytes != 32:
        raise ValueError(f"key: expected 32 bytes, found {memoryview(secret).nbytes}")
    return bytearray(hmac.digest(_LABEL, memoryview(secret).cast("B"), "sha256"))


def _expand(root: bytearray, info: bytes) -> bytes:
    return hmac.digest(root, info + b"\x01", "sha256")


class FileKeys:
    """
    The keys of one open file.

    Args:
        root: What `key_root` gave; it is taken over and wiped by `close`.
        file_id: 16 bytes.
        random: Source of random bytes.

    """

    def __init__(
        self, root: bytearray, file_id: bytes, *, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._root = root
        self._id = bytes(file_id)
        self._random = random
        self._mac = bytearray(_expand(root, _LABEL + b"/header" + self._id))
        self._names = bytearray(_expand(root, _LABEL + b"/name" + self._id))
        self._pages = bytearray(_expand(root, _LABEL + b"/pages" + self._id))
        self._kept: OrderedDict[bytes, PageKey] = OrderedDict()
        self._own: PageKey | None = None
        self.salt = b""
        self.committed = 0  # versions of this salt that a commit may refer to
        self.limit = MAX_VERSION  # versions under one salt; tests make it small

    def header_mac(self, header: bytes | bytearray) -> bytes:
        """Return the 32-byte MAC of a header whose MAC field is zero."""
        self._check()
        return hmac.digest(self._mac, header, "sha256")

    def name_tag(self, name: bytes) -> bytes:
        """Return the 16 bytes that bind the file's name."""
        self._check()
        return hmac.digest(self._names, name, "sha256")[:16]

    def _check(self) -> None:
        if not self._root:
            raise SealingError("the keys of this file were wiped")

    def _derive(self, salt: bytes) -> PageKey:
        self._check()
        extracted = hmac.digest(salt, self._pages, "sha256")  # HKDF-Extract
        secret = hmac.digest(extracted, _LABEL + b"/page" + self._id + b"\x01", "sha256")
        return PageKey(secret, enclave=self._id)

    def opener(self, salt: bytes) -> PageKey:
        """Return the key of *salt*, to open pages with."""
        if salt == self.salt and self._own is not None:
            return self._own
        key = self._kept.get(salt)
        if key is None:
            key = self._derive(salt)
            if len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)[1].close()
            self._kept[salt] = key
        else:
            self._kept.move_to_end(salt)
        return key

    def start(self, context: bytes) -> None:
        """
        Begin to seal: choose a new salt.

        A random generator that repeats itself (a restored virtual machine) must not repeat a salt:
        time, process, a count and *context* go in too.
        """
        self._check()
        hedge = f"{time.time_ns()} {time.monotonic_ns()} {os.getpid()} {next(_sessions)}".encode()
        fresh = self._random(32)
        self._retire()
        parts = b"".join(len(part).to_bytes(8, "little") + part for part in (fresh, hedge, context))
        self.salt = hashlib.sha256(_LABEL + b"/salt" + parts).digest()[:16]
        self._own = self._derive(self.salt)
        self.committed = 0

    def _retire(self) -> None:
        if self._own is not None:
            # It never seals again, but opens what it sealed.
            self._own.close()
            self._own = None

    @property
    def sealed(self) -> int:
        """How many versions the current salt has used."""
        return 0 if self._own is None else self._own.pages_sealed

    def sealer(self, pages: int) -> PageKey:
        """Return the key to seal *pages* pages with, under a new salt where the old is used up."""
        if self._own is None or self._own.pages_sealed + pages > self.limit:
            self.start(self.salt)
        own = self._own
        if own is None:  # pragma: no cover - start() sets it or raises
            raise SealingError("there is no key to seal with")
        return own

    def close(self) -> None:
        """Wipe every key. May be called twice."""
        self._retire()
        while self._kept:
            self._kept.popitem()[1].close()
        for secret in (self._mac, self._names, self._pages, self._root):
            secret[:] = bytes(len(secret))
            del secret[:]

    def __repr__(self) -> str:
        return f"<FileKeys of {self._id.hex()}>"

    def __reduce__(self) -> Any:
        raise TypeError("keys cannot be pickled or copied")
