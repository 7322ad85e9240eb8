"""
Which key-encryption keys may wrap, in the database that all instances share.

A key-encryption key that is *retired* opens what it wrapped and wraps nothing new: no transaction
stores a key under it. Instances that still have it as their newest learn so by that refusal. That
is why a row that needs a retired one cannot appear behind the back of whoever destroys it.

The list of them is one row, sealed by the service's secrets, which do not depend on any of these
keys. Whoever writes to the database can take it away or put an older one back: then less is known
to be retired. No key is destroyed for that, for that takes a row that says so and rows of keys
that do not need it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import and_, delete, func, insert, or_, select

from pyenclave.errors import ServiceError, UnsealError
from pyenclave.services.storage.renewing import Renewed
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.backends.base import KEK_PLACES, kek_of
from pyenclave.services.vault.tables import keks, versions

__all__ = ["State", "check_wrapped", "in_use", "note", "renew", "states"]

# moving: the newest, and rows may still be under others; current: the newest, and none is.
State = Literal["moving", "current", "retired", "destroyed"]
_CACHED: Final = "vault-keks-retired"
_CONTEXT: Final = b"vault-keks-v1"


class _Noted(msgspec.Struct, forbid_unknown_fields=True):
    state: State
    since: int  # Unix time


_READ: Final = msgspec.json.Decoder(dict[str, _Noted])


def _read(tx: Transaction) -> dict[str, _Noted]:
    sealed = tx.connection.execute(select(keks.c.sealed)).scalars().all()
    if not sealed:
        return {}
    try:
        if len(sealed) != 1:
            raise UnsealError("the list of key-encryption keys: several")
        return _READ.decode(tx.secrets.open(bytes(sealed[0]), _CONTEXT))
    except (UnsealError, msgspec.MsgspecError) as error:
        raise ServiceError(
            "the list of key-encryption keys is not as the vault wrote it",
            status=503,
            error_code="ServiceUnavailable",
            inner="KekListChanged",
            found=str(error),
            advice="Restore the database, or empty vault_kek_list: nothing is retired then, and "
            "the next rotate-kek retires anew.",
        ) from None


def states(tx: Transaction) -> dict[bytes, State]:
    """
    Return what is noted of key-encryption keys; nothing of those before the first rotation.

    Raises:
        ServiceError: 503 KekListChanged: the list is not as the vault wrote it.

    """
    return {bytes.fromhex(kek): noted.state for kek, noted in _read(tx).items()}


def note(tx: Transaction, kek: bytes, state: State) -> None:
    """
    Note the state of a key-encryption key.

    Raises:
        ServiceError: As `states`.

    """
    _write(tx, {**_read(tx), kek.hex(): _Noted(state, int(tx.now.timestamp()))})


def renew(tx: Transaction, _after: Any) -> Renewed:
    """Seal the list by the newest of the service's secrets."""
    try:
        noted = _read(tx)
    except ServiceError:
        return Renewed(damaged=(keks.name,))
    sealed = tx.connection.execute(select(keks.c.sealed)).scalar()
    if sealed is None or tx.secrets.is_newest(sealed):
        return Renewed()
    _write(tx, noted)
    return Renewed(1)


def _write(tx: Transaction, noted: dict[str, _Noted]) -> None:
    sealed = tx.secrets.protect(msgspec.json.encode(noted, order="sorted"), _CONTEXT)
    tx.connection.execute(delete(keks))
    tx.connection.execute(insert(keks).values(id=1, sealed=sealed))
    tx.changed()


def _retired(tx: Transaction) -> frozenset[bytes]:
    return tx.cached(
        (_CACHED,),
        lambda: frozenset(
            kek for kek, state in states(tx).items() if state in ("retired", "destroyed")
        ),
    )


def check_wrapped(tx: Transaction, wrapped: bytes, before: bytes | None = None) -> None:
    """
    Refuse to store a key under a retired key-encryption key.

    Args:
        tx: The transaction that stores it.
        wrapped: The wrapped key.
        before: The row's wrapped key until now; under the same one it may stay until it is moved.

    Raises:
        ServiceError: 503 KekRetired: this instance did not know; once it does, it may try again.

    """
    kek = kek_of(wrapped)
    if kek is None or kek not in _retired(tx):
        return
    if before is not None and kek_of(before) == kek:
        return
    raise ServiceError(
        "the key-encryption key was replaced meanwhile; try again",
        status=503,
        error_code="ServiceUnavailable",
        inner="KekRetired",
        retry_after=1,
    )


def in_use(tx: Transaction, without: Collection[tuple[str, str]] = ()) -> dict[bytes, int]:
    """
    Return how many keys each key-encryption key wraps, deleted keys too.

    Args:
        tx: The transaction.
        without: Names and versions of rows that do not count.

    """
    found: dict[bytes, int] = {}
    for magic, start, size in KEK_PLACES:
        name = func.substr(versions.c.wrapped, start + 1, size)
        of_magic = func.substr(versions.c.wrapped, 1, len(magic)) == magic
        for kek, count in tx.connection.execute(
            select(name, func.count()).where(of_magic).group_by(name)
        ):
            found[bytes(kek)] = found.get(bytes(kek), 0) + count
    if without:
        named = (and_(versions.c.name == key, versions.c.version == of) for key, of in without)
        for wrapped in tx.connection.execute(select(versions.c.wrapped).where(or_(*named))):
            kek = kek_of(bytes(wrapped[0])) or b""
            found[kek] = found.get(kek, 0) - 1
    return found
