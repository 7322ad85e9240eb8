"""
DCAP quotes of SGX enclaves, version 3 (ECDSA P-256).

Layout of Intel's ``sgx_quote_3.h``. ECDSA signatures and keys are raw big-endian pairs of 32
bytes; every other number is little-endian. Nothing is verified here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats._binary import Layout, Reader
from pyenclave.formats.sgx import ReportBody

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "CERTIFICATION_PCK_CHAIN",
    "CERTIFICATION_PCK_LEAF",
    "CERTIFICATION_PPID_CLEAR",
    "CERTIFICATION_PPID_RSA2048",
    "CERTIFICATION_PPID_RSA3072",
    "MAX_QUOTE_SIZE",
    "MIN_QUOTE_SIZE",
    "QE_VENDOR_INTEL",
    "PlatformIds",
    "Quote",
]

QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

CERTIFICATION_PPID_CLEAR = 1
CERTIFICATION_PPID_RSA2048 = 2
CERTIFICATION_PPID_RSA3072 = 3
CERTIFICATION_PCK_LEAF = 4
CERTIFICATION_PCK_CHAIN = 5

# Header, body, length, and the fixed part of the signature data (Intel's QVL has the same minimum).
MIN_QUOTE_SIZE = 48 + 384 + 4 + 584
# Nothing honest is near this; it bounds the work for a hostile one.
MAX_QUOTE_SIZE = 1 << 16

_WHAT = "SGX quote v3"
_KEY_TYPE_P256 = 2
# Size of the (encrypted) PPID in the certification data of types 1 to 3.
_PPID_SIZE = {
    CERTIFICATION_PPID_CLEAR: 16,
    CERTIFICATION_PPID_RSA2048: 256,
    CERTIFICATION_PPID_RSA3072: 384,
}

_HEADER = Layout(
    f"{_WHAT} header",
    EvidenceFormatError,
    ("version", "H"),
    ("key_type", "H"),
    ("tee_type", "I"),
    ("qe_svn", "H"),
    ("pce_svn", "H"),
    ("qe_vendor_id", 16),
    ("user_data", 20),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformIds:
    """Certification data of types 1 to 3: what names the PCK certificate."""

    ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    pce_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """
    An SGX quote of version 3.

    Attributes:
        report_body: The attested enclave's report.
        signature: By the attestation key, over ``signed_bytes``.
        attestation_key: Its public half, X and Y.
        qe_report: The quoting enclave's report, which binds the attestation key.
        qe_report_signature: By the PCK key, over ``qe_report.to_bytes()``.
        certification_type: One of the ``CERTIFICATION_…`` numbers, 1 to 5.
        certification_data: As it stands in the quote. A PEM chain may end in a NUL byte.
    """

    qe_svn: int = 0
    pce_svn: int = 0
    qe_vendor_id: bytes = QE_VENDOR_INTEL
    user_data: bytes = bytes(20)
    report_body: ReportBody
    signature: bytes
    attestation_key: bytes
    qe_report: ReportBody
    qe_report_signature: bytes
    qe_auth_data: bytes
    certification_type: int
    certification_data: bytes

    @classmethod
    def from_bytes(cls, data: Buffer) -> Quote:
        """
        Read a quote.

        Zero bytes may follow the signature data (some devices hand out padded buffers); they are
        no part of the quote and ``to_bytes`` is without them.

        Raises:
            EvidenceFormatError: If it is not a well-formed quote of version 3, naming the field.
        """
        with memoryview(data) as view:
            size = view.nbytes
            if not MIN_QUOTE_SIZE <= size <= MAX_QUOTE_SIZE:
                raise EvidenceFormatError(
                    f"{_WHAT}: the size is wrong",
                    expected=f"{MIN_QUOTE_SIZE} to {MAX_QUOTE_SIZE} bytes",
                    found=f"{size} bytes",
                )
            reader = Reader(bytes(view), _WHAT, EvidenceFormatError)
        header = _HEADER.unpack(reader.take(48, "header"))
        _demand(header, "version", 3)
        _demand(header, "key_type", _KEY_TYPE_P256)
        _demand(header, "tee_type", 0)
        body = ReportBody.from_bytes(reader.take(384, "report body"))
        length = reader.integer(4, "signature data length")
        signed = Reader(
            reader.take(length, "signature data"), f"{_WHAT} signature data", EvidenceFormatError
        )
        reader.end(zeros=True)
        signature = signed.take(64, "signature")
        key = signed.take(64, "attestation key")
        qe_report = ReportBody.from_bytes(signed.take(384, "QE report"))
        qe_signature = signed.take(64, "QE report signature")
        auth = signed.take(signed.integer(2, "QE auth data size"), "QE auth data")
        kind = signed.integer(2, "certification data type")
        certification = signed.take(
            signed.integer(4, "certification data size"), "certification data"
        )
        signed.end()
        _check_certification(kind, certification)
        return cls(
            qe_svn=header["qe_svn"],
            pce_svn=header["pce_svn"],
            qe_vendor_id=header["qe_vendor_id"],
            user_data=header["user_data"],
            report_body=body,
            signature=signature,
            attestation_key=key,
            qe_report=qe_report,
            qe_report_signature=qe_signature,
            qe_auth_data=auth,
            certification_type=kind,
            certification_data=certification,
        )

    @property
    def signed_bytes(self) -> bytes:
        """What ``signature`` covers: header and report body, 432 bytes."""
        header = _HEADER.pack(
            {
                "version": 3,
                "key_type": _KEY_TYPE_P256,
                "tee_type": 0,
                "qe_svn": self.qe_svn,
                "pce_svn": self.pce_svn,
                "qe_vendor_id": self.qe_vendor_id,
                "user_data": self.user_data,
            }
        )
        return header + self.report_body.to_bytes()

    @property
    def platform_ids(self) -> PlatformIds | None:
        """The content of certification data of types 1 to 3, ``None`` for certificates."""
        if self.certification_type not in _PPID_SIZE:
            return None
        ppid, rest = (
            self.certification_data[: _PPID_SIZE[self.certification_type]],
            self.certification_data[_PPID_SIZE[self.certification_type] :],
        )
        return PlatformIds(
            ppid=ppid,
            cpu_svn=rest[:16],
            pce_svn=int.from_bytes(rest[16:18], "little"),
            pce_id=int.from_bytes(rest[18:20], "little"),
        )

    def to_bytes(self) -> bytes:
        """
        Write the quote, without padding.

        Raises:
            ValueError: If a field does not fit its place.
        """
        for name, value, size in (
            ("signature", self.signature, 64),
            ("attestation_key", self.attestation_key, 64),
            ("qe_report_signature", self.qe_report_signature, 64),
        ):
            if len(value) != size:
                raise ValueError(f"{_WHAT}: {name} has {size} bytes, not {len(value)}")
        if len(self.qe_auth_data) > 0xFFFF:
            raise ValueError(f"{_WHAT}: qe_auth_data has at most 65535 bytes")
        try:
            _check_certification(self.certification_type, self.certification_data)
        except EvidenceFormatError as error:
            raise ValueError(str(error)) from None
        signature_data = b"".join(
            (
                self.signature,
                self.attestation_key,
                self.qe_report.to_bytes(),
                self.qe_report_signature,
                len(self.qe_auth_data).to_bytes(2, "little"),
                self.qe_auth_data,
                self.certification_type.to_bytes(2, "little"),
                len(self.certification_data).to_bytes(4, "little"),
                self.certification_data,
            )
        )
        return self.signed_bytes + len(signature_data).to_bytes(4, "little") + signature_data


def _demand(header: dict[str, int], name: str, expected: int) -> None:
    if header[name] != expected:
        raise EvidenceFormatError(
            f"{_WHAT}: {name} is not supported", expected=expected, found=header[name]
        )


def _check_certification(kind: int, data: bytes) -> None:
    if kind in _PPID_SIZE:
        expected = _PPID_SIZE[kind] + 20
        if len(data) != expected:
            raise EvidenceFormatError(
                f"{_WHAT}: certification data of type {kind} has the wrong size",
                expected=f"{expected} bytes",
                found=f"{len(data)} bytes",
            )
    elif kind not in (CERTIFICATION_PCK_LEAF, CERTIFICATION_PCK_CHAIN):
        raise EvidenceFormatError(
            f"{_WHAT}: certification data type is not supported", expected="1 to 5", found=kind
        )
    elif not data:
        raise EvidenceFormatError(
            f"{_WHAT}: certification data is empty", expected="certificates", found="0 bytes"
        )
