"""Databases that fail: typed errors, nothing half done, and work goes on when they are back."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, String, Table, create_engine, insert, select, text

from pyenclave.errors import ServiceError, StorageError
from pyenclave.services.audit import Event
from pyenclave.services.storage import (
    Database,
    Part,
    Secrets,
    Transaction,
    create_tables,
    engines,
    metadata,
)
from pyenclave.services.storage.tables import audit

notes = Table("test_notes", metadata, Column("name", String, primary_key=True))
PART = Part("test-notes", [create_tables(notes)])


def add(name: str) -> Any:
    def work(tx: Transaction) -> str:
        tx.connection.execute(insert(notes).values(name=name))
        tx.audit(Event("notes/add", "allowed", resource=name))
        return name

    return work


def everything(tx: Transaction) -> tuple[list[str], list[str]]:
    """Names of the notes, and resources of the audit rows."""
    names = tx.connection.execute(select(notes.c.name)).scalars()
    bodies = tx.connection.execute(select(audit.c.body).order_by(audit.c.seq)).scalars()
    return sorted(names), sorted(body.split('"resource":"')[1].split('"')[0] for body in bodies)


def sql(statement: str) -> Any:
    return lambda tx: tx.connection.execute(text(statement)) and None


def refusal(db: Database, work: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        db.submit(work).result(60)
    assert caught.value.status == 503
    assert caught.value.retry_after
    return caught.value


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    secrets = Secrets.ephemeral()
    with Database.open(database_url, parts=[PART], secrets=secrets) as database:
        yield database


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path}/x.db", parts=[PART]) as database:
        yield database


@pytest.fixture
def on_server(postgres_url: str) -> Iterator[Database]:
    secrets = Secrets.ephemeral()
    with Database.open(postgres_url, parts=[PART], secrets=secrets) as database:
        yield database


def test_a_full_disk_is_named_and_survived(sqlite: Database) -> None:
    sqlite.submit(add("before")).result()
    sqlite.submit(sql("PRAGMA max_page_count = 1")).result()  # it cannot grow any more
    big = add("x" * 100_000)
    assert refusal(sqlite, big).inner == "DatabaseFull"
    assert sqlite.submit(everything).result() == (["before"], ["before"])
    sqlite.submit(sql("PRAGMA max_page_count = 100000")).result()
    sqlite.submit(big).result()


def test_a_disk_that_fills_with_the_audit_row_takes_the_work_back(sqlite: Database) -> None:
    sqlite.submit(add("before")).result()

    def work(tx: Transaction) -> None:
        add("small")(tx)
        for _ in range(50):
            tx.audit(Event("big", "allowed", details={"x": "y" * 4_000}))

    sqlite.submit(sql("PRAGMA max_page_count = 1")).result()
    assert refusal(sqlite, work).inner == "DatabaseFull"
    assert sqlite.submit(everything).result() == (["before"], ["before"])


def test_a_database_that_may_only_be_read_is_named(sqlite: Database) -> None:
    sqlite.submit(sql("PRAGMA query_only = ON")).result()
    assert refusal(sqlite, add("x")).inner == "DatabaseReadOnly"


def test_a_server_that_may_only_be_read_is_named(on_server: Database, postgres_url: str) -> None:
    engine = create_engine(engines.parse_url(postgres_url))
    name = postgres_url.split("@/")[1].split("?", maxsplit=1)[0]
    with engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    engine.dispose()
    assert refusal(on_server, add("x")).inner == "DatabaseReadOnly"


def test_a_lock_that_somebody_else_holds_is_waited_for_and_then_named(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BUSY_SECONDS", 0.1)
    with Database.open(database_url, parts=[PART], secrets=Secrets.ephemeral()) as db:
        db.submit(add("a")).result()
        other = create_engine(engines.parse_url(database_url))
        with other.connect() as connection:
            connection.execute(text("UPDATE audit_head SET id = 1"))
            assert refusal(db, add("b")).inner == "DatabaseLocked"
            connection.rollback()
        other.dispose()
        db.submit(add("c")).result()
        assert db.submit(everything).result() == (["a", "c"], ["a", "c"])


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.db"
    file.write_bytes(b"something else " * 1_000)
    file.chmod(0o600)
    with pytest.raises(StorageError, match="no database"):
        Database.open(f"sqlite:///{file}", parts=[])


def test_failures_leave_no_descriptor_and_no_thread(database_url: str, tmp_path: Path) -> None:
    """SVC-09."""

    def bad(connection: Any) -> None:
        connection.execute(text("CREATE TABLE"))

    def state() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    secrets = Secrets.ephemeral()
    broken = Part("broken", [bad])
    junk = tmp_path / "junk"
    junk.write_bytes(b"x" * 5_000)
    junk.chmod(0o600)

    Database.open(database_url, parts=[PART], secrets=secrets).close()
    before = state()
    for _ in range(10):
        with pytest.raises(StorageError):
            Database.open(database_url, parts=[broken], secrets=secrets)
        with pytest.raises(StorageError):
            Database.open(f"sqlite:///{tmp_path}/missing/x.db", parts=[])
        with pytest.raises(StorageError):
            Database.open(f"sqlite:///{junk}", parts=[])
        with Database.open(database_url, parts=[PART], secrets=secrets) as db:
            for _ in range(20):
                with pytest.raises(LookupError):
                    db.submit(_raise).result()
    give_up = time.monotonic() + 20  # a thread that was joined may still be counted
    while any(now > then for now, then in zip(state(), before, strict=True)):
        assert time.monotonic() < give_up, (before, state())
        time.sleep(0.01)


def _raise(tx: Transaction) -> None:
    add("x")(tx)
    raise LookupError


def test_a_server_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match="cannot be reached"):
        Database.open(f"postgresql://x@/y?host={tmp_path}", parts=[], secrets=Secrets.ephemeral())


def test_a_shared_database_without_shared_secrets_is_wrong() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match="needs secrets="):
        Database.open("postgresql://x@/y", parts=[])


def test_a_connection_that_was_closed_meanwhile_is_made_again(on_server: Database) -> None:
    end = "SELECT pg_terminate_backend(pg_backend_pid())"
    assert refusal(on_server, sql(end)).inner == "DatabaseUnreachable"
    pid = on_server.submit(lambda tx: tx.connection.scalar(text("SELECT pg_backend_pid()")))
    other = create_engine(on_server._engine.url)
    with other.begin() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend({pid.result()})"))
    other.dispose()
    on_server.submit(add("a")).result()  # nobody sees it: nothing had run
    assert on_server.submit(everything).result() == (["a"], ["a"])


def test_a_forked_child_does_not_end_its_parents_session(on_server: Database) -> None:
    on_server.submit(add("a")).result()
    child = os.fork()
    if child == 0:
        on_server._connection = on_server._driver = None
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    on_server.submit(add("b")).result()


def test_a_server_that_dies_loses_and_doubles_nothing(postgres: Any) -> None:
    """Each work that was acknowledged is there once, and none that was refused."""
    acknowledged: list[str] = []
    refused: list[object] = []
    stop = threading.Event()

    def client(db: Database, number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            name = f"{number}-{count}"
            try:
                acknowledged.append(db.submit(add(name)).result(60))
            except ServiceError as error:
                refused.append((error.status, error.inner))

    url = postgres.fresh()
    secrets = Secrets.ephemeral()
    with (
        Database.open(url, parts=[PART], secrets=secrets) as one,
        Database.open(url, parts=[PART], secrets=secrets) as two,
    ):
        clients = [
            threading.Thread(target=client, args=(db, n)) for n, db in enumerate((one, two) * 3)
        ]
        for thread in clients:
            thread.start()
        for how in (signal.SIGKILL, signal.SIGINT):
            seen = len(acknowledged)
            while len(acknowledged) < seen + 50:
                time.sleep(0.001)
            postgres.end(how)
            postgres.start()
        seen = len(acknowledged)
        while len(acknowledged) < seen + 50:
            time.sleep(0.001)
        stop.set()
        for thread in clients:
            thread.join()
        names, rows = one.submit(everything).result()
    assert set(refused) == {(503, "DatabaseUnreachable")}
    assert names == sorted(acknowledged)
    assert rows == names


# On a disk of two megabytes that something else fills; then it makes room again.
ON_A_SMALL_DISK = """
import os, sys
from sqlalchemy import Column, String, Table, func, insert, select
from pyenclave.cli import main
from pyenclave.errors import ServiceError
from pyenclave.services.audit import Event
from pyenclave.services.storage import Database, Part, create_tables, metadata

notes = Table("notes", metadata, Column("name", String, primary_key=True))
db = Database.open("sqlite:////mnt/x.db", parts=[Part("notes", [create_tables(notes)])])

def add(name):
    def work(tx):
        tx.connection.execute(insert(notes).values(name=name + "x" * 4000))
        tx.audit(Event("notes/add", "allowed", resource=name))
    return work

kept, refused = 0, set()
for number in range(400):
    try:
        db.submit(add(str(number))).result()
        kept += 1
    except ServiceError as error:
        refused.add((error.status, error.inner))
os.unlink("/mnt/filler")
db.submit(add("last")).result()
count = db.submit(lambda tx: tx.connection.scalar(select(func.count()).select_from(notes))).result()
db.close()
print(0 < kept < 400, count == kept + 1, refused)
print(main(["audit", "verify", "--database", "/mnt/x.db"]))
"""


def test_a_disk_that_is_really_full_loses_nothing() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = "mount -t tmpfs -o size=2m,mode=0700 none /mnt || exit 77"
    filled = "head -c 400k /dev/zero >/mnt/filler"
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            f'{disk}; {filled}; exec "$0" -c "$1"',
            sys.executable,
            ON_A_SMALL_DISK,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode in {1, 77} and not done.stdout:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()[:100]}")
    lines = done.stdout.splitlines()
    assert lines[0] == "True True {(503, 'DatabaseFull')}", done.stderr
    assert lines[-1] == "0"
