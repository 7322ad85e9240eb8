"""A double of Nitro's security module: the ioctl, with a synthetic host behind it."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from pyenclave.formats import cbor
from pyenclave.testing.nitro import NitroHost

__all__ = ["Nsm"]

_MESSAGE: Final = struct.Struct("@QQQQ")
_MAX_REQUEST: Final = 0x1000
_MAX_FIELD: Final = 1024


class Nsm:
    """
    ``/dev/nsm``. Hand over its `ioctl`.

    Args:
        host: Signs the documents.
        answer: Given the request as a Python value, returns another answer (bytes are taken as
            they are), or None for the usual one.
    """

    def __init__(
        self, host: NitroHost, *, answer: Callable[[Any], object | None] | None = None
    ) -> None:
        self.host = host
        self.answer = answer
        self.requests: list[Any] = []

    def ioctl(self, fd: int, number: int, message: bytearray) -> int:
        """Do what the driver does with struct nsm_message, addresses and all."""
        del fd
        if number != 0xC0200A00 or len(message) != _MESSAGE.size:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        address, size, room_at, room = _MESSAGE.unpack(message)
        if size > _MAX_REQUEST:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        asked = cbor.loads(ctypes.string_at(address, size))
        self.requests.append(asked)
        given = self.answer(asked) if self.answer is not None else None
        if given is None:
            given = self._usual(asked)
        data = given if isinstance(given, bytes) else cbor.dumps(given)
        if len(data) > room:
            data = cbor.dumps({"Error": "BufferTooSmall"})
        ctypes.memmove(room_at, data, len(data))
        message[:] = _MESSAGE.pack(address, size, room_at, len(data))
        return 0

    def _usual(self, asked: Any) -> object:
        if asked == "GetRandom":
            return {"GetRandom": {"random": os.urandom(256)}}
        if not isinstance(asked, Mapping) or len(asked) != 1:
            return {"Error": "InvalidOperation"}
        ((name, fields),) = asked.items()
        if name == "Attestation":
            if any(value is not None and len(value) > _MAX_FIELD for value in fields.values()):
                return {"Error": "InputTooLarge"}
            return {"Attestation": {"document": self.host.document(**fields)}}
        if name == "DescribePCR":
            pcrs = self.host.payload().pcrs
            index = fields.get("index")
            if index not in pcrs:
                return {"Error": "InvalidIndex"}
            return {"DescribePCR": {"lock": index < 16, "data": pcrs[index]}}
        return {"Error": "InvalidOperation"}
