"""
Appending to the chain: the head row, rows of a group, signed checkpoints.

This is the hot path of every service, so it speaks to the database driver itself: one statement
for the head, one for some dozens of rows. A statement gives Python's lock away, and a busy event
loop keeps it for milliseconds; that is why rows do not go one by one.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.errors import UnsealError
from pyenclave.formats import jose
from pyenclave.formats.audit_log import CHECKPOINT_TYPE, genesis, row_hash
from pyenclave.services.audit.event import Event, body_of

__all__ = ["Appender", "Head", "Signer", "timestamp"]


KEY_CONTEXT: Final = b"audit checkpoint key"
_CHUNK: Final = 32  # rows of one statement on SQLite, of which it keeps the plan
# Every byte to one of 32 characters that nobody misreads (no i, l, o, u), each as often.
_ALPHABET: Final = b"0123456789abcdefghjkmnpqrstvwxyz" * 8
_REFERENCE: Final = 16  # characters: 80 bits

_HEAD: Final = (
    "SELECT seq, hash, generation, checkpoint_seq, log{more} FROM audit_head WHERE id = 1{lock}"
)


def timestamp(moment: dt.datetime) -> str:
    """Return *moment* (with its zone) as RFC 3339 in UTC with microseconds."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class References:
    """Reference ids: 80 random bits in 16 characters."""

    def __init__(self) -> None:
        self._pool: list[str] = []

    def take(self) -> str:
        """Return a fresh one."""
        if not self._pool:
            data = os.urandom(_REFERENCE * 64).translate(_ALPHABET).decode("ascii")
            self._pool = [data[at : at + _REFERENCE] for at in range(0, len(data), _REFERENCE)]
        return self._pool.pop()


@dataclass(slots=True)
class Head:
    """The end of the chain as a group found it, and as it leaves it."""

    seq: int
    hash: bytes = field(repr=False)
    generation: int
    checkpoint_seq: int
    log: bytes
    transaction: str = ""


class Signer:
    """
    The key that signs checkpoints.

    Attributes:
        kid: SHA-256 of its public half (SubjectPublicKeyInfo), in hexadecimal.
        public_pem: The public half.

    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        der = key.public_key().public_bytes(serialization.Encoding.DER, form)
        digest = hashes.Hash(hashes.SHA256())
        digest.update(der)
        self.kid = digest.finalize().hex()
        self.public_pem = (
            key.public_key().public_bytes(serialization.Encoding.PEM, form).decode("ascii")
        )

    @classmethod
    def generate(cls) -> Signer:
        """Return a fresh key on P-256."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def open(cls, blob: bytes, unprotect: Callable[[bytes, bytes], bytes]) -> Signer | None:
        """Return the key that *blob* protects, or ``None`` if these secrets do not open it."""
        try:
            der = unprotect(blob, KEY_CONTEXT)
        except UnsealError:
            return None
        key = serialization.load_der_private_key(der, None)
        return cls(key) if isinstance(key, ec.EllipticCurvePrivateKey) else None

    def protected(self, protect: Callable[[bytes, bytes], bytes]) -> bytes:
        """Return the private half under a service's secrets."""
        der = self._key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return protect(der, KEY_CONTEXT)

    def sign(self, head: Head, at: str) -> str:
        """Return the signed statement that the log ends so, at *at*."""
        claims = {"at": at, "hash": head.hash.hex(), "log": head.log.hex(), "seq": head.seq}
        return jose.sign(claims, key=self._key, kid=self.kid, typ=CHECKPOINT_TYPE)


class Appender:
    """
    Writes rows for one connection at a time; what it keeps lies in the database.

    Args:
        dialect: "sqlite" or "postgresql".
        signer: Signs checkpoints.
        every_rows: Rows after which a checkpoint is written.
        every_seconds: Age of the first unsigned row at which one is written.

    """

    def __init__(
        self, dialect: str, signer: Signer, *, every_rows: int = 1_000, every_seconds: float = 60.0
    ) -> None:
        self.signer = signer
        self.references = References()
        self.every_rows = every_rows
        self.every_seconds = every_seconds
        self._sqlite = dialect == "sqlite"
        mark = "?" if self._sqlite else "%s"
        self._head_sql = _HEAD.format(
            more="" if self._sqlite else ", pg_current_xact_id()::text",
            lock="" if self._sqlite else " FOR UPDATE",
        )
        self._update_sql = (
            f"UPDATE audit_head SET seq = {mark}, hash = {mark}, generation = {mark},"  # noqa: S608
            f" checkpoint_seq = {mark} WHERE id = 1"
        )
        self._checkpoint_sql = (
            f"INSERT INTO audit_checkpoints (seq, signed) VALUES ({mark}, {mark})"  # noqa: S608
        )

    def read_head(self, driver: Any) -> Head:
        """Read, and on PostgreSQL lock, the head row."""
        row = driver.execute(self._head_sql).fetchone()
        seq, digest, generation, checkpoint_seq, log, *rest = row
        return Head(seq, bytes(digest), generation, checkpoint_seq, bytes(log), *rest)

    def write_head(self, driver: Any, head: Head) -> None:
        """Write the head row."""
        driver.execute(
            self._update_sql, (head.seq, head.hash, head.generation, head.checkpoint_seq)
        )

    def append(self, driver: Any, head: Head, events: list[tuple[Event, str]], at: str) -> None:
        """Append *events*, each with its reference id; *head* moves on."""
        rows = []
        seq, digest = head.seq, head.hash
        for event, reference in events:
            body = body_of(event, at=at, reference=reference)
            seq += 1
            digest = row_hash(digest, seq, body)
            rows.append((seq, reference, event.decision, body.decode(), digest))
        if self._sqlite:
            _insert_sqlite(driver, rows)
        else:
            driver.execute(
                "INSERT INTO audit (seq, reference, decision, body, hash) SELECT * FROM"
                " unnest(%s::bigint[], %s::text[], %s::text[], %s::text[], %s::bytea[])",
                [list(column) for column in zip(*rows, strict=True)],
            )
        head.seq, head.hash = seq, digest

    def checkpoint(self, driver: Any, head: Head, at: str) -> str:
        """Sign where the chain ends, and note it."""
        signed = self.signer.sign(head, at)
        driver.execute(self._checkpoint_sql, (head.seq, signed))
        head.checkpoint_seq = head.seq
        return signed


def _insert_sqlite(driver: Any, rows: Sequence[tuple[object, ...]]) -> None:
    at = 0
    while at < len(rows):
        # Chunks of 32, 16, 8 …: a handful of statements, which the driver keeps prepared.
        size = min(_CHUNK, 1 << ((len(rows) - at).bit_length() - 1))
        values = [value for row in rows[at : at + size] for value in row]
        driver.execute(_SQLITE_INSERTS[size], values)
        at += size


_SQLITE_INSERTS: Final = {
    size: "INSERT INTO audit (seq, reference, decision, body, hash) VALUES "  # noqa: S608
    + ",".join(["(?,?,?,?,?)"] * size)
    for size in (1, 2, 4, 8, 16, 32)
}


def first_head(log: bytes) -> dict[str, Any]:
    """Return the head row of a new log."""
    start = genesis(log)
    return {
        "id": 1,
        "log": log,
        "seq": 0,
        "hash": start,
        "generation": 0,
        "checkpoint_seq": 0,
        "base_seq": 0,
        "base_hash": start,
    }
