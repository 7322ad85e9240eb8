"""
What the attestation service keeps in its database.

What decides something (policies, signers, signing keys, uploads that were taken) is listed in one
sealed row, `configuration` (`pyenclave.services.attestation.register`). The columns are text:
SQLite gives whatever a stranger wrote, and reading that must not fail before it is compared.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    inspect,
)

from pyenclave.errors import StorageError
from pyenclave.services.storage.part import Part, create_tables
from pyenclave.services.storage.tables import metadata

__all__ = [
    "PART",
    "configuration",
    "keys",
    "policies",
    "secrets",
    "signers",
    "used_nonces",
    "used_uploads",
]

# The policies that were set; a type without a row has the default one.
policies: Final = Table(
    "attestation_policies",
    metadata,
    Column("type", String(32), primary_key=True),
    Column("text", Text, nullable=False),
    Column("upload", Text, nullable=False),  # the token it came in
    Column("signer", Text, nullable=False),  # certificate, DER in base64; empty: none
    Column("updated", String(40), nullable=False),
)

# Certificates whose keys may sign policies of an isolated instance.
signers: Final = Table(
    "attestation_signers",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("certificate", Text, nullable=False),  # DER in base64
    Column("added", String(40), nullable=False),
)

# Keys that sign tokens. A key is in the key set from `created` to `expires`, and signs from
# `starts` until a later one starts.
keys: Final = Table(
    "attestation_keys",
    metadata,
    Column("kid", String(64), primary_key=True),
    Column("algorithm", String(8), nullable=False),
    Column("chain", Text, nullable=False),  # certificates, PEM
    Column("private", Text, nullable=False),  # protected PKCS #8 in base64
    Column("created", String(40), nullable=False),
    Column("starts", String(40), nullable=False),
    Column("expires", String(40), nullable=False),
)

# Named secrets that instances share: what authenticates nonces.
secrets: Final = Table(
    "attestation_secrets",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("protected", LargeBinary, nullable=False),
)

# Nonces of ours that were used; a nonce that is not here and authentic is unused.
used_nonces: Final = Table(
    "attestation_used_nonces",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("expires", DateTime(timezone=True), nullable=False),
    Index("attestation_used_nonces_expires", "expires"),
)

# Signed uploads that were taken, numbered from 1: SHA-256 of what was signed, and what it was taken
# for. An isolated instance takes none of them again, ever.
used_uploads: Final = Table(
    "attestation_used_uploads",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("purpose", String(80), nullable=False),
    Column("used", String(40), nullable=False),
)

# One row: the sealed list of the rows above.
configuration: Final = Table(
    "attestation_configuration",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sealed", Text, nullable=False),
)

_BEFORE_SEALS: Final = (policies, signers, keys, secrets, used_uploads)


def _seal(connection: Connection) -> None:
    """Begin anew with a list; what somebody set before there was one is not sealed unseen."""
    if inspect(connection).has_table(configuration.name):
        return  # a new database has it by the first step
    for table in (policies, signers, used_uploads):
        # By its name: the columns were others.
        found = connection.exec_driver_sql(f"SELECT count(*) FROM {table.name}").scalar_one()  # noqa: S608
        if found:
            raise StorageError(
                f"{table.name} has rows from before they were sealed",
                expected="none",
                found=found,
                advice="Note the policies and signers, empty the table, and set them again.",
            )
    metadata.drop_all(connection, tables=list(_BEFORE_SEALS))
    metadata.create_all(connection, tables=[*_BEFORE_SEALS, configuration], checkfirst=False)


PART: Final = Part(
    "attestation",
    [
        create_tables(policies, signers, keys, secrets, used_nonces, configuration),
        create_tables(used_uploads),
        _seal,
    ],
)
