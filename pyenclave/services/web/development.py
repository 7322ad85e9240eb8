"""The settings of ``--dev``: they exist only where somebody asked for them by name."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Final

from pyenclave.services.identity.issuer import ADMINISTRATOR, DevIssuer
from pyenclave.services.web.config import AUDIENCE, ServiceConfig
from pyenclave.services.web.limits import Limits
from pyenclave.services.web.tls import DevCa

__all__ = ["Development", "development"]

# What Azure's clients ask tokens for besides; the first is the same for all, and so is the token
# that each service prints.
_FURTHER: Final = {
    "attestation": ("https://attest.azure.net",),
    "vault": ("https://managedhsm.azure.net",),
}
# What a service's challenge asks for, where it is not the first.
_RESOURCES: Final = {"attestation": "https://attest.azure.net"}


@dataclass(frozen=True, slots=True)
class Development:
    """
    Settings of a development service, and what belongs to them.

    Attributes:
        config: The settings.
        issuer: The issuer that it trusts.
        ca: The authority of its certificate.

    """

    config: ServiceConfig
    issuer: DevIssuer
    ca: DevCa

    def token(self, *, lifetime: float = 86400) -> str:
        """Return a token of the administrator."""
        return self.issuer.token(
            object_id=ADMINISTRATOR, audience=self.config.audiences[0], lifetime=lifetime
        )


def development(
    service: str,
    state_dir: str | os.PathLike[str],
    *,
    url: str,
    database: str | None = None,
    backend: str = "enclave",
    audience: str = AUDIENCE,
    limits: Limits | None = None,
) -> Development:
    """
    Return the settings of a development service.

    Every development service of one state directory trusts the same issuer, and attestation
    services on this machine whose TLS certificate is of the directory's own authority.

    Args:
        service: ``attestation``, ``vault`` or another name: of the database file.
        state_dir: State directory.
        url: Base address that it is served at: of this machine.
        database: SQLAlchemy URL; default: a file in the state directory.
        backend: Where keys live.
        audience: Of its callers' tokens.
        limits: Sizes, times, rates; default: no rates, as there is nobody to be kept off.

    Raises:
        ValueError: The address is not of this machine.

    """
    host = url.partition("://")[2].rpartition(":")[0].strip("[]")
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise ValueError(f"development services listen on this machine only, not on {host}")
    folder = os.path.abspath(state_dir)
    ca, issuer = DevCa(folder), DevIssuer(folder)
    config = ServiceConfig(
        state_dir=folder,
        database=database or f"sqlite:///{os.path.join(folder, 'dev', f'{service}.db')}",
        dev=True,
        url=url,
        host=host,
        port=int(url.rpartition(":")[2]),
        tls=ca.server(),
        issuers=(issuer.trusted(),),
        audiences=(audience, *_FURTHER.get(service, ())),
        challenge=issuer.challenge(_RESOURCES.get(service, audience)),
        administrators=(f"{issuer.tenant}/{ADMINISTRATOR}",),
        backend=backend,
        ca=ca,
        limits=limits or Limits(rate=None, refusals=None),
    )
    return Development(config, issuer, ca)
