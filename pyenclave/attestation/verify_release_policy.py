"""
Azure's key-release policies by themselves (``akv-release-policy``): readable, never genuine.

A policy is what somebody demands, not what hardware says. It is told what it demands and, if the
claims of a token are given as ``claims.json``, how it would decide by them. Read are policies in
Key Vault's grammar and the key-import configuration of Microsoft's sidecar, whose ``claims`` are
lists of conditions: one list must hold, all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation.case import CaseBase, gathered
from pyenclave.attestation.checks import PASSED, Registry, Verdict, not_asked
from pyenclave.attestation.unsigned import register_unsigned
from pyenclave.errors import AttestationError, EvidenceFormatError
from pyenclave.formats import jsonstrict
from pyenclave.formats.decoded_token import DecodedToken
from pyenclave.formats.release_policy import MAX_SIZE, Decision, ReleasePolicy

__all__ = ["CHECKS", "CLAIMS", "Case", "Demand", "claims"]

CLAIMS: Final = "claims.json"
#: Stands for an endpoint that is no address yet: samples have ``<maa-endpoint>``.
_NO_AUTHORITY: Final = "https://no-authority.invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """
    A policy as it was written.

    Attributes:
        form: ``policy`` (Key Vault's grammar) or ``import`` (the sidecar's configuration).
        authorities: As they are written there.
        conditions: What must hold, as it is written there.
        policy: What decides.
    """

    form: str
    authorities: tuple[str, ...]
    conditions: Any
    policy: ReleasePolicy

    @classmethod
    def from_bytes(cls, data: bytes) -> Demand:
        """
        Read a policy in either form.

        Raises:
            EnclaveError: Malformed, or beyond the grammar.

        """
        members = jsonstrict.object_of(data, "release policy", max_size=MAX_SIZE)
        if "anyOf" in members:
            policy = ReleasePolicy.from_json(data)
            urls = tuple(item.url for item in policy.authorities)
            return cls(form="policy", authorities=urls, conditions=members["anyOf"], policy=policy)
        return cls._of_import(members)

    @classmethod
    def _of_import(cls, members: Mapping[str, Any]) -> Demand:
        groups = members.get("claims")
        if not isinstance(groups, list) or not all(isinstance(item, list) for item in groups):
            raise EvidenceFormatError(
                "release policy: neither a policy nor a configuration of key import",
                expected="anyOf, or claims: a list of lists of conditions",
                found=sorted(members)[:8],
            )
        key = members.get("key")
        authority = key.get("authority") if isinstance(key, Mapping) else None
        endpoint = authority.get("endpoint") if isinstance(authority, Mapping) else None
        if endpoint is not None and not isinstance(endpoint, str):
            raise EvidenceFormatError(
                "release policy: endpoint of the authority", expected="text", found=str(endpoint)
            )
        return cls(
            form="import",
            authorities=() if endpoint is None else (endpoint,),
            conditions=groups,
            policy=_imported(endpoint or "", groups),
        )


def _imported(endpoint: str, groups: list[Any]) -> ReleasePolicy:
    """Return the policy that the sidecar makes of its configuration."""
    url = endpoint if "://" in endpoint else f"https://{endpoint}"
    for authority in (url, _NO_AUTHORITY):
        document = {"anyOf": [{"authority": authority, "allOf": group} for group in groups]}
        try:
            return ReleasePolicy.from_json(json.dumps(document))
        except AttestationError as error:
            problem = error
    raise problem


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A policy, and what it is judged by."""

    def read_demand(self) -> Demand:
        """Read the policy."""
        return self._part("demand", lambda: Demand.from_bytes(self.data))

    def read_claims(self) -> DecodedToken | None:
        """Read the claims to try it on; None if there are none."""
        data = self.endorsements.get(CLAIMS)
        if data is None:
            return None
        return self._part("claims", lambda: DecodedToken.from_bytes(data, CLAIMS))

    @property
    def demand(self) -> Demand:
        """The policy, for other checks."""
        return self.need("policy.format", self.read_demand)

    @property
    def token(self) -> DecodedToken | None:
        """The claims, for other checks."""
        return self.need("claims.format", self.read_claims)


CHECKS: Final[Registry[Case]] = Registry()


@CHECKS.evidence("policy.format")
def _format(case: Case) -> Verdict:
    """The text is a policy in the vault's grammar, or a configuration of key import."""
    case.read_demand()
    return PASSED


@CHECKS.evidence("claims.format")
def _claims_format(case: Case) -> Verdict:
    """The claims to try the policy on, if they are given, can be read."""
    if case.read_claims() is None:
        return not_asked(f"give a token's claims as {CLAIMS} to see how the policy decides")
    return PASSED


register_unsigned(
    CHECKS,
    "policy.signature",
    what="a release policy",
    advice="Give evidence or a token; a vault evaluates the policy by a verified token.",
)


def _decision(policy: ReleasePolicy, authority: str, token: DecodedToken) -> Decision:
    try:
        return policy.evaluate(authority, token.claims)
    except AttestationError as error:  # an issuer that is no address matches none
        return Decision(released=False, reasons=(error.message,))


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the policy demands and how it decides, as far as it can be read."""
    return gathered(case, _demand_claims, _decision_claims)


def _demand_claims(case: Case) -> dict[str, Any]:
    demand = case.demand
    return {
        "form": demand.form,
        "authorities": list(demand.authorities),
        "conditions": demand.conditions,
    }


def _decision_claims(case: Case) -> dict[str, Any]:
    demand, token = case.demand, case.token
    if token is None:
        return {}
    own = _decision(demand.policy, token.issuer, token)
    first = _decision(demand.policy, demand.policy.authorities[0].url, token)
    return {
        "token_issuer": token.issuer or None,
        "decision_with_token_issuer": own.released,
        "decision_if_issuer_were_first_authority": first.released,
        "reasons": list(own.reasons),
    }
