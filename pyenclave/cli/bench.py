"""``pyenclave bench``: the microbenchmarks, each against what people would use instead."""

from __future__ import annotations

import argparse
from typing import Any

from pyenclave.benchmarks import registry
from pyenclave.cli import output

__all__ = ["add_commands"]


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench``."""
    bench = subparsers.add_parser("bench", help="measure against the usual alternatives")
    bench.add_argument("only", nargs="*", metavar="NAME", help="rows to run (default: all)")
    bench.add_argument("--list", action="store_true", help="name the rows and end")
    bench.set_defaults(function=_bench)


def _bench(args: argparse.Namespace) -> int:
    if args.list:
        names = registry.names()
        if args.json:
            output.print_json({"names": names})
        else:
            output.say("\n".join(names))
        return 0
    progress = output.Progress(quiet=args.json)
    results: list[dict[str, Any]] = []
    for name, rows in registry.run(tuple(args.only), progress=progress.step):
        del name
        results.extend(rows)
    progress.done()
    machine = registry.machine()
    if args.json:
        output.print_json({"machine": machine, "results": results})
        return 0
    output.say(f"{machine['cpu']}, {machine['cores']} cores, kernels {machine['kernels']}")
    output.say(
        output.table(
            [
                (
                    row["name"] + (f" ({row['cores']} cores)" if "cores" in row else ""),
                    f"{row['value']:,.1f} {row['unit']}",
                    row["peer"],
                    f"{row['peer_value']:,.1f} {row['unit']}",
                    f"{row['ratio']:.2f}x",
                )
                for row in results
            ],
            header=("NAME", "OURS", "AGAINST", "THEIRS", "RATIO"),
        )
    )
    notes = [f"{row['name']}: {row['note']}" for row in results if row.get("note")]
    for note in notes:
        output.say(note)
    return 0
