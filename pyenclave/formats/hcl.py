"""
Azure's HCL report: a hardware report with the claims of the paravisor that it is bound to.

NV index 0x01400001 of the vTPM (the project's notes on evidence providers, 1.6; OpenVMM's
``igvm_attest``). The header is little-endian. Of the whole only the hardware report is signed, and
only the runtime claims are bound to it; the headers are nobody's word.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jsonstrict

__all__ = [
    "AK_KEY_ID",
    "HASH_NAMES",
    "HCL_MAGIC",
    "REPORT_TYPE_SNP",
    "REPORT_TYPE_TDX",
    "TD_REPORT_SIZE",
    "HclReport",
    "RsaKey",
    "RuntimeClaims",
    "base64url",
]

HCL_MAGIC: Final = b"HCLA"
REPORT_TYPE_SNP: Final = 2
REPORT_TYPE_TDX: Final = 4
TD_REPORT_SIZE: Final = 1024
#: report_data_hash_type and the hash over the runtime claims.
HASH_NAMES: Final[Mapping[int, str]] = {1: "sha256", 2: "sha384", 3: "sha512"}
AK_KEY_ID: Final = "HCLAkPub"

_HARDWARE_SIZE: Final = 1184
_MIN_SIZE: Final = 32 + _HARDWARE_SIZE + 20
_MAX_SIZE: Final = 1 << 16  # an NV index of a vTPM has a few thousand bytes
_REQUEST_AK_CERT: Final = 2
_HEADER: Final = struct.Struct("<4s I I I I 12s")
_DATA: Final = struct.Struct("<I I I I I")
_WHAT: Final = "HCL report"
_MAX_KEYS: Final = 16
_USER_DATA: Final = 64
_BASE64URL: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, slots=True, kw_only=True)
class HclReport:
    """
    An HCL report.

    Attributes:
        version: Of the header: 1 or 2.
        request_type: 2 in what a guest can read.
        hardware_report: 1,184 bytes of an SNP report, or 1,024 of a TDREPORT.
        data_version: 1.
        report_type: REPORT_TYPE_SNP or REPORT_TYPE_TDX.
        hash_type: 1 to 3, see `HASH_NAMES`.
        runtime_data: The runtime claims, byte by byte.
    """

    version: int = 2
    request_type: int = _REQUEST_AK_CERT
    status: int = 0
    hardware_report: bytes
    data_version: int = 1
    report_type: int = REPORT_TYPE_SNP
    hash_type: int = 1
    runtime_data: bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> HclReport:
        """
        Read a report; zero bytes may follow it, as in the NV index.

        Raises:
            EvidenceFormatError: Malformed, another version, or sizes that contradict each other.
        """
        if not _MIN_SIZE <= len(data) <= _MAX_SIZE:
            raise _wrong("the size", f"{_MIN_SIZE} to {_MAX_SIZE} bytes", f"{len(data)} bytes")
        magic, version, total, request, status, reserved = _HEADER.unpack_from(data, 0)
        data_size, data_version, kind, hash_type, size = _DATA.unpack_from(
            data, 32 + _HARDWARE_SIZE
        )
        _demand(magic == HCL_MAGIC, "signature", HCL_MAGIC.hex(), magic.hex())
        _demand(version in (1, 2), "version", "1 or 2", version)
        _demand(request == _REQUEST_AK_CERT, "request_type", _REQUEST_AK_CERT, request)
        _demand(status == 0, "status", 0, status)
        _demand(not any(reserved), "reserved", "zero", reserved.hex())
        _demand(data_version == 1, "version of the runtime data", 1, data_version)
        kinds = (REPORT_TYPE_SNP, REPORT_TYPE_TDX)
        _demand(kind in kinds, "report_type", "2 (SNP) or 4 (TDX)", kind)
        _demand(hash_type in HASH_NAMES, "report_data_hash_type", "1 to 3", hash_type)
        _demand(data_size == _DATA.size + size, "data_size", _DATA.size + size, data_size)
        _demand(total == _MIN_SIZE + size, "report_size", _MIN_SIZE + size, total)
        _demand(total <= len(data), "report_size", f"at most {len(data)}", total)
        _demand(not any(data[total:]), "what follows the report", "zero", "other bytes")
        hardware = data[32 : 32 + _HARDWARE_SIZE]
        if kind == REPORT_TYPE_TDX:
            padding = hardware[TD_REPORT_SIZE:]
            _demand(not any(padding), "what follows the TDREPORT", "zero", "other bytes")
            hardware = hardware[:TD_REPORT_SIZE]
        return cls(
            version=version,
            request_type=request,
            status=status,
            hardware_report=bytes(hardware),
            data_version=data_version,
            report_type=kind,
            hash_type=hash_type,
            runtime_data=bytes(data[_MIN_SIZE:total]),
        )

    def to_bytes(self) -> bytes:
        """
        Write the report, without padding behind it.

        Raises:
            ValueError: The hardware report has not the size of its type.
        """
        size = TD_REPORT_SIZE if self.report_type == REPORT_TYPE_TDX else _HARDWARE_SIZE
        if len(self.hardware_report) != size:
            raise ValueError(f"{_WHAT}: the hardware report has {size} bytes")
        length = len(self.runtime_data)
        return b"".join(
            (
                _HEADER.pack(
                    HCL_MAGIC,
                    self.version,
                    _MIN_SIZE + length,
                    self.request_type,
                    self.status,
                    bytes(12),
                ),
                self.hardware_report.ljust(_HARDWARE_SIZE, b"\0"),
                _DATA.pack(
                    _DATA.size + length,
                    self.data_version,
                    self.report_type,
                    self.hash_type,
                    length,
                ),
                self.runtime_data,
            )
        )

    @property
    def report_size(self) -> int:
        """Bytes without the padding."""
        return _MIN_SIZE + len(self.runtime_data)

    @property
    def expected_report_data(self) -> bytes:
        """The 64 bytes of report data that bind the runtime claims to the hardware report."""
        digest = hashlib.new(HASH_NAMES[self.hash_type], self.runtime_data).digest()
        return digest.ljust(64, b"\0")


def _wrong(name: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"{_WHAT}: {name} is wrong", expected=expected, found=found)


def _demand(holds: bool, name: str, expected: object, found: object) -> None:
    if not holds:
        raise _wrong(name, expected, found)


def base64url(text: object, name: str, *, max_size: int = 1024) -> bytes:
    """
    Return the bytes of base64url text, with or without padding.

    Raises:
        EvidenceFormatError: Not text, other characters, too long, or bits behind the end.
    """
    if not isinstance(text, str) or len(text) > 2 * max_size:
        raise _wrong(name, f"base64url of at most {max_size} bytes", type(text).__name__)
    bare = text.rstrip("=")
    padded = bare + "=" * (-len(bare) % 4)
    if not set(bare) <= _BASE64URL or len(bare) % 4 == 1 or text not in (bare, padded):
        raise _wrong(name, "base64url", text[:40])
    value = base64.urlsafe_b64decode(padded)
    if base64.urlsafe_b64encode(value).decode("ascii") != padded:
        raise _wrong(name, "base64url in its one form", text[:40])
    return value


@dataclass(frozen=True, slots=True)
class RsaKey:
    """An RSA public key."""

    modulus: int
    exponent: int

    @property
    def size(self) -> int:
        """Bytes of the modulus."""
        return (self.modulus.bit_length() + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeClaims:
    """
    The runtime claims.

    Attributes:
        key_ids: ``kid`` of each key, in order.
        ak: The vTPM's attestation key, ``HCLAkPub``; ``None`` if there is none.
        vm_configuration: As it stands there.
        user_data: What the guest wrote into NV index 0x01400002, 64 bytes; ``None`` if absent.
        user_data_text: The same as it is written in the claims.
    """

    key_ids: tuple[str, ...]
    ak: RsaKey | None
    vm_configuration: Mapping[str, Any]
    user_data: bytes | None
    user_data_text: str | None

    @classmethod
    def from_bytes(cls, data: bytes) -> RuntimeClaims:
        """
        Read the claims.

        Raises:
            EvidenceFormatError: Malformed JSON, or a member that has not its form.
        """
        what = "runtime claims"
        top = jsonstrict.object_of(data, what, max_depth=8, max_size=_MAX_SIZE)
        keys, config = top.get("keys"), top.get("vm-configuration")
        if not isinstance(keys, list) or len(keys) > _MAX_KEYS:
            raise _wrong("keys of the runtime claims", f"at most {_MAX_KEYS} keys", keys)
        if not isinstance(config, dict):
            raise _wrong("vm-configuration", "an object", type(config).__name__)
        ids: list[str] = []
        ak = None
        for key in keys:
            kid = key.get("kid") if isinstance(key, dict) else None
            if not isinstance(kid, str) or kid in ids:
                raise _wrong("kid", "text, each once", kid)
            ids.append(kid)
            if kid == AK_KEY_ID:
                ak = _rsa(key)
        text = top.get("user-data")
        return cls(
            key_ids=tuple(ids),
            ak=ak,
            vm_configuration=config,
            user_data=None if text is None else _user_data(text),
            user_data_text=text,
        )


def _rsa(key: Mapping[str, Any]) -> RsaKey:
    if key.get("kty") != "RSA":
        raise _wrong(f"kty of {AK_KEY_ID}", "RSA", key.get("kty"))
    modulus = int.from_bytes(base64url(key.get("n"), "n"), "big")
    exponent = int.from_bytes(base64url(key.get("e"), "e"), "big")
    if not 2048 <= modulus.bit_length() <= 8192 or not 3 <= exponent < 1 << 33:
        raise _wrong(f"RSA key {AK_KEY_ID}", "2,048 to 8,192 bits", f"{modulus.bit_length()} bits")
    return RsaKey(modulus, exponent)


def _user_data(text: object) -> bytes:
    digits = frozenset("0123456789abcdefABCDEF")
    if not isinstance(text, str) or len(text) != 2 * _USER_DATA or not set(text) <= digits:
        raise _wrong("user-data", f"{2 * _USER_DATA} hexadecimal digits", str(text)[:40])
    return bytes.fromhex(text)
