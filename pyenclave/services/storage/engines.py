"""
Connections to SQLite and PostgreSQL, and what their errors mean.

A SQLite file has mode 0600 and lies in a folder that others cannot write. SQLite runs in WAL mode;
with durability "full" every commit is on the disk before it is acknowledged (``synchronous=FULL``).
"""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from pyenclave.errors import ServiceError, StorageError

__all__ = ["Durability", "connect", "error_of", "is_memory", "parse_url", "sqlite_path"]

Durability = Literal["full", "normal"]

BUSY_SECONDS: Final = 5.0  # how long another writer is waited for
CONNECT_SECONDS: Final = 5
# Pages (16 MiB) after which SQLite moves its log into the file. The commit that does it takes as
# long as ten others, nearly however much there is to move: seldom is better than little.
WAL_PAGES: Final = 4000
_RETRY_AFTER: Final = 1.0

_SQLITE: Final = {
    sqlite3.SQLITE_BUSY: ("DatabaseLocked", "the database is locked by another program"),
    sqlite3.SQLITE_LOCKED: ("DatabaseLocked", "the database is locked by another program"),
    sqlite3.SQLITE_READONLY: ("DatabaseReadOnly", "the database may only be read"),
    sqlite3.SQLITE_PERM: ("DatabaseReadOnly", "the database may not be opened"),
    sqlite3.SQLITE_AUTH: ("DatabaseReadOnly", "the database may not be opened"),
    sqlite3.SQLITE_FULL: ("DatabaseFull", "the disk of the database is full"),
    sqlite3.SQLITE_IOERR: ("DatabaseFailed", "the disk of the database fails"),
    sqlite3.SQLITE_NOMEM: ("DatabaseFailed", "there is no memory for the database"),
    sqlite3.SQLITE_CANTOPEN: ("DatabaseUnreachable", "the database cannot be opened"),
    sqlite3.SQLITE_CORRUPT: ("DatabaseCorrupt", "the database is damaged"),
    sqlite3.SQLITE_NOTADB: ("DatabaseCorrupt", "the file is no database"),
}
# PostgreSQL, Appendix A: classes and single codes.
_STATES: Final = {
    "08": ("DatabaseUnreachable", "the database server cannot be reached"),
    "25006": ("DatabaseReadOnly", "the database server may only be read"),
    "28": ("DatabaseUnreachable", "the database server refuses the login"),
    "3D": ("DatabaseUnreachable", "the database does not exist"),
    "40": ("DatabaseLocked", "the database is busy with another transaction"),
    "42501": ("DatabaseReadOnly", "the database server refuses the right"),
    "53": ("DatabaseFull", "the database server has no room"),
    "53300": ("DatabaseUnreachable", "the database server has no connection left"),
    "55P03": ("DatabaseLocked", "the database is locked by another program"),
    "57": ("DatabaseUnreachable", "the database server stopped"),
    "58": ("DatabaseFailed", "the disk of the database server fails"),
    "XX": ("DatabaseCorrupt", "the database server found damage"),
}


def parse_url(url: str | URL) -> URL:
    """
    Read the address of a database.

    Raises:
        ValueError: Neither ``sqlite:///PATH``, ``sqlite://`` (in memory) nor ``postgresql://…``.

    """
    try:
        parsed = make_url(url)
    except UrlError:
        raise ValueError("not the URL of a database (sqlite:///PATH, postgresql://…)") from None
    kind = parsed.drivername
    if kind in {"postgresql", "postgres", "postgresql+psycopg"}:
        return parsed.set(drivername="postgresql+psycopg")
    if kind in {"sqlite", "sqlite+pysqlite"}:
        if parsed.query or parsed.host:
            raise ValueError("the URL of a SQLite file is sqlite:///PATH and nothing more")
        return parsed.set(drivername="sqlite+pysqlite")
    raise ValueError(f"a database is SQLite or PostgreSQL, not {kind!r:.40}")


def is_memory(url: URL) -> bool:
    """Whether *url* is a SQLite database that lives in this process only."""
    return url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}


def sqlite_path(url: URL) -> Path | None:
    """Return the file of a SQLite database; ``None`` for PostgreSQL or memory."""
    if url.get_backend_name() != "sqlite" or is_memory(url) or url.database is None:
        return None
    return Path(url.database).absolute()


def _guard_file(path: Path, *, create: bool) -> None:
    """Refuse what others may have put there; make the file with its final mode."""
    folder = os.stat(path.parent)
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        raise StorageError(
            "the folder of the database is writable by others",
            expected="mode 0700 or 0755",
            found=f"{stat.S_IMODE(folder.st_mode):04o}",
            advice=f"chmod go-w {path.parent}",
        )
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = -1
    if create:
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            descriptor = -1
    if descriptor < 0:
        try:
            descriptor = os.open(path, flags)
        except PermissionError:
            descriptor = os.open(path, flags & ~os.O_RDWR | os.O_RDONLY)
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise StorageError("the database is no ordinary file")
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StorageError(
            "the database file is open to others",
            expected=f"owner {os.geteuid()}, mode 0600",
            found=f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}",
            advice=f"chmod 600 {path}",
        )


def connect(url: URL, durability: Durability, *, create: bool = True) -> Engine:
    """
    Return an engine whose connections are set up; nothing is connected yet.

    Raises:
        StorageError: The file of a SQLite database is not only ours.
        ModuleNotFoundError: PostgreSQL without the extra.

    """
    if url.get_backend_name() == "sqlite":
        path = sqlite_path(url)
        if path is not None:
            try:
                _guard_file(path, create=create)
            except OSError as error:
                raise StorageError(
                    f"the database file {path} cannot be opened", found=error.strerror
                ) from None
            url = url.set(database=str(path))
        engine = create_engine(
            url,
            poolclass=StaticPool if path is None else NullPool,
            connect_args={
                "check_same_thread": False,
                "isolation_level": None,
                "timeout": BUSY_SECONDS,
                "cached_statements": 256,
            },
        )
        event.listen(engine, "connect", _Sqlite(durability, is_memory(url)))
        return engine
    try:
        engine = create_engine(
            url,
            poolclass=NullPool,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "pyenclave",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 20_000,
            },
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'PostgreSQL needs {error.name}: pip install "pyenclave[services,postgres]"',
            name=error.name,
        ) from None
    event.listen(engine, "connect", _Postgres(durability))
    return engine


class _Sqlite:
    """Sets a fresh SQLite connection up."""

    def __init__(self, durability: Durability, memory: bool) -> None:
        self._synchronous = durability.upper()
        self._memory = memory

    def __call__(self, driver: sqlite3.Connection, _record: object) -> None:
        driver.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        mode = driver.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal" and not self._memory:
            raise StorageError(
                "the database cannot have a write-ahead log",
                expected="wal",
                found=mode,
                advice="Put it on a local file system.",
            )
        for pragma in (
            f"synchronous = {self._synchronous}",
            f"wal_autocheckpoint = {WAL_PAGES}",
            "foreign_keys = ON",
            "trusted_schema = OFF",
            "cell_size_check = ON",
            "secure_delete = ON",
        ):
            driver.execute(f"PRAGMA {pragma}")


class _Postgres:
    """Sets a PostgreSQL connection up; a peer that stops must not hold the others for ever."""

    def __init__(self, durability: Durability) -> None:
        self._durability = durability

    def __call__(self, driver: Any, _record: object) -> None:
        driver.autocommit = True
        driver.execute(f"SET lock_timeout = {int(BUSY_SECONDS * 1000)}")
        driver.execute("SET idle_in_transaction_session_timeout = 30000")
        driver.execute("SET default_transaction_isolation = 'read committed'")
        driver.execute("SET timezone = 'UTC'")
        if self._durability == "normal":
            driver.execute("SET synchronous_commit = off")
        elif driver.execute("SHOW synchronous_commit").fetchone()[0] == "off":
            driver.execute("SET synchronous_commit = on")
        driver.autocommit = False


def error_of(error: BaseException) -> ServiceError | None:
    """
    Return what an error of the database means to a caller.

    ``None``: it says nothing of the database's state, as a wrong statement or a constraint.
    """
    origin = error.orig if isinstance(error, DBAPIError) else error
    word: tuple[str, str] | None = None
    if isinstance(origin, sqlite3.Error):
        code = getattr(origin, "sqlite_errorcode", None)
        word = _SQLITE.get(code & 0xFF) if code is not None else None
    elif isinstance(origin, StorageError):
        word = ("DatabaseFailed", origin.message)
    elif origin is not None and hasattr(origin, "sqlstate"):  # psycopg.Error, not imported here
        state = origin.sqlstate
        if state is not None:
            word = _STATES.get(state) or _STATES.get(state[:2])
        elif type(origin).__name__ in {"OperationalError", "InterfaceError", "ConnectionTimeout"}:
            word = _STATES["08"]
    elif isinstance(error, SQLAlchemyError):
        return None
    if word is None:
        return None
    found = str(origin).strip().splitlines()
    return ServiceError(
        word[1],
        status=503,
        error_code="ServiceUnavailable",
        inner=word[0],
        retry_after=_RETRY_AFTER,
        found=found[0][:200] if found else None,
    )
