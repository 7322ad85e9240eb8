"""
Cutting the beginning of an audit log off, once it was exported.

What stays begins at a signed checkpoint, so that it still verifies, and the cut is itself a row.
"""

from __future__ import annotations

from sqlalchemy import delete, select, update

from pyenclave.errors import AuditError
from pyenclave.services.audit.event import Event
from pyenclave.services.storage import Database, Transaction
from pyenclave.services.storage.tables import audit, audit_checkpoints, audit_head

__all__ = ["prune"]


def prune(db: Database, *, through: int, caller: str = "") -> int:
    """
    Remove the rows up to *through*, which must have a checkpoint.

    The database is busy while it runs: some seconds for a million rows.

    Args:
        db: The database.
        through: The last row that goes.
        caller: Who does it, for the log.

    Returns:
        How many rows went.

    Raises:
        AuditError: The row has no checkpoint, or is not there.

    """

    def work(tx: Transaction) -> int:
        digest = tx.connection.scalar(select(audit.c.hash).where(audit.c.seq == through))
        held = select(audit_checkpoints.c.seq).where(audit_checkpoints.c.seq == through)
        if digest is None or tx.connection.scalar(held) is None:
            raise AuditError(
                "only rows up to a checkpoint can be removed",
                expected="the row of a checkpoint",
                found=f"row {through}",
            )
        gone = tx.connection.execute(delete(audit).where(audit.c.seq <= through)).rowcount
        tx.connection.execute(delete(audit_checkpoints).where(audit_checkpoints.c.seq < through))
        tx.connection.execute(update(audit_head).values(base_seq=through, base_hash=digest))
        details = {"through": through, "hash": bytes(digest).hex(), "rows": gone}
        tx.audit(Event("audit/prune", "allowed", caller=caller, details=details))
        return gone

    return db.submit(work).result()
