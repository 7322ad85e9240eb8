"""
Deciding and writing it down: whoever asks, for what, and what became of it.

A decision is made inside a transaction and its audit row belongs to that transaction. One who may
not touch a key is told the same whether there is such a key or not: rights are looked at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, Protocol

from pyenclave.errors import ServiceError
from pyenclave.services.audit import Event
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage.transaction import Refused, Transaction
from pyenclave.services.web.kit import Call

__all__ = [
    "CHANGED", "Asked", "Decisions", "Rights", "changed_meanwhile", "conflict", "forbidden",
    "key_not_found",
]  # fmt: skip

CHANGED: Final = "the key changed meanwhile"  # a condition of the audit log
_ACTION: Final = "Microsoft.KeyVault/vaults/"


@dataclass(frozen=True, slots=True)
class Asked:
    """
    One request, as decisions and the audit log see it.

    Attributes:
        caller: Who asks.
        action: Key Vault's data action without the part before ``keys/``: ``keys/read``.
        resource: ``/keys/NAME``, ``/keys/NAME/VERSION`` or ``/``.
        scope: What rights are looked for: ``/keys/NAME`` or ``/``.
        verb: What exactly was asked, where several share an action.
        request_id: The request's.
        rule: What allows or refuses it, if that is not a role.
    """

    caller: Caller
    action: str
    resource: str
    scope: str
    verb: str
    request_id: str
    rule: str = ""

    @classmethod
    def of(
        cls, call: Call, action: str, name: str = "", version: str = "", verb: str = ""
    ) -> Asked:
        """Return what *call* asks of the key *name*, or of the vault."""
        scope = f"/keys/{name}" if name else "/"
        resource = f"{scope}/{version}" if version else scope
        return cls(call.require_caller(), action, resource, scope, verb or action, call.request_id)

    def event(
        self,
        decision: Literal["allowed", "refused", "failed"],
        details: Mapping[str, Any] | None = None,
        **members: Any,
    ) -> Event:
        """Return the audit event of this request."""
        return Event(
            action=self.verb,
            decision=decision,
            caller=self.caller.name,
            resource=members.pop("resource", self.resource),
            rule=self.rule or _ACTION + self.action,
            token_id=self.caller.token_digest,
            request_id=self.request_id,
            details=details,
            **members,
        )

    def refuse(self, error: ServiceError, condition: str = "", **members: Any) -> NoReturn:
        """Refuse, with a row of the audit log that stays."""
        members.setdefault("expected", error.expected)
        members.setdefault("found", error.found)
        raise Refused(error, self.event("refused", condition=condition, **members))

    def fail(self, error: ServiceError, condition: str = "", **members: Any) -> NoReturn:
        """Say that it could not be done, with a row of the audit log that stays."""
        raise Refused(error, self.event("failed", condition=condition, **members))


class Rights(Protocol):
    """What knows who may do what; `pyenclave.services.identity.rbac.Rbac` does."""

    def check(self, tx: Transaction, caller: Caller, action: str, scope: str) -> None:
        """Raise ServiceError 403 unless *caller* may do *action* on *scope*."""


class Decisions:
    """
    Looks for rights.

    Args:
        rights: The assignments.
    """

    def __init__(self, rights: Rights) -> None:
        self._rights = rights

    def authorise(self, tx: Transaction, asked: Asked) -> None:
        """
        Go on only if the caller has the right.

        Raises:
            Refused: 403.

        """
        try:
            self._rights.check(tx, asked.caller, _ACTION + asked.action, asked.scope)
        except ServiceError as error:
            asked.refuse(error, "role assignment", expected=_ACTION + asked.action)


def key_not_found(name: str) -> ServiceError:
    """Return the error of a key that is not there, for one who may know it."""
    return ServiceError(
        f"A key with (name/id) {name} was not found in this key vault. If you recently deleted "
        "this key you may be able to recover it using the correct recovery command.",
        status=404,
        error_code="KeyNotFound",
    )


def conflict(name: str) -> ServiceError:
    """Return the error of a name that a deleted key still holds."""
    return ServiceError(
        f"Key {name} is currently in a deleted but recoverable state, and its name cannot be "
        "reused; in this state, the key can only be recovered or purged.",
        status=409,
        error_code="Conflict",
        inner="ObjectIsDeletedButRecoverable",
    )


def changed_meanwhile() -> ServiceError:
    """Return the error of a key that somebody changed between a request's decision and its end."""
    return ServiceError(
        "The key was changed while the request was served; nothing was done. Ask again.",
        status=409,
        error_code="Conflict",
        inner="KeyChanged",
    )


def forbidden(message: str, inner: str) -> ServiceError:
    """Return the error of a key that may not be used so, or not now."""
    return ServiceError(message, status=403, error_code="Forbidden", inner=inner)
