"""Releases by the service's configuration."""

from __future__ import annotations

from pyenclave.errors import ConfigurationError
from pyenclave.services.storage.database import Database
from pyenclave.services.vault.backends.base import KeyBackend
from pyenclave.services.vault.records import Retention
from pyenclave.services.vault.release.answer import AnswerSigner
from pyenclave.services.vault.release.authorities import AuthorityKeys
from pyenclave.services.vault.release.service import Releases
from pyenclave.services.web.config import ServiceConfig

__all__ = ["authorities_of", "releases_of"]


def authorities_of(config: ServiceConfig) -> AuthorityKeys:
    """
    Return the attestation services that a vault knows.

    Raises:
        AttestationError: An authority is no plain https address, or its keys are malformed.
        OSError: A file with keys cannot be read.

    """
    loopback = config.ca.pem if config.dev and config.ca is not None else None
    return AuthorityKeys.configured(config.authorities, loopback_ca=loopback)


def releases_of(
    config: ServiceConfig,
    db: Database,
    backend: KeyBackend,
    *,
    authorities: AuthorityKeys | None = None,
    retention: Retention | None = None,
) -> Releases:
    """
    Return what releases the keys of a vault.

    Answers are signed with the certificate that the vault's TLS shows, whose name clients compare
    with the vault's host; in development with one of development's authority (RSA, for RS256).

    Args:
        config: The vault's configuration.
        db: Opened with `pyenclave.services.vault.release.tables.PART` among its parts.
        backend: Keeps the private halves.
        authorities: What `authorities_of` returned, whose terms the backend has.
        retention: What keys say about their deletion.

    Raises:
        ConfigurationError: There is no certificate, or it cannot sign.
        AttestationError: An authority is no plain https address, or its keys are malformed.
        OSError: A file with keys cannot be read.

    """
    if config.dev and config.ca is not None:
        signer = AnswerSigner(*config.ca.leaf(key="rsa"))
    elif config.tls is not None:
        signer = AnswerSigner.from_pem(config.tls.chain, config.tls.key)
    else:
        raise ConfigurationError(
            "a vault that releases keys needs a certificate",
            advice="Answers are signed under the name of the vault's host: configure [tls].",
        )
    return Releases(
        db,
        backend,
        authorities or authorities_of(config),
        signer,
        allow_sha1=config.allow_sha1,
        tokens_once=config.release_tokens_once,
        retention=retention,
    )
