"""
Tell the kind of evidence from its bytes.

Only what distinguishes the kinds is looked at; whether the evidence is well-formed, let alone
genuine, is for the checks of its kind. What fits no kind is refused, and what it seems to be is
said.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from struct import Struct
from typing import Any, Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.evidence import MAGIC

__all__ = ["MAX_EVIDENCE", "kind_of", "unpadded"]

MAX_EVIDENCE: Final = 16 << 20  # bytes; event logs are the largest

_INTEL_QE: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_ECDSA_KEYS: Final = (2, 3)  # attestation key types of DCAP quotes
_TEE_SGX, _TEE_TDX = 0, 0x81
_QUOTE: Final = Struct("<HHI")  # version, attestation key type, TEE
_SNP_SIZE: Final = 1184
_SNP: Final = Struct("<I48xI")  # version, algorithm of the signature
_SNP_VERSIONS: Final = range(1, 16)
# Status and size before the report in the answer to an ioctl.
_ANSWERED: Final = bytes(4) + _SNP_SIZE.to_bytes(4, "little") + bytes(24)
_HCL_TYPE_AT: Final = 1224
_HCL_TYPES: Final = {1: "VBS", 3: "no hardware", 5: "Arm CCA"}
_SPEC_ID_AT: Final = 32
_PCRS: Final = 24
_LAST_EVENT: Final = 0x13  # of those that do not belong to UEFI

_CCA_TAGS: Final = (b"\xd9\x01\x8f", b"\xd9\x03\x8b")  # 399, 907
_CCA_PARTS: Final = (b"\x19\xac\xca", b"\x19\xac\xd1")
_SPDM_REQUEST: Final = 37  # bytes of a request for signed measurements

# DER of object identifiers, tag and length included.
_AMD_EXTENSIONS: Final = bytes.fromhex("060a2b060104019c7801")  # 1.3.6.1.4.1.3704.1.…; see below
_RA_TLS: Final = tuple(
    bytes.fromhex(text)
    for text in (
        "060667810505" + "0409",  # 2.23.133.5.4.9, TCG DICE tagged evidence
        "06092a864886f84d8a3906",  # 1.2.840.113741.1337.6, Gramine (also inside its faulty form)
        "06092a864886f7140a0101",  # 1.2.840.113556.10.1.1, Open Enclave quote
        "06092a864886f7140a0102",  # …2, Open Enclave evidence
        "06092b0601040182376901",  # 1.3.6.1.4.1.311.105.1, the same under new identifiers
        "06092b0601040182376902",
    )
)
_SGX_PCK: Final = bytes.fromhex("060a2a864886f84d010d01")  # 1.2.840.113741.1.13.1

_JWT: Final = re.compile(rb"[A-Za-z0-9_-]+=*\.[A-Za-z0-9_-]+=*\.[A-Za-z0-9_-]*=*")
_PEM: Final = re.compile(
    rb"-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----([A-Za-z0-9+/=\s]+)-----END \1-----"
)
_TEXT: Final = re.compile(rb"[A-Za-z0-9+/=_\s-]{64,}")
_HEX: Final = re.compile(rb"(?:[0-9A-Fa-f]{2}\s*)+")
_SHOWN: Final = 16  # bytes of unknown evidence that an error shows


def kind_of(evidence: bytes) -> str:
    """
    Return the kind of *evidence*, a name of `kinds.KINDS`.

    Raises:
        EvidenceFormatError: No kind that can be verified; the error says what was seen.

    """
    if len(evidence) > MAX_EVIDENCE:
        raise EvidenceFormatError(
            "evidence is too large", expected=f"at most {MAX_EVIDENCE} bytes", found=len(evidence)
        )
    for look in _LOOKS:
        kind = look(evidence)
        if kind is not None:
            return kind
    raise _unknown(evidence)


def unpadded(token: bytes) -> bytes:
    """Return a token without white space around it and without the NUL that ends it in C."""
    return token.removesuffix(b"\0").strip()


def _seen(what: str, advice: str | None = None) -> EvidenceFormatError:
    return EvidenceFormatError(
        "this is no evidence of a known kind", found=what, advice=advice, expected="evidence"
    )


def _u(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _own(data: bytes) -> str | None:
    return "pyenclave" if data[: len(MAGIC) - 1] == MAGIC[:-1] else None


def _quote(data: bytes) -> str | None:
    """DCAP quotes, versions 3 to 5: 48 bytes of header, then a report body."""
    if len(data) < 48:
        return None
    version, key_type, tee = _QUOTE.unpack_from(data)
    if not (key_type in _ECDSA_KEYS or data[12:28] == _INTEL_QE):
        return None
    if version == 3:
        return "sgx-quote"
    if version in (4, 5):
        if tee == _TEE_TDX:
            return "tdx-quote"
        if tee == _TEE_SGX:
            return "sgx-quote"
        raise _seen(f"a quote of version {version} of TEE type {tee:#x}")
    if data[12:28] == _INTEL_QE:
        raise _seen(f"an Intel quote of version {version}", "Versions 3, 4 and 5 are known.")
    return None


def _snp(data: bytes) -> str | None:
    """A SEV-SNP report has a fixed size, a small version, and ECDSA P-384 as its algorithm."""
    if len(data) < _SNP_SIZE:
        return None
    version, algorithm = _SNP.unpack_from(data)
    exact = len(data) == _SNP_SIZE
    if version in _SNP_VERSIONS and algorithm == 1:
        return "sev-snp-report"
    return "sev-snp-report" if exact and (version in _SNP_VERSIONS or algorithm == 1) else None


def _hcl(data: bytes) -> str | None:
    """The report of Azure's paravisor: a header, a hardware report, and runtime data."""
    if data[:4] != b"HCLA":
        return None
    if len(data) < _HCL_TYPE_AT + 4:
        raise _seen(f"an HCL report cut off after {len(data)} bytes")
    report_type = _u(data, _HCL_TYPE_AT, 4)
    if report_type == 2:
        return "azure-hcl-snp"
    if report_type == 4:
        return "azure-hcl-tdx"
    name = _HCL_TYPES.get(report_type, "unknown")
    raise _seen(f"an HCL report of type {report_type} ({name})", "SEV-SNP and TDX are known.")


def _event_log(data: bytes) -> str | None:
    """The first record of an event log is of type EV_NO_ACTION and names the specification."""
    if data.lstrip(b" \t\r\n")[:1] == b"[" and b'"imr"' in data[:4096]:
        return "tdx-ccel"  # dstack's form
    if data[4:8] != b"\3\0\0\0" or data[_SPEC_ID_AT : _SPEC_ID_AT + 14] != b"Spec ID Event0":
        return None
    from pyenclave.formats.eventlog import EventLog

    try:
        log = EventLog.from_bytes(data)
    except EvidenceFormatError:
        # The checks of its kind say what is wrong. One algorithm, SHA-384: as TDX has it.
        algorithms = _u(data, _SPEC_ID_AT + 24, 4), _u(data, _SPEC_ID_AT + 28, 2)
        return "tdx-ccel" if algorithms == (1, 0x0C) else "tcg-eventlog"
    return "tdx-ccel" if log.is_ccel else "tcg-eventlog"


def _sha1_log(data: bytes) -> str | None:
    """Logs of TPM 1.2's form may begin without a record that names the specification."""
    register, event, size = _u(data, 0, 4), _u(data, 4, 4), _u(data, 28, 4)
    if register or not 1 <= event <= _LAST_EVENT or not any(data[8:28]) or not size:
        return None
    # The record behind the first one is of a PCR too, or the log ends there.
    following = data[32 + size :]
    whole = len(data) == 32 + size
    return "tcg-eventlog" if whole or (following and _u(following, 0, 4) < _PCRS) else None


def _cbor_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Return major type, argument and end of the CBOR head at *at*; -1 if there is none."""
    first = data[at] if at < len(data) else 0x1F
    size = first & 31
    if size < 24:
        return first >> 5, size, at + 1
    if size > 27:
        return -1, 0, at
    end = at + 1 + (1 << (size - 24))
    return first >> 5, int.from_bytes(data[at + 1 : end], "big"), end


def _cose(data: bytes) -> str | None:
    """COSE_Sign1: [protected header, header, payload, signature], with or without tag 18."""
    at = 1 if data[:1] == b"\xd2" else 0
    if data[at : at + 1] != b"\x84":
        return None
    major, size, at = _cbor_head(data, at + 1)
    if major != 2 or not 0 < size <= 64:
        return None
    major, count, at = _cbor_head(data, at + size)
    if (major, count) != (5, 0):
        return None
    major, size, at = _cbor_head(data, at)
    if major != 2:
        return None
    payload = data[at : at + size]
    if b"module_id" in payload or b"cabundle" in payload:
        return "nitro-document"
    raise _seen("a COSE_Sign1 message that is no AWS Nitro document")


def _cca(data: bytes) -> str | None:
    """A collection of two parts, under its own tag or that of a collection of messages."""
    if data[:3] not in _CCA_TAGS:
        return None
    if data[3:4] == b"\xa2" and data[4:7] in _CCA_PARTS:
        return "arm-cca-token"
    raise _seen(
        "a collection of messages (CMW), or a damaged Arm CCA token",
        "A CCA token has two parts, 44234 and 44241.",
    )


def _gpu(data: bytes) -> str | None:
    """SPDM 1.1: a request for measurements, and the response after it."""
    if data[:2] == b"\x11\xe0" and data[_SPDM_REQUEST : _SPDM_REQUEST + 2] == b"\x11\x60":
        return "nvidia-gpu-report"
    return None


def _token(data: bytes) -> str | None:
    """A JSON web token; issuer and profile tell whose."""
    text = unpadded(data)
    if not _JWT.fullmatch(text):
        return None
    header, claims = (_json_part(part) for part in text.split(b".")[:2])
    issuer, profile = claims.get("iss"), claims.get("eat_profile")
    issuer = issuer if isinstance(issuer, str) else ""
    profile = profile if isinstance(profile, str) else ""
    if (
        issuer == "https://confidentialcomputing.googleapis.com"
        or "cloud.google.com/confidential-computing" in profile
    ):
        return "google-confidential-space-jwt"
    if ".attest.azure." in issuer or "x-ms-attestation-type" in claims:
        return "maa-jwt"
    if profile or "evaluation-reports" in claims or _is_ear(claims):
        return "attestation-result-jwt"
    if "x5c" in header:
        return "x5c-jwt"
    raise _seen(
        f"a JSON web token of issuer {issuer[:80]!r}",
        "Tokens of Azure Attestation, Google Confidential Space and EAR verifiers are known.",
    )


def _is_ear(claims: dict[str, Any]) -> bool:
    """Whether there are members of an attestation result, also without the profile it needs."""
    if any(name in claims for name in ("ear.verifier-id", "ear_verifier_id")):
        return True
    submods = claims.get("submods")
    return isinstance(submods, dict) and any(
        isinstance(item, dict) and ("ear.status" in item or "ear_status" in item)
        for item in submods.values()
    )


def _json_part(part: bytes) -> dict[str, Any]:
    from pyenclave.formats import jsonstrict

    part = part.rstrip(b"=")
    try:
        text = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except binascii.Error:
        raise _seen("three parts that are no base64url") from None
    return dict(jsonstrict.object_of(text, "JSON web token"))


def _certificate(data: bytes) -> str | None:
    """A certificate is AMD's of a chip, or one that carries evidence."""
    # DER first: a quote inside a certificate has PEM certificates of its own.
    found = _PEM.search(data[: 1 << 20])
    if data[:2] in (b"\x30\x82", b"\x30\x83") and data[2 + (data[1] & 3) :][:1] == b"\x30":
        der = data
    elif found is not None and data[: found.start()].isascii():
        try:
            der = base64.b64decode(b"".join(found[2].split()), validate=True)
        except binascii.Error:
            raise _seen("a damaged PEM certificate") from None
    else:
        return None
    if any(oid in der for oid in _RA_TLS):
        # Azure Attestation's own certificates are such, and name the instance.
        return "maa-cert" if b".attest.azure." in der else "ra-tls-cert"
    if _amd(der):
        return "sev-snp-vek-cert"
    if _SGX_PCK in der:
        raise _seen(
            "a PCK certificate of Intel, or one of the old TLS sample",
            "It is an endorsement: give the quote as evidence.",
        )
    raise _seen("a certificate that carries no evidence")


def _amd(der: bytes) -> bool:
    """Whether an extension is 1.3.6.1.4.1.3704.1.…, whatever the identifier's length."""
    oid = _AMD_EXTENSIONS[2:]
    return any(bytes((6, size)) + oid in der for size in range(len(oid) + 1, len(oid) + 5))


def _json(data: bytes) -> str | None:
    if data.lstrip(b" \t\r\n")[:1] != b"{":
        return None
    from pyenclave.formats.decoded_token import DecodedToken

    token = DecodedToken.from_bytes(data, "JSON evidence")
    members = token.claims
    if token.header is not None:
        if token.is_maa:
            return "maa-claims"
        raise _seen(f"two JSON objects, of issuer {token.issuer[:80]!r}", "Give the token itself.")
    if "keys" in members:
        return "maa-jwks"
    if "signature" in members and ("tcbInfo" in members or "enclaveIdentity" in members):
        return "sgx-collateral"
    if isinstance(members.get("token"), str):
        raise _seen("a JSON object around a token", "Give the token itself.")
    if "vcekCert" in members or "certificateChain" in members:
        raise _seen("certificates of AMD in JSON", "They are endorsements, no evidence.")
    if "anyOf" in members or ("key" in members and "claims" in members):
        return "akv-release-policy"
    if token.is_maa:
        return "maa-claims"
    raise _seen(f"a JSON object with {', '.join(sorted(members))[:200] or 'no members'}")


_LOOKS: Final[tuple[Callable[[bytes], str | None], ...]] = (
    _own,
    _gpu,
    _quote,
    _hcl,
    _event_log,
    _snp,
    _cca,
    _cose,
    _token,
    _certificate,
    _json,
    _sha1_log,
)


def _unknown(data: bytes) -> EvidenceFormatError:
    if not data:
        return _seen("nothing")
    if data[:4] == b"\xffTCG":
        return _seen(
            "a TPM quote by itself",
            "Give the HCL report as evidence, and this as tpm-quote.msg beside it.",
        )
    if data[:2] in (b"\x10\xe0", b"\x11\xe0", b"\x12\xe0"):
        return _seen(
            "an SPDM message, as of an NVIDIA GPU",
            "A report is the request in version 1.1 with the response after it.",
        )
    if data[:8] == b"\1\0\0\0\2\0\0\0" and _quote(data[16:]):
        return _seen("an Open Enclave report", "The quote follows its header of 16 bytes.")
    if data[:32] == _ANSWERED and _snp(data[32 : 32 + _SNP_SIZE]):
        return _seen("the answer of /dev/sev-guest", "The report follows its header of 32 bytes.")
    if data[:1] == b"\x81" and len(data) == 1024:
        return _seen("a TDREPORT", "It is checked on its own platform only: ask for a quote.")
    for form, pattern in (("hexadecimal digits", _HEX), ("base64", _TEXT)):
        if pattern.fullmatch(data):
            return _seen(f"text that may be {form}", "Decode it first.")
    return EvidenceFormatError(
        "this is no evidence of a known kind",
        expected="a quote, a report, a document, a token, a certificate or an event log",
        found=f"{len(data)} bytes that begin with {data[:_SHOWN].hex()}",
    )
