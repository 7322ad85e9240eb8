"""
Images that this process launched before: read, sealed and described once.

A service launches one image again and again. Its bytes decide: only an image that is equal to the
last byte is found here, so nothing can be taken for something else. What the host concludes from
an image protects nobody in any case; platform and worker judge the sealed copy themselves.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import Final

from pyenclave._locks import Lock
from pyenclave._memfd import sealed
from pyenclave.calls.ocalls import Ocall
from pyenclave.calls.signature import Signature
from pyenclave.formats.image import Image

__all__ = ["Prepared", "prepare"]

_KEPT: Final = 4
_LARGEST: Final = 16 << 20  # bytes; a larger one is read again each time


class Prepared:
    """
    An image, ready to be launched.

    Args:
        data: The whole file.

    Attributes:
        data: The bytes.
        info: What the image says of itself.
        signed: Whether it has a signature, which nobody judged yet.
        signatures: The trusted functions, in the order of the image.
        names: Their names.
        functions: The same, as people write them.
        ocalls: The host functions that they may call, in the order of the image.
        fd: A memory file with the bytes that nobody can change any more; closed with this object.

    Raises:
        ImageError: The bytes are not an image.

    """

    def __init__(self, data: bytes) -> None:
        image = Image.parse(data)
        self.data = data
        self.info = image.info
        self.signed = image.sigstruct is not None
        self.signatures = tuple(Signature.from_wire(item) for item in image.info.functions)
        self.names = tuple(item.name for item in self.signatures)
        self.functions = tuple(map(str, self.signatures))
        self.ocalls = tuple(Ocall.from_wire(item) for item in image.info.ocalls)
        self._lock = hashlib.sha256(image.lock_bytes).digest()
        self.fd = sealed("pyenclave-image", data)
        weakref.finalize(self, os.close, self.fd)

    def expect(self, debug: bool | None) -> tuple[bytes, bool]:
        """Return the digest of its lock, and whether it will be launched as debug."""
        return self._lock, not self.signed if debug is None else debug


_lock = Lock()
_kept: list[Prepared] = []  # the last used at the end


def prepare(data: bytes) -> Prepared:
    """
    Return the image of which *data* are the bytes.

    Raises:
        ImageError: They are not an image.

    """
    with _lock:
        for place, known in enumerate(_kept):
            if known.data is data or known.data == data:
                _kept.append(_kept.pop(place))
                return known
    prepared = Prepared(data)
    if len(data) <= _LARGEST:
        with _lock:
            _kept.append(prepared)
            del _kept[:-_KEPT]
    return prepared


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread may have held it when this child was made
    _lock = Lock()


os.register_at_fork(after_in_child=_after_fork)
