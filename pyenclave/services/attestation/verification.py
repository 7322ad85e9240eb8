"""
From a request to claims that hold: evidence and its binding to runtime and init-time data.

Whether evidence is genuine is the judgement of `pyenclave.attestation` alone; what is asked of it
here is what the documents ask of the service itself (the project's notes on Azure Attestation,
8.1). What a relying party may want of it is left to the attestation policy, which sees the claims.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final

from pyenclave.attestation import (
    AppraisalPolicy,
    AttestationResult,
    Check,
    Endorsements,
    appraise,
    kind_of,
)
from pyenclave.attestation.policy import TCB_STATUSES
from pyenclave.errors import AppraisalError, EvidenceFormatError
from pyenclave.formats import jsonstrict, ratls
from pyenclave.formats.evidence import Evidence
from pyenclave.formats.hcl import RsaKey
from pyenclave.formats.x509 import Certificate, encode_pem
from pyenclave.services.attestation.encoding import decode
from pyenclave.services.attestation.requests import BoundData, Request

__all__ = ["ENDORSED", "GENUINE", "Prepared", "Verified", "prepare", "verify"]

# Genuine, whatever its code, TCB and mode: the claims say them, and the policy decides.
GENUINE: Final = AppraisalPolicy.any_code(
    allow_debug=True,
    allow_migration_agent=True,
    tcb_statuses=TCB_STATUSES,
    accepted_advisories=("any",),
    dangerous_allow_software=True,
)
_MAX_REPORT: Final = 8 << 10  # bytes of an SEV-SNP report
_MAX_CHAIN: Final = 64 << 10
_MAX_ENDORSEMENTS: Final = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """
    Evidence in the form that verification reads.

    Attributes:
        request: Where it came from.
        kind: Kind of evidence, as `pyenclave.attestation` names it.
        data: The evidence.
        files: Endorsements that the client sent along; verified like any others.
        ignored: What the client sent and nobody reads.
    """

    request: Request
    kind: str
    data: bytes
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    ignored: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the evidence, for the record."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """
    Evidence that is genuine and binds what came with it.

    Attributes:
        prepared: The evidence.
        result: What was checked, and what it says.
        endorsements: What it was checked by.
        guest_key: Of a guest: the key that its vTPM certified.
    """

    prepared: Prepared
    result: AttestationResult
    endorsements: Endorsements = field(repr=False)
    guest_key: RsaKey | None = None

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.prepared.request


def _only(data: bytes, kind: str, what: str) -> None:
    found = kind_of(data)
    if found != kind:
        raise EvidenceFormatError(f"{what}: another kind of evidence", expected=kind, found=found)


def _quote(request: Request) -> Prepared:
    kind = "tdx-quote" if request.type == "TdxVm" else "sgx-quote"
    _only(request.evidence, kind, "quote")
    return Prepared(request=request, kind=kind, data=request.evidence)


def _open_enclave(request: Request) -> Prepared:
    quote = ratls.open_enclave_quote(request.evidence)
    if len(quote) == len(request.evidence):
        raise EvidenceFormatError(
            "report: no Open Enclave report",
            expected="the header of a remote report, then a quote",
            found=request.evidence[:8].hex(),
            advice="Send a bare quote to /attest/SgxEnclave.",
        )
    _only(quote, "sgx-quote", "report")
    return Prepared(request=request, kind="sgx-quote", data=quote)


def snp_proof(data: bytes, what: str) -> tuple[bytes, dict[str, bytes], tuple[str, ...]]:
    """
    Read the JSON that carries an SEV-SNP report: report, endorsements, members that are not read.

    Raises:
        EvidenceFormatError: Malformed, or a member is missing or unknown.

    """
    found = jsonstrict.object_of(data, what, max_depth=8)
    for name in found:
        if name not in ("SnpReport", "VcekCertChain", "Endorsements"):
            raise EvidenceFormatError(
                f"{what}: an unknown member",
                expected="SnpReport, VcekCertChain, Endorsements",
                found=f"{name!r:.60}",
            )
    report = decode(found.get("SnpReport"), f"{what}.SnpReport", limit=_MAX_REPORT)
    pem = decode(found.get("VcekCertChain"), f"{what}.VcekCertChain", limit=_MAX_CHAIN)
    ignored: tuple[str, ...] = ()
    if found.get("Endorsements") is not None:
        decode(found["Endorsements"], f"{what}.Endorsements", limit=_MAX_ENDORSEMENTS)
        ignored = ("Endorsements",)
    return report, vcek_files(pem, what), ignored


def vcek_files(pem: bytes, what: str) -> dict[str, bytes]:
    """Return the endorsements in a chain of VCEK, ASK and ARK."""
    chain = Certificate.from_pem_chain(pem.rstrip(b"\0"), limit=3)
    if len(chain) != 3:
        raise EvidenceFormatError(
            f"{what}.VcekCertChain",
            expected="VCEK, ASK and ARK",
            found=f"{len(chain)} certificates",
        )
    vek, ask, ark = chain
    return {
        "vek.der": vek.der,
        "ask.pem": encode_pem(ask.der),
        "ark.pem": encode_pem(ark.der),
    }


def _snp(request: Request) -> Prepared:
    report, files, ignored = snp_proof(request.evidence, "report")
    _only(report, "sev-snp-report", "report.SnpReport")
    return Prepared(
        request=request, kind="sev-snp-report", data=report, files=files, ignored=ignored
    )


def _pyenclave(request: Request) -> Prepared:
    Evidence.from_bytes(request.evidence)
    return Prepared(request=request, kind="pyenclave", data=request.evidence)


def _guest(request: Request) -> Prepared:
    from pyenclave.services.attestation import guest

    return guest.prepare(request)


_PREPARE: Final[Mapping[str, Callable[[Request], Prepared]]] = MappingProxyType(
    {
        "SgxEnclave": _quote,
        "OpenEnclave": _open_enclave,
        "TdxVm": _quote,
        "SevSnpVm": _snp,
        "PyEnclave": _pyenclave,
        "AzureGuest": _guest,
    }
)


def prepare(request: Request) -> Prepared:
    """
    Find the evidence in *request*.

    Raises:
        EvidenceFormatError: It is not evidence of the type that was asked for.

    """
    return _PREPARE[request.type](request)


# ---- binding ----------------------------------------------------------------------------------


def _half(found: bytes, digest: bytes) -> bool:
    return hmac.compare_digest(found[:32], digest)


def _whole(found: bytes, digest: bytes) -> bool:
    return hmac.compare_digest(found, digest.ljust(len(found), b"\0"))


# Kind → claim that binds runtime data, and how: the documents let an enclave or TD use the second
# half of its report data for something else, a report of SEV-SNP or of ours not.
_RUNTIME: Final[Mapping[str, tuple[str, Callable[[bytes, bytes], bool]]]] = MappingProxyType(
    {
        "sgx-quote": ("report_data", _half),
        "tdx-quote": ("report_data", _half),
        "sev-snp-report": ("report_data", _whole),
        "pyenclave": ("report_data", _whole),
    }
)
_INITTIME: Final[Mapping[str, tuple[str, Callable[[bytes, bytes], bool]]]] = MappingProxyType(
    {
        "sgx-quote": ("config_id", _half),
        "tdx-quote": ("mr_config_id", _whole),
        "sev-snp-report": ("host_data", _whole),
    }
)


def _refused(name: str, expected: object, found: object, advice: str) -> AppraisalError:
    return AppraisalError(
        f"the evidence is refused by {name}", expected=expected, found=found, advice=advice
    )


def _check(
    result: AttestationResult,
    given: BoundData | None,
    what: str,
    rules: Mapping[str, tuple[str, Callable[[bytes, bytes], bool]]],
) -> None:
    if given is None:
        return
    if result.kind not in rules:
        raise _refused(
            f"binding.{what}",
            f"evidence that binds {what}",
            f"evidence of kind {result.kind}, which binds none",
            f"Leave {what} away: nothing in this evidence vouches for it.",
        )
    claim, holds = rules[result.kind]
    found = bytes.fromhex(result.claims[claim])
    digest = hashlib.sha256(given.data).digest()
    if not holds(found, digest):
        # A TD's configuration has room for the longer hash that others put there.
        if claim == "mr_config_id" and hmac.compare_digest(
            found, hashlib.sha384(given.data).digest()
        ):
            return
        raise _refused(
            f"binding.{what}",
            f"{claim} with the SHA-256 of {what}.data: {digest.hex()}",
            found.hex(),
            f"The evidence was made for other {what}, or the bytes were changed on the way "
            "(hash the decoded bytes exactly as they are sent).",
        )


def _first_failed(checks: Iterable[Check]) -> Check:
    listed = list(checks)
    return next(
        (check for check in listed if check.outcome == "failed"),
        next(check for check in listed if not check.holds),
    )


def verify(
    prepared: Prepared,
    *,
    endorsements: Endorsements,
    roots: Iterable[bytes],
    at: datetime,
) -> Verified:
    """
    Verify evidence, and that it binds the data that came with it.

    Args:
        prepared: The evidence.
        endorsements: The vendor's files; what the client sent is added and never replaces one.
        roots: Roots that the service pins besides the vendors' own, PEM or DER.
        at: When validity is judged.

    Raises:
        AppraisalError: Not genuine, or it binds something else; ``result`` has the checks.
        EvidenceFormatError: The evidence cannot be read.

    """
    files = endorsements
    if prepared.files:
        files = Endorsements.of({**prepared.files, **endorsements.files})
    result = appraise(
        prepared.data,
        policy=GENUINE,
        freshness="not_checked",
        endorsements=files,
        roots=roots,
        at=at,
    )
    if result.kind != prepared.kind:
        raise EvidenceFormatError(
            "another kind of evidence", expected=prepared.kind, found=result.kind
        )
    if not result.accepted:
        check = _first_failed(result.checks)
        raise AppraisalError(
            f"the evidence is refused by {', '.join(result.refused_by) or check.name}",
            expected=check.expected,
            found=check.found,
            advice=check.advice,
            result=result,
        )
    _check(result, prepared.request.runtime, "runtimeData", _RUNTIME)
    _check(result, prepared.request.inittime, "initTimeData", _INITTIME)
    key = None
    if prepared.request.type == "AzureGuest":
        from pyenclave.services.attestation import guest

        key = guest.certified(prepared)
    return Verified(prepared=prepared, result=result, endorsements=files, guest_key=key)


# Kinds whose collateral the service itself must have.
ENDORSED: Final = frozenset(("sgx-quote", "tdx-quote", "azure-hcl-tdx"))
