"""
Managed HSM's REST interface of role assignments and definitions.

``KeyVaultAccessControlClient`` of azure-keyvault-administration drives it unmodified. It writes the
scope into the path as it is, so that a path begins with one to three slashes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, Final, TypeVar

from pyenclave.errors import ServiceError
from pyenclave.services.audit.event import Event
from pyenclave.services.identity.rbac import Rbac, check_scope, guid
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.transaction import Refused, Transaction
from pyenclave.services.web.kit import Answer, Call, Service

__all__ = ["API_VERSIONS", "AccessControl"]

T = TypeVar("T")

API_VERSIONS: Final = (
    *("7.2", "7.3", "7.4", "7.5-preview.1", "7.5", "7.6-preview.1", "7.6-preview.2", "7.6"),
    *("2025-06-01-preview", "2025-07-01"),
)
_PREFIXES: Final = ("", "/", "//")
_SCOPES: Final = ("", "/keys", "/keys/{key}")
_ACTION: Final = "Microsoft.KeyVault/vaults/"
_DATA_ACTION: Final = re.compile(r"[A-Za-z0-9.*]{1,64}(?:/[A-Za-z0-9.*]{1,64}){0,8}")
_PRINCIPAL_FILTER: Final = re.compile(r"principalId eq '([\x21-\x26\x28-\x7e]{1,256})'")
_MAX_TEXT: Final = 1024


def _bad(message: str, found: object = None) -> ServiceError:
    return ServiceError(message, status=400, error_code="BadParameter", found=found)


class AccessControl:
    """
    The routes.

    Args:
        db: Opened with `rbac.PART` among its parts.
        rbac: The assignments.

    """

    def __init__(self, db: Database, rbac: Rbac) -> None:
        self._db = db
        self._rbac = rbac

    def routes(self, service: Service, *, api_versions: Collection[str] = API_VERSIONS) -> None:
        """Add them to *service*."""
        table = (
            ("GET", "roleAssignments", self.list_assignments),
            ("GET", "roleAssignments/{name}", self.get_assignment),
            ("PUT", "roleAssignments/{name}", self.put_assignment),
            ("DELETE", "roleAssignments/{name}", self.delete_assignment),
            ("GET", "roleDefinitions", self.list_definitions),
            ("GET", "roleDefinitions/{name}", self.get_definition),
            ("PUT", "roleDefinitions/{name}", self.put_definition),
            ("DELETE", "roleDefinitions/{name}", self.delete_definition),
        )
        for prefix in _PREFIXES:
            for scope in _SCOPES:
                for method, path, handler in table:
                    pattern = f"{prefix}{scope}/providers/Microsoft.Authorization/{path}"
                    service.route(method, pattern, handler, api_versions=api_versions)

    async def _do(
        self,
        call: Call,
        verb: str,
        work: Callable[[Transaction, str], T],
        *,
        details: dict[str, Any] | None = None,
    ) -> T:
        """Ask for the right, do *work* at the scope, and keep a row of it."""
        caller, scope = call.require_caller(), _scope_of(call)

        def event(decision: Any, **members: Any) -> Event:
            return Event(
                action=verb,
                decision=decision,
                caller=caller.name,
                resource=f"{scope} {call.params.get('name', '')}".strip(),
                rule=_ACTION + verb,
                token_id=caller.token_digest,
                request_id=call.request_id,
                details=details,
                **members,
            )

        def run(tx: Transaction) -> T:
            try:
                self._rbac.check(tx, caller, _ACTION + verb, scope)
            except ServiceError as error:
                raise Refused(
                    error, event("refused", condition="role assignment", expected=_ACTION + verb)
                ) from None
            try:
                done = work(tx, scope)
            except ServiceError as error:
                raise Refused(error, event("failed", condition=error.error_code)) from None
            tx.audit(event("allowed"))
            return done

        return await self._db.run(run)

    # ---- assignments ---------------------------------------------------------------------------

    async def list_assignments(self, call: Call) -> Answer:
        """Return the assignments at, above and below a scope."""
        wanted = call.query.get("$filter", "").strip()
        principal = _PRINCIPAL_FILTER.fullmatch(wanted)
        if wanted not in ("", "atScope()") and principal is None:
            raise _bad("$filter is atScope() or principalId eq 'ID'", wanted)
        tenant = call.require_caller().tenant

        def work(tx: Transaction, scope: str) -> list[dict[str, Any]]:
            found = self._rbac.assignments(
                tx, tenant=tenant, scope=scope, at_scope=wanted == "atScope()"
            )
            return [
                item.to_json() for item in found if not principal or item.principal == principal[1]
            ]

        return Answer({"value": await self._do(call, "roleAssignments/read", work)})

    async def get_assignment(self, call: Call) -> Answer:
        """Return one assignment."""
        tenant = call.require_caller().tenant

        def work(tx: Transaction, scope: str) -> dict[str, Any]:
            found = self._rbac.get(tx, call.params["name"], tenant=tenant, scope=scope)
            return found.to_json()

        return Answer(await self._do(call, "roleAssignments/read", work))

    async def put_assignment(self, call: Call) -> Answer:
        """Give a role."""
        caller = call.require_caller()
        values = _properties(call, {"roleDefinitionId", "principalId"}, {"principalType"})
        role = _text(values, "roleDefinitionId")
        principal = _text(values, "principalId")

        def work(tx: Transaction, scope: str) -> dict[str, Any]:
            return self._rbac.assign(
                tx,
                principal=principal,
                role=role,
                tenant=caller.tenant,
                scope=scope,
                name=call.params["name"],
                by=caller.name,
            ).to_json()

        details = {"principal": principal, "role": role}
        done = await self._do(call, "roleAssignments/write", work, details=details)
        return Answer(done, status=201)

    async def delete_assignment(self, call: Call) -> Answer:
        """Take a role away."""
        tenant = call.require_caller().tenant

        def work(tx: Transaction, scope: str) -> dict[str, Any]:
            found = self._rbac.remove(tx, call.params["name"], tenant=tenant, scope=scope)
            return found.to_json()

        return Answer(await self._do(call, "roleAssignments/delete", work))

    # ---- definitions ---------------------------------------------------------------------------

    async def list_definitions(self, call: Call) -> Answer:
        """Return all roles."""

        def work(tx: Transaction, scope: str) -> list[dict[str, Any]]:
            del scope
            return [role.to_json() for role in self._rbac.roles(tx)]

        return Answer({"value": await self._do(call, "roleDefinitions/read", work)})

    async def get_definition(self, call: Call) -> Answer:
        """Return one role."""

        def work(tx: Transaction, scope: str) -> dict[str, Any]:
            del scope
            found = self._rbac.role(tx, guid(call.params["name"], "the name of a role"))
            if found is None:
                raise ServiceError(
                    "there is no such role", status=404, error_code="RoleDefinitionNotFound"
                )
            return found.to_json()

        return Answer(await self._do(call, "roleDefinitions/read", work))

    async def put_definition(self, call: Call) -> Answer:
        """Make or change a custom role."""
        values = _properties(
            call, set(), {"roleName", "description", "type", "permissions", "assignableScopes"}
        )
        allowed, denied = _permissions(values.get("permissions") or [])
        scopes = values.get("assignableScopes") or ["/"]
        if not isinstance(scopes, list) or not all(isinstance(item, str) for item in scopes):
            raise _bad("assignableScopes is a list of text")

        def work(tx: Transaction, scope: str) -> dict[str, Any]:
            if scope != "/":
                raise _bad("roles are defined at /", scope)
            return self._rbac.define(
                tx,
                call.params["name"],
                role_name=_text(values, "roleName", ""),
                description=_text(values, "description", ""),
                data_actions=allowed,
                not_data_actions=denied,
                scopes=[check_scope(item) for item in scopes[:16]],
            ).to_json()

        details = {"dataActions": allowed, "notDataActions": denied}
        done = await self._do(call, "roleDefinitions/write", work, details=details)
        return Answer(done, status=201)

    async def delete_definition(self, call: Call) -> Answer:
        """Remove a custom role."""

        def work(tx: Transaction, scope: str) -> dict[str, Any]:
            if scope != "/":
                raise _bad("roles are defined at /", scope)
            return self._rbac.undefine(tx, call.params["name"]).to_json()

        return Answer(await self._do(call, "roleDefinitions/delete", work))


def _scope_of(call: Call) -> str:
    path = call.path.lstrip("/")
    if not path.startswith("keys"):
        return "/"
    name = call.params.get("key")
    return check_scope("/keys" if name is None else f"/keys/{name}")


def _properties(call: Call, needed: set[str], further: set[str]) -> dict[str, Any]:
    body = call.json()
    values = body.get("properties")
    if set(body) != {"properties"} or not isinstance(values, dict):
        raise _bad("the body is an object with the member properties")
    missing, unknown = needed - set(values), set(values) - needed - further
    if missing:
        raise _bad(f"properties: {min(missing)} is missing")
    if unknown:
        raise _bad("properties: an unknown member", min(unknown))
    return values


def _text(values: dict[str, Any], name: str, default: str | None = None) -> str:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _bad(f"properties: {name} is text of at most {_MAX_TEXT} characters")
    return value


def _permissions(values: object) -> tuple[list[str], list[str]]:
    if not isinstance(values, list) or len(values) > 16:
        raise _bad("permissions is a list of at most 16")
    allowed: list[str] = []
    denied: list[str] = []
    known = {"actions", "notActions", "dataActions", "notDataActions"}
    for item in values:
        if not isinstance(item, dict) or set(item) - known:
            raise _bad(f"a permission has {', '.join(sorted(known))}")
        if item.get("actions") or item.get("notActions"):
            raise _bad("there are no management actions here, only dataActions")
        for name, target in (("dataActions", allowed), ("notDataActions", denied)):
            actions = item.get(name) or []
            if not isinstance(actions, list) or len(actions) > 128:
                raise _bad(f"{name} is a list of at most 128")
            for action in actions:
                if not isinstance(action, str) or not _DATA_ACTION.fullmatch(action):
                    raise _bad(f"{name}: not an action", action)
                target.append(action)
    return allowed, denied
