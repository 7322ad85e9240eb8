"""
Evaluating Azure Attestation policies ("Claim and claim rules", Claim Rule).

Where the public description is silent this evaluator takes the reading that refuses: any matching
``deny()`` refuses, whatever permits; an error in evaluation refuses; values of two types are never
equal and never ordered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pyenclave.attestation.azure_policy.claims import Claim, Value, type_name
from pyenclave.attestation.azure_policy.functions import FUNCTIONS, Values, key
from pyenclave.attestation.azure_policy.syntax import (
    Action,
    ClaimArguments,
    ClaimReference,
    Condition,
    Expression,
    Literal_,
    Policy,
    PropertyCondition,
    PropertyReference,
    Rule,
)
from pyenclave.errors import AttestationError

__all__ = ["MAX_CLAIMS", "Outcome", "evaluate"]

MAX_CLAIMS: Final = 4096  # in the incoming set; rules can add claims
_MAX_STEPS: Final = 1 << 20  # comparisons of claims in one evaluation
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
    """

    permitted: bool
    reason: str
    issued: tuple[Claim, ...] = ()
    properties: Mapping[str, Value] = field(default_factory=dict)
    configuration: Mapping[str, Value] = field(default_factory=dict)
    incoming: tuple[Claim, ...] = ()


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
    if any(claim.issuer == "AttestationPolicy" for claim in incoming):
        raise ValueError("claims: only the policy itself issues claims as AttestationPolicy")
    return _Evaluation(incoming).run(policy)


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
        self._steps = 0

    def run(self, policy: Policy) -> Outcome:
        """Evaluate all sections."""
        line = 0
        permitted = denied = 0
        try:
            self._limit()
            for rule in policy.configuration:
                line = rule.line
                if self._matches(rule):
                    self._property(rule.action, self._configuration, _ENGINE_PROPERTIES)
            for rule in policy.authorization:
                line = rule.line
                if not self._matches(rule):
                    continue
                if rule.action.verb == "permit":
                    permitted = permitted or line
                elif rule.action.verb == "deny":
                    denied = denied or line
                else:
                    self._add(rule.action)
            if denied or not permitted:
                why = f"denied by the rule on line {denied}" if denied else "no rule permits"
                return Outcome(permitted=False, reason=why)
            for rule in policy.issuance:
                line = rule.line
                if not self._matches(rule):
                    continue
                if rule.action.verb == "issueproperty":
                    self._property(rule.action, self._properties, _TOKEN_PROPERTIES)
                else:
                    self._add(rule.action)
        except AttestationError as error:
            return Outcome(permitted=False, reason=f"the rule on line {line} failed: {error}")
        return Outcome(
            permitted=True,
            reason=f"permitted by the rule on line {permitted}",
            issued=tuple(_deduplicated(self._issued)),
            properties=self._properties,
            configuration=self._configuration,
            incoming=tuple(self._incoming),
        )

    def _limit(self) -> None:
        if len(self._incoming) > MAX_CLAIMS:
            raise AttestationError("too many claims", expected=f"at most {MAX_CLAIMS}")

    # ---- conditions --------------------------------------------------------------------------

    def _matches(self, rule: Rule) -> bool:
        self._bound = {}
        return all(self._condition(condition) for condition in rule.conditions)

    def _condition(self, condition: Condition) -> bool:
        wanted = [(item, self._values(item.expression)) for item in condition.properties]
        self._steps += len(self._incoming) * sum(1 + len(v.values) for _, v in wanted)
        if self._steps > _MAX_STEPS * 16:
            raise AttestationError("the policy compares too much")
        found = tuple(
            claim
            for claim in self._incoming
            if all(_compare(claim, item, values) for item, values in wanted)
        )
        if condition.negated:
            return not found
        if condition.identifier is not None:
            self._bound[condition.identifier] = found
        return bool(found)

    def _values(self, expression: Expression) -> Values:
        if isinstance(expression, Literal_):
            return Values((expression.value,))
        if isinstance(expression, PropertyReference):
            claims = self._bound[expression.identifier]
            return Values(
                tuple(_property_of(claim, expression.property) for claim in claims),
                expression.property == "value" and any(claim.read_only for claim in claims),
            )
        arguments = [self._values(item) for item in expression.arguments]
        return FUNCTIONS[expression.function](*arguments)

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
        if action.verb == "issue":
            for claim in claims:
                if claim.read_only:
                    raise AttestationError(f"issue: claim {claim.type} is read-only")
            self._issued.extend(claims)
        # A claim that is there already stays one claim; ``issue(claim=c)`` names such.
        there = {(c.type, key(c.value), c.issuer) for c in self._incoming}
        if isinstance(action.argument, ClaimReference):
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


def _property_of(claim: Claim, name: str) -> Value:
    if name == "type":
        return claim.type
    if name == "value":
        return claim.value
    return claim.issuer if name == "issuer" else claim.value_type


def _compare(claim: Claim, condition: PropertyCondition, values: Values) -> bool:
    """Compare with a set: equal to one of it, different from all of it, ordered against all."""
    mine = _property_of(claim, condition.property)
    if condition.comparison == "==":
        return any(key(mine) == key(value) for value in values.values)
    if condition.comparison == "!=":
        return all(key(mine) != key(value) for value in values.values)
    if type(mine) is not int or not values.values:
        return False
    for value in values.values:
        if type(value) is not int:
            return False
        holds = {
            "<": mine < value,
            "<=": mine <= value,
            ">": mine > value,
            ">=": mine >= value,
        }[condition.comparison]
        if not holds:
            return False
    return True
