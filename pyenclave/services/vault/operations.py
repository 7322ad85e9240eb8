"""Handlers: keys are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pyenclave.formats.jose import b64url_encode
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.algorithms import OPERATION_NAMES, CryptoRequest
from pyenclave.services.vault.backends.base import MAX_RANDOM, Operation
from pyenclave.services.vault.decisions import Asked, forbidden
from pyenclave.services.vault.desk import OF_A_KEY, Desk, json_answer, name_of, version_of
from pyenclave.services.vault.fields import Fields, bad_parameter
from pyenclave.services.vault.records import KeyRecord, key_id
from pyenclave.services.web.kit import Answer, Call, Handler, Service

__all__ = ["OperationHandlers", "check_usable"]

_ACTIONS: Final[Mapping[Operation, str]] = {
    "encrypt": "keys/encrypt/action",
    "decrypt": "keys/decrypt/action",
    "sign": "keys/sign/action",
    "verify": "keys/verify/action",
    "wrapKey": "keys/wrap/action",
    "unwrapKey": "keys/unwrap/action",
}
# What was made while a key was valid can be read and checked for ever, as in Azure.
_ALWAYS: Final = frozenset({"decrypt", "unwrapKey", "verify"})


def check_usable(asked: Asked, record: KeyRecord, verb: str, now: int, *, always: bool) -> None:
    """
    Refuse a key that is switched off or outside of its time.

    Args:
        asked: The request.
        record: The key.
        verb: What is to be done, for the message.
        now: Unix time in seconds.
        always: The time does not matter.

    Raises:
        Refused: 403.

    """
    if not record.enabled:
        asked.refuse(
            forbidden(f"Operation {verb} is not allowed on a disabled key.", "KeyDisabled"),
            "enabled",
            expected=True,
            found=False,
        )
    if always:
        return
    if record.not_before is not None and now < record.not_before:
        asked.refuse(
            forbidden(
                f"Operation {verb} is not allowed on a key before its time.", "KeyNotYetValid"
            ),
            "nbf",
            expected=f"{record.not_before} or later",
            found=now,
        )
    if record.expires is not None and now >= record.expires:
        asked.refuse(
            forbidden(f"Operation {verb} is not allowed on an expired key.", "KeyExpired"),
            "exp",
            expected=f"before {record.expires}",
            found=now,
        )


class OperationHandlers:
    """
    The part of the interface that uses keys.

    Args:
        desk: The vault's parts.
        allow_sha1: RSA-OAEP (SHA-1) and RSA1_5 are allowed, too.
    """

    def __init__(self, desk: Desk, *, allow_sha1: bool) -> None:
        self._desk = desk
        self._sha1 = allow_sha1

    def routes(self, service: Service) -> None:
        """Add the routes."""
        for word, operation in OPERATION_NAMES.items():
            for path in OF_A_KEY:
                service.route("POST", path + word, self._handler(operation))
        service.route("POST", "/rng", self.random)

    def _handler(self, operation: Operation) -> Handler:
        async def handle(call: Call) -> Answer:
            return await self.perform(call, operation)

        return handle

    async def perform(self, call: Call, operation: Operation) -> Answer:
        """Use a key."""
        name, version = name_of(call), version_of(call)
        request = CryptoRequest.read(operation, call.json(), sha1=self._sha1)
        asked = Asked.of(call, _ACTIONS[operation], name, version, verb=f"keys/{operation}")

        def decide(tx: Transaction) -> KeyRecord:
            self._desk.decisions.authorise(tx, asked)
            record = self._desk.find(tx, asked, name, version)
            now = int(tx.now.timestamp())
            check_usable(asked, record, operation, now, always=operation in _ALWAYS)
            if operation not in record.key_ops:
                asked.refuse(
                    forbidden(
                        f"Operation {operation} is not permitted on this key.",
                        "KeyOperationForbidden",
                    ),
                    "key_ops",
                    expected=operation,
                    found=list(record.key_ops),
                )
            request.check_key(record)
            details = {"alg": request.algorithm}
            tx.audit(asked.event("allowed", details, resource=f"/keys/{name}/{record.version}"))
            return record

        record = await self._desk.db.run(decide)
        if request.hopeless(record):
            return json_answer({"value": False})
        # A wrong ciphertext tells an auditor of attempts on a key.
        using = self._desk.backend.perform(
            record.wrapped, record.context(), operation, request.algorithm, request.fields
        )
        result = await self._desk.done(
            asked,
            using,
            resource=f"/keys/{name}/{record.version}",
            details={"alg": request.algorithm},
        )
        if operation == "verify":
            return json_answer({"value": result["value"] == b"\x01"})
        shown = {member: b64url_encode(value) for member, value in result.items()}
        return json_answer({"kid": key_id(self._desk.place.base, name, record.version), **shown})

    async def random(self, call: Call) -> Answer:
        """Return random bytes."""
        count = Fields(call.json()).whole("count", least=1, most=MAX_RANDOM)
        if count is None:
            raise bad_parameter("Property count is missing.")
        asked = Asked.of(call, "rng/action", verb="rng")

        def decide(tx: Transaction) -> None:
            self._desk.decisions.authorise(tx, asked)
            tx.audit(asked.event("allowed", {"count": count}))

        await self._desk.db.run(decide)
        value = await self._desk.done(asked, self._desk.backend.random(count))
        return json_answer({"value": b64url_encode(value)})
