"""
Evidence of our own enclaves: container ↔ bytes, and what the report data binds.

The byte-exact description is ``docs/formats/evidence.md``. The container itself is not signed;
every field in it is bound by the quote (the machine's evidence the other way round: it binds the
quote's key), so there is exactly one way to write it: fields in ascending order, each of the
scheme's exactly once, nothing before, between or behind.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, Self

from pyenclave.errors import EvidenceFormatError

__all__ = [
    "LABEL",
    "MAGIC",
    "MAX_NONCE",
    "MAX_USER_DATA",
    "PROVISION_LABEL",
    "RUNTIME_KEY_SIZE",
    "Evidence",
    "bound_report_data",
    "length_prefixed",
    "provision_info",
]

MAGIC: Final = b"PYEVIDN\x01"
LABEL: Final = b"pyenclave-attest-v1"
PROVISION_LABEL: Final = b"pyenclave-provision-v1"

RUNTIME_KEY_SIZE: Final = 1184 + 32  # ML-KEM-768 encapsulation key (FIPS 203), then X25519
MAX_NONCE: Final = 1024
MAX_USER_DATA: Final = 16 * 1024
MAX_QUOTE: Final = 64 * 1024
MAX_RECORD: Final = 16 * 1024
MAX_MACHINE: Final = 48 * 1024
MAX_EVIDENCE: Final = 192 * 1024

_FIELD = struct.Struct("<HI")
_QUOTE, _RECORD, _RUNTIME_KEY, _USER_DATA, _NONCE, _MACHINE = 1, 2, 3, 4, 5, 6
_LIMITS: Final = {
    _QUOTE: (1, MAX_QUOTE),
    _RECORD: (1, MAX_RECORD),
    _RUNTIME_KEY: (RUNTIME_KEY_SIZE, RUNTIME_KEY_SIZE),
    _USER_DATA: (0, MAX_USER_DATA),
    _NONCE: (0, MAX_NONCE),
    _MACHINE: (1, MAX_MACHINE),
}
_BOUND: Final = (_QUOTE, _RECORD, _RUNTIME_KEY, _USER_DATA, _NONCE)
_RAW: Final = (_QUOTE, _RECORD)
_SETS: Final = (_BOUND, _RAW, (*_BOUND, _MACHINE), (*_RAW, _MACHINE))


def length_prefixed(*fields: bytes) -> bytes:
    """Concatenate *fields*, each behind its length as u32 little-endian."""
    return b"".join(struct.pack("<I", len(field)) + field for field in fields)


def bound_report_data(*, nonce: bytes, runtime_key: bytes, user_data: bytes) -> bytes:
    """Return the 64 bytes of report data that bind nonce, runtime key and user data."""
    return hashlib.sha512(length_prefixed(LABEL, nonce, runtime_key, user_data)).digest()


def provision_info(*, report_body: bytes, runtime_key: bytes, info: bytes) -> bytes:
    """
    Return the HPKE ``info`` for secrets sent to an enclave.

    Args:
        report_body: The 384-byte report body; its report data does not matter and is zeroed.
        runtime_key: The enclave's runtime public key.
        info: What the application binds besides.

    """
    if len(report_body) != 384:
        raise ValueError("a report body has 384 bytes")
    body = report_body[:320] + bytes(64)
    return length_prefixed(PROVISION_LABEL, body, runtime_key, info)


def _bad(what: str, *, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"evidence: {what}", expected=expected, found=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """
    The parts of evidence.

    Bound evidence has the first five, and the quote's report data is `bound_report_data` of them.
    Raw evidence (measured code chose the 64 bytes itself) has quote and record only.

    Attributes:
        quote: DCAP v3 quote.
        record: Signed protection record.
        runtime_key: 1,216 bytes: ML-KEM-768 key, then X25519 key; None in raw evidence.
        user_data: Set by measured code; None in raw evidence.
        nonce: The relying party's; None in raw evidence.
        machine: What the hardware below the platform says (`formats.machine`); None without.
    """

    quote: bytes
    record: bytes
    runtime_key: bytes | None = None
    user_data: bytes | None = None
    nonce: bytes | None = None
    machine: bytes | None = None

    @property
    def raw(self) -> bool:
        """Whether measured code chose the report data itself."""
        return self.runtime_key is None

    def _fields(self) -> dict[int, bytes]:
        bound = (self.runtime_key, self.user_data, self.nonce)
        machine = {} if self.machine is None else {_MACHINE: self.machine}
        if all(value is None for value in bound):
            return {_QUOTE: self.quote, _RECORD: self.record, **machine}
        if self.runtime_key is None or self.user_data is None or self.nonce is None:
            raise ValueError("bound evidence has runtime key, user data and nonce")
        return {
            _QUOTE: self.quote,
            _RECORD: self.record,
            _RUNTIME_KEY: self.runtime_key,
            _USER_DATA: self.user_data,
            _NONCE: self.nonce,
            **machine,
        }

    def to_bytes(self) -> bytes:
        """
        Return the container.

        Raises:
            ValueError: A field is longer than its limit, or only some of the bound ones are there.

        """
        parts = [MAGIC]
        for kind, value in self._fields().items():
            low, high = _LIMITS[kind]
            if not low <= len(value) <= high:
                raise ValueError(f"evidence field {kind} has {len(value)} bytes, not {low}…{high}")
            parts += [_FIELD.pack(kind, len(value)), value]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Parse a container.

        Raises:
            EvidenceFormatError: Anything but the one way to write it.

        """
        if len(data) > MAX_EVIDENCE:
            raise _bad("too long", expected=f"at most {MAX_EVIDENCE} bytes", found=len(data))
        if data[: len(MAGIC)] != MAGIC:
            raise _bad("magic or version", expected=MAGIC.hex(), found=data[: len(MAGIC)].hex())
        offset = len(MAGIC)
        fields: dict[int, bytes] = {}
        while offset < len(data):
            if len(data) - offset < _FIELD.size:
                raise _bad("cut short", expected=f"{_FIELD.size} bytes", found=len(data) - offset)
            kind, length = _FIELD.unpack_from(data, offset)
            offset += _FIELD.size
            if kind not in _LIMITS:
                raise _bad("field type", expected=sorted(_LIMITS), found=kind)
            low, high = _LIMITS[kind]
            if not low <= length <= high:
                raise _bad(f"length of field {kind}", expected=f"{low}…{high}", found=length)
            if length > len(data) - offset:
                raise _bad(f"field {kind} is cut short", expected=length, found=len(data) - offset)
            if fields and kind <= max(fields):
                raise _bad("field order", expected=f"more than {max(fields)}", found=kind)
            fields[kind] = data[offset : offset + length]
            offset += length
        if tuple(fields) not in _SETS:
            raise _bad("set of fields", expected=_SETS, found=tuple(fields))
        return cls(
            quote=fields[_QUOTE],
            record=fields[_RECORD],
            runtime_key=fields.get(_RUNTIME_KEY),
            user_data=fields.get(_USER_DATA),
            nonce=fields.get(_NONCE),
            machine=fields.get(_MACHINE),
        )
