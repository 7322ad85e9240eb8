"""The subcommand ``measure sgx``: enclaves, SGXS streams, images and SIGSTRUCTs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.measurement.sgx_file import SgxMeasured

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_measures"]


def add_measures(subparsers: Subparsers) -> None:
    """Add the subcommands of this module."""
    from pyenclave.cli.measure import leaf

    command = leaf(
        subparsers,
        "sgx",
        help="MRENCLAVE, MRSIGNER and signature of an enclave",
        description="FILE is a signed enclave of Intel's SDK or of Open Enclave, an SGXS stream, "
        "a pyenclave image, or a bare SIGSTRUCT. Exit code 1: a signature does not hold, or was "
        "made for another enclave.",
    )
    command.add_argument("file", metavar="FILE")
    command.add_argument("--sigstruct", metavar="FILE", help="the SIGSTRUCT that lies beside it")
    command.add_argument(
        "--size", metavar="BYTES", help="the enclave's size, for an SGXS stream that leaves it open"
    )
    command.add_argument("--explain", action="store_true", help="list what was measured")
    command.set_defaults(function=_sgx)


def _sgx(args: argparse.Namespace) -> int:
    from pyenclave._files import read_file
    from pyenclave.cli.measure import MAX_FILE
    from pyenclave.measurement.sgx_file import measure_sgx

    data = read_file(args.file, limit=MAX_FILE)
    beside = read_file(args.sigstruct, limit=1 << 16) if args.sigstruct else None
    size = int(args.size, 0) if args.size else None
    found = measure_sgx(data, sigstruct=beside, size=size)
    rows: list[dict[str, Any]] = []
    if args.explain and found.layout is not None:
        from pyenclave.measurement.explain import explain

        rows = explain(found.layout)
    if args.json:
        extra = {"measured": rows} if args.explain else {}
        output.print_json(found.claims() | extra)
    else:
        _say(found, rows)
    return 0 if found.verified else 1


def _say(found: SgxMeasured, rows: list[dict[str, Any]]) -> None:
    claims = found.claims()
    output.say(f"kind       {found.kind}")
    output.say(f"MRENCLAVE  {claims['mrenclave']}")
    if found.signed is not None:
        output.say(f"MRSIGNER   {claims['mrsigner']}")
        output.say(f"product    {claims['isvprodid']}, version {claims['isvsvn']}")
        output.say(f"attributes {found.signed.flag_names()}")
        output.say(f"date       {claims['date_hex']}")
        output.say(f"signature  {_signature(found)}")
    if found.layout is not None:
        output.say(
            f"enclave    {claims['enclave_size']} bytes, {claims['eadd_count']} pages, "
            f"{claims['eextend_count']} chunks measured"
        )
    for block in claims.get("metadata_blocks", ()):
        output.say(f"metadata   {block['version']}: {block['mrenclave']}")
    for warning in found.warnings:
        output.say(f"{output.paint('warning', 'yellow')}    {warning}")
    if rows:
        table = [
            (
                f"{row['offset']:#012x}",
                row["pages"],
                row["flags"],
                row["measured"],
                row["content"],
                row["what"],
                " ".join(row["sections"]),
                row.get("sha256", "")[:16],
            )
            for row in rows
        ]
        header = ("offset", "pages", "flags", "measured", "content", "what", "sections", "sha256")
        output.say("")
        output.say(output.table(table, header=header))


def _signature(found: SgxMeasured) -> str:
    if found.signed is None or not found.signed.signature_valid:
        return "does not hold"
    if not found.signed.q1_q2_valid:
        return "holds, but Q1 or Q2 is wrong"
    if found.matches is False:
        return "holds, but for another enclave"
    return "holds"
