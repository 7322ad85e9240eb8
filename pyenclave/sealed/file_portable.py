"""
Page sealing with ``cryptography``, where the native core is not: the bytes of docs/formats/page.md.

Only what sealed files need. It counts versions as the core does and is as strict, but not as fast.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.errors import EnclaveStateError, SealLimitError, UnsealError

__all__ = ["Gcm", "PageKey", "node_blank", "node_fill", "node_run"]

_PAGE: Final = 4096
_MAX: Final = 1 << 36
_HEADER = struct.Struct("<8s16sQQIB19x")


class PageKey:
    """Seals pages of 4096 bytes. The key counts the versions; the caller keeps them."""

    def __init__(self, key: bytes, *, enclave: bytes) -> None:
        self._gcm: AESGCM | None = AESGCM(key)
        self._enclave = bytes(enclave)
        self._pid = os.getpid()
        self.pages_sealed = 0

    def _cipher(self) -> AESGCM:
        if os.getpid() != self._pid:
            raise EnclaveStateError("page key: the key belongs to the process that made it")
        if self._gcm is None:
            raise EnclaveStateError("page key: closed")
        return self._gcm

    def _parts(self, version: int, address: int, flags: int, kind: int) -> tuple[bytes, bytes]:
        header = _HEADER.pack(b"PYEPAGE1", self._enclave, address, version, flags, kind)
        return version.to_bytes(8, "big") + bytes(4), header

    def seal_pages(
        self,
        pages: Any,
        out: Any,
        tags: Any,
        *,
        address: int = 0,
        flags: int = 0,
        type: int = 2,  # noqa: A002 - the core's name
    ) -> int:
        """Seal n pages to *out*, their tags to *tags*; return the first version."""
        source, target, marks = (memoryview(x).cast("B") for x in (pages, out, tags))
        count = len(source) // _PAGE
        cipher = self._cipher()
        if self.pages_sealed + count > _MAX:
            self.close()
            raise SealLimitError("seal_pages: the key has sealed as much as it may")
        first = self.pages_sealed + 1
        self.pages_sealed += count
        for i in range(count):
            nonce, header = self._parts(first + i, address + i * _PAGE, flags, type)
            at = i * _PAGE
            sealed = cipher.encrypt(nonce, bytes(source[at : at + _PAGE]), header)
            target[at : at + _PAGE] = sealed[:_PAGE]
            marks[i * 16 : i * 16 + 16] = sealed[_PAGE:]
        return first

    def open_pages(
        self,
        sealed: Any,
        tags: Any,
        out: Any,
        *,
        version: int,
        address: int = 0,
        flags: int = 0,
        type: int = 2,  # noqa: A002
    ) -> None:
        """Open n pages of consecutive versions, or zero all of *out* and raise UnsealError."""
        source, marks, target = (memoryview(x).cast("B") for x in (sealed, tags, out))
        cipher = self._cipher()
        for i in range(len(source) // _PAGE):
            nonce, header = self._parts(version + i, address + i * _PAGE, flags, type)
            at = i * _PAGE
            whole = bytes(source[at : at + _PAGE]) + bytes(marks[i * 16 : i * 16 + 16])
            try:
                target[at : at + _PAGE] = cipher.decrypt(nonce, whole, header)
            except InvalidTag:
                target[:] = bytes(len(target))
                raise UnsealError("open_pages: authentication failed") from None

    def close(self) -> None:
        """Drop the key. May be called twice."""
        self._gcm = None


def node_run(node: Any, entry: int, fanout: int, units: int) -> int:
    """Return the end of the entries from *entry* on that one read and one key open."""
    words = memoryview(node)[: 32 * fanout].cast("B").cast("Q")
    end = entry + 1
    if not words[entry]:
        while end < fanout and not words[end]:
            end += 1
        return end
    while (
        end < fanout
        and words[end] == words[end - 1] + 1
        and words[fanout + end] == words[fanout + end - 1] + units
        and words[2 * (fanout + end) : 2 * (fanout + end) + 2]
        == words[2 * (fanout + end) - 2 : 2 * (fanout + end)]
    ):
        end += 1
    return end


def node_blank(node: Any, entry: int, count: int, fanout: int) -> bool:
    """Tell whether *count* entries are all holes."""
    del fanout
    return not any(memoryview(node).cast("B")[8 * entry : 8 * (entry + count)])


def node_fill(
    node: Any,
    entry: int,
    count: int,
    fanout: int,
    units: int,
    slot: int,
    version: int,
    salt: bytes,
) -> None:
    """Give *count* entries consecutive slots (0: leave them) and versions, and one salt."""
    view = memoryview(node)
    words = view[: 32 * fanout].cast("B").cast("Q")
    for i in range(count):
        if slot:
            words[entry + i] = slot + i
        words[fanout + entry + i] = version + i * units
    view[16 * (fanout + entry) : 16 * (fanout + entry + count)] = bytes(salt) * count


class Gcm:
    """AES-GCM under one key; the caller never repeats an IV."""

    def __init__(self, key: bytes) -> None:
        self._gcm: AESGCM | None = AESGCM(key)
        self._pid = os.getpid()

    def _cipher(self) -> AESGCM:
        if os.getpid() != self._pid:
            raise EnclaveStateError("AES-GCM: the key belongs to the process that made it")
        if self._gcm is None:
            raise EnclaveStateError("AES-GCM: closed")
        return self._gcm

    def seal_into(self, iv: bytes, data: Any, out: Any, aad: bytes = b"") -> None:
        """Write ciphertext and tag of *data* to *out*."""
        memoryview(out)[:] = self._cipher().encrypt(iv, bytes(data), aad)

    def open_into(self, iv: bytes, sealed: Any, out: Any, aad: bytes = b"") -> None:
        """Write the data of *sealed* to *out*, or zero it and raise UnsealError."""
        target = memoryview(out)
        try:
            target[:] = self._cipher().decrypt(iv, bytes(sealed), aad)
        except InvalidTag:
            target[:] = bytes(len(target))
            raise UnsealError("open: authentication failed") from None

    def close(self) -> None:
        """Drop the key. May be called twice."""
        self._gcm = None
