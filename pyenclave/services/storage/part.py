"""
Parts of a database and their schema steps.

A part is a name and a list of steps; step *n* takes the part's tables from version *n* to *n + 1*.
Steps are never changed after a release, only added to. All that are missing run in one transaction
under a lock: two instances that start at once do it once, and a step that fails leaves the old
schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Table, insert, inspect, select, update

from pyenclave.errors import StorageError
from pyenclave.services.storage.tables import metadata, storage_parts

__all__ = ["Part", "create_tables", "migrate"]

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")
# Any number that all instances agree on; PostgreSQL holds it until the transaction ends.
_ADVISORY_LOCK: Final = 0x7079656E636C6176  # "pyenclav"


@dataclass(frozen=True, slots=True)
class Part:
    """
    What one service keeps in a database.

    Attributes:
        name: Lower-case letters, digits, ``-`` and ``_``.
        steps: Each takes the schema from its index to the next version.
    """

    name: str
    steps: Sequence[Callable[[Connection], None]]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"not the name of a part: {self.name!r:.80}")


def create_tables(*tables: Table) -> Callable[[Connection], None]:
    """Return the step that creates *tables*, with their indices."""

    def step(connection: Connection) -> None:
        metadata.create_all(connection, tables=list(tables), checkfirst=False)

    return step


def migrate(connection: Connection, parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """
    Run the steps that are missing; the caller's transaction commits them or none.

    Args:
        connection: In a transaction; on SQLite one that already holds the write lock.
        parts: In the order in which they build on each other.

    Returns:
        Version before and after of each part that changed.

    Raises:
        StorageError: The database has a newer schema than this code.
        ValueError: Two parts of one name.

    """
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        raise ValueError("two parts of one name")
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
    if not inspect(connection).has_table(storage_parts.name):
        metadata.create_all(connection, tables=[storage_parts], checkfirst=False)
    rows = connection.execute(select(storage_parts.c.name, storage_parts.c.version))
    versions: dict[str, int] = {row.name: row.version for row in rows}
    done = {}
    for part in parts:
        version = versions.get(part.name, 0)
        wanted = len(part.steps)
        if version > wanted:
            raise StorageError(
                f"the schema of {part.name!r} is newer than this program",
                expected=f"version {wanted} at most",
                found=f"version {version}",
                advice="Run the newer program, or restore the database from before.",
            )
        if version == wanted:
            continue
        for step in part.steps[version:]:
            step(connection)
        if part.name in versions:
            connection.execute(
                update(storage_parts)
                .where(storage_parts.c.name == part.name)
                .values(version=wanted)
            )
        else:
            connection.execute(insert(storage_parts).values(name=part.name, version=wanted))
        done[part.name] = (version, wanted)
    return done
