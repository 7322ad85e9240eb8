"""The key vault: Azure Key Vault's keys over REST, and release of keys to attested code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyenclave.services.web.config import ServiceConfig
    from pyenclave.services.web.kit import Service

__all__ = ["build"]


def build(config: ServiceConfig) -> Service:
    """
    Return the vault that *config* describes, as an ASGI application.

    It opens the database at once; the server's end closes it.

    Raises:
        EnclaveError: The configuration or the database is not usable.
        ValueError: A setting is out of its range.

    """
    from pyenclave.services.vault.configured import vault_of

    return vault_of(config).service
