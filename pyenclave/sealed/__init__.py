"""Sealed data: blobs that only the right enclave opens."""

from __future__ import annotations

from pyenclave.sealed.policy import SealPolicy

__all__ = ["SealPolicy"]
