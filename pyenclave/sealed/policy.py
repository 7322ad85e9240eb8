"""Who may open sealed data."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from pyenclave.formats.sealed import POLICY_ANY, POLICY_MRENCLAVE, POLICY_MRSIGNER

__all__ = ["SealPolicy", "opener"]

# What opens a sealed file under a policy: the enclave's runtime sets it, where there is one.
opener: Callable[..., Any] | None = None


class SealPolicy(Enum):
    """
    Which enclaves derive the key of sealed data.

    Every policy also binds the platform's root, its level, debug or production, the product id
    and the security version (an older enclave never opens what a newer one sealed).
    """

    unique = POLICY_MRENCLAVE
    """Only the same measurement: an update of the code no longer opens the data."""

    signer = POLICY_MRSIGNER
    """Every image of the same signer and product: data survives upgrades. Signed images only."""

    dangerous_any_enclave = POLICY_ANY
    """Any enclave of this platform with the same product id, whoever signed it."""
