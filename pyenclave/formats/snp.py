"""
AMD SEV-SNP: attestation reports, TCB versions, guest policy, GHCB certificate table.

Layouts of AMD's SEV-SNP ABI (document 56860) and GHCB specification (56421), as in the project's
notes on SEV-SNP structures, 4.1 to 4.4, and on evidence providers, 1.4. All integers are
little-endian, the two halves of the signature too. Nothing is verified here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats._binary import maker, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

__all__ = [
    "KEY_NONE",
    "KEY_VCEK",
    "KEY_VLEK",
    "LINES",
    "PLATFORM_BITS",
    "POLICY_BITS",
    "POLICY_DEBUG",
    "POLICY_MIGRATE_MA",
    "POLICY_RESERVED_ONE",
    "REPORT_SIZE",
    "SIGNED_SIZE",
    "SNP_VERSIONS",
    "SnpReport",
    "bit_names",
    "decode_tcb",
    "encode_tcb",
    "product_of_cpuid",
    "tcb_names",
]

REPORT_SIZE: Final = 1184
SIGNED_SIZE: Final = 0x2A0  # what the signature covers
SNP_VERSIONS: Final = (2, 3, 4, 5)

KEY_VCEK: Final = 0
KEY_VLEK: Final = 1
KEY_NONE: Final = 7
_KEY_NAMES: Final = {KEY_VCEK: "VCEK", KEY_VLEK: "VLEK", KEY_NONE: "none"}
_ALGORITHM_P384: Final = 1  # ECDSA P-384 with SHA-384
_MAX_VMPL: Final = 3

POLICY_RESERVED_ONE: Final = 1 << 17
POLICY_MIGRATE_MA: Final = 1 << 18
POLICY_DEBUG: Final = 1 << 19
#: Bits of the guest policy above the ABI version (4.2); the name says what 1 means.
POLICY_BITS: Final[Mapping[str, int]] = {
    "smt": 1 << 16,
    "migrate_ma": POLICY_MIGRATE_MA,
    "debug": POLICY_DEBUG,
    "single_socket": 1 << 20,
    "cxl_allow": 1 << 21,
    "mem_aes_256_xts": 1 << 22,
    "rapl_dis": 1 << 23,
    "ciphertext_hiding_dram": 1 << 24,
    "page_swap_disable": 1 << 25,
}
_POLICY_KNOWN: Final = 0xFFFF | POLICY_RESERVED_ONE | sum(POLICY_BITS.values())
#: Bits of PLATFORM_INFO (4.3). Firmware sets others too (bit 6 on Turin): they are not refused.
PLATFORM_BITS: Final[Mapping[str, int]] = {
    "smt_en": 1,
    "tsme_en": 1 << 1,
    "ecc_en": 1 << 2,
    "rapl_dis": 1 << 3,
    "ciphertext_hiding_dram_en": 1 << 4,
    "alias_check_complete": 1 << 5,
    "sev_tio_en": 1 << 7,
}

# Where each component stands in the eight bytes of a TCB version (4.4), and what is reserved.
_TCB_OLD: Final = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_TCB_TURIN: Final = {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7}
_TCB_LAYOUTS: Final[Mapping[str, Mapping[str, int]]] = {
    "milan": _TCB_OLD,
    "genoa": _TCB_OLD,
    "turin": _TCB_TURIN,
    "venice": _TCB_TURIN,
}
#: Product lines whose TCB versions can be read.
LINES: Final = tuple(_TCB_LAYOUTS)
# Family, first and last model, product line (4.4).
_MODELS: Final = (
    (0x19, 0x00, 0x0F, "milan"),
    (0x19, 0x10, 0x1F, "genoa"),
    (0x19, 0xA0, 0xAF, "genoa"),
    (0x1A, 0x00, 0x11, "turin"),
    (0x1A, 0x50, 0x57, "venice"),
    (0x1A, 0x90, 0xAF, "venice"),
    (0x1A, 0xC0, 0xC7, "venice"),
)

_WHAT: Final = "SEV-SNP report"
_REPORT: Final = struct.Struct(
    "<I I Q 16s 16s I I 8s Q I 4s 64s 48s 32s 48s 48s 32s 32s 8s 3B 21s 64s 8s"
    " 3B B 3B B 8s Q Q 152s 48s 24s 48s 24s 368s"
)
assert _REPORT.size == REPORT_SIZE


def bit_names(value: int, bits: Mapping[str, int]) -> list[str]:
    """Return the names of the *bits* that are set in *value*, in the order of the table."""
    return [name for name, bit in bits.items() if value & bit]


def product_of_cpuid(family: int, model: int) -> str | None:
    """
    Return the product line of a CPU (4.4), ``None`` if it is not known.

    Args:
        family: Extended and base family, as CPUID_FAM_ID in the report.
        model: Extended and base model, as CPUID_MOD_ID.
    """
    for wanted, first, last, product in _MODELS:
        if family == wanted and first <= model <= last:
            return product
    return None


def tcb_names(product: str) -> tuple[str, ...]:
    """Return the components of a TCB version of a *product* line, in the order of the bytes."""
    return tuple(_TCB_LAYOUTS[product])


def decode_tcb(value: bytes, product: str) -> dict[str, int]:
    """Return the components of the eight bytes of a TCB version of a *product* line."""
    return {name: value[place] for name, place in _TCB_LAYOUTS[product].items()}


def encode_tcb(components: Mapping[str, int], product: str) -> bytes:
    """Return the eight bytes of a TCB version; what is not named is zero."""
    value = bytearray(8)
    for name, number in components.items():
        value[_TCB_LAYOUTS[product][name]] = number
    return bytes(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpReport:
    """
    An ATTESTATION_REPORT (4.1).

    Attributes:
        policy: The guest policy, with its ABI version.
        key_info: AUTHOR_KEY_EN, MASK_CHIP_KEY and SIGNING_KEY.
        reported_tcb: The TCB version that selects the key that signed.
        current_firmware: Build, minor and major version of the firmware.
        committed_firmware: The same for the version below which it cannot go back.
        launch_mit_vector: Mitigations at launch; version 5.
        signature_r: R, 48 bytes little-endian.
        signature_s: S, 48 bytes little-endian.
    """

    version: int = 3
    guest_svn: int = 0
    policy: int = POLICY_RESERVED_ONE | POLICY_BITS["smt"]
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    vmpl: int = 0
    signature_algo: int = _ALGORITHM_P384
    current_tcb: bytes = bytes(8)
    platform_info: int = 1
    key_info: int = 0
    report_data: bytes = bytes(64)
    measurement: bytes
    host_data: bytes = bytes(32)
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    report_id: bytes = bytes(32)
    report_id_ma: bytes = b"\xff" * 32
    reported_tcb: bytes = bytes(8)
    cpuid_fam: int = 0
    cpuid_mod: int = 0
    cpuid_step: int = 0
    chip_id: bytes = bytes(64)
    committed_tcb: bytes = bytes(8)
    current_firmware: tuple[int, int, int] = (0, 0, 0)
    committed_firmware: tuple[int, int, int] = (0, 0, 0)
    launch_tcb: bytes = bytes(8)
    launch_mit_vector: int = 0
    current_mit_vector: int = 0
    signature_r: bytes = bytes(48)
    signature_s: bytes = bytes(48)

    @classmethod
    def from_bytes(cls, data: Buffer) -> SnpReport:
        """
        Read a report of version 2 to 5, strictly.

        Raises:
            EvidenceFormatError: Wrong size, version, algorithm or signing key, a reserved field
                that is not zero, or a guest policy with unknown bits or without bit 17.
        """
        report, reserved = _unpack(data)
        _check_numbers(report)
        for name, offset, value in reserved:
            if any(value):
                raise EvidenceFormatError(
                    f"{_WHAT}: {name} at offset {offset:#x} is wrong",
                    expected="zero",
                    found=shorten(value),
                )
        return report

    @classmethod
    def decode(cls, data: Buffer) -> SnpReport:
        """
        Read the fields of any 1,184 bytes, to show what they say; nothing else is checked.

        Raises:
            EvidenceFormatError: Wrong size.
        """
        return _unpack(data)[0]

    @property
    def signing_key(self) -> int:
        """Which key signed: KEY_VCEK, KEY_VLEK or KEY_NONE; 2 to 6 are reserved."""
        return self.key_info >> 2 & 7

    @property
    def signing_key_name(self) -> str:
        """The signing key for people."""
        return _KEY_NAMES.get(self.signing_key, f"reserved ({self.signing_key})")

    @property
    def author_key_en(self) -> bool:
        """Whether the digest of the author key was given at launch."""
        return bool(self.key_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """Whether the host told the firmware not to sign with the VCEK."""
        return bool(self.key_info & 2)

    @property
    def debug(self) -> bool:
        """Whether the host may read and write the guest's memory."""
        return bool(self.policy & POLICY_DEBUG)

    @property
    def migrate_ma(self) -> bool:
        """Whether the guest may be handed to a migration agent."""
        return bool(self.policy & POLICY_MIGRATE_MA)

    @property
    def chip_id_masked(self) -> bool:
        """Whether the report does not name its chip."""
        return not any(self.chip_id)

    @property
    def product(self) -> str | None:
        """The product line by CPUID; ``None`` in version 2, which does not say, or if unknown."""
        return product_of_cpuid(self.cpuid_fam, self.cpuid_mod) if self.version >= 3 else None

    def to_bytes(self) -> bytes:
        """
        Write the report; reserved fields become zero.

        Raises:
            ValueError: A field does not fit its place.
        """
        for name, size in _SIZES.items():
            if len(getattr(self, name)) != size:
                raise ValueError(f"{_WHAT}: {name} has {size} bytes")
        try:
            return _REPORT.pack(
                self.version,
                self.guest_svn,
                self.policy,
                self.family_id,
                self.image_id,
                self.vmpl,
                self.signature_algo,
                self.current_tcb,
                self.platform_info,
                self.key_info,
                b"",
                self.report_data,
                self.measurement,
                self.host_data,
                self.id_key_digest,
                self.author_key_digest,
                self.report_id,
                self.report_id_ma,
                self.reported_tcb,
                self.cpuid_fam,
                self.cpuid_mod,
                self.cpuid_step,
                b"",
                self.chip_id,
                self.committed_tcb,
                *self.current_firmware,
                0,
                *self.committed_firmware,
                0,
                self.launch_tcb,
                self.launch_mit_vector,
                self.current_mit_vector,
                b"",
                self.signature_r,
                b"",
                self.signature_s,
                b"",
                b"",
            )
        except struct.error as error:
            raise ValueError(f"{_WHAT}: an integer does not fit: {error}") from None


_SIZES: Final = {
    "family_id": 16,
    "image_id": 16,
    "current_tcb": 8,
    "report_data": 64,
    "measurement": 48,
    "host_data": 32,
    "id_key_digest": 48,
    "author_key_digest": 48,
    "report_id": 32,
    "report_id_ma": 32,
    "reported_tcb": 8,
    "chip_id": 64,
    "committed_tcb": 8,
    "current_firmware": 3,
    "committed_firmware": 3,
    "launch_tcb": 8,
    "signature_r": 48,
    "signature_s": 48,
}
# What is unpacked: 0-9 the fixed head, 10 reserved, 11-18 identities, 19-21 CPUID, 22 reserved,
# 23-24 chip, 25-32 firmware, 33-35 launch, 36 reserved, 37-41 the signature with its padding. The
# fields of a report are in this order.
_make: Final = maker(SnpReport, *[item.name for item in fields(SnpReport)])
_ZERO: Final = {size: bytes(size) for size in (4, 21, 24, 152, 368)}
_Reserved = tuple[tuple[str, int, bytes], ...]


def _unpack(data: Buffer) -> tuple[SnpReport, _Reserved]:
    size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
    if size != REPORT_SIZE:
        raise EvidenceFormatError(
            f"{_WHAT}: the size is wrong",
            expected=f"{REPORT_SIZE} bytes",
            found=f"{size} bytes",
        )
    v = _REPORT.unpack(data)
    report = _make(
        (
            *v[:10],
            *v[11:22],
            *v[23:25],
            v[25:28],
            v[29:32],
            *v[33:36],
            v[37],
            v[39],
        )
    )
    reserved: _Reserved = ()
    if v[10] != _ZERO[4] or v[22] != _ZERO[21] or v[28] or v[32] or v[36] != _ZERO[152]:
        reserved = (
            ("reserved", 0x4C, v[10]),
            ("reserved", 0x18B, v[22]),
            ("reserved", 0x1EB, bytes((v[28],))),
            ("reserved", 0x1EF, bytes((v[32],))),
            ("reserved", 0x208, v[36]),
        )
    if v[38] != _ZERO[24] or v[40] != _ZERO[24] or v[41] != _ZERO[368]:
        reserved += (
            ("padding of R", 0x2D0, v[38]),
            ("padding of S", 0x318, v[40]),
            ("padding of the signature", 0x330, v[41]),
        )
    return report, reserved


def _wrong(name: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"{_WHAT}: {name} is wrong", expected=expected, found=found)


def _check_numbers(report: SnpReport) -> None:
    version, policy, info = report.version, report.policy, report.key_info
    if version not in SNP_VERSIONS:
        raise _wrong("version", "2 to 5", version)
    if version < 3 and (report.cpuid_fam or report.cpuid_mod or report.cpuid_step):
        raise _wrong("reserved at offset 0x188", "zero in version 2", "other bytes")
    if version < 5 and (report.launch_mit_vector or report.current_mit_vector):
        raise _wrong("reserved at offset 0x1f8", "zero before version 5", "other bytes")
    if report.signature_algo != _ALGORITHM_P384:
        raise _wrong("SIGNATURE_ALGO", "1 (ECDSA P-384 with SHA-384)", report.signature_algo)
    if info >> 5 or info >> 2 & 7 not in (KEY_VCEK, KEY_VLEK):
        raise _wrong("SIGNING_KEY", "VCEK or VLEK", f"{info:#x}")
    if not policy & POLICY_RESERVED_ONE or policy & ~_POLICY_KNOWN:
        raise _wrong("POLICY", "bit 17 and no unknown bit", f"{policy:#x}")
    if report.vmpl > _MAX_VMPL:
        raise _wrong("VMPL", "0 to 3", report.vmpl)
