"""``pyenclave demo``: the main job on real data, with attackers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pyenclave.cli import output
from pyenclave.demo import director

__all__ = ["add_commands"]


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo``."""
    demo = subparsers.add_parser(
        "demo",
        help="watch the main job: encrypted applicants scored inside an enclave, under attack",
    )
    demo.add_argument(
        "--rows", type=int, default=0, metavar="N", help="score N applicants (throughput)"
    )
    demo.add_argument(
        "--services",
        action="store_true",
        help="a key, a vault and an attestation service instead: released to one build, refused "
        "to all others",
    )
    demo.set_defaults(function=_demo)


def held(summary: dict[str, Any]) -> bool:
    """Whether everything came out as it must: nothing found, all refused, each attack real."""
    scan, attacks = summary["scan"], summary["attacks"]
    return (
        scan["found"] == 0
        and scan["unprotected_found"] > 0
        and all(
            attack["enclave"] == "refused" and attack["unprotected"] == "succeeded"
            for attack in attacks
        )
    )


def _demo(args: argparse.Namespace) -> int:
    if args.rows < 0:
        raise ValueError("--rows must not be negative")
    if args.rows and args.services:
        raise ValueError("--rows is of the demo without --services")
    progress = output.Progress(quiet=args.json)

    def say(text: str) -> None:
        if not args.json:
            progress.done()
            output.say(text)

    if args.services:
        return _services(args, say, progress)
    summary = director.run(rows=args.rows, say=say, progress=progress.step)
    progress.done()
    good = held(summary)
    if args.json:
        output.print_json(summary)
    else:
        refused = sum(attack["enclave"] == "refused" for attack in summary["attacks"])
        verdict = output.paint("held", "green") if good else output.paint("DID NOT HOLD", "red")
        output.say()
        output.say(
            f"{verdict}: {refused} of {len(summary['attacks'])} attacks refused by the enclave, "
            f"each shown to succeed without it; {summary['scan']['found']} secrets found outside; "
            f"{summary['seconds']} s"
        )
        output.say(
            "not protected in this mode: root and the machine's operator, and programs of this "
            "user that are hostile from the start (see SECURITY.md)"
        )
    return 0 if good else 1


def _services(args: argparse.Namespace, say: Callable[[str], None], progress: Any) -> int:
    from pyenclave.demo.release import director as services

    summary = services.run(say=say, progress=progress.step)
    progress.done()
    attempts = summary["attempts"]
    refused = sum(attempt["outcome"] == "refused" for attempt in attempts)
    good = refused == len(attempts) and summary["audit"]["intact"]
    if args.json:
        output.print_json(summary)
    else:
        verdict = output.paint("held", "green") if good else output.paint("DID NOT HOLD", "red")
        output.say()
        output.say(
            f"{verdict}: the key went to the measured build only; {refused} of {len(attempts)} "
            f"other attempts refused; {summary['seconds']} s"
        )
    return 0 if good else 1
