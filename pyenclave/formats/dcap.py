"""
DCAP quotes: version 3 (SGX), 4 and 5 (SGX and TDX), all with ECDSA P-256.

Layouts of Intel's ``sgx_quote_3.h``, ``sgx_quote_4.h`` and ``sgx_quote_5.h``. ECDSA signatures and
keys are raw big-endian pairs of 32 bytes; every other number is little-endian. A quote of an SGX
enclave is a `Quote`, one of a TD a `TdQuote`: neither reads the other's. Nothing is verified here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats._binary import Layout, Reader, maker
from pyenclave.formats.sgx import ReportBody
from pyenclave.formats.tdx import BODY_SIZES, TdReportBody

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from typing_extensions import Buffer

__all__ = [
    "CERTIFICATION_PCK_CHAIN",
    "CERTIFICATION_PCK_LEAF",
    "CERTIFICATION_PPID_CLEAR",
    "CERTIFICATION_PPID_RSA2048",
    "CERTIFICATION_PPID_RSA3072",
    "CERTIFICATION_QE_REPORT",
    "MAX_QUOTE_SIZE",
    "MIN_QUOTE_SIZE",
    "QE_VENDOR_INTEL",
    "TEE_SGX",
    "TEE_TDX",
    "PlatformIds",
    "Quote",
    "TdQuote",
    "read_quote",
]

QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

TEE_SGX: Final = 0x00
TEE_TDX: Final = 0x81

CERTIFICATION_PPID_CLEAR = 1
CERTIFICATION_PPID_RSA2048 = 2
CERTIFICATION_PPID_RSA3072 = 3
CERTIFICATION_PCK_LEAF = 4
CERTIFICATION_PCK_CHAIN = 5
CERTIFICATION_QE_REPORT = 6  # the envelope of versions 4 and 5 around the QE's report

# Header, body, length, and the fixed part of the signature data (Intel's QVL has the same minimum).
MIN_QUOTE_SIZE = 48 + 384 + 4 + 584
# Nothing honest is near this; it bounds the work for a hostile one.
MAX_QUOTE_SIZE = 1 << 16

_KEY_TYPE_P256 = 2
_HEADER_SIZE: Final = 48
_SGX_BODY: Final = 384
_SGX_BODY_TYPE: Final = 1
_TD_BODY_V4: Final = 584
# Size of the (encrypted) PPID in the certification data of types 1 to 3.
_PPID_SIZE = {
    CERTIFICATION_PPID_CLEAR: 16,
    CERTIFICATION_PPID_RSA2048: 256,
    CERTIFICATION_PPID_RSA3072: 384,
}

_HEADER = Layout(
    "quote header",
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
class _Quote:
    """What quotes of every kind have."""

    version: int
    qe_svn: int = 0
    pce_svn: int = 0
    qe_vendor_id: bytes = QE_VENDOR_INTEL
    user_data: bytes = bytes(20)
    signature: bytes
    attestation_key: bytes
    qe_report: ReportBody
    qe_report_signature: bytes
    qe_auth_data: bytes
    certification_type: int
    certification_data: bytes
    _signed: bytes | None = field(default=None, init=False, repr=False, compare=False)
    _certified: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def tee_type(self) -> int:
        """`TEE_SGX` or `TEE_TDX`."""
        raise NotImplementedError

    @property
    def body_type(self) -> int:
        """The number that version 5 has for the body: 1 SGX, 2 to 4 TDX."""
        raise NotImplementedError

    def _body_bytes(self) -> bytes:
        raise NotImplementedError

    @property
    def signed_bytes(self) -> bytes:
        """What ``signature`` covers: header and report body, in version 5 also type and size."""
        if self._signed is not None:
            return self._signed
        header = _HEADER.pack(
            {
                "version": self.version,
                "key_type": _KEY_TYPE_P256,
                "tee_type": self.tee_type,
                "qe_svn": self.qe_svn,
                "pce_svn": self.pce_svn,
                "qe_vendor_id": self.qe_vendor_id,
                "user_data": self.user_data,
            }
        )
        body = self._body_bytes()
        if self.version < 5:
            return header + body
        kind = self.body_type.to_bytes(2, "little") + len(body).to_bytes(4, "little")
        return header + kind + body

    @property
    def qe_report_bytes(self) -> bytes:
        """What ``qe_report_signature`` covers."""
        return self.qe_report.to_bytes() if self._certified is None else self._certified

    @property
    def platform_ids(self) -> PlatformIds | None:
        """The content of certification data of types 1 to 3, ``None`` for certificates."""
        if self.certification_type not in _PPID_SIZE:
            return None
        size = _PPID_SIZE[self.certification_type]
        ppid, rest = self.certification_data[:size], self.certification_data[size:]
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
        what = f"quote of version {self.version}"
        for name, value, size in (
            ("signature", self.signature, 64),
            ("attestation_key", self.attestation_key, 64),
            ("qe_report_signature", self.qe_report_signature, 64),
        ):
            if len(value) != size:
                raise ValueError(f"{what}: {name} has {size} bytes, not {len(value)}")
        if len(self.qe_auth_data) > 0xFFFF:
            raise ValueError(f"{what}: qe_auth_data has at most 65535 bytes")
        try:
            _check_certification(self.certification_type, self.certification_data)
        except EvidenceFormatError as error:
            raise ValueError(str(error)) from None
        certified = b"".join(
            (
                self.qe_report.to_bytes(),
                self.qe_report_signature,
                len(self.qe_auth_data).to_bytes(2, "little"),
                self.qe_auth_data,
                self.certification_type.to_bytes(2, "little"),
                len(self.certification_data).to_bytes(4, "little"),
                self.certification_data,
            )
        )
        if self.version > 3:
            kind = CERTIFICATION_QE_REPORT.to_bytes(2, "little")
            certified = kind + len(certified).to_bytes(4, "little") + certified
        data = self.signature + self.attestation_key + certified
        return self.signed_bytes + len(data).to_bytes(4, "little") + data

    @classmethod
    def _read(cls, data: Buffer, versions: Collection[int], tee_type: int) -> Self:
        """Read a quote of one TEE."""
        with memoryview(data) as view:
            size = view.nbytes
            if not MIN_QUOTE_SIZE <= size <= MAX_QUOTE_SIZE:
                raise EvidenceFormatError(
                    "quote: the size is wrong",
                    expected=f"{MIN_QUOTE_SIZE} to {MAX_QUOTE_SIZE} bytes",
                    found=f"{size} bytes",
                )
            raw = bytes(view)
        usual = _usual(raw, versions, tee_type)
        if usual is not None:
            body_of = ReportBody if tee_type == TEE_SGX else TdReportBody
            report = ReportBody.from_bytes(usual[7])
            parts = *usual[:7], report, *usual[8:12], usual[13], usual[7]
            made: Self = _MAKERS[cls]((*parts, body_of.from_bytes(usual[12])))
            return made
        reader = Reader(raw, "quote", EvidenceFormatError)
        header = _HEADER.unpack(reader.take(_HEADER_SIZE, "header"))
        _demand(header, "version", *versions)
        _demand(header, "key_type", _KEY_TYPE_P256)
        _demand(header, "tee_type", tee_type)
        version: int = header["version"]
        kind, size = _body_kind(reader, version, tee_type)
        body = reader.take(size, "report body")
        signed_size = reader.offset
        length = reader.integer(4, "signature data length")
        part = Reader(
            reader.take(length, "signature data"), "quote signature data", EvidenceFormatError
        )
        reader.end(zeros=True)
        fields: dict[str, Any] = {
            "version": version,
            "qe_svn": header["qe_svn"],
            "pce_svn": header["pce_svn"],
            "qe_vendor_id": header["qe_vendor_id"],
            "user_data": header["user_data"],
            "signature": part.take(64, "signature"),
            "attestation_key": part.take(64, "attestation key"),
        }
        if version > 3:
            outer = part.integer(2, "outer certification data type")
            if outer != CERTIFICATION_QE_REPORT:
                raise EvidenceFormatError(
                    "quote: outer certification data type is not supported",
                    expected=CERTIFICATION_QE_REPORT,
                    found=outer,
                )
            inner = part.take(
                part.integer(4, "outer certification data size"), "outer certification data"
            )
            part.end()
            part = Reader(inner, "quote certification data", EvidenceFormatError)
        qe_report = part.take(_SGX_BODY, "QE report")
        fields["qe_report"] = ReportBody.from_bytes(qe_report)
        fields["qe_report_signature"] = part.take(64, "QE report signature")
        fields["qe_auth_data"] = part.take(part.integer(2, "QE auth data size"), "QE auth data")
        fields["certification_type"] = part.integer(2, "certification data type")
        fields["certification_data"] = part.take(
            part.integer(4, "certification data size"), "certification data"
        )
        part.end()
        _check_certification(fields["certification_type"], fields["certification_data"])
        parsed: ReportBody | TdReportBody = (
            ReportBody.from_bytes(body) if kind == _SGX_BODY_TYPE else TdReportBody.from_bytes(body)
        )
        quote = cls(report_body=parsed, **fields)  # type: ignore[call-arg]
        # Every byte of it went into a field and would be written again just so.
        object.__setattr__(quote, "_signed", raw[:signed_size])
        object.__setattr__(quote, "_certified", qe_report)
        return quote


def _body_kind(reader: Reader, version: int, tee_type: int) -> tuple[int, int]:
    """Return type and size of the report body, which in version 5 stand in front of it."""
    if version < 5:
        if tee_type == TEE_SGX:
            return _SGX_BODY_TYPE, _SGX_BODY
        return 2, _TD_BODY_V4
    known = {_SGX_BODY_TYPE: _SGX_BODY} if tee_type == TEE_SGX else BODY_SIZES
    kind, size = reader.integer(2, "body type"), reader.integer(4, "body size")
    if known.get(kind) != size:
        raise EvidenceFormatError(
            "quote: type and size of the body do not fit",
            expected=" or ".join(f"type {key} with {value} bytes" for key, value in known.items()),
            found=f"type {kind} with {size} bytes",
        )
    return kind, size


_FIXED: Final = Struct("<HHIHH16s20s")
_TYPE_AND_SIZE: Final = Struct("<HI")


def _usual(raw: bytes, versions: Collection[int], tee_type: int) -> tuple[Any, ...] | None:
    """
    Return the parts of a quote all of whose lengths fit; None: read it step by step, and say why.

    The order is that of `_MADE`, with the report bodies as bytes.

    """
    version, key_type, tee, qe_svn, pce_svn, vendor, user_data = _FIXED.unpack_from(raw)
    if version not in versions or key_type != _KEY_TYPE_P256 or tee != tee_type:
        return None
    at = _HEADER_SIZE
    size = _SGX_BODY if tee == TEE_SGX else _TD_BODY_V4
    if version > 4:
        kind, size = _TYPE_AND_SIZE.unpack_from(raw, at)
        at += 6
        if (
            (kind, size) != (_SGX_BODY_TYPE, _SGX_BODY)
            if tee == TEE_SGX
            else BODY_SIZES.get(kind) != size
        ):
            return None
    signed_end = at + size
    body, at = raw[at:signed_end], signed_end + 4
    end = at + int.from_bytes(raw[signed_end:at], "little")
    # Two signatures, a key, a report, and three lengths.
    if end > len(raw) or raw[end:].strip(b"\0"):
        return None
    signature, key = raw[at : at + 64], raw[at + 64 : at + 128]
    at += 128
    if version > 3:
        if end - at < 6 or _TYPE_AND_SIZE.unpack_from(raw, at) != (
            CERTIFICATION_QE_REPORT,
            end - at - 6,
        ):
            return None
        at += 6
    report, certified = raw[at : at + _SGX_BODY], raw[at + _SGX_BODY : at + _SGX_BODY + 64]
    at += _SGX_BODY + 64
    data_at = at + 2 + int.from_bytes(raw[at : at + 2], "little")
    if data_at + 6 > end:
        return None
    auth_data = raw[at + 2 : data_at]
    kind, size = _TYPE_AND_SIZE.unpack_from(raw, data_at)
    if kind not in (CERTIFICATION_PCK_LEAF, CERTIFICATION_PCK_CHAIN):
        return None
    if size == 0 or data_at + 6 + size != end:
        return None
    return (
        version,
        qe_svn,
        pce_svn,
        vendor,
        user_data,
        signature,
        key,
        report,
        certified,
        auth_data,
        kind,
        raw[data_at + 6 : end],
        body,
        raw[:signed_end],
    )


_MADE: Final = (
    "version",
    "qe_svn",
    "pce_svn",
    "qe_vendor_id",
    "user_data",
    "signature",
    "attestation_key",
    "qe_report",
    "qe_report_signature",
    "qe_auth_data",
    "certification_type",
    "certification_data",
    "_signed",
    "_certified",
    "report_body",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote(_Quote):
    """
    A quote of an SGX enclave.

    Attributes:
        version: 3, 4 or 5.
        report_body: The attested enclave's report.
        signature: By the attestation key, over ``signed_bytes``.
        attestation_key: Its public half, X and Y.
        qe_report: The quoting enclave's report, which binds the attestation key.
        qe_report_signature: By the PCK key, over ``qe_report.to_bytes()``.
        certification_type: One of the ``CERTIFICATION_…`` numbers, 1 to 5.
        certification_data: As it stands in the quote. A PEM chain may end in a NUL byte.
    """

    version: int = 3
    report_body: ReportBody

    @classmethod
    def from_bytes(cls, data: Buffer, *, versions: Collection[int] = (3, 4, 5)) -> Quote:
        """
        Read a quote.

        Zero bytes may follow the signature data (some devices hand out padded buffers); they are
        no part of the quote and ``to_bytes`` is without them.

        Args:
            data: The quote.
            versions: Accepted versions.

        Raises:
            EvidenceFormatError: If it is not a well-formed quote of an enclave, naming the field.

        """
        return cls._read(data, versions, TEE_SGX)

    @property
    def tee_type(self) -> int:
        """`TEE_SGX`."""
        return TEE_SGX

    @property
    def body_type(self) -> int:
        """1."""
        return _SGX_BODY_TYPE

    def _body_bytes(self) -> bytes:
        return self.report_body.to_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class TdQuote(_Quote):
    """
    A quote of a TD.

    Attributes:
        version: 4 or 5. Version 4 has bodies of TDX 1.0 only.
        report_body: The TD's report.
    """

    version: int = 4
    report_body: TdReportBody

    @classmethod
    def from_bytes(cls, data: Buffer, *, versions: Collection[int] = (4, 5)) -> TdQuote:
        """
        Read a quote; zero bytes may follow it.

        Raises:
            EvidenceFormatError: If it is not a well-formed quote of a TD, naming the field.

        """
        return cls._read(data, versions, TEE_TDX)

    @property
    def tee_type(self) -> int:
        """`TEE_TDX`."""
        return TEE_TDX

    @property
    def body_type(self) -> int:
        """2 for TDX 1.0, 3 for 1.5, 4 for its extension."""
        return self.report_body.body_type

    def _body_bytes(self) -> bytes:
        body = self.report_body.to_bytes()
        if self.version < 5 and len(body) != _TD_BODY_V4:
            raise ValueError("quote of version 4: its body is one of TDX 1.0")
        return body


_MAKERS: Final[dict[type[Any], Callable[[Iterable[Any]], Any]]] = {
    Quote: maker(Quote, *_MADE),
    TdQuote: maker(TdQuote, *_MADE),
}


def read_quote(data: Buffer) -> Quote | TdQuote:
    """
    Read a quote of an enclave or of a TD, whichever its header says.

    Raises:
        EvidenceFormatError: Neither.

    """
    with memoryview(data) as view:
        is_td = bytes(view[4:8]) == TEE_TDX.to_bytes(4, "little")
    return TdQuote.from_bytes(data) if is_td else Quote.from_bytes(data)


def _demand(header: dict[str, int], name: str, *expected: int) -> None:
    if header[name] not in expected:
        raise EvidenceFormatError(
            f"quote: {name} is not supported",
            expected=" or ".join(map(str, expected)),
            found=header[name],
        )


def _check_certification(kind: int, data: bytes) -> None:
    if kind in _PPID_SIZE:
        expected = _PPID_SIZE[kind] + 20
        if len(data) != expected:
            raise EvidenceFormatError(
                f"quote: certification data of type {kind} has the wrong size",
                expected=f"{expected} bytes",
                found=f"{len(data)} bytes",
            )
    elif kind not in (CERTIFICATION_PCK_LEAF, CERTIFICATION_PCK_CHAIN):
        raise EvidenceFormatError(
            "quote: certification data type is not supported", expected="1 to 5", found=kind
        )
    elif not data:
        raise EvidenceFormatError(
            "quote: certification data is empty", expected="certificates", found="0 bytes"
        )
