"""The attestation service by its configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from pyenclave.errors import ConfigurationError, PlatformUnavailableError
from pyenclave.formats.ear import PROFILES
from pyenclave.services.attestation import tables
from pyenclave.services.attestation.collateral import Collateral, from_pccs
from pyenclave.services.attestation.openapi import document
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.service import make_service
from pyenclave.services.attestation.tokens import ALGORITHMS
from pyenclave.services.identity import rbac
from pyenclave.services.identity.authenticate import Authenticator
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.web.config import AUDIENCE, ServiceConfig
from pyenclave.services.web.kit import Answer, Call, Service

__all__ = ["ATTEST_AUDIENCE", "attestation_of"]

ATTEST_AUDIENCE: Final = "https://attest.azure.net"
_SECRETS: Final = "services.secrets"
_SQLITE: Final = "sqlite:///"
_LOG: Final = logging.getLogger("pyenclave.attestation")


def _open_database(config: ServiceConfig) -> Database:
    folder = Path(config.state_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if config.database.startswith(_SQLITE):
        file = Path(config.database.removeprefix(_SQLITE))
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A SQLite file has its secrets beside it; what instances share needs one that they share.
    shared = not config.database.startswith("sqlite")
    return Database.open(
        config.database,
        parts=[rbac.PART, tables.PART],
        secrets=Secrets(folder / _SECRETS) if shared else None,
    )


def _audiences(config: ServiceConfig) -> tuple[str, ...]:
    if config.dev:
        return tuple(dict.fromkeys((*config.audiences, ATTEST_AUDIENCE)))
    # The usual audience is the vault's: a token for the vault is none for this service.
    return (ATTEST_AUDIENCE,) if config.audiences == (AUDIENCE,) else config.audiences


def _roots(config: ServiceConfig) -> tuple[bytes, ...]:
    roots = list(config.platform_roots)
    if config.dev:
        from cryptography.hazmat.primitives.serialization import Encoding

        from pyenclave._platform.client import local_platform_root

        try:
            roots.append(local_platform_root().public_bytes(Encoding.PEM))
        except PlatformUnavailableError as error:
            _LOG.warning("evidence of this machine's platform will be refused: %s", error)
    return tuple(roots)


def _collateral(config: ServiceConfig, roots: tuple[bytes, ...]) -> Collateral:
    where = config.collateral
    if where is None:
        return Collateral()
    if where == "intel" or where.startswith("pccs:"):
        cache = Path(config.state_dir) / "collateral"
        return Collateral(fetch=from_pccs(where.removeprefix("pccs:"), cache), roots=roots)
    return Collateral([where], roots=roots)


def attestation_of(config: ServiceConfig) -> Service:
    """
    Return the service that *config* describes; it closes what was opened.

    Raises:
        CollateralError: The collateral cannot be read.
        ConfigurationError: An algorithm that tokens do not have, or no form of EARs.
        OSError: The collateral's folder cannot be read.
        StorageError: The database cannot be opened.

    """
    if config.signing_algorithm not in ALGORITHMS:
        raise ConfigurationError(
            "configuration: signing_algorithm",
            expected=", ".join(ALGORITHMS),
            found=config.signing_algorithm,
        )
    if config.ear_form not in PROFILES:
        raise ConfigurationError(
            "configuration: ear_form", expected=", ".join(PROFILES), found=config.ear_form
        )
    if config.dangerous_evidence_time is not None and not config.dev:
        raise ConfigurationError(
            "configuration: a time of evidence",
            expected="none, in production",
            found=config.dangerous_evidence_time.isoformat(),
        )
    roots = _roots(config)
    collateral = _collateral(config, roots)
    options = Options(
        url=config.url,
        algorithm=config.signing_algorithm,
        roots=roots,
        signers=config.policy_signers,
        dangerous_evidence_time=config.dangerous_evidence_time,
        require_signed_use=config.require_signed_use,
        ear_form="underscored" if config.ear_form == "underscored" else "dotted",
        attest_identity=config.attest_identity,
        explain=config.dev,
        open_drafts=config.dev or config.open_drafts,
        dangerous_allow_software=config.dev or config.dangerous_allow_software,
    )
    db = _open_database(config)
    try:
        rights = rbac.Rbac()
        db.submit(lambda tx: rights.bootstrap(tx, config.administrators)).result()
        service = make_service(
            db,
            options,
            collateral=collateral,
            authenticator=Authenticator(
                config.issuers, _audiences(config), challenge=config.challenge
            ),
            authorize=rights.check,
            limits=config.limits,
            close_db=True,
        )
        if config.dev:
            described = document()

            async def describe(call: Call) -> Answer:
                return Answer(described)

            service.route("GET", "/openapi.json", describe, anonymous=True, api_versions=())
    except BaseException:
        db.close()
        raise
    return service
