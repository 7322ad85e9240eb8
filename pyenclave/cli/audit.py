"""``pyenclave audit``: verify, show, export and cut the services' audit log."""

from __future__ import annotations

import argparse
import contextlib
import errno
import getpass
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pyenclave.cli import _audit_text as text
from pyenclave.cli import following, output
from pyenclave.cli._audit_logs import add_action, add_trust, check, judgement, source_of
from pyenclave.cli._place import aside
from pyenclave.cli._targets import check_target
from pyenclave.cli.verify import moment
from pyenclave.errors import AuditError
from pyenclave.formats.audit_chain import Item
from pyenclave.formats.audit_log import Checkpoint, PublicKey, Row, fields_of
from pyenclave.services.audit.happenings import KeyName
from pyenclave.services.audit.reader import open_log, write_export

if TYPE_CHECKING:
    from typing import BinaryIO

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]

_DECISIONS = ("allowed", "refused", "failed")


def add_commands(subparsers: Subparsers) -> None:
    """Add ``audit`` and its actions."""
    audit = subparsers.add_parser("audit", help="verify, show and export the services' audit log")
    actions = audit.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = add_action(actions, "verify", "check the chain; name rows changed, removed or moved")
    add_trust(verify)
    verify.set_defaults(function=_verify)

    show = add_action(actions, "show", "print what was decided, as a timeline, or one row whole")
    show.add_argument("reference", nargs="?", metavar="REF", help="reference id of one row")
    show.add_argument(
        "--key-name", metavar="KEY", help="rows about this key: NAME, NAME/VERSION or its URL"
    )
    show.add_argument(
        "--caller", metavar="ID", help="rows of this identity: TENANT/OBJECT or either"
    )
    show.add_argument("--decision", choices=_DECISIONS)
    show.add_argument("--operation", metavar="TEXT", help="rows whose action contains this")
    show.add_argument("--since", metavar="RFC3339", help="from this time on")
    show.add_argument("--until", metavar="RFC3339", help="before this time")
    show.add_argument("--last", type=int, default=1_000, metavar="N", help="at most the last N")
    add_trust(show)
    show.set_defaults(function=_show)

    following.add_command(actions)

    export = add_action(actions, "export", "write lines of JSON that verify on their own")
    export.add_argument("-o", "--output", metavar="FILE", help="a new file; default: stdout")
    export.add_argument("--after", type=int, default=0, metavar="ROW", help="rows after this one")
    export.set_defaults(function=_export)

    checkpoint = add_action(actions, "checkpoint", "print the newest signed checkpoint, to be kept")
    checkpoint.set_defaults(function=_checkpoint)
    key = add_action(actions, "key", "print the public key of the checkpoints, to be pinned")
    key.set_defaults(function=_key)

    prune = add_action(actions, "prune", "export the oldest rows and remove them from the database")
    prune.add_argument("-o", "--output", metavar="FILE", required=True, help="where they go")
    prune.add_argument("--before", metavar="RFC3339", required=True, help="rows signed before")
    prune.add_argument("--secrets", metavar="FILE", help="the service's secrets file")
    add_trust(prune)
    prune.set_defaults(function=_prune)


def _verify(args: argparse.Namespace) -> int:
    with open_log(source_of(args)) as log:
        report = check(log, log.items, args)
    if args.json:
        output.print_json(judgement(report, pinned=bool(args.key)))
    else:
        for line in text.judgement(report, pinned=bool(args.key)):
            output.say(line)
    return 0 if report.intact else 1


class _Few(msgspec.Struct):
    """What rows are chosen by. Only those that are shown are read whole."""

    action: str = ""
    at: str = ""
    caller: str = ""
    decision: str = ""
    reference: str = ""
    resource: str = ""


_FEW = msgspec.json.Decoder(_Few)


def _wanted(args: argparse.Namespace, row: Row) -> bool:
    """Whether *row* is asked for; what cannot be read is told of by the verification."""
    if args.reference and args.reference.encode() not in row.body:
        return False
    try:
        few = _FEW.decode(row.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return (
        (not args.reference or few.reference == args.reference)
        and (not args.key_name or args.key_name.names(few.resource))
        and (not args.caller or args.caller in (few.caller, *few.caller.split("/")))
        and (not args.decision or few.decision == args.decision)
        and (not args.operation or args.operation in few.action)
        and (not args.since or few.at >= args.since)
        and (not args.until or few.at < args.until)
    )


def _whole(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            yield {"seq": row.seq, **fields_of(row)}
        except AuditError:
            continue


def _show(args: argparse.Namespace) -> int:
    for option in ("since", "until"):
        given = moment(f"--{option}", getattr(args, option))
        setattr(args, option, given and text.rfc3339(given))
    if args.last < 1:
        raise ValueError("--last: at least 1")
    if args.key_name:
        args.key_name = KeyName.read(args.key_name)
    chosen: deque[Row] = deque(maxlen=min(args.last, sys.maxsize))

    def seen(items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            if isinstance(item, Row) and _wanted(args, item):
                chosen.append(item)
            yield item

    with open_log(source_of(args)) as log:
        report = check(log, seen(log.items), args)
    rows = list(_whole(chosen))
    if args.json:
        output.print_json({"rows": rows, "chain": judgement(report, pinned=bool(args.key))})
    elif args.reference and rows:
        for row in rows:
            output.say("\n".join(text.whole(row)))
    elif not args.reference:
        for line in text.timeline(rows):
            output.say(line)
    if not report.intact and not args.json:
        for line in text.findings(report):
            output.remark(output.printable(line))
    if args.reference and not rows:
        output.note(f"no row {args.reference}")
        return 1
    return 0 if report.intact else 1


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[BinaryIO]:
    """Give a file that is at *path* once it is whole and durable, and never before."""
    place, name = os.path.split(path)
    if not name:
        raise FileNotFoundError(errno.ENOENT, "it names no file", path)
    try:
        folder = os.open(place or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.path.lexists(path):
                raise FileExistsError
            with (
                aside(folder, name, force=False) as fd,
                os.fdopen(os.dup(fd), "wb") as file,
            ):
                yield file
        finally:
            os.close(folder)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "the file exists", path) from None
    except OSError as error:
        if error.errno is None or error.filename not in (None, ".", place):
            raise
        raise OSError(error.errno, error.strerror, path) from None


def _export(args: argparse.Namespace) -> int:
    if args.json and args.output is None:
        raise ValueError("--json: the object is about a file; give -o FILE")
    with open_log(source_of(args)) as log:
        if args.output is not None:
            with _new_file(args.output) as file:
                last = write_export(log, file, after=args.after)
        else:
            last = write_export(log, sys.stdout.buffer, after=args.after)
    told = {"file": args.output, "first": max(args.after, log.start.seq) + 1, "last": last.seq}
    if args.json:
        output.print_json(told)
    elif args.output is not None:
        output.say(f"rows {told['first']} to {told['last']} are in {output.line(args.output)}")
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    args.key = args.checkpoint = None
    with open_log(source_of(args)) as log:
        report = check(log, log.items, args)
    newest = report.newest
    if newest is None:
        raise AuditError("the log has no checkpoint yet", advice="Ask again in a minute.")
    if args.json:
        found = {"checkpoint": newest.text, "log": newest.log, "seq": newest.seq, "at": newest.at}
        output.print_json({**found, "intact": report.intact})
    else:
        output.say(newest.text)
        for line in text.findings(report):
            output.remark(output.printable(line))
    return 0 if report.intact else 1


def _key(args: argparse.Namespace) -> int:
    found: list[PublicKey] = []
    with open_log(source_of(args)) as log:
        for item in log.items:
            if not isinstance(item, PublicKey):
                break
            found.append(item)
    if not found:
        raise AuditError("the log names no key")
    if args.json:
        output.print_json({"keys": [{"kid": key.kid, "pem": key.pem} for key in found]})
    else:
        output.say("".join(key.pem for key in found).rstrip())
    return 0


def _prune(args: argparse.Namespace) -> int:
    from pyenclave.services.audit.prune import prune
    from pyenclave.services.storage import Database, Secrets

    source = source_of(args)
    limit = moment("--before", args.before)
    assert limit is not None
    if os.path.lexists(args.output):
        raise FileExistsError(errno.EEXIST, "the file exists", args.output)
    if os.path.basename(args.output):  # else it names no file
        check_target(args.output)
    secrets = Secrets(args.secrets) if args.secrets else None
    with open_log(source) as log:
        if log.head is None:
            raise ValueError("--database: rows are removed from a database, not from an export")
        report = check(log, log.items, args)
    if not report.intact:
        for line in text.findings(report):
            output.remark(output.printable(line))
        raise AuditError("nothing is removed from a log that does not verify")
    signed = [
        checkpoint.seq
        for checkpoint in _checkpoints(source)
        if report.start.seq < checkpoint.seq and checkpoint.at < text.rfc3339(limit)
    ]
    if not signed:
        raise AuditError("no checkpoint of rows that are there is older", expected=args.before)
    through = max(signed)
    with open_log(source) as log, _new_file(args.output) as file:
        write_export(log, file, through=through)
    with open_log(args.output) as written:
        again = check(written, written.items, args)
    if not again.intact or again.last != through or again.signed != through:
        raise AuditError("the export does not verify; nothing was removed")
    url = source if "://" in source else f"sqlite:///{Path(source).absolute()}"
    with Database.open(url, parts=[], secrets=secrets, existing=True) as db:
        gone = prune(db, through=through, caller=getpass.getuser())
    if args.json:
        output.print_json({"file": args.output, "through": through, "rows": gone})
    else:
        output.say(f"{gone} rows up to row {through} are in {output.line(args.output)} only")
    return 0


def _checkpoints(source: str) -> Iterator[Checkpoint]:
    with open_log(source) as log:
        for item in log.items:
            if isinstance(item, Checkpoint):
                yield item
