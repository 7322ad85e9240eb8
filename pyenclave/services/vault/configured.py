"""The vault by the service's configuration."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pyenclave.services.identity import rbac
from pyenclave.services.identity.authenticate import Authenticator
from pyenclave.services.identity.rbac_rest import AccessControl
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.vault import tables
from pyenclave.services.vault.backends import open_backend
from pyenclave.services.vault.backends.pkcs11 import Pkcs11Backend
from pyenclave.services.vault.decisions import Decisions
from pyenclave.services.vault.desk import Desk
from pyenclave.services.vault.openapi import document
from pyenclave.services.vault.records import Place, Retention
from pyenclave.services.vault.release import tables as release_tables
from pyenclave.services.vault.release.build import authorities_of, releases_of
from pyenclave.services.vault.service import API_VERSIONS, Vault
from pyenclave.services.vault.store import KeyStore
from pyenclave.services.vault.users import note_user
from pyenclave.services.web.config import ServiceConfig
from pyenclave.services.web.kit import Answer, Call

__all__ = ["SECRETS", "desk_of", "vault_of"]

SECRETS = "services.secrets"


def _open_database(config: ServiceConfig, *, existing: bool = False) -> Database:
    folder = Path(config.state_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = config.database.removeprefix("sqlite:///")
    if file != config.database:
        Path(file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A SQLite file has its secrets beside it; what instances share needs one that they share.
    shared = not config.database.startswith("sqlite")
    return Database.open(
        config.database,
        parts=[rbac.PART, tables.PART, release_tables.PART],
        secrets=Secrets(folder / SECRETS) if shared else None,
        existing=existing,
    )


@asynccontextmanager
async def desk_of(config: ServiceConfig) -> AsyncIterator[Desk]:
    """
    Open database and backend of the vault that *config* describes, without serving it.

    Raises:
        StorageError: The database is not there, or cannot be opened.
        ConfigurationError: The backend is not understood or not usable, or an authority is not.
        AttestationError: An authority is no plain https address, or its keys are malformed.
        OSError: A file with keys cannot be read.

    """
    # A key of before there were terms gets them when it is wrapped anew.
    terms = authorities_of(config).terms(sha1=config.allow_sha1)
    backend = open_backend(config.backend, config.state_dir, terms=terms)
    if isinstance(backend, Pkcs11Backend):
        backend.check()
    retention = Retention(days=config.retention_days, purge_protection=config.purge_protection)
    with _open_database(config, existing=True) as db:
        try:
            yield Desk(
                db=db,
                store=KeyStore(db.secrets, retention),
                decisions=Decisions(rbac.Rbac()),
                backend=backend,
                secrets=db.secrets,
                place=Place(config.url),
            )
        finally:
            await backend.close()


def vault_of(config: ServiceConfig) -> Vault:
    """
    Return the vault that *config* describes; its `service` closes what was opened.

    Raises:
        StorageError: The database cannot be opened.
        ManifestError: The backend is not understood or not usable, or something is missing.
        ValueError: The retention is not 7 to 90 days.

    """
    retention = Retention(days=config.retention_days, purge_protection=config.purge_protection)
    authorities = authorities_of(config)
    terms = authorities.terms(sha1=config.allow_sha1)
    backend = open_backend(config.backend, config.state_dir, terms=terms)
    if isinstance(backend, Pkcs11Backend):
        backend.check()
    db = _open_database(config)
    try:
        note_user(db, config.state_dir)
        rights = rbac.Rbac()
        db.submit(lambda tx: rights.bootstrap(tx, config.administrators)).result()
        vault = Vault(
            db,
            backend=backend,
            rights=rights,
            authenticator=Authenticator(
                config.issuers, config.audiences, challenge=config.challenge
            ),
            base=config.url,
            releases=releases_of(config, db, backend, authorities=authorities, retention=retention),
            retention=retention,
            allow_sha1=config.allow_sha1,
            limits=config.limits,
            close_db=True,
        )
        AccessControl(db, rights).routes(vault.service, api_versions=API_VERSIONS)
        if config.dev:
            described = document()

            async def describe(call: Call) -> Answer:
                return Answer(described)

            vault.service.route("GET", "/openapi.json", describe, anonymous=True, api_versions=())
    except BaseException:
        db.close()
        raise
    return vault
