"""``pyenclave policy``: say what an appraisal policy demands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyenclave.cli import output
from pyenclave.cli.verify import moment, policy_of

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]


def add_commands(subparsers: Subparsers) -> None:
    """Add ``policy explain``."""
    policy = subparsers.add_parser(
        "policy",
        help="explain an appraisal policy",
        description="Works on the policy files that pyenclave verify --policy takes.",
    )
    actions = policy.add_subparsers(dest="action", metavar="ACTION", required=True)
    explain = actions.add_parser("explain", help="say in sentences what a policy demands")
    explain.add_argument("policy", metavar="FILE|strict|permissive")
    explain.add_argument(
        "--at", metavar="RFC3339", help="say which reference values hold at this time"
    )
    explain.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one JSON object on stdout",
    )
    explain.set_defaults(function=_explain)


def _explain(args: argparse.Namespace) -> int:
    policy = policy_of(args.policy)
    sentences = policy.describe(at=moment("--at", args.at))
    if args.json:
        output.print_json({"policy": policy.to_json(), "demands": sentences})
        return 0
    output.say("Evidence is accepted if all of this holds:")
    for sentence in sentences:
        output.say(f"- {output.line(sentence)}")
    return 0
