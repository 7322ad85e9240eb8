"""Keys in the database: rows and records, inside a transaction that the caller runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Row, and_, delete, func, insert, literal, select, tuple_, update

from pyenclave.errors import ServiceError, UnsealError
from pyenclave.services.storage.renewing import PAGE, Renewed
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault import keks as kek_states
from pyenclave.services.vault.records import Deletion, KeyRecord, Retention
from pyenclave.services.vault.rotation_policy import RotationPolicy
from pyenclave.services.vault.tables import keys, versions

__all__ = ["MAX_VERSIONS", "KeyStore", "StoredRotation"]

MAX_VERSIONS: Final = 500  # of one key: what a backup holds in Azure


@dataclass(frozen=True, slots=True)
class StoredRotation:
    """A key's rotation policy, with when it was made and changed (Unix times; None by default)."""

    policy: RotationPolicy
    created: int | None = None
    updated: int | None = None


def _now(tx: Transaction) -> int:
    return int(tx.now.timestamp())


class KeyStore:
    """
    Reads and writes keys.

    Args:
        secrets: Seals the rows.
        retention: How long deleted keys are kept.
    """

    def __init__(self, secrets: Secrets, retention: Retention) -> None:
        self._secrets = secrets
        self.retention = retention

    # Reading

    def find(self, tx: Transaction, name: str, version: str = "") -> KeyRecord | None:
        """Return a version of a key that is not deleted, by default its newest; None if absent."""
        return tx.cached(
            ("vault", name, version), lambda: self._load(tx, name, version, deleted=False)
        )

    def find_deleted(self, tx: Transaction, name: str) -> tuple[KeyRecord, Deletion] | None:
        """Return the newest version of a deleted key that can still be recovered."""
        row = tx.connection.execute(
            select(keys.c.deleted, keys.c.purge).where(
                keys.c.name == name, keys.c.deleted.is_not(None)
            )
        ).one_or_none()
        if row is None or row.purge <= _now(tx):
            return None
        record = self._load(tx, name, "", deleted=True)
        if record is None:
            return None
        return record, Deletion(deleted=row.deleted, scheduled_purge=row.purge)

    def _load(self, tx: Transaction, name: str, version: str, *, deleted: bool) -> KeyRecord | None:
        on = and_(
            versions.c.name == keys.c.name,
            versions.c.version == (version or keys.c.latest),
        )
        state = keys.c.deleted.is_not(None) if deleted else keys.c.deleted.is_(None)
        row = tx.connection.execute(
            select(versions).select_from(keys.join(versions, on)).where(keys.c.name == name, state)
        ).one_or_none()
        return None if row is None else self._record(row)

    def page_of_keys(self, tx: Transaction, after: str, limit: int) -> list[KeyRecord]:
        """Return the newest versions of up to *limit* keys whose names follow *after*."""
        rows = tx.connection.execute(
            select(versions)
            .select_from(keys.join(versions, self._newest()))
            .where(keys.c.name > after, keys.c.deleted.is_(None))
            .order_by(keys.c.name)
            .limit(limit)
        )
        return [self._record(row) for row in rows]

    def page_of_deleted(
        self, tx: Transaction, after: str, limit: int
    ) -> list[tuple[KeyRecord, Deletion]]:
        """Return up to *limit* deleted keys whose names follow *after*."""
        rows = tx.connection.execute(
            select(versions, keys.c.deleted, keys.c.purge)
            .select_from(keys.join(versions, self._newest()))
            .where(keys.c.name > after, keys.c.deleted.is_not(None), keys.c.purge > _now(tx))
            .order_by(keys.c.name)
            .limit(limit)
        )
        return [
            (self._record(row), Deletion(deleted=row.deleted, scheduled_purge=row.purge))
            for row in rows
        ]

    def page_of_versions(
        self, tx: Transaction, name: str, after: int, limit: int
    ) -> list[tuple[int, KeyRecord]]:
        """Return up to *limit* versions of a key, oldest first, with their sequence numbers."""
        on = versions.c.name == keys.c.name
        rows = tx.connection.execute(
            select(versions)
            .select_from(keys.join(versions, on))
            .where(keys.c.name == name, keys.c.deleted.is_(None), versions.c.sequence > after)
            .order_by(versions.c.sequence)
            .limit(limit)
        )
        return [(row.sequence, self._record(row)) for row in rows]

    def page_of_all(self, tx: Transaction, after: tuple[str, str], limit: int) -> list[KeyRecord]:
        """Return up to *limit* versions of all keys, deleted ones too, after a name and version."""
        return [self._record(row) for row in self._rows_of_all(tx, after, limit)]

    def page_of_rows(
        self, tx: Transaction, after: tuple[str, str] | None, limit: int
    ) -> list[tuple[str, str, KeyRecord | None]]:
        """
        Return the same as names, versions and records; None for rows that are damaged.

        Without *after* from the first row on, whatever it is called.
        """
        found: list[tuple[str, str, KeyRecord | None]] = []
        for row in self._rows_of_all(tx, after, limit):
            try:
                found.append((row.name, row.version, self._record(row)))
            except ServiceError:
                found.append((row.name, row.version, None))
        return found

    @staticmethod
    def _rows_of_all(
        tx: Transaction, after: tuple[str, str] | None, limit: int
    ) -> Sequence[Row[Any]]:
        rows = select(versions).order_by(versions.c.name, versions.c.version).limit(limit)
        if after is not None:
            place = tuple_(versions.c.name, versions.c.version)
            rows = rows.where(place > tuple_(literal(after[0]), literal(after[1])))
        return tx.connection.execute(rows).all()

    @staticmethod
    def _newest() -> Any:
        return and_(versions.c.name == keys.c.name, versions.c.version == keys.c.latest)

    def taken(self, tx: Transaction, name: str) -> str | None:
        """Return ``active`` or ``deleted`` if the name is in use, else None."""
        row = tx.connection.execute(
            select(keys.c.deleted, keys.c.purge).where(keys.c.name == name)
        ).one_or_none()
        if row is None:
            return None
        if row.deleted is None:
            return "active"
        return "deleted" if row.purge > _now(tx) else None

    def count(self, tx: Transaction, name: str) -> int:
        """Return how many versions a key has."""
        return tx.connection.execute(
            select(func.count()).select_from(versions).where(versions.c.name == name)
        ).scalar_one()

    # Writing

    def add(self, tx: Transaction, record: KeyRecord) -> None:
        """Add a version; it becomes the newest. Of a name whose time is over, nothing is left."""
        kek_states.check_wrapped(tx, record.wrapped)
        if self.taken(tx, record.name) is None:
            self.purge(tx, record.name)
            tx.connection.execute(insert(keys).values(name=record.name, latest=record.version))
            sequence = 1
        else:
            sequence = (
                1
                + tx.connection.execute(
                    select(func.max(versions.c.sequence)).where(versions.c.name == record.name)
                ).scalar_one()
            )
            tx.connection.execute(
                update(keys).where(keys.c.name == record.name).values(latest=record.version)
            )
        tx.connection.execute(insert(versions).values(sequence=sequence, **self._values(record)))
        tx.changed()

    def change(self, tx: Transaction, record: KeyRecord) -> KeyRecord:
        """Write a version back with the next revision; the caller has read it in *tx*."""
        kek_states.check_wrapped(tx, record.wrapped, self._wrapped(tx, record))
        record = replace(record, revision=record.revision + 1, updated=_now(tx))
        tx.connection.execute(
            update(versions)
            .where(versions.c.name == record.name, versions.c.version == record.version)
            .values(**self._values(record))
        )
        tx.changed()
        return record

    def rewrapped(self, tx: Transaction, record: KeyRecord, wrapped: bytes) -> bool:
        """Write a key in other wrapping, unless its version was changed since it was read."""
        kek_states.check_wrapped(tx, wrapped)
        changed = replace(record, wrapped=wrapped, revision=record.revision + 1)
        result = tx.connection.execute(
            update(versions)
            .where(
                versions.c.name == record.name,
                versions.c.version == record.version,
                versions.c.revision == record.revision,
            )
            .values(**self._values(changed))
        )
        tx.changed()
        return result.rowcount == 1

    @staticmethod
    def _wrapped(tx: Transaction, record: KeyRecord) -> bytes | None:
        found = tx.connection.execute(
            select(versions.c.wrapped).where(
                versions.c.name == record.name, versions.c.version == record.version
            )
        ).scalar_one_or_none()
        return None if found is None else bytes(found)

    def delete(self, tx: Transaction, name: str) -> Deletion:
        """Mark a key as deleted."""
        now = _now(tx)
        deletion = Deletion(deleted=now, scheduled_purge=now + self.retention.days * 86400)
        tx.connection.execute(
            update(keys)
            .where(keys.c.name == name)
            .values(deleted=deletion.deleted, purge=deletion.scheduled_purge)
        )
        tx.changed()
        return deletion

    def recover(self, tx: Transaction, name: str) -> None:
        """Take the mark away."""
        tx.connection.execute(
            update(keys).where(keys.c.name == name).values(deleted=None, purge=None)
        )
        tx.changed()

    def purge(self, tx: Transaction, name: str) -> None:
        """Remove a key with all its versions."""
        tx.connection.execute(delete(versions).where(versions.c.name == name))
        tx.connection.execute(delete(keys).where(keys.c.name == name))
        tx.changed()

    def overdue(self, tx: Transaction, limit: int) -> list[str]:
        """Return names of deleted keys whose time is over."""
        rows = tx.connection.execute(
            select(keys.c.name).where(keys.c.purge <= _now(tx)).order_by(keys.c.purge).limit(limit)
        )
        return [row.name for row in rows]

    def renew(self, tx: Transaction, after: tuple[str, str] | None) -> Renewed:
        """Seal a page of rows by the newest of the service's secrets."""
        rows = self._rows_of_all(tx, after, PAGE)
        moved, damaged = 0, []
        for row in rows:
            try:
                record = self._record(row)
            except ServiceError:
                damaged.append(f"{versions.name} {row.name}/{row.version}")
                continue
            if not self._secrets.is_newest(row.seal):
                of_row = and_(versions.c.name == row.name, versions.c.version == row.version)
                tx.connection.execute(update(versions).where(of_row).values(**self._values(record)))
                moved += 1
        last = (rows[-1].name, rows[-1].version) if len(rows) == PAGE else None
        return Renewed(moved, tuple(damaged), last)

    # Rotation policies

    def rotation(self, tx: Transaction, name: str) -> StoredRotation:
        """Return a key's rotation policy, the default one if it has none."""
        row = tx.connection.execute(
            select(keys.c.rotation, keys.c.rotation_created, keys.c.rotation_updated).where(
                keys.c.name == name
            )
        ).one_or_none()
        if row is None or row.rotation is None:
            return StoredRotation(RotationPolicy.default())
        return StoredRotation(
            RotationPolicy.from_json(row.rotation), row.rotation_created, row.rotation_updated
        )

    def set_rotation(self, tx: Transaction, name: str, policy: RotationPolicy) -> StoredRotation:
        """Give a key a rotation policy."""
        now = _now(tx)
        created = self.rotation(tx, name).created or now
        tx.connection.execute(
            update(keys)
            .where(keys.c.name == name)
            .values(rotation=policy.to_json(), rotation_created=created, rotation_updated=now)
        )
        tx.changed()
        return StoredRotation(policy, created, now)

    def with_rotation(
        self, tx: Transaction, after: str, limit: int
    ) -> Sequence[tuple[KeyRecord, RotationPolicy, str | None]]:
        """Return keys that have a rotation policy, with the version whose end was announced."""
        rows = tx.connection.execute(
            select(versions, keys.c.rotation, keys.c.notified)
            .select_from(keys.join(versions, self._newest()))
            .where(keys.c.name > after, keys.c.deleted.is_(None), keys.c.rotation.is_not(None))
            .order_by(keys.c.name)
            .limit(limit)
        )
        return [
            (self._record(row), RotationPolicy.from_json(row.rotation), row.notified)
            for row in rows
        ]

    def restore_rotation(self, tx: Transaction, name: str, policy: RotationPolicy | None) -> None:
        """Give a restored key the policy of its backup."""
        if policy is not None:
            self.set_rotation(tx, name, policy)

    def set_notified(self, tx: Transaction, record: KeyRecord) -> None:
        """Remember that the end of this version was announced."""
        tx.connection.execute(
            update(keys).where(keys.c.name == record.name).values(notified=record.version)
        )

    # Rows

    def _values(self, record: KeyRecord) -> dict[str, Any]:
        values = {
            "name": record.name,
            "version": record.version,
            "kty": record.kty,
            "size": record.size,
            "key_ops": json.dumps(record.key_ops),
            "public": json.dumps(dict(record.public), sort_keys=True),
            "wrapped": record.wrapped,
            "enabled": record.enabled,
            "created": record.created,
            "updated": record.updated,
            "not_before": record.not_before,
            "expires": record.expires,
            "exportable": record.exportable,
            "release_policy": record.release_policy,
            "policy_content_type": record.policy_content_type,
            "immutable": record.immutable,
            "tags": json.dumps(dict(record.tags), sort_keys=True),
            "revision": record.revision,
        }
        return values | {"seal": self._secrets.protect(b"", _sealed(values))}

    def _record(self, row: Row[Any]) -> KeyRecord:
        found = row._mapping  # noqa: SLF001 - SQLAlchemy's public name for it
        values = {name: found[versions.c[name]] for name in _NAMES}
        for name in ("wrapped", "release_policy"):
            if values[name] is not None:
                values[name] = bytes(values[name])
        try:
            self._secrets.open(bytes(found[versions.c.seal]), _sealed(values))
        except UnsealError:
            raise ServiceError(
                "The stored key is damaged.", status=500, error_code="InternalError"
            ) from None
        values["key_ops"] = tuple(json.loads(values["key_ops"]))
        values["public"] = json.loads(values["public"])
        values["tags"] = json.loads(values["tags"])
        return KeyRecord(**values)


_NAMES: Final = (
    "name",
    "version",
    "kty",
    "size",
    "key_ops",
    "public",
    "wrapped",
    "enabled",
    "created",
    "updated",
    "not_before",
    "expires",
    "exportable",
    "release_policy",
    "policy_content_type",
    "immutable",
    "tags",
    "revision",
)


def _sealed(values: dict[str, Any]) -> bytes:
    """Return everything of a row but its seal, each value with its kind and length in front."""
    parts = [b"pyenclave-vault-row-v1"]
    for name in _NAMES:
        value = values[name]
        if value is None:
            parts.append(b"-")
        elif isinstance(value, bytes):
            parts.append(b"b" + value)
        else:
            parts.append(b"v" + str(int(value) if isinstance(value, bool) else value).encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
