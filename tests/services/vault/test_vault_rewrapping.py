"""Every key of a vault moves to a new key-encryption key, and stays what it was."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest
from sqlalchemy import select
from vault_parts import MemoryBackend, Table

from pyenclave.errors import ServiceError
from pyenclave.services.storage import Database
from pyenclave.services.storage.tables import audit
from pyenclave.services.vault.backends.base import KeySpec
from pyenclave.services.vault.backends.enclave import EnclaveBackend
from pyenclave.services.vault.decisions import Decisions
from pyenclave.services.vault.desk import Desk
from pyenclave.services.vault.records import KeyRecord, Place, Retention, context_of
from pyenclave.services.vault.rewrapping import rewrap_keys
from pyenclave.services.vault.store import KeyStore
from pyenclave.services.vault.tables import PART


def _desk(db: Database, backend: EnclaveBackend | MemoryBackend) -> Desk:
    return Desk(
        db=db,
        store=KeyStore(db.secrets, Retention()),
        decisions=Decisions(Table()),
        backend=backend,
        secrets=db.secrets,
        place=Place("https://vault.example"),
    )


async def _add(desk: Desk, name: str, version: str) -> KeyRecord:
    context = context_of(
        name, version, "oct", exportable=False, release_policy=None, immutable=False
    )
    made = await desk.backend.generate(KeySpec(kty="oct"), context)
    record = KeyRecord(
        name=name, version=version, kty="oct", key_ops=("sign",), public={}, wrapped=made.wrapped
    )
    await desk.db.run(lambda tx: desk.store.add(tx, record))
    return record


async def _mac(desk: Desk, record: KeyRecord) -> bytes:
    fields = {"value": b"digest"}
    answer = await desk.backend.perform(record.wrapped, record.context(), "sign", "HS256", fields)
    return answer["value"]


def test_every_version_is_moved_and_deleted_keys_too(tmp_path: Path, enclave_state: Path) -> None:
    """More than a page of them; a second run finds nothing; one that changed meanwhile is left."""

    async def work(db: Database) -> None:
        desk = _desk(db, EnclaveBackend(enclave_state))
        try:
            before = [await _add(desk, f"key-{place % 3}", f"{place:032x}") for place in range(60)]
            macs = {(r.name, r.version): await _mac(desk, r) for r in before}
            await db.run(lambda tx: desk.store.delete(tx, "key-1"))
            assert await rewrap_keys(desk) == 60
            after = await db.run(lambda tx: desk.store.page_of_all(tx, ("", ""), 100))
            keks = {record.wrapped[8:24] for record in after}
            assert len(after) == 60
            assert len(keks) == 1
            assert keks.isdisjoint(record.wrapped[8:24] for record in before)
            for record in after:
                assert await _mac(desk, record) == macs[record.name, record.version]
            assert await rewrap_keys(desk, rotate=False) == 0
            # A version that somebody changed since it was read keeps what he wrote.
            await desk.db.run(lambda tx: desk.store.change(tx, after[0]))
            wrote = await db.run(lambda tx: desk.store.rewrapped(tx, after[0], b"other"))
            assert not wrote
            rows = await db.run(lambda tx: tx.connection.execute(select(audit.c.body)).all())
            events = [json.loads(row.body) for row in rows]
            told = [event for event in events if event["action"] == "vault/kek/moved"]
            assert [event["details"]["moved"] for event in told] == [60]
            assert told[0]["details"]["kek"] == keks.pop().hex()
        finally:
            await desk.backend.close()

    with Database.open(f"sqlite:///{tmp_path / 'vault.db'}", parts=[PART]) as db:
        asyncio.run(work(db))


def test_a_backend_without_such_keys_says_so() -> None:
    """A token's keys are its owner's to replace."""
    with Database.open(parts=[PART]) as db:
        desk = dataclasses.replace(_desk(db, MemoryBackend()))
        with pytest.raises(ServiceError, match="no key-encryption key to replace"):
            asyncio.run(rewrap_keys(desk))
