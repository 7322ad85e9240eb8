"""
The vault's tables.

``vault_keys`` has a row a key: which version is the newest, whether it is deleted, its rotation
policy. ``vault_versions`` has a row a version; its ``seal`` is made by the service's secrets over
everything in it, so that a row that somebody else wrote, or moved to another name, is noticed when
it is read. ``vault_kek_list`` is one row that is sealed whole.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    inspect,
)

from pyenclave.services.storage.part import Part, create_tables
from pyenclave.services.storage.tables import metadata

__all__ = ["PART", "keks", "keys", "versions"]

keys: Final = Table(
    "vault_keys",
    metadata,
    Column("name", String(127), primary_key=True),
    Column("latest", String(32), nullable=False),
    # Both are null of a key that is not deleted; Unix times in seconds, as all times here.
    Column("deleted", BigInteger),
    Column("purge", BigInteger),
    Column("rotation", Text),
    Column("rotation_created", BigInteger),
    Column("rotation_updated", BigInteger),
    # The version of whose end the owner was told.
    Column("notified", String(32)),
    Index("vault_keys_purge", "purge"),
)

versions: Final = Table(
    "vault_versions",
    metadata,
    Column("name", String(127), primary_key=True),
    Column("version", String(32), primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("kty", String(8), nullable=False),
    Column("size", Integer),
    Column("key_ops", Text, nullable=False),
    Column("public", Text, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
    Column("not_before", BigInteger),
    Column("expires", BigInteger),
    Column("exportable", Boolean, nullable=False),
    Column("release_policy", LargeBinary),
    Column("policy_content_type", String(128), nullable=False),
    Column("immutable", Boolean, nullable=False),
    Column("tags", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("seal", LargeBinary, nullable=False),
    Index("vault_versions_sequence", "name", "sequence", unique=True),
)

# One row: the sealed list of the key-encryption keys since the first rotation, with their states
# (`pyenclave.services.vault.keks`).
keks: Final = Table(
    "vault_kek_list",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sealed", LargeBinary, nullable=False),
)


def _list_keks(connection: Connection) -> None:
    """Begin the list anew: what stood in rows that anybody could write is not sealed unseen."""
    there = inspect(connection)
    if there.has_table("vault_keks"):
        connection.exec_driver_sql("DROP TABLE vault_keks")
    if not there.has_table(keks.name):  # a new database has it by the second step
        metadata.create_all(connection, tables=[keks], checkfirst=False)


PART: Final = Part("vault", (create_tables(keys, versions), create_tables(keks), _list_keks))
