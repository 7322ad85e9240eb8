"""
EAT attestation results (draft-ietf-rats-ear): appraisals, tiers and trustworthiness vectors.

Deployed verifiers follow older drafts, whose names have dots (``ear.status``); the newer ones have
underscores (``ear_status``). Both are read; the dotted form is written unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pyenclave.errors import EvidenceFormatError

__all__ = [
    "CATEGORIES",
    "PROFILES",
    "TIERS",
    "Appraisal",
    "Form",
    "appraisals_of",
    "is_ear",
    "plain_submods",
    "tier_of",
]

Form = Literal["dotted", "underscored"]

TIERS: Final = {"none": 0, "affirming": 2, "warning": 32, "contraindicated": 96}
PROFILES: Final[Mapping[Form, str]] = {
    "dotted": "tag:github.com,2024:confidential-containers/Trustee",
    "underscored": "tag:ietf.org,2026:rats/ear#03",
}
CATEGORIES: Final = (
    "instance-identity",
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "runtime-opaque",
    "storage-opaque",
    "sourced-data",
)
_MAX_SUBMODS: Final = 64
_STATUS: Final = ("ear.status", "ear_status")
_VECTOR: Final = ("ear.trustworthiness-vector", "ear_trustworthiness_vector")
_POLICY: Final = ("ear.appraisal-policy-id", "ear_appraisal_policy_ids")
_BY_NUMBER: Final = {number: name for name, number in TIERS.items()}


def tier_of(value: int) -> str:
    """
    Return the tier of a claim's value (draft-ietf-rats-ear, 3.1).

    Raises:
        ValueError: Not a signed byte.

    """
    if not -128 <= value <= 127:
        raise ValueError(f"{value} is no value of a trustworthiness claim")
    if -1 <= value <= 1:
        return "none"
    if -32 <= value <= 31:
        return "affirming"
    return "warning" if -96 <= value <= 95 else "contraindicated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """
    One appraisal.

    Attributes:
        status: A name of `TIERS`.
        vector: Category → value.
        policy: Identifiers of the policy that was applied.
    """

    status: str
    vector: Mapping[str, int]
    policy: tuple[str, ...] = ()

    @property
    def worst(self) -> str:
        """The claims that are not affirming, for people."""
        found = ((n, v) for n, v in self.vector.items() if tier_of(v) != "affirming")
        return ", ".join(f"{name} {value}" for name, value in found)


def _either(value: Mapping[str, Any], names: tuple[str, str], what: str) -> Any:
    """Return the member under its old or new name; both at once are refused."""
    if all(name in value for name in names):
        raise EvidenceFormatError(f"{what}: {names[0]} and {names[1]} at once")
    return next((value[name] for name in names if name in value), None)


def _status(value: object, what: str) -> str:
    if isinstance(value, str) and value in TIERS:
        return value
    if type(value) is int and value in _BY_NUMBER:
        return _BY_NUMBER[value]
    raise EvidenceFormatError(f"{what}: status", expected=", ".join(TIERS), found=f"{value!r:.40}")


def _vector(value: object, what: str) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > _MAX_SUBMODS:
        raise EvidenceFormatError(f"{what}: trustworthiness vector", expected="an object")
    found: dict[str, int] = {}
    for name, number in value.items():
        if type(number) is not int or not -128 <= number <= 127:
            raise EvidenceFormatError(
                f"{what}: {name}", expected="-128 to 127", found=f"{number!r:.40}"
            )
        found[name] = number
    return found


def is_ear(claims: Mapping[str, Any]) -> bool:
    """Whether *claims* are those of an EAR, by its profile or its appraisals."""
    return "eat_profile" in claims or "submods" in claims


def appraisals_of(claims: Mapping[str, Any]) -> dict[str, Appraisal]:
    """
    Return the appraisals of an EAR.

    Raises:
        EvidenceFormatError: None or malformed, or a status that is better than its worst claim.

    """
    submods = claims.get("submods")
    if not isinstance(submods, Mapping) or not 1 <= len(submods) <= _MAX_SUBMODS:
        raise EvidenceFormatError("EAR: submods", expected="one appraisal or more")
    profile = claims.get("eat_profile")
    if not isinstance(profile, str) or not profile:
        raise EvidenceFormatError("EAR: eat_profile", expected="the name of a profile")
    if type(claims.get("iat")) is not int:
        raise EvidenceFormatError("EAR: iat", expected="a whole number")
    found: dict[str, Appraisal] = {}
    for name, value in submods.items():
        what = f"EAR: {name:.40}"
        if not isinstance(value, Mapping):
            raise EvidenceFormatError(f"{what}: not an object")
        status = _status(_either(value, _STATUS, what), what)
        vector = _vector(_either(value, _VECTOR, what), what)
        worst = max((TIERS[tier_of(number)] for number in vector.values()), default=0)
        if TIERS[status] < worst and status != "none":
            raise EvidenceFormatError(
                f"{what}: the status is better than its claims",
                expected=_BY_NUMBER[worst],
                found=status,
            )
        policy = _either(value, _POLICY, what)
        found[name] = Appraisal(status=status, vector=vector, policy=_texts(policy, what))
    return found


def _texts(value: object, what: str) -> tuple[str, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in listed):
        raise EvidenceFormatError(f"{what}: appraisal policy", expected="text")
    return tuple(listed)


def plain_submods(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return the appraisals as they stand there, without evidence and extensions."""
    submods = claims.get("submods")
    kept = {*_STATUS, *_VECTOR, *_POLICY}
    if not isinstance(submods, Mapping):
        return {}
    return {
        name: {key: item for key, item in value.items() if key in kept}
        for name, value in submods.items()
        if isinstance(value, Mapping)
    }
