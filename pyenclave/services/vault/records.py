"""
One version of a key as the vault keeps it, and how it looks on the wire.

Wire: Azure Key Vault, "Keys" data plane, 7.3 to 2025-07-01 (KeyBundle, KeyItem, DeletedKeyBundle).
The project's notes on secure key release, 10.1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pyenclave.formats.jose import b64url_encode
from pyenclave.formats.key_context import KeyContext

__all__ = [
    "HSM_TYPES",
    "KEY_TYPES",
    "POLICY_CONTENT_TYPE",
    "Deletion",
    "KeyRecord",
    "Place",
    "Retention",
    "bundle",
    "context_of",
    "deleted_bundle",
    "deleted_item",
    "item",
    "key_id",
    "valid_name",
    "valid_version",
]

KEY_TYPES: Final = ("RSA", "RSA-HSM", "EC", "EC-HSM", "oct", "oct-HSM")
HSM_TYPES: Final = frozenset({"RSA-HSM", "EC-HSM", "oct-HSM"})
POLICY_CONTENT_TYPE: Final = "application/json; charset=utf-8"
_NAME: Final = re.compile(r"[0-9a-zA-Z-]{1,127}")
_VERSION: Final = re.compile(r"[0-9a-f]{32}")


def valid_name(name: str) -> bool:
    """Tell whether *name* may be a key's name: 1 to 127 letters, digits and dashes."""
    return _NAME.fullmatch(name) is not None


def valid_version(version: str) -> bool:
    """Tell whether *version* may be a key's version: 32 lower-case hexadecimal digits."""
    return _VERSION.fullmatch(version) is not None


def key_id(base: str, name: str, version: str = "") -> str:
    """Return the identifier ``base/keys/NAME[/VERSION]``; *base* has no slash at its end."""
    return f"{base}/keys/{name}/{version}" if version else f"{base}/keys/{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """
    One version of a key.

    Attributes:
        name: Its name, of `valid_name`.
        version: Its version, of `valid_version`; chosen by the vault.
        kty: One of `KEY_TYPES`.
        key_ops: What it may be used for.
        public: The JWK members that everybody may see: ``n`` and ``e``, or ``crv``, ``x``, ``y``;
            none of a symmetric key.
        wrapped: The key as its backend wrapped it; opens only there and only with `context`.
        size: Bits of an RSA modulus or a symmetric key; None for a curve.
        enabled: May be used at all.
        created: Unix time in seconds.
        updated: Unix time in seconds.
        not_before: Unix time in seconds from which it may be used, or None.
        expires: Unix time in seconds from which it may not be used any more, or None.
        exportable: May be released under `release_policy`.
        release_policy: The policy's JSON, the bytes that were given, or None.
        policy_content_type: Media type of the policy.
        immutable: The policy can never be changed.
        tags: What the owner wrote to it.
        revision: Counts the changes of this version, so that two writers notice each other.
    """

    name: str
    version: str
    kty: str
    key_ops: tuple[str, ...]
    public: Mapping[str, str]
    wrapped: bytes = field(repr=False)
    size: int | None = None
    enabled: bool = True
    created: int = 0
    updated: int = 0
    not_before: int | None = None
    expires: int | None = None
    exportable: bool = False
    release_policy: bytes | None = None
    policy_content_type: str = POLICY_CONTENT_TYPE
    immutable: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    revision: int = 0

    @property
    def hsm(self) -> bool:
        """The key was asked for as hardware protected; only such a key may be released."""
        return self.kty in HSM_TYPES

    def context(self) -> bytes:
        """
        Return what the wrapping of the key authenticates.

        Name, version, type, exportable, SHA-256 of the release policy and immutable
        (`pyenclave.formats.key_context`). Who changes one of them in the database makes the key
        unusable instead of easier to get.
        """
        return context_of(
            self.name,
            self.version,
            self.kty,
            exportable=self.exportable,
            release_policy=self.release_policy,
            immutable=self.immutable,
        )


def context_of(
    name: str,
    version: str,
    kty: str,
    *,
    exportable: bool,
    release_policy: bytes | None,
    immutable: bool,
) -> bytes:
    """Return `KeyRecord.context` of a key that is not made yet."""
    return KeyContext(
        name=name,
        version=version,
        kty=kty,
        exportable=exportable,
        policy_hash=None if release_policy is None else hashlib.sha256(release_policy).digest(),
        immutable=immutable,
    ).to_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """When a key was deleted and when nothing will be left of it; Unix times in seconds."""

    deleted: int
    scheduled_purge: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """
    How long deleted keys are kept.

    Attributes:
        days: 7 to 90.
        purge_protection: Nobody can end a deleted key before that time.
    """

    days: int = 90
    purge_protection: bool = False

    def __post_init__(self) -> None:
        if not 7 <= self.days <= 90:
            raise ValueError(f"retention is 7 to 90 days, not {self.days}")

    @property
    def level(self) -> str:
        """Azure's word for it."""
        start = "Recoverable" if self.days == 90 else "CustomizedRecoverable"
        return start if self.purge_protection else start + "+Purgeable"


@dataclass(slots=True)
class Place:
    """
    Where the vault is.

    Attributes:
        base: Its address as clients know it, ``https://host[:port]``, no slash at the end. It is
            part of every key's identifier, so it comes from the configuration and never from a
            request.
    """

    base: str


def _attributes(record: KeyRecord, retention: Retention) -> dict[str, Any]:
    shown: dict[str, Any] = {"enabled": record.enabled}
    if record.not_before is not None:
        shown["nbf"] = record.not_before
    if record.expires is not None:
        shown["exp"] = record.expires
    shown |= {
        "created": record.created,
        "updated": record.updated,
        "recoveryLevel": retention.level,
        "recoverableDays": retention.days,
        "exportable": record.exportable,
    }
    return shown


def bundle(record: KeyRecord, base: str, retention: Retention) -> dict[str, Any]:
    """Return the KeyBundle of *record* under the vault's address *base*."""
    shown: dict[str, Any] = {
        "key": {
            "kid": key_id(base, record.name, record.version),
            "kty": record.kty,
            "key_ops": list(record.key_ops),
            **record.public,
        },
        "attributes": _attributes(record, retention),
    }
    if record.tags:
        shown["tags"] = dict(record.tags)
    if record.release_policy is not None:
        shown["release_policy"] = {
            "contentType": record.policy_content_type,
            "data": b64url_encode(record.release_policy),
            "immutable": record.immutable,
        }
    return shown


def item(record: KeyRecord, base: str, retention: Retention, *, versioned: bool) -> dict[str, Any]:
    """Return the KeyItem of *record*: of this version, or of the whole key."""
    shown: dict[str, Any] = {
        "kid": key_id(base, record.name, record.version if versioned else ""),
        "attributes": _attributes(record, retention),
    }
    if record.tags:
        shown["tags"] = dict(record.tags)
    return shown


def _deletion(record: KeyRecord, deletion: Deletion, base: str) -> dict[str, Any]:
    return {
        "recoveryId": f"{base}/deletedkeys/{record.name}",
        "deletedDate": deletion.deleted,
        "scheduledPurgeDate": deletion.scheduled_purge,
    }


def deleted_bundle(
    record: KeyRecord, deletion: Deletion, base: str, retention: Retention
) -> dict[str, Any]:
    """Return the DeletedKeyBundle of a key's last version."""
    return bundle(record, base, retention) | _deletion(record, deletion, base)


def deleted_item(
    record: KeyRecord, deletion: Deletion, base: str, retention: Retention
) -> dict[str, Any]:
    """Return the DeletedKeyItem of a key."""
    return item(record, base, retention, versioned=False) | _deletion(record, deletion, base)
