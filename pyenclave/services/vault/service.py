"""The key vault as a whole: its parts, its routes, its life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from pyenclave.errors import ServiceError
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.backends.base import KeyBackend
from pyenclave.services.vault.caretaker import Caretaker
from pyenclave.services.vault.decisions import Asked, Decisions, Rights
from pyenclave.services.vault.desk import OF_A_KEY, Desk, name_of, version_of
from pyenclave.services.vault.keys import KeyHandlers
from pyenclave.services.vault.life import LifeHandlers
from pyenclave.services.vault.operations import OperationHandlers, check_usable
from pyenclave.services.vault.records import KeyRecord, Place, Retention, key_id
from pyenclave.services.vault.rewrapping import rewrap_keys
from pyenclave.services.vault.store import KeyStore
from pyenclave.services.web.health import add_health
from pyenclave.services.web.kit import Answer, Authenticates, Call, Limits, Service

__all__ = ["API_VERSIONS", "WITH_ATTESTATION", "Releasing", "Vault"]

API_VERSIONS: Final = (
    "7.3-preview",  # of Microsoft's confidential sidecar
    "7.3",  # of its guest tools: the first with release
    "7.4",
    "7.5-preview.1",
    "7.5",
    "7.6-preview.1",
    "7.6-preview.2",
    "7.6",
    "2025-06-01-preview",
    "2025-07-01",
)
WITH_ATTESTATION: Final = API_VERSIONS[API_VERSIONS.index("7.6-preview.2") :]


class Releasing(Protocol):
    """What releases keys; `pyenclave.services.vault.release.service.Releases` does."""

    async def release(
        self,
        call: Call,
        caller: Caller,
        record: KeyRecord,
        *,
        kid: str,
        base: str,
        confirm: Callable[[Transaction], None],
    ) -> Answer:
        """Answer a request for *record*, of a caller who may ask; *confirm* is asked at its end."""


class Vault:
    """
    A key vault.

    Args:
        db: Opened with `pyenclave.services.vault.tables.PART` among its parts.
        backend: Keeps the private halves.
        rights: Who may do what.
        authenticator: Who asks.
        base: Address as clients know it, without a slash at its end; see `place`.
        secrets: Seals rows, pages and backups; the database's own by default.
        releases: Releases keys; without, no key is released.
        retention: How long deleted keys are kept.
        allow_sha1: RSA-OAEP with SHA-1 and RSA1_5 are allowed for operations.
        limits: Sizes, times and rates of requests.
        interval: Seconds between two rounds of the caretaker.
        close_db: The database is closed with the service.

    Attributes:
        service: The ASGI application.
        place: The vault's address, where it is known only later.
        caretaker: Rotates keys and ends deleted ones; runs while the service runs.
    """

    def __init__(
        self,
        db: Database,
        *,
        backend: KeyBackend,
        rights: Rights,
        authenticator: Authenticates,
        base: str = "",
        secrets: Secrets | None = None,
        releases: Releasing | None = None,
        retention: Retention | None = None,
        allow_sha1: bool = False,
        limits: Limits | None = None,
        interval: float = 30.0,
        close_db: bool = False,
    ) -> None:
        secrets = secrets or db.secrets
        self.place = Place(base)
        self._desk = Desk(
            db=db,
            store=KeyStore(secrets, retention or Retention()),
            decisions=Decisions(rights),
            backend=backend,
            secrets=secrets,
            place=self.place,
        )
        self._releases = releases
        self.service = Service(
            "vault", api_versions=API_VERSIONS, limits=limits, authenticator=authenticator
        )
        keys = KeyHandlers(self._desk)
        keys.routes(self.service)
        LifeHandlers(self._desk, keys).routes(self.service)
        OperationHandlers(self._desk, allow_sha1=allow_sha1).routes(self.service)
        for path in OF_A_KEY:
            self.service.route("POST", path + "release", self.release)
            self.service.route(
                "GET", path + "attestation", self.attestation, api_versions=WITH_ATTESTATION
            )
        add_health(self.service, lambda: db.run(lambda _: None))
        self.caretaker = Caretaker(self._desk, interval=interval)
        self.service.on_start(self.caretaker.start)
        # What is added last is closed first.
        if close_db:
            self.service.on_close(db.close)
        self.service.on_close(backend.close)
        self.service.on_close(self.caretaker.close)

    async def rewrap_keys(self, *, rotate: bool = True) -> int:
        """Replace the key-encryption key; see `pyenclave.services.vault.rewrapping`."""
        return await rewrap_keys(self._desk, rotate=rotate)

    async def release(self, call: Call) -> Answer:
        """Release a key to attested code: rights, existence and times; the rest is `releases`."""
        name, version = name_of(call), version_of(call)
        asked = Asked.of(call, "keys/release/action", name, version, verb="keys/release")

        def decide(tx: Transaction) -> KeyRecord:
            self._desk.decisions.authorise(tx, asked)
            record = self._desk.find(tx, asked, name, version)
            check_usable(asked, record, "release", int(tx.now.timestamp()), always=False)
            return record

        def confirm(tx: Transaction) -> None:
            # Fetching an authority's keys and wrapping take time; much may have changed.
            self._desk.decisions.authorise(tx, asked)
            self._desk.check_unchanged(tx, asked, record)
            check_usable(asked, record, "release", int(tx.now.timestamp()), always=False)

        record = await self._desk.db.run(decide)
        if self._releases is None:
            raise ServiceError(
                "This vault releases no keys.", status=400, error_code="BadParameter"
            )
        base = self.place.base
        kid = key_id(base, name, record.version)
        return await self._releases.release(
            call, asked.caller, record, kid=kid, base=base, confirm=confirm
        )

    async def attestation(self, call: Call) -> Answer:
        """Say that keys have no attestation of their own here, to one who may read the key."""
        name, version = name_of(call), version_of(call)
        asked = Asked.of(call, "keys/read", name, version, verb="keys/attestation")

        def decide(tx: Transaction) -> None:
            self._desk.decisions.authorise(tx, asked)
            self._desk.find(tx, asked, name, version)
            asked.fail(
                ServiceError(
                    "The vault's backend makes no attestation of single keys.",
                    status=400,
                    error_code="NotSupported",
                ),
                "the backend attests keys",
            )

        await self._desk.db.run(decide)
        raise AssertionError("decide always refuses")
