"""``pyenclave seal``, ``unseal`` and ``info``: files, through the tool enclave."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyenclave.cli import output

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]

_SUFFIX = ".sealed"


def add_commands(subparsers: Subparsers) -> None:
    """Add ``seal``, ``unseal`` and ``info``."""
    seal = subparsers.add_parser(
        "seal",
        help="seal a file to this user's tool enclave",
        description="Who owns the state directory can open the result; nobody else can.",
    )
    _common(seal, f"default: FILE{_SUFFIX}")
    seal.add_argument(
        "--policy",
        choices=("signer", "unique"),
        default="signer",
        help="signer (default): also later versions of the tool open it; unique: only this build",
    )
    seal.set_defaults(function=_seal)

    unseal = subparsers.add_parser("unseal", help="open a sealed file")
    _common(unseal, f"default: FILE without {_SUFFIX}; - is standard output")
    unseal.set_defaults(function=_unseal)

    info = subparsers.add_parser(
        "info", help="show the header of a sealed file; nothing is opened or verified"
    )
    info.add_argument("file", metavar="FILE")
    info.set_defaults(function=_info)


def _common(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("file", metavar="FILE")
    command.add_argument("-o", "--output", metavar="FILE", help=default)
    command.add_argument(
        "--aad",
        metavar="TEXT",
        help="additional data, bound and not stored (seal and unseal alike)",
    )
    command.add_argument("--force", action="store_true", help="replace the output")


def _aad(args: argparse.Namespace) -> tuple[bytes, bool]:
    return (b"", False) if args.aad is None else (os.fsencode(args.aad), True)


def _free(path: str, *, force: bool) -> str:
    """Refuse before any work is done; writing checks again."""
    if not force and os.path.lexists(path):
        raise FileExistsError(17, "the file exists (--force replaces it)", path)
    return path


def _say(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    if args.json:
        output.print_json(result)
    else:
        output.say(text)
    return 0


def _seal(args: argparse.Namespace) -> int:
    from pyenclave.cli import _tool

    data = _tool.read_file(args.file, limit=_tool.LIMIT)
    target = _free(args.output or args.file + _SUFFIX, force=args.force)
    with _tool.tool_enclave(quiet=args.json) as enclave:
        blob = enclave.call("seal_file", data, args.policy, *_aad(args))
    _tool.write_file(target, blob, force=args.force)
    result = {"file": target, "size": len(blob), "policy": args.policy}
    return _say(args, result, f"{target}: {len(blob)} bytes, sealed ({args.policy})")


def _unseal(args: argparse.Namespace) -> int:
    from pyenclave.cli import _tool
    from pyenclave.errors import ArgumentError, EcallError, UnsealError
    from pyenclave.formats.sealed import split

    blob = _tool.read_file(args.file, limit=_tool.LIMIT + 4096)
    split(blob)  # what is no blob is refused without launching anything
    target = args.output
    if target is None:
        if not args.file.endswith(_SUFFIX) or len(Path(args.file).name) == len(_SUFFIX):
            raise ArgumentError(f"{args.file} does not end in {_SUFFIX}: name the output with -o")
        target = args.file.removesuffix(_SUFFIX)
    to_stdout = target == "-"
    if to_stdout and args.json:
        raise ArgumentError("standard output holds the JSON object: name a file with -o")
    if not to_stdout:
        _free(target, force=args.force)
    with _tool.tool_enclave(quiet=args.json) as enclave:
        try:
            data = enclave.call("unseal_file", blob, *_aad(args))
        except EcallError as error:
            if error.type != "PublicError":
                raise
            raise UnsealError(error.message) from None
    if to_stdout:
        sys.stdout.buffer.write(data)
        return 0
    _tool.write_file(target, data, force=args.force)
    return _say(args, {"file": target, "size": len(data)}, f"{target}: {len(data)} bytes")


def _info(args: argparse.Namespace) -> int:
    from pyenclave.cli import _tool
    from pyenclave.errors import UnsealError
    from pyenclave.formats.sealed import split
    from pyenclave.sealed.policy import SealPolicy

    blob = _tool.read_file(args.file, limit=_tool.LIMIT + 4096)
    try:
        header, _ = split(blob)
    except UnsealError as error:  # nothing was to be opened: the file is unreadable
        return output.report_error(error.code, str(error), as_json=args.json, exit_code=2)
    policy = SealPolicy(header.key_policy).name
    bound = {"signer": "mrsigner", "unique": "mrenclave"}.get(policy)
    result: dict[str, Any] = {
        "file": args.file,
        "size": len(blob),
        "policy": policy,
        "mrenclave": header.identity if bound == "mrenclave" else None,
        "mrsigner": header.identity if bound == "mrsigner" else None,
        "product_id": header.product_id,
        "security_version": header.security_version,
        "platform_svn": int.from_bytes(header.cpu_svn[:2], "little"),
        "debug": header.debug,
        "length": header.length,
        "aad_length": header.aad_length,
        "counter": None
        if header.counter_id is None
        else {"id": header.counter_id, "value": header.counter_value},
        "verified": False,
    }
    lines = [f"{args.file}: sealed blob, {len(blob)} bytes (header only, not verified)"]
    for name, value in result.items():
        if name in ("file", "size", "verified") or value is None:
            continue
        shown = value.hex() if isinstance(value, bytes) else value
        if isinstance(value, dict):
            shown = f"{value['id'].hex()} at {value['value']}"
        lines.append(f"{name:<17} {shown}")
    return _say(args, result, "\n".join(lines))
