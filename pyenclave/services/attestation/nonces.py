"""
Nonces that the service gives out and takes once.

A nonce carries its expiry and an HMAC under a secret that instances share, so giving one out writes
nothing: nobody can fill the database by asking. Using one up writes its digest, in the transaction
that decides, and instances are ordered by the database.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import delete, insert, select

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose
from pyenclave.services.attestation import tables
from pyenclave.services.storage.transaction import Transaction

__all__ = ["PREFIX", "Nonce", "Nonces"]

PREFIX: Final = "pye1."
_BODY: Final = struct.Struct(">Q16s")
_TAG: Final = 16
_LABEL: Final = b"pyenclave-attestation-nonce-v1"
_PURGE: Final = 512  # used ones that are forgotten at a time, once expired


@dataclass(frozen=True, slots=True)
class Nonce:
    """A nonce of the service's own, authentic and not expired."""

    digest: bytes
    expires: datetime


class Nonces:
    """
    Gives nonces out and recognises them.

    Args:
        secret: 32 bytes that the instances of one service share.
        seconds: How long a nonce may be used.
    """

    def __init__(self, secret: bytes, seconds: int) -> None:
        if len(secret) != 32:
            raise ValueError("the secret of nonces has 32 bytes")
        self._secret = secret
        self._seconds = seconds

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._secret, _LABEL + body, "sha256")[:_TAG]

    def make(self, at: datetime) -> tuple[str, datetime]:
        """Return a fresh nonce and when it expires."""
        expires = int(at.timestamp()) + self._seconds
        body = _BODY.pack(expires, os.urandom(16))
        text = PREFIX + jose.b64url_encode(body + self._tag(body))
        return text, datetime.fromtimestamp(expires, UTC)

    def read(self, text: str | None, at: datetime) -> Nonce | None:
        """
        Return the nonce that *text* is; None if it is no nonce of this service's form.

        Raises:
            EvidenceFormatError: It has the form and is not authentic, or expired.

        """
        if text is None or not text.startswith(PREFIX):
            return None
        raw = jose.b64url_decode(text[len(PREFIX) :], "nonce")
        if len(raw) != _BODY.size + _TAG:
            raise EvidenceFormatError("nonce: not one of this service", found=f"{len(raw)} bytes")
        body = raw[: _BODY.size]
        if not hmac.compare_digest(self._tag(body), raw[_BODY.size :]):
            raise EvidenceFormatError("nonce: not one of this service", found="another's")
        expires = _BODY.unpack(body)[0]
        if expires <= at.timestamp():
            raise EvidenceFormatError(
                "nonce: expired", expected="used in time", found=f"{int(expires)}"
            )
        digest = hashlib.sha256(raw).digest()
        return Nonce(digest, datetime.fromtimestamp(expires, UTC))


def use(tx: Transaction, nonce: Nonce) -> bool:
    """Use *nonce* up in this transaction; False if it was used before."""
    table = tables.used_nonces
    connection = tx.connection
    known = connection.execute(select(table.c.digest).where(table.c.digest == nonce.digest)).first()
    if known is not None:
        return False
    connection.execute(insert(table).values(digest=nonce.digest, expires=nonce.expires))
    return True


def purge(tx: Transaction) -> int:
    """Forget used nonces that have expired: they are refused for that already."""
    table = tables.used_nonces
    old = select(table.c.digest).where(table.c.expires < tx.now).limit(_PURGE)
    found = [row[0] for row in tx.connection.execute(old)]
    if found:
        tx.connection.execute(delete(table).where(table.c.digest.in_(found)))
    return len(found)
