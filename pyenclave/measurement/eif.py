"""
PCRs of an AWS Nitro enclave, from its image file (EIF).

Source: aws-nitro-enclaves-image-format (header, sections, how nitro-cli computes PCRs). Integers
are big-endian. The file may be hostile: sections must follow one another without a gap up to its
end, because readers that walk the file and readers of the table must see the same sections.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from pyenclave.errors import EvidenceFormatError, MeasurementError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SECTION_NAMES", "Eif", "EifSection", "EifSignature", "extend_zero"]

MAGIC: Final = b".eif"
HEADER_SIZE: Final = 548
MAX_SECTIONS: Final = 32
_VERSIONS = (2, 3, 4)
_SECTION_HEAD = 12
_MAX_SIGNATURE = 1 << 18  # bytes of CBOR; one is 1.5 KiB

KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA = 1, 2, 3, 4, 5
SECTION_NAMES: Final = {
    KERNEL: "kernel",
    CMDLINE: "command line",
    RAMDISK: "ramdisk",
    SIGNATURE: "signature",
    METADATA: "metadata",
}


def extend_zero(digest: bytes) -> bytes:
    """Return what a PCR holds after its only extension, with *digest* (SHA-384)."""
    return hashlib.sha384(bytes(48) + digest).digest()


@dataclass(frozen=True, slots=True)
class EifSection:
    """
    A section of the file.

    Attributes:
        type: 1 kernel, 2 command line, 3 ramdisk, 4 signature, 5 metadata.
        flags: As the file has them.
        offset: Where its content begins, in bytes.
        data: The content.
    """

    type: int
    flags: int
    offset: int
    data: memoryview

    @property
    def name(self) -> str:
        """What the section is."""
        return SECTION_NAMES[self.type]

    def to_json(self) -> dict[str, Any]:
        """Return the section as plain values."""
        return {
            "name": self.name,
            "offset": self.offset,
            "size": self.data.nbytes,
            "measured": self.type in (KERNEL, CMDLINE, RAMDISK),
            "sha384": hashlib.sha384(self.data).hexdigest(),
        }


@dataclass(frozen=True, slots=True)
class EifSignature:
    """
    Who signed the image.

    Attributes:
        certificate: The signing certificate, DER.
        valid: Whether the signature holds by the certificate's key, for this image's PCR0. The
            certificate is not judged: PCR8 is what a verifier compares.
    """

    certificate: bytes
    valid: bool


class Eif:
    """
    An image file.

    Args:
        data: The file. It is not copied.

    Raises:
        MeasurementError: It is no EIF, malformed, or its CRC-32 is wrong.
    """

    def __init__(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if view.nbytes < HEADER_SIZE or bytes(view[:4]) != MAGIC:
            raise MeasurementError(
                "EIF: not recognised",
                expected=f"{MAGIC!r} and {HEADER_SIZE} bytes of header",
                found=f"{bytes(view[:4]).hex() or 'nothing'}, {view.nbytes} bytes",
            )
        version, self.flags, self.memory, self.cpus, _, count = struct.unpack_from(
            ">HHQQHH", view, 4
        )
        self.version = version
        if version not in _VERSIONS:
            raise MeasurementError(
                "EIF: unknown version", expected=", ".join(map(str, _VERSIONS)), found=version
            )
        if not 1 <= count <= MAX_SECTIONS:
            raise MeasurementError(
                "EIF: impossible number of sections", expected=f"1 to {MAX_SECTIONS}", found=count
            )
        offsets = struct.unpack_from(f">{MAX_SECTIONS}Q", view, 28)
        sizes = struct.unpack_from(f">{MAX_SECTIONS}Q", view, 28 + 8 * MAX_SECTIONS)
        if any(offsets[count:]) or any(sizes[count:]):
            raise MeasurementError("EIF: the table names more sections than there are")
        self.sections = self._read_sections(view, offsets[:count], sizes[:count])
        self._check_types()
        self.crc32 = int.from_bytes(view[HEADER_SIZE - 4 : HEADER_SIZE], "big")
        found = zlib.crc32(view[HEADER_SIZE:], zlib.crc32(view[: HEADER_SIZE - 4]))
        if found != self.crc32:
            raise MeasurementError(
                "EIF: the CRC-32 is wrong",
                expected=f"{self.crc32:#010x}",
                found=f"{found:#010x}",
                advice="The file is damaged or cut off.",
            )

    def _read_sections(
        self, view: memoryview, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[EifSection, ...]:
        sections = []
        at = HEADER_SIZE
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            room = view.nbytes - at - _SECTION_HEAD
            if offset != at or room < 0 or size > room:
                raise MeasurementError(
                    f"EIF: section {number} is not where the one before ends, or does not fit",
                    expected=f"offset {at}, ≤ {max(room, 0)} bytes",
                    found=f"offset {offset}, {size} bytes",
                )
            kind, flags, length = struct.unpack_from(">HHQ", view, at)
            if kind not in SECTION_NAMES or length != size:
                raise MeasurementError(
                    f"EIF: the head of section {number} is wrong",
                    expected=f"type 1 to 5, {size} bytes",
                    found=f"type {kind}, {length} bytes",
                )
            begin = at + _SECTION_HEAD
            sections.append(EifSection(kind, flags, begin, view[begin : begin + size]))
            at = begin + size
        if at != view.nbytes:
            raise MeasurementError(
                "EIF: bytes follow the last section", expected=f"{at} bytes", found=view.nbytes
            )
        return tuple(sections)

    def _check_types(self) -> None:
        types = self.section_types
        for kind, low, high in (
            (KERNEL, 1, 1),
            (CMDLINE, 1, 1),
            (RAMDISK, 1, MAX_SECTIONS),
            (SIGNATURE, 0, 1),
            (METADATA, 0, 1),
        ):
            if not low <= types.count(kind) <= high:
                raise MeasurementError(
                    f"EIF: wrong number of sections of type {SECTION_NAMES[kind]}",
                    expected=f"{low} to {high}" if low != high else low,
                    found=types.count(kind),
                )

    @property
    def section_types(self) -> list[int]:
        """The types of the sections in the order of the file."""
        return [section.type for section in self.sections]

    @property
    def architecture(self) -> str:
        """What the image runs on."""
        return "aarch64" if self.flags & 1 else "x86_64"

    @cached_property
    def pcrs(self) -> dict[int, bytes]:
        """
        PCR0 (the image), PCR1 (kernel and boot ramdisk), PCR2 (application), PCR8 (signer).

        Raises:
            MeasurementError: The signature section is malformed.
        """
        image, boot, application = hashlib.sha384(), hashlib.sha384(), hashlib.sha384()
        ramdisks = 0
        for section in self.sections:
            if section.type not in (KERNEL, CMDLINE, RAMDISK):
                continue
            image.update(section.data)
            ramdisks += section.type == RAMDISK
            if section.type == RAMDISK and ramdisks > 1:
                application.update(section.data)
            else:
                boot.update(section.data)
        pcrs = {
            0: extend_zero(image.digest()),
            1: extend_zero(boot.digest()),
            2: extend_zero(application.digest()),
        }
        certificate = self._signature_parts[0]
        if certificate:
            pcrs[8] = extend_zero(hashlib.sha384(certificate).digest())
        return pcrs

    @cached_property
    def _signature_parts(self) -> tuple[bytes, bytes]:
        """The certificate (DER) and the COSE_Sign1 of the signature section; empty without one."""
        section = next((one for one in self.sections if one.type == SIGNATURE), None)
        if section is None:
            return b"", b""
        from pyenclave.formats import cbor
        from pyenclave.formats.x509 import Certificate

        if section.data.nbytes > _MAX_SIGNATURE:
            raise MeasurementError(
                "EIF signature: too large",
                expected=f"≤ {_MAX_SIGNATURE} bytes",
                found=section.data.nbytes,
            )
        raw = bytes(section.data)
        value = cbor.loads(raw, "EIF signature", MeasurementError, max_size=_MAX_SIGNATURE)
        # Several entries would leave open which certificate is PCR8.
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
            raise MeasurementError("EIF signature: wrong form", expected="a list of one map")
        pem = _octets(value[0], "signing_certificate")
        try:
            chain = Certificate.from_pem_chain(pem)
        except EvidenceFormatError as error:
            raise MeasurementError(f"EIF signature: no certificate: {error}") from None
        if len(chain) != 1:
            raise MeasurementError(
                "EIF signature: wrong number of certificates", expected=1, found=len(chain)
            )
        return chain[0].der, _octets(value[0], "signature")

    @cached_property
    def signature(self) -> EifSignature | None:
        """
        The signature, verified; None if the image is not signed.

        Raises:
            MeasurementError: The signature section is malformed.
        """
        der, message = self._signature_parts
        if not der:
            return None
        from pyenclave.formats import cbor
        from pyenclave.formats.cose import Sign1
        from pyenclave.formats.x509 import Certificate

        try:
            signed = Sign1.from_bytes(message, "EIF signature")
            payload = cbor.loads(signed.payload, "EIF signature: payload")
            key = Certificate.from_der(der).public_key()
        except EvidenceFormatError as error:
            raise MeasurementError(str(error)) from None
        if not isinstance(payload, dict):
            raise MeasurementError("EIF signature: the payload is no map")
        index = payload.get("register_index")
        valid = (
            type(index) is int
            and index == 0
            and _octets(payload, "register_value") == self.pcrs[0]
            and signed.verify(key, allowed=("ES256", "ES384", "ES512"))
        )
        return EifSignature(der, valid)

    def to_json(self) -> dict[str, Any]:
        """Return the measurements as plain values."""
        result: dict[str, Any] = {"kind": "nitro-eif"}
        result |= {f"pcr{index}": value.hex() for index, value in self.pcrs.items()}
        result |= {
            "crc32": self.crc32,
            "section_types": self.section_types,
            "version": self.version,
            "architecture": self.architecture,
        }
        signature = self.signature
        if signature is not None:
            result["signature_valid"] = signature.valid
            result["certificate_sha256"] = hashlib.sha256(signature.certificate).hexdigest()
        return result


def _octets(fields: dict[Any, Any], name: str) -> bytes:
    """Take a byte string that is written as an array of integers, or as one."""
    value = fields.get(name)
    if isinstance(value, bytes):
        return value
    if isinstance(value, list) and all(type(one) is int and 0 <= one <= 255 for one in value):
        return bytes(value)
    raise MeasurementError(f"EIF signature: {name} is not bytes")
