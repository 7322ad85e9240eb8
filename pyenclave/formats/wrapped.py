"""
Wrapped sealed files: the head ↔ bytes, no I/O and no cryptography.

A sealed file whose own key is sealed to an enclave, or wrapped by a key of a vault: two places for
an *envelope* that holds the file's key (a sealed blob, or a key envelope), then the sealed file.
The byte-exact description is ``docs/formats/wrapped-file.md``. The head's digest finds a place that
was written by half; what is authentic is decided when the envelope is opened.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from pyenclave.errors import UnsealError
from pyenclave.formats import key_envelope
from pyenclave.formats.key_envelope import KeyEnvelope
from pyenclave.formats.sealed import SealedHeader, split

__all__ = ["HEAD_SIZE", "MAGIC", "MAX_ENVELOPE", "PLACE_SIZE", "Envelope", "newest", "read_places"]

MAGIC: Final = b"PYEWRAP\x01"
PLACE_SIZE: Final = 4096
HEAD_SIZE: Final = 2 * PLACE_SIZE  # the sealed file begins here
_FIXED: Final = 64
MAX_ENVELOPE: Final = PLACE_SIZE - _FIXED
_MAX_GENERATION: Final = (1 << 63) - 1

_PLACE = struct.Struct("<8sQII32s8x")
if _PLACE.size != _FIXED:  # pragma: no cover
    raise AssertionError("layout of the head of a wrapped file")


@dataclass(frozen=True, slots=True)
class Envelope:
    """
    One place of the head.

    Attributes:
        generation: Its number; each resealing is one more. It stands in place ``generation & 1``.
        blob: What holds the file's key: a sealed blob, or a key envelope.

    """

    generation: int
    blob: bytes

    @property
    def of_vault(self) -> bool:
        """Whether it is a key envelope, which a key of a vault opens, and no sealed blob."""
        return self.blob.startswith(key_envelope.MAGIC)

    @property
    def header(self) -> SealedHeader:
        """
        The sealed blob's header.

        Raises:
            UnsealError: It is a key envelope.

        """
        return split(self.blob)[0]

    @property
    def key_envelope(self) -> KeyEnvelope:
        """
        The key envelope.

        Raises:
            UnsealError: It is a sealed blob.

        """
        return KeyEnvelope.from_bytes(self.blob)

    @property
    def offset(self) -> int:
        """Where in the file this place is."""
        return (self.generation & 1) * PLACE_SIZE

    def to_bytes(self) -> bytes:
        """
        Return the 4096 bytes of the place.

        Raises:
            ValueError: The blob is too long, or the generation impossible.

        """
        if not 0 < len(self.blob) <= MAX_ENVELOPE or not 1 <= self.generation <= _MAX_GENERATION:
            raise ValueError("an envelope of this length or generation does not exist")
        lead = _PLACE.pack(MAGIC, self.generation, len(self.blob), 0, bytes(32))
        digest = hashlib.sha256(lead + self.blob).digest()
        head = _PLACE.pack(MAGIC, self.generation, len(self.blob), 0, digest)
        return (head + self.blob).ljust(PLACE_SIZE, b"\0")


def _place(data: bytes, number: int) -> Envelope | None:
    """Return what stands whole in a place, or None."""
    magic, generation, length, reserved, digest = _PLACE.unpack_from(data)
    blob = data[_FIXED : _FIXED + length]
    if (
        magic != MAGIC
        or reserved
        or not 1 <= generation <= _MAX_GENERATION
        or generation & 1 != number
        or not 0 < length <= MAX_ENVELOPE
        or any(data[56:_FIXED])
        or any(data[_FIXED + length :])
    ):
        return None
    lead = _PLACE.pack(MAGIC, generation, length, 0, bytes(32))
    if hashlib.sha256(lead + blob).digest() != digest:
        return None
    found = Envelope(generation, blob)
    try:
        if found.of_vault:
            found.key_envelope  # noqa: B018 - read to see whether it can be
        else:
            split(blob)
    except UnsealError:
        return None
    return found


def read_places(head: bytes) -> tuple[Envelope | None, Envelope | None]:
    """
    Return what stands in the two places; None where nothing whole does.

    Args:
        head: The first 8192 bytes of the file.

    Raises:
        UnsealError: Fewer bytes.

    """
    if len(head) < HEAD_SIZE:
        raise UnsealError(
            "the wrapped file's head is cut off",
            expected=f"{HEAD_SIZE} bytes",
            found=len(head),
        )
    first, second = head[:PLACE_SIZE], head[PLACE_SIZE:HEAD_SIZE]
    return _place(first, 0), _place(second, 1)


def newest(head: bytes) -> Envelope:
    """
    Return the envelope of the highest generation.

    Raises:
        UnsealError: There is none: no wrapped file, or both places are damaged.

    """
    there = [place for place in read_places(head) if place is not None]
    if not there:
        raise UnsealError("the file has no whole envelope, so it is no wrapped sealed file")
    return max(there, key=lambda place: place.generation)
