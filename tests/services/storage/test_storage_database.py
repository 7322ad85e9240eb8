"""Works, groups, the cache, the queue: what every service relies on, on both databases."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Integer, String, Table, insert, select, text
from sqlalchemy.exc import IntegrityError

from pyenclave.errors import EnclaveStateError, ServiceError, StorageError
from pyenclave.formats.audit_chain import verify_chain
from pyenclave.formats.audit_log import genesis, row_hash
from pyenclave.services.audit import Event
from pyenclave.services.audit.reader import open_log
from pyenclave.services.storage import (
    Database,
    Part,
    Refused,
    Secrets,
    Transaction,
    create_tables,
    database,
    metadata,
)
from pyenclave.services.storage.tables import audit, audit_checkpoints, audit_head

things = Table(
    "test_things",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
)
PART = Part("test-things", [create_tables(things)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "services.db"


def reopen(url: str, tmp_path: Path, **options: Any) -> Database:
    """Open the database as one more instance does."""
    secrets = Secrets(tmp_path / "secrets")
    return Database.open(url, parts=[PART], secrets=secrets, **options)


@pytest.fixture
def db(database_url: str, tmp_path: Path) -> Iterator[Database]:
    with reopen(database_url, tmp_path) as opened:
        yield opened


def add(name: str, decision: Any = "allowed") -> Any:
    def work(tx: Transaction) -> str:
        tx.connection.execute(insert(things).values(name=name))
        tx.changed()
        return tx.audit(Event("things/add", decision, resource=name))

    return work


def names(tx: Transaction) -> list[str]:
    return [name for (name,) in tx.connection.execute(select(things.c.name).order_by("id"))]


def rows(db: Database) -> list[Any]:
    return db.submit(lambda tx: tx.connection.execute(select(audit).order_by("seq")).all()).result()


def test_a_work_and_its_audit_row_are_there_once_it_is_acknowledged(db: Database) -> None:
    reference = db.submit(add("one")).result()
    assert db.submit(names).result() == ["one"]
    ((seq, listed, decision, body, _),) = rows(db)
    assert (seq, listed, decision) == (1, reference, "allowed")
    assert f'"reference":"{reference}"' in body
    assert body.startswith('{"action":"things/add","at":"20')


def test_rows_are_chained_from_the_id_of_the_log(db: Database) -> None:
    for number in range(70):
        db.submit(add(str(number)))
    db.submit(names).result()
    log, end = db.submit(
        lambda tx: tx.connection.execute(select(audit_head.c.log, audit_head.c.hash)).one()
    ).result()
    digest = genesis(log)
    for seq, _, _, body, stored in rows(db):
        digest = row_hash(digest, seq, body.encode())
        assert stored == digest, seq
    assert (seq, digest) == (70, end)


def test_a_refusal_undoes_the_writes_and_keeps_the_event(db: Database) -> None:
    def work(tx: Transaction) -> None:
        add("never")(tx)
        error = ServiceError("no", status=403, error_code="Forbidden")
        raise Refused(error, Event("things/add", "refused", condition="size", expected=1, found=2))

    with pytest.raises(ServiceError, match=r"^no$") as caught:
        db.submit(work).result()
    assert db.submit(names).result() == []
    ((_, reference, decision, body, _),) = rows(db)
    assert caught.value.reference == reference
    assert decision == "refused"
    assert '"condition":"size"' in body
    assert '"expected":1,"found":2' in body


def test_any_other_exception_undoes_only_its_own_work(db: Database) -> None:
    started = threading.Event()
    db.submit(lambda _tx: started.wait(10))  # so that the next three are one group

    def failing(tx: Transaction) -> None:
        add("middle")(tx)
        raise LookupError("mine")

    first, second, third = db.submit(add("a")), db.submit(failing), db.submit(add("c"))
    started.set()
    with pytest.raises(LookupError, match="mine"):
        second.result()
    assert first.result() != third.result()
    assert db.submit(names).result() == ["a", "c"]
    assert len(rows(db)) == 2


def test_a_broken_constraint_is_the_callers_and_not_the_groups(db: Database) -> None:
    started = threading.Event()
    db.submit(lambda _tx: started.wait(10))
    futures = [db.submit(add(name)) for name in ("a", "a", "b")]
    started.set()
    wait(futures)
    assert [future.exception() is None for future in futures] == [True, False, True]
    assert isinstance(futures[1].exception(), IntegrityError)
    assert db.submit(names).result() == ["a", "b"]


def test_cached_values_are_loaded_once_until_something_changed(
    db: Database, database_url: str, tmp_path: Path
) -> None:
    loads = []

    def read(tx: Transaction) -> list[str]:
        def load() -> list[str]:
            loads.append(1)
            return names(tx)

        return tx.cached(("things", "all"), load)

    assert db.submit(read).result() == db.submit(read).result() == []
    assert len(loads) == 1
    db.submit(add("x")).result()
    assert db.submit(read).result() == db.submit(read).result() == ["x"]
    assert len(loads) == 2
    with reopen(database_url, tmp_path) as other:
        other.submit(add("y")).result()
    assert db.submit(read).result() == ["x", "y"]


def test_what_an_undone_work_cached_is_forgotten(db: Database) -> None:
    def read(tx: Transaction) -> list[str]:
        return tx.cached("all", lambda: names(tx))

    def failing(tx: Transaction) -> None:
        add("ghost")(tx)
        assert read(tx) == ["ghost"]
        raise LookupError

    started = threading.Event()
    db.submit(lambda _tx: started.wait(10))
    failed, after = db.submit(failing), db.submit(read)
    started.set()
    assert isinstance(failed.exception(), LookupError)
    assert after.result() == []


def test_a_value_cached_before_the_works_last_write_is_forgotten(db: Database) -> None:
    def work(tx: Transaction) -> None:
        tx.changed()
        tx.cached("all", lambda: names(tx))
        tx.connection.execute(insert(things).values(name="late"))

    started = threading.Event()
    db.submit(lambda _tx: started.wait(10))
    db.submit(work)
    after = db.submit(lambda tx: tx.cached("all", lambda: names(tx)))
    started.set()
    assert after.result() == ["late"]


def test_the_cache_is_bounded(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SVC-06: keys of an attacker's choice push the oldest out, and no others."""
    monkeypatch.setattr(database, "CACHE_LIMIT", 10)
    loads: list[int] = []

    def read(number: int) -> Any:
        return lambda tx: tx.cached(("n", number), lambda: loads.append(number) or number)

    with reopen(database_url, tmp_path) as db:
        for number in range(50):
            assert db.submit(read(number)).result() == number
        assert len(db._cache) == 10
        for number in range(40, 50):
            assert db.submit(read(number)).result() == number
    assert loads == list(range(50))


def test_what_is_acknowledged_is_durable_by_default(database_url: str, tmp_path: Path) -> None:
    """synchronous=FULL or synchronous_commit=on; less only where it is asked for."""
    sqlite = database_url.startswith("sqlite")
    query = text("PRAGMA synchronous" if sqlite else "SHOW synchronous_commit")

    def setting(tx: Transaction) -> Any:
        return tx.connection.scalar(query)

    with reopen(database_url, tmp_path) as db:
        assert db.submit(setting).result() == (2 if sqlite else "on")
        if sqlite:
            mode = db.submit(lambda tx: tx.connection.scalar(text("PRAGMA journal_mode")))
            assert mode.result() == "wal"
            pages = db.submit(lambda tx: tx.connection.scalar(text("PRAGMA wal_autocheckpoint")))
            assert pages.result() == 4000  # 16 MiB: bounded, and seldom
    with reopen(database_url, tmp_path, durability="normal") as db:
        assert db.submit(setting).result() == (1 if sqlite else "off")
    with pytest.raises(ValueError, match="durability"):
        reopen(database_url, tmp_path, durability="none")


def test_the_queue_is_bounded(tmp_path: Path) -> None:
    """SVC-06: what does not fit is refused, not kept."""
    started, running = threading.Event(), threading.Event()

    def block(_tx: Transaction) -> None:
        running.set()
        started.wait(10)

    with Database.open(f"sqlite:///{tmp_path}/q.db", parts=[], max_queue=5) as db:
        db.submit(block)
        assert running.wait(10)
        waiting = [db.submit(lambda _tx: 1) for _ in range(5)]
        with pytest.raises(ServiceError) as caught:
            db.submit(lambda _tx: 1)
        assert (caught.value.status, caught.value.inner) == (503, "TooManyWaiting")
        assert caught.value.retry_after == 1
        started.set()
        assert [future.result() for future in waiting] == [1] * 5


def test_a_cancelled_work_does_not_run(db: Database) -> None:
    started, running = threading.Event(), threading.Event()

    def block(_tx: Transaction) -> None:
        running.set()
        started.wait(10)

    db.submit(block)
    assert running.wait(10)
    future = db.submit(add("cancelled"))
    assert future.cancel()
    started.set()
    with pytest.raises(CancelledError):
        future.result()
    assert db.submit(names).result() == []


def test_a_work_cannot_commit_a_part_of_its_group(db: Database) -> None:
    def work(tx: Transaction) -> None:
        add("half")(tx)
        tx.connection.commit()

    with pytest.raises(ServiceError) as caught:
        db.submit(work).result()
    assert caught.value.inner == "DatabaseFailed"
    assert db.submit(names).result() == []

    def nested(tx: Transaction) -> None:
        with tx.connection.begin_nested():
            tx.connection.execute(insert(things).values(name="nested"))

    db.submit(nested).result()
    assert db.submit(names).result() == ["nested"]


def test_a_coroutine_that_gives_up_is_not_answered(db: Database) -> None:
    started, running = threading.Event(), threading.Event()

    def block(_tx: Transaction) -> None:
        running.set()
        started.wait(10)

    async def give_up() -> None:
        task = asyncio.create_task(db.run(add("given up")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    db.submit(block)
    assert running.wait(10)
    asyncio.run(give_up())
    started.set()
    assert db.submit(names).result() == []


def test_a_loop_that_is_gone_holds_nobody_up(db: Database) -> None:
    started = threading.Event()
    db.submit(lambda _tx: started.wait(10))
    loop = asyncio.new_event_loop()
    coroutine = db.run(add("late"))

    async def begin() -> None:
        coroutine.send(None)  # queued; nobody will await it

    loop.run_until_complete(begin())
    loop.close()
    coroutine.close()
    started.set()
    assert db.submit(lambda _tx: 1).result() == 1


def test_a_clock_that_jumps_leaves_the_chain_whole(database_url: str, tmp_path: Path) -> None:
    """SVC-13."""
    now = dt.datetime(2026, 7, 2, tzinfo=dt.UTC)

    def clock() -> dt.datetime:
        nonlocal now
        now += dt.timedelta(days=random.choice((-1, 1)))
        return now

    with reopen(database_url, tmp_path, clock=clock, checkpoint_rows=3) as db:
        for number in range(20):
            db.submit(add(str(number))).result()
    with open_log(database_url) as log:
        report = verify_chain(log.items, start=log.start, head=log.head)
    assert (report.intact, report.last, report.signed) == (True, 20, 20)


def test_a_checkpoint_follows_the_last_row_in_time(database_url: str, tmp_path: Path) -> None:
    with reopen(database_url, tmp_path, checkpoint_seconds=0.01) as db:
        db.submit(add("one")).result()
        give_up = time.monotonic() + 20
        signed: list[int] = []
        while not signed and time.monotonic() < give_up:
            signed = list(
                db.submit(
                    lambda tx: (
                        tx.connection.execute(select(audit_checkpoints.c.seq)).scalars().all()
                    )
                ).result()
            )
        assert signed == [1]


def test_coroutines_await_works(db: Database) -> None:
    async def all_of_them() -> list[str | BaseException]:
        works = [db.run(add(str(number % 40))) for number in range(50)]
        return await asyncio.gather(*works, return_exceptions=True)

    results = asyncio.run(all_of_them())
    assert all(isinstance(result, str) for result in results[:40])
    assert all(isinstance(result, IntegrityError) for result in results[40:])


def test_works_that_a_loop_has_at_hand_share_a_commit(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    run_group = Database._run_group
    monkeypatch.setattr(
        Database,
        "_run_group",
        lambda self, jobs, **more: (groups.append(len(jobs)), run_group(self, jobs, **more))[1],
    )
    monkeypatch.setattr(database, "ROUND_SECONDS", 60.0)

    async def twenty() -> None:
        await asyncio.gather(*(db.run(add(str(number))) for number in range(20)))

    asyncio.run(twenty())
    # The writer may take the first ones while the others are put before it.
    assert sum(groups) == 20
    assert len(groups) <= 3
    assert len(db.submit(names).result()) == 20


def test_works_of_one_thread_run_in_the_order_in_which_they_were_given(db: Database) -> None:
    """`submit` on a loop's thread does not overtake what that loop still gathers."""
    seen: list[int] = []

    async def work() -> None:
        first = asyncio.ensure_future(db.run(lambda _tx: seen.append(1)))
        await asyncio.sleep(0)  # it gave its work to the loop's round
        second = db.submit(lambda _tx: seen.append(2))
        third = asyncio.ensure_future(db.run(lambda _tx: seen.append(3)))
        await asyncio.gather(first, asyncio.wrap_future(second), third)

    asyncio.run(work())
    assert seen == [1, 2, 3]


def test_a_loop_that_ended_in_the_middle_of_a_round_is_forgotten(db: Database) -> None:
    """With the works that it had gathered: nobody waits for them."""
    ran: list[int] = []

    loop = asyncio.new_event_loop()
    task = loop.create_task(db.run(lambda _tx: ran.append(1)))
    loop.call_soon(loop.stop)
    loop.run_forever()  # one turn: the work is gathered, and the loop ends before it comes round
    assert not task.done()
    loop.close()
    assert list(db._rounds) == [loop]
    asyncio.run(db.run(lambda _tx: None))
    assert not db._rounds
    assert ran == []
    task._log_destroy_pending = False  # it never ends, as it should


def test_a_busy_loop_does_not_keep_its_works_for_long(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "ROUND_SECONDS", 0.0)
    done = threading.Event()

    def work(tx: Transaction) -> None:
        add("first")(tx)
        done.set()

    async def busy() -> bool:
        first = asyncio.ensure_future(db.run(work))
        second = asyncio.ensure_future(db.run(names))
        # Before this one goes on, both have begun; the second was due at once.
        loop = asyncio.get_running_loop()
        waited = loop.create_future()
        loop.call_soon(lambda: waited.set_result(done.wait(10)))
        held = await waited
        await asyncio.gather(first, second)
        return held

    assert asyncio.run(busy())


def test_what_a_loop_still_holds_when_the_database_closes_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    db = reopen(url, tmp_path)

    async def close_between() -> list[BaseException]:
        tasks = [asyncio.ensure_future(db.run(add(str(number)))) for number in range(3)]
        asyncio.get_running_loop().call_soon(db.close)  # after the tasks, before their hand-over
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [result for result in found if isinstance(result, BaseException)]

    errors = asyncio.run(close_between())
    assert [error.inner for error in errors if isinstance(error, ServiceError)] == [
        "DatabaseClosed"
    ] * 3
    assert len({id(error) for error in errors}) == 3
    with reopen(url, tmp_path) as again:
        assert again.submit(names).result() == []


def test_close_commits_what_waits(database_url: str, tmp_path: Path) -> None:
    db = reopen(database_url, tmp_path)
    futures = [db.submit(add(str(number))) for number in range(300)]
    db.close()
    db.close()
    assert all(future.done() and not future.exception() for future in futures)
    with pytest.raises(ServiceError) as caught:
        db.submit(names)
    assert caught.value.inner == "DatabaseClosed"
    with reopen(database_url, tmp_path) as again:
        assert len(rows(again)) == 300
        signed = again.submit(lambda tx: tx.connection.execute(select(audit_checkpoints)).all())
        assert signed.result()[-1].seq == 300


def test_a_forked_child_cannot_use_it(db: Database) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            db.submit(names)
        except EnclaveStateError:
            db.close()  # does nothing, and does not wait for a thread that is not there
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert db.submit(names).result() == []


def test_files_are_for_the_owner_only(path: Path) -> None:
    """SVC-08."""
    db = Database.open(f"sqlite:///{path}", parts=[PART])
    db.submit(add("x")).result()
    found = sorted(path.parent.iterdir())
    assert [file.name for file in found] == [
        "services.db",
        "services.db-shm",
        "services.db-wal",
        "services.db.secrets",
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in found} == {0o600}
    db.close()


def test_a_link_or_an_open_file_is_refused(tmp_path: Path) -> None:
    """SVC-08."""
    real, link = tmp_path / "real.db", tmp_path / "link.db"
    Database.open(f"sqlite:///{real}", parts=[]).close()
    link.symlink_to(real)
    with pytest.raises(StorageError, match="cannot be opened"):
        Database.open(f"sqlite:///{link}", parts=[])
    real.chmod(0o640)
    with pytest.raises(StorageError, match=r"open to others.*0640"):
        Database.open(f"sqlite:///{real}", parts=[])
    real.chmod(0o600)
    tmp_path.chmod(0o777)
    with pytest.raises(StorageError, match="writable by others"):
        Database.open(f"sqlite:///{real}", parts=[])


@pytest.mark.parametrize(
    "url", ["mysql://x/y", "nothing", "sqlite:///x.db?mode=ro", "sqlite://host/x.db", ""]
)
def test_other_urls_are_wrong(url: str) -> None:
    with pytest.raises(ValueError, match=r"database|SQLite"):
        Database.open(url, parts=[])


def step(name: str, ran: list[str]) -> Any:
    def run(connection: Connection) -> None:
        ran.append(name)
        connection.exec_driver_sql(f"CREATE TABLE {name} (id INTEGER)")

    return run


def test_steps_run_once_and_in_order(database_url: str) -> None:
    ran: list[str] = []
    secrets = Secrets.ephemeral()
    a, b, c = (step(name, ran) for name in "abc")
    for parts in ([Part("p", [a])], [Part("p", [a, b]), Part("q", [c])]):
        Database.open(database_url, parts=parts, secrets=secrets).close()
    assert ran == ["a", "b", "c"]
    with pytest.raises(StorageError, match=r"newer than this program.*version 1.*version 2"):
        Database.open(database_url, parts=[Part("p", [a])], secrets=secrets)


def test_a_step_that_fails_leaves_the_old_schema(database_url: str) -> None:
    ran: list[str] = []
    a, b = step("a", ran), step("b", ran)
    secrets = Secrets.ephemeral()
    Database.open(database_url, parts=[Part("p", [a])], secrets=secrets).close()
    with pytest.raises(StorageError, match="cannot be set up"):
        Database.open(database_url, parts=[Part("p", [a, b, b])], secrets=secrets)
    Database.open(database_url, parts=[Part("p", [a])], secrets=secrets).close()  # still version 1
    Database.open(database_url, parts=[Part("p", [a, b])], secrets=secrets).close()
    assert ran == ["a", "b", "b", "b"]


def test_instances_that_start_at_once_run_each_step_once(database_url: str, tmp_path: Path) -> None:
    ran: list[str] = []
    opened: list[Database] = []

    def start() -> None:
        secrets = Secrets(tmp_path / "secrets")
        parts = [Part("p", [step("a", ran), step("b", ran)])]
        opened.append(Database.open(database_url, parts=parts, secrets=secrets))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == ["a", "b"]
    assert len({db.audit_key_pem for db in opened}) == 1
    assert len(opened) == 6
    for db in opened:
        db.close()


def test_two_instances_write_one_chain(db: Database, database_url: str, tmp_path: Path) -> None:
    with reopen(database_url, tmp_path) as other:
        futures = [(db, other)[n % 2].submit(add(str(n))) for n in range(200)]
        references = {future.result() for future in futures}
    found = rows(db)
    assert {row.reference for row in found} == references
    assert [row.seq for row in found] == list(range(1, 201))
    for before, row in itertools.pairwise(found):
        assert row.hash == row_hash(before.hash, row.seq, row.body.encode())
