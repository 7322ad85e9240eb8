"""What all handlers of the vault share: its parts, reading names, finding keys, making versions."""

from __future__ import annotations

import secrets as random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import msgspec

from pyenclave.errors import ServiceError
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.backends.base import KeyBackend, KeyMaterial, Rewraps
from pyenclave.services.vault.decisions import (
    CHANGED,
    Asked,
    Decisions,
    changed_meanwhile,
    conflict,
    key_not_found,
)
from pyenclave.services.vault.fields import bad_parameter
from pyenclave.services.vault.records import (
    KeyRecord,
    Place,
    Retention,
    bundle,
    context_of,
    valid_name,
    valid_version,
)
from pyenclave.services.vault.requests import (
    Attributes,
    Policy,
    check_policy_rules,
)
from pyenclave.services.vault.store import MAX_VERSIONS, KeyStore
from pyenclave.services.web.kit import Answer, Call

T = TypeVar("T")

__all__ = ["OF_A_KEY", "Desk", "Draft", "answer_of", "name_of", "version_of"]

# What goes before the name of an operation. Without a version the published template gives one
# slash or two, as the client leaves the version out or empty.
OF_A_KEY: Final = ("/keys/{name}/{version}/", "/keys/{name}//", "/keys/{name}/")


@dataclass(frozen=True, slots=True)
class Desk:
    """The parts of a vault."""

    db: Database
    store: KeyStore
    decisions: Decisions
    backend: KeyBackend
    secrets: Secrets
    place: Place

    @property
    def retention(self) -> Retention:
        """How long deleted keys are kept."""
        return self.store.retention

    def shown(self, record: KeyRecord) -> dict[str, Any]:
        """Return the bundle of *record*."""
        return bundle(record, self.place.base, self.retention)

    def find(self, tx: Transaction, asked: Asked, name: str, version: str = "") -> KeyRecord:
        """
        Return a version of a key that is not deleted.

        Raises:
            Refused: 404 there is none; 500 the row is not as this service wrote it.

        """
        record = self.intact(asked, lambda: self.store.find(tx, name, version))
        if record is None:
            asked.refuse(key_not_found(name), "the key exists", expected=True, found=False)
        return record

    def check_unchanged(self, tx: Transaction, asked: Asked, record: KeyRecord) -> None:
        """
        Go on only if *record* is still what it was when the request was decided.

        Another wrapping of the same key is no change.

        Raises:
            Refused: 404 it was deleted; 409 it was changed.

        """
        found = self.find(tx, asked, record.name, record.version)
        wrapping = {name: getattr(record, name) for name in ("wrapped", "revision", "updated")}
        if replace(found, **wrapping) != record:
            asked.refuse(
                changed_meanwhile(),
                CHANGED,
                expected=f"revision {record.revision}",
                found=f"revision {found.revision}",
            )

    @staticmethod
    def intact(asked: Asked, read: Callable[[], T]) -> T:
        """Return what *read* returns; that a row is damaged goes to the audit log."""
        try:
            return read()
        except ServiceError as error:
            asked.fail(error, "the stored row is as it was written")

    async def stored(self, work: Callable[[Transaction], T]) -> T:
        """
        Run a work that stores a wrapped key.

        Raises:
            ServiceError: 503 KekRetired: another process replaced the key-encryption key. This
                instance knows the new one then.

        """
        try:
            return await self.db.run(work)
        except ServiceError as error:
            if error.inner == "KekRetired" and isinstance(self.backend, Rewraps):
                await self.backend.keks()
            raise

    async def done(
        self,
        asked: Asked,
        work: Awaitable[T],
        *,
        resource: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> T:
        """Return what the backend gives; that it could not goes to the audit log."""
        try:
            return await work
        except ServiceError as error:
            event = asked.event(
                "failed",
                {**(details or {}), "status": error.status},
                condition=error.message,
                resource=resource or asked.resource,
            )
            error.reference = await self.db.run(lambda tx: tx.audit(event))
            raise

    def check_room(self, tx: Transaction, asked: Asked, name: str) -> KeyRecord | None:
        """Return the newest version of a key that is to have another, None of a new name."""
        state = self.store.taken(tx, name)
        if state == "deleted":
            asked.refuse(conflict(name), "the name is free", found="deleted")
        if state is None:
            return None
        if self.store.count(tx, name) >= MAX_VERSIONS:
            asked.refuse(bad_parameter(f"A key has at most {MAX_VERSIONS} versions."), "room")
        return self.find(tx, asked, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A version that is to be made: all but the key itself."""

    name: str
    version: str
    kty: str
    size: int | None
    key_ops: tuple[str, ...]
    enabled: bool
    not_before: int | None
    expires: int | None
    exportable: bool
    policy: Policy | None
    tags: dict[str, str]

    @classmethod
    def plan(
        cls,
        name: str,
        *,
        kty: str,
        size: int | None,
        key_ops: tuple[str, ...],
        attributes: Attributes,
        policy: Policy | None,
        tags: dict[str, str],
        previous: KeyRecord | None,
    ) -> Draft:
        """
        Decide what a new version will be.

        A further version of an exportable key may leave its policy out: then it has the one of
        the version before.

        Raises:
            ServiceError: 400: exportable, type and policy do not belong together.

        """
        exportable = bool(attributes.exportable)
        if exportable and policy is None and previous is not None:
            policy = policy_of(previous)
        check_policy_rules(kty, exportable=exportable, policy=policy is not None)
        return cls(
            name=name,
            version=random.token_hex(16),
            kty=kty,
            size=size,
            key_ops=key_ops,
            enabled=attributes.enabled is not False,
            not_before=attributes.not_before,
            expires=attributes.expires,
            exportable=exportable,
            policy=policy,
            tags=tags,
        )

    @classmethod
    def successor(cls, previous: KeyRecord) -> Draft:
        """Return the draft of a rotated key's next version: like the last, with a new life."""
        return cls(
            name=previous.name,
            version=random.token_hex(16),
            kty=previous.kty,
            size=previous.size,
            key_ops=previous.key_ops,
            enabled=True,
            not_before=None,
            expires=None,
            exportable=previous.exportable,
            policy=policy_of(previous),
            tags=dict(previous.tags),
        )

    def context(self) -> bytes:
        """Return what the key is to be wrapped with."""
        return context_of(
            self.name,
            self.version,
            self.kty,
            exportable=self.exportable,
            release_policy=None if self.policy is None else self.policy.data,
            immutable=self.policy is not None and self.policy.immutable,
        )

    def record(self, material: KeyMaterial, now: int) -> KeyRecord:
        """Return the version, made at *now*."""
        record = KeyRecord(
            name=self.name,
            version=self.version,
            kty=self.kty,
            key_ops=self.key_ops,
            public=dict(material.public),
            wrapped=bytes(material.wrapped),
            size=self.size,
            enabled=self.enabled,
            created=now,
            updated=now,
            not_before=self.not_before,
            expires=self.expires,
            exportable=self.exportable,
            tags=self.tags,
        )
        return with_policy(record, self.policy)


def policy_of(record: KeyRecord) -> Policy | None:
    """Return the release policy of *record*."""
    if record.release_policy is None:
        return None
    return Policy(record.release_policy, record.policy_content_type, record.immutable)


def with_policy(record: KeyRecord, policy: Policy | None) -> KeyRecord:
    """Return *record* with another release policy."""
    if policy is None:
        return record
    return replace(
        record,
        release_policy=policy.data,
        policy_content_type=policy.content_type,
        immutable=policy.immutable,
    )


_ENCODE: Final = msgspec.json.Encoder().encode


def answer_of(body: dict[str, Any]) -> bytes:
    """Return the bytes of an answer."""
    return _ENCODE(body)


def name_of(call: Call) -> str:
    """
    Return the key's name in the path.

    Raises:
        ServiceError: 400.

    """
    name = call.params["name"]
    if not valid_name(name):
        raise bad_parameter("The request URI contains an invalid key name.")
    return name


def version_of(call: Call) -> str:
    """
    Return the key's version in the path, "" for the newest.

    Raises:
        ServiceError: 400.

    """
    version = call.params.get("version", "")
    if version and not valid_version(version):
        raise bad_parameter("The request URI contains an invalid key version.")
    return version


def json_answer(body: dict[str, Any]) -> Answer:
    """Return a 200 with *body*."""
    return Answer(_ENCODE(body))
