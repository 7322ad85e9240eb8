"""A vault's key-encryption key is replaced: at every moment every key opens, and none is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import update
from vault_parts import MemoryBackend, Table, running_vault

from pyenclave.errors import ServiceError
from pyenclave.formats import jwa
from pyenclave.formats.audit_chain import verify_chain
from pyenclave.services.audit.reader import open_log
from pyenclave.services.storage import Database, Secrets, Transaction
from pyenclave.services.vault import keks, tables
from pyenclave.services.vault.backends.base import KeySpec, kek_of
from pyenclave.services.vault.decisions import Decisions
from pyenclave.services.vault.desk import Desk
from pyenclave.services.vault.records import KeyRecord, Place, Retention, context_of
from pyenclave.services.vault.rewrapping import destroy_keks, rotate_kek
from pyenclave.services.vault.store import KeyStore
from pyenclave.services.vault.tables import PART, versions

T = TypeVar("T")
HEAD = b"PYEVKEY\x01"


class Killed(BaseException):
    """The process ended here."""


class Steps:
    """Counts what is durable or may fail, and ends the process before or after one of them."""

    def __init__(self, at: int = 0, *, after: bool = False) -> None:
        self.count = 0
        self.at = at
        self.after = after

    async def step(self, work: Callable[[], Awaitable[T]]) -> T:
        self.count += 1
        mine = self.count == self.at
        if mine and not self.after:
            raise Killed
        done = await work()
        if mine:
            raise Killed
        return done


class KekBackend(MemoryBackend):
    """
    Key-encryption keys in *kept*, which outlives this process; it knows those that it has read.

    The names of the wrapped form are the enclave's, so that the vault finds them.
    """

    def __init__(self, kept: dict[bytes, bytes], steps: Steps | None = None) -> None:
        super().__init__()
        self.kept = kept
        self.steps = steps or Steps()
        if not kept:
            kept[os.urandom(16)] = os.urandom(32)
        self.known = dict(kept)

    def _wrap(self, key: jwa.Key, context: bytes) -> bytes:
        kek, secret = list(self.known.items())[-1]
        self.kek = AESGCM(secret)
        return HEAD + kek + super()._wrap(key, context)

    def _open(self, wrapped: bytes, context: bytes) -> jwa.Key:
        name = wrapped[8:24]
        if name not in self.known:
            self.known = dict(self.kept)
        if name not in self.known:
            raise ServiceError("unknown key-encryption key", status=500, error_code="UnknownKek")
        self.kek = AESGCM(self.known[name])
        return super()._open(wrapped[24:], context)

    async def keks(self) -> tuple[bytes, ...]:
        self.known = dict(self.kept)
        return tuple(self.known)

    async def rotate_kek(self) -> bytes:
        async def make() -> bytes:
            name = os.urandom(16)
            self.kept[name] = os.urandom(32)
            self.known = dict(self.kept)
            return name

        return await self.steps.step(make)

    async def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
        async def move() -> bytes | None:
            if kek_of(wrapped) == list(self.known)[-1]:
                return None
            return self._wrap(self._open(wrapped, context), context)

        return await self.steps.step(move)

    async def destroy_keks(self, ids: Collection[bytes]) -> None:
        newest = list(self.kept)[-1]
        for name in ids:  # one by one, so that it may end between two

            async def destroy(name: bytes = name) -> None:
                if name != newest:
                    self.kept.pop(name, None)

            await self.steps.step(destroy)
        self.known = dict(self.kept)


class Steady:
    """A database whose works are steps."""

    def __init__(self, db: Database, steps: Steps) -> None:
        self._db = db
        self._steps = steps

    async def run(self, work: Callable[[Transaction], T]) -> T:
        return await self._steps.step(lambda: self._db.run(work))


def desk_on(db: Database, backend: MemoryBackend, steps: Steps | None = None) -> Desk:
    desk = Desk(
        db=db,
        store=KeyStore(db.secrets, Retention()),
        decisions=Decisions(Table()),
        backend=backend,
        secrets=db.secrets,
        place=Place("https://vault.example"),
    )
    return desk if steps is None else dataclasses.replace(desk, db=Steady(db, steps))  # type: ignore[arg-type]


async def add(desk: Desk, name: str, version: str) -> KeyRecord:
    context = context_of(
        name, version, "oct", exportable=False, release_policy=None, immutable=False
    )
    made = await desk.backend.generate(KeySpec(kty="oct"), context)
    record = KeyRecord(
        name=name, version=version, kty="oct", key_ops=("sign",), public={}, wrapped=made.wrapped
    )
    await desk.stored(lambda tx: desk.store.add(tx, record))
    return record


async def mac(desk: Desk, record: KeyRecord) -> bytes:
    answer = await desk.backend.perform(
        record.wrapped, record.context(), "sign", "HS256", {"value": b"digest"}
    )
    return answer["value"]


async def everything(desk: Desk) -> list[KeyRecord]:
    return await desk.db.run(lambda tx: desk.store.page_of_all(tx, ("", ""), 500))


async def macs_of(desk: Desk) -> dict[tuple[str, str], bytes]:
    return {(r.name, r.version): await mac(desk, r) for r in await everything(desk)}


def rows_of(url: str) -> list[dict[str, Any]]:
    with open_log(url) as log:
        rows = []

        def seen() -> Any:
            for item in log.items:
                if hasattr(item, "body"):
                    rows.append(json.loads(item.body))
                yield item

        assert verify_chain(seen(), start=log.start, head=log.head).intact
    return [row for row in rows if row["action"].startswith("vault/kek/")]


def steps_of_a_rotation() -> int:
    steps = Steps()

    async def work() -> None:
        kept: dict[bytes, bytes] = {}
        with Database.open(parts=[PART]) as db:
            await fill(desk_on(db, KekBackend(kept)))
            backend = KekBackend(kept, steps)
            await rotate_kek(desk_on(db, backend, steps), destroy=True)

    asyncio.run(work())
    return steps.count


async def fill(desk: Desk) -> dict[tuple[str, str], bytes]:
    for number in range(3):
        await add(desk, f"k{number % 2}", f"{number:032x}")
    await desk.db.run(lambda tx: desk.store.delete(tx, "k1"))
    return await macs_of(desk)


def test_a_rotation_that_was_killed_at_any_step_is_ended_by_the_next() -> None:
    """Before and after each step: every key opens at once, and the old one goes only then."""
    count = steps_of_a_rotation()
    assert count > 10

    async def work(db: Database, at: int, *, after: bool) -> None:
        kept: dict[bytes, bytes] = {}
        before = await fill(desk_on(db, KekBackend(kept)))
        (old,) = kept
        steps = Steps(at, after=after)
        with pytest.raises(Killed):
            await rotate_kek(desk_on(db, KekBackend(kept, steps), steps), destroy=True)
        desk = desk_on(db, KekBackend(kept))  # another process
        assert await macs_of(desk) == before
        used = await db.run(keks.in_use)
        assert set(used) <= set(kept), "a key is under what was destroyed"
        assert sum(used.values()) == 3
        done = await rotate_kek(desk, destroy=True)
        desk = desk_on(db, KekBackend(kept))
        assert await macs_of(desk) == before
        assert await db.run(keks.in_use) == {bytes.fromhex(done.kek): 3}
        assert list(kept) == [bytes.fromhex(done.kek)]
        assert old not in kept
        assert (done.kept, "moving" in (await db.run(keks.states)).values()) == ((), False)

    for at in range(1, count + 1):
        for after in (False, True):
            with Database.open(parts=[PART]) as db:
                asyncio.run(work(db, at, after=after))


def test_the_log_tells_of_each_rotation_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/vault.db"

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        await fill(desk)
        first = await rotate_kek(desk, caller="ada")
        assert (first.moved, first.resumed, len(first.kept), first.destroyed) == (3, False, 1, ())
        second = await rotate_kek(desk, destroy=True, caller="ada")
        assert (second.moved, len(second.destroyed), second.kept) == (3, 2, ())
        assert await destroy_keks(desk) == ()

    with Database.open(url, parts=[PART]) as db:
        asyncio.run(work(db))
    rows = rows_of(url)
    assert [row["action"].rpartition("/")[2] for row in rows] == [
        "made", "moved", "made", "moved", "destroyed",
    ]  # fmt: skip
    assert {row["caller"] for row in rows} == {"ada"}
    assert rows[1]["details"]["moved"] == 3
    assert len(rows[4]["details"]["keks"]) == 2


def test_an_instance_that_does_not_know_stores_nothing_under_the_old_one() -> None:
    """It is refused, learns of the new one, and goes on; else destroying would lose its keys."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        stale = desk_on(db, KekBackend(kept))
        await fill(stale)
        (old,) = kept
        done = await rotate_kek(desk_on(db, KekBackend(kept)))
        with pytest.raises(ServiceError) as caught:
            await add(stale, "late", "f" * 32)
        assert (caught.value.status, caught.value.inner) == (503, "KekRetired")
        assert caught.value.retry_after == 1
        record = await add(stale, "late", "e" * 32)
        assert kek_of(record.wrapped) == bytes.fromhex(done.kek)
        await destroy_keks(stale)
        assert old not in kept
        assert len(await macs_of(desk_on(db, KekBackend(kept)))) == 4

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_a_row_may_change_under_the_old_one_until_it_is_moved() -> None:
    """And what changed while it was being moved is met again, before anything is destroyed."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        stale = desk_on(db, KekBackend(kept))
        before = await fill(stale)
        (old,) = kept

        class Meddling(KekBackend):
            met = 0

            async def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
                moved = await super().rewrap(wrapped, context)
                if self.met < 2:
                    self.met += 1  # somebody changes the row between reading and writing it
                    records = await everything(stale)
                    record = next(r for r in records if r.wrapped == wrapped)
                    await stale.stored(lambda tx: stale.store.change(tx, record))
                return moved

        done = await rotate_kek(desk_on(db, Meddling(kept)), destroy=True)
        assert done.moved == 3
        assert (old in kept, await macs_of(desk_on(db, KekBackend(kept)))) == (False, before)
        # Back to a retired one by a change is refused, too.
        record = (await everything(stale))[0]
        forged = dataclasses.replace(record, wrapped=HEAD + old + record.wrapped[24:])
        with pytest.raises(ServiceError, match="replaced meanwhile"):
            await stale.stored(lambda tx: stale.store.change(tx, forged))

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_what_cannot_be_moved_keeps_its_key_encryption_key() -> None:
    """A backend that fails for one key ends the rotation; nothing is destroyed meanwhile."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        before = await fill(desk)

        class Failing(KekBackend):
            async def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
                if b"k1" in context:
                    raise ServiceError("cannot", status=400, error_code="NotSupported")
                return await super().rewrap(wrapped, context)

        with pytest.raises(ServiceError, match="cannot"):
            await rotate_kek(desk_on(db, Failing(kept)), destroy=True)
        with pytest.raises(ServiceError, match="not ended"):
            await destroy_keks(desk)
        assert len(kept) == 2
        assert await macs_of(desk_on(db, KekBackend(kept))) == before
        done = await rotate_kek(desk_on(db, KekBackend(kept)), destroy=True)
        assert (done.resumed, len(kept)) == (True, 1)

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_a_damaged_row_is_named_and_the_others_are_moved() -> None:
    """One row that somebody wrote to does not keep all others from being moved."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        before = await fill(desk)
        (old,) = kept
        bad = update(versions).where(versions.c.name == "k1")
        await db.run(lambda tx: tx.connection.execute(bad.values(enabled=False)))
        done = await rotate_kek(desk)
        assert done.damaged == (f"k1/{1:032x}",)
        assert (done.moved, done.destroyed, done.kept) == (2, (), (old.hex(),))
        assert await db.run(keks.in_use) == {old: 1, bytes.fromhex(done.kek): 2}
        await db.run(lambda tx: tx.connection.execute(bad.values(enabled=True)))
        done = await rotate_kek(desk, destroy=True)
        assert (done.damaged, done.moved, done.kept) == ((), 3, ())
        assert await macs_of(desk_on(db, KekBackend(kept))) == before

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def _other_kek(wrapped: bytes) -> bytes:
    return HEAD + bytes(16) + wrapped[24:]


def _no_kek(wrapped: bytes) -> bytes:
    return b"unknown" + wrapped


@pytest.mark.parametrize("change", [_other_kek, _no_kek])
@pytest.mark.parametrize("name", ["k1", ""])
def test_nothing_is_destroyed_that_the_copy_of_a_damaged_row_may_need(
    tmp_path: Path, change: Callable[[bytes], bytes], name: str
) -> None:
    """The row names no key-encryption key any more, or another; its copy of before needs one."""
    url = f"sqlite:///{tmp_path}/vault.db"

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        before = await fill(desk)
        (old,) = kept
        version = "" if name == "" else f"{1:032x}"  # what no page after ("", "") has
        of_row = update(versions).where(versions.c.version == f"{1:032x}")

        def damage(tx: Transaction) -> tuple[bytes, Any]:
            row = tx.connection.execute(
                versions.select().where(versions.c.version == f"{1:032x}")
            ).one()
            forged = {"wrapped": change(bytes(row.wrapped)), "name": name, "version": version}
            tx.connection.execute(of_row.values(**forged))
            return bytes(row.wrapped), row

        wrapped, _ = await db.run(damage)
        for _ in range(2):
            with pytest.raises(ServiceError) as caught:
                await rotate_kek(desk, destroy=True, caller="ada")
            assert (caught.value.status, caught.value.inner) == (409, "DamagedRows")
            assert f"{name}/{version}" in str(caught.value.found)
        assert list(kept) == [old], "refused before anything is done"
        await rotate_kek(desk)
        with pytest.raises(ServiceError, match="may need the older"):
            await destroy_keks(desk)
        with pytest.raises(ServiceError, match="is not the name of a damaged row"):
            await rotate_kek(desk, destroy=True, give_up=["k0/" + "0" * 32])
        assert old in kept
        # Somebody puts the row back from a copy: it opens.
        of_damaged = update(versions).where(versions.c.name == name)
        of_damaged = of_damaged.where(versions.c.version == version)
        whole = {"wrapped": wrapped, "name": "k1", "version": f"{1:032x}"}
        await db.run(lambda tx: tx.connection.execute(of_damaged.values(**whole)))
        assert await macs_of(desk_on(db, KekBackend(kept))) == before
        # Or nobody has a copy, and gives it up by its name.
        await db.run(damage)
        done = await rotate_kek(desk, destroy=True, give_up=[f"{name}/{version}"], caller="ada")
        assert (old in kept, done.kept) == (False, ())

    with Database.open(url, parts=[PART]) as db:
        asyncio.run(work(db))
    rows = rows_of(url)
    refused = [row for row in rows if row["decision"] == "refused"]
    assert [row["action"] for row in refused] == ["vault/kek/destroyed"] * 3
    assert refused[0]["caller"] == "ada"
    assert len(refused[0]["details"]["damaged"]) == 1
    assert rows[-1]["details"]["given_up"] == refused[0]["details"]["damaged"]


def test_a_row_that_is_given_up_keeps_no_key_encryption_key() -> None:
    """It still names the old one, and is the only row that does."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        await fill(desk)
        (old,) = kept
        bad = update(versions).where(versions.c.name == "k1")
        await db.run(lambda tx: tx.connection.execute(bad.values(enabled=False)))
        done = await rotate_kek(desk, destroy=True, give_up=[f"k1/{1:032x}"])
        assert (done.destroyed, list(kept)) == ((old.hex(),), [bytes.fromhex(done.kek)])

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_the_list_of_key_encryption_keys_is_nobodys_to_write() -> None:
    """It is sealed whole: a word of somebody else is no word, and nothing is stored meanwhile."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        await fill(desk)
        first = await rotate_kek(desk)
        table = tables.keks
        (row,) = await db.run(lambda tx: tx.connection.execute(table.select()).all())
        assert first.kek.encode() not in bytes(row.sealed), "its states can be read, and forged"
        other = Secrets.ephemeral().protect(b"{}", b"vault-keks-v1")
        of_use = db.secrets.protect(b"{}", b"another use")
        no_form = db.secrets.protect(b'{"ab":1}', b"vault-keks-v1")
        flipped = bytes(row.sealed[:-1]) + bytes([row.sealed[-1] ^ 1])
        for forged in (flipped, b"", other, of_use, no_form):
            change = table.update().values(sealed=forged)
            await db.run(lambda tx, change=change: (tx.connection.execute(change), tx.changed()))
            for refused in (add(desk, "new", "f" * 32), rotate_kek(desk), destroy_keks(desk)):
                with pytest.raises(ServiceError) as caught:
                    await refused
                assert (caught.value.status, caught.value.inner) == (503, "KekListChanged")
        # Without a list nothing is retired; the next rotation retires all others.
        await db.run(lambda tx: (tx.connection.execute(table.delete()), tx.changed()))
        assert await db.run(keks.states) == {}
        await add(desk, "new", "f" * 32)
        done = await rotate_kek(desk, destroy=True)
        assert (len(kept), done.moved, len(await macs_of(desk))) == (1, 4, 4)

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_a_list_of_before_it_was_sealed_is_not_believed(tmp_path: Path) -> None:
    """Whoever wrote it could say which key may be destroyed."""
    from pyenclave.services.storage import Part

    url = f"sqlite:///{tmp_path}/vault.db"

    def before(connection: Any) -> None:
        connection.exec_driver_sql("CREATE TABLE vault_keks (id TEXT PRIMARY KEY, state TEXT)")
        connection.exec_driver_sql("INSERT INTO vault_keks VALUES ('ab', 'retired')")

    with Database.open(url, parts=[Part("vault", (PART.steps[0], before))]):
        pass
    with Database.open(url, parts=[PART]) as db:
        assert db.submit(keks.states).result() == {}
        asyncio.run(fill(desk_on(db, KekBackend({}))))
        db.submit(lambda tx: keks.note(tx, b"\xab", "retired")).result()
    with Database.open(url, parts=[PART]) as db:
        assert db.submit(keks.states).result() == {b"\xab": "retired"}


def test_a_key_encryption_key_that_another_process_made_since_is_not_retired() -> None:
    """It is the one that wraps now: retired, nothing could be stored or moved ever again."""

    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        desk = desk_on(db, KekBackend(kept))
        before = await fill(desk)
        others: list[bytes] = []

        class Overtaken(KekBackend):
            async def rotate_kek(self) -> bytes:
                made = await super().rotate_kek()
                others.append(await KekBackend(kept).rotate_kek())
                return made

        done = await rotate_kek(desk_on(db, Overtaken(kept)), destroy=True)
        assert list(kept)[-1] == others[0] != bytes.fromhex(done.kek)
        desk = desk_on(db, KekBackend(kept))
        record = await add(desk, "late", "f" * 32)
        assert kek_of(record.wrapped) == others[0]
        late = {("late", "f" * 32): await mac(desk, record)}
        assert await macs_of(desk) == before | late
        await rotate_kek(desk, destroy=True)
        assert (len(kept), await macs_of(desk)) == (1, before | late)

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_two_rotations_at_once_end_with_every_key_and_no_old_one() -> None:
    async def work(db: Database) -> None:
        kept: dict[bytes, bytes] = {}
        before = await fill(desk_on(db, KekBackend(kept)))
        (old,) = kept
        await asyncio.gather(
            *(rotate_kek(desk_on(db, KekBackend(kept)), destroy=True) for _ in range(2))
        )
        assert old not in kept
        assert await macs_of(desk_on(db, KekBackend(kept))) == before
        await rotate_kek(desk_on(db, KekBackend(kept)), destroy=True)
        assert len(kept) == 1
        assert await macs_of(desk_on(db, KekBackend(kept))) == before

    with Database.open(parts=[PART]) as db:
        asyncio.run(work(db))


def test_rows_are_counted_by_key_encryption_key(database_url: str) -> None:
    """On both databases, of both forms of wrapped keys; other bytes are nobody's."""

    async def work(db: Database) -> None:
        desk = desk_on(db, MemoryBackend())
        wrapped = [
            HEAD + b"e" * 16 + b"x",
            b"PYEVKEY\x02" + b"e" * 16 + b"y",  # one that may be released
            b"PYEHSMK\x01" + b"h" * 8 + b"z" * 9,
            b"another",
        ]
        for number, data in enumerate(wrapped):
            record = KeyRecord(
                name="k", version=f"{number:032x}", kty="oct", key_ops=(), public={}, wrapped=data
            )
            await desk.db.run(lambda tx, record=record: desk.store.add(tx, record))
        assert await db.run(keks.in_use) == {b"e" * 16: 2, b"h" * 8: 1}
        assert [kek_of(data) for data in wrapped] == [b"e" * 16, b"e" * 16, b"h" * 8, None]

    with Database.open(database_url, parts=[PART], secrets=Secrets.ephemeral()) as db:
        asyncio.run(work(db))


def test_a_running_vault_goes_on_and_old_backups_open_until_the_old_one_is_gone(
    tmp_path: Path,
) -> None:
    """Over HTTPS: create, change a policy, restore; the client's second try succeeds."""
    kept: dict[bytes, bytes] = {}
    with running_vault(tmp_path, backend=KekBackend(kept)) as vault:
        vault.request("POST", "/keys/one/create", {"kty": "EC"})
        point = vault.request("GET", "/keys/one").json()["key"]["x"]
        blob = vault.request("POST", "/keys/one/backup").json()
        desk = desk_on(vault.db, KekBackend(kept))
        asyncio.run(rotate_kek(desk))
        refused = vault.request("POST", "/keys/two/create", {"kty": "EC"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["innererror"]["code"] == "KekRetired"
        assert vault.request("POST", "/keys/two/create", {"kty": "EC"}).status_code == 200
        for key in ("one", "two"):
            body = {"alg": "ES256", "value": "A" * 43}
            assert vault.request("POST", f"/keys/{key}//sign", body).status_code == 200
        for action in (("DELETE", "/keys/one"), ("DELETE", "/deletedkeys/one")):
            vault.request(*action)
        restored = vault.request("POST", "/keys/restore", blob)
        assert restored.json()["key"]["x"] == point
        used = vault.db.submit(keks.in_use).result()
        assert list(used.values()) == [2]
        asyncio.run(destroy_keks(desk))
        for action in (("DELETE", "/keys/one"), ("DELETE", "/deletedkeys/one")):
            vault.request(*action)
        gone = vault.request("POST", "/keys/restore", blob)
        assert gone.status_code == 400
        assert "was destroyed" in gone.json()["error"]["message"]
        assert vault.rows()[-1]["condition"] == "the key-encryption key is there"


def test_the_test_backend_is_no_easier_than_a_real_one() -> None:
    """A wrapped key opens under its own key-encryption key and context only."""
    kept: dict[bytes, bytes] = {}
    backend = KekBackend(kept)
    wrapped = backend._wrap(b"k" * 32, b"context")
    with pytest.raises((ServiceError, InvalidTag)):
        backend._open(wrapped, b"other")
    kept.clear()
    backend.known.clear()
    with pytest.raises(ServiceError, match="unknown"):
        backend._open(wrapped, b"context")
