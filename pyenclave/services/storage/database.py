"""
One database of the services: works, committed in groups by one thread.

Works wait in a bounded queue. The writer takes what is there, runs it in one transaction, appends
the audit rows of all, commits, and only then hands out the results: what a caller was told is on
the disk, and so is its audit row. Groups grow with the load, so that the price of a commit is
shared by as many as wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import os
import queue
import secrets as random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, Engine, event, insert, select
from sqlalchemy.exc import SQLAlchemyError

from pyenclave.errors import EnclaveStateError, ServiceError, StorageError
from pyenclave.formats.audit_log import LOG_ID
from pyenclave.services.audit.writer import Appender, Head, Signer, first_head, timestamp
from pyenclave.services.storage import engines, tables
from pyenclave.services.storage.part import Part, create_tables, migrate
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.storage.transaction import Cache, Group, Refused, Transaction

__all__ = ["Database"]

T = TypeVar("T")
Work = Callable[[Transaction], Any]

MAX_GROUP: Final = 256  # works of one transaction
ROUND_SECONDS: Final = 0.004  # how long works of a busy loop wait for those behind them
CACHE_LIMIT: Final = 10_000  # cached values
CONNECT_PAUSE: Final = 0.1  # between attempts to reach a lost server
SETTLE_SECONDS: Final = 10.0  # how long the fate of a commit is asked for
_LOG: Final = logging.getLogger("pyenclave.storage")

_AUDIT_PART: Final = Part(
    "audit",
    [create_tables(tables.audit, tables.audit_head, tables.audit_checkpoints, tables.audit_keys)],
)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class _Job:
    """A work and where its result goes: an asyncio future of *loop*, or one of threads."""

    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(
        self,
        work: Work,
        future: Future[Any] | asyncio.Future[Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.work = work
        self.future = future
        self.loop = loop
        self.result: Any = None
        self.error: BaseException | None = None

    def start(self) -> bool:
        """Whether anybody still waits; a thread can no longer cancel it."""
        if isinstance(self.future, Future):
            return self.future.set_running_or_notify_cancel()
        return not self.future.cancelled()


class Database:
    """
    A database, its writer thread and its audit log. `open` makes one.

    One object serves any number of threads and event loops of one process; a forked child cannot
    use it. Several processes may share a SQLite file or a PostgreSQL database.

    Attributes:
        secrets: Protects keys that lie in this database.
        audit_key_pem: Public half of the key that signs the audit log's checkpoints.

    """

    def __init__(
        self,
        engine: Engine,
        *,
        appender: Appender,
        secrets: Secrets,
        clock: Callable[[], dt.datetime],
        max_queue: int,
    ) -> None:
        self.secrets = secrets
        self.audit_key_pem = appender.signer.public_pem
        self._engine = engine
        self._appender = appender
        self._clock = clock
        self._max_queue = max_queue
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # What each loop has gathered, and when it goes to the writer at the latest. Only its own
        # thread looks at a loop's.
        self._rounds: dict[asyncio.AbstractEventLoop, tuple[float, list[_Job]]] = {}
        self._cache = Cache(CACHE_LIMIT)
        self._connection: Connection | None = None
        self._driver: Any = None
        self._pid = os.getpid()
        self._closed = False
        self._close_lock = threading.Lock()
        self._lost_at = float("-inf")
        self._failure: str | None = None  # inner code of the last group's, until one succeeds
        self._unsigned_since: float | None = None
        self._thread = threading.Thread(target=self._serve, name="pyenclave-storage", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        url: str = "sqlite://",
        *,
        parts: Sequence[Part],
        durability: engines.Durability = "full",
        secrets: Secrets | None = None,
        clock: Callable[[], dt.datetime] | None = None,
        max_queue: int = 4_096,
        checkpoint_rows: int = 1_000,
        checkpoint_seconds: float = 60.0,
        existing: bool = False,
    ) -> Self:
        """
        Open a database; it is made, and its schema brought up to date, under a lock.

        Args:
            url: ``sqlite:///PATH``, ``sqlite://`` (in memory) or ``postgresql://…``.
            parts: What is kept in it.
            durability: "full": an acknowledged work survives a power loss. "normal": it survives
                the end of the process; a power loss (PostgreSQL: the server's end) may take the
                last ones, never the order.
            secrets: Protects the key of the audit log's checkpoints. Default: of a SQLite file the
                file beside it, ``PATH.secrets``; in memory: of this process. Instances that share
                a PostgreSQL database need the same secrets file, so there is no default.
            clock: Gives the time, with its zone.
            max_queue: Works that may wait; further ones are refused with 503.
            checkpoint_rows: Audit rows after which a checkpoint is signed.
            checkpoint_seconds: Age of the first unsigned row at which one is signed.
            existing: Make neither a database nor a key for checkpoints; for tools.

        Raises:
            StorageError: It cannot be opened, or its schema is newer than this code.
            ValueError: The URL is of another kind, or secrets are missing.

        """
        if durability not in {"full", "normal"}:
            raise ValueError(f'durability is "full" or "normal", not {durability!r:.40}')
        parsed = engines.parse_url(url)
        path = engines.sqlite_path(parsed)
        engine = engines.connect(parsed, durability, create=not existing)
        if secrets is None:
            if path is not None:
                secrets = Secrets(Path(f"{path}.secrets"))
            elif engines.is_memory(parsed):
                secrets = Secrets.ephemeral()
            else:
                raise ValueError("a shared database needs secrets= (a file that instances share)")
        time_of = clock or _now
        try:
            with engine.connect() as connection:
                signer = _prepare(connection, parts, secrets, None if existing else time_of())
        except SQLAlchemyError as error:
            engine.dispose()
            told = engines.error_of(error)
            if told is None:
                raise StorageError("the database cannot be set up", found=str(error)) from error
            raise StorageError(told.message, found=told.found) from None
        event.listen(engine, "commit", _no_commit)
        appender = Appender(
            engine.dialect.name,
            signer,
            every_rows=checkpoint_rows,
            every_seconds=checkpoint_seconds,
        )
        return cls(engine, appender=appender, secrets=secrets, clock=time_of, max_queue=max_queue)

    def __repr__(self) -> str:
        return f"Database({self._engine.url.render_as_string(hide_password=True)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- callers -------------------------------------------------------------------------------

    def submit(self, work: Callable[[Transaction], T]) -> Future[T]:
        """
        Queue *work*; the future is done once its commit is durable.

        A work runs in the writer thread: it must be short, and does no I/O but SQL. It runs once
        or, if it is cancelled or the database fails first, not at all. If it raises `Refused`, its
        writes are undone and the event is kept; any other exception undoes writes and events. The
        exception is the future's. It runs after what this thread's event loop gave to `run` before.

        Raises:
            ServiceError: The queue is full, or the database is closed (503).
            EnclaveStateError: In a forked child.

        """
        future: Future[T] = Future()
        if self._rounds:
            with contextlib.suppress(RuntimeError):  # no loop runs in this thread
                self._hand_over(asyncio.get_running_loop())
        self._check_room(1)
        self._put([_Job(work, future, None)])
        return future

    async def run(self, work: Callable[[Transaction], T]) -> T:
        """
        Await *work*; as `submit`, at a lower price.

        A commit costs as much for many works as for one, so those that the loop has at hand go to
        the writer together: when the loop comes round, or earlier if that takes long.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        job = _Job(work, future, loop)
        now = loop.time()
        gathered = self._rounds.get(loop)
        if gathered is None:
            self._check_room(1)
            if self._rounds:
                self._forget_closed()
            self._rounds[loop] = now + ROUND_SECONDS, [job]
            loop.call_soon(self._hand_over, loop)
        else:
            due, jobs = gathered
            self._check_room(len(jobs) + 1)
            jobs.append(job)
            if now >= due:
                self._hand_over(loop)
        return await future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        """Queue what *loop*, whose thread this is, has gathered."""
        _, jobs = self._rounds.pop(loop, (0.0, []))
        if not jobs:
            return
        try:
            self._put(jobs)
        except ServiceError as error:
            for job in jobs:
                job.error = _copy(error)
            _deliver(jobs)

    def _forget_closed(self) -> None:
        """Drop what loops had gathered that were closed before they came round: nobody waits."""
        for loop in list(self._rounds):
            if loop.is_closed():
                self._rounds.pop(loop, None)

    def close(self) -> None:
        """
        Commit what is queued, sign the end of the audit log and disconnect; may be called twice.

        What a loop has gathered and not handed over yet is refused (503).
        """
        if os.getpid() != self._pid:
            return
        with self._close_lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_room(self, works: int) -> None:
        if os.getpid() != self._pid:
            raise EnclaveStateError(
                "a database cannot be used in a forked child", advice="Open it there."
            )
        if self._queue.qsize() + works > self._max_queue:
            raise _refusal("too many requests wait for the database", "TooManyWaiting")
        if self._closed:
            raise _refusal("the database is closed", "DatabaseClosed")

    def _put(self, jobs: Sequence[_Job]) -> None:
        with self._close_lock:
            if self._closed:
                raise _refusal("the database is closed", "DatabaseClosed")
            for job in jobs:
                self._queue.put(job)

    # -- the writer thread ---------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            jobs: list[_Job] = []
            try:
                job = self._queue.get(timeout=self._until_checkpoint())
            except queue.Empty:
                self._run_group(jobs)
                continue
            if job is not None:
                jobs.append(job)
                while len(jobs) < MAX_GROUP and not self._queue.empty():
                    job = self._queue.get()
                    if job is None:
                        break
                    jobs.append(job)
                self._run_group(jobs)
            if job is None:
                break
        self._run_group([], closing=True)
        self._disconnect()
        self._engine.dispose()

    def _until_checkpoint(self) -> float | None:
        if self._unsigned_since is None:
            return None
        due = self._unsigned_since + self._appender.every_seconds
        return max(0.0, due - time.monotonic())

    def _run_group(self, jobs: list[_Job], *, closing: bool = False) -> None:
        """Run *jobs* in one transaction and hand out what became of them."""
        due = closing or not jobs
        jobs = [job for job in jobs if job.start()]
        if due and self._unsigned_since is None:
            return
        try:
            self._transact(jobs, sign=due)
            if self._failure is not None:
                _LOG.warning("the database works again")
                self._failure = None
        except Exception as error:
            told = engines.error_of(error)
            if told is None:
                _LOG.exception("a group of works failed")
                told = _refusal("the database failed", "DatabaseFailed")
            elif self._failure != told.inner:
                _LOG.warning("%s: %s", told.message, told.found)  # once, not for every group
            self._failure = told.inner
            self._disconnect()
            self._cache.clear()
            if told.inner == "DatabaseUnreachable":
                self._lost_at = time.monotonic()
            if due:
                self._unsigned_since = time.monotonic()  # later
            for job in jobs:
                job.result, job.error = None, _copy(told)
        _deliver_all(jobs)

    def _connect(self) -> Connection:
        if self._connection is None:
            pause = self._lost_at + CONNECT_PAUSE - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            connection = self._engine.connect()
            self._connection = connection
            self._driver = connection.connection.driver_connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                connection.invalidate()
            with contextlib.suppress(SQLAlchemyError):
                connection.close()

    def _transact(self, jobs: list[_Job], *, sign: bool) -> None:
        connection, driver, head = self._begin()
        appender = self._appender
        before = head.seq
        self._cache.at(head.generation)
        now = self._clock()
        group = Group(connection, driver, self._cache, appender.references.take, now, self.secrets)
        transaction = Transaction(group)
        for job in jobs:
            self._run_work(job, group, transaction)
        if group.events or group.any_changed or sign:
            at = timestamp(group.now)
            if group.events:
                appender.append(driver, head, group.events, at)
            if group.any_changed:
                head.generation += 1
            unsigned = head.seq - head.checkpoint_seq
            if unsigned and (sign or unsigned >= appender.every_rows):
                appender.checkpoint(driver, head, at)
            appender.write_head(driver, head)
        elif not group.used:
            self._end(connection, driver.rollback)
            return
        self._commit(connection, driver, head)
        if group.any_changed:
            self._cache.clear()
        if head.checkpoint_seq == head.seq:
            self._unsigned_since = None
        elif self._unsigned_since is None and head.seq > before:
            self._unsigned_since = time.monotonic()

    def _begin(self) -> tuple[Connection, Any, Head]:
        """Start a transaction, on a fresh connection if the one at hand was lost meanwhile."""
        fresh = self._connection is None
        while True:
            connection = self._connect()
            driver = self._driver
            try:
                if self._engine.dialect.name == "sqlite":
                    driver.execute("BEGIN IMMEDIATE")
                return connection, driver, self._appender.read_head(driver)
            except Exception as error:
                told = engines.error_of(error)
                if fresh or told is None or told.inner != "DatabaseUnreachable":
                    raise
                # Nothing has run yet, so that nothing can run twice.
                self._disconnect()
                fresh = True

    @staticmethod
    def _run_work(job: _Job, group: Group, transaction: Transaction) -> None:
        group.begin_work()
        try:
            job.result = job.work(transaction)
        except Refused as refused:
            group.undo_work()
            refused.error.reference = group.audit(refused.event)
            job.error = refused.error
        except BaseException as error:
            told = engines.error_of(error)
            try:
                group.undo_work()
            except Exception as failed:  # the transaction is gone, and the group with it
                raise (failed if told is None else error) from None
            job.error = told or error
        else:
            group.keep_work()

    @staticmethod
    def _end(connection: Connection, how: Callable[[], None]) -> None:
        how()
        if connection.get_transaction() is not None:
            connection.rollback()  # only SQLAlchemy's idea of one; the driver's has ended

    def _commit(self, connection: Connection, driver: Any, head: Head) -> None:
        try:
            self._end(connection, driver.commit)
        except Exception as error:
            if not head.transaction or not self._settled(head.transaction):
                raise
            _LOG.warning("the server was lost after a commit: %s", error)

    def _settled(self, transaction: str) -> bool:
        """Ask the server, once it is back, whether a transaction was committed."""
        give_up = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < give_up:
            self._disconnect()
            self._lost_at = time.monotonic()
            try:
                self._connect()
                row = self._driver.execute(
                    "SELECT pg_xact_status(%s::xid8)", (transaction,)
                ).fetchone()
                self._driver.rollback()
            except Exception as error:
                _LOG.info("asking for the fate of a commit: %s", error)
                continue
            if row[0] != "in progress":
                return bool(row[0] == "committed")
        return False


def _prepare(
    connection: Connection, parts: Sequence[Part], secrets: Secrets, now: dt.datetime | None
) -> Signer:
    """Bring the schema up to date and find the key of the checkpoints, in one transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    changed = migrate(connection, [_AUDIT_PART, *parts])
    for name, (old, new) in changed.items():
        _LOG.info("schema of %s: version %d to %d", name, old, new)
    if connection.execute(select(tables.audit_head.c.id)).first() is None:
        connection.execute(insert(tables.audit_head).values(first_head(random.token_bytes(LOG_ID))))
    keys = select(tables.audit_keys.c.private).order_by(tables.audit_keys.c.created.desc())
    signer = None
    for (blob,) in connection.execute(keys):
        signer = Signer.open(bytes(blob), secrets.open)
        if signer is not None:
            break
    if signer is None:
        if now is None:
            raise StorageError(
                "these secrets do not open the key of the audit log",
                advice="Name the service's secrets file.",
            )
        signer = Signer.generate()
        connection.execute(
            insert(tables.audit_keys).values(
                kid=signer.kid,
                public=signer.public_pem,
                private=signer.protected(secrets.protect),
                created=timestamp(now),
            )
        )
    connection.commit()
    return signer


def _no_commit(_connection: Connection) -> None:
    """Stop a work that would commit a part of its group."""
    raise RuntimeError("a work does not commit; its group does")


def _refusal(message: str, inner: str) -> ServiceError:
    return ServiceError(
        message, status=503, error_code="ServiceUnavailable", inner=inner, retry_after=1.0
    )


def _copy(error: ServiceError) -> ServiceError:
    """Return a twin: an exception that is raised gets a traceback of its own."""
    return ServiceError(
        error.message,
        status=error.status,
        error_code=error.error_code,
        inner=error.inner,
        retry_after=error.retry_after,
        found=error.found,
    )


def _deliver_all(jobs: list[_Job]) -> None:
    """Set every future: those of threads at once, those of a loop by one call into it."""
    loops: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in jobs:
        if job.loop is not None:
            loops.setdefault(job.loop, []).append(job)
            continue
        future = job.future
        if job.error is not None:
            future.set_exception(job.error)
        else:
            future.set_result(job.result)
    for loop, theirs in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_deliver, theirs)


def _deliver(jobs: list[_Job]) -> None:
    for job in jobs:
        future = job.future
        if not future.done():
            if job.error is not None:
                future.set_exception(job.error)
            else:
                future.set_result(job.result)
