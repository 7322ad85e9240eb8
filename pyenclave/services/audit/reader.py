"""
Reading an audit log where it lies: a SQLite file, a PostgreSQL database, an export.

Everything read is hostile: whoever changed the log wrote it. An auditor needs no SQLAlchemy, and
for SQLite files and exports nothing beyond the base install.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from pyenclave._files import open_file
from pyenclave.errors import AuditError
from pyenclave.formats.audit_chain import Finding, Item
from pyenclave.formats.audit_log import (
    HASH,
    LOG_ID,
    MAX_BODY,
    Checkpoint,
    PublicKey,
    Row,
    Start,
    checkpoint_line,
    head_line,
    key_line,
    read_export,
    row_line,
)

__all__ = ["Log", "open_log", "write_export"]

_PAGE: Final = 1_000  # rows that are held at once
_SQLITE: Final = b"SQLite format 3\0"


class Log:
    """
    A log that is being read, in one snapshot.

    Attributes:
        start: Where its rows begin.
        items: Keys, checkpoints and rows, as `verify_chain` takes them; read once.
        head: Number and hash of the last row as the database has it; ``None`` for an export.

    """

    def __init__(self, start: Start, items: Iterator[Item], head: tuple[int, bytes] | None) -> None:
        self.start = start
        self.items = items
        self.head = head


@contextmanager
def open_log(source: str) -> Iterator[Log]:
    """
    Open a log for reading.

    Args:
        source: URL of a database, or path of a SQLite file or of an export.

    Raises:
        AuditError: It is none, or cannot be read.
        OSError: The file cannot be opened.

    """
    if source.startswith("sqlite://"):
        from urllib.parse import unquote

        source = unquote(source.removeprefix("sqlite://").removeprefix("/"))
    if "://" in source:
        with _postgres(source) as log:
            yield log
        return
    path = Path(source)
    with open(open_file(path, pipes=True), "rb") as file:
        if not file.peek(len(_SQLITE)).startswith(_SQLITE):
            exported = read_export(file)
            yield Log(exported.start, exported.items, None)
            return
    with _sqlite(path) as log:
        yield log


@contextmanager
def _sqlite(path: Path) -> Iterator[Log]:
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with closing(connection):
            connection.text_factory = bytes  # what is no UTF-8 is read all the same
            connection.isolation_level = None
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("BEGIN")
            yield _log(connection, "?")
    except sqlite3.Error as error:
        raise AuditError("the database cannot be read", found=str(error)) from None


@contextmanager
def _postgres(url: str) -> Iterator[Log]:
    scheme, _, rest = url.partition("://")
    if scheme not in {"postgresql", "postgres", "postgresql+psycopg"}:
        raise ValueError(f"a log is in SQLite, PostgreSQL or a file, not {scheme!r:.40}")
    try:
        import psycopg
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'PostgreSQL needs psycopg: pip install "pyenclave[postgres]"', name="psycopg"
        ) from None
    try:
        with psycopg.connect(f"postgresql://{rest}", connect_timeout=5) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            yield _log(connection, "%s")
    except psycopg.Error as error:
        found = str(error).strip().splitlines()
        raise AuditError("the database cannot be read", found=found[:1]) from None


def _log(connection: Any, mark: str) -> Log:
    head = connection.execute(
        "SELECT log, seq, hash, base_seq, base_hash FROM audit_head WHERE id = 1"
    ).fetchone()
    if head is None:
        raise AuditError("the database has no audit log", expected="a head row")
    log, seq, digest, base_seq, base_hash = head
    log, digest, base_hash = _bytes(log), _bytes(digest), _bytes(base_hash)
    if type(seq) is not int or type(base_seq) is not int or not 0 <= base_seq <= seq < 1 << 63:
        raise AuditError("the head row of the audit log is damaged", found=f"{seq}, {base_seq}")
    if (len(log), len(digest), len(base_hash)) != (LOG_ID, HASH, HASH):
        raise AuditError("the head row of the audit log is damaged", found="a hash or id")
    items = _items(connection, mark)
    return Log(Start(log, base_seq, base_hash), items, (seq, digest))


def _bytes(value: object) -> bytes:
    """Return what a damaged table holds in a column of text or bytes."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""


class _Columns(msgspec.Struct):
    """Members of a body that have columns of their own."""

    reference: str = ""
    decision: str = ""


def _items(connection: Any, mark: str) -> Iterator[Item]:
    for (pem,) in connection.execute("SELECT public FROM audit_keys ORDER BY created").fetchall():
        try:
            yield PublicKey.from_pem(_bytes(pem))
        except AuditError as error:
            yield Finding("checkpoint", 0, 0, f"a key of the log: {error}")
    # A log that lives long has a checkpoint a minute: they come page by page, as the rows do, and
    # far enough ahead that rows which were put in or taken out do not come before theirs.
    signed = _checkpoints(connection, mark)
    waiting = next(signed, None)
    last = -(1 << 63)
    decode = msgspec.json.Decoder(_Columns).decode
    while page := connection.execute(
        f"SELECT seq, substr(body, 1, {MAX_BODY + 1}), hash, reference, decision FROM audit"  # noqa: S608
        f" WHERE seq > {mark} ORDER BY seq LIMIT {_PAGE}",
        (last,),
    ).fetchall():
        while waiting is not None and waiting[0] <= page[-1][0] + _PAGE:
            yield waiting[1]
            waiting = next(signed, None)
        for seq, body, digest, reference, decision in page:
            last = seq
            if seq < 1:
                yield Finding("inserted", 0, 0, f"a row {seq} was put in")
                continue
            row = Row(seq, _bytes(body), _bytes(digest))
            try:
                columns = decode(row.body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                columns = _Columns("?", "?")
            if (columns.reference.encode(), columns.decision.encode()) != (
                _bytes(reference),
                _bytes(decision),
            ):
                text = f"row {seq}: its columns are not those of its text"
                yield Finding("changed", seq, seq, text)
            yield row
    if waiting is not None:
        yield waiting[1]
        yield from (item for _, item in signed)


def _checkpoints(connection: Any, mark: str) -> Iterator[tuple[int, Item]]:
    """Yield checkpoints with the number of the row that they are stored with, in its order."""
    last = -1
    while page := connection.execute(
        f"SELECT seq, substr(signed, 1, 5000) FROM audit_checkpoints WHERE seq > {mark}"  # noqa: S608
        f" ORDER BY seq LIMIT {_PAGE}",
        (last,),
    ).fetchall():
        for seq, signed in page:
            last = seq
            try:
                checkpoint = Checkpoint.from_text(_bytes(signed), f"checkpoint of row {seq}")
            except AuditError as error:
                yield seq, Finding("checkpoint", seq, seq, str(error))
                continue
            if checkpoint.seq == seq:
                yield seq, checkpoint
            else:
                text = f"the checkpoint of row {checkpoint.seq} is stored as that of row {seq}"
                yield seq, Finding("checkpoint", seq, seq, text)


def write_export(log: Log, file: BinaryIO, *, after: int = 0, through: int | None = None) -> Row:
    """
    Write *log* as an export; what is wrong with it shows when that is verified.

    Args:
        log: A log of a database.
        file: Opened for writing bytes.
        after: Number of the row before the first that is written.
        through: The last row; default: the log's.

    Returns:
        The last row written; its number is *after*, or the log's start, if there was none.

    Raises:
        AuditError: The log has no row *after*.

    """
    start, checkpoints = log.start, []
    last = Row(start.seq, b"", start.hash)
    begun = after <= start.seq
    if begun:
        file.write(head_line(start) + b"\n")
    keys: list[PublicKey] = []
    for item in log.items:
        if isinstance(item, PublicKey):
            keys.append(item)
            if begun:
                file.write(key_line(item) + b"\n")
        elif isinstance(item, Checkpoint):
            checkpoints.append(item)
            if begun and item.seq == start.seq:
                file.write(checkpoint_line(item) + b"\n")
        elif isinstance(item, Row):
            if through is not None and item.seq > through:
                break
            if not begun:
                if item.seq < after:
                    continue
                if item.seq > after:
                    break
                begun, last = True, item
                file.write(head_line(Start(start.log, item.seq, item.hash)) + b"\n")
                file.writelines(key_line(key) + b"\n" for key in keys)
            else:
                file.write(row_line(item) + b"\n")
                last = item
            while checkpoints and checkpoints[0].seq <= item.seq:
                checkpoint = checkpoints.pop(0)
                if checkpoint.seq == item.seq:
                    file.write(checkpoint_line(checkpoint) + b"\n")
    if not begun:
        raise AuditError("the log has no such row", expected=f"row {after}", found=last.seq)
    return last
