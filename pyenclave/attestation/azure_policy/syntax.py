"""What a policy of Azure Attestation consists of, after it was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from pyenclave.attestation.azure_policy.claims import Value

__all__ = [
    "FUNCTIONS",
    "PROPERTIES",
    "Action",
    "Call",
    "ClaimArguments",
    "ClaimReference",
    "Condition",
    "Expression",
    "Literal_",
    "Policy",
    "PropertyCondition",
    "PropertyReference",
    "Rule",
]

Property = Literal["type", "value", "valueType", "issuer"]
PROPERTIES: Final = ("type", "value", "valueType", "issuer")
Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
Verb = Literal["permit", "deny", "add", "issue", "issueproperty"]
# Name and number of arguments of each function (policy version 1.2).
FUNCTIONS: Final = {
    "JmesPath": 2,
    "JsonToClaimValue": 1,
    "IsSubsetOf": 2,
    "AppendString": 2,
    "NegateBool": 1,
    "ContainsOnlyValue": 2,
}


@dataclass(frozen=True, slots=True)
class Literal_:  # noqa: N801 - typing has the other
    """A string, an integer, true or false."""

    value: Value


@dataclass(frozen=True, slots=True)
class PropertyReference:
    """A property of the claims that an earlier condition of the rule found: ``c.value``."""

    identifier: str
    property: Property


@dataclass(frozen=True, slots=True)
class Call:
    """A function and its arguments."""

    function: str
    arguments: tuple[Expression, ...]


Expression = Literal_ | PropertyReference | Call


@dataclass(frozen=True, slots=True)
class PropertyCondition:
    """One property of a claim compared with an expression."""

    property: Property
    comparison: Comparison
    expression: Expression


@dataclass(frozen=True, slots=True)
class Condition:
    """
    A claim is there (or, negated, is not) whose properties satisfy every comparison.

    Attributes:
        properties: The comparisons.
        identifier: What later parts of the rule call the claims that were found.
        negated: No such claim may be there.
        only: The one type of claims that it can find, if a comparison names it; else None.
        others: The comparisons besides that one.
    """

    properties: tuple[PropertyCondition, ...]
    identifier: str | None = None
    negated: bool = False
    only: str | None = field(init=False, repr=False, compare=False)
    others: tuple[PropertyCondition, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        only, others = None, self.properties
        for place, item in enumerate(self.properties):
            expression = item.expression
            if (
                item.property == "type"
                and item.comparison == "=="
                and isinstance(expression, Literal_)
                and isinstance(expression.value, str)
            ):
                only = expression.value
                others = self.properties[:place] + self.properties[place + 1 :]
                break
        object.__setattr__(self, "only", only)
        object.__setattr__(self, "others", others)


@dataclass(frozen=True, slots=True)
class ClaimReference:
    """``claim=c``: the claims that condition *identifier* found."""

    identifier: str


@dataclass(frozen=True, slots=True)
class ClaimArguments:
    """``type=…, value=…``: a new claim."""

    type: Expression
    value: Expression
    value_type: Expression | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """What a rule does when its conditions hold."""

    verb: Verb
    argument: ClaimReference | ClaimArguments | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Conditions and an action; it begins at *line* and *column*, from 1."""

    conditions: tuple[Condition, ...]
    action: Action
    line: int
    column: int = 1


@dataclass(frozen=True, slots=True)
class Policy:
    """
    A policy.

    Attributes:
        version: Major and minor: (1, 0), (1, 1) or (1, 2).
        configuration: Rules of ``configurationrules`` (from 1.1).
        authorization: Rules that decide.
        issuance: Rules that say what the token has.
        text: The policy as it was written; its hash is in the token.
    """

    version: tuple[int, int]
    configuration: tuple[Rule, ...]
    authorization: tuple[Rule, ...]
    issuance: tuple[Rule, ...]
    text: str
