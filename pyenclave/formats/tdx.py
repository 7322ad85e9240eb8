"""
TDX structures: the TD report body of quotes (1.0, 1.5, 1.5 extended) and TDREPORT.

Layouts of Intel's ``sgx_quote_4.h``, ``sgx_quote_5.h`` and ``sgx_report2.h``. All numbers are
little-endian. Nothing is verified here; the MAC of a TDREPORT can be checked only on its platform.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats._binary import Layout, maker

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ATTRIBUTE_DEBUG",
    "ATTRIBUTE_KEY_LOCKER",
    "ATTRIBUTE_MIGRATABLE",
    "ATTRIBUTE_PERFMON",
    "ATTRIBUTE_PKS",
    "ATTRIBUTE_SEPT_VE_DISABLE",
    "BODY_SIZES",
    "TDREPORT_SIZE",
    "TdExtension",
    "TdReport",
    "TdReportBody",
    "td_report_of",
]

# TD ATTRIBUTES
ATTRIBUTE_DEBUG: Final = 1 << 0
ATTRIBUTE_SERVTD_EXT: Final = 1 << 17
ATTRIBUTE_SEPT_VE_DISABLE: Final = 1 << 28
ATTRIBUTE_MIGRATABLE: Final = 1 << 29
ATTRIBUTE_PKS: Final = 1 << 30
ATTRIBUTE_KEY_LOCKER: Final = 1 << 31
ATTRIBUTE_PERFMON: Final = 1 << 63

# Body type of a quote of version 5 → size; type 1 is SGX.
BODY_SIZES: Final = {2: 584, 3: 648, 4: 885}
TDREPORT_SIZE: Final = 1024

_BODY_1_0 = Layout(
    "TD report body",
    EvidenceFormatError,
    ("tee_tcb_svn", 16),
    ("mr_seam", 48),
    ("mrsigner_seam", 48),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", 48),
    ("mr_config_id", 48),
    ("mr_owner", 48),
    ("mr_owner_config", 48),
    ("rtmr0", 48),
    ("rtmr1", 48),
    ("rtmr2", 48),
    ("rtmr3", 48),
    ("report_data", 64),
)
_BODY_1_5 = Layout(
    "TD report body 1.5", EvidenceFormatError, ("tee_tcb_svn2", 16), ("mr_service_td", 48)
)
_EXTENSION = Layout(
    "TD report body 1.5 extension",
    EvidenceFormatError,
    ("vmid", "B"),
    ("td_id", 32),
    ("device_info_hash", 48),
    ("initial_service_td_hash", 48),
    ("initial_service_td_attributes", 8),
    ("initial_cpu_svn", 16),
    ("initial_tee_tcb_svn", 16),
    ("initial_tee_fmspc", 12),
    ("current_service_td_hash", 48),
    ("current_service_td_attributes", 8),
)
_SIZE_1_0 = 584
_SIZE_1_5 = 648


@dataclass(frozen=True, slots=True, kw_only=True)
class TdExtension:
    """What body type 4 has beyond 1.5."""

    vmid: int
    td_id: bytes
    device_info_hash: bytes
    initial_service_td_hash: bytes
    initial_service_td_attributes: bytes
    initial_cpu_svn: bytes
    initial_tee_tcb_svn: bytes
    initial_tee_fmspc: bytes
    current_service_td_hash: bytes
    current_service_td_attributes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReportBody:
    """
    The body of a TD quote.

    Attributes:
        td_attributes: Eight bytes; `flags` is the number.
        tee_tcb_svn2: Of the module that runs now (1.5); ``None`` in 1.0.
        mr_service_td: Likewise.
        extension: Body type 4 only.
    """

    tee_tcb_svn: bytes = bytes(16)
    mr_seam: bytes = bytes(48)
    mrsigner_seam: bytes = bytes(48)
    seam_attributes: bytes = bytes(8)
    td_attributes: bytes = bytes(8)
    xfam: bytes = bytes(8)
    mr_td: bytes
    mr_config_id: bytes = bytes(48)
    mr_owner: bytes = bytes(48)
    mr_owner_config: bytes = bytes(48)
    rtmr0: bytes = bytes(48)
    rtmr1: bytes = bytes(48)
    rtmr2: bytes = bytes(48)
    rtmr3: bytes = bytes(48)
    report_data: bytes = bytes(64)
    tee_tcb_svn2: bytes | None = None
    mr_service_td: bytes | None = None
    extension: TdExtension | None = None

    @property
    def body_type(self) -> int:
        """The number of a version 5 quote: 2, 3 or 4."""
        if self.extension is not None:
            return 4
        return 2 if self.tee_tcb_svn2 is None else 3

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """The four run-time measurement registers."""
        return self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3

    @property
    def flags(self) -> int:
        """TD ATTRIBUTES as a number."""
        return int.from_bytes(self.td_attributes, "little")

    @property
    def debug(self) -> bool:
        """Whether the host may read the TD's memory."""
        return bool(self.flags & ATTRIBUTE_DEBUG)

    @classmethod
    def from_bytes(cls, data: Buffer) -> TdReportBody:
        """
        Read 584, 648 or 885 bytes; the size tells the version.

        Raises:
            EvidenceFormatError: Another size.

        """
        with memoryview(data) as view:
            raw = bytes(view)
        if len(raw) not in BODY_SIZES.values():
            raise EvidenceFormatError(
                "TD report body: the size is wrong",
                expected="584, 648 or 885 bytes",
                found=f"{len(raw)} bytes",
            )
        values = _BODY_1_0.values(raw[:_SIZE_1_0])
        if len(raw) == _SIZE_1_0:
            return _make_body((*values, None, None, None))
        values += _BODY_1_5.values(raw[_SIZE_1_0:_SIZE_1_5])
        if len(raw) == _SIZE_1_5:
            return _make_body((*values, None))
        return _make_body((*values, TdExtension(**_EXTENSION.unpack(raw[_SIZE_1_5:]))))

    def to_bytes(self) -> bytes:
        """
        Write the body.

        Raises:
            ValueError: A field does not fit its place, or one of 1.5 is missing.

        """
        data = _pack(_BODY_1_0, self)
        parts = (self.tee_tcb_svn2, self.mr_service_td)
        if any(part is None for part in parts):
            if any(part is not None for part in (*parts, self.extension)):
                raise ValueError("TD report body: either all fields of 1.5 are there, or none")
            return data
        data += _pack(_BODY_1_5, self)
        return data if self.extension is None else data + _pack(_EXTENSION, self.extension)


_make_body = maker(TdReportBody, *_BODY_1_0.names, *_BODY_1_5.names, "extension")


def _pack(layout: Layout, value: Any) -> bytes:
    return layout.pack({name: getattr(value, name) for _, name, _, _ in layout._names})  # noqa: SLF001


_TDREPORT = Layout(
    "TDREPORT",
    EvidenceFormatError,
    ("REPORTTYPE", b"\x81\x00"),
    ("version", "B"),
    (None, 1),
    (None, 12),
    ("cpu_svn", 16),
    ("tee_tcb_info_hash", 48),
    ("tee_info_hash", 48),
    ("report_data", 64),
    (None, 32),
    ("mac", 32),
    ("tee_tcb_info", 239),
    (None, 17),
    ("td_info", 512),
)
_TEE_TCB_INFO = Layout(
    "TEE_TCB_INFO",
    EvidenceFormatError,
    ("valid", "Q"),
    ("tee_tcb_svn", 16),
    ("mr_seam", 48),
    ("mrsigner_seam", 48),
    ("seam_attributes", 8),
    ("tee_tcb_svn2", 16),
    ("tail", 95),
)
_TD_INFO = Layout(
    "TDINFO",
    EvidenceFormatError,
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", 48),
    ("mr_config_id", 48),
    ("mr_owner", 48),
    ("mr_owner_config", 48),
    ("rtmr0", 48),
    ("rtmr1", 48),
    ("rtmr2", 48),
    ("rtmr3", 48),
    ("mr_service_td", 48),
    ("tail", 64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReport:
    """
    TDREPORT (1,024 bytes): what TDCALL gives a TD, for its own platform only.

    Attributes:
        version: 0, or 1 if SERVTD_HASH is used.
        tee_tcb_info_hash: SHA-384 of `tee_tcb_info`.
        tee_info_hash: SHA-384 of `td_info`.
        mac: Of the platform; nobody else can check it.
        tee_tcb_info: 239 bytes: the TDX module.
        td_info: 512 bytes: the TD.
    """

    version: int
    cpu_svn: bytes
    tee_tcb_info_hash: bytes
    tee_info_hash: bytes
    report_data: bytes
    mac: bytes
    tee_tcb_info: bytes
    td_info: bytes

    @classmethod
    def from_bytes(cls, data: Buffer) -> TdReport:
        """
        Read 1,024 bytes.

        Raises:
            EvidenceFormatError: The size, the type or a reserved byte is wrong.

        """
        return cls(**_TDREPORT.unpack(data))

    def to_bytes(self) -> bytes:
        """Write 1,024 bytes."""
        return _pack(_TDREPORT, self)

    @property
    def consistent(self) -> bool:
        """Whether both hashes are those of what follows; the MAC covers only the hashes."""
        return (
            hashlib.sha384(self.tee_tcb_info).digest() == self.tee_tcb_info_hash
            and hashlib.sha384(self.td_info).digest() == self.tee_info_hash
        )

    @property
    def body(self) -> TdReportBody:
        """The same fields as in a quote of body type 3."""
        module: dict[str, Any] = _TEE_TCB_INFO.unpack(self.tee_tcb_info)
        fields: dict[str, Any] = _TD_INFO.unpack(self.td_info)
        for name in ("valid", "tail"):
            module.pop(name)
        fields.pop("tail")
        return TdReportBody(report_data=self.report_data, **module, **fields)


def td_report_of(body: TdReportBody) -> bytes:
    """
    Return the TDREPORT that a quote with this body was made of.

    Its MAC, which only the machine itself could judge, is zero.
    """
    module = b"".join(
        (
            (0x301FF).to_bytes(8, "little"),
            body.tee_tcb_svn,
            body.mr_seam,
            body.mrsigner_seam,
            body.seam_attributes,
            body.tee_tcb_svn2 or bytes(16),
        )
    ).ljust(239, b"\0")
    td = b"".join(
        (
            body.td_attributes,
            body.xfam,
            body.mr_td,
            body.mr_config_id,
            body.mr_owner,
            body.mr_owner_config,
            *body.rtmrs,
            body.mr_service_td or bytes(48),
        )
    ).ljust(512, b"\0")
    return TdReport(
        version=0,
        cpu_svn=bytes(16),
        tee_tcb_info_hash=hashlib.sha384(module).digest(),
        tee_info_hash=hashlib.sha384(td).digest(),
        report_data=body.report_data,
        mac=bytes(32),
        tee_tcb_info=module,
        td_info=td,
    ).to_bytes()
