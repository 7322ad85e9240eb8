"""
Azure's key-release policies: which attested environments a key may be released to.

Grammar: Azure Key Vault, "Secure key release policy grammar"; the project's notes on secure key
release, 10.4. The evaluator fails closed: what is missing, ambiguous or of another type does not
match, and what the grammar does not know refuses the whole policy when it is read.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from pyenclave.errors import AttestationError
from pyenclave.formats import jsonstrict

__all__ = [
    "MAX_CONDITIONS",
    "MAX_DEPTH",
    "MAX_SIZE",
    "OPERATORS",
    "AllOf",
    "AnyOf",
    "Authority",
    "ClaimCondition",
    "Condition",
    "Decision",
    "ReleasePolicy",
    "authority_host",
    "find_claim",
    "normal_authority",
]

MAX_SIZE: Final = 64 << 10  # bytes of JSON
MAX_DEPTH: Final = 16  # nested anyOf and allOf
MAX_CONDITIONS: Final = 256
VERSION: Final = "1.0.0"

Operator = Literal[
    "equals", "notEquals", "less", "lessOrEquals", "greater", "greaterOrEquals", "exists"
]
OPERATORS: Final[tuple[Operator, ...]] = (
    "equals",
    "notEquals",
    "less",
    "lessOrEquals",
    "greater",
    "greaterOrEquals",
    "exists",
)
Value = str | int | float | bool
_ORDER: Final = ("less", "lessOrEquals", "greater", "greaterOrEquals")
_DECIMAL: Final = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_MISSING: Final = object()
_ADDRESS: Final = re.compile(
    r"https://(\[[0-9a-f:.]{2,45}\]|[^/@?#%\\\[\]:A-Z]+)(?::([0-9]{1,5}))?((?:/[^/?#%\\]+)*)"
)


@dataclass(frozen=True, slots=True)
class ClaimCondition:
    """One claim compared with one value."""

    claim: str
    operator: Operator
    value: Value

    def __str__(self) -> str:
        return f"{self.claim} {self.operator} {json.dumps(self.value)}"


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one of the conditions holds."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every one of the conditions holds."""

    conditions: tuple[Condition, ...]


Condition = ClaimCondition | AnyOf | AllOf


@dataclass(frozen=True, slots=True)
class Authority:
    """An attestation service, and what its tokens must say."""

    url: str
    condition: AnyOf | AllOf


@dataclass(frozen=True, slots=True)
class Decision:
    """
    What a policy says of one token.

    Attributes:
        released: The policy holds.
        reasons: Why not: the conditions that did not hold, or that no authority fits. It is for
            the audit record of whoever evaluates, never for whoever asked.
    """

    released: bool
    reasons: tuple[str, ...] = ()


def normal_authority(url: str) -> str:
    """
    Return *url* as authorities are compared: exactly, but for one slash at the end.

    Raises:
        AttestationError: Not an https address of a host, or one that could be read in two ways
            (user name, query, fragment, upper-case host, escapes, a path with dots).

    """
    text = url.removesuffix("/")
    match = _ADDRESS.fullmatch(text) if url.isascii() and url.isprintable() else None
    if (
        match is None
        or " " in text
        or not 0 < int(match[2] or 443) < 65536
        or any(piece in (".", "..") for piece in match[3].split("/"))
        or (match[1][0] == "[" and not _is_ipv6(match[1][1:-1]))
    ):
        raise AttestationError(
            "authority: an address that could be read in more than one way",
            expected="https://host[:port][/path], lower-case host, nothing else",
            found=repr(url)[:200],
        )
    return text


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def authority_host(authority: str) -> tuple[str, int, str]:
    """
    Return host (without brackets), port and path of an authority.

    Args:
        authority: As `normal_authority` writes it.

    Raises:
        AttestationError: It is not.

    """
    match = _ADDRESS.fullmatch(normal_authority(authority))
    if match is None:
        raise AssertionError("normal_authority returned another form")
    return match[1].strip("[]"), int(match[2] or 443), match[3]


def find_claim(claims: Mapping[str, Any], name: str) -> object:
    """
    Return the claim *name*, whose dots may separate members or belong to a member's own name.

    Returns:
        Its value, or a private object that equals nothing if it is absent or if two claims fit.

    """
    found: list[object] = []
    _walk(claims, name.split("."), found)
    return found[0] if len(found) == 1 else _MISSING


def _walk(node: object, names: list[str], found: list[object]) -> None:
    # At most MAX_DEPTH names (checked when the policy is read), so at most 2**15 ways; a token
    # that makes two of them fit has no say: the claim counts as absent.
    if not isinstance(node, Mapping) or len(found) > 1:
        return
    for count in range(1, len(names) + 1):
        key = ".".join(names[:count])
        if key not in node:
            continue
        if count == len(names):
            found.append(node[key])
        else:
            _walk(node[key], names[count:], found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _coerced(value: Value, claim: object) -> Value:
    """Read a policy's string as the type of the claim: the vendor's own samples need it."""
    if isinstance(value, str):
        if isinstance(claim, bool) and value in ("true", "false"):
            return value == "true"
        if isinstance(claim, int) and not isinstance(claim, bool) and _DECIMAL.fullmatch(value):
            return int(value)
    return value


def _same_type(left: object, right: object) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return isinstance(left, str) and isinstance(right, str)
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool)
    return _is_number(left) and _is_number(right)


def _holds(condition: ClaimCondition, claims: Mapping[str, Any], *, coerce: bool) -> bool:
    claim = find_claim(claims, condition.claim)
    if condition.operator == "exists":
        return (claim is not _MISSING) is condition.value
    if claim is _MISSING:
        return False
    value = _coerced(condition.value, claim) if coerce else condition.value
    if not _same_type(claim, value):
        return False
    if condition.operator == "equals":
        return claim == value
    if condition.operator == "notEquals":
        return claim != value
    if not _is_number(claim):
        return False
    left: Any = claim
    right: Any = value
    return bool(
        {
            "less": left < right,
            "lessOrEquals": left <= right,
            "greater": left > right,
            "greaterOrEquals": left >= right,
        }[condition.operator]
    )


def _evaluate(
    condition: Condition, claims: Mapping[str, Any], failed: list[str], *, coerce: bool
) -> bool:
    """Evaluate; what does not hold is named in *failed*. Depth is bounded by the reader."""
    if isinstance(condition, ClaimCondition):
        if _holds(condition, claims, coerce=coerce):
            return True
        failed.append(str(condition))
        return False
    if isinstance(condition, AllOf):
        # All are looked at, so that all that is wrong shows at once.
        results = [_evaluate(c, claims, failed, coerce=coerce) for c in condition.conditions]
        return all(results)
    inner: list[str] = []
    if any(_evaluate(c, claims, inner, coerce=coerce) for c in condition.conditions):
        return True
    failed.append("none of (" + "; ".join(inner) + ")")
    return False


@dataclass(frozen=True, slots=True)
class ReleasePolicy:
    """
    A key-release policy.

    Attributes:
        authorities: Attestation services whose tokens count, with their conditions.
        strict: Values are compared by exact JSON type. Otherwise the policy's strings ``"true"``,
            ``"false"`` and decimal integers are read as the type that the token's claim has, as
            the vendor's service does for its own samples.
    """

    authorities: tuple[Authority, ...]
    strict: bool = False

    @classmethod
    def from_json(cls, text: bytes | str, *, strict: bool = False) -> Self:
        """
        Read a policy.

        Args:
            text: JSON, UTF-8, at most 64 KiB.
            strict: Refuse strings that stand for booleans or integers, and compare by exact type.

        Raises:
            AttestationError: Not JSON, or not exactly the grammar; the message names the place.

        """
        document = jsonstrict.loads(
            text, "release policy", error=AttestationError, max_size=MAX_SIZE, max_depth=64
        )
        return cls(authorities=_Reader(strict=strict).policy(document), strict=strict)

    def to_json(self) -> bytes:
        """Return the policy as compact JSON, with its version."""
        document = {
            "version": VERSION,
            "anyOf": [
                {"authority": item.url, **_written(item.condition)} for item in self.authorities
            ],
        }
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()

    def __str__(self) -> str:
        """Return the policy as one line: each authority, and what its tokens must say."""
        return "; or ".join(f"{item.url}: {_said(item.condition)}" for item in self.authorities)

    def evaluate(self, authority: str, claims: Mapping[str, Any]) -> Decision:
        """
        Decide by the claims of a token that *authority* issued and whose signature was verified.

        Args:
            authority: The token's issuer.
            claims: The token's claims.

        Raises:
            AttestationError: *authority* is no plain https address.

        """
        issuer = normal_authority(authority)
        reasons: list[str] = []
        fits = False
        for item in self.authorities:
            if normal_authority(item.url) != issuer:
                continue
            fits = True
            failed: list[str] = []
            if _evaluate(item.condition, claims, failed, coerce=not self.strict):
                return Decision(released=True)
            reasons.extend(failed)
        if not fits:
            reasons.append(f"no authority of the policy is {issuer}")
        return Decision(released=False, reasons=tuple(reasons))


def _written(condition: Condition) -> dict[str, Any]:
    if isinstance(condition, ClaimCondition):
        return {"claim": condition.claim, condition.operator: condition.value}
    name = "anyOf" if isinstance(condition, AnyOf) else "allOf"
    return {name: [_written(item) for item in condition.conditions]}


def _said(condition: Condition) -> str:
    if isinstance(condition, ClaimCondition):
        return str(condition)
    word = " or " if isinstance(condition, AnyOf) else " and "
    parts = (
        _said(item) if isinstance(item, ClaimCondition) else f"({_said(item)})"
        for item in condition.conditions
    )
    return word.join(parts)


class _Reader:
    """Reads the grammar, counting conditions."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._count = 0

    @staticmethod
    def _error(where: str, what: str, found: object = None) -> AttestationError:
        shown = None if found is None else repr(found)[:200]
        return AttestationError(f"release policy: {where}: {what}", found=shown)

    def _table(self, node: object, where: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            raise self._error(where, "not an object", node)
        return node

    def _list(self, node: object, where: str) -> list[Any]:
        if not isinstance(node, list) or not node:
            raise self._error(where, "a list of at least one condition is needed", node)
        return node

    def policy(self, document: object) -> tuple[Authority, ...]:
        """Read the whole policy."""
        table = self._table(document, "policy")
        if unknown := sorted(set(table) - {"version", "anyOf"}):
            raise self._error("policy", f"unknown member {unknown[0]!r}")
        # Several of the vendor's samples leave the version out; it is always written.
        if table.get("version", VERSION) != VERSION:
            raise self._error("version", f"not {VERSION}", table["version"])
        return tuple(
            self._authority(item, f"anyOf[{index}]")
            for index, item in enumerate(self._list(table.get("anyOf"), "anyOf"))
        )

    def _authority(self, node: object, where: str) -> Authority:
        table = self._table(node, where)
        kinds = sorted(set(table) - {"authority"})
        if len(kinds) != 1 or kinds[0] not in ("anyOf", "allOf") or "authority" not in table:
            raise self._error(where, "needs authority and either anyOf or allOf", sorted(table))
        url = table["authority"]
        if not isinstance(url, str):
            raise self._error(where, "authority is an address", url)
        normal_authority(url)
        condition = self._group(kinds[0], table[kinds[0]], where, 1)
        return Authority(url=url, condition=condition)

    def _group(self, kind: str, node: object, where: str, depth: int) -> AnyOf | AllOf:
        if depth > MAX_DEPTH:
            raise self._error(where, f"nested more than {MAX_DEPTH} deep")
        where = f"{where}.{kind}"
        conditions = tuple(
            self._condition(item, f"{where}[{index}]", depth)
            for index, item in enumerate(self._list(node, where))
        )
        return AnyOf(conditions) if kind == "anyOf" else AllOf(conditions)

    def _condition(self, node: object, where: str, depth: int) -> Condition:
        self._count += 1
        if self._count > MAX_CONDITIONS:
            raise self._error(where, f"more than {MAX_CONDITIONS} conditions")
        table = self._table(node, where)
        if len(table) == 1:
            (kind,) = table
            if kind in ("anyOf", "allOf"):
                return self._group(kind, table[kind], where, depth + 1)
        names = [name for name in table if name != "claim"]
        if "claim" not in table or len(names) != 1 or names[0] not in OPERATORS:
            raise self._error(
                where,
                "needs claim and one of " + ", ".join(OPERATORS) + ", or anyOf or allOf alone",
                sorted(table),
            )
        claim = table["claim"]
        if not isinstance(claim, str) or not claim or len(claim) > 256:
            raise self._error(where, "claim is a name of 1 to 256 characters", claim)
        pieces = claim.split(".")
        if len(pieces) > MAX_DEPTH or not all(pieces):
            raise self._error(where, f"claim has up to {MAX_DEPTH} names between dots", claim)
        return ClaimCondition(claim, names[0], self._value(names[0], table[names[0]], where))

    def _value(self, operator: str, value: object, where: str) -> Value:
        where = f"{where}.{operator}"
        if not isinstance(value, str | int | float):
            raise self._error(where, "a string, a number, true or false", value)
        if operator == "exists":
            if not isinstance(value, bool):
                raise self._error(where, "true or false", value)
            return value
        number = _is_number(value) or (
            not self._strict and isinstance(value, str) and bool(_DECIMAL.fullmatch(value))
        )
        if operator in _ORDER and not number:
            raise self._error(where, "only numbers are ordered", value)
        spelt = isinstance(value, str) and (
            value in ("true", "false") or bool(_DECIMAL.fullmatch(value))
        )
        if self._strict and spelt:
            raise self._error(where, "a string that stands for a boolean or a number", value)
        return value
