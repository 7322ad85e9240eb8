"""Certificates of Azure Attestation: the checks are those of RA-TLS certificates."""

from __future__ import annotations

from negatives_ra_tls_cert import REDUNDANT, STRUCTURAL, negatives

__all__ = ["REDUNDANT", "STRUCTURAL", "negatives"]
