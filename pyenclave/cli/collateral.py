"""``pyenclave collateral fetch|show|check``: endorsements over the network, and what they are."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pyenclave._files import read_file
from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.attestation.endorsements import Endorsements
    from pyenclave.collateral.fetcher import Fetcher
    from pyenclave.collateral.plan import Sources

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]

_MAX_EVIDENCE = 16 << 20


def add_commands(subparsers: Subparsers) -> None:
    """Add ``collateral``."""
    parser = subparsers.add_parser(
        "collateral",
        help="fetch, show and check what judging evidence needs",
        description="Collateral: what a vendor signs about its hardware (TCB levels, revocation "
        "lists, certificates). Nothing of it is believed because it was fetched.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    fetch = actions.add_parser(
        "fetch",
        help="fetch it for a piece of evidence",
        description="Writes one bundle file; give it to `pyenclave verify --endorsements`.",
    )
    fetch.add_argument("evidence", metavar="EVIDENCE")
    fetch.add_argument("-o", "--output", required=True, metavar="BUNDLE")
    fetch.add_argument("--beside", metavar="DIR", help="files that came with the evidence")
    fetch.add_argument("--pcs", metavar="URL", help="ask this service instead of Intel's own")
    fetch.add_argument(
        "--pccs", metavar="URL", help="ask this caching service (it also serves the root's CRL)"
    )
    fetch.add_argument(
        "--version", type=int, choices=(3, 4), default=4, help="of the PCS interface (default 4)"
    )
    fetch.add_argument(
        "--update",
        choices=("standard", "early"),
        default="standard",
        help="standard: within the grace period (default); early: the newest",
    )
    fetch.add_argument("--kds", metavar="URL", help="ask this service instead of AMD's own")
    fetch.add_argument(
        "--thim", action="store_true", help="ask Azure's metadata service of this machine"
    )
    fetch.add_argument(
        "--product", choices=("milan", "genoa", "turin"), help="for SNP reports of version 2"
    )
    fetch.add_argument("--ca", metavar="FILE", help="authorities trusted for TLS instead")
    fetch.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    fetch.add_argument("--cache", metavar="DIR", help="default: under the user's cache folder")
    fetch.add_argument("--no-cache", action="store_true")
    fetch.add_argument("--offline", action="store_true", help="ask the cache only")
    fetch.add_argument(
        "--allow-older", action="store_true", help="take older collateral than was seen before"
    )
    fetch.add_argument("--force", action="store_true", help="replace BUNDLE")
    fetch.set_defaults(function=_fetch)

    show = actions.add_parser("show", help="show what is in a bundle or folder")
    show.add_argument("endorsements", metavar="BUNDLE|DIR")
    show.set_defaults(function=_show)

    check = actions.add_parser(
        "check",
        help="check a bundle or folder without evidence",
        description="Signatures up to the pinned roots, revocation, and whether it still holds.",
    )
    check.add_argument("endorsements", metavar="BUNDLE|DIR")
    check.add_argument("--at", metavar="RFC3339", help="at this time (default now)")
    check.add_argument("--root", action="append", default=[], metavar="FILE")
    check.set_defaults(function=_check)
    for action in (fetch, show, check):
        action.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="one JSON object on stdout",
        )


def _sources(args: argparse.Namespace) -> Sources:
    from pyenclave.collateral.kds import KDS, AmdSource
    from pyenclave.collateral.pcs import PCS, IntelSource
    from pyenclave.collateral.plan import Sources

    if args.pcs and args.pccs:
        raise ValueError("--pcs and --pccs exclude each other")
    return Sources(
        intel=IntelSource(
            base=args.pccs or args.pcs or PCS,
            version=args.version,
            caching=args.pccs is not None,
            update=args.update,
        ),
        amd=AmdSource(base=args.kds or KDS),
        thim=args.thim,
        product=args.product,
    )


def _fetcher(args: argparse.Namespace) -> Fetcher:
    from pyenclave.collateral.cache import Cache, default_cache_directory
    from pyenclave.collateral.fetcher import Fetcher
    from pyenclave.collateral.http import Client

    if args.offline and args.no_cache:
        raise ValueError("--offline needs the cache")
    cache = None if args.no_cache else Cache(args.cache or default_cache_directory())
    client = Client(timeout=args.timeout, ca_file=args.ca)
    return Fetcher(client, cache, offline=args.offline, allow_older=args.allow_older)


def _fetch(args: argparse.Namespace) -> int:
    from pyenclave.attestation.endorsements import Endorsements
    from pyenclave.cli import _tool
    from pyenclave.cli._targets import check_target
    from pyenclave.collateral.describe import describe, holds_until
    from pyenclave.collateral.plan import fetch_sync

    if not args.force and Path(args.output).exists():
        raise ValueError(f"{args.output} is there already; --force replaces it")
    check_target(args.output, force=args.force)
    beside = Endorsements.from_dir(args.beside).files if args.beside else {}
    bundle = fetch_sync(
        read_file(args.evidence, limit=_MAX_EVIDENCE),
        beside=beside,
        sources=_sources(args),
        fetcher=_fetcher(args),
    )
    _tool.write_file(args.output, bundle.to_bytes(), force=args.force)
    described = describe(bundle.files)
    until = holds_until(described)
    if args.json:
        output.print_json(
            {
                "file": args.output,
                "source": bundle.source,
                "until": None if until is None else until.isoformat(),
                "files": [item.to_json() for item in described],
            }
        )
    else:
        output.say(f"{args.output}: {len(bundle.files)} files from {bundle.source}")
        if until is not None:
            output.say(f"holds until {until:%Y-%m-%d %H:%M} UTC")
    return 0


def _read(path: str) -> tuple[Endorsements, str]:
    from pyenclave.attestation.endorsements import Endorsements

    endorsements = Endorsements.from_path(path)
    return endorsements, "folder" if Path(path).is_dir() else "bundle"


def _show(args: argparse.Namespace) -> int:
    from pyenclave.collateral.describe import describe, holds_until

    endorsements, form = _read(args.endorsements)
    described = describe(endorsements.files)
    until = holds_until(described)
    if args.json:
        output.print_json(
            {
                "form": form,
                "until": None if until is None else until.isoformat(),
                "files": [item.to_json() for item in described],
                "ignored": list(endorsements.ignored),
            }
        )
        return 0
    now = datetime.now(UTC)
    rows = []
    for item in described:
        end = "" if item.until is None else f"{item.until:%Y-%m-%d %H:%M}"
        if item.until is not None and item.until < now:
            end = output.paint(f"{end} (over)", "red")
        rows.append((item.name, item.problem or item.what, end))
    output.say(output.table(rows, header=("FILE", "WHAT", "UNTIL (UTC)")))
    for name in endorsements.ignored:
        output.say(f"{name}: not known, ignored")
    return 0


# What can be judged without evidence; the rest is judged with the document that it belongs to.
_DOCUMENTS = ("tcb-info.json", "qe-identity.json", "vek.der")


def _check(args: argparse.Namespace) -> int:
    from pyenclave.attestation import AppraisalPolicy, appraise
    from pyenclave.cli import verify

    endorsements, _ = _read(args.endorsements)
    at = verify.moment("--at", args.at)
    names = [name for name in _DOCUMENTS if name in endorsements]
    if not names:
        raise ValueError(f"{args.endorsements}: none of {', '.join(_DOCUMENTS)} to check")
    results = {
        name: appraise(
            endorsements.files[name],
            policy=AppraisalPolicy.permissive(),
            endorsements=endorsements,
            freshness="not_checked",
            roots=verify.roots_of(args.root),
            at=at,
        )
        for name in names
    }
    good = all(result.genuine for result in results.values())
    if args.json:
        output.print_json(
            {"genuine": good, "documents": {n: result.to_json() for n, result in results.items()}}
        )
        return 0 if good else 1
    for name, result in results.items():
        output.say(f"{name}:")
        verify.print_checks(result)
        output.say()
    verdict = ("holds", "green") if good else ("DOES NOT HOLD", "red")
    output.say(output.paint(*verdict))
    return 0 if good else 1
