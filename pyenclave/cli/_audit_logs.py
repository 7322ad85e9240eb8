"""What the audit commands share: which log, what it is held against, how it is judged."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyenclave._files import read_file
from pyenclave.formats.audit_chain import Item, Report, verify_chain
from pyenclave.formats.audit_log import Checkpoint, PublicKey
from pyenclave.services.audit.follow import Trust
from pyenclave.services.audit.reader import Log

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = [
    "add_action",
    "add_trust",
    "check",
    "development",
    "judgement",
    "small_file",
    "source_of",
    "trust_of",
]

_MAX_FILE: Final = 1 << 16  # of a key or a checkpoint


def add_action(actions: Subparsers, name: str, what: str) -> argparse.ArgumentParser:
    """Add an action that reads a log."""
    action = actions.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    action.add_argument(
        "--database",
        metavar="URL|FILE",
        help="a database's URL, a SQLite file, or an exported log; default: the development vault",
    )
    action.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout"
    )
    return action


def add_trust(action: argparse.ArgumentParser) -> None:
    """Add what a log is held against."""
    action.add_argument(
        "--key", action="append", metavar="PEM", help="a public key that may sign checkpoints"
    )
    action.add_argument(
        "--checkpoint", action="append", metavar="FILE", help="a checkpoint kept elsewhere"
    )


def development(name: str) -> Path:
    """Return where ``serve NAME --dev`` keeps its database."""
    from pyenclave._platform.state import default_state_directory

    return Path(default_state_directory(), "dev", f"{name}.db")


def source_of(args: argparse.Namespace) -> str:
    """
    Return which log is meant.

    Raises:
        ValueError: None is named, and there is no development vault.

    """
    if args.database is not None:
        return str(args.database)
    vault = development("vault")
    if not vault.exists():
        raise ValueError(
            f"no development vault yet: {vault} is not there; --database names another database "
            "or an exported log"
        )
    return str(vault)


def small_file(path: str) -> bytes:
    """Return a file that holds a key or a checkpoint."""
    return read_file(path, limit=_MAX_FILE)


def trust_of(keys: Sequence[str] | None, checkpoints: Sequence[str] | None) -> Trust:
    """Return what a log is held against: the keys and checkpoints of files."""
    read = [PublicKey.from_pem(small_file(path), path) for path in keys or ()]
    return Trust(
        keys={key.kid: key for key in read} if read else None,
        kept=[Checkpoint.from_text(small_file(p).strip(), p) for p in checkpoints or ()],
    )


def check(log: Log, items: Iterator[Item], args: argparse.Namespace) -> Report:
    """Verify *items* of *log* against what the arguments name."""
    trust = trust_of(args.key, args.checkpoint)
    return verify_chain(items, start=log.start, keys=trust.keys, kept=trust.kept, head=log.head)


def judgement(report: Report, *, pinned: bool) -> dict[str, Any]:
    """Return what verifying gave, for ``--json``."""
    newest = report.newest
    return {
        "intact": report.intact,
        "log": report.start.log,
        "first": report.start.seq + 1,
        "last": report.last,
        "rows": report.rows,
        "signed": report.signed,
        "checkpoints": report.checkpoints,
        "keys": sorted(report.keys),
        "pinned": pinned,
        "findings": [
            {"kind": f.kind, "first": f.first, "last": f.last, "message": f.message}
            for f in report.findings
        ],
        "more": report.more,
        "checkpoint": newest.text if newest else None,
    }
