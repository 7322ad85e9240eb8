"""
SGX structures: attributes, reports, target info, key requests and SIGSTRUCT.

Layouts of the Intel SDM vol. 3D and Intel's SDK headers. ``from_bytes`` is strict: the exact size,
reserved bytes zero, header constants as specified; so ``to_bytes`` gives back the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING, Any

from pyenclave.errors import EvidenceFormatError, SignatureError
from pyenclave.formats._binary import Layout, maker

if TYPE_CHECKING:
    from typing_extensions import Buffer


__all__ = [
    "FLAG_AEX_NOTIFY",
    "FLAG_DEBUG",
    "FLAG_EINITTOKEN_KEY",
    "FLAG_INITTED",
    "FLAG_KSS",
    "FLAG_MODE64BIT",
    "FLAG_PROVISION_KEY",
    "KEYNAME_EINITTOKEN",
    "KEYNAME_PROVISION",
    "KEYNAME_PROVISION_SEAL",
    "KEYNAME_REPORT",
    "KEYNAME_SEAL",
    "KEYPOLICY_CONFIGID",
    "KEYPOLICY_ISVEXTPRODID",
    "KEYPOLICY_ISVFAMILYID",
    "KEYPOLICY_MRENCLAVE",
    "KEYPOLICY_MRSIGNER",
    "KEYPOLICY_NOISVPRODID",
    "MISC_EXINFO",
    "PAGE_REG",
    "PAGE_TCS",
    "SECINFO_R",
    "SECINFO_W",
    "SECINFO_X",
    "VENDOR_INTEL",
    "VENDOR_OTHER",
    "XFRM_LEGACY",
    "Attributes",
    "KeyRequest",
    "Report",
    "ReportBody",
    "Sigstruct",
    "TargetInfo",
]

# ATTRIBUTES.FLAGS
FLAG_INITTED = 0x001
FLAG_DEBUG = 0x002
FLAG_MODE64BIT = 0x004
FLAG_PROVISION_KEY = 0x010
FLAG_EINITTOKEN_KEY = 0x020
FLAG_KSS = 0x080
FLAG_AEX_NOTIFY = 0x400
# ATTRIBUTES.XFRM: x87 and SSE state, which every enclave has
XFRM_LEGACY = 0x3
# MISCSELECT
MISC_EXINFO = 0x1
# SECINFO.FLAGS of a page
SECINFO_R = 0x1
SECINFO_W = 0x2
SECINFO_X = 0x4
PAGE_TCS = 0x100
PAGE_REG = 0x200
# KEYREQUEST.KEYNAME
KEYNAME_EINITTOKEN = 0
KEYNAME_PROVISION = 1
KEYNAME_PROVISION_SEAL = 2
KEYNAME_REPORT = 3
KEYNAME_SEAL = 4
# KEYREQUEST.KEYPOLICY
KEYPOLICY_MRENCLAVE = 0x01
KEYPOLICY_MRSIGNER = 0x02
KEYPOLICY_NOISVPRODID = 0x04
KEYPOLICY_CONFIGID = 0x08
KEYPOLICY_ISVFAMILYID = 0x10
KEYPOLICY_ISVEXTPRODID = 0x20
# SIGSTRUCT.VENDOR
VENDOR_OTHER = 0
VENDOR_INTEL = 0x8086

_SIGSTRUCT_DEBUG = 1 << 31
_RSA_SIZE = 384


def _to_bytes(layout: Layout, value: Any) -> bytes:
    """Write a dataclass whose fields have the names of *layout*."""
    fields = {}
    for name in value.__slots__:
        item = getattr(value, name)
        fields[name] = item.to_bytes() if isinstance(item, Attributes) else item
    return layout.pack(fields)


def _attributes(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Turn the named 16-byte fields into Attributes."""
    for name in names:
        fields[name] = Attributes.from_bytes(fields[name])
    return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """ATTRIBUTES (16 bytes; also as a mask). Bits without a name here are kept as they are."""

    flags: int = 0
    xfrm: int = 0

    @property
    def debug(self) -> bool:
        """Whether the enclave's memory can be read by a debugger."""
        return bool(self.flags & FLAG_DEBUG)

    def __and__(self, mask: Attributes) -> Attributes:
        """Return what *mask* leaves."""
        return Attributes(flags=self.flags & mask.flags, xfrm=self.xfrm & mask.xfrm)

    @classmethod
    def from_bytes(cls, data: Buffer) -> Attributes:
        """Read sixteen bytes."""
        if isinstance(data, bytes) and len(data) == 16:
            flags, xfrm = _FLAGS.unpack(data)
            return cls(flags=flags, xfrm=xfrm)
        return cls(**_ATTRIBUTES.unpack(data))

    def to_bytes(self) -> bytes:
        """Write sixteen bytes."""
        return _to_bytes(_ATTRIBUTES, self)


_FLAGS = Struct("<QQ")
_ATTRIBUTES = Layout("ATTRIBUTES", EvidenceFormatError, ("flags", "Q"), ("xfrm", "Q"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBody:
    """REPORT without key id and MAC (384 bytes): what EREPORT says of an enclave."""

    cpu_svn: bytes = bytes(16)
    misc_select: int = 0
    isv_ext_prod_id: bytes = bytes(16)
    attributes: Attributes = field(default_factory=Attributes)
    mrenclave: bytes
    mrsigner: bytes
    config_id: bytes = bytes(64)
    isv_prod_id: int = 0
    isv_svn: int = 0
    config_svn: int = 0
    isv_family_id: bytes = bytes(16)
    report_data: bytes = bytes(64)

    @classmethod
    def from_bytes(cls, data: Buffer) -> ReportBody:
        """
        Read 384 bytes.

        Raises:
            EvidenceFormatError: If the size is wrong or a reserved byte is not zero.
        """
        values = [*_REPORT_BODY.values(data)]
        values[_BODY_ATTRIBUTES] = Attributes.from_bytes(values[_BODY_ATTRIBUTES])
        return _make_body(values)

    def to_bytes(self) -> bytes:
        """Write 384 bytes; this is what the report's MAC and a quote's signature cover."""
        return _to_bytes(_REPORT_BODY, self)


_REPORT_BODY = Layout(
    "SGX report body",
    EvidenceFormatError,
    ("cpu_svn", 16),
    ("misc_select", "I"),
    (None, 12),
    ("isv_ext_prod_id", 16),
    ("attributes", 16),
    ("mrenclave", 32),
    (None, 32),
    ("mrsigner", 32),
    (None, 32),
    ("config_id", 64),
    ("isv_prod_id", "H"),
    ("isv_svn", "H"),
    ("config_svn", "H"),
    (None, 42),
    ("isv_family_id", 16),
    ("report_data", 64),
)


_BODY_ATTRIBUTES = _REPORT_BODY.names.index("attributes")
_make_body = maker(ReportBody, *_REPORT_BODY.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """REPORT (432 bytes). The MAC covers the 384 bytes of the body, not the key id."""

    body: ReportBody
    key_id: bytes
    mac: bytes

    @classmethod
    def from_bytes(cls, data: Buffer) -> Report:
        """
        Read 432 bytes. The MAC is not checked here.

        Raises:
            EvidenceFormatError: If the size is wrong or a reserved byte is not zero.
        """
        fields = _REPORT.unpack(data)
        fields["body"] = ReportBody.from_bytes(fields["body"])
        return cls(**fields)

    def to_bytes(self) -> bytes:
        """Write 432 bytes."""
        return _REPORT.pack({"body": self.body.to_bytes(), "key_id": self.key_id, "mac": self.mac})


_REPORT = Layout("SGX report", EvidenceFormatError, ("body", 384), ("key_id", 32), ("mac", 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """TARGETINFO (512 bytes): for whom a report is made."""

    mrenclave: bytes
    attributes: Attributes
    config_svn: int = 0
    misc_select: int = 0
    config_id: bytes = bytes(64)

    @classmethod
    def from_bytes(cls, data: Buffer) -> TargetInfo:
        """
        Read 512 bytes.

        Raises:
            EvidenceFormatError: If the size is wrong or a reserved byte is not zero.
        """
        return cls(**_attributes(_TARGET_INFO.unpack(data), "attributes"))

    @classmethod
    def of(cls, body: ReportBody) -> TargetInfo:
        """Return the target info that addresses the enclave of *body*."""
        return cls(
            mrenclave=body.mrenclave,
            attributes=body.attributes,
            config_svn=body.config_svn,
            misc_select=body.misc_select,
            config_id=body.config_id,
        )

    def to_bytes(self) -> bytes:
        """Write 512 bytes."""
        return _to_bytes(_TARGET_INFO, self)


_TARGET_INFO = Layout(
    "SGX target info",
    EvidenceFormatError,
    ("mrenclave", 32),
    ("attributes", 16),
    (None, 2),
    ("config_svn", "H"),
    ("misc_select", "I"),
    (None, 8),
    ("config_id", 64),
    (None, 384),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """KEYREQUEST (512 bytes): which key EGETKEY is to derive. Ranges are EGETKEY's to check."""

    key_name: int
    key_policy: int = 0
    isv_svn: int = 0
    cpu_svn: bytes = bytes(16)
    attribute_mask: Attributes = field(default_factory=Attributes)
    key_id: bytes = bytes(32)
    misc_mask: int = 0
    config_svn: int = 0

    @classmethod
    def from_bytes(cls, data: Buffer) -> KeyRequest:
        """
        Read 512 bytes.

        Raises:
            EvidenceFormatError: If the size is wrong or a reserved byte is not zero.
        """
        return cls(**_attributes(_KEY_REQUEST.unpack(data), "attribute_mask"))

    def to_bytes(self) -> bytes:
        """Write 512 bytes."""
        return _to_bytes(_KEY_REQUEST, self)


_KEY_REQUEST = Layout(
    "SGX key request",
    EvidenceFormatError,
    ("key_name", "H"),
    ("key_policy", "H"),
    ("isv_svn", "H"),
    (None, 2),
    ("cpu_svn", 16),
    ("attribute_mask", 16),
    ("key_id", 32),
    ("misc_mask", "I"),
    ("config_svn", "H"),
    (None, 434),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigstruct:
    """
    SIGSTRUCT (1808 bytes): an author's signature over an enclave's measurement.

    ``modulus``, ``signature``, ``q1`` and ``q2`` are little-endian numbers of 384 bytes. The
    exponent is 3. ``date`` is the u32 as stored, by convention BCD yyyymmdd; it is shown, never
    judged, since some signers write other forms. Nothing is verified here: see
    ``pyenclave.measurement.sgx.verify_sigstruct``.
    """

    type: int = 0
    vendor: int = VENDOR_OTHER
    date: int = 0
    sw_defined: int = 0
    modulus: bytes = bytes(_RSA_SIZE)
    exponent: int = 3
    signature: bytes = bytes(_RSA_SIZE)
    misc_select: int = 0
    misc_mask: int = 0xFFFFFFFF
    cet_attributes: int = 0
    cet_attributes_mask: int = 0
    isv_family_id: bytes = bytes(16)
    attributes: Attributes
    attribute_mask: Attributes
    mrenclave: bytes
    isv_ext_prod_id: bytes = bytes(16)
    isv_prod_id: int = 0
    isv_svn: int = 0
    q1: bytes = bytes(_RSA_SIZE)
    q2: bytes = bytes(_RSA_SIZE)

    @classmethod
    def from_bytes(cls, data: Buffer) -> Sigstruct:
        """
        Read 1808 bytes.

        Raises:
            SignatureError: If the size, a constant, the type, the vendor or the exponent is
                wrong, or a reserved byte is not zero.
        """
        value = cls(**_attributes(_SIGSTRUCT.unpack(data), "attributes", "attribute_mask"))
        value._check()
        return value

    def _check(self) -> None:
        _demand(self.type & ~_SIGSTRUCT_DEBUG == 0, "TYPE", "0 or 0x80000000", self.type)
        _demand(self.vendor in (VENDOR_OTHER, VENDOR_INTEL), "VENDOR", "0 or 0x8086", self.vendor)
        _demand(self.exponent == 3, "EXPONENT", "3", self.exponent)

    def to_bytes(self) -> bytes:
        """Write 1808 bytes."""
        return _to_bytes(_SIGSTRUCT, self)

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers: bytes 0 to 127 and 900 to 1027, 256 in all."""
        data = self.to_bytes()
        return data[:128] + data[900:1028]


def _demand(holds: bool, name: str, expected: str, found: int) -> None:
    if not holds:
        raise SignatureError(f"SIGSTRUCT: {name} is wrong", expected=expected, found=hex(found))


_SIGSTRUCT = Layout(
    "SIGSTRUCT",
    SignatureError,
    ("HEADER", bytes.fromhex("06000000e100000000000100")),
    ("type", "I"),
    ("vendor", "I"),
    ("date", "I"),
    ("HEADER2", bytes.fromhex("01010000600000006000000001000000")),
    ("sw_defined", "I"),
    (None, 84),
    ("modulus", _RSA_SIZE),
    ("exponent", "I"),
    ("signature", _RSA_SIZE),
    ("misc_select", "I"),
    ("misc_mask", "I"),
    ("cet_attributes", "B"),
    ("cet_attributes_mask", "B"),
    (None, 2),
    ("isv_family_id", 16),
    ("attributes", 16),
    ("attribute_mask", 16),
    ("mrenclave", 32),
    (None, 16),
    ("isv_ext_prod_id", 16),
    ("isv_prod_id", "H"),
    ("isv_svn", "H"),
    (None, 12),
    ("q1", _RSA_SIZE),
    ("q2", _RSA_SIZE),
)
