"""
The functions of policy version 1.2 ("Claim rule functions").

An expression is a set of values that remembers whether it came from a read-only claim; a literal is
a set of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation.azure_policy.budget import Budget
from pyenclave.attestation.azure_policy.claims import MAX_STRING, Value
from pyenclave.attestation.azure_policy.query import MAX_QUERY, search
from pyenclave.errors import AttestationError
from pyenclave.formats import jsonstrict

__all__ = ["FUNCTIONS", "Values", "key"]

_MAX_JSON_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class Values:
    """
    What an expression evaluates to.

    Attributes:
        values: The values, in order, doubles included.
        read_only: Some of it comes from a read-only claim.
    """

    values: tuple[Value, ...]
    read_only: bool = False


def key(value: Value) -> tuple[str, Value]:
    """Return what tells values apart: 1 and true are two values."""
    return type(value).__name__, value


def _single(values: Values, function: str, kind: type, what: str) -> Any:
    if len(values.values) != 1:
        raise AttestationError(
            f"{function}: one {what} is needed", found=f"{len(values.values)} values"
        )
    (value,) = values.values
    if type(value) is not kind:
        raise AttestationError(f"{function}: {what} is needed", found=type(value).__name__)
    return value


def _load(budget: Budget, text: str, function: str) -> object:
    budget.work(4 * len(text))
    return jsonstrict.loads(
        text, function, error=AttestationError, max_size=4 * MAX_STRING, max_depth=_MAX_JSON_DEPTH
    )


def _jmespath(budget: Budget, document: Values, query: Values) -> Values:
    text = _single(document, "JmesPath", str, "JSON text")
    path = _single(query, "JmesPath", str, "query text")
    if not text or not path:
        raise AttestationError("JmesPath: text and query must not be empty")
    if len(path) > MAX_QUERY:
        raise AttestationError("JmesPath: the query is too long", expected=MAX_QUERY)
    result = search(path, _load(budget, text, "JmesPath"), budget)
    budget.make(len(result))
    return Values((result,), document.read_only or query.read_only)


def _json_to_claim_value(budget: Budget, argument: Values) -> Values:
    text = _single(argument, "JsonToClaimValue", str, "JSON text")
    found = _load(budget, text, "JsonToClaimValue")
    budget.make(len(text))
    items = found if isinstance(found, list) else [found]
    values: list[Value] = []
    for item in items:
        if item is None:
            continue
        if not isinstance(item, str | int):
            raise AttestationError(
                "JsonToClaimValue: only strings, integers, booleans, null and arrays of them",
                found=type(item).__name__,
            )
        values.append(item)
    return Values(tuple(values), argument.read_only)


def _is_subset_of(budget: Budget, left: Values, right: Values) -> Values:
    budget.compare(len(left.values) + len(right.values))
    return Values(({key(v) for v in left.values} <= {key(v) for v in right.values},))


def _append_string(budget: Budget, left: Values, right: Values) -> Values:
    first = _single(left, "AppendString", str, "string")
    second = _single(right, "AppendString", str, "string")
    if len(first) + len(second) > MAX_STRING:
        raise AttestationError("AppendString: the result is too long")
    budget.make(len(first) + len(second))
    return Values((first + second,), left.read_only or right.read_only)


def _negate_bool(budget: Budget, argument: Values) -> Values:
    budget.compare(1)
    return Values((not _single(argument, "NegateBool", bool, "boolean"),), argument.read_only)


def _contains_only_value(budget: Budget, values: Values, wanted: Values) -> Values:
    if len(wanted.values) != 1:
        raise AttestationError(
            "ContainsOnlyValue: the second argument is one value",
            found=f"{len(wanted.values)} values",
        )
    budget.compare(len(values.values))
    only = key(wanted.values[0])
    return Values((bool(values.values) and all(key(v) == only for v in values.values),))


FUNCTIONS: Final[dict[str, Callable[..., Values]]] = {
    "JmesPath": _jmespath,
    "JsonToClaimValue": _json_to_claim_value,
    "IsSubsetOf": _is_subset_of,
    "AppendString": _append_string,
    "NegateBool": _negate_bool,
    "ContainsOnlyValue": _contains_only_value,
}
