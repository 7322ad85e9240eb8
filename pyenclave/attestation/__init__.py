"""Verifying evidence: is it genuine, and is it what the relying party wants?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyenclave.attestation.appraise import appraise, verify
from pyenclave.attestation.detect import kind_of
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.attestation.policy import AppraisalPolicy
from pyenclave.attestation.result import AttestationResult, Check

if TYPE_CHECKING:
    from pyenclave.attestation.batch import Appraisers as Appraisers
    from pyenclave.attestation.batch import Item as Item
    from pyenclave.attestation.batch import appraise_many as appraise_many

__all__ = [
    "AppraisalPolicy",
    "Appraisers",
    "AttestationResult",
    "Check",
    "Endorsements",
    "Item",
    "appraise",
    "appraise_many",
    "kind_of",
    "verify",
]

# Loaded when first used: most programs judge evidence piece by piece.
_OF_BATCHES = ("Appraisers", "Item", "appraise_many")


def __getattr__(name: str) -> Any:
    if name not in _OF_BATCHES:
        raise AttributeError(f"module 'pyenclave.attestation' has no attribute {name!r}")
    from pyenclave.attestation import batch

    value = globals()[name] = getattr(batch, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
