"""
What a database keeps under a service's secrets, protected anew by their newest key.

Each table that holds such blobs has a function that renews a page of them in one transaction. The
transaction is what makes an end of it certain: works of other processes, which take the database's
lock when they begin, come before it whole or after it, and what they protect afterwards they
protect by the newest key, since `Secrets` looks at its file each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select, update

from pyenclave.errors import UnsealError
from pyenclave.services.audit.writer import KEY_CONTEXT
from pyenclave.services.storage import tables
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.transaction import Transaction

__all__ = ["PAGE", "Renewal", "Renewed", "renew_audit_keys", "renewed"]

PAGE: Final = 50  # rows of one transaction


@dataclass(frozen=True, slots=True)
class Renewed:
    """
    What became of a page.

    Attributes:
        moved: Blobs that are under the newest key now and were not.
        damaged: Names of rows that do not open.
        after: Where the next page begins; None: there is none.

    """

    moved: int = 0
    damaged: tuple[str, ...] = ()
    after: Any = None


Renewal = Callable[[Transaction, Any], Renewed]


def renewed(secrets: Secrets, blob: bytes, context: bytes) -> bytes | None:
    """
    Return *blob* under the newest key; None if it is already.

    Raises:
        UnsealError: It does not open.

    """
    plain = secrets.open(blob, context)
    return None if secrets.is_newest(blob) else secrets.protect(plain, context)


def renew_audit_keys(tx: Transaction, _after: Any) -> Renewed:
    """Renew the keys that sign checkpoints; those of other secrets stay as they are."""
    table = tables.audit_keys
    moved, damaged = 0, []
    for kid, private in tx.connection.execute(select(table.c.kid, table.c.private)).all():
        if not tx.secrets.knows(private):
            continue  # a key of before the secrets file was lost, whose public half is kept
        try:
            fresh = renewed(tx.secrets, private, KEY_CONTEXT)
        except UnsealError:
            damaged.append(f"{table.name} {kid}")
            continue
        if fresh is not None:
            change = update(table).where(table.c.kid == kid).values(private=fresh)
            tx.connection.execute(change)
            moved += 1
    return Renewed(moved, tuple(damaged))
