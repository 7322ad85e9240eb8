"""
The register: one sealed row that lists everything in the database that decides something.

Policies, policy signers, signing keys and the uploads that were taken are ordinary rows. The
register has the SHA-256 of each, a chain over the uploads, and a serial number that grows with each
change; it is sealed by the database's secrets and written in the transaction of the change. A row
that was altered, added, removed, exchanged with another or put back is none that the register
lists, and an old register does not list the rows of today. Then nothing is decided: the service
neither attests nor starts, until somebody has looked.

What is left is to put back the register *and* all rows of one moment. A running instance notices,
since it knows the serial number; one that starts then cannot. Each change and each start is in the
audit log with serial and digest.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from sqlalchemy import Table, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from pyenclave.errors import ServiceError, UnsealError
from pyenclave.services.attestation import tables
from pyenclave.services.audit.event import Event
from pyenclave.services.storage.engines import error_of
from pyenclave.services.storage.transaction import Transaction

__all__ = ["Register", "Registry"]

_CONTEXT: Final = b"attestation-register-v1"
_ROW: Final = b"pyenclave-attestation-row-v1"
_MAX_SEALED: Final = 8 << 20  # characters
_LOG: Final = logging.getLogger("pyenclave.attestation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """
    What there is.

    Attributes:
        serial: Grows by one with each change.
        policies: Type of attestation → SHA-256 of its row, in hexadecimal.
        signers: SHA-256 of a certificate → of its row.
        keys: Name of a signing key → of its row.
        uploads: How many uploads were taken.
        chain: SHA-256 over all of them, one after the other.
    """

    serial: int
    policies: Mapping[str, str]
    signers: Mapping[str, str]
    keys: Mapping[str, str]
    uploads: int = 0
    chain: str = "0" * 64

    def to_bytes(self) -> bytes:
        """Return it as JSON with sorted members."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def shown(self) -> dict[str, Any]:
        """Serial and digest, as the audit log has them."""
        return {"serial": self.serial, "sha256": hashlib.sha256(self.to_bytes()).hexdigest()}

    def listed(self, table: Table) -> Mapping[str, str]:
        """Return what is listed of *table*."""
        if table is tables.policies:
            return self.policies
        return self.signers if table is tables.signers else self.keys

    def having(self, table: Table, values: Mapping[str, str]) -> Register:
        """Return it with a row of *table*, in place of the one of that name."""
        name = values[_name(table)]
        rows = {**self.listed(table), name: row_digest(table, list(values.values()))}
        return self._with(table, rows)

    def without(self, table: Table, name: str) -> Register:
        """Return it without a row of *table*."""
        return self._with(table, {k: v for k, v in self.listed(table).items() if k != name})

    def _with(self, table: Table, rows: Mapping[str, str]) -> Register:
        if table is tables.policies:
            return replace(self, policies=rows)
        return replace(self, signers=rows) if table is tables.signers else replace(self, keys=rows)


def _name(table: Table) -> str:
    return next(iter(table.primary_key.columns)).name


def row_digest(table: Table, values: Sequence[Any]) -> str:
    """Return the SHA-256 of a row: of its table and all its columns, each with its length."""
    digest = hashlib.sha256()
    for value in (_ROW, table.name, *values):
        if isinstance(value, bytes):
            part = b"b" + value
        elif isinstance(value, str):
            part = b"s" + value.encode("utf-8", "surrogatepass")
        else:
            part = b"o" + repr(value).encode("utf-8", "replace")
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _chained(chain: str, row: str) -> str:
    return hashlib.sha256(bytes.fromhex(chain) + bytes.fromhex(row)).hexdigest()


class Registry:
    """One instance's way to the register. Its `read` and `rows` are used in works only."""

    def __init__(self) -> None:
        self._seen = 0
        self._reported: set[str] = set()

    # ---- reading -----------------------------------------------------------------------------

    def begin(self, tx: Transaction) -> Register:
        """
        Return the register; an empty one is made in a database that is empty.

        Raises:
            ServiceError: What lies in the database is not what this service wrote.

        """
        found = tx.connection.execute(select(func.count()).select_from(tables.configuration))
        if found.scalar_one() == 0:
            listed = (tables.policies, tables.signers, tables.keys, tables.used_uploads)
            for table in (*listed, tables.secrets):
                if tx.connection.execute(select(func.count()).select_from(table)).scalar_one():
                    raise self._changed(
                        tx, "the register", "one", f"none, and rows in {table.name}"
                    )
            self._write(tx, Register(serial=1, policies={}, signers={}, keys={}), first=True)
        register = self.read(tx)
        self.uploads(tx, register)
        return register

    def read(self, tx: Transaction) -> Register:
        """
        Return the register as it lies in the database.

        Raises:
            ServiceError: It is missing, not of this service, or older than what was seen.

        """
        rows = self._all(tx, tables.configuration)
        if len(rows) != 1:
            raise self._changed(tx, "the register", "one row", f"{len(rows)} rows")
        sealed = rows[0].sealed
        try:
            if rows[0].id != 1 or not isinstance(sealed, str) or len(sealed) > _MAX_SEALED:
                raise UnsealError("the register: not its form")
            plain = tx.secrets.open(base64.b64decode(sealed, validate=True), _CONTEXT)
        except (UnsealError, binascii.Error, ValueError) as error:
            raise self._changed(tx, "the register", "as it was sealed", str(error)) from None
        register = msgspec.json.decode(plain, type=Register)
        if register.serial < self._seen:
            raise self._changed(
                tx, "the register", f"serial {self._seen}", f"serial {register.serial}, an old one"
            )
        if not tx.changing:  # else it may be undone yet
            self._seen = register.serial
        return register

    def rows(self, tx: Transaction, register: Register, table: Table) -> list[Any]:
        """
        Return the rows of *table*, all and only those that the register lists.

        Raises:
            ServiceError: They are not.

        """
        expected = dict(register.listed(table))
        rows = self._all(tx, table)
        for row in rows:
            wanted = expected.pop(row[0], None) if isinstance(row[0], str) else None
            found = row_digest(table, row)
            if wanted != found:
                what = f"{table.name} {row[0]!r:.80}"
                raise self._changed(tx, what, wanted or "no such row", found)
        if expected:
            what = f"{table.name} {min(expected)!r:.80}"
            raise self._changed(tx, what, "a row", "none")
        return list(rows)

    def uploads(self, tx: Transaction, register: Register) -> frozenset[str]:
        """
        Return the digests of the uploads that were taken.

        Raises:
            ServiceError: They are not those of the register.

        """
        table = tables.used_uploads
        rows = self._all(tx, table)
        chain = "0" * 64
        for row in rows:
            chain = _chained(chain, row_digest(table, row))
        if len(rows) != register.uploads or chain != register.chain:
            raise self._changed(
                tx,
                table.name,
                f"{register.uploads} rows, {register.chain}",
                f"{len(rows)} rows, {chain}",
            )
        return frozenset(row.digest for row in rows)

    def _all(self, tx: Transaction, table: Table) -> Sequence[Any]:
        statement = select(table).order_by(*table.primary_key.columns)
        try:
            return tx.connection.execute(statement).all()
        except SQLAlchemyError as error:
            if error_of(error) is not None:
                raise  # the database's own trouble
            raise self._changed(tx, table.name, "rows that can be read", str(error)) from None

    # ---- writing -----------------------------------------------------------------------------

    def put(self, tx: Transaction, table: Table, values: Mapping[str, str]) -> Register:
        """Write a row in place of the one of its name; return the register after it."""
        register = self.read(tx)
        column = table.c[_name(table)]
        ordered = {item.name: values[item.name] for item in table.columns}
        tx.connection.execute(delete(table).where(column == ordered[column.name]))
        tx.connection.execute(insert(table).values(**ordered))
        return self._write(tx, register.having(table, ordered))

    def remove(self, tx: Transaction, table: Table, name: str) -> Register:
        """Remove a row; return the register after it."""
        register = self.read(tx)
        tx.connection.execute(delete(table).where(table.c[_name(table)] == name))
        return self._write(tx, register.without(table, name))

    def take(self, tx: Transaction, digest: str, purpose: str) -> bool:
        """Note that an upload was taken, and what for; False if it was taken before."""
        register = self.read(tx)
        if digest in self.uploads(tx, register):
            return False
        table = tables.used_uploads
        values = {
            "number": register.uploads + 1,
            "digest": digest,
            "purpose": purpose,
            "used": tx.now.isoformat(),
        }
        tx.connection.execute(insert(table).values(**values))
        chain = _chained(register.chain, row_digest(table, list(values.values())))
        self._write(tx, replace(register, uploads=register.uploads + 1, chain=chain))
        return True

    def renew(self, tx: Transaction) -> bool:
        """Seal the register by the newest of the database's secrets; False if it is."""
        register = self.read(tx)
        sealed = self._all(tx, tables.configuration)[0].sealed
        if tx.secrets.is_newest(base64.b64decode(sealed)):
            return False
        self._write(tx, register)
        return True

    def _write(self, tx: Transaction, register: Register, *, first: bool = False) -> Register:
        if not first:
            register = replace(register, serial=register.serial + 1)
        sealed = base64.b64encode(tx.secrets.protect(register.to_bytes(), _CONTEXT)).decode("ascii")
        tx.connection.execute(delete(tables.configuration))
        tx.connection.execute(insert(tables.configuration).values(id=1, sealed=sealed))
        tx.changed()
        return register

    def _changed(self, tx: Transaction, what: str, expected: str, found: str) -> ServiceError:
        """Return the refusal; log and audit log have it once in the life of a process."""
        what = str(what)  # names of tables are of a class of their own
        key = f"{what}: {expected}: {found}"
        if key not in self._reported:
            if len(self._reported) >= 1_000:
                self._reported.clear()
            self._reported.add(key)
            _LOG.error("stored configuration: %s: expected %s, found %s", what, expected, found)
            tx.report(
                Event(
                    action="attestation/configuration/read",
                    decision="failed",
                    resource=what,
                    condition="the stored configuration is as this service wrote it",
                    expected=expected,
                    found=found,
                )
            )
        return ServiceError(
            "the stored policies, signers or keys are not as this service wrote them",
            status=503,
            error_code="ServiceUnavailable",
            inner="StoredConfigurationChanged",
            expected=f"{what}: {expected}",
            found=found,
            advice="Restore the database from a copy of before; the audit log names each change.",
        )
