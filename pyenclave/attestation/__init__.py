"""Verifying evidence: is it genuine, and is it what the relying party wants?"""

from __future__ import annotations

from pyenclave.attestation.appraise import appraise, verify
from pyenclave.attestation.batch import Appraisers, Item, appraise_many
from pyenclave.attestation.detect import kind_of
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.attestation.policy import AppraisalPolicy
from pyenclave.attestation.result import AttestationResult, Check

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
