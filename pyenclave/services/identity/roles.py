"""
Roles: Key Vault's built-in ones (GUIDs and names as Azure publishes them) and custom ones.

Managed HSM's names of actions mean the vault's: custom roles are written with the constants of
``azure-keyvault-administration``, which has Managed HSM's only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

__all__ = ["BUILT_IN", "Role", "canonical_action", "covers", "role_named"]

_KEYS: Final = "Microsoft.KeyVault/vaults/keys/"
_HSM: Final = re.compile(r"microsoft\.keyvault/managedhsm/(.*)", re.IGNORECASE)
# Managed HSM's words that are not the vault's with another prefix.
_HSM_WORDS: Final = {
    "keys/read/action": "keys/read",
    "keys/write/action": "keys/update/action",
    "keys/create": "keys/create/action",
    "keys/delete": "keys/delete",
    "keys/deletedkeys/read/action": "keys/read",
    "keys/deletedkeys/recover/action": "keys/recover/action",
    "keys/deletedkeys/delete": "keys/purge/action",
    "roleassignments/read/action": "roleAssignments/read",
    "roleassignments/write/action": "roleAssignments/write",
    "roleassignments/delete/action": "roleAssignments/delete",
    "roledefinitions/read/action": "roleDefinitions/read",
    "roledefinitions/write/action": "roleDefinitions/write",
    "roledefinitions/delete/action": "roleDefinitions/delete",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """
    What one may do who has it.

    Attributes:
        id: GUID.
        name: As people know it.
        description: What it is for.
        data_actions: Allowed; ``*`` in them is any text.
        not_data_actions: Taken from those.
        scopes: Where it may be assigned.
        built_in: Whether it is one of the fixed ones.

    """

    id: str
    name: str
    description: str
    data_actions: tuple[str, ...]
    not_data_actions: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ("/",)
    built_in: bool = True

    def allows(self, action: str) -> bool:
        """Whether it allows *action*."""
        return any(_matches(pattern, action) for pattern in self.data_actions) and not any(
            _matches(pattern, action) for pattern in self.not_data_actions
        )

    def to_json(self) -> dict[str, Any]:
        """Return the form that Managed HSM's REST interface has."""
        return {
            "id": f"{DEFINITION_PATH}/{self.id}",
            "name": self.id,
            "type": "Microsoft.Authorization/roleDefinitions",
            "properties": {
                "roleName": self.name,
                "description": self.description,
                "type": "AKVBuiltInRole" if self.built_in else "CustomRole",
                "assignableScopes": list(self.scopes),
                "permissions": [
                    {
                        "actions": [],
                        "notActions": [],
                        "dataActions": list(self.data_actions),
                        "notDataActions": list(self.not_data_actions),
                    }
                ],
            },
        }


DEFINITION_PATH: Final = "Microsoft.KeyVault/providers/Microsoft.Authorization/roleDefinitions"


@lru_cache(maxsize=2048)
def canonical_action(action: str) -> str:
    """Return the vault's name of an action of Managed HSM; any other as it is."""
    found = _HSM.fullmatch(action)
    if found is None:
        return action
    rest = found[1]
    return f"Microsoft.KeyVault/vaults/{_HSM_WORDS.get(rest.lower(), rest)}"


@lru_cache(maxsize=4096)
def _parts(pattern: str) -> tuple[str, ...]:
    return tuple(canonical_action(pattern).lower().split("*"))


def _matches(pattern: str, action: str) -> bool:
    # Not a regular expression: with many stars that tries every way to share the text out. The
    # leftmost place of each part in turn is enough, so nothing is tried twice.
    first, *further = _parts(pattern)
    action = action.lower()
    if not further:
        return action == first
    if not action.startswith(first):
        return False
    place, last = len(first), further.pop()
    for part in further:
        found = action.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return len(action) - len(last) >= place and action.endswith(last)


def covers(scope: str, wanted: str) -> bool:
    """Whether an assignment at *scope* holds at *wanted*: there, or below."""
    return scope in ("/", wanted) or wanted.startswith(scope + "/")


def _keys(*words: str) -> tuple[str, ...]:
    return tuple(_KEYS + word for word in words)


_ROLES: Final = (
    Role(
        id="00482a5a-887f-4fb3-b363-3b7fe8e74483",
        name="Key Vault Administrator",
        description="Everything in a vault, also who may do what.",
        data_actions=("Microsoft.KeyVault/vaults/*",),
    ),
    Role(
        id="14b46e9e-c2b7-41b4-b07b-48a6ebf60603",
        name="Key Vault Crypto Officer",
        description="Everything with keys, except who may do what.",
        data_actions=(
            "Microsoft.KeyVault/vaults/keys/*",
            "Microsoft.KeyVault/vaults/keyrotationpolicies/*",
        ),
    ),
    Role(
        id="12338af0-0e69-4776-bea7-57ae8d297424",
        name="Key Vault Crypto User",
        description="Operations with keys.",
        data_actions=_keys(
            *("read", "update/action", "backup/action", "encrypt/action", "decrypt/action"),
            *("wrap/action", "unwrap/action", "sign/action", "verify/action"),
        ),
    ),
    Role(
        id="e147488a-f6f5-4113-8e2d-b22465e65bf6",
        name="Key Vault Crypto Service Encryption User",
        description="Metadata of keys, wrapping and unwrapping.",
        data_actions=_keys("read", "wrap/action", "unwrap/action"),
    ),
    Role(
        id="08bbd89e-9f13-488c-ac41-acfcb10c90ab",
        name="Key Vault Crypto Service Release User",
        description="Release of keys to attested code.",
        data_actions=_keys("release/action"),
    ),
    Role(
        id="21090545-7ca7-4776-b22c-e363652d74d2",
        name="Key Vault Reader",
        description="Metadata of keys, no operation with them.",
        data_actions=(
            "Microsoft.KeyVault/vaults/*/read",
            "Microsoft.KeyVault/vaults/secrets/readMetadata/action",
        ),
    ),
    Role(
        id="bbf86eb8-f7b4-4cce-96e4-18cddf81d86e",
        name="Attestation Contributor",
        description="Policies and signers of an attestation service.",
        data_actions=("Microsoft.Attestation/attestationProviders/attestation/*",),
    ),
    Role(
        id="fd1bd22b-8476-40bc-a0bc-69b95687b9f3",
        name="Attestation Reader",
        description="Reads policies and signers of an attestation service.",
        data_actions=("Microsoft.Attestation/attestationProviders/attestation/read",),
    ),
)
BUILT_IN: Final = {role.id: role for role in _ROLES}
_BY_NAME: Final = {role.name.lower(): role for role in _ROLES}


def role_named(name: str) -> Role | None:
    """Return the built-in role of that name or GUID."""
    return BUILT_IN.get(name.lower()) or _BY_NAME.get(name.lower())


def allowing(action: str) -> Sequence[str]:
    """Return the names of the built-in roles that allow *action*."""
    return [role.name for role in _ROLES if role.allows(action)]
