"""Handlers: keys are made, imported, read, listed and changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from pyenclave.errors import ServiceError
from pyenclave.formats.release_policy import ReleasePolicy
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.decisions import Asked
from pyenclave.services.vault.desk import (
    Desk,
    Draft,
    answer_of,
    json_answer,
    name_of,
    version_of,
    with_policy,
)
from pyenclave.services.vault.fields import bad_parameter
from pyenclave.services.vault.paging import Pager
from pyenclave.services.vault.records import KeyRecord, Place, item
from pyenclave.services.vault.requests import (
    CreateRequest,
    ImportRequest,
    UpdateRequest,
    check_operations,
    check_times,
)
from pyenclave.services.web.kit import Answer, Call, Service

__all__ = ["KeyHandlers"]

_ATTEMPTS: Final = 5
_POLICY_TEXT: Final = 1_500  # characters of a policy in the audit log


class KeyHandlers:
    """
    The part of the interface that keeps keys.

    Args:
        desk: The vault's parts.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.pager = Pager(desk.secrets, desk.place)

    def routes(self, service: Service) -> None:
        """Add the routes."""
        service.route("POST", "/keys/{name}/create", self.create)
        service.route("PUT", "/keys/{name}", self.import_)
        for path in ("/keys/{name}", "/keys/{name}/", "/keys/{name}/{version}"):
            service.route("GET", path, self.get)
            service.route("PATCH", path, self.update)
        for path in ("/keys", "/keys/"):  # clients for .NET end it with a slash
            service.route("GET", path, self.list_keys)
        service.route("GET", "/keys/{name}/versions", self.list_versions)

    async def create(self, call: Call) -> Answer:
        """Make a key, or another version of it."""
        name = name_of(call)
        request = CreateRequest.read(call.json())
        asked = Asked.of(call, "keys/create/action", name, verb="keys/create")

        def plan(tx: Transaction) -> Draft:
            return self._plan(tx, asked, name, request, request.spec.kty, request.spec.size)

        draft = await self._desk.db.run(plan)
        making = self._desk.backend.generate(request.spec, draft.context())
        material = await self._desk.done(asked, making)
        return await self._commit(asked, draft, lambda now: draft.record(material, now))

    async def import_(self, call: Call) -> Answer:
        """Take a key that was made elsewhere."""
        name = name_of(call)
        request = ImportRequest.read(call.json())
        asked = Asked.of(call, "keys/import/action", name, verb="keys/import")

        def plan(tx: Transaction) -> Draft:
            return self._plan(tx, asked, name, request, request.kty, request.size)

        draft = await self._desk.db.run(plan)
        taking = self._desk.backend.import_key(request.jwk, draft.context())
        material = await self._desk.done(asked, taking)
        return await self._commit(asked, draft, lambda now: draft.record(material, now))

    def _plan(
        self,
        tx: Transaction,
        asked: Asked,
        name: str,
        request: CreateRequest | ImportRequest,
        kty: str,
        size: int | None,
    ) -> Draft:
        self._desk.decisions.authorise(tx, asked)
        previous = self._desk.check_room(tx, asked, name)
        return Draft.plan(
            name,
            kty=kty,
            size=size,
            key_ops=request.key_ops,
            attributes=request.attributes,
            policy=request.policy,
            tags=request.tags,
            previous=previous,
        )

    async def _commit(self, asked: Asked, draft: Draft, made: Callable[[int], KeyRecord]) -> Answer:
        def commit(tx: Transaction) -> KeyRecord:
            # Again: between the two transactions the world may have changed.
            self._desk.decisions.authorise(tx, asked)
            self._desk.check_room(tx, asked, draft.name)
            record = made(int(tx.now.timestamp()))
            self._desk.store.add(tx, record)
            details = details_of(record, self._desk.place)
            tx.audit(asked.event("allowed", details, resource=resource_of(record)))
            return record

        return json_answer(self._desk.shown(await self._desk.stored(commit)))

    async def get(self, call: Call) -> Answer:
        """Show a key."""
        name, version = name_of(call), version_of(call)
        asked = Asked.of(call, "keys/read", name, version)

        def read(tx: Transaction) -> bytes:
            self._desk.decisions.authorise(tx, asked)
            body = tx.cached(
                ("vault-shown", name, version),
                lambda: answer_of(self._desk.shown(self._desk.find(tx, asked, name, version))),
            )
            tx.audit(asked.event("allowed"))
            return body

        return Answer(await self._desk.db.run(read))

    async def update(self, call: Call) -> Answer:
        """Change what may be changed of a key."""
        name, version = name_of(call), version_of(call)
        request = UpdateRequest.read(call.json())
        asked = Asked.of(call, "keys/update/action", name, version, verb="keys/update")
        for _ in range(_ATTEMPTS):
            stored = await self._updated(asked, request, name)
            if stored is not None:
                return json_answer(self._desk.shown(stored))
        raise ServiceError(
            "The key is being changed by others; try again.",
            status=409,
            error_code="Conflict",
            retry_after=1,
        )

    async def _updated(self, asked: Asked, request: UpdateRequest, name: str) -> KeyRecord | None:
        """Return the changed version, None if somebody else changed it meanwhile."""
        desk = self._desk
        before = await desk.db.run(lambda tx: self._checked(tx, asked, request, name))
        after = _changed(before, request)
        if after.context() != before.context():
            binding = desk.backend.rebind(before.wrapped, before.context(), after.context())
            wrapped = await desk.done(asked, binding)
            after = replace(after, wrapped=wrapped)
        return await desk.stored(lambda tx: self._store(tx, asked, before, after))

    def _checked(
        self, tx: Transaction, asked: Asked, request: UpdateRequest, name: str
    ) -> KeyRecord:
        self._desk.decisions.authorise(tx, asked)
        version = asked.resource[len(asked.scope) + 1 :]
        record = self._desk.find(tx, asked, name, version)
        exportable = request.attributes.exportable
        if exportable is not None and exportable != record.exportable:
            asked.refuse(
                bad_parameter("AKV.SKR.1003: The exportable attribute of a key cannot be changed."),
                "exportable stays",
                expected=record.exportable,
                found=exportable,
            )
        policy = request.policy
        if policy is not None and not record.exportable:
            asked.refuse(
                bad_parameter("AKV.SKR.1005: Non-exportable keys must not have release policy."),
                "exportable",
                expected=True,
                found=False,
            )
        if policy is not None and record.immutable and policy.data != record.release_policy:
            asked.refuse(
                bad_parameter("AKV.SKR.1020: Immutable Key Release Policy cannot be modified."),
                "the policy is mutable",
                expected=True,
                found=False,
            )
        return record

    def _store(
        self, tx: Transaction, asked: Asked, before: KeyRecord, after: KeyRecord
    ) -> KeyRecord | None:
        self._desk.decisions.authorise(tx, asked)
        now = self._desk.find(tx, asked, before.name, before.version)
        if now.revision != before.revision:
            return None
        stored = self._desk.store.change(tx, after)
        changed = [
            name
            for name in KeyRecord.__slots__
            if name not in ("updated", "revision", "wrapped")
            and getattr(before, name) != getattr(stored, name)
        ]
        details = details_of(stored, self._desk.place) | {"changed": changed}
        tx.audit(asked.event("allowed", details, resource=resource_of(stored)))
        return stored

    async def list_keys(self, call: Call) -> Answer:
        """List the keys."""
        asked = Asked.of(call, "keys/read", verb="keys/list")
        after, limit = self.pager.start(call.query, call.path, asked.caller)

        def read(tx: Transaction) -> list[KeyRecord]:
            self._desk.decisions.authorise(tx, asked)
            tx.audit(asked.event("allowed"))
            return self._desk.intact(
                asked, lambda: self._desk.store.page_of_keys(tx, after, limit + 1)
            )

        records = await self._desk.db.run(read)
        items = [
            item(record, self._desk.place.base, self._desk.retention, versioned=False)
            for record in records[:limit]
        ]
        last = records[limit - 1].name if len(records) > limit else ""
        return self.page(call, asked.caller, items, limit, last)

    async def list_versions(self, call: Call) -> Answer:
        """List the versions of a key."""
        name = name_of(call)
        asked = Asked.of(call, "keys/read", name, verb="keys/versions")
        text, limit = self.pager.start(call.query, call.path, asked.caller)

        def read(tx: Transaction) -> list[tuple[int, KeyRecord]]:
            self._desk.decisions.authorise(tx, asked)
            tx.audit(asked.event("allowed"))
            return self._desk.intact(
                asked,
                lambda: self._desk.store.page_of_versions(tx, name, int(text or 0), limit + 1),
            )

        records = await self._desk.db.run(read)
        items = [
            item(record, self._desk.place.base, self._desk.retention, versioned=True)
            for _, record in records[:limit]
        ]
        last = str(records[limit - 1][0]) if len(records) > limit else ""
        return self.page(call, asked.caller, items, limit, last)

    def page(
        self, call: Call, caller: Caller, items: list[dict[str, Any]], limit: int, last: str
    ) -> Answer:
        """Return one page of a list; *last* is where it ended, "" if there is no more."""
        link = None
        if last:
            link = self.pager.next_link(call.path, caller, call.api_version, limit, last)
        return json_answer({"value": items, "nextLink": link})


def resource_of(record: KeyRecord) -> str:
    """Return the name of a version in the audit log."""
    return f"/keys/{record.name}/{record.version}"


def details_of(record: KeyRecord, place: Place) -> dict[str, Any]:
    """Return what a reviewer wants to know of a version that was made or changed."""
    details: dict[str, Any] = {
        "vault": place.base,
        "kty": record.kty,
        "key_ops": list(record.key_ops),
        "enabled": record.enabled,
        "exportable": record.exportable,
    }
    if record.release_policy is not None:
        details |= {
            "policy": policy_digest(record.release_policy),
            "policy_text": policy_text(record.release_policy),
            "immutable": record.immutable,
        }
    return details


def policy_text(policy: bytes) -> str:
    """Return a release policy as a line for reviewers, cut where it is very long."""
    text = str(ReleasePolicy.from_json(policy))
    return text if len(text) <= _POLICY_TEXT else f"{text[: _POLICY_TEXT - 1]}…"


def policy_digest(policy: bytes) -> str:
    """Return the SHA-256 of a release policy, in hexadecimal."""
    return hashlib.sha256(policy).hexdigest()


def _changed(record: KeyRecord, request: UpdateRequest) -> KeyRecord:
    """Return *record* as *request* wants it."""
    wanted = request.attributes
    after = replace(
        record,
        enabled=record.enabled if wanted.enabled is None else wanted.enabled,
        not_before=record.not_before if wanted.not_before is None else wanted.not_before,
        expires=record.expires if wanted.expires is None else wanted.expires,
        key_ops=record.key_ops if request.key_ops is None else request.key_ops,
        tags=record.tags if request.tags is None else request.tags,
    )
    check_times(after.not_before, after.expires)
    if request.key_ops is not None:
        check_operations(request.key_ops, record.kty)
    # An immutable policy was given again, or the caller was refused: it stays immutable.
    return after if record.immutable else with_policy(after, request.policy)
