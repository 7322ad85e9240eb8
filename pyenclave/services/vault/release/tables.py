"""The table of tokens that were used up, where a vault takes each token once for a key."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, LargeBinary, Table, delete, insert, select

from pyenclave.services.storage.part import Part, create_tables
from pyenclave.services.storage.tables import metadata
from pyenclave.services.storage.transaction import Transaction

__all__ = ["PART", "tokens", "use_up"]

tokens: Final = Table(
    "vault_release_tokens",
    metadata,
    # SHA-256 over the authority, the token's jti and the key's version.
    Column("id", LargeBinary(32), primary_key=True),
    # Seconds since 1970 until which the token could be shown again.
    Column("expires", BigInteger, nullable=False),
    Index("vault_release_tokens_expires", "expires"),
)

PART: Final = Part("vault-release", (create_tables(tokens),))
_SWEEP: Final = 64  # one row in so many takes the old ones away


def use_up(tx: Transaction, token: bytes, expires: int) -> bool:
    """
    Note that a token is used.

    Args:
        tx: The transaction that also has the decision.
        token: Names the token and the key, 32 bytes.
        expires: Seconds since 1970; afterwards the token is refused for its age.

    Returns:
        Whether it was unused until now, by every instance on this database.

    """
    connection = tx.connection
    if connection.execute(select(tokens.c.id).where(tokens.c.id == token)).first() is not None:
        return False
    if token[0] % _SWEEP == 0:
        now = int(tx.now.timestamp())
        connection.execute(delete(tokens).where(tokens.c.expires < now))
    connection.execute(insert(tokens).values(id=token, expires=expires))
    return True
