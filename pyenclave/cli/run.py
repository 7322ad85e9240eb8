"""``pyenclave run``: launch an image, call one function, print its result as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pyenclave._core import HostStream
from pyenclave._files import open_file
from pyenclave.cli import output
from pyenclave.errors import ArgumentError
from pyenclave.host import Enclave
from pyenclave.host._options import Options

__all__ = ["add_commands"]


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``run``."""
    run = subparsers.add_parser(
        "run",
        help="launch an image and call one function",
        description="ARGs are JSON, decoded by the function's signature; a bare word is a string.",
    )
    run.add_argument("image", metavar="IMAGE", help="an image, or a .py file (debug)")
    run.add_argument("call", metavar="FUNCTION")
    run.add_argument("arguments", nargs="*", default=[], metavar="ARG")
    run.add_argument("--debug", action="store_true", help="launch as a debug enclave")
    run.add_argument("--timeout", type=float, metavar="SECONDS")
    run.set_defaults(function=_run)


def _argument(text: str, wanted: object) -> Any:
    """Decode one command-line argument; *wanted* is the parameter's type on the wire."""
    if wanted == "str" and not text.startswith('"'):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text.encode() if wanted == "bytes" else text
    if wanted == "bytes" and isinstance(value, str):
        return value.encode()
    if isinstance(wanted, str) and wanted.startswith("ndarray"):
        return np.asarray(value, dtype=wanted.partition(":")[2] or None)
    return value


def _json_default(value: object) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def _run(args: argparse.Namespace) -> int:
    path = Path(args.image)
    os.close(open_file(path, pipes=True))  # what cannot be read is no image that was refused
    Options(timeout=args.timeout)  # refused before anything is built or launched
    if path.suffix == ".py":
        enclave = Enclave.from_file(path)
    else:
        enclave = Enclave(path, debug=True if args.debug else None)
    with enclave:
        wanted = enclave.parameter_types(args.call)
        if len(args.arguments) > len(wanted):
            raise ArgumentError(
                f"too many arguments for {args.call}",
                expected=f"at most {len(wanted)}",
                found=len(args.arguments),
            )
        values = [_argument(text, kind) for text, kind in zip(args.arguments, wanted, strict=False)]
        handle = enclave.options(timeout=args.timeout) if args.timeout is not None else enclave
        result = handle.call(args.call, *values)
        if isinstance(result, HostStream):
            with result:
                result = list(result)
    if args.json:
        output.print_json({"result": json.loads(json.dumps(result, default=_json_default))})
    else:
        print(output.json_text(result, default=_json_default))
    return 0
