"""``pyenclave audit follow``: one key through the logs of a vault and its attestation service."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from pyenclave.cli import _follow_text as text
from pyenclave.cli import output
from pyenclave.cli._audit_logs import (
    add_action,
    add_trust,
    development,
    judgement,
    source_of,
    trust_of,
)
from pyenclave.services.audit.follow import Followed, follow
from pyenclave.services.audit.happenings import KeyName
from pyenclave.services.audit.reader import open_log

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["FORMAT", "add_command", "to_json"]

FORMAT: Final = "pyenclave-audit-follow-1"


def add_command(actions: Subparsers) -> None:
    """Add ``follow``."""
    action = add_action(actions, "follow", "print one key's way from its creation to its releases")
    action.add_argument("key_name", metavar="KEY", help="NAME, NAME/VERSION or the key's URL")
    action.add_argument(
        "--attestation",
        metavar="URL|FILE",
        help="the attestation service's log; default: the development service's, beside the "
        "development vault's",
    )
    action.add_argument("--brief", action="store_true", help="what is needed at a glance only")
    action.add_argument("--all", action="store_true", help="reads and uses one by one, too")
    action.add_argument(
        "--last", type=int, default=1_000, metavar="N", help="at most the last N releases and uses"
    )
    add_trust(action)
    action.add_argument(
        "--attestation-key", action="append", metavar="PEM", help="as --key, of the other log"
    )
    action.add_argument(
        "--attestation-checkpoint",
        action="append",
        metavar="FILE",
        help="as --checkpoint, of the other log",
    )
    action.set_defaults(function=_follow)


def _follow(args: argparse.Namespace) -> int:
    key = KeyName.read(args.key_name)
    if args.last < 1:
        raise ValueError("--last: at least 1")
    vault, attestation = source_of(args), args.attestation
    if attestation is None and args.database is None and development("attestation").exists():
        attestation = str(development("attestation"))
    found = _read(args, key, vault, attestation)
    if attestation is None and found.has_attestations:  # both services share a database
        found = _read(args, key, vault, vault)
    if args.json:
        output.print_json(to_json(found, pinned=bool(args.key), other=bool(args.attestation_key)))
    elif found.found:
        for line in text.whole(found, brief=args.brief):
            output.say(line)
    if not args.json:
        for line in text.alarms(found):
            output.remark(line)
        if not found.found:
            output.note(f"the log has no row of the key {key}")
    return 0 if found.holds and found.found else 1


def _read(args: argparse.Namespace, key: KeyName, vault: str, attestation: str | None) -> Followed:
    with ExitStack() as stack:
        log = stack.enter_context(open_log(vault))
        other = None if attestation is None else stack.enter_context(open_log(attestation))
        return follow(
            log,
            key,
            attestation=other,
            trust=trust_of(args.key, args.checkpoint),
            attestation_trust=trust_of(args.attestation_key, args.attestation_checkpoint),
            everything=args.all,
            limit=args.last,
        )


def to_json(found: Followed, *, pinned: bool = False, other: bool = False) -> dict[str, Any]:
    """
    Return the object that ``--json`` prints (docs/audit.md).

    Args:
        found: A key's way.
        pinned: The vault's checkpoints were held against keys of the caller.
        other: The attestation service's were.

    """
    logs = {"vault": judgement(found.vault, pinned=pinned)}
    if found.attestation is not None:
        logs["attestation"] = judgement(found.attestation, pinned=other)
    return {
        "format": FORMAT,
        "key": found.key.name,
        "version": found.key.version,
        "holds": found.holds,
        "happenings": [item.to_json() for item in found.happenings],
        "routine": [
            {
                "action": action,
                "count": routine.count,
                "callers": sorted(routine.callers),
                "first": routine.first,
                "last": routine.last,
            }
            for action, routine in found.routine.items()
        ],
        "summary": {
            "counts": found.counts(),
            "left_out": found.left_out,
            "since": min((item.at for item in found.happenings), default=None),
            "until": max((item.at for item in found.happenings), default=None),
            "unsigned": sum(not item.signed for item in found.happenings),
            "tokens": {"shown": len(found.shown), "issued": found.issued},
            "unjoined": found.unjoined,
            "contradictions": found.contradictions,
            "notes": found.notes,
        },
        "logs": logs,
    }
