"""
The machinery of checks: registered by name, run in order, deny by default.

A check is a function of a *case* (evidence and what it is judged by) that returns a `Verdict`. An
exception inside a check is a failure of that check. A check whose input could not be read is not
reached, and what is not reached refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pyenclave.attestation.result import Check, Outcome, Part
from pyenclave.errors import EnclaveError

__all__ = ["PASSED", "NotReachedError", "Registry", "Verdict", "failed", "not_asked", "shown"]

_MAX_TEXT = 300


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


Case = TypeVar("Case")
CheckFunction = Callable[[Case], Verdict]


class Registry(Generic[Case]):
    """Checks by name, in the order in which they run."""

    def __init__(self) -> None:
        self.functions: dict[str, CheckFunction[Case]] = {}
        self.parts: dict[str, Part] = {}

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

    def run(self, case: Case) -> tuple[Check, ...]:
        """Run every check on *case*."""
        return tuple(self._run(case))

    def _run(self, case: Case) -> Iterable[Check]:
        for name, function in self.functions.items():
            verdict = self._judge(function, case)
            yield Check(
                name=name,
                part=self.parts[name],
                outcome=verdict.outcome,
                expected=shown(verdict.expected),
                found=shown(verdict.found),
                advice=verdict.advice,
                asked=verdict.asked,
            )

    @staticmethod
    def _judge(function: CheckFunction[Case], case: Case) -> Verdict:
        try:
            return function(case)
        except NotReachedError as error:
            return Verdict(outcome="skipped", advice=f"not reached: {error.name} failed")
        except EnclaveError as error:
            return Verdict(
                outcome="failed",
                expected=error.expected,
                found=error.message if error.found is None else f"{error.message}: {error.found}",
                advice=error.advice,
            )
        except Exception as error:  # noqa: BLE001,RUF100 - whatever breaks a check refuses
            return failed(
                expected="a check that can be completed",
                found=f"{type(error).__name__}: {error}",
            )
