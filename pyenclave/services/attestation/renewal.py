"""What an attestation service keeps under its secrets, protected anew by their newest key."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update

from pyenclave.errors import UnsealError
from pyenclave.services.attestation import tables
from pyenclave.services.attestation.keys import key_rows, key_values, renewed_key
from pyenclave.services.attestation.register import Registry
from pyenclave.services.attestation.state import secret_context
from pyenclave.services.storage.renewing import Renewed, renewed
from pyenclave.services.storage.transaction import Transaction

__all__ = ["renew"]


def renew(tx: Transaction, _after: Any) -> Renewed:
    """
    Renew signing keys, named secrets and the register that lists everything.

    Raises:
        ServiceError: 503: what lies in the database is not what this service wrote.

    """
    count = select(func.count()).select_from(tables.configuration)
    if not tx.connection.execute(count).scalar_one():
        return Renewed()  # never started
    registry = Registry()
    moved, damaged = 0, []
    for row in key_rows(registry.rows(tx, registry.read(tx), tables.keys)):
        try:
            fresh = renewed_key(row, tx.secrets)
        except UnsealError:
            damaged.append(f"{tables.keys.name} {row.kid}")
            continue
        if fresh is not None:
            registry.put(tx, tables.keys, key_values(fresh))
            moved += 1
    table = tables.secrets
    for name, protected in tx.connection.execute(select(table.c.name, table.c.protected)).all():
        try:
            blob = renewed(tx.secrets, bytes(protected), secret_context(name))
        except UnsealError:
            damaged.append(f"{table.name} {name}")
            continue
        if blob is not None:
            change = update(table).where(table.c.name == name).values(protected=blob)
            tx.connection.execute(change)
            moved += 1
    moved += registry.renew(tx)
    return Renewed(moved, tuple(damaged))
