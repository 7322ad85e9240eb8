"""Trusted code that several examples share: scores one applicant."""

from __future__ import annotations

import math

import pyenclave
from pyenclave import trusted


class NotScorable(trusted.PublicError):
    """Its text may leave the enclave."""


@pyenclave.ecall
def score(income: float, debt: float) -> float:
    """Return how likely a debt is paid back, from 0 to 1."""
    if income <= 0 or debt < 0:
        raise NotScorable("income must be above 0, debt not below")
    return 1 / (1 + math.exp(4 * debt / income - 2))
