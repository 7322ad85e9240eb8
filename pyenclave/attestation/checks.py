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
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeAlias, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from pyenclave.attestation import memo
from pyenclave.attestation.memo import Block, Remembered
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


class _Watched(dict[str, CheckFunction[Case]]):
    """A table that tells when it is changed; there is no other way than item by item."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__()
        self._tell = changed

    def __setitem__(self, name: str, function: CheckFunction[Case]) -> None:
        super().__setitem__(name, function)
        self._tell()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._tell()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("checks are registered one by one")

    update = pop = popitem = clear = setdefault = __ior__ = _refuse


class _Step(Generic[Case]):
    """A check as it is run, and what it said last if that was a constant."""

    __slots__ = ("function", "last", "name", "part")

    def __init__(self, name: str, part: Part, function: CheckFunction[Case]) -> None:
        self.name = name
        self.part = part
        self.function = function
        self.last: tuple[Verdict, Check] | tuple[None, None] = (None, None)


_Segment: TypeAlias = "tuple[Block[Case] | None, int, list[_Step[Case]]]"


class _Plan(Generic[Case]):
    """The checks in the order in which they run; equal to itself only."""

    __slots__ = ("segments",)

    def __init__(self, segments: tuple[_Segment[Case], ...]) -> None:
        self.segments = segments


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
        self.functions: dict[str, CheckFunction[Case]] = _Watched(self._changed)
        self.parts: dict[str, Part] = {}
        self._blocks: list[Block[Case]] = []
        self._plan: _Plan[Case] | None = None

    def _changed(self) -> None:
        self._plan = None

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
        for block in registry._blocks:
            self.remember(_within(prefix, block, case_of, without))

    def remember(self, block: Block[Case]) -> None:
        """Have the checks of *block* remembered together; they are registered here already."""
        missing = block.names - set(self.functions)
        if missing:
            raise ValueError(f"no check is called {', '.join(sorted(missing))}")
        self._blocks.append(block)
        self._plan = None

    def run(self, case: Case) -> tuple[Check, ...]:
        """Run every check on *case*."""
        found: list[Check] = []
        outcomes: dict[Block[Case], Remembered | None] = {}
        plan = self._plan
        if plan is None:
            plan = self._plan = self._planned()
        for block, index, steps in plan.segments:
            if block is not None:
                if block not in outcomes:
                    outcomes[block] = self._recall(plan, block, case)
                known = outcomes[block]
                if known is not None:
                    found += known.checks[index]
                    continue
            self._judge(steps, case, found)
        return tuple(found)

    def _planned(self) -> _Plan[Case]:
        """Return the checks in their order, those of one block that are neighbours together."""
        owners = {name: block for block in self._blocks for name in block.names}
        segments: list[_Segment[Case]] = []
        counts: dict[Block[Case], int] = {}
        for name, function in self.functions.items():
            block = owners.get(name)
            if not segments or segments[-1][0] is not block:
                index = 0
                if block is not None:
                    index = counts.get(block, 0)
                    counts[block] = index + 1
                segments.append((block, index, []))
            segments[-1][2].append(_Step(name, self.parts[name], function))
        return _Plan(tuple(segments))

    def _recall(self, plan: _Plan[Case], block: Block[Case], case: Case) -> Remembered | None:
        """Return how the checks of *block* come out on *case*; None if they have to be run."""
        try:
            key = block.key(case)
        except (NotReachedError, EnclaveError, _NotHereError, *BREAKS):
            return None
        if key is None:
            return None
        # A check that somebody exchanges makes another plan; of the old one nothing is found.
        whole = (plan, block, key)
        found = memo.find(whole, case.at)
        if found is None:
            moment = memo.Moment.of(case.at)
            reduced = block.reduce(case, moment)
            checks: list[tuple[Check, ...]] = []
            for owner, _, steps in plan.segments:
                if owner is block:
                    judged: list[Check] = []
                    self._judge(steps, reduced, judged)
                    checks.append(tuple(judged))
            parts = {
                name: value
                for name, value in reduced._read.items()  # noqa: SLF001
                if name not in block.given
            }
            found = memo.remembered(checks, moment, parts)
            if found is None:
                return None
            memo.keep(whole, found)
        case._read.update(found.parts)  # noqa: SLF001
        return found

    @staticmethod
    def _judge(steps: list[_Step[Case]], case: Case, found: list[Check]) -> None:
        """Run *steps* on *case*, and put what they say into *found*."""
        append = found.append
        for step in steps:
            try:
                verdict = step.function(case)
            except _NotHereError:
                continue
            except (NotReachedError, EnclaveError, *BREAKS) as error:
                verdict = _verdict_of(error)
            # Most checks give one constant verdict again and again; what it looks like stays.
            last = step.last
            if last[0] is verdict:
                append(last[1])
                continue
            check = Check(
                name=step.name,
                part=step.part,
                outcome=verdict.outcome,
                expected=shown(verdict.expected),
                found=shown(verdict.found),
                advice=verdict.advice,
                asked=verdict.asked,
            )
            if verdict.outcome != "failed" and verdict.found is None:
                step.last = verdict, check
            append(check)


def _within(
    prefix: str, block: Block[Inner], case_of: Callable[[Case], Inner], without: Collection[str]
) -> Block[Case]:
    """Return *block* of an inner registry for the cases around; what is in it stays the same."""
    part = f"inner:{prefix}"

    def reduce(case: Case, at: memo.Moment) -> Case:
        made = case.bare(at)
        made._read[part] = (block.reduce(case_of(case), at),)  # noqa: SLF001
        return made

    return memo.Block(
        names=frozenset(f"{prefix}.{name}" for name in block.names if name not in without),
        key=lambda case: block.key(case_of(case)),
        reduce=reduce,
        given=frozenset((part,)),
    )


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
