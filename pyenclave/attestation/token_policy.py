"""What a relying party demands of tokens: issuer, audience, freshness, code and other claims."""

from __future__ import annotations

import base64
import hmac
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from pyenclave.attestation.case import judge_reference, judge_registers, judge_report_data
from pyenclave.attestation.checks import (
    PASSED,
    Registry,
    Verdict,
    failed,
    not_asked,
)
from pyenclave.attestation.policy import REFERENCES, REGISTERS
from pyenclave.attestation.token_case import Case, moment_of
from pyenclave.formats.jose import b64url_encode

__all__ = ["Names", "policy_checks", "resolve", "same", "tee_claims"]

_MAX_PATH: Final = 12
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_UNTOLD: Final = "the token does not tell it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """
    Under which names a kind of token says what.

    Attributes:
        code: Field of the policy → names of a claim with the digest in hexadecimal digits.
        numbers: Field of the policy → name of a claim with a number, and how it is compared.
        debug: Claims that say whether it is a debug environment: name → values that say no.
        registers: Field of the policy → register → name of a claim.
        nonces: Where a nonce may be.
        tcb: Where the status of the TCB may be.
    """

    code: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[str, str]]
    registers: Mapping[str, Mapping[int, str]]
    debug: Mapping[str, tuple[Any, ...]]
    nonces: tuple[str, ...]
    tcb: tuple[str, ...]


def same(left: object, right: object) -> bool:
    """Whether two JSON values are equal in type and value: 1 is not true, nor "1"."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[n], right[n]) for n in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=0.0)
    return type(left) is type(right) and left == right


def resolve(claims: Mapping[str, Any], path: str) -> list[Any]:
    """Return every value that the dotted *path* may mean: names of claims have dots themselves."""
    return list(_resolve(claims, path.split(".")))


def _resolve(value: object, parts: Sequence[str]) -> Iterator[Any]:
    if not parts:
        yield value
    elif isinstance(value, Mapping) and len(parts) <= _MAX_PATH:
        for size in range(1, len(parts) + 1):
            name = ".".join(parts[:size])
            if name in value:
                yield from _resolve(value[name], parts[size:])


def tee_claims(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the claims about the TEE: MAA nests them where a guest in a VM is attested."""
    inner = payload.get("x-ms-isolation-tee")
    return inner if isinstance(inner, Mapping) else payload


def _first(case: Case, names: Sequence[str]) -> tuple[str, Any] | None:
    for name in names:
        for holder in (tee_claims(case.payload), case.payload):
            found = resolve(holder, name)
            if found:
                return name, found[0]
    return None


def policy_checks(checks: Registry[Case], names: Names) -> None:
    """Register the checks of policy that every kind of token has."""

    @checks.policy("issuer")
    def _issuer(case: Case) -> Verdict:
        """The issuer is one that the policy names."""
        issuer = case.payload.get("iss")
        wanted = case.policy.issuers
        if not wanted:
            return not_asked("name issuers to have the issuer compared", found=issuer)
        if isinstance(issuer, str) and issuer in wanted:
            return PASSED
        return failed(
            expected=wanted, found=f"{issuer!r:.100}", advice="Another service issued the token."
        )

    @checks.policy("audience")
    def _audience(case: Case) -> Verdict:
        """The token was made for the relying party that the policy names."""
        found = case.payload.get("aud")
        wanted = case.policy.audience
        if wanted is None:
            return not_asked("name the audience to have it compared", found=found)
        listed = found if isinstance(found, list) else [found]
        if any(isinstance(item, str) and item == wanted for item in listed):
            return PASSED
        return failed(
            expected=wanted, found=f"{found!r:.100}", advice="It was made for somebody else."
        )

    @checks.policy("nonce")
    def _nonce(case: Case) -> Verdict:
        """The token has the nonce, in one of the ways in which issuers write it."""
        return _judge_nonce(case, names)

    @checks.policy("report_data")
    def _report_data(case: Case) -> Verdict:
        """The token tells the report data, and it is the expected one."""
        if case.report_data is None:
            return not_asked("a token is bound by its nonce and claims")
        found = _digest(case, ("x-ms-sevsnpvm-reportdata", "tdx_report_data"))
        if found is None:
            return failed(expected=case.report_data, found=_UNTOLD)
        return judge_report_data(case, found[1])

    @checks.policy("user_data")
    def _user_data(case: Case) -> Verdict:
        """Nothing is expected that a token does not have."""
        if case.user_data is None:
            return not_asked("a token is bound by its nonce and claims")
        return failed(expected=case.user_data, found="none", advice="Demand it as one of claims.")

    @checks.policy("debug")
    def _debug(case: Case) -> Verdict:
        """The token does not say that the environment can be debugged."""
        return _judge_debug(case, names)

    @checks.policy("tcb.status")
    def _tcb(case: Case) -> Verdict:
        """The status of the TCB, where the token tells it, is an accepted one."""
        found = _first(case, names.tcb)
        if found is None:
            return not_asked("the token does not tell the status of the TCB")
        if isinstance(found[1], str) and found[1] in case.policy.tcb_statuses:
            return PASSED
        return failed(
            expected=case.policy.tcb_statuses,
            found=f"{found[0]}: {found[1]!r:.60}",
            advice="Update the platform, or name the status in tcb_statuses.",
        )

    for field in REFERENCES:
        _register_code(checks, names, field)
    for field in REGISTERS:
        _register_registers(checks, names, field)
    for field in _NUMBERS:
        _register_number(checks, names, field)

    @checks.policy("code.claims")
    def _claims(case: Case) -> Verdict:
        """Every claim that the policy names has one of its values."""
        wanted = case.policy.claims
        if not wanted:
            return not_asked("name claims to have them compared")
        for path, values in wanted.items():
            found = resolve(case.payload, path)
            # Two readings of one path are no answer.
            if len(found) != 1 or not any(same(found[0], value) for value in values):
                return failed(
                    expected=f"{path}: {' or '.join(repr(value) for value in values)}",
                    found=f"{found[0]!r:.100}" if len(found) == 1 else f"{len(found)} values",
                )
        return PASSED

    @checks.policy("token.age")
    def _age(case: Case) -> Verdict:
        """The token is not older than the policy allows."""
        limit = case.policy.max_age
        issued = moment_of(case.payload, "iat")
        if limit is None:
            return not_asked("name max_age to have the token's age compared")
        if issued is not None and case.at - issued <= timedelta(seconds=limit):
            return PASSED
        return failed(
            expected=f"at most {limit} seconds old at {case.at.isoformat()}",
            found=f"issued {issued.isoformat()}" if issued else "no iat",
            advice="Ask for a new token.",
        )


_NUMBERS: Final = (
    "product_id",
    "min_security_version",
    "min_config_svn",
    "min_guest_svn",
    "max_vmpl",
)


def _digest(case: Case, names: Sequence[str]) -> tuple[str, bytes] | None:
    """Return the claim and its bytes; None if the token does not tell it in hexadecimal digits."""
    found = _first(case, names)
    if found is None or not isinstance(found[1], str) or not _HEX.fullmatch(found[1]):
        return None
    return found[0], bytes.fromhex(found[1])


def _register_code(checks: Registry[Case], names: Names, field: str) -> None:
    """A reference value that the token does not tell is refused, not ignored."""

    @checks.policy(f"code.{field}")
    def _code(case: Case) -> Verdict:
        """The token tells this measurement or identifier, and it is one that the policy names."""
        found = _digest(case, names.code.get(field, ()))
        if found is not None:
            return judge_reference(case, field, found[1])
        wanted = case.policy.reference(field)
        if not wanted:
            return not_asked(f"name {field} to have it compared")
        return failed(
            expected=wanted, found=_UNTOLD, advice="Demand claims that this issuer writes."
        )


def _register_registers(checks: Registry[Case], names: Names, field: str) -> None:
    @checks.policy(f"code.{field}")
    def _registers(case: Case) -> Verdict:
        """The token tells these registers, and they are as the policy says."""
        told: dict[int, bytes] = {}
        for index, claims in names.registers.get(field, {}).items():
            found = _digest(case, (claims,))
            if found is not None:
                told[index] = found[1]
        return judge_registers(case, field, told)


def _register_number(checks: Registry[Case], names: Names, field: str) -> None:
    @checks.policy(f"code.{field}")
    def _number(case: Case) -> Verdict:
        """The token tells this number, and it is within the policy's limit."""
        wanted = getattr(case.policy, field)
        if wanted is None:
            return not_asked(f"name {field} to have it compared")
        claim, how = names.numbers.get(field, ("", ""))
        found = _first(case, (claim,)) if claim else None
        if found is None or type(found[1]) is not int:
            return failed(expected=wanted, found=_UNTOLD)
        value = found[1]
        holds = {"==": value == wanted, ">=": value >= wanted, "<=": value <= wanted}[how]
        return PASSED if holds else failed(expected=f"{how} {wanted}", found=value)


def _judge_nonce(case: Case, names: Names) -> Verdict:
    if case.nonce is None:
        return not_asked("give the nonce that was sent, or the token may be an old one")
    found: list[Any] = []
    for name in names.nonces:
        for value in resolve(case.payload, name):
            found += value if isinstance(value, list) else [value]
    # Issuers hand back the text that they were given; these are the texts of these bytes.
    texts = {
        case.nonce.hex(),
        b64url_encode(case.nonce),
        base64.b64encode(case.nonce).decode("ascii"),
        base64.urlsafe_b64encode(case.nonce).decode("ascii"),
    }
    if case.nonce.isascii():
        texts.add(case.nonce.decode("ascii"))
    for text in found:
        if isinstance(text, str) and any(
            hmac.compare_digest(text.encode(), wanted.encode()) for wanted in texts
        ):
            return PASSED
    return failed(
        expected=case.nonce,
        found=", ".join(f"{item!r:.80}" for item in found[:4]) or "none",
        advice="Replayed, or made for another challenge.",
    )


def _judge_debug(case: Case, names: Names) -> Verdict:
    if case.policy.allow_debug:
        return PASSED
    said = False
    for name, harmless in names.debug.items():
        for holder in (tee_claims(case.payload), case.payload):
            for value in resolve(holder, name):
                said = True
                if not any(same(value, good) for good in harmless):
                    return failed(
                        expected=f"{name}: {' or '.join(map(str, harmless))}",
                        found=f"{value!r:.60}",
                        advice="Whoever runs the machine reads its memory.",
                    )
    return PASSED if said else not_asked("the token does not tell whether it is debug")
