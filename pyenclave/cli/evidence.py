"""``pyenclave evidence``: make evidence of this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.providers import Evidence, Probe

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]


def add_commands(subparsers: Subparsers) -> None:
    """Add ``evidence``."""
    evidence = subparsers.add_parser(
        "evidence",
        help="make evidence of this machine, or of the tool enclave",
        description="Writes evidence of the hardware where there is some (pyenclave doctor says "
        "which provider is used and why), else of the tool enclave, which is built at first use. "
        "The files beside it go where `pyenclave verify --endorsements` reads them.",
    )
    evidence.add_argument(
        "--nonce", metavar="HEX", help="the relying party's challenge; hardware: up to 64 bytes"
    )
    evidence.add_argument("-o", "--output", required=True, metavar="FILE")
    evidence.add_argument(
        "--endorsements",
        metavar="DIR",
        help="where the files beside it go (default FILE.endorsements, if there are any)",
    )
    evidence.add_argument(
        "--provider",
        metavar="NAME",
        help="gramine, nitro, tsm, azure-vtpm, sev-guest, or pyenclave for the tool enclave; "
        "default the first that is there, or what PYENCLAVE_PROVIDER names",
    )
    evidence.add_argument(
        "--device",
        metavar="PATH",
        help="where that provider is: a device, the folder of configfs-tsm or of Gramine, a TPM's "
        "device or socket (also HOST:PORT, swtpm:path=PATH)",
    )
    evidence.add_argument(
        "--root", metavar="DIR", default="/", help="the folder below which devices are (default /)"
    )
    evidence.add_argument(
        "--report-data",
        metavar="HEX",
        help="the 64 bytes that SGX, TDX or SEV-SNP shall sign, instead of the nonce",
    )
    evidence.add_argument(
        "--user-data", metavar="HEX", help="what else is bound, on Azure and Nitro"
    )
    evidence.add_argument(
        "--old-report",
        action="store_true",
        help="Azure: take a hardware report that does not have our data; the vTPM's quote has the "
        "nonce",
    )
    evidence.add_argument(
        "--imds",
        nargs="?",
        const="",
        metavar="URL",
        help="Azure TDX: have the TD quote made by the metadata service of the VM",
    )
    evidence.add_argument(
        "--root-out",
        metavar="FILE",
        help="tool enclave: also write the platform's root, for enrolling it",
    )
    evidence.add_argument("--force", action="store_true", help="replace FILE")
    evidence.set_defaults(function=_evidence)


def _evidence(args: argparse.Namespace) -> int:
    from pyenclave.providers import SOFTWARE, probe

    nonce = output.hex_of("--nonce", args.nonce) or b""
    _check_targets(args)
    found = probe(args.root, provider=args.provider, device=args.device)
    if found.chosen == SOFTWARE:
        given = (args.report_data, args.user_data, args.imds)
        if any(value is not None for value in given) or args.old_report:
            raise ValueError(
                "--report-data, --user-data, --imds and --old-report are for hardware; here the "
                f"provider is {SOFTWARE}: {found.finding.reason}"
            )
        return _tool(args, nonce)
    return _hardware(args, nonce, found)


def _check_targets(args: argparse.Namespace) -> None:
    """Refuse what could not be written before anything is built or asked."""
    from pyenclave.cli._targets import check_target

    target = check_target(args.output, force=args.force)
    if args.root_out:
        other = check_target(args.root_out, force=args.force)
        if other.absolute() == target.absolute():
            raise ValueError("--output and --root-out name the same file")
    folder = Path(args.endorsements or f"{args.output}.endorsements")
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(20, "it is no directory", str(folder))


def _hardware(args: argparse.Namespace, nonce: bytes, found: Probe) -> int:
    from pyenclave.cli import _tool
    from pyenclave.providers import obtain

    if args.root_out:
        raise ValueError("--root-out is for the tool enclave: hardware has its vendor's root")
    made = obtain(
        nonce=nonce,
        report_data=output.hex_of("--report-data", args.report_data),
        user_data=output.hex_of("--user-data", args.user_data),
        root=args.root,
        td_quote=None if args.imds is None else _quoter(args.imds),
        fresh_report=not args.old_report,
        found=found,
    )
    _tool.write_file(args.output, made.evidence, force=args.force)
    folder = _write_files(args, made)
    result: dict[str, Any] = {
        "file": args.output,
        "kind": made.kind,
        "size": len(made.evidence),
        "nonce": nonce,
        "provider": made.provider,
        "reason": found.finding.reason,
        "report_data": made.report_data,
        "user_data": made.user_data,
        "endorsements": folder,
        "files": sorted(made.endorsements),
    }
    if args.json:
        output.print_json(result)
        return 0
    output.say(f"{args.output}: evidence of kind {made.kind}, {len(made.evidence)} bytes")
    output.say(f"provider {made.provider}: {found.finding.reason}")
    if made.report_data is not None:
        output.say(f"report data {made.report_data.hex()}")
    if folder is not None:
        output.say(f"{folder}: {', '.join(sorted(made.endorsements))}")
    if made.kind == "azure-hcl-tdx" and "td-quote.bin" not in made.endorsements:
        output.say("no td-quote.bin: it cannot be verified without; --imds has it made")
    return 0


def _write_files(args: argparse.Namespace, made: Evidence) -> str | None:
    """Write the files beside the evidence and return their folder, if there are any."""
    from pyenclave.cli import _tool

    if not made.endorsements and args.endorsements is None:
        return None
    folder: str = args.endorsements or f"{args.output}.endorsements"
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in made.endorsements.items():
        _tool.write_file(str(Path(folder, name)), data, force=args.force)
    return folder


def _quoter(url: str) -> Any:
    """Return what has a TDREPORT quoted by Azure's metadata service."""
    from functools import partial

    from pyenclave.providers.azure_imds import IMDS, quote_td_report

    return partial(quote_td_report, base=url or IMDS)


def _tool(args: argparse.Namespace, nonce: bytes) -> int:
    from cryptography.hazmat.primitives.serialization import Encoding

    from pyenclave._platform.client import local_platform_root
    from pyenclave.cli import _tool
    from pyenclave.formats.evidence import MAX_NONCE

    if len(nonce) > MAX_NONCE:
        raise ValueError(f"--nonce: at most {MAX_NONCE} bytes, found {len(nonce)}")
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
        "provider": "pyenclave",
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
