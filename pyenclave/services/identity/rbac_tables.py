"""
The tables of roles, and the seals of their rows.

A row's ``seal`` is made by the database's secrets over everything that grants something. A row that
somebody else wrote, or changed, grants nothing: it is passed over, and told to the log and to the
auditor. A row that was removed, or an old one that was put back, is not noticed.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    DateTime,
    String,
    Table,
    Text,
    inspect,
    select,
    update,
)

from pyenclave.errors import UnsealError
from pyenclave.services.audit.event import Event
from pyenclave.services.storage.part import Part, create_tables
from pyenclave.services.storage.renewing import PAGE, Renewed, renewed
from pyenclave.services.storage.tables import metadata
from pyenclave.services.storage.transaction import Transaction

__all__ = ["PART", "SealedRows", "role_assignments", "role_definitions"]

_LOG: Final = logging.getLogger("pyenclave.identity")
_FIRST: Final = "pyenclave-rbac-row-v1"
_MAX_REPORTED: Final = 10_000

role_assignments: Final = Table(
    "role_assignments",
    metadata,
    Column("name", String(36), primary_key=True),
    Column("tenant", String(1024), nullable=False, index=True),
    Column("principal", String(256), nullable=False, index=True),
    Column("role", String(36), nullable=False),
    Column("scope", String(160), nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("created_by", String(1300), nullable=False),
    # Text, not bytes: SQLite gives whatever type a stranger wrote, and reading it must not fail.
    Column("seal", Text),
)
role_definitions: Final = Table(
    "role_definitions",
    metadata,
    Column("name", String(36), primary_key=True),
    Column("body", Text, nullable=False),
    Column("seal", Text),
)


def _add_seals(connection: Connection) -> None:
    # What is there already is not sealed: a stranger who could set the schema's version back would
    # have his rows sealed by this step. The configuration's administrators give roles again.
    for table in (role_assignments, role_definitions):
        if "seal" not in {column["name"] for column in inspect(connection).get_columns(table.name)}:
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN seal TEXT")


# A new database gets the column by the first step already.
PART: Final = Part("identity", [create_tables(role_assignments, role_definitions), _add_seals])


class SealedRows:
    """
    Rows of one table, of which only those that this service wrote are seen.

    Args:
        table: Has a column ``seal``.
        sealed: The columns that the seal binds, all of text.

    """

    def __init__(self, table: Table, sealed: Sequence[str]) -> None:
        self._table = table
        self._columns = [table.c[name] for name in sealed]
        self._reported: set[tuple[str, ...]] = set()

    def values(self, tx: Transaction, values: Mapping[str, str]) -> dict[str, str]:
        """Return *values*, one of each sealed column, with the seal beside them."""
        found = [values[column.name] for column in self._columns]
        seal = tx.secrets.protect(b"", self._context(found))
        return {**values, "seal": base64.b64encode(seal).decode("ascii")}

    def select(self, tx: Transaction, *where: ColumnElement[bool]) -> list[Any]:
        """Return the sealed columns of the rows that are as they were written, by name."""
        # No other column: a value of another type than the column's could not be read.
        wanted = select(*self._columns, self._table.c.seal).where(*where)
        rows = tx.connection.execute(wanted.order_by(self._table.c.name)).all()
        return [row for row in rows if self._intact(tx, row)]

    def renew(self, tx: Transaction, after: str | None) -> Renewed:
        """Seal a page of rows by the newest of the database's secrets; rows without seal stay."""
        name, seal_of = self._table.c.name, self._table.c.seal
        wanted = select(*self._columns, seal_of).order_by(name).limit(PAGE)
        rows = tx.connection.execute(wanted if after is None else wanted.where(name > after)).all()
        moved, damaged = 0, []
        for *values, seal in rows:
            if seal is None:
                continue  # of before there were seals: it grants nothing
            try:
                if not all(isinstance(value, str) for value in (*values, seal)):
                    raise UnsealError("a stored role: not text")
                blob = base64.b64decode(seal, validate=True)
                fresh = renewed(tx.secrets, blob, self._context(values))
            except (UnsealError, binascii.Error, ValueError):
                damaged.append(f"{self._table.name} {values[0]!s:.80}")
                continue
            if fresh is not None:
                text = base64.b64encode(fresh).decode("ascii")
                change = update(self._table).where(name == values[0]).values(seal=text)
                tx.connection.execute(change)
                moved += 1
        return Renewed(moved, tuple(damaged), rows[-1][0] if len(rows) == PAGE else None)

    def _context(self, values: Sequence[str]) -> bytes:
        parts = [part.encode("utf-8") for part in (_FIRST, self._table.name, *values)]
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    def _intact(self, tx: Transaction, row: Any) -> bool:
        *values, seal = row
        try:
            if not all(isinstance(value, str) for value in row):
                raise UnsealError("a stored role: not text, or without a seal")
            tx.secrets.open(base64.b64decode(seal, validate=True), self._context(values))
        except (UnsealError, binascii.Error, ValueError) as error:
            self._report(tx, [f"{value!r:.300}" for value in row], str(error))
            return False
        return True

    def _report(self, tx: Transaction, shown: list[str], why: str) -> None:
        """Tell of a row once in the life of a process, whatever becomes of the work."""
        key = tuple(shown)
        if key in self._reported:
            return
        if len(self._reported) >= _MAX_REPORTED:
            self._reported.clear()
        self._reported.add(key)
        names = [column.name for column in self._columns]
        details = dict(zip(names, shown, strict=False))
        _LOG.error("%s: a row that this service did not write: %s", self._table.name, details)
        tx.report(
            Event(
                action=f"{self._table.name}/read",
                decision="failed",
                resource=shown[0],
                condition="the stored row is as it was written",
                found=why,
                details=details,
            )
        )
