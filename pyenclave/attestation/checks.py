"""
The machinery of checks: registered by name, run in order, deny by default.

A check is a function of a *case* (evidence and what it is judged by) that returns a `Verdict`. What
hostile bytes make a check raise is a failure of that check. A check whose input could not be read
is not reached, and what is not reached refuses.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from pyenclave.attestation.result import Check, Outcome, Part
from pyenclave.errors import EnclaveError

if TYPE_CHECKING:
    from pyenclave.attestation.case import CaseBase

__all__ = [
    "BREAKS",
    "PASSED",
    "NotReachedError",
    "Registry",
    "Verdict",
    "absent",
    "failed",
    "not_asked",
    "shown",
]

_MAX_TEXT: Final = 300

# What hostile bytes make Python's own functions and the cryptography package raise. It becomes a
# failed check. Everything else (MemoryError, RecursionError, a slip of our own) leaves `appraise`
# as it is: no result, so nothing is accepted.
BREAKS: Final = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    InvalidSignature,
    UnsupportedAlgorithm,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How one check came out."""

    outcome: Outcome
    expected: object = None
    found: object = None
    advice: str | None = None
    asked: bool = True


PASSED = Verdict(outcome="passed")


def failed(*, expected: object, found: object, advice: str | None = None) -> Verdict:
    """Return a failure."""
    return Verdict(outcome="failed", expected=expected, found=found, advice=advice)


def not_asked(advice: str, *, found: object = None) -> Verdict:
    """Return the verdict of a check that nobody asked for; it does not refuse."""
    return Verdict(outcome="skipped", found=found, advice=advice, asked=False)


def absent(what: str, *, advice: str) -> Verdict:
    """Return the failure of a check whose endorsement was not given."""
    return Verdict(outcome="failed", expected=what, found="absent", advice=advice)


class NotReachedError(Exception):
    """The input of a check is not there, because check *name* failed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def shown(value: object) -> str | None:
    """Return *value* as a short text; bytes as hex."""
    if value is None:
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        text = bytes(value).hex()
    elif isinstance(value, tuple | list | frozenset | set):
        text = ", ".join(str(shown(item)) for item in value)
    else:
        text = str(value)
    if not text:
        return "nothing"
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"


class _NotHereError(Exception):
    """The evidence has no such optional inner part; its checks do not occur in the result."""


Case = TypeVar("Case", bound="CaseBase")
Inner = TypeVar("Inner", bound="CaseBase")
CheckFunction = Callable[[Case], Verdict]


class Registry(Generic[Case]):
    """
    Checks by name, in the order in which they run.

    Attributes:
        functions: Name → the check.
        parts: Name → whether it decides `genuine` or `accepted`.
        included: Name → the prefix under which it was taken from another registry.
    """

    def __init__(self) -> None:
        self.included: dict[str, str] = {}
        self.functions: dict[str, CheckFunction[Case]] = {}
        self.parts: dict[str, Part] = {}
        self._last: dict[str, tuple[Verdict, Check]] = {}

    def evidence(self, name: str) -> Callable[[CheckFunction[Case]], CheckFunction[Case]]:
        """Register the decorated function as check *name*: is the evidence genuine?"""
        return self._register(name, "evidence")

    def policy(self, name: str) -> Callable[[CheckFunction[Case]], CheckFunction[Case]]:
        """Register the decorated function as check *name*: is it what the policy wants?"""
        return self._register(name, "policy")

    def _register(
        self, name: str, part: Part
    ) -> Callable[[CheckFunction[Case]], CheckFunction[Case]]:
        def register(function: CheckFunction[Case]) -> CheckFunction[Case]:
            if name in self.functions:
                raise ValueError(f"check {name} is registered twice")
            self.functions[name] = function
            self.parts[name] = part
            return function

        return register

    def include(
        self,
        prefix: str,
        registry: Registry[Inner],
        inner: Callable[[Case], Inner | None],
        *,
        without: Collection[str] = ("nonce", "report_data", "user_data"),
        optional: bool = False,
    ) -> None:
        """
        Register the checks of *registry* as ``prefix.name``: evidence inside evidence.

        Checks of policy come along, because what the hardware says of debug or code counts
        wherever it stands.

        Args:
            prefix: Dotted name in front of the inner names.
            registry: The inner kind's checks.
            inner: Makes the inner case; called once a case. If it raises an EnclaveError or
                NotReachedError, the inner checks are not reached and refuse.
            without: Inner checks that are left out: freshness is judged by the outer kind.
            optional: *inner* may return None: not that kind inside. The inner checks are then
                absent from the result, so another check must demand that something is there.

        """

        def case_of(case: Case) -> Inner:
            try:
                found = case._part(f"inner:{prefix}", lambda: (inner(case),))[0]  # noqa: SLF001
            except EnclaveError:
                raise NotReachedError(prefix) from None
            if found is not None:
                return found
            if optional:
                raise _NotHereError
            raise NotReachedError(prefix)

        def included(function: CheckFunction[Inner]) -> CheckFunction[Case]:
            return lambda case: function(case_of(case))

        unknown = set(without) - set(registry.functions) - {"nonce", "report_data", "user_data"}
        if unknown:
            raise ValueError(f"{prefix}: no inner check is called {', '.join(sorted(unknown))}")
        for name, function in registry.functions.items():
            if name not in without:
                self._register(f"{prefix}.{name}", registry.parts[name])(included(function))
                self.included[f"{prefix}.{name}"] = prefix

    def run(self, case: Case) -> tuple[Check, ...]:
        """Run every check on *case*."""
        done: list[Check] = []
        last = self._last
        for name, function in self.functions.items():
            try:
                verdict = function(case)
            except _NotHereError:
                continue
            except (NotReachedError, EnclaveError, *BREAKS) as error:
                verdict = _verdict_of(error)
            # Most checks give one constant verdict again and again; what it looks like stays.
            known = last.get(name)
            if known is not None and known[0] is verdict:
                done.append(known[1])
                continue
            check = Check(
                name=name,
                part=self.parts[name],
                outcome=verdict.outcome,
                expected=shown(verdict.expected),
                found=shown(verdict.found),
                advice=verdict.advice,
                asked=verdict.asked,
            )
            if verdict.outcome != "failed" and verdict.found is None:
                last[name] = (verdict, check)
            done.append(check)
        return tuple(done)


def _verdict_of(error: Exception) -> Verdict:
    """Return what an error says that a check raised; whatever it is, it refuses."""
    if isinstance(error, NotReachedError):
        return Verdict(outcome="skipped", advice=f"not reached: {error.name} failed")
    if isinstance(error, EnclaveError):
        return Verdict(
            outcome="failed",
            expected=error.expected,
            found=error.message if error.found is None else f"{error.message}: {error.found}",
            advice=error.advice,
        )
    return failed(
        expected="a check that can be completed",
        found=f"{type(error).__name__}: {error}",
    )
