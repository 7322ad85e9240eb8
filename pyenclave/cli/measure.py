"""
The command ``measure``: what hardware would measure, and what makes two files differ.

The subcommands of one family are added by a module of their own, each with ``add_measures``.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyenclave._files import read_file
from pyenclave.cli import output

__all__ = ["MAX_FILE", "add_commands", "add_exit_code", "leaf"]

if TYPE_CHECKING:
    from pyenclave.measurement.difference import Difference

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

# Modules of pyenclave.cli that add subcommands with ``add_measures(subparsers)``. They are imported
# whenever ``measure`` is used, so what they need is imported in their functions.
_FAMILIES = ("measure_sgx", "measure_vm")

MAX_FILE = 1 << 30


def add_commands(subparsers: Subparsers) -> None:
    """Add the command with all its subcommands."""
    command = subparsers.add_parser(
        "measure", help="compute the measurement that hardware would make"
    )
    kinds = command.add_subparsers(dest="measure", metavar="KIND", required=True)
    for family in _FAMILIES:
        import_module(f"pyenclave.cli.{family}").add_measures(kinds)
    differ = leaf(kinds, "diff", help="name what makes two measured files differ")
    differ.add_argument("a", metavar="A")
    differ.add_argument("b", metavar="B")
    add_exit_code(differ)
    differ.set_defaults(function=_diff)


def leaf(subparsers: Subparsers, name: str, **arguments: Any) -> argparse.ArgumentParser:
    """Add a subcommand that takes ``--json``."""
    parser = subparsers.add_parser(name, **arguments)
    # Suppressed, so that it does not undo a --json that stands before the subcommand.
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout"
    )
    return parser


def add_exit_code(command: argparse.ArgumentParser) -> None:
    """Add ``--exit-code``, as ``git diff`` has it: to have compared is all that was asked."""
    command.add_argument(
        "--exit-code", action="store_true", help="exit with 1 if the measurements differ"
    )


def _diff(args: argparse.Namespace) -> int:
    from pyenclave.measurement.difference import diff

    a, b = read_file(args.a, limit=MAX_FILE), read_file(args.b, limit=MAX_FILE)
    # Images have names for what is in them; measurement, a layer below, knows pages only.
    rows = _diff_images(a, b) if _both_images(a, b) else diff(a, b)
    same = not any(row.measured for row in rows)
    if args.json:
        output.print_json(
            {
                "same": not rows,
                "same_measurement": same,
                "differences": [row.row() for row in rows],
            }
        )
    else:
        output.say("same measurement" if same else "different measurements")
        for row in rows:
            note = "" if row.measured else "  (not measured)"
            output.say(f"  {row.what} {row.name}: {_short(row.a)} → {_short(row.b)}{note}")
    return 1 if args.exit_code and not same else 0


def _both_images(a: bytes, b: bytes) -> bool:
    return a[:8] == b[:8] == b"PYENCIMG"


def _diff_images(a: bytes, b: bytes) -> list[Difference]:
    from pyenclave.formats.image import Image
    from pyenclave.image.diff import diff
    from pyenclave.measurement.difference import Difference

    return [Difference(**row) for row in diff(Image.parse(a), Image.parse(b))]


def _short(value: object) -> str:
    if value is None:
        return "absent"
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 72 else text[:71] + "…"
