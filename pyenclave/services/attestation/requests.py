"""
Reading attestation requests (the project's notes on Azure Attestation, 8.1).

An unknown member is an error: a misspelt ``runtimeData`` would otherwise be evidence that binds
nothing. Members and ``dataType`` are read in any case, as Azure reads them (its guest client writes
``AttestationInfo``, others ``Quote``); two that differ in case alone are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jsonstrict
from pyenclave.services.attestation.encoding import decode

__all__ = [
    "ATTESTATION_TYPES",
    "MAX_EVIDENCE",
    "UNSUPPORTED",
    "AttestationType",
    "BoundData",
    "Request",
    "read_request",
]

AttestationType = Literal[
    "SgxEnclave", "OpenEnclave", "SevSnpVm", "TdxVm", "AzureGuest", "PyEnclave"
]
# Type → member of the request that holds the evidence.
ATTESTATION_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SgxEnclave": "quote",
        "OpenEnclave": "report",
        "SevSnpVm": "report",
        "TdxVm": "quote",
        "AzureGuest": "attestationInfo",
        "PyEnclave": "evidence",
    }
)
UNSUPPORTED: Final = ("Tpm",)
MAX_EVIDENCE: Final = 128 << 10  # bytes
_MAX_GUEST: Final = 1 << 20  # a guest sends its event log too
_MAX_DATA: Final = 64 << 10  # of runtime and init-time data
_MAX_NONCE: Final = 1024  # characters
_MAX_DRAFT: Final = 128 << 10  # characters
_MAX_DEPTH: Final = 16
_DATA_TYPES: Final = MappingProxyType({"binary": "Binary", "json": "JSON"})
_COMMON: Final = ("runtimeData", "initTimeData", "draftPolicyForAttestation", "nonce")
_NONCE: Final = re.compile(r"[\x20-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundData:
    """
    Data that the evidence binds by its hash.

    Attributes:
        data: The bytes that are hashed.
        json: What they say, if they were declared to be JSON.
    """

    data: bytes
    json: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """
    What a client wants to have attested.

    Attributes:
        type: Of the attestation.
        evidence: The evidence as it came, decoded.
        runtime: Data that the report data binds.
        inittime: Data that the launch configuration binds.
        draft: Policy to try; the token is then no token.
        nonce: Echoed in the token.
    """

    type: str
    evidence: bytes
    runtime: BoundData | None = None
    inittime: BoundData | None = None
    draft: str | None = None
    nonce: str | None = None


def _bound(value: object, what: str) -> BoundData | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise EvidenceFormatError(
            f"{what}: not an object", expected="data and dataType", found=type(value).__name__
        )
    value = _canonical(value, ("data", "dataType"), f"{what}: ")
    if value.get("data") is None:
        raise EvidenceFormatError(f"{what}.data: missing", expected="base64url", found="absent")
    data = decode(value["data"], f"{what}.data", limit=_MAX_DATA)
    said = value.get("dataType")
    kind = _DATA_TYPES.get(said.lower()) if isinstance(said, str) else None
    if kind is None:
        raise EvidenceFormatError(
            f"{what}.dataType", expected=" or ".join(_DATA_TYPES.values()), found=f"{said!r:.40}"
        )
    if kind == "Binary":
        return BoundData(data=data)
    return BoundData(data=data, json=jsonstrict.object_of(data, what, max_depth=_MAX_DEPTH))


def _inittime(value: object) -> BoundData | None:
    # Microsoft's sidecar sends the empty member where it has none. Of the runtime data that is
    # refused: evidence without them binds nothing.
    if value == {"data": "", "dataType": ""}:
        return None
    return _bound(value, "initTimeData")


def _nonce(value: object) -> str | None:
    if value is None:
        return None
    # The public SEV-SNP client sends a number, although the model says string.
    if type(value) is int and 0 <= value < 1 << 64:
        return str(value)
    if not isinstance(value, str):
        raise EvidenceFormatError("nonce: not text", found=type(value).__name__)
    if len(value) > _MAX_NONCE or not _NONCE.fullmatch(value):
        raise EvidenceFormatError(
            "nonce",
            expected=f"1 to {_MAX_NONCE} printable ASCII characters",
            found=f"{value!r:.40}",
        )
    return value


def _draft(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _MAX_DRAFT:
        raise EvidenceFormatError(
            "draftPolicyForAttestation", expected=f"text of at most {_MAX_DRAFT} characters"
        )
    return value


def _canonical(body: Mapping[str, Any], known: tuple[str, ...], what: str) -> dict[str, Any]:
    """Return *body* with its members as they are *known*; none else, and each once."""
    names = {name.lower(): name for name in known}
    found: dict[str, Any] = {}
    for given, value in body.items():
        name = names.get(given.lower()) if given.isascii() else None
        if name is None:
            raise EvidenceFormatError(
                f"{what}an unknown member", expected=", ".join(known), found=f"{given!r:.60}"
            )
        if name in found:
            raise EvidenceFormatError(f"{what}a member in two spellings", found=f"{given!r:.60}")
        found[name] = value
    return found


def read_request(kind: str, body: Mapping[str, Any]) -> Request:
    """
    Read the body of ``POST /attest/{kind}``.

    Args:
        kind: A name of `ATTESTATION_TYPES`.
        body: The body, as strict JSON gave it.

    Raises:
        EvidenceFormatError: A member is missing, unknown, malformed or too large.

    """
    member = ATTESTATION_TYPES[kind]
    body = _canonical(body, (member,) if kind == "AzureGuest" else (member, *_COMMON), "")
    if body.get(member) is None:
        raise EvidenceFormatError(f"{member}: missing", expected="base64url", found="absent")
    limit = _MAX_GUEST if kind == "AzureGuest" else MAX_EVIDENCE
    evidence = decode(body[member], member, limit=limit)
    if not evidence:
        raise EvidenceFormatError(f"{member}: empty", expected="evidence")
    if kind == "AzureGuest":
        return Request(type=kind, evidence=evidence)
    return Request(
        type=kind,
        evidence=evidence,
        runtime=_bound(body.get("runtimeData"), "runtimeData"),
        inittime=_inittime(body.get("initTimeData")),
        draft=_draft(body.get("draftPolicyForAttestation")),
        nonce=_nonce(body.get("nonce")),
    )
