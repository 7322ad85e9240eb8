"""``pyenclave evidence``: make evidence of this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyenclave.cli import output

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]


def add_commands(subparsers: Subparsers) -> None:
    """Add ``evidence``."""
    evidence = subparsers.add_parser(
        "evidence",
        help="make evidence of the tool enclave",
        description="Launches the tool enclave (built at first use) and writes its evidence.",
    )
    evidence.add_argument("--nonce", metavar="HEX", help="the relying party's challenge")
    evidence.add_argument("-o", "--output", required=True, metavar="FILE")
    evidence.add_argument(
        "--root-out", metavar="FILE", help="also write the platform's root, for enrolling it"
    )
    evidence.add_argument("--force", action="store_true", help="replace FILE")
    evidence.set_defaults(function=_evidence)


def _evidence(args: argparse.Namespace) -> int:
    from cryptography.hazmat.primitives.serialization import Encoding

    from pyenclave._platform.client import local_platform_root
    from pyenclave.cli import _tool

    nonce = output.hex_of("--nonce", args.nonce) or b""
    with _tool.tool_enclave(quiet=args.json) as enclave:
        data = enclave.attest(nonce=nonce).to_bytes()
        info = enclave.info
    _tool.write_file(args.output, data, force=args.force)
    if args.root_out:
        root = local_platform_root().public_bytes(Encoding.PEM)
        _tool.write_file(args.root_out, root, force=args.force)
    result = {
        "file": args.output,
        "kind": "pyenclave",
        "size": len(data),
        "nonce": nonce,
        "mrenclave": info.mrenclave,
        "mrsigner": info.mrsigner,
        "root": args.root_out,
    }
    if args.json:
        output.print_json(result)
    else:
        output.say(f"{args.output}: evidence of kind pyenclave, {len(data)} bytes")
        output.say(f"MRENCLAVE {info.mrenclave.hex()}\nMRSIGNER  {info.mrsigner.hex()}")
    return 0
