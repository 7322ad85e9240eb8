"""
Backups: all versions of a key in one blob that only the vault with the same service key opens.

``docs/formats/vault-backup.md`` has what is inside. The private halves stay wrapped by the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from pyenclave.errors import UnsealError
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.vault.fields import bad_parameter
from pyenclave.services.vault.records import KeyRecord
from pyenclave.services.vault.rotation_policy import RotationPolicy

__all__ = ["MAX_BACKUP", "pack", "unpack"]

# A restore is one request body; base64url makes a third more of it.
MAX_BACKUP: Final = 700 << 10
_CONTEXT: Final = b"vault key backup v1"


class _Version(msgspec.Struct, forbid_unknown_fields=True):
    version: str
    kty: str
    size: int | None
    key_ops: list[str]
    public: dict[str, str]
    wrapped: bytes
    enabled: bool
    created: int
    updated: int
    not_before: int | None
    expires: int | None
    exportable: bool
    release_policy: bytes | None
    policy_content_type: str
    immutable: bool
    tags: dict[str, str]


class _Backup(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    versions: list[_Version]
    rotation: str | None


def pack(secrets: Secrets, records: Sequence[KeyRecord], rotation: RotationPolicy | None) -> bytes:
    """
    Return the backup of a key.

    Args:
        secrets: The service's.
        records: All versions, oldest first.
        rotation: Its rotation policy, if it was given one.

    Raises:
        ServiceError: 400: it has too many versions for one backup.

    """
    plain = msgspec.msgpack.encode(
        _Backup(
            name=records[0].name,
            versions=[
                _Version(**{name: _plain(getattr(record, name)) for name in _NAMES})
                for record in records
            ],
            rotation=None if rotation is None else rotation.to_json(),
        )
    )
    if len(plain) > MAX_BACKUP:
        raise bad_parameter("The key has too many versions for a backup.")
    return secrets.protect(plain, _CONTEXT)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value


_NAMES: Final = _Version.__struct_fields__


def unpack(secrets: Secrets, blob: bytes) -> tuple[list[KeyRecord], RotationPolicy | None]:
    """
    Return what `pack` was given.

    Raises:
        ServiceError: 400: not a backup of this vault, or changed.

    """
    try:
        found = msgspec.msgpack.decode(secrets.open(blob, _CONTEXT), type=_Backup)
    except (UnsealError, msgspec.MsgspecError):
        raise bad_parameter("The backup is damaged, or it is of another vault.") from None
    records = []
    for version in found.versions:
        values = {name: getattr(version, name) for name in _NAMES}
        values["key_ops"] = tuple(values["key_ops"])
        records.append(KeyRecord(name=found.name, **values))
    policy = None if found.rotation is None else RotationPolicy.from_json(found.rotation)
    return records, policy
