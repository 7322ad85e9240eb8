"""
Replacing the key of a service's secrets file, while the services run, and destroying the old ones.

Each step is durable before the next begins, and each may be done twice, so that a rotation that was
killed goes on where it was:

1. A fresh key is put before the others in the file. What instances protect from then on they
   protect by it: they look at the file each time.
2. Everything in the database that an older key protects is protected anew, page by page. Where
   step 1 was done and this was not, the next rotation begins here.
3. With *destroy*, a last pass finds nothing under an older key, and these are taken out of the
   file. Before that they open backups of keys, and copies of the database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import select

from pyenclave.errors import ServiceError, StorageError
from pyenclave.services.attestation import renewal as of_attestation
from pyenclave.services.attestation import tables as attestation_tables
from pyenclave.services.audit import Event
from pyenclave.services.identity import rbac
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.part import Part
from pyenclave.services.storage.renewing import Renewal, renew_audit_keys
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.tables import storage_parts
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault import keks
from pyenclave.services.vault import tables as vault_tables
from pyenclave.services.vault.records import Retention
from pyenclave.services.vault.release import tables as release_tables
from pyenclave.services.vault.store import KeyStore

__all__ = ["SecretsRotation", "parts_of", "rotate_secrets"]

_PARTS: Final = (rbac.PART, vault_tables.PART, release_tables.PART, attestation_tables.PART)
_PASSES: Final = 5  # until one finds nothing to move; the second does
_SHOWN: Final = 5  # damaged rows that an error names
_NAMED: Final = 100  # and that the log does


@dataclass(frozen=True, slots=True)
class SecretsRotation:
    """
    What a rotation did.

    Attributes:
        key: The name of the key that protects now, in hexadecimal.
        resumed: One that had begun before was ended.
        moved: What was protected anew: rows, keys, lists.
        destroyed: Keys that were taken out of the file.
        kept: Older ones that are still in it.
        damaged: Rows that do not open: they were not moved.

    """

    key: str
    resumed: bool
    moved: int
    destroyed: tuple[str, ...]
    kept: tuple[str, ...]
    damaged: tuple[str, ...] = ()


def parts_of(url: str, secrets: Secrets | None = None) -> list[Part]:
    """
    Return the parts that a database has, to open it with.

    Raises:
        StorageError: The database is not there, or cannot be opened.

    """
    with Database.open(url, parts=[], secrets=secrets, existing=True) as db:
        names = db.submit(
            lambda tx: set(tx.connection.execute(select(storage_parts.c.name)).scalars())
        ).result()
    return [part for part in _PARTS if part.name in names]


def rotate_secrets(
    db: Database,
    parts: Sequence[Part],
    *,
    destroy: bool = False,
    caller: str = "",
    progress: Callable[[int], None] = lambda moved: None,
) -> SecretsRotation:
    """
    Replace the key of a database's secrets file; a rotation that was stopped is ended instead.

    Args:
        db: The database, opened with *parts*.
        parts: What `parts_of` returned.
        destroy: Older keys are destroyed when nothing in this database needs them. Backups of keys
            that were made under them cannot be restored afterwards.
        caller: Who asked, for the log.
        progress: Called with how much was moved.

    Raises:
        ServiceError: 409 DamagedRows: with *destroy*, and before anything is done, there are
            damaged rows; 503: the database fails, or what is in it is not as it was written.
        StorageError: The secrets file cannot be written, or somebody rotates it at the same time.

    """
    renewals = _renewals(db, parts)
    moved, damaged = _move(db, renewals, 0, progress)
    _refuse_damaged(damaged, destroy=destroy)
    resumed = moved > 0
    if not resumed:
        db.secrets.rotate()
        made = {"key": db.secrets.ids[0].hex()}
        db.submit(lambda tx: tx.audit(_event("made", caller, made))).result()
        moved, damaged = _move(db, renewals, 0, progress)
    newest, *older = db.secrets.ids
    details: dict[str, Any] = {"key": newest.hex(), "moved": moved, "resumed": resumed}
    details |= {"damaged": damaged[:_NAMED]} if damaged else {}
    db.submit(lambda tx: tx.audit(_event("moved", caller, details))).result()
    destroyed = _destroy(db, renewals, newest, older, caller, progress) if destroy else ()
    kept = tuple(name.hex() for name in db.secrets.ids[1:])
    return SecretsRotation(newest.hex(), resumed, moved, destroyed, kept, tuple(damaged))


def _renewals(db: Database, parts: Sequence[Part]) -> list[Renewal]:
    found: list[Renewal] = [renew_audit_keys]
    names = {part.name for part in parts}
    if rbac.PART.name in names:
        found += rbac.Rbac().renewals()
    if vault_tables.PART.name in names:
        found += [KeyStore(db.secrets, Retention()).renew, keks.renew]
    if attestation_tables.PART.name in names:
        found.append(of_attestation.renew)
    return found


def _move(
    db: Database, renewals: Sequence[Renewal], moved: int, progress: Callable[[int], None]
) -> tuple[int, list[str]]:
    """Do one pass; return how much is moved by now, and what does not open."""
    damaged: list[str] = []
    for renewal in renewals:
        after: Any = None
        while True:
            page = db.submit(
                lambda tx, renewal=renewal, after=after: _page(tx, renewal, after)  # type: ignore[misc]
            ).result()
            moved += page.moved
            damaged += (str(name) for name in page.damaged)  # of tables, a class of their own
            if page.moved:
                progress(moved)
            if page.after is None:
                break
            after = page.after
    return moved, damaged


def _page(tx: Transaction, renewal: Renewal, after: Any) -> Any:
    page = renewal(tx, after)
    if page.moved:
        tx.changed()
    return page


def _destroy(
    db: Database,
    renewals: Sequence[Renewal],
    newest: bytes,
    older: Sequence[bytes],
    caller: str,
    progress: Callable[[int], None],
) -> tuple[str, ...]:
    for _ in range(_PASSES):
        found, damaged = _move(db, renewals, 0, progress)
        _refuse_damaged(damaged, destroy=True)
        if not found:
            break
    else:
        raise StorageError(
            "something still writes under an older key of the secrets",
            advice="Stop the instances that have another secrets file; run it again.",
        )
    db.secrets.forget(older, newest=newest)
    names = tuple(name.hex() for name in older)
    if names:
        db.submit(lambda tx: tx.audit(_event("destroyed", caller, {"keys": names}))).result()
    return names


def _refuse_damaged(damaged: Sequence[str], *, destroy: bool) -> None:
    if damaged and destroy:
        more = len(damaged) - _SHOWN
        raise ServiceError(
            "rows that do not open may need the older keys of the secrets",
            status=409,
            error_code="Conflict",
            inner="DamagedRows",
            expected="none",
            found=", ".join(damaged[:_SHOWN]) + (f" and {more} more" if more > 0 else ""),
            advice="Put them back from a copy of the database, or remove them.",
        )


def _event(
    verb: Literal["made", "moved", "destroyed"], caller: str, details: dict[str, Any]
) -> Event:
    return Event(f"secrets/{verb}", "allowed", caller=caller, resource="/", details=details)
