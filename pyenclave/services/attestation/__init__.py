"""The attestation service: Azure Attestation's REST, over `pyenclave.attestation`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyenclave.services.web.config import ServiceConfig
    from pyenclave.services.web.kit import Service

__all__ = ["build"]


def build(config: ServiceConfig) -> Service:
    """Return the service that *config* describes; see `configured.attestation_of`."""
    from pyenclave.services.attestation.configured import attestation_of

    return attestation_of(config)
