"""A service that is killed at any moment loses nothing that it acknowledged."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Column, String, Table, select

from pyenclave.formats.audit_log import genesis, row_hash
from pyenclave.services.storage import Database, Part, Secrets, create_tables, metadata
from pyenclave.services.storage.tables import audit, audit_head

marks = Table("test_marks", metadata, Column("name", String, primary_key=True))
PART = Part("test-marks", [create_tables(marks)])

# Writes as fast as it can, and says each name once it is acknowledged.
SERVICE = """
import os, sys, threading
from sqlalchemy import Column, String, Table, insert
from pyenclave.services.audit import Event
from pyenclave.services.storage import Database, Part, Secrets, create_tables, metadata

url, secrets, prefix = sys.argv[1:]
marks = Table("test_marks", metadata, Column("name", String, primary_key=True))
part = Part("test-marks", [create_tables(marks)])
db = Database.open(url, parts=[part], secrets=Secrets(secrets), checkpoint_rows=20)

def client(number):
    for count in range(10**9):
        name = f"{prefix}-{number}-{count}"
        def work(tx):
            tx.connection.execute(insert(marks).values(name=name))
            tx.audit(Event("marks/add", "allowed", resource=name))
        db.submit(work).result()
        os.write(1, name.encode() + b"\\n")

for number in range(4):
    threading.Thread(target=client, args=(number,), daemon=True).start()
threading.Event().wait()
"""


def crash(url: str, folder: Path, prefix: str, lines: int, delay: float) -> set[str]:
    """Run the service, kill it *delay* s after so many acknowledgements, return those."""
    command = [sys.executable, "-c", SERVICE, url, str(folder / "secrets"), prefix]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    assert all(said), "the service ended by itself"
    return {line.decode().strip() for line in said if line.endswith(b"\n")}


def check(url: str, folder: Path, acknowledged: set[str]) -> None:
    with Database.open(url, parts=[PART], secrets=Secrets(folder / "secrets")) as db:
        names, rows, head = db.submit(
            lambda tx: (
                tx.connection.execute(select(marks.c.name)).scalars().all(),
                tx.connection.execute(select(audit).order_by(audit.c.seq)).all(),
                tx.connection.execute(select(audit_head)).one(),
            )
        ).result()
    assert acknowledged <= set(names)
    digest = genesis(head.log)
    for number, row in enumerate(rows, 1):
        assert row.seq == number
        digest = row_hash(digest, row.seq, row.body.encode())
        assert row.hash == digest
    assert (head.seq, head.hash) == (len(rows), digest)
    listed = [row.body.split('"resource":"')[1].split('"')[0] for row in rows]
    assert sorted(listed) == sorted(names)


def test_what_was_acknowledged_survives_a_kill(database_url: str, tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    for round_ in range(2):
        acknowledged |= crash(database_url, tmp_path, str(round_), 30, random.random() / 100)
        check(database_url, tmp_path, acknowledged)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_was_acknowledged_survives_many_kills(database_url: str, tmp_path: Path) -> None:
    """A hundred kills, each checked; the figures are printed for docs/storage.md."""
    acknowledged: set[str] = set()
    for round_ in range(100):
        lines = random.choice((1, 2, 30, 500))
        acknowledged |= crash(database_url, tmp_path, str(round_), lines, random.random() / 10)
        check(database_url, tmp_path, acknowledged)
    kind = database_url.partition(":")[0]
    print(f"{kind}: 100 kills, {len(acknowledged)} acknowledged, 0 lost")


def crash_two(url: str, folder: Path, prefix: str) -> set[str]:
    """Run two instances on one database, kill each at its own moment; return what both said."""
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                crash,
                url,
                folder,
                f"{prefix}-{name}",
                random.choice((1, 30, 200)),
                random.random() / 10,
            )
            for name in ("a", "b")
        ]
        return set[str]().union(*(run.result() for run in runs))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_instances_on_one_database_survive_many_kills(
    database_url: str, tmp_path: Path
) -> None:
    """One chain, each row once, whichever of the two was in the middle of a group."""
    acknowledged: set[str] = set()
    for round_ in range(30):
        acknowledged |= crash_two(database_url, tmp_path, str(round_))
        check(database_url, tmp_path, acknowledged)
    kind = database_url.partition(":")[0]
    print(f"{kind}, two instances: 60 kills, {len(acknowledged)} acknowledged, 0 lost")
