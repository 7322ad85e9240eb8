"""What a vault does by itself: new versions by rotation policies, the end of deleted keys."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final

from pyenclave.errors import ServiceError
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.decisions import Asked
from pyenclave.services.vault.desk import Desk
from pyenclave.services.vault.life import rotate
from pyenclave.services.vault.records import KeyRecord
from pyenclave.services.vault.rotation_policy import RotationPolicy, Trigger
from pyenclave.services.vault.store import MAX_VERSIONS

__all__ = ["Caretaker"]

_LOG: Final = logging.getLogger("pyenclave.vault")
_PAGE: Final = 100  # keys of one transaction
_VAULT: Final = Caller(
    tenant="pyenclave",
    object_id="vault",
    client_id=None,
    kind="app",
    token_digest="",
    expires=float("inf"),
)


def _asked(action: str, name: str, rule: str) -> Asked:
    return Asked(_VAULT, action, f"/keys/{name}", f"/keys/{name}", action, "", rule)


def _moment(trigger: Trigger | None, record: KeyRecord) -> int | None:
    return None if trigger is None else trigger.moment(record.created, record.expires)


class Caretaker:
    """
    Looks after keys every few seconds. Several instances on one database do everything once.

    Args:
        desk: The vault's parts.
        interval: Seconds between two rounds.
    """

    def __init__(self, desk: Desk, *, interval: float = 30.0) -> None:
        self._desk = desk
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin."""
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name="vault-caretaker")

    async def close(self) -> None:
        """End; a round that runs is given up between two of its transactions."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _serve(self) -> None:
        try:
            # A backend that starts when it is first asked starts now, not with somebody's request.
            await self._desk.backend.random(1)
        except ServiceError as error:
            _LOG.warning("the vault's backend does not answer: %s", error)
        while True:
            try:
                await self.round()
            except ServiceError as error:
                _LOG.warning("a round of the vault's caretaker ended early: %s", error)
            await asyncio.sleep(self._interval)

    async def round(self) -> None:
        """Do what is due now."""
        await self._purge()
        after: str | None = ""
        while after is not None:
            after = await self._rotate(after)

    async def _rotate(self, after: str) -> str | None:
        """Look after the keys that follow *after*; return the last one, None at the end."""
        store = self._desk.store
        keys = await self._desk.db.run(lambda tx: store.with_rotation(tx, after, _PAGE))
        for record, policy, notified in keys:
            await self._look_after(record, policy, notified)
        return keys[-1][0].name if len(keys) == _PAGE else None

    async def _purge(self) -> None:
        def work(tx: Transaction) -> Sequence[str]:
            names = self._desk.store.overdue(tx, _PAGE)
            for name in names:
                self._desk.store.purge(tx, name)
                tx.audit(_asked("keys/purge", name, "the retention is over").event("allowed"))
            return names

        while len(await self._desk.db.run(work)) == _PAGE:
            pass

    async def _look_after(
        self, record: KeyRecord, policy: RotationPolicy, notified: str | None
    ) -> None:
        now = await self._desk.db.run(lambda tx: int(tx.now.timestamp()))
        notice = _moment(policy.notify, record)
        if notice is not None and notice <= now and notified != record.version:
            await self._desk.db.run(lambda tx: self._notify(tx, record))
        moment = _moment(policy.rotate, record)
        if moment is None or moment > now or not record.enabled:
            return
        if await self._desk.db.run(lambda tx: self._desk.store.count(tx, record.name)) >= (
            MAX_VERSIONS
        ):
            _LOG.warning("key %s has %d versions and is not rotated", record.name, MAX_VERSIONS)
            return
        asked = _asked("keys/rotate", record.name, "the rotation policy")
        try:
            await rotate(self._desk, asked, record, policy, only_if_newest=True)
        except ServiceError as error:
            # It is due at the next round, too.
            _LOG.warning("key %s could not be rotated: %s", record.name, error)

    def _notify(self, tx: Transaction, record: KeyRecord) -> None:
        self._desk.store.set_notified(tx, record)
        event = _asked("keys/nearexpiry", record.name, "the rotation policy").event(
            "allowed", {"version": record.version, "exp": record.expires}
        )
        tx.audit(event)
