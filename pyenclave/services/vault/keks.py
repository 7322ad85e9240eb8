"""
Which key-encryption keys may wrap, in the database that all instances share.

A key-encryption key that is *retired* opens what it wrapped and wraps nothing new: no transaction
stores a key under it. Instances that still have it as their newest learn so by that refusal. That
is why a row that needs a retired one cannot appear behind the back of whoever destroys it.
"""

from __future__ import annotations

from typing import Final, Literal

from sqlalchemy import delete, func, insert, select, update

from pyenclave.errors import ServiceError
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.backends.base import KEK_PLACES, kek_of
from pyenclave.services.vault.tables import keks, versions

__all__ = ["State", "check_wrapped", "forget", "in_use", "note", "states"]

# moving: the newest, and rows may still be under others; current: the newest, and none is.
State = Literal["moving", "current", "retired", "destroyed"]
_CACHED: Final = "vault-keks-retired"


def states(tx: Transaction) -> dict[bytes, State]:
    """Return what is noted of key-encryption keys; nothing of those before the first rotation."""
    rows = tx.connection.execute(select(keks.c.id, keks.c.state))
    return {bytes.fromhex(row.id): row.state for row in rows}


def note(tx: Transaction, kek: bytes, state: State) -> None:
    """Note the state of a key-encryption key."""
    values = {"state": state, "since": int(tx.now.timestamp())}
    done = tx.connection.execute(update(keks).where(keks.c.id == kek.hex()).values(**values))
    if not done.rowcount:
        tx.connection.execute(insert(keks).values(id=kek.hex(), **values))
    tx.changed()


def forget(tx: Transaction, kek: bytes) -> None:
    """Take a key-encryption key off the list: it was made, and never the newest."""
    tx.connection.execute(delete(keks).where(keks.c.id == kek.hex()))
    tx.changed()


def _retired(tx: Transaction) -> frozenset[bytes]:
    return tx.cached(
        (_CACHED,),
        lambda: frozenset(
            kek for kek, state in states(tx).items() if state in ("retired", "destroyed")
        ),
    )


def check_wrapped(tx: Transaction, wrapped: bytes, before: bytes | None = None) -> None:
    """
    Refuse to store a key under a retired key-encryption key.

    Args:
        tx: The transaction that stores it.
        wrapped: The wrapped key.
        before: The row's wrapped key until now; under the same one it may stay until it is moved.

    Raises:
        ServiceError: 503 KekRetired: this instance did not know; once it does, it may try again.

    """
    kek = kek_of(wrapped)
    if kek is None or kek not in _retired(tx):
        return
    if before is not None and kek_of(before) == kek:
        return
    raise ServiceError(
        "the key-encryption key was replaced meanwhile; try again",
        status=503,
        error_code="ServiceUnavailable",
        inner="KekRetired",
        retry_after=1,
    )


def in_use(tx: Transaction) -> dict[bytes, int]:
    """Return how many keys each key-encryption key wraps, deleted keys too."""
    found: dict[bytes, int] = {}
    for magic, start, size in KEK_PLACES:
        name = func.substr(versions.c.wrapped, start + 1, size)
        rows = tx.connection.execute(
            select(name, func.count())
            .where(func.substr(versions.c.wrapped, 1, len(magic)) == magic)
            .group_by(name)
        )
        for kek, count in rows:
            found[bytes(kek)] = found.get(bytes(kek), 0) + count
    return found
