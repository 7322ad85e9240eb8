"""
The protection record: what the platform saw hold when an enclave was launched.

The platform probes a worker from outside, the worker's core tries the rest from inside, and the
platform signs the outcome with its attestation key. CONFIGID of the enclave's reports and quotes
is the SHA-256 of these bytes, so evidence carries the record and binds it. The layout is described
in ``docs/formats/record.md``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Any, Final, Literal

import msgspec

from pyenclave.errors import EvidenceFormatError

__all__ = [
    "MAX_RECORD",
    "QE_MRENCLAVE",
    "QE_MRSIGNER",
    "QE_VENDOR_ID",
    "ProtectionBit",
    "ProtectionRecord",
]

#: QE vendor id of this project's quotes, a random UUID (Intel's is 939a7233-f79c-…).
QE_VENDOR_ID: Final = bytes.fromhex("5f1cbd8e2f7e4d6b9a3c70e1a4c25d19")
#: The quoting code's identity in the QE report. It names a construction, it measures nothing:
#: a software platform vouches for itself.
QE_MRENCLAVE: Final = hashlib.sha256(b"pyenclave software quoting enclave, version 1").digest()
QE_MRSIGNER: Final = hashlib.sha256(b"pyenclave software platform").digest()

MAX_RECORD: Final = 16 * 1024
_MAGIC: Final = b"PYEREC\x00\x01"
_HEADER: Final = struct.Struct("<8sI")
_SIGNATURE: Final = 64
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_MAX_BITS: Final = 64
_encoder = msgspec.json.Encoder(order="sorted")


class ProtectionBit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    One mechanism: whether it holds (or its level, such as an ABI number), and who tried it.

    Attributes:
        value: True, False or a level above 0.
        by: ``outside``: the platform tried it on the worker; ``inside``: the worker's core did.

    """

    value: bool | int
    by: Literal["outside", "inside"]


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1]
    level: Literal["embedded", "service"]
    tee: Literal["none", "sev-snp", "tdx", "sgx"]
    platform_svn: int
    ephemeral: bool
    debug: bool
    jit: bool
    enclave_id: str
    bits: dict[str, ProtectionBit]


_decoder = msgspec.json.Decoder(_Body, strict=True)


class ProtectionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """
    A protection record with its signature.

    Attributes:
        level: Column of the table of levels: ``embedded`` or ``service``.
        tee: The TEE that the platform's root is bound to, or ``none``.
        platform_svn: Security version of the platform.
        ephemeral: The platform's root lives in memory only.
        debug: The enclave was launched as debug.
        jit: The image may make memory executable that was writable.
        enclave_id: 16 random bytes as hexadecimal digits, new for each launch.
        bits: The mechanisms by name.
        signature: ECDSA P-256 over SHA-256 of :meth:`signed_bytes`, R ‖ S, 64 bytes big-endian;
            empty while unsigned.

    """

    level: Literal["embedded", "service"]
    tee: Literal["none", "sev-snp", "tdx", "sgx"]
    platform_svn: int
    ephemeral: bool
    debug: bool
    jit: bool
    enclave_id: str
    bits: dict[str, ProtectionBit]
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        """Return what the signature is over: magic, length and canonical JSON."""
        members: dict[str, Any] = {
            name: getattr(self, name) for name in _Body.__struct_fields__ if name != "version"
        }
        body = _encoder.encode(_Body(version=1, **members))
        return _HEADER.pack(_MAGIC, len(body)) + body

    def to_bytes(self) -> bytes:
        """
        Return the whole record.

        Raises:
            ValueError: It is not signed yet.

        """
        if len(self.signature) != _SIGNATURE:
            raise ValueError("the protection record is not signed")
        return self.signed_bytes() + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> ProtectionRecord:
        """
        Read a record. Its signature is not verified here.

        Raises:
            EvidenceFormatError: Wrong magic, length, version, member or value, or any byte that
                differs from the canonical form.

        """
        data = bytes(data)
        if not _HEADER.size + _SIGNATURE < len(data) <= MAX_RECORD:
            raise EvidenceFormatError(
                "protection record has an impossible length",
                expected=f"{_HEADER.size + _SIGNATURE + 1} to {MAX_RECORD} bytes",
                found=len(data),
            )
        magic, length = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise EvidenceFormatError(
                "protection record has another magic", expected=_MAGIC.hex(), found=magic.hex()
            )
        if length != len(data) - _HEADER.size - _SIGNATURE:
            raise EvidenceFormatError(
                "protection record's length does not match",
                expected=len(data) - _HEADER.size - _SIGNATURE,
                found=length,
            )
        try:
            body = _decoder.decode(data[_HEADER.size : _HEADER.size + length])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EvidenceFormatError(f"protection record is malformed: {error}") from None
        record = cls(
            signature=data[-_SIGNATURE:],
            **{name: getattr(body, name) for name in body.__struct_fields__ if name != "version"},
        )
        record.check()
        if record.to_bytes() != data:
            raise EvidenceFormatError("protection record is not in its canonical form")
        return record

    def check(self) -> None:
        """
        Check every member's range.

        Raises:
            EvidenceFormatError: One is out of range.

        """
        if not 0 <= self.platform_svn <= 0xFFFF:
            raise EvidenceFormatError(
                "protection record: platform_svn", expected="0 to 65535", found=self.platform_svn
            )
        if not re.fullmatch(r"[0-9a-f]{32}", self.enclave_id):
            raise EvidenceFormatError(
                "protection record: enclave_id",
                expected="32 lower-case hexadecimal digits",
                found=self.enclave_id[:64],
            )
        if len(self.bits) > _MAX_BITS:
            raise EvidenceFormatError(
                "protection record has too many bits", expected=_MAX_BITS, found=len(self.bits)
            )
        for name, bit in self.bits.items():
            if not _NAME.match(name):
                raise EvidenceFormatError("protection record: name of a bit", found=name[:64])
            if not isinstance(bit.value, bool) and not 0 <= bit.value < 1 << 31:
                raise EvidenceFormatError(f"protection record: value of {name}", found=bit.value)

    def holds(self, name: str) -> bool:
        """Return whether mechanism *name* is recorded as holding; an unknown one does not."""
        bit = self.bits.get(name)
        return bit is not None and bool(bit.value)
