"""The policy language of Azure Attestation: read, checked, evaluated."""

from __future__ import annotations

from pyenclave.attestation.azure_policy.claims import Claim, Issuer, Value
from pyenclave.attestation.azure_policy.evaluate import Fired, Outcome, evaluate, types_of
from pyenclave.attestation.azure_policy.reader import policy_hash, read_policy
from pyenclave.attestation.azure_policy.syntax import Policy

__all__ = [
    "Claim",
    "Fired",
    "Issuer",
    "Outcome",
    "Policy",
    "Value",
    "evaluate",
    "policy_hash",
    "read_policy",
    "types_of",
]
