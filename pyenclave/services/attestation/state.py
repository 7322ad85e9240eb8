"""
What instances share: policies, policy signers and signing keys, and this instance's view of them.

The view is renewed in every transaction that decides something: the database tells by its
generation whether anything changed, and a decision by an older policy is taken again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final

from sqlalchemy import insert, select

from pyenclave.errors import ConfigurationError, EvidenceFormatError, ServiceError
from pyenclave.formats.x509 import Certificate
from pyenclave.services.attestation import tables
from pyenclave.services.attestation.decisions import StoredPolicy
from pyenclave.services.attestation.defaults import DEFAULT_POLICIES, SOFTWARE_TOO
from pyenclave.services.attestation.keys import (
    KeyRow,
    key_rows,
    key_values,
    make_key,
    open_key,
    renewed_key,
    signing_row,
)
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.register import Register, Registry
from pyenclave.services.attestation.tokens import Algorithm, SigningKey
from pyenclave.services.attestation.uploads import demand_signing_key, jwk_of
from pyenclave.services.audit.event import Event
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Transaction

__all__ = ["Shared", "View", "secret_context"]

_CACHED: Final = ("attestation", "view")
_OF_NONCES: Final = "nonces"
_MAX_PARSED: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """
    What is shared, as of one generation of the database.

    Attributes:
        policies: By attestation type; the defaults where none was set.
        signers: Certificates that may sign policies; none: the instance is not isolated.
        keys: Signing keys, oldest first.
        register: What all of them were compared with.
    """

    policies: Mapping[str, StoredPolicy]
    signers: tuple[Certificate, ...] = ()
    keys: tuple[KeyRow, ...] = field(default=(), repr=False)
    register: Register | None = field(default=None, repr=False)

    @property
    def isolated(self) -> bool:
        """Whether policies must be signed."""
        return bool(self.signers)

    def published(self, at: datetime) -> tuple[KeyRow, ...]:
        """Return the keys of the key set."""
        return tuple(row for row in self.keys if at < row.expires)


class Shared:
    """
    One instance's way to what all share.

    Args:
        db: The database, with `tables.PART`.
        options: Settings.
    """

    def __init__(self, db: Database, options: Options) -> None:
        self._db = db
        self._options = options
        self._parsed: dict[tuple[str, bytes | None], StoredPolicy] = {}
        self._opened: dict[str, SigningKey] = {}
        self._registry = Registry()
        self.view = View(policies=MappingProxyType({}))

    # ---- reading -----------------------------------------------------------------------------

    def renewed(self, tx: Transaction) -> View:
        """
        Return the view of this transaction, and keep it as this instance's.

        Raises:
            ServiceError: What lies in the database is not what this service wrote (503).

        """
        view = tx.cached(_CACHED, lambda: self._load(tx))
        self.view = view
        return view

    def _load(self, tx: Transaction) -> View:
        defaults = SOFTWARE_TOO if self._options.dangerous_allow_software else DEFAULT_POLICIES
        found = {kind: self._stored(text, None, None) for kind, text in defaults.items()}
        register = self._registry.read(tx)
        for row in self._registry.rows(tx, register, tables.policies):
            if row.type in found:
                signer = base64.b64decode(row.signer) if row.signer else None
                found[row.type] = self._stored(row.text, signer, row.upload)
        rows = self._registry.rows(tx, register, tables.signers)
        return View(
            policies=MappingProxyType(found),
            signers=tuple(
                Certificate.from_der(base64.b64decode(row.certificate))
                for row in sorted(rows, key=lambda row: (row.added, row.sha256))
            ),
            keys=key_rows(self._registry.rows(tx, register, tables.keys)),
            register=register,
        )

    def _stored(self, text: str, signer: bytes | None, upload: str | None) -> StoredPolicy:
        key = text, signer
        known = self._parsed.get(key)
        if known is None or known.upload != upload:
            jwk = None if signer is None else jwk_of(Certificate.from_der(signer))
            known = StoredPolicy.of(text, signer=jwk, upload=upload)
            if len(self._parsed) >= _MAX_PARSED:
                self._parsed.clear()
            self._parsed[key] = known
        return known

    def key(self, algorithm: Algorithm, at: datetime) -> SigningKey:
        """
        Return the key that signs.

        Raises:
            ServiceError: There is none (503); one is made at the start and in time afterwards.

        """
        row = signing_row(self.view.keys, algorithm, at)
        if row is None:
            raise ServiceError(
                "there is no key that signs now",
                status=503,
                error_code="ServiceUnavailable",
                retry_after=5,
            )
        return self.opened(row)

    def opened(self, row: KeyRow) -> SigningKey:
        """Return the key of *row*; opened once."""
        known = self._opened.get(row.kid)
        if known is None:
            known = self._opened[row.kid] = open_key(row, self._db.secrets)
        return known

    # ---- the start and the upkeep ------------------------------------------------------------

    async def start(self) -> bytes:
        """Prepare what all instances need; return the secret that authenticates nonces."""
        secret = await self._db.run(self._begin)
        await self.keep()
        return secret

    def _begin(self, tx: Transaction) -> bytes:
        register = self._registry.begin(tx)
        secret = self._secret(tx)
        # Who puts the whole database back leaves the log short, or this row shows an old serial.
        tx.audit(
            Event(
                action="attestation/start",
                decision="allowed",
                resource="/",
                details={"register": register.shown, **self._options.marks},
            )
        )
        self._first_signers(tx, register)
        if self._options.require_signed_use and not self.renewed(tx).isolated:
            raise ConfigurationError(
                "configuration: require_signed_use without policy signers protects nothing",
                expected="policy_signers, at the first start or at this one",
                found="none, neither in the configuration nor in the database",
            )
        self.renewed(tx)
        return secret

    def _secret(self, tx: Transaction) -> bytes:
        table = tables.secrets
        context = secret_context(_OF_NONCES)
        row = tx.connection.execute(
            select(table.c.protected).where(table.c.name == _OF_NONCES)
        ).first()
        if row is not None:
            return self._db.secrets.open(bytes(row[0]), context)
        secret = os.urandom(32)
        protected = self._db.secrets.protect(secret, context)
        tx.connection.execute(insert(table).values(name=_OF_NONCES, protected=protected))
        return secret

    def _first_signers(self, tx: Transaction, register: Register) -> None:
        if register.signers:
            return
        for pem in self._options.signers:
            certificate = Certificate.from_pem_chain(pem, limit=1)[0]
            try:
                demand_signing_key(certificate)
            except EvidenceFormatError as error:
                raise ConfigurationError(
                    f"configuration: policy_signers: {certificate.sha256.hex()} can sign nothing",
                    expected=error.expected,
                    found=error.found,
                ) from None
            register = self.add_signer(tx, certificate)
            tx.audit(
                Event(
                    action="attestation/certificates/add",
                    decision="allowed",
                    resource=f"/certificates/{certificate.sha256.hex()}",
                    rule="the configuration at the first start",
                    details={"register": register.shown},
                )
            )

    async def keep(self) -> None:
        """Make the keys that are missing or will be soon."""
        await self._db.run(self.renewed)
        options = self._options
        for algorithm in options.algorithms:
            now = options.clock()
            starts = self._missing(self.view.keys, algorithm, now)
            if starts is None:
                continue
            row = await asyncio.to_thread(
                make_key,
                algorithm,
                url=options.url,
                starts=starts,
                now=now,
                schedule=options.schedule,
                secrets=self._db.secrets,
            )
            await self._db.run(lambda tx, row=row: self._add(tx, row))  # type: ignore[misc]

    def _missing(
        self, rows: tuple[KeyRow, ...], algorithm: Algorithm, now: datetime
    ) -> datetime | None:
        alive = (row.starts for row in rows if row.algorithm == algorithm and now < row.expires)
        return self._options.schedule.next_start(alive, now)

    def _add(self, tx: Transaction, row: KeyRow) -> None:
        # Another instance may have been faster.
        if self._missing(self.renewed(tx).keys, row.algorithm, row.created) is not None:
            # The secrets may have been rotated since it was made, outside of any transaction.
            row = renewed_key(row, tx.secrets) or row
            register = self._registry.put(tx, tables.keys, key_values(row))
            tx.audit(
                Event(
                    action="attestation/keys/create",
                    decision="allowed",
                    resource=f"/certs/{row.kid}",
                    rule="the schedule of signing keys",
                    details={
                        "algorithm": row.algorithm,
                        "starts": row.starts.isoformat(),
                        "expires": row.expires.isoformat(),
                        "register": register.shown,
                    },
                )
            )
        self.renewed(tx)

    # ---- writing -----------------------------------------------------------------------------

    def set_policy(
        self, tx: Transaction, kind: str, *, text: str, upload: str, signer: Certificate | None
    ) -> Register:
        """Write the policy of an attestation type; return the register after it."""
        values = {
            "type": kind,
            "text": text,
            "upload": upload,
            "signer": "" if signer is None else _base64(signer.der),
            "updated": tx.now.isoformat(),
        }
        return self._registry.put(tx, tables.policies, values)

    def reset_policy(self, tx: Transaction, kind: str) -> Register:
        """Remove the policy of an attestation type: the default holds again."""
        return self._registry.remove(tx, tables.policies, kind)

    def add_signer(self, tx: Transaction, certificate: Certificate) -> Register:
        """Add a certificate that may sign policies."""
        values = {
            "sha256": hashlib.sha256(certificate.der).hexdigest(),
            "certificate": _base64(certificate.der),
            "added": tx.now.isoformat(),
        }
        register = self._registry.read(tx)
        if values["sha256"] in register.signers:
            return register
        return self._registry.put(tx, tables.signers, values)

    def remove_signer(self, tx: Transaction, certificate: Certificate) -> Register:
        """Remove such a certificate."""
        register = self._registry.read(tx)
        digest = hashlib.sha256(certificate.der).hexdigest()
        if digest not in register.signers:
            return register
        return self._registry.remove(tx, tables.signers, digest)

    def use_upload(self, tx: Transaction, digest: bytes, purpose: str) -> bool:
        """Note that an upload was taken, and what for; False if it was taken before."""
        return self._registry.take(tx, digest.hex(), purpose)


def secret_context(name: str) -> bytes:
    """Return what a named secret is protected for."""
    return f"attestation-secret {name}".encode("ascii")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
