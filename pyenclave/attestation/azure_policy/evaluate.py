"""
Evaluating Azure Attestation policies ("Claim and claim rules", Claim Rule).

Where the public description is silent this evaluator takes the reading that refuses: any matching
``deny()`` refuses, whatever permits; an error in evaluation refuses; values of two types are never
equal and never ordered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

from pyenclave.attestation.azure_policy.budget import Budget
from pyenclave.attestation.azure_policy.claims import Claim, Value, type_name
from pyenclave.attestation.azure_policy.functions import FUNCTIONS, Values, key
from pyenclave.attestation.azure_policy.syntax import (
    Action,
    ClaimArguments,
    ClaimReference,
    Comparison,
    Condition,
    Expression,
    Literal_,
    Policy,
    PropertyReference,
    Rule,
)
from pyenclave.errors import AttestationError

__all__ = ["MAX_CLAIMS", "Fired", "Outcome", "evaluate", "types_of"]

MAX_CLAIMS: Final = 4096  # in the incoming set; rules can add claims
_LONG: Final = 256  # characters that are compared as quickly as one
# Properties of the token or of the engine: name to type and range of the value.
_TOKEN_PROPERTIES: Final[dict[str, tuple[type, int, int]]] = {
    "report_validity_in_minutes": (int, 1, 525_600),
    "omit_x5c": (bool, 0, 1),
}
_ENGINE_PROPERTIES: Final[dict[str, tuple[type, int, int]]] = {
    "require_valid_aik_cert": (bool, 0, 1),
    "required_pcr_mask": (int, 0, 0xFFFFFF),
}


@dataclass(frozen=True, slots=True)
class Fired:
    """
    A rule whose conditions held, and so its action was done.

    Attributes:
        section: ``configuration``, ``authorization`` or ``issuance``.
        line: Where the rule begins, from 1.
        column: The same.
        action: What it did: ``permit``, ``deny``, ``add``, ``issue`` or ``issueproperty``.
    """

    section: Literal["configuration", "authorization", "issuance"]
    line: int
    column: int
    action: str

    def __str__(self) -> str:
        return f"{self.section} {self.line}:{self.column} {self.action}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What a policy says.

    Attributes:
        permitted: The evidence is accepted.
        reason: Why, or why not.
        issued: Claims of the token, in the order of their issue.
        properties: Properties of the token (``report_validity_in_minutes``, ``omit_x5c``).
        configuration: Properties of the engine, from ``configurationrules``.
        incoming: The incoming claims after all rules.
        trace: The rules that fired, in order; also of a refusal.
        decided: The rule that permitted or denied; None if none did.
    """

    permitted: bool
    reason: str
    issued: tuple[Claim, ...] = ()
    properties: Mapping[str, Value] = field(default_factory=dict)
    configuration: Mapping[str, Value] = field(default_factory=dict)
    incoming: tuple[Claim, ...] = ()
    trace: tuple[Fired, ...] = ()
    decided: Fired | None = None


def evaluate(policy: Policy, claims: Iterable[Claim]) -> Outcome:
    """
    Evaluate *policy* over the incoming *claims*.

    Args:
        policy: A policy that was read.
        claims: What the service found in verified evidence (issuer ``AttestationService``) and
            what the attester said itself (``CustomClaim``).

    Returns:
        The outcome. An error in evaluation is a refusal whose reason names rule and error.

    Raises:
        ValueError: An incoming claim says that the policy issued it.

    """
    incoming = list(claims)
    for claim in incoming:
        if claim.issuer == "AttestationPolicy":
            raise ValueError("claims: only the policy itself issues claims as AttestationPolicy")
    return _Evaluation(incoming).run(policy)


def types_of(policy: Policy) -> frozenset[str] | None:
    """
    Return the types of claims that *policy* can look at; None if it may look at any.

    Every condition that names its type finds claims of that type only, so whoever has many claims
    need not make the others.
    """
    found: set[str] = set()
    for rule in (*policy.configuration, *policy.authorization, *policy.issuance):
        for condition in rule.conditions:
            if condition.only is None:
                return None
            found.add(condition.only)
    return frozenset(found)


def _deduplicated(claims: list[Claim]) -> list[Claim]:
    seen = set()
    kept = []
    for claim in claims:
        mark = (claim.type, key(claim.value), claim.issuer)
        if mark not in seen:
            seen.add(mark)
            kept.append(claim)
    return kept


class _Evaluation:
    """One evaluation: the sets of claims and the bindings of the rule at hand."""

    def __init__(self, incoming: list[Claim]) -> None:
        self._incoming = incoming
        self._issued: list[Claim] = []
        self._properties: dict[str, Value] = {}
        self._configuration: dict[str, Value] = {}
        self._bound: dict[str, tuple[Claim, ...]] = {}
        self._budget = Budget()
        self._trace: list[Fired] = []
        self._by_type: dict[str, list[Claim]] = {}
        self._indexed = 0

    def run(self, policy: Policy) -> Outcome:
        """Evaluate all sections."""
        rule: Rule | None = None
        permitted: Fired | None = None
        denied: Fired | None = None
        try:
            self._limit()
            for rule in policy.configuration:
                if self._fires("configuration", rule):
                    self._property(rule.action, self._configuration, _ENGINE_PROPERTIES)
            for rule in policy.authorization:
                fired = self._fires("authorization", rule)
                if fired is None:
                    continue
                if rule.action.verb == "permit":
                    permitted = permitted or fired
                elif rule.action.verb == "deny":
                    denied = denied or fired
                else:
                    self._add(rule.action)
            if denied is not None or permitted is None:
                where = f"denied by the rule on line {denied.line}" if denied else "no rule permits"
                return Outcome(
                    permitted=False, reason=where, trace=tuple(self._trace), decided=denied
                )
            for rule in policy.issuance:
                if self._fires("issuance", rule) is None:
                    continue
                if rule.action.verb == "issueproperty":
                    self._property(rule.action, self._properties, _TOKEN_PROPERTIES)
                else:
                    self._add(rule.action)
        except AttestationError as error:
            where = f"the rule on line {rule.line}" if rule is not None else "evaluation"
            return Outcome(
                permitted=False, reason=f"{where} failed: {error}", trace=tuple(self._trace)
            )
        return Outcome(
            permitted=True,
            reason=f"permitted by the rule on line {permitted.line}",
            issued=tuple(_deduplicated(self._issued)),
            properties=self._properties,
            configuration=self._configuration,
            incoming=tuple(self._incoming),
            trace=tuple(self._trace),
            decided=permitted,
        )

    def _fires(
        self, section: Literal["configuration", "authorization", "issuance"], rule: Rule
    ) -> Fired | None:
        if not self._matches(rule):
            return None
        fired = Fired(section, rule.line, rule.column, rule.action.verb)
        self._trace.append(fired)
        return fired

    def _limit(self) -> None:
        if len(self._incoming) > MAX_CLAIMS:
            raise AttestationError("too many claims", expected=f"at most {MAX_CLAIMS}")

    # ---- conditions --------------------------------------------------------------------------

    def _matches(self, rule: Rule) -> bool:
        self._bound = {}
        for condition in rule.conditions:  # noqa: SIM110 - each costs a frame less
            if not self._condition(condition):
                return False
        return True

    def _condition(self, condition: Condition) -> bool:
        # Nearly every condition names one type: only claims of it are looked at.
        only = condition.only
        among = self._incoming if only is None else self._of_type(only)
        wanted = []
        cost = 0
        for item in condition.others:
            expression = item.expression
            values = (
                (expression.value,)
                if isinstance(expression, Literal_)
                else self._values(expression).values
            )
            wanted.append((item.property, item.comparison, values))
            cost += 1 + _cost(values)
        self._budget.compare(1 + len(among) * cost)
        found = []
        for claim in among:
            for name, comparison, values in wanted:
                if not _compare(_property_of(claim, name), comparison, values):
                    break
            else:
                found.append(claim)
        if condition.negated:
            return not found
        if condition.identifier is not None:
            self._bound[condition.identifier] = tuple(found)
        return bool(found)

    def _of_type(self, name: str) -> list[Claim]:
        """Return the incoming claims of one type, in order; the sets only ever grow."""
        if self._indexed != len(self._incoming):
            for claim in islice(self._incoming, self._indexed, None):
                self._by_type.setdefault(claim.type, []).append(claim)
            self._indexed = len(self._incoming)
        return self._by_type.get(name, [])

    def _values(self, expression: Expression) -> Values:
        if isinstance(expression, Literal_):
            return Values((expression.value,))
        if isinstance(expression, PropertyReference):
            claims = self._bound[expression.identifier]
            self._budget.compare(len(claims))
            return Values(
                tuple(_property_of(claim, expression.property) for claim in claims),
                expression.property == "value" and any(claim.read_only for claim in claims),
            )
        arguments = [self._values(item) for item in expression.arguments]
        return FUNCTIONS[expression.function](self._budget, *arguments)

    # ---- actions -----------------------------------------------------------------------------

    def _new_claims(self, action: Action) -> list[Claim]:
        argument = action.argument
        if isinstance(argument, ClaimReference):
            return list(self._bound[argument.identifier])
        if not isinstance(argument, ClaimArguments):
            raise AttestationError(f"{action.verb} has no claim")
        names = self._values(argument.type).values
        name = names[0] if len({key(item) for item in names}) == 1 else None
        if not isinstance(name, str) or not name:
            raise AttestationError("type: one string is needed", found=f"{len(names)} values")
        values = self._values(argument.value)
        self._budget.compare(len(names) + len(values.values))
        if argument.value_type is not None:
            types = set(self._values(argument.value_type).values)
            if any({type_name(value)} != types for value in values.values):
                raise AttestationError(
                    "valueType is not the type of the value", expected=", ".join(map(str, types))
                )
        return [
            Claim(name, value, "AttestationPolicy", values.read_only) for value in values.values
        ]

    def _add(self, action: Action) -> None:
        claims = self._new_claims(action)
        # One value in a thousand claims is one string here and a thousand in the token.
        self._budget.make(sum(len(c.type) + len(str(c.value)) for c in claims))
        if action.verb == "issue":
            for claim in claims:
                if claim.read_only:
                    raise AttestationError(f"issue: claim {claim.type} is read-only")
            self._issued.extend(claims)
        # A claim that is there already stays one claim; ``issue(claim=c)`` names such.
        if isinstance(action.argument, ClaimReference):
            self._budget.compare(len(self._incoming) + len(claims))
            there = {(c.type, key(c.value), c.issuer) for c in self._incoming}
            claims = [c for c in claims if (c.type, key(c.value), c.issuer) not in there]
        self._incoming.extend(claims)
        self._limit()

    def _property(
        self,
        action: Action,
        properties: dict[str, Value],
        known: Mapping[str, tuple[type, int, int]],
    ) -> None:
        for claim in self._new_claims(action):
            if claim.type not in known:
                raise AttestationError(
                    "issueproperty: no such property",
                    expected=", ".join(known),
                    found=claim.type[:80],
                )
            kind, low, high = known[claim.type]
            if type(claim.value) is not kind or not low <= int(claim.value) <= high:
                raise AttestationError(
                    f"issueproperty: {claim.type} has a wrong value",
                    expected="true or false" if kind is bool else f"{low} to {high}",
                    found=str(claim.value)[:80],
                )
            properties[claim.type] = claim.value
            if action.verb == "issueproperty" and known is _TOKEN_PROPERTIES:
                self._incoming.append(claim)
                self._limit()


def _cost(values: tuple[Value, ...]) -> int:
    """Return what comparing with each of *values* costs."""
    cost = len(values)
    for value in values:
        if isinstance(value, str):
            cost += len(value) // _LONG
    return cost


def _property_of(claim: Claim, name: str) -> Value:
    if name == "type":
        return claim.type
    if name == "value":
        return claim.value
    return claim.issuer if name == "issuer" else claim.value_type


def _compare(mine: Value, comparison: Comparison, values: tuple[Value, ...]) -> bool:
    """Compare with a set: equal to one of it, different from all of it, ordered against all."""
    if comparison in ("==", "!="):
        for value in values:
            if type(value) is type(mine) and value == mine:
                return comparison == "=="
        return comparison == "!="
    if type(mine) is not int or not values:
        return False
    for value in values:
        if type(value) is not int:
            return False
        holds = {
            "<": mine < value,
            "<=": mine <= value,
            ">": mine > value,
            ">=": mine >= value,
        }[comparison]
        if not holds:
            return False
    return True
