"""
Tables that every database of the services has.

Parts declare their own tables on `metadata` and create them in a schema step
(`pyenclave.services.storage.part`).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

__all__ = ["audit", "audit_checkpoints", "audit_head", "audit_keys", "metadata", "storage_parts"]

metadata: Final = MetaData()

# Which steps of which part have run.
storage_parts: Final = Table(
    "storage_parts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
)

# docs/formats/audit-log.md. What is hashed is `body`, byte by byte; the two columns before it
# repeat members of it for the sake of queries, and a verifier compares them.
audit: Final = Table(
    "audit",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("reference", String(32), nullable=False),
    Column("decision", String(16), nullable=False),
    Column("body", Text, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    # Callers are told the references of refusals. An index over all would cost a page a row.
    Index(
        "audit_refused",
        "reference",
        sqlite_where=text("decision <> 'allowed'"),
        postgresql_where=text("decision <> 'allowed'"),
    ),
)

# One row: the end of the chain, and the generation of what transactions cache. Every group of
# works holds its lock, which orders the instances.
audit_head: Final = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("log", LargeBinary(16), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("checkpoint_seq", BigInteger, nullable=False),
    # The row before the first that is kept: 0, or the last that was pruned.
    Column("base_seq", BigInteger, nullable=False),
    Column("base_hash", LargeBinary(32), nullable=False),
)

audit_checkpoints: Final = Table(
    "audit_checkpoints",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("signed", Text, nullable=False),
)

# Keys that sign checkpoints: the public half as PEM, the private one protected by `Secrets`.
audit_keys: Final = Table(
    "audit_keys",
    metadata,
    Column("kid", String(64), primary_key=True),
    Column("public", Text, nullable=False),
    Column("private", LargeBinary, nullable=False),
    Column("created", String(32), nullable=False),
)
