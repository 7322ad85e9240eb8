"""``pyenclave policy``: say what an appraisal policy demands, here and in Azure's languages."""

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
    render = actions.add_parser(
        "render",
        help="say the same policy in Azure's languages",
        description="Prints an Azure Attestation policy, or with --authority a key-release policy "
        "for Key Vault. What a language cannot say is an error, never left out.",
    )
    render.add_argument("policy", metavar="FILE|strict|permissive")
    render.add_argument("--tee", required=True, choices=("sgx", "sevsnpvm", "tdxvm"))
    render.add_argument(
        "--authority", metavar="URL", help="the attestation service: print a key-release policy"
    )
    render.add_argument(
        "--prefix",
        default="",
        metavar="NAMES.",
        help="before claims of a key-release policy: x-ms-isolation-tee. for tokens of guest "
        "attestation",
    )
    render.add_argument(
        "--at", metavar="RFC3339", help="for when, if reference values have validity windows"
    )
    render.set_defaults(function=_render)


def _render(args: argparse.Namespace) -> int:
    from pyenclave.attestation import azure_render

    policy = policy_of(args.policy)
    at = moment("--at", args.at)
    if args.authority is None:
        if args.prefix:
            raise ValueError("--prefix belongs to --authority")
        output.say(azure_render.attestation_policy(policy, tee=args.tee, at=at).rstrip())
        return 0
    made = azure_render.release_policy(
        policy, tee=args.tee, authority=args.authority, prefix=args.prefix, at=at
    )
    output.say(made.to_json().decode())
    return 0


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
