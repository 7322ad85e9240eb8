"""
Who may do what: assignments of roles to principals, at ``/``, ``/keys`` or ``/keys/NAME``.

A principal is tenant and object id together. Without an assignment nothing is allowed; the first
ones come from the configuration (`Rbac.bootstrap`).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, delete, insert, or_, select

from pyenclave.errors import ServiceError
from pyenclave.services.identity.caller import Caller
from pyenclave.services.identity.rbac_tables import (
    PART,
    SealedRows,
    role_assignments,
    role_definitions,
)
from pyenclave.services.identity.roles import (
    DEFINITION_PATH,
    Role,
    allowing,
    canonical_action,
    covers,
    role_named,
)
from pyenclave.services.storage.renewing import Renewal
from pyenclave.services.storage.transaction import Transaction

__all__ = ["PART", "Assignment", "Rbac", "check_scope"]

_SCOPE: Final = re.compile(r"/|/keys|/keys/[0-9a-zA-Z-]{1,127}")
_PRINCIPAL: Final = re.compile(r"[\x21-\x7e]{1,256}")
_MAX_ASSIGNMENTS: Final = 4000  # of one vault; Azure's limit of a subscription
_MAX_DEFINITIONS: Final = 200

_ASSIGNED: Final = ("name", "tenant", "principal", "role", "scope", "created_by")
_DEFINED: Final = ("name", "body")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """
    A role that somebody has somewhere.

    Attributes:
        name: GUID of the assignment.
        tenant: The principal's tenant.
        principal: The principal's object id.
        role: GUID of the role.
        scope: ``/``, ``/keys`` or ``/keys/NAME``.

    """

    name: str
    tenant: str
    principal: str
    role: str
    scope: str

    def to_json(self) -> dict[str, Any]:
        """Return the form that Managed HSM's REST interface has."""
        prefix = "" if self.scope == "/" else self.scope
        return {
            "id": f"{prefix}/providers/Microsoft.Authorization/roleAssignments/{self.name}",
            "name": self.name,
            "type": "Microsoft.Authorization/roleAssignments",
            "properties": {
                "principalId": self.principal,
                "roleDefinitionId": f"{DEFINITION_PATH}/{self.role}",
                "scope": self.scope,
            },
        }


def _bad(message: str, found: object = None) -> ServiceError:
    return ServiceError(message, status=400, error_code="BadParameter", found=found)


def check_scope(scope: str) -> str:
    """Return *scope* if it is one; ServiceError 400 otherwise."""
    if not _SCOPE.fullmatch(scope):
        raise _bad("a scope is /, /keys or /keys/NAME", scope)
    return scope


def guid(text: str, what: str) -> str:
    """Return a GUID in its canonical form; ServiceError 400 if it is none."""
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        raise _bad(f"{what} must be a GUID", text) from None
    if str(parsed) != text.lower():
        raise _bad(f"{what} must be a GUID", text)
    return str(parsed)


class Rbac:
    """
    Assignments and roles, in tables of the part `PART`.

    Rows are sealed by the database's secrets; those that do not open grant nothing and are reported
    (`pyenclave.services.identity.rbac_tables`).
    """

    def __init__(self) -> None:
        self._assigned = SealedRows(role_assignments, _ASSIGNED)
        self._defined = SealedRows(role_definitions, _DEFINED)

    def renewals(self) -> tuple[Renewal, ...]:
        """Return what seals the rows by the newest of the database's secrets."""
        return self._assigned.renew, self._defined.renew

    # ---- the question --------------------------------------------------------------------------

    def check(self, tx: Transaction, caller: Caller, action: str, scope: str) -> None:
        """
        Go on only if *caller* may do *action* at *scope*.

        Args:
            tx: The transaction of what is to be done.
            caller: Who asks.
            action: A data action, as ``Microsoft.KeyVault/vaults/keys/read``.
            scope: ``/`` or ``/keys/NAME``.

        Raises:
            ServiceError: 403, with the action and the roles that would allow it.

        """
        wanted = canonical_action(action)
        for held, role in self._rights(tx, caller.tenant, caller.object_id):
            if covers(held, scope) and role.allows(wanted):
                return
        names = " or ".join(f"'{name}'" for name in allowing(wanted)) or "no built-in role"
        raise ServiceError(
            "Caller is not authorized to perform action on resource. "
            f"Caller: appid={caller.client_id or ''};oid={caller.object_id}; "
            f"Action: '{action}'; Resource: '{scope}'; allowed to: {names}",
            status=403,
            error_code="Forbidden",
            inner="ForbiddenByRbac",
            expected=action,
        )

    def _rights(self, tx: Transaction, tenant: str, principal: str) -> Sequence[tuple[str, Role]]:
        def load() -> tuple[tuple[str, Role], ...]:
            rows = self._assigned.select(
                tx,
                role_assignments.c.tenant == tenant,
                role_assignments.c.principal == principal,
            )
            found = ((row.scope, self.role(tx, row.role)) for row in rows)
            return tuple((scope, role) for scope, role in found if role is not None)

        return tx.cached(("identity", "rights", tenant, principal), load)

    # ---- assignments ---------------------------------------------------------------------------

    def assign(
        self,
        tx: Transaction,
        *,
        principal: str,
        role: str,
        tenant: str,
        scope: str = "/",
        name: str | None = None,
        by: str = "",
    ) -> Assignment:
        """
        Give *principal* a role; the same once more changes nothing.

        Args:
            tx: The transaction.
            principal: Object id.
            role: Name or GUID of a built-in role, or the id of any.
            tenant: The principal's tenant.
            scope: ``/``, ``/keys`` or ``/keys/NAME``.
            name: GUID of the assignment; default: one that follows from the rest.
            by: Who does it, for the record.

        Raises:
            ServiceError: 400 malformed; 404 no such role; 409 the name is taken by another.

        """
        check_scope(scope)
        if not _PRINCIPAL.fullmatch(principal):
            raise _bad("a principal is an object id", principal)
        known = self.role(tx, role)
        if known is None:
            raise ServiceError(
                "there is no such role", status=404, error_code="RoleDefinitionNotFound", found=role
            )
        if not any(covers(allowed, scope) for allowed in known.scopes):
            raise _bad(f"the role '{known.name}' cannot be assigned there", scope)
        chosen = guid(name, "the name of an assignment") if name is not None else None
        made = Assignment(
            name=chosen or str(uuid.uuid4()),
            tenant=tenant,
            principal=principal,
            role=known.id,
            scope=scope,
        )
        same = self._one(tx, self._same(made))
        if same is not None and chosen in (None, same.name):
            return same
        if same is not None or (chosen is not None and self._named(tx, chosen) is not None):
            raise ServiceError(
                "there is such an assignment, or one of that name",
                status=409,
                error_code="RoleAssignmentExists",
            )
        count = tx.connection.execute(select(role_assignments.c.name)).all()
        if len(count) >= _MAX_ASSIGNMENTS:
            raise ServiceError(
                f"there are {_MAX_ASSIGNMENTS} role assignments already",
                status=409,
                error_code="RoleAssignmentLimitExceeded",
            )
        values = {
            "name": made.name,
            "tenant": tenant,
            "principal": principal,
            "role": known.id,
            "scope": scope,
            "created_by": by[:1300],
        }
        # Rows of this name or content that are left do not open.
        tx.connection.execute(
            delete(role_assignments).where(
                or_(role_assignments.c.name == made.name, self._same(made))
            )
        )
        tx.connection.execute(
            insert(role_assignments).values(created=tx.now, **self._assigned.values(tx, values))
        )
        tx.changed()
        return made

    def remove(self, tx: Transaction, name: str, *, tenant: str, scope: str) -> Assignment:
        """
        Take an assignment away.

        Raises:
            ServiceError: 404 there is none of that name and scope.

        """
        found = self.get(tx, name, tenant=tenant, scope=scope)
        tx.connection.execute(delete(role_assignments).where(role_assignments.c.name == found.name))
        tx.changed()
        return found

    def get(self, tx: Transaction, name: str, *, tenant: str, scope: str) -> Assignment:
        """
        Return an assignment.

        Raises:
            ServiceError: 404 there is none of that name and scope.

        """
        found = self._named(tx, guid(name, "the name of an assignment"))
        if found is None or found.tenant != tenant or found.scope != scope:
            raise ServiceError(
                "there is no such role assignment", status=404, error_code="RoleAssignmentNotFound"
            )
        return found

    def assignments(
        self, tx: Transaction, *, tenant: str, scope: str = "/", at_scope: bool = False
    ) -> list[Assignment]:
        """
        Return the assignments at, above and below *scope*, by name.

        Args:
            tx: The transaction.
            tenant: Of the principals.
            scope: Where.
            at_scope: Not those below.

        """
        rows = self._assigned.select(tx, role_assignments.c.tenant == tenant)
        return [
            found
            for found in map(_assignment, rows)
            if covers(found.scope, scope) or (not at_scope and covers(scope, found.scope))
        ]

    def bootstrap(self, tx: Transaction, principals: Sequence[str]) -> None:
        """
        Make those of the configuration administrators of vault and attestation.

        Args:
            tx: The transaction.
            principals: ``TENANT/OBJECT_ID``.

        """
        for text in principals:
            tenant, slash, principal = text.rpartition("/")
            if not slash or not tenant:
                raise _bad("an administrator is TENANT/OBJECT_ID", text)
            for role in ("Key Vault Administrator", "Attestation Contributor"):
                self.assign(
                    tx, principal=principal, tenant=tenant, role=role, by="the configuration"
                )

    def _named(self, tx: Transaction, name: str) -> Assignment | None:
        return self._one(tx, role_assignments.c.name == name)

    def _one(self, tx: Transaction, where: ColumnElement[bool]) -> Assignment | None:
        rows = self._assigned.select(tx, where)
        return _assignment(rows[0]) if rows else None

    @staticmethod
    def _same(wanted: Assignment) -> ColumnElement[bool]:
        return and_(
            role_assignments.c.tenant == wanted.tenant,
            role_assignments.c.principal == wanted.principal,
            role_assignments.c.role == wanted.role,
            role_assignments.c.scope == wanted.scope,
        )

    # ---- roles ---------------------------------------------------------------------------------

    def role(self, tx: Transaction, name: str) -> Role | None:
        """Return the role of that GUID, id (its last segment is the GUID) or built-in name."""
        known = role_named(name) or role_named(name.rpartition("/")[2])
        if known is not None:
            return known
        return next((role for role in self._custom(tx) if role.id == name.rpartition("/")[2]), None)

    def roles(self, tx: Transaction) -> list[Role]:
        """Return all roles, built-in ones first."""
        from pyenclave.services.identity.roles import BUILT_IN

        return [*BUILT_IN.values(), *self._custom(tx)]

    def _custom(self, tx: Transaction) -> tuple[Role, ...]:
        def load() -> tuple[Role, ...]:
            rows = self._defined.select(tx)
            return tuple(_role(row.name, json.loads(row.body)) for row in rows)

        return tx.cached(("identity", "roles"), load)

    def define(
        self,
        tx: Transaction,
        name: str,
        *,
        role_name: str,
        description: str,
        data_actions: Sequence[str],
        not_data_actions: Sequence[str] = (),
        scopes: Sequence[str] = ("/",),
    ) -> Role:
        """
        Make a custom role, or change one.

        Raises:
            ServiceError: 400 malformed; 409 a built-in role, or too many.

        """
        chosen = guid(name, "the name of a role")
        if role_named(chosen) is not None or role_named(role_name) is not None:
            raise ServiceError(
                "a built-in role cannot be changed", status=409, error_code="RoleDefinitionExists"
            )
        for scope in scopes:
            check_scope(scope)
        body = {
            "role_name": role_name,
            "description": description,
            "data_actions": list(data_actions),
            "not_data_actions": list(not_data_actions),
            "scopes": list(scopes),
        }
        others = [role for role in self._custom(tx) if role.id != chosen]
        if len(others) >= _MAX_DEFINITIONS:
            raise ServiceError(
                f"there are {_MAX_DEFINITIONS} custom roles already",
                status=409,
                error_code="RoleDefinitionLimitExceeded",
            )
        tx.connection.execute(delete(role_definitions).where(role_definitions.c.name == chosen))
        values = {"name": chosen, "body": json.dumps(body, sort_keys=True)}
        tx.connection.execute(insert(role_definitions).values(self._defined.values(tx, values)))
        tx.changed()
        return _role(chosen, body)

    def undefine(self, tx: Transaction, name: str) -> Role:
        """
        Remove a custom role.

        Raises:
            ServiceError: 404 none of that name; 409 built-in, or somebody has it.

        """
        found = self.role(tx, guid(name, "the name of a role"))
        if found is None:
            raise ServiceError(
                "there is no such role", status=404, error_code="RoleDefinitionNotFound"
            )
        if found.built_in or self._one(tx, role_assignments.c.role == found.id) is not None:
            raise ServiceError(
                "the role is built in" if found.built_in else "somebody has this role",
                status=409,
                error_code="RoleDefinitionHasAssignments",
            )
        tx.connection.execute(delete(role_definitions).where(role_definitions.c.name == found.id))
        tx.changed()
        return found


def _assignment(row: Any) -> Assignment:
    return Assignment(
        name=row.name, tenant=row.tenant, principal=row.principal, role=row.role, scope=row.scope
    )


def _role(name: str, body: Any) -> Role:
    return Role(
        id=name,
        name=body["role_name"],
        description=body["description"],
        data_actions=tuple(body["data_actions"]),
        not_data_actions=tuple(body["not_data_actions"]),
        scopes=tuple(body["scopes"]),
        built_in=False,
    )
