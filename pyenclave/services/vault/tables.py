"""
The vault's tables.

``vault_keys`` has a row a key: which version is the newest, whether it is deleted, its rotation
policy. ``vault_versions`` has a row a version; its ``seal`` is made by the service's secrets over
everything in it, so that a row that somebody else wrote, or moved to another name, is noticed when
it is read.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
)

from pyenclave.services.storage.part import Part, create_tables
from pyenclave.services.storage.tables import metadata

__all__ = ["PART", "keys", "versions"]

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

# Key-encryption keys since the first rotation: `keks` has what the states mean.
keks: Final = Table(
    "vault_keks",
    metadata,
    Column("id", String(64), primary_key=True),  # hexadecimal
    Column("state", String(16), nullable=False),
    Column("since", BigInteger, nullable=False),
)

PART: Final = Part("vault", (create_tables(keys, versions), create_tables(keks)))
