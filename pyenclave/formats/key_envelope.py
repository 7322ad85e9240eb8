"""
Key envelopes: a data key that a key of a vault wraps ↔ bytes, no I/O and no cryptography.

The byte-exact description is ``docs/formats/key-envelope.md``. What an envelope says is
authenticated by the data key that is in it; until that was unwrapped, nothing here is to be
believed, the name of the vault's key least of all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final, Self

from pyenclave.errors import UnsealError

__all__ = ["ALGORITHMS", "MAC_SIZE", "MAGIC", "MAX_KID", "MAX_WRAPPED", "KeyEnvelope"]

MAGIC: Final = b"PYEKENV\x01"
MAC_SIZE: Final = 32
MAX_KID: Final = 1024
MAX_WRAPPED: Final = 1024  # RSA of 8,192 bits

# How a data key may be wrapped (RFC 7518, 4.3 and 4.4), and the number of each. What is not here
# is not asked for, whatever a file says: RSA1_5 and RSA-OAEP with SHA-1 above all.
ALGORITHMS: Final = {"RSA-OAEP-256": 1, "A128KW": 2, "A192KW": 3, "A256KW": 4}
_NAMES: Final = {number: name for name, number in ALGORITHMS.items()}

_FIXED = struct.Struct("<8sHHH2x16s32s")
if _FIXED.size != 64:  # pragma: no cover
    raise AssertionError("layout of a key envelope")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEnvelope:
    """
    A wrapped data key and the file that it is of.

    Attributes:
        kid: The identifier of the vault's key, ``https://VAULT/keys/NAME/VERSION``.
        algorithm: How it wrapped the data key: one of ``ALGORITHMS``.
        wrapped: The wrapped data key.
        file_id: The 16 bytes of the sealed file's id.
        mac: Of all else, under a key that is derived from the data key; 32 bytes.

    """

    kid: str
    algorithm: str
    wrapped: bytes
    file_id: bytes
    mac: bytes = bytes(MAC_SIZE)

    def __post_init__(self) -> None:
        _check_kid(self.kid)
        if self.algorithm not in ALGORITHMS:
            raise _wrong("algorithm", " or ".join(ALGORITHMS), repr(self.algorithm)[:60])
        if not 0 < len(self.wrapped) <= MAX_WRAPPED:
            raise _wrong("wrapped key", f"1 to {MAX_WRAPPED} bytes", len(self.wrapped))
        if len(self.file_id) != 16 or len(self.mac) != MAC_SIZE:
            raise _wrong("file id or MAC", "16 and 32 bytes", (len(self.file_id), len(self.mac)))

    def to_bytes(self) -> bytes:
        """Return the envelope."""
        kid = self.kid.encode("ascii")
        number = ALGORITHMS[self.algorithm]
        fixed = _FIXED.pack(MAGIC, number, len(kid), len(self.wrapped), self.file_id, self.mac)
        return fixed + kid + self.wrapped

    def unsigned(self) -> bytes:
        """Return the bytes that the MAC is of: the envelope with its MAC zero."""
        return replace(self, mac=bytes(MAC_SIZE)).to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read an envelope.

        Raises:
            UnsealError: It is none, or malformed.

        """
        if len(data) < _FIXED.size or not data.startswith(MAGIC):
            raise _wrong("begin", MAGIC.hex(), bytes(data[:8]).hex())
        _, number, kid_size, wrapped_size, file_id, mac = _FIXED.unpack_from(data)
        if any(data[14:16]):
            raise _wrong("reserved bytes", "zero", bytes(data[14:16]).hex())
        end = _FIXED.size + kid_size + wrapped_size
        if len(data) != end:
            raise _wrong("length", end, len(data))
        if number not in _NAMES:
            raise _wrong("algorithm", " or ".join(ALGORITHMS), f"number {number}")
        try:
            kid = bytes(data[_FIXED.size : _FIXED.size + kid_size]).decode("ascii")
        except UnicodeDecodeError:
            raise _wrong("key identifier", "ASCII", "other bytes") from None
        return cls(
            kid=kid,
            algorithm=_NAMES[number],
            wrapped=bytes(data[_FIXED.size + kid_size : end]),
            file_id=file_id,
            mac=mac,
        )


def _check_kid(kid: str) -> None:
    # It is shown to people and sent to services: nothing that ends a line or a header.
    good = 0 < len(kid) <= MAX_KID and kid.isascii() and kid.isprintable() and " " not in kid
    if not good:
        raise _wrong("key identifier", f"1 to {MAX_KID} printable characters", repr(kid)[:80])


def _wrong(what: str, expected: object, found: object) -> UnsealError:
    return UnsealError(f"the key envelope's {what} is wrong", expected=expected, found=found)
