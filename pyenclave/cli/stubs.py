"""The command ``stubs``: typed handles for the functions of an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyenclave._files import read_file
from pyenclave.cli import output

__all__ = ["add_commands"]

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001


def add_commands(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    command = subparsers.add_parser(
        "stubs",
        help="write typed handles for an image's functions, for type checkers and editors",
        description="FILE.py can be imported: from FILE import NAME; with NAME(image) as enclave. "
        "FILE.pyi, and standard output, are for type checkers alone.",
    )
    command.add_argument("image")
    command.add_argument("-o", "--output", metavar="FILE", help="FILE.py or FILE.pyi")
    command.add_argument("--name", metavar="NAME", help="of the class; default: after the image")
    command.set_defaults(function=_stubs)


def _stubs(args: argparse.Namespace) -> int:
    import pyenclave
    from pyenclave.formats.image import MAX_IMAGE, Image
    from pyenclave.image.build import write_image
    from pyenclave.image.stubs import HANDLES, stubs

    image = Image.parse(read_file(args.image, limit=MAX_IMAGE))
    handles = [name for name in HANDLES if name in pyenclave.__all__]
    stub, module = stubs(image, name=args.name, handles=handles)
    text = module if str(args.output).endswith(".py") else stub
    if args.output is not None:
        write_image(args.output, text.encode())
    if args.json:
        output.print_json({"file": args.output, "text": text})
    elif args.output is None:
        output.say(text.rstrip("\n"))
    else:
        output.say(f"{args.output}: {len(image.info.functions)} functions")
    return 0
