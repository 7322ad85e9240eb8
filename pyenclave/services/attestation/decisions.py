"""
What the policy makes of verified evidence: the claims of the token, and which rules said so.

A claim that a policy issues comes under its own name; several of one name become a list. What only
the service can know (measurements, times, the policy's own hash) a policy may repeat and never
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pyenclave.attestation.azure_policy import (
    Claim,
    Fired,
    Outcome,
    Policy,
    evaluate,
    policy_hash,
    read_policy,
    types_of,
)
from pyenclave.attestation.azure_policy.syntax import Call, ClaimArguments
from pyenclave.errors import AttestationError
from pyenclave.services.attestation.claims import incoming, is_reserved
from pyenclave.services.attestation.verification import Verified

__all__ = ["DEFAULT_VALIDITY", "Decision", "PolicyRefusedError", "StoredPolicy", "decide"]

DEFAULT_VALIDITY: Final = 1440  # minutes (claim rule grammar, report_validity_in_minutes)
_MAX_TRACE: Final = 256  # rules that a record names


class PolicyRefusedError(AttestationError):
    """
    The policy does not permit the evidence.

    Attributes:
        outcome: What the evaluation came to.
    """

    def __init__(self, message: str, *, outcome: Outcome, advice: str | None = None) -> None:
        rules = ", ".join(str(fired) for fired in outcome.trace[:_MAX_TRACE])
        super().__init__(
            message,
            expected="a rule that permits",
            found=f"{outcome.reason}; rules that fired: {rules or 'none'}",
            advice=advice,
        )
        self.outcome = outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPolicy:
    """
    A policy, read.

    Attributes:
        text: As it was written.
        policy: The same, read.
        types: Types of claims that it can look at; None: any.
        hash: ``x-ms-policy-hash``.
        signer: JWK of the certificate that signed it, or None.
        upload: The signed or unsigned token that it came in.
        heavy: It was set by somebody and calls functions or joins claims: within its budget it may
            take long, so that it is evaluated beside the event loop. What only looks at claims one
            by one costs less than a change of threads.
    """

    text: str
    policy: Policy = field(repr=False)
    types: frozenset[str] | None = field(default=None, repr=False)
    hash: str
    signer: Mapping[str, Any] | None = None
    upload: str | None = field(default=None, repr=False)
    heavy: bool = False

    @classmethod
    def of(
        cls, text: str, *, signer: Mapping[str, Any] | None = None, upload: str | None = None
    ) -> StoredPolicy:
        """
        Read *text*.

        Raises:
            AttestationError: Not the grammar; line and column.

        """
        policy = read_policy(text)
        return cls(
            text=text,
            policy=policy,
            types=types_of(policy),
            hash=policy_hash(text),
            signer=signer,
            upload=upload,
            heavy=upload is not None and _is_heavy(policy),
        )


def _is_heavy(policy: Policy) -> bool:
    """Whether any rule calls a function, or looks at more than one claim at a time."""
    for rule in (*policy.configuration, *policy.authorization, *policy.issuance):
        if len(rule.conditions) > 1:
            return True
        expressions = [test.expression for item in rule.conditions for test in item.properties]
        said = rule.action.argument
        if isinstance(said, ClaimArguments):
            expressions += [said.type, said.value]
        if any(isinstance(item, Call) for item in expressions):
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """
    Evidence that the policy permits.

    Attributes:
        claims: Claims of the token besides its times and identifiers.
        rule: The rule that permitted.
        trace: All rules that fired.
        minutes: How long the token holds.
        omit_x5c: What the policy says of its key's certificates in the header: False has them
            there, True their hash (``x5t``), None neither, as Azure's tokens are.
    """

    claims: Mapping[str, Any]
    rule: Fired
    trace: tuple[Fired, ...]
    minutes: int
    omit_x5c: bool | None


def _issued(claims: tuple[Claim, ...], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claims of the policy by name; doubled names become lists."""
    found: dict[str, Any] = {}
    inner = own.get("x-ms-isolation-tee")
    for claim in claims:
        name = claim.type
        if is_reserved(name):
            known = own.get(name)
            if known is None and isinstance(inner, Mapping):
                known = inner.get(name.removeprefix("x-ms-isolation-tee."))
            if known is None and name.startswith("$"):
                known = own.get(name[1:])
            if isinstance(known, list | tuple):
                same = any(
                    type(item) is type(claim.value) and item == claim.value for item in known
                )
            else:
                same = type(known) is type(claim.value) and known == claim.value
            if not same:
                raise AttestationError(
                    f"the policy issues {name}, which only the service can",
                    expected=f"{known!r:.80}"
                    if known is not None
                    else "a name of the policy's own",
                    found=f"{claim.value!r:.80}",
                )
            continue
        if name not in found:
            found[name] = claim.value
        elif isinstance(found[name], list):
            found[name].append(claim.value)
        else:
            found[name] = [found[name], claim.value]
    return found


def decide(verified: Verified, own: Mapping[str, Any], stored: StoredPolicy) -> Decision:
    """
    Evaluate the policy over verified evidence.

    Args:
        verified: The evidence.
        own: The service's claims of it (`claims.claims_of`).
        stored: The policy.

    Raises:
        PolicyRefusedError: It does not permit, or cannot be evaluated.

    """
    outcome = evaluate(stored.policy, incoming(verified, own, stored.types))
    if not outcome.permitted or outcome.decided is None:
        raise PolicyRefusedError(
            f"the attestation policy of {verified.request.type} does not permit the evidence",
            outcome=outcome,
            advice="The record of the service names the rules; try a policy by "
            "draftPolicyForAttestation.",
        )
    try:
        issued = _issued(outcome.issued, own)
    except AttestationError as error:
        raise PolicyRefusedError(str(error), outcome=outcome) from None
    claims = dict(own)
    compliance = issued.pop("x-ms-compliance-status", None)
    if compliance is not None:
        inner = claims.get("x-ms-isolation-tee")
        if isinstance(inner, Mapping):
            claims["x-ms-isolation-tee"] = {**inner, "x-ms-compliance-status": compliance}
        else:
            claims["x-ms-compliance-status"] = compliance
    claims |= issued
    if issued:
        claims["x-ms-policy"] = issued
    omit = outcome.properties.get("omit_x5c")
    minutes = outcome.properties.get("report_validity_in_minutes", DEFAULT_VALIDITY)
    return Decision(
        claims=claims,
        rule=outcome.decided,
        trace=outcome.trace,
        minutes=int(minutes),
        omit_x5c=None if omit is None else omit is True,
    )
