"""What every kind's case has in common: evidence, what it is judged by, and parts read once."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pyenclave.attestation.checks import BREAKS, PASSED, NotReachedError, Verdict, failed, not_asked
from pyenclave.attestation.endorsements import EMPTY, Endorsements
from pyenclave.errors import EnclaveError, EvidenceFormatError

if TYPE_CHECKING:
    from pyenclave.attestation.policy import AppraisalPolicy
    from pyenclave.formats.x509 import Certificate

__all__ = [
    "CaseBase",
    "gathered",
    "judge_nonce",
    "judge_reference",
    "judge_registers",
    "judge_report_data",
    "judged_at",
]

T = TypeVar("T")
C = TypeVar("C", bound="CaseBase")


@dataclass(slots=True, kw_only=True)
class CaseBase:
    """
    Evidence, and what it is judged by. Its parts are read once, when they are first needed.

    Attributes:
        data: The evidence.
        policy: What the relying party wants.
        at: When validity is judged.
        kind: The kind of the evidence, for modules that verify several.
        endorsements: Files beside the evidence.
        nonce: The challenge that was sent, if there was one.
        user_data: What measured code must have said; our own kind only.
        report_data: The 64 bytes of report data that are expected.
        roots: The caller's pinned roots, DER; see `anchors`.
    """

    data: bytes
    policy: AppraisalPolicy
    at: datetime
    kind: str = ""
    endorsements: Endorsements = EMPTY
    nonce: bytes | None = None
    user_data: bytes | None = None
    report_data: bytes | None = None
    roots: tuple[bytes, ...] = ()
    _read: dict[str, object] = field(default_factory=dict)

    def _part(self, name: str, read: Callable[[], T]) -> T:
        """Return what *read* gives; it runs once, and its error is raised each time."""
        if name not in self._read:
            try:
                self._read[name] = read()
            except EnclaveError as error:
                self._read[name] = error
            except BREAKS as error:
                self._read[name] = EvidenceFormatError(
                    f"{name} is malformed: {type(error).__name__}: {error}"
                )
        value = self._read[name]
        if isinstance(value, EnclaveError):
            raise value
        return value  # type: ignore[return-value]

    def need(self, name: str, part: Callable[[], T]) -> T:
        """Return a part; if it cannot be read, check *name* has said so and others stop here."""
        try:
            return part()
        except EnclaveError:
            raise NotReachedError(name) from None

    def derive(self, cls: type[C], data: bytes, **changes: Any) -> C:
        """Return a case of another kind for *data* inside this evidence, judged by the same."""
        values: dict[str, Any] = {
            "data": data,
            "policy": self.policy,
            "at": self.at,
            "endorsements": self.endorsements,
            "nonce": self.nonce,
            "user_data": self.user_data,
            "report_data": self.report_data,
            "roots": self.roots,
        }
        return cls(**(values | changes))

    def bare(self, at: datetime, endorsements: Endorsements = EMPTY, **parts: object) -> Self:
        """
        Return a case with the roots of this one and nothing else: what is asked for beyond fails.

        Args:
            at: When validity is judged.
            endorsements: Files that it has.
            parts: Parts that count as read.
        """
        nobody: Any = None
        made = type(self)(
            data=b"", policy=nobody, at=at, endorsements=endorsements, roots=self.roots
        )
        made._read |= parts  # noqa: SLF001
        return made

    def anchors(self, *vendors: str) -> tuple[Certificate, ...]:
        """Return the pinned roots of *vendors* (names of `roots.VENDORS`) and the caller's own."""
        from pyenclave.attestation import roots

        pinned = tuple(root for vendor in vendors for root in roots.for_kind(vendor))
        return pinned + tuple(roots.certificate(der) for der in self.roots)


def judge_report_data(case: CaseBase, found: bytes) -> Verdict:
    """Compare the report data that the caller expects with *found*: check ``report_data``."""
    if case.report_data is None:
        return not_asked("give the expected report data to have it compared", found=found)
    if hmac.compare_digest(case.report_data, found):
        return PASSED
    return failed(expected=case.report_data, found=found, advice="It speaks of something else.")


def judge_nonce(case: CaseBase, found: bytes) -> Verdict:
    """
    Judge freshness of hardware evidence by its report data *found*: check ``nonce``.

    The nonce itself, padded with zeros, is the report data; or the caller says by ``report_data``
    what it becomes (a hash over nonce and more), and that is what counts.
    """
    if case.nonce is None:
        return not_asked("give the nonce that was sent, or the evidence may be an old one")
    if not any(case.nonce if case.report_data is None else case.report_data):
        # What nobody set is all zeros, and would be fresh for ever.
        return failed(
            expected="a random nonce",
            found="zeros",
            advice="Report data that nobody set is all zeros: make the nonce with secrets.",
        )
    if case.report_data is not None:
        if hmac.compare_digest(case.report_data, found):
            return PASSED
        return failed(expected=case.report_data, found=found, advice="Replayed, or another's.")
    if len(case.nonce) <= len(found) and hmac.compare_digest(
        case.nonce.ljust(len(found), b"\0"), found
    ):
        return PASSED
    return failed(
        expected=case.nonce,
        found=found,
        advice="Replayed, or the nonce is hashed into the report data: then give report_data too.",
    )


def judge_reference(
    case: CaseBase,
    name: str,
    found: bytes,
    *,
    advice: str | None = None,
    unnamed: str | None = None,
) -> Verdict:
    """
    Compare *found* with the reference values of the policy's field *name*.

    Args:
        case: The case; its time decides which values hold.
        name: Field of the policy, such as ``mrtd``.
        found: What the evidence has.
        advice: What to do if it is another value.
        unnamed: What to say if the policy does not name the field.

    """
    wanted = case.policy.reference(name)
    if not wanted:
        return not_asked(unnamed or f"name {name} in the policy to have it compared", found=found)
    same = [item for item in wanted if hmac.compare_digest(item.value, found)]
    if any(item.holds_at(case.at) for item in same):
        return PASSED
    if same:
        return failed(
            expected=wanted,
            found=f"{found.hex()} at {case.at.isoformat()}",
            advice="The policy accepts this value at another time.",
        )
    return failed(expected=wanted, found=found, advice=advice)


def judge_registers(
    case: CaseBase,
    name: str,
    found: Mapping[int, bytes],
    *,
    advice: str = "pyenclave measure eventlog explains what was measured.",
    unnamed: str | None = None,
) -> Verdict:
    """
    Compare registers *found* with the policy's table *name*; all that it names must match.

    The arguments are those of `judge_reference`.

    """
    wanted = case.policy.registers(name)
    if not wanted:
        advice = unnamed or f"name {name} in the policy to have registers compared"
        return not_asked(advice, found=found.get(0))
    wrong = []
    for index, values in wanted.items():
        value = found.get(index)
        if value is None or not any(
            hmac.compare_digest(item.value, value) and item.holds_at(case.at) for item in values
        ):
            wrong.append(index)
    if not wrong:
        return PASSED
    first = wrong[0]
    value = found.get(first)
    return failed(
        expected=f"{first}: {', '.join(str(item) for item in wanted[first])}",
        found=f"{first}: {'absent' if value is None else value.hex()}",
        advice=f"Registers that differ: {', '.join(str(index) for index in wrong)}. {advice}",
    )


def gathered(case: Any, *parts: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the claims that *parts* give; one that cannot be read gives none: checks say why."""
    found: dict[str, Any] = {}
    for part in parts:
        try:
            found |= part(case)
        except (EnclaveError, NotReachedError, *BREAKS):
            continue
    return found


def judged_at(case: CaseBase) -> dict[str, Any]:
    """Return the time of judging as a claim, for `gathered`."""
    return {"verify_at": case.at.isoformat()}
