"""
SPDM measurements as a GPU reports them: the request that was sent, and the signed response.

DMTF DSP0274 (SPDM) 1.1, 10.11, with the opaque data of NVIDIA's GPUs. The driver hands out both
messages in one piece. The signature is over all of it but itself: ECDSA on P-384 with SHA-384,
R ‖ S, big-endian. All other integers are little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats._binary import Reader
from pyenclave.formats.der import Der
from pyenclave.formats.x509 import Certificate

__all__ = [
    "ALL_MEASUREMENTS",
    "FIELDS",
    "FWID",
    "MAX_SIZE",
    "NONCE_SIZE",
    "SIGNATURE_SIZE",
    "GpuReport",
    "Measurement",
    "device_of",
    "fwid_of",
]

VERSION: Final = 0x11
GET_MEASUREMENTS: Final = 0xE0
MEASUREMENTS: Final = 0x60
ALL_MEASUREMENTS: Final = 0xFF
FWID: Final = 20  # type of opaque data
NONCE_SIZE: Final = 32
SIGNATURE_SIZE: Final = 96
MAX_SIZE: Final = 64 * 1024
_SIGNED: Final = 1  # bit of the request's attributes
_DMTF: Final = 1
_SLOT: Final = 0x0F
_RAW: Final = 0x80
_MAX_OPAQUE: Final = 1024  # DSP0274

#: Opaque data: type → name.
FIELDS: Final[Mapping[int, str]] = {
    1: "cert_issuer_name",
    2: "cert_authority_key_id",
    3: "driver_version",
    4: "gpu_info",
    5: "sku",
    6: "vbios_version",
    7: "manufacturer_id",
    8: "tamper_detection",
    9: "smc",
    10: "vpr",
    11: "nvdec0_status",
    12: "measurement_counts",
    13: "cpr_info",
    14: "board_id",
    15: "chip_sku",
    16: "chip_sku_mod",
    17: "project",
    18: "project_sku",
    19: "project_sku_mod",
    20: "fwid",
    21: "protected_pcie_status",
}
_TEXTS: Final = (
    "driver_version",
    "sku",
    "chip_sku",
    "chip_sku_mod",
    "project",
    "project_sku",
    "project_sku_mod",
)

_OID_DEVICE_ID: Final = "2.23.133.5.4.1"
_OID_ALT_NAME: Final = "2.5.29.17"
_OID_DEVICE_INFO: Final = "1.3.6.1.4.1.412.274.1"  # DSP0274: DMTF-SPDM device info
_UTF8: Final = 0x0C
_CONTEXT_0: Final = 0xA0


def _wrong(name: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"SPDM report: {name}", expected=expected, found=found)


@dataclass(frozen=True, slots=True)
class Measurement:
    """
    One measurement.

    Attributes:
        kind: DMTF type: 0 immutable ROM, 1 mutable firmware, 2 hardware configuration, 3 firmware
            configuration, 4 manifest.
        raw: The value is what was measured, not its digest.
        value: The value.
    """

    kind: int
    raw: bool
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """
    A request for measurements and its signed response.

    Attributes:
        operation: Which measurements were asked for; `ALL_MEASUREMENTS` or an index.
        nonce: Of the request: the relying party's.
        slot: Certificate chain that the signature belongs to.
        measurements: By index.
        response_nonce: Of the device.
        fields: Opaque data by type.
        signature: R ‖ S.
        signed: What is signed.
    """

    operation: int
    nonce: bytes
    slot: int
    measurements: Mapping[int, Measurement]
    response_nonce: bytes
    fields: Mapping[int, bytes]
    signature: bytes
    signed: bytes = field(repr=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a report.

        Raises:
            EvidenceFormatError: Malformed, another version, unsigned, or an index or field twice.

        """
        if len(data) > MAX_SIZE:
            raise _wrong("size", f"at most {MAX_SIZE} bytes", len(data))
        reader = Reader(data, "SPDM report", EvidenceFormatError)
        _head(reader, "request", GET_MEASUREMENTS)
        attributes = reader.integer(1, "attributes of the request")
        operation = reader.integer(1, "operation of the request")
        if not attributes & _SIGNED:
            raise _wrong("request", "for a signed response", f"attributes {attributes:#04x}")
        nonce = reader.take(NONCE_SIZE, "nonce of the request")
        slot = reader.integer(1, "slot of the request") & _SLOT
        _head(reader, "response", MEASUREMENTS)
        reader.integer(1, "first parameter of the response")
        answered = reader.integer(1, "slot of the response") & _SLOT
        if answered != slot:
            raise _wrong("slot of the response", slot, answered)
        count = reader.integer(1, "number of measurements")
        record = reader.take(reader.integer(3, "size of measurements"), "measurements")
        measurements = _measurements(record, count)
        response_nonce = reader.take(NONCE_SIZE, "nonce of the response")
        size = reader.integer(2, "size of opaque data")
        if size > _MAX_OPAQUE:
            raise _wrong("size of opaque data", f"at most {_MAX_OPAQUE}", size)
        fields = _fields(reader.take(size, "opaque data"))
        signed = data[: reader.offset]
        signature = reader.take(SIGNATURE_SIZE, "signature")
        # Files of hexadecimal digits end in a NUL where C wrote them; it is not part of the report.
        reader.end(zeros=True)
        return cls(
            operation=operation,
            nonce=nonce,
            slot=slot,
            measurements=measurements,
            response_nonce=response_nonce,
            fields=fields,
            signature=signature,
            signed=signed,
        )

    @staticmethod
    def unsigned_bytes(
        *,
        nonce: bytes,
        measurements: Mapping[int, Measurement],
        fields: Mapping[int, bytes],
        operation: int = ALL_MEASUREMENTS,
        slot: int = 0,
        response_nonce: bytes = bytes(NONCE_SIZE),
    ) -> bytes:
        """Write a report up to its signature, which whoever has the key appends."""
        record = b"".join(
            bytes((index, _DMTF))
            + (len(item.value) + 3).to_bytes(2, "little")
            + bytes((item.kind | (_RAW if item.raw else 0),))
            + len(item.value).to_bytes(2, "little")
            + item.value
            for index, item in measurements.items()
        )
        opaque = b"".join(
            number.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value
            for number, value in fields.items()
        )
        return b"".join(
            (
                bytes((VERSION, GET_MEASUREMENTS, _SIGNED, operation)),
                nonce,
                bytes((slot, VERSION, MEASUREMENTS, 0, slot, len(measurements))),
                len(record).to_bytes(3, "little"),
                record,
                response_nonce,
                len(opaque).to_bytes(2, "little"),
                opaque,
            )
        )

    def named_fields(self) -> dict[str, str]:
        """Return the opaque data by name: texts as text, versions as the vendor writes them."""
        found: dict[str, str] = {}
        for number, value in self.fields.items():
            name = FIELDS.get(number, f"field_{number}")
            if name == "vbios_version" and len(value) == 8:
                found[name] = _vbios(value)
            elif name in _TEXTS:
                found[name] = value.rstrip(b"\0").decode("ascii", "backslashreplace")
            else:
                found[name] = value.hex()
        return found


def _vbios(value: bytes) -> str:
    """Write the version as NVIDIA does: four bytes, and the maker's own."""
    four = [f"{item:02X}" for item in reversed(value[:4])]
    return ".".join((*four, f"{value[4]:02X}"))


def _head(reader: Reader, name: str, code: int) -> None:
    version = reader.integer(1, f"version of the {name}")
    if version != VERSION:
        raise _wrong(f"version of the {name}", "0x11 (SPDM 1.1)", f"{version:#04x}")
    found = reader.integer(1, f"code of the {name}")
    if found != code:
        raise _wrong(f"code of the {name}", f"{code:#04x}", f"{found:#04x}")


def _measurements(record: bytes, count: int) -> dict[int, Measurement]:
    reader = Reader(record, "SPDM measurements", EvidenceFormatError)
    found: dict[int, Measurement] = {}
    for _ in range(count):
        index = reader.integer(1, "index")
        if index in found or not 1 <= index <= 0xFE:
            raise _wrong("index of a measurement", "1 to 254, each once", index)
        specification = reader.integer(1, "specification")
        if specification != _DMTF:
            raise _wrong(f"measurement {index}", "the form of DMTF", f"{specification:#04x}")
        block = Reader(
            reader.take(reader.integer(2, "size"), "measurement"),
            f"SPDM measurement {index}",
            EvidenceFormatError,
        )
        kind = block.integer(1, "type")
        value = block.take(block.integer(2, "size of the value"), "value")
        block.end()
        found[index] = Measurement(kind & ~_RAW, bool(kind & _RAW), value)
    reader.end()
    if not found:
        raise _wrong("measurements", "some", "none")
    return found


def _fields(opaque: bytes) -> dict[int, bytes]:
    reader = Reader(opaque, "SPDM opaque data", EvidenceFormatError)
    found: dict[int, bytes] = {}
    while reader.remaining:
        number = reader.integer(2, "type")
        if number in found:
            raise _wrong("opaque data", "each field once", f"{FIELDS.get(number, number)} twice")
        found[number] = reader.take(reader.integer(2, "size"), "field")
    return found


def fwid_of(certificate: Certificate) -> bytes | None:
    """
    Return the firmware digest in *certificate*: DICE's composite device identity.

    Returns:
        The digest; None if there is none, or DICE's newer form of it.

    Raises:
        EvidenceFormatError: The extension is malformed.

    """
    extension = certificate.extensions.get(_OID_DEVICE_ID)
    if extension is None:
        return None
    outer = Der(extension.value, "device identity")
    body = outer.sequence()
    outer.end()
    if body.tag != 0x02:  # DiceTcbInfo, under the same identifier, begins otherwise
        return None
    if body.integer() != 1:
        raise EvidenceFormatError("device identity: version", expected=1)
    body.element()  # the device's key
    digest = body.sequence()
    body.end()
    digest.oid()
    value = digest.octet_string()
    digest.end()
    return value


def device_of(certificate: Certificate) -> str | None:
    """
    Return the device that *certificate* names: maker, product and serial number.

    Raises:
        EvidenceFormatError: The extension is malformed.

    """
    extension = certificate.extensions.get(_OID_ALT_NAME)
    if extension is None:
        return None
    outer = Der(extension.value, "alternative name")
    names = outer.sequence()
    outer.end()
    while names.more:
        if names.tag != _CONTEXT_0:
            names.element()
            continue
        other = names.read(_CONTEXT_0)
        if other.oid() == _OID_DEVICE_INFO:
            text = other.read(_CONTEXT_0).content(_UTF8)
            return text.decode("ascii", "backslashreplace")
    return None
