"""Verify evidence and appraise it against a policy. No network, no device, no hidden state."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from pyenclave.attestation import kinds
from pyenclave.attestation.cache import known
from pyenclave.attestation.demands import unanswered
from pyenclave.attestation.detect import kind_of
from pyenclave.attestation.endorsements import EMPTY, Endorsements
from pyenclave.attestation.policy import AppraisalPolicy
from pyenclave.attestation.result import AttestationResult, Check, Claims
from pyenclave.errors import AppraisalError, EvidenceFormatError
from pyenclave.formats.evidence import MAX_NONCE, MAX_USER_DATA

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["MIN_NONCE", "Root", "appraise", "verify"]

MIN_NONCE: Final = 8  # bytes, as the Entity Attestation Token has it (RFC 9711, 4.1)
Freshness = Literal["required", "not_checked"]
Buffer = bytes | bytearray | memoryview
Root: TypeAlias = "x509.Certificate | bytes"
Given: TypeAlias = Endorsements | Mapping[str, bytes] | str | os.PathLike[str]


def _no_bytes(name: str, value: object) -> TypeError:
    hint = f": bytes.fromhex({name})" if isinstance(value, str) else ""
    return TypeError(f"{name} is bytes, not {type(value).__name__}{hint}")


def _bytes(name: str, value: Buffer | None, low: int, high: int) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, bytes | bytearray | memoryview):
        raise _no_bytes(name, value)
    if not low <= len(value) <= high:
        raise ValueError(f"{name} has {low} to {high} bytes, not {len(value)}")
    return bytes(value)


def appraise(
    evidence: Buffer,
    *,
    policy: AppraisalPolicy,
    nonce: Buffer | None = None,
    freshness: Freshness = "required",
    endorsements: Given | None = None,
    roots: Iterable[Root] = (),
    at: datetime | None = None,
    user_data: Buffer | None = None,
    report_data: Buffer | None = None,
) -> AttestationResult:
    """
    Verify *evidence* and appraise it; every check runs, so all that is wrong shows at once.

    Args:
        evidence: Evidence of any supported kind, as bytes.
        policy: Reference values and limits.
        nonce: What this relying party sent as its challenge, 8 to 1,024 bytes.
        freshness: ``not_checked`` says that there is no nonce; the result is never `fresh` then.
        endorsements: The vendors' files beside the evidence, by their names (see
            `KNOWN_NAMES`), or the folder that holds them.
        roots: Pinned roots besides the vendors' own: certificates, or PEM or DER bytes. Nothing
            in the evidence or the endorsements is one.
        at: When validity is judged; default now.
        user_data: What measured code must have put into the evidence.
        report_data: The exact 64 bytes of report data that are expected.

    Returns:
        The result, also of evidence that is refused.

    Raises:
        CollateralError: The endorsements are too large.
        EvidenceFormatError: The bytes are no known kind of evidence.
        OSError: The folder of endorsements cannot be read.
        TypeError: An argument has an impossible type.
        ValueError: No nonce although freshness is required, or an impossible length or time.

    """
    if not isinstance(evidence, bytes | bytearray | memoryview):
        raise TypeError(f"evidence is bytes, not {type(evidence).__name__}")
    if not isinstance(policy, AppraisalPolicy):
        raise TypeError(
            f"policy is an AppraisalPolicy, not {type(policy).__name__};"
            " AppraisalPolicy.from_file reads one"
        )
    if freshness not in ("required", "not_checked"):
        raise ValueError(f"freshness is 'required' or 'not_checked', not {freshness!r}")
    if (nonce is None) is (freshness == "required"):
        raise ValueError(
            "give the nonce that was sent, or freshness='not_checked' and none"
            if nonce is None
            else "freshness='not_checked' contradicts a nonce"
        )
    moment = datetime.now(UTC) if at is None else at
    if not isinstance(moment, datetime):
        raise TypeError(f"at is a datetime, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise ValueError("at: a time without a zone is ambiguous")
    data = bytes(evidence)
    kind = kinds.load(kind_of(data))
    case = kind.case(
        data=data,
        kind=kind.name,
        policy=policy,
        endorsements=given(endorsements),
        nonce=_bytes("nonce", nonce, MIN_NONCE, MAX_NONCE),
        user_data=_bytes("user_data", user_data, 0, MAX_USER_DATA),
        report_data=_bytes("report_data", report_data, 64, 64),
        roots=pinned(roots),
        at=moment,
    )
    checks = kind.checks.run(case)
    if kind.name == "pyenclave":
        checks += kind.module.machine_checks(case)
    checks += _code_not_compared(policy, checks)
    checks += _not_answered(policy, kind.name, checks)
    runtime_key = report_body = None
    if kind.name == "pyenclave":
        runtime_key, report_body = kind.module.runtime_binding(case)
    return AttestationResult(
        kind=kind.name,
        checks=checks,
        claims=Claims(lambda: kind.claims(case)),
        at=moment,
        _runtime_key=runtime_key,
        _report_body=report_body,
    )


def _code_not_compared(policy: AppraisalPolicy, checks: tuple[Check, ...]) -> tuple[Check, ...]:
    """
    Refuse evidence of a kind that none of the policy's identities speaks of.

    A policy may name identities of several kinds, and evidence of one kind has only some of them.
    But one at least must have been compared, or a policy for SGX would take any Nitro enclave.
    """
    if policy.accept_any_code:
        return ()
    for check in checks:
        # What a machine below runs is not the code of the enclave on it.
        if check.name.startswith("machine."):
            continue
        if check.asked and (check.name.startswith("code.") or ".code." in check.name):
            return ()
    return (
        Check(
            name="code.named",
            part="policy",
            outcome="failed",
            expected="code that the policy names",
            found="evidence of a kind that has none of the policy's identities",
            advice="Name the identity that this kind has, or say AppraisalPolicy.any_code().",
        ),
    )


_MAX_ANSWERED: Final = 64
_NAME_OF: Final = attrgetter("name")
_ANSWERED: Final[
    dict[tuple[int, str, tuple[str, ...]], tuple[AppraisalPolicy, tuple[str, ...]]]
] = {}


def _not_answered(
    policy: AppraisalPolicy, kind: str, checks: tuple[Check, ...]
) -> tuple[Check, ...]:
    """Refuse evidence that has no answer to what the policy demands of it."""
    names = tuple(map(_NAME_OF, checks))
    # A policy is frozen; what is kept holds it, so its identity names no other one meanwhile.
    found = _ANSWERED.get((id(policy), kind, names))
    if found is None:
        if len(_ANSWERED) >= _MAX_ANSWERED:
            _ANSWERED.clear()
        found = policy, unanswered(policy, kind, names)
        _ANSWERED[id(policy), kind, names] = found
    fields = found[1]
    if not fields:
        return ()
    return (
        Check(
            name="policy.answered",
            part="policy",
            outcome="failed",
            expected=f"an answer to {', '.join(fields)}",
            found=f"evidence of kind {kind}, which has none",
            advice="Leave these fields out for this kind of evidence: one policy for each kind.",
        ),
    )


def given(files: Given | None) -> Endorsements:
    """Return endorsements in whatever form a caller gave them."""
    if files is None:
        return EMPTY
    if isinstance(files, Endorsements):
        return files
    if isinstance(files, Mapping):
        return Endorsements.of(files)
    return Endorsements.from_path(files)


def pinned(roots: Iterable[Root]) -> tuple[bytes, ...]:
    """Return pinned roots in DER; each must be readable as a certificate."""
    return tuple([_root(root) for root in _listed(roots)])


def _root(root: Root) -> bytes:
    if isinstance(root, bytes):
        return _root_der(root)
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    if not isinstance(root, x509.Certificate):
        raise TypeError(f"a root is a certificate or bytes, not {type(root).__name__}")
    return root.public_bytes(Encoding.DER)


@lru_cache(maxsize=64)
def _root_der(root: bytes) -> bytes:
    from pyenclave.formats.x509 import Certificate

    try:
        return known("root", root, Certificate.from_bytes).value.der
    except EvidenceFormatError as error:
        raise ValueError(f"a root is no certificate: {error}") from None


def _listed(roots: Iterable[Root]) -> list[Root]:
    if isinstance(roots, bytes | bytearray | memoryview | str):
        raise TypeError("roots is a list of certificates")
    return list(roots)


def verify(
    evidence: Buffer,
    *,
    policy: AppraisalPolicy,
    nonce: Buffer | None = None,
    freshness: Freshness = "required",
    endorsements: Given | None = None,
    roots: Iterable[Root] = (),
    at: datetime | None = None,
    user_data: Buffer | None = None,
    report_data: Buffer | None = None,
) -> AttestationResult:
    """
    Verify *evidence*, appraise it, and return the result only if it is accepted.

    The arguments are those of `appraise`.

    Raises:
        AppraisalError: Refused; ``error.result`` has every check.
        EvidenceFormatError: The bytes are no known kind of evidence.

    """
    result = appraise(
        evidence,
        policy=policy,
        nonce=nonce,
        freshness=freshness,
        roots=roots,
        at=at,
        user_data=user_data,
        report_data=report_data,
        endorsements=endorsements,
    )
    if result.accepted:
        return result
    first = next(check for check in result.checks if not check.holds)
    raise AppraisalError(
        f"the evidence is refused by {', '.join(result.refused_by) or first.name}",
        expected=first.expected,
        found=first.found,
        advice=first.advice,
        result=result,
    )
