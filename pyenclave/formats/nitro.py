"""
Attestation documents of AWS Nitro enclaves: a COSE_Sign1 over a CBOR map.

AWS: Verifying the root of trust (attestation_process.md of the NSM API), 3.1 and 3.2. The payload
is signed as it is, and newer NSM software writes its maps with indefinite length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor
from pyenclave.formats.cose import Sign1

__all__ = ["MAX_SIZE", "PCR_SIZES", "NitroDocument", "NitroPayload"]

MAX_SIZE: Final = 16 * 1024  # the driver's response has at most 0x3000 bytes
PCR_SIZES: Final = {"SHA256": 32, "SHA384": 48, "SHA512": 64}
_MAX_CERTIFICATE: Final = 1024
_MAX_BUNDLE: Final = 16
_MAX_FIELD: Final = 1024
_MAX_PCR: Final = 31


def _wrong(name: str, expected: str, found: object) -> EvidenceFormatError:
    shown = type(found).__name__ if not isinstance(found, int | str) else f"{found!r:.60}"
    if isinstance(found, bytes | list | dict):
        shown = f"{len(found)} of {type(found).__name__}"
    return EvidenceFormatError(f"Nitro document: {name}", expected=expected, found=shown)


def _bytes(name: str, value: object, low: int, high: int) -> bytes:
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        raise _wrong(name, f"{low} to {high} bytes", value)
    return value


def _optional(fields: Mapping[Any, Any], name: str) -> bytes | None:
    value = fields.get(name)
    return None if value is None else _bytes(name, value, 0, _MAX_FIELD)


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroPayload:
    """
    What the hypervisor's security module says of an enclave.

    Attributes:
        module_id: Instance and enclave.
        digest: Name of the hash of the PCRs.
        timestamp: When it was made, milliseconds since 1970 (UTC).
        pcrs: Platform configuration registers by index.
        certificate: The key that signed, DER.
        cabundle: The certificates above it, DER, the root first.
        public_key: Chosen by the code inside.
        user_data: Chosen by the code inside.
        nonce: Chosen by the code inside.
    """

    module_id: str
    digest: str
    timestamp: int
    pcrs: Mapping[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None = None
    user_data: bytes | None = None
    nonce: bytes | None = None

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read the payload; names that are not known are ignored, they are signed all the same.

        Raises:
            EvidenceFormatError: A field is missing or not within the bounds of the document.

        """
        fields = cbor.loads(data, "Nitro document", indefinite=True, max_size=MAX_SIZE)
        if not isinstance(fields, dict):
            raise _wrong("payload", "a map", fields)
        for name in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"):
            if name not in fields:
                raise EvidenceFormatError("Nitro document: a field is missing", expected=name)
        module_id, digest, timestamp = fields["module_id"], fields["digest"], fields["timestamp"]
        if not isinstance(module_id, str) or not module_id:
            raise _wrong("module_id", "text", module_id)
        if not isinstance(digest, str) or digest not in PCR_SIZES:
            raise _wrong("digest", " or ".join(PCR_SIZES), digest)
        # datetime ends in the year 9999; a date beyond is nobody's clock.
        if type(timestamp) is not int or not 0 < timestamp < 253_402_300_800_000:
            raise _wrong("timestamp", "milliseconds since 1970", timestamp)
        bundle = fields["cabundle"]
        if not isinstance(bundle, list) or not 1 <= len(bundle) <= _MAX_BUNDLE:
            raise _wrong("cabundle", f"1 to {_MAX_BUNDLE} certificates", bundle)
        return cls(
            module_id=module_id,
            digest=digest,
            timestamp=timestamp,
            pcrs=_pcrs(fields["pcrs"], PCR_SIZES[digest]),
            certificate=_bytes("certificate", fields["certificate"], 1, _MAX_CERTIFICATE),
            cabundle=tuple(_bytes("cabundle", item, 1, _MAX_CERTIFICATE) for item in bundle),
            public_key=_optional(fields, "public_key"),
            user_data=_optional(fields, "user_data"),
            nonce=_optional(fields, "nonce"),
        )

    def to_bytes(self) -> bytes:
        """Write the payload, as the NSM does."""
        return cbor.dumps(
            {
                "module_id": self.module_id,
                "digest": self.digest,
                "timestamp": self.timestamp,
                "pcrs": dict(self.pcrs),
                "certificate": self.certificate,
                "cabundle": list(self.cabundle),
                "public_key": self.public_key,
                "user_data": self.user_data,
                "nonce": self.nonce,
            }
        )


def _pcrs(value: object, size: int) -> dict[int, bytes]:
    if not isinstance(value, dict) or not 1 <= len(value) <= _MAX_PCR + 1:
        raise _wrong("pcrs", f"1 to {_MAX_PCR + 1} registers", value)
    for index, digest in value.items():
        if type(index) is not int or not 0 <= index <= _MAX_PCR:
            raise _wrong("pcrs", f"indexes from 0 to {_MAX_PCR}", index)
        _bytes(f"PCR{index}", digest, size, size)
    return dict(sorted(value.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroDocument:
    """A document: the signed message, and its payload."""

    message: Sign1
    payload: NitroPayload

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a document.

        Raises:
            EvidenceFormatError: Malformed, or headers that the NSM does not write.

        """
        message = Sign1.from_bytes(data, "Nitro document", max_size=MAX_SIZE)
        # Nothing but the algorithm: so no byte of a document goes unsigned.
        if message.unprotected or message.header.keys() != {1}:
            raise EvidenceFormatError(
                "Nitro document: headers",
                expected="an algorithm and nothing else",
                found=f"{len(message.header)} protected, {len(message.unprotected)} not",
            )
        return cls(message=message, payload=NitroPayload.from_bytes(message.payload))

    def to_bytes(self) -> bytes:
        """Write the document."""
        return self.message.to_bytes()
