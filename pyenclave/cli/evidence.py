"""``pyenclave evidence`` and ``pyenclave verify``."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.attestation import AppraisalPolicy, AttestationResult

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands"]

_MAX_EVIDENCE = 16 << 20
_MARK = {
    "passed": ("passed ", "green"),
    "failed": ("FAILED ", "red"),
    "skipped": ("skipped", "dim"),
}
_CLAIMS = ("mrenclave", "mrsigner", "isv_prod_id", "isv_svn", "debug", "level", "tee")


def add_commands(subparsers: Subparsers) -> None:
    """Add ``evidence`` and ``verify``."""
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

    verify = subparsers.add_parser(
        "verify",
        help="verify evidence and appraise it against a policy",
        description="Exit 0: accepted; 1: refused; 2: unreadable. A root is never taken from the "
        "evidence: give the enrolled one with --root.",
    )
    verify.add_argument("evidence", metavar="EVIDENCE")
    verify.add_argument("--at", metavar="RFC3339", help="judge validity at this time (default now)")
    verify.add_argument(
        "--policy",
        default="strict",
        metavar="FILE|strict|permissive",
        help="strict (default): genuine, no debug, no software platform; permissive: genuine; or "
        "a JSON or TOML file with the fields of AppraisalPolicy",
    )
    verify.add_argument("--nonce", metavar="HEX", help="the nonce that was sent")
    verify.add_argument("--report-data", metavar="HEX", help="the 64 expected bytes")
    verify.add_argument(
        "--root", action="append", default=[], metavar="FILE", help="pinned roots, PEM or DER"
    )
    verify.set_defaults(function=_verify)


def _hex(option: str, text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{option}: {text[:80]!r} is not hexadecimal digits") from None


def _evidence(args: argparse.Namespace) -> int:
    from cryptography.hazmat.primitives.serialization import Encoding

    from pyenclave._platform.client import local_platform_root
    from pyenclave.cli import _tool

    nonce = _hex("--nonce", args.nonce) or b""
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


def _policy(text: str) -> AppraisalPolicy:
    from pyenclave.attestation import AppraisalPolicy

    if text == "strict":
        return AppraisalPolicy.strict()
    if text == "permissive":
        return AppraisalPolicy.permissive()
    return AppraisalPolicy.from_file(text)


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--at: {text!r} is not a time such as 2026-07-01T12:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError(f"--at: {text!r} has no zone; end it in Z for UTC")
    return moment


def _roots(paths: list[str]) -> list[object]:
    from cryptography import x509

    roots: list[object] = []
    for path in paths:
        data = Path(path).read_bytes()
        try:
            if data.lstrip().startswith(b"-----BEGIN"):
                roots.extend(x509.load_pem_x509_certificates(data))
            else:
                roots.append(x509.load_der_x509_certificate(data))
        except ValueError as error:
            raise ValueError(f"--root: {path} is no certificate: {error}") from None
    return roots


def _verify(args: argparse.Namespace) -> int:
    from pyenclave.attestation import appraise
    from pyenclave.cli import _tool

    nonce = _hex("--nonce", args.nonce)
    result = appraise(
        _tool.read_file(args.evidence, limit=_MAX_EVIDENCE),
        policy=_policy(args.policy),
        nonce=nonce,
        freshness="not_checked" if nonce is None else "required",
        roots=_roots(args.root),  # type: ignore[arg-type]
        at=_time(args.at),
        report_data=_hex("--report-data", args.report_data),
    )
    if args.json:
        output.print_json(result.to_json())
    else:
        _print(result)
    return 0 if result.accepted else 1


def _print(result: AttestationResult) -> None:
    for check in result.checks:
        text, colour = _MARK[check.outcome]
        line = f"{output.paint(text, colour)} {check.name:<22}"
        if check.outcome == "failed":
            line += f" expected {check.expected}; found {check.found}"
        elif check.outcome == "skipped" and check.advice:
            line += f" {check.advice}"
        output.say(line.rstrip())
        if check.outcome == "failed" and check.advice:
            output.say(f"        {check.advice}")
    output.say()
    for name in _CLAIMS:
        if name in result.claims:
            output.say(f"{name:<12} {result.claims[name]}")
    output.say()
    verdicts = {name: getattr(result, name) for name in ("genuine", "identified", "fresh")}
    words = ", ".join(name if holds else f"not {name}" for name, holds in verdicts.items())
    verdict = ("accepted", "green") if result.accepted else ("REFUSED", "red")
    output.say(f"{output.paint(*verdict)} ({result.kind}): {words}")
