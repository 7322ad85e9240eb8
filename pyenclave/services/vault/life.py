"""Handlers: deleted keys, backups, rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from pyenclave.errors import ServiceError
from pyenclave.formats.jose import b64url_encode
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault import keks
from pyenclave.services.vault.backends.base import KeySpec, Rewraps, kek_of
from pyenclave.services.vault.backup import MAX_BACKUP, pack, unpack
from pyenclave.services.vault.decisions import CHANGED, Asked, changed_meanwhile, conflict
from pyenclave.services.vault.desk import Desk, Draft, json_answer, name_of
from pyenclave.services.vault.fields import Fields, bad_parameter
from pyenclave.services.vault.keys import KeyHandlers, details_of, resource_of
from pyenclave.services.vault.records import (
    Deletion,
    KeyRecord,
    deleted_bundle,
    deleted_item,
    key_id,
)
from pyenclave.services.vault.rotation_policy import RotationPolicy
from pyenclave.services.vault.store import MAX_VERSIONS, StoredRotation
from pyenclave.services.web.kit import Answer, Call, Service

__all__ = ["LifeHandlers", "rotate"]

_OVERHEAD: Final = 256  # bytes that protection adds to a backup


class LifeHandlers:
    """
    The part of the interface that ends keys and brings them back.

    Args:
        desk: The vault's parts.
        keys: The handlers of lists.
    """

    def __init__(self, desk: Desk, keys: KeyHandlers) -> None:
        self._desk = desk
        self._keys = keys

    def routes(self, service: Service) -> None:
        """Add the routes."""
        service.route("DELETE", "/keys/{name}", self.delete)
        for path in ("/deletedkeys", "/deletedkeys/"):
            service.route("GET", path, self.list_deleted)
        service.route("GET", "/deletedkeys/{name}", self.get_deleted)
        service.route("DELETE", "/deletedkeys/{name}", self.purge)
        service.route("POST", "/deletedkeys/{name}/recover", self.recover)
        service.route("POST", "/keys/{name}/backup", self.backup)
        service.route("POST", "/keys/restore", self.restore)
        service.route("POST", "/keys/{name}/rotate", self.rotate)
        service.route("GET", "/keys/{name}/rotationpolicy", self.get_rotation)
        service.route("PUT", "/keys/{name}/rotationpolicy", self.set_rotation)

    def _shown(self, found: tuple[KeyRecord, Deletion]) -> dict[str, Any]:
        record, deletion = found
        return deleted_bundle(record, deletion, self._desk.place.base, self._desk.retention)

    async def delete(self, call: Call) -> Answer:
        """Delete a key; it can be recovered until its retention ends."""
        name = name_of(call)
        asked = Asked.of(call, "keys/delete", name)

        def work(tx: Transaction) -> tuple[KeyRecord, Deletion]:
            self._desk.decisions.authorise(tx, asked)
            record = self._desk.find(tx, asked, name)
            deletion = self._desk.store.delete(tx, name)
            tx.audit(asked.event("allowed", {"purge": deletion.scheduled_purge}))
            return record, deletion

        return json_answer(self._shown(await self._desk.db.run(work)))

    def _deleted(self, tx: Transaction, asked: Asked, name: str) -> tuple[KeyRecord, Deletion]:
        found = self._desk.intact(asked, lambda: self._desk.store.find_deleted(tx, name))
        if found is None:
            missing = ServiceError(
                f"Deleted Key not found: {name}", status=404, error_code="KeyNotFound"
            )
            asked.refuse(missing, "the deleted key exists", expected=True, found=False)
        return found

    async def get_deleted(self, call: Call) -> Answer:
        """Show a deleted key."""
        name = name_of(call)
        asked = Asked.of(call, "keys/read", name, verb="deletedkeys/read")

        def work(tx: Transaction) -> tuple[KeyRecord, Deletion]:
            self._desk.decisions.authorise(tx, asked)
            found = self._deleted(tx, asked, name)
            tx.audit(asked.event("allowed"))
            return found

        return json_answer(self._shown(await self._desk.db.run(work)))

    async def list_deleted(self, call: Call) -> Answer:
        """List the deleted keys."""
        asked = Asked.of(call, "keys/read", verb="deletedkeys/list")
        after, limit = self._keys.pager.start(call.query, call.path, asked.caller)

        def work(tx: Transaction) -> list[tuple[KeyRecord, Deletion]]:
            self._desk.decisions.authorise(tx, asked)
            tx.audit(asked.event("allowed"))
            return self._desk.intact(
                asked, lambda: self._desk.store.page_of_deleted(tx, after, limit + 1)
            )

        found = await self._desk.db.run(work)
        items = [
            deleted_item(record, deletion, self._desk.place.base, self._desk.retention)
            for record, deletion in found[:limit]
        ]
        last = found[limit - 1][0].name if len(found) > limit else ""
        return self._keys.page(call, asked.caller, items, limit, last)

    async def purge(self, call: Call) -> Answer:
        """End a deleted key for good."""
        name = name_of(call)
        asked = Asked.of(call, "keys/purge/action", name, verb="keys/purge")

        def work(tx: Transaction) -> None:
            self._desk.decisions.authorise(tx, asked)
            self._deleted(tx, asked, name)
            if self._desk.retention.purge_protection:
                protected = ServiceError(
                    "Operation purge is not allowed: the vault has purge protection.",
                    status=403,
                    error_code="Forbidden",
                    inner="PurgeProtectionEnabled",
                )
                asked.refuse(protected, "no purge protection", expected=False, found=True)
            self._desk.store.purge(tx, name)
            tx.audit(asked.event("allowed"))

        await self._desk.db.run(work)
        return Answer(status=204)

    async def recover(self, call: Call) -> Answer:
        """Bring a deleted key back."""
        name = name_of(call)
        asked = Asked.of(call, "keys/recover/action", name, verb="keys/recover")

        def work(tx: Transaction) -> KeyRecord:
            self._desk.decisions.authorise(tx, asked)
            record, _ = self._deleted(tx, asked, name)
            self._desk.store.recover(tx, name)
            tx.audit(asked.event("allowed"))
            return record

        return json_answer(self._desk.shown(await self._desk.db.run(work)))

    async def backup(self, call: Call) -> Answer:
        """Return all versions of a key, protected."""
        name = name_of(call)
        asked = Asked.of(call, "keys/backup/action", name, verb="keys/backup")

        def work(tx: Transaction) -> tuple[list[KeyRecord], RotationPolicy | None]:
            self._desk.decisions.authorise(tx, asked)
            self._desk.find(tx, asked, name)
            found = self._desk.intact(
                asked, lambda: self._desk.store.page_of_versions(tx, name, 0, MAX_VERSIONS)
            )
            rotation = self._desk.store.rotation(tx, name)
            tx.audit(asked.event("allowed", {"versions": len(found)}))
            policy = None if rotation.created is None else rotation.policy
            return [record for _, record in found], policy

        records, policy = await self._desk.db.run(work)
        return json_answer({"value": b64url_encode(pack(self._desk.secrets, records, policy))})

    async def restore(self, call: Call) -> Answer:
        """Bring a key back from its backup."""
        fields = Fields(call.json())
        blob = fields.need_data("value", longest=MAX_BACKUP + _OVERHEAD, shortest=1)
        # Rights on the whole vault, as Azure wants them: the name is inside the blob.
        asked = Asked.of(call, "keys/restore/action", verb="keys/restore")
        await self._desk.db.run(lambda tx: self._desk.decisions.authorise(tx, asked))
        records, policy = unpack(self._desk.secrets, blob)
        records = await self._rewrapped(asked, records)
        name = records[0].name

        def work(tx: Transaction) -> KeyRecord:
            self._desk.decisions.authorise(tx, asked)
            state = self._desk.store.taken(tx, name)
            if state == "deleted":
                asked.refuse(conflict(name), "the name is free", found="deleted")
            if state is not None:
                taken = ServiceError(
                    f"The key {name} already exists.", status=409, error_code="Conflict"
                )
                asked.refuse(taken, "the name is free", found="active")
            for record in records:
                self._desk.store.add(tx, record)
            self._desk.store.restore_rotation(tx, name, policy)
            details = details_of(records[-1], self._desk.place) | {"versions": len(records)}
            tx.audit(asked.event("allowed", details, resource=resource_of(records[-1])))
            return records[-1]

        return json_answer(self._desk.shown(await self._desk.stored(work)))

    async def _rewrapped(self, asked: Asked, records: list[KeyRecord]) -> list[KeyRecord]:
        """Return records of a backup as the newest key-encryption key wraps them."""
        backend = self._desk.backend
        states = await self._desk.db.run(keks.states)
        if not states or not isinstance(backend, Rewraps):
            return records
        found = []
        for record in records:
            if states.get(kek_of(record.wrapped) or b"") == "destroyed":
                gone = bad_parameter(
                    "The backup was made under a key-encryption key that was destroyed."
                )
                await self._desk.db.run(
                    lambda tx, gone=gone: asked.refuse(gone, "the key-encryption key is there")  # type: ignore[misc]
                )
            wrapped = await self._desk.done(asked, backend.rewrap(record.wrapped, record.context()))
            found.append(record if wrapped is None else replace(record, wrapped=wrapped))
        return found

    async def rotate(self, call: Call) -> Answer:
        """Make the next version of a key."""
        name = name_of(call)
        asked = Asked.of(call, "keys/rotate/action", name, verb="keys/rotate")

        def work(tx: Transaction) -> tuple[KeyRecord, RotationPolicy]:
            self._desk.decisions.authorise(tx, asked)
            self._desk.check_room(tx, asked, name)
            record = self._desk.find(tx, asked, name)
            return record, self._desk.store.rotation(tx, name).policy

        previous, policy = await self._desk.db.run(work)
        made = await rotate(self._desk, asked, previous, policy, only_if_newest=False)
        if made is None:
            raise AssertionError("only a rotation by time may be overtaken")
        return json_answer(self._desk.shown(made))

    def _policy(self, name: str, stored: StoredRotation) -> dict[str, Any]:
        shown = stored.policy.shown()
        shown["id"] = key_id(self._desk.place.base, name) + "/rotationpolicy"
        if stored.created is not None:
            shown["attributes"] |= {"created": stored.created, "updated": stored.updated}
        return shown

    async def get_rotation(self, call: Call) -> Answer:
        """Show a key's rotation policy."""
        name = name_of(call)
        asked = Asked.of(call, "keyrotationpolicies/read", name)

        def work(tx: Transaction) -> StoredRotation:
            self._desk.decisions.authorise(tx, asked)
            self._desk.find(tx, asked, name)
            tx.audit(asked.event("allowed"))
            return self._desk.store.rotation(tx, name)

        return json_answer(self._policy(name, await self._desk.db.run(work)))

    async def set_rotation(self, call: Call) -> Answer:
        """Give a key a rotation policy."""
        name = name_of(call)
        policy = RotationPolicy.read(call.json())
        asked = Asked.of(call, "keyrotationpolicies/write", name)

        def work(tx: Transaction) -> StoredRotation:
            self._desk.decisions.authorise(tx, asked)
            self._desk.find(tx, asked, name)
            stored = self._desk.store.set_rotation(tx, name, policy)
            tx.audit(asked.event("allowed", policy.shown()))
            return stored

        return json_answer(self._policy(name, await self._desk.db.run(work)))


async def rotate(
    desk: Desk, asked: Asked, previous: KeyRecord, policy: RotationPolicy, *, only_if_newest: bool
) -> KeyRecord | None:
    """
    Make the version that follows *previous*.

    Args:
        desk: The vault's parts.
        asked: Whose request it is; the rights were looked at.
        previous: The newest version when it was read.
        policy: Says how long the new one lives.
        only_if_newest: The rotation policy asks, not a caller with rights of his own: do nothing
            if there is a newer version or another rotation policy meanwhile.

    Returns:
        The new version, None if nothing was done.

    Raises:
        ServiceError: 403 the caller lost the right meanwhile; 404 the key was deleted; 409 what
            the new version takes over, as the release policy, was changed.

    """
    draft = Draft.successor(previous)
    spec = KeySpec(kty=previous.kty, size=previous.size, crv=previous.public.get("crv"))
    material = await desk.done(asked, desk.backend.generate(spec, draft.context()))

    def commit(tx: Transaction) -> KeyRecord | None:
        if not only_if_newest:
            desk.decisions.authorise(tx, asked)
        newest = desk.check_room(tx, asked, previous.name)
        if only_if_newest and (
            newest is None
            or newest.version != previous.version
            or desk.store.rotation(tx, previous.name).policy != policy
        ):
            return None
        if newest is None:
            newest = desk.find(tx, asked, previous.name)
        same = replace(Draft.successor(newest), version=draft.version) == draft
        if not same or newest.public.get("crv") != spec.crv:
            asked.refuse(changed_meanwhile(), CHANGED)
        now = int(tx.now.timestamp())
        record = replace(draft.record(material, now), expires=policy.expires(now))
        desk.store.add(tx, record)
        details = details_of(record, desk.place) | {"after": previous.version}
        tx.audit(asked.event("allowed", details, resource=resource_of(record)))
        return record

    return await desk.stored(commit)
