"""
Moving every key to a new key-encryption key, while the vault runs, and destroying the old ones.

Each step is durable before the next begins, and each may be done twice, so that a rotation that
was killed goes on where it was:

1. The backend makes a key-encryption key and keeps it.
2. One transaction notes it as *moving* and all others as *retired*: from then on nothing is stored
   under those, by no instance (`pyenclave.services.vault.keks`).
3. Every key that a retired one wraps is wrapped anew, page by page, until none is left.
4. The new one is *current*. With *destroy*, retired ones that wrap no row are destroyed in the
   backend, and noted as *destroyed*. Before that they open backups that were made under them.

What a row needs is in the row. One that is not as the vault wrote it may need any of them, so that
nothing is destroyed while there is such a row, unless it is given up by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pyenclave.errors import ServiceError
from pyenclave.services.audit import Event
from pyenclave.services.storage.transaction import Refused, Transaction
from pyenclave.services.vault import keks
from pyenclave.services.vault.backends.base import Rewraps, kek_of
from pyenclave.services.vault.desk import Desk
from pyenclave.services.vault.records import KeyRecord

__all__ = ["Rotation", "backend_of", "destroy_keks", "rewrap_keys", "rotate_kek"]

_PAGE: Final = 50
_NAMED: Final = 100  # damaged rows that the log names
_SHOWN: Final = 5  # and that an error does
_PASSES: Final = 20  # over all keys; the second finds what was written during the first
_ACTION: Final = "vault/kek/"


@dataclass(frozen=True, slots=True)
class Rotation:
    """
    What a rotation did.

    Attributes:
        kek: The key-encryption key that wraps now, in hexadecimal.
        resumed: One that had begun before was ended.
        moved: Keys that were wrapped anew.
        destroyed: Key-encryption keys that were destroyed.
        kept: Older ones that are still there.
        damaged: Keys whose rows are not as the vault wrote them, as NAME/VERSION: they are not
            moved.

    """

    kek: str
    resumed: bool
    moved: int
    destroyed: tuple[str, ...]
    kept: tuple[str, ...]
    damaged: tuple[str, ...] = ()


async def rotate_kek(
    desk: Desk,
    *,
    destroy: bool = False,
    give_up: Collection[str] = (),
    caller: str = "vault",
    progress: Callable[[int], None] = lambda moved: None,
) -> Rotation:
    """
    Replace a vault's key-encryption key; a rotation that was stopped is ended instead.

    Args:
        desk: The vault's parts.
        destroy: Older ones are destroyed when no row needs them. Backups of keys that were made
            under them cannot be restored afterwards.
        give_up: Damaged rows, as NAME/VERSION, that need not open any more, ever.
        caller: Who asked, for the log.
        progress: Called with how many keys were moved.

    Raises:
        ServiceError: The backend has no such keys (400 NotSupported), cannot do it, or failed; 409
            DamagedRows: with *destroy*, and before anything is done, there are damaged rows that
            are not given up.

    """
    backend = backend_of(desk)
    if destroy:
        await _judge_rows(desk, give_up, caller)
    begun = await desk.db.run(_moving)
    resumed = begun is not None
    if begun is None:
        made = await backend.rotate_kek()
        others = _before(made, await backend.keks())
        begun = await desk.db.run(lambda tx: _begin(tx, made, others, caller))
    moved, damaged = await _move(desk, backend, progress)

    def end(tx: Transaction) -> None:
        if keks.states(tx).get(begun) == "moving":
            keks.note(tx, begun, "current")
            details = {"kek": begun.hex(), "moved": moved, "resumed": resumed}
            details |= {"damaged": damaged[:_NAMED]} if damaged else {}
            tx.audit(_event("moved", caller, details))

    await desk.db.run(end)
    destroyed = await destroy_keks(desk, give_up=give_up, caller=caller) if destroy else ()
    kept = [kek.hex() for kek in await backend.keks() if kek != begun]
    return Rotation(begun.hex(), resumed, moved, destroyed, tuple(kept), tuple(damaged))


async def destroy_keks(
    desk: Desk, *, give_up: Collection[str] = (), caller: str = "vault"
) -> tuple[str, ...]:
    """
    Destroy retired key-encryption keys that wrap no row.

    Args:
        desk: The vault's parts.
        give_up: As `rotate_kek`.
        caller: Who asked, for the log.

    Returns:
        Which.

    Raises:
        ServiceError: 409 a rotation is not ended; as `rotate_kek`.

    """
    backend = backend_of(desk)
    given_up = await _judge_rows(desk, give_up, caller)

    def choose(tx: Transaction) -> list[bytes]:
        known, used = keks.states(tx), keks.in_use(tx, without=given_up)
        if "moving" in known.values():
            raise ServiceError(
                "a rotation of the key-encryption key is not ended",
                status=409,
                error_code="Conflict",
            )
        return [kek for kek, state in known.items() if state == "retired" and not used.get(kek)]

    chosen = await desk.db.run(choose)
    if not chosen:
        return ()
    await backend.destroy_keks(chosen)
    left = set(await backend.keks())

    def noted(tx: Transaction) -> tuple[str, ...]:
        gone = [kek for kek in chosen if kek not in left]
        fresh = [kek for kek in gone if keks.states(tx).get(kek) == "retired"]
        for kek in fresh:
            keks.note(tx, kek, "destroyed")
        if fresh:
            details: dict[str, Any] = {"keks": [kek.hex() for kek in fresh]}
            if given_up:
                details["given_up"] = [f"{name}/{version}" for name, version in given_up][:_NAMED]
            tx.audit(_event("destroyed", caller, details))
        return tuple(kek.hex() for kek in gone)

    return await desk.db.run(noted)


async def _judge_rows(
    desk: Desk, give_up: Collection[str], caller: str
) -> tuple[tuple[str, str], ...]:
    """Return the rows that are given up; refuse if others cannot tell what they need."""
    unknown: list[tuple[str, str]] = []
    after: tuple[str, str] | None = None
    while page := await desk.db.run(
        lambda tx, after=after: desk.store.page_of_rows(tx, after, _PAGE)  # type: ignore[misc]
    ):
        for name, version, record in page:
            if record is None or kek_of(record.wrapped) is None:
                unknown.append((name, version))
        after = page[-1][:2]
    named = {f"{name}/{version}": (name, version) for name, version in unknown}
    if sound := sorted(set(give_up) - set(named)):
        raise ServiceError(
            f"{sound[0]!r:.200} is not the name of a damaged row: there is nothing to give up",
            status=400,
            error_code="BadParameter",
        )
    left = [name for name in named if name not in give_up]
    if not left:
        return tuple(unknown)
    refused = ServiceError(
        "rows that are not as the vault wrote them may need the older key-encryption keys",
        status=409,
        error_code="Conflict",
        inner="DamagedRows",
        expected="none that is not given up by its name",
        found=", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" * (len(left) > _SHOWN)),
        advice="Put them back from a copy of the database, or give up each by its name.",
    )
    event = Event(
        _ACTION + "destroyed",
        "refused",
        caller=caller,
        resource="/",
        condition="no row is damaged",
        details={"damaged": left[:_NAMED]},
    )

    def work(_tx: Transaction) -> None:
        raise Refused(refused, event)

    await desk.db.run(work)
    raise AssertionError("the work refuses")


async def rewrap_keys(desk: Desk, *, rotate: bool = True) -> int:
    """
    Wrap every key of a vault with the newest key-encryption key.

    Args:
        desk: The vault's parts.
        rotate: Make a new key-encryption key first, or end a rotation that was stopped.

    Returns:
        How many keys were moved.

    Raises:
        ServiceError: As `rotate_kek`.

    """
    if rotate:
        return (await rotate_kek(desk)).moved
    return (await _move(desk, backend_of(desk), lambda moved: None))[0]


def backend_of(desk: Desk) -> Rewraps:
    """
    Return the backend of a vault, whose key-encryption key can be replaced.

    Raises:
        ServiceError: 400 NotSupported: it cannot.

    """
    if not isinstance(desk.backend, Rewraps):
        raise ServiceError(
            f"the backend {desk.backend.name} has no key-encryption key to replace",
            status=400,
            error_code="NotSupported",
        )
    return desk.backend


def _before(made: bytes, listed: Sequence[bytes]) -> Sequence[bytes]:
    """Return those older than *made*: one that another process made since is the one that wraps."""
    return listed[: listed.index(made)] if made in listed else listed


def _moving(tx: Transaction) -> bytes | None:
    return next((kek for kek, state in keks.states(tx).items() if state == "moving"), None)


def _begin(tx: Transaction, made: bytes, others: Sequence[bytes], caller: str) -> bytes:
    """Note the new one and retire the others; of two rotations at once, the second joins."""
    begun = _moving(tx)
    if begun is not None:
        return begun
    known = keks.states(tx)
    for kek in {*others, *known} - {made}:
        if known.get(kek) != "destroyed":
            keks.note(tx, kek, "retired")
    keks.note(tx, made, "moving")
    tx.audit(_event("made", caller, {"kek": made.hex(), "retired": [k.hex() for k in others]}))
    return made


async def _move(
    desk: Desk, backend: Rewraps, progress: Callable[[int], None]
) -> tuple[int, list[str]]:
    """Move keys until a pass finds none; return how many, and the names of damaged rows."""
    moved = 0
    for _ in range(_PASSES):
        newest = (await backend.keks())[-1]
        seen = 0
        damaged: list[str] = []
        after: tuple[str, str] | None = None
        while page := await desk.db.run(
            lambda tx, after=after: desk.store.page_of_rows(tx, after, _PAGE)  # type: ignore[misc]
        ):
            found: list[tuple[KeyRecord, bytes]] = []
            for name, version, record in page:
                if record is None:
                    damaged.append(f"{name}/{version}")
                    continue
                if kek_of(record.wrapped) == newest:
                    continue
                seen += 1
                wrapped = await backend.rewrap(record.wrapped, record.context())
                if wrapped is not None:
                    found.append((record, wrapped))
            moved += await desk.db.run(lambda tx, found=found: _write(desk, tx, found))  # type: ignore[misc]
            progress(moved)
            after = page[-1][:2]
        if not seen:
            return moved, damaged
    raise ServiceError(
        "keys are still being stored under older key-encryption keys; run it again",
        status=503,
        error_code="ServiceUnavailable",
        retry_after=1,
    )


def _write(desk: Desk, tx: Transaction, found: Sequence[tuple[KeyRecord, bytes]]) -> int:
    # A key that changed meanwhile is met again in the next pass.
    return sum(desk.store.rewrapped(tx, record, wrapped) for record, wrapped in found)


def _event(
    verb: Literal["made", "moved", "destroyed"], caller: str, details: dict[str, Any]
) -> Event:
    return Event(_ACTION + verb, "allowed", caller=caller, resource="/", details=details)
