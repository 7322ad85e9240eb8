"""``pyenclave verify``: is this evidence genuine, and is it what is wanted?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from pyenclave._files import read_file
from pyenclave.cli import output

if TYPE_CHECKING:
    from pyenclave.attestation import AppraisalPolicy, AttestationResult, Check, Endorsements

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_commands", "moment", "policy_of", "print_checks", "roots_of"]

_MARK: Final = {
    "passed": ("passed ", "green"),
    "failed": ("FAILED ", "red"),
    "skipped": ("skipped", "dim"),
}
_MAX_ROOT: Final = 1 << 20  # bytes of a file of roots
_MAX_SHOWN: Final = 160  # characters of a claim: 64 bytes in hex, and some words
_NOT_REACHED: Final = "not reached: "
_FEW: Final = 2  # checks that were not reached for one reason and are still listed singly
_INDENT: Final = " " * 9


def add_commands(subparsers: Subparsers) -> None:
    """Add ``verify``."""
    verify = subparsers.add_parser(
        "verify",
        help="verify evidence of any kind and appraise it against a policy",
        description="The kind is told from the bytes. Exit 0: accepted; 1: refused; 2: "
        "unreadable. Anchors are the vendors' pinned roots and those of --root; a root or key "
        "that comes with the evidence is never one. Nothing is fetched.",
    )
    verify.add_argument("evidence", metavar="EVIDENCE")
    verify.add_argument(
        "--endorsements",
        metavar="DIR|BUNDLE",
        help="a bundle of `pyenclave collateral fetch`, or a folder of the vendors' files: "
        "tcb-info.json, qe-identity.json, pck-crl.der, vek.der, ask.pem, td-quote.bin, …",
    )
    verify.add_argument("--at", metavar="RFC3339", help="judge validity at this time (default now)")
    verify.add_argument(
        "--policy",
        default="strict",
        metavar="FILE|strict|permissive",
        help="strict (default): genuine, no debug, TCB up to date, no software platform; "
        "permissive: genuine; or a JSON or TOML file with the fields of AppraisalPolicy",
    )
    verify.add_argument("--nonce", metavar="HEX", help="the nonce that was sent")
    verify.add_argument("--report-data", metavar="HEX", help="the 64 expected bytes")
    verify.add_argument(
        "--user-data",
        metavar="HEX",
        help="what the evidence must bind besides (Azure, Nitro, ours)",
    )
    verify.add_argument(
        "--root", action="append", default=[], metavar="FILE", help="pinned roots, PEM or DER"
    )
    verify.set_defaults(function=_verify)


def policy_of(text: str) -> AppraisalPolicy:
    """Return the policy that an option names: a file, ``strict`` or ``permissive``."""
    from pyenclave.attestation import AppraisalPolicy

    if text == "strict":
        return AppraisalPolicy.strict()
    if text == "permissive":
        return AppraisalPolicy.permissive()
    return AppraisalPolicy.from_file(text)


def moment(option: str, text: str | None) -> datetime | None:
    """
    Return the time of an option.

    Raises:
        ValueError: No RFC 3339 time with a zone.

    """
    if text is None:
        return None
    try:
        # RFC 3339 allows small letters, Python does not.
        found = datetime.fromisoformat(text.upper())
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a time such as 2026-07-01T12:00:00Z") from None
    if found.tzinfo is None:
        raise ValueError(f"{option}: {text!r} has no zone; end it in Z for UTC")
    return found


def roots_of(paths: list[str]) -> list[bytes]:
    """Read the certificates of --root, DER."""
    from pyenclave.errors import EvidenceFormatError
    from pyenclave.formats.x509 import Certificate

    roots: list[bytes] = []
    for path in paths:
        data = read_file(path, limit=_MAX_ROOT)
        if not data:
            raise ValueError(f"--root: {path} is empty")
        try:
            if data.lstrip().startswith(b"-----BEGIN"):
                roots.extend(item.der for item in Certificate.from_pem_chain(data))
            else:
                roots.append(Certificate.from_der(data).der)
        except EvidenceFormatError as error:
            raise ValueError(f"--root: {path} is no certificate: {error}") from None
    return roots


def _endorsements(path: str | None) -> Endorsements:
    from pyenclave.attestation.endorsements import EMPTY, Endorsements

    return EMPTY if path is None else Endorsements.from_path(path)


def _verify(args: argparse.Namespace) -> int:
    from pyenclave.attestation import appraise
    from pyenclave.attestation.detect import MAX_EVIDENCE

    nonce = output.hex_of("--nonce", args.nonce)
    endorsements = _endorsements(args.endorsements)
    result = appraise(
        read_file(args.evidence, limit=MAX_EVIDENCE),
        policy=policy_of(args.policy),
        nonce=nonce,
        freshness="not_checked" if nonce is None else "required",
        endorsements=endorsements,
        roots=roots_of(args.root),
        at=moment("--at", args.at),
        report_data=output.hex_of("--report-data", args.report_data),
        user_data=output.hex_of("--user-data", args.user_data),
    )
    if args.json:
        output.print_json(result.to_json())
    else:
        _print(result, endorsements)
    return 0 if result.accepted else 1


def _print(result: AttestationResult, endorsements: Endorsements) -> None:
    print_checks(result)
    output.say()
    claims = [(name, text) for name, text in _flat("", result.claims) if text]
    width = max((len(name) for name, _ in claims), default=0)
    for name, text in claims:
        output.say(f"{name:<{width}}  {text}")
    output.say()
    if endorsements.ignored:
        ignored = output.line(", ".join(endorsements.ignored))
        output.say(output.paint(f"no endorsements, so not read: {_cut(ignored)}", "dim"))
    verdicts = {name: getattr(result, name) for name in ("genuine", "identified", "fresh")}
    words = ", ".join(name if holds else f"not {name}" for name, holds in verdicts.items())
    if result.accepted:
        output.say(f"{output.paint('accepted', 'green')} ({result.kind}): {words}")
        return
    failed = ", ".join(result.refused_by) or "checks that were not reached"
    output.say(f"{output.paint('REFUSED', 'red')} ({result.kind}): {words}; by {failed}")


def print_checks(result: AttestationResult) -> None:
    """Print each check of *result*; what was not reached for one reason is one line."""
    width = max((len(check.name) for check in result.checks), default=0)
    unreached: list[Check] = []
    for check in result.checks:
        if unreached and check.advice != unreached[0].advice:
            _say_unreached(unreached, width)
            unreached = []
        if check.outcome == "skipped" and (check.advice or "").startswith(_NOT_REACHED):
            unreached.append(check)
            continue
        for text in _lines(check, width):
            output.say(text)
    _say_unreached(unreached, width)


def _say_unreached(checks: list[Check], width: int) -> None:
    if len(checks) > _FEW:
        text, colour = _MARK["skipped"]
        names = f"{checks[0].name} to {checks[-1].name}: {len(checks)} checks"
        output.say(f"{output.paint(text, colour)}  {names} {output.line(checks[0].advice or '')}")
        return
    for check in checks:
        for line in _lines(check, width):
            output.say(line)


def _lines(check: Check, width: int) -> Iterator[str]:
    """Return the lines of one check; what came with the evidence is escaped."""
    text, colour = _MARK[check.outcome]
    mark = output.paint(text, colour)
    if check.outcome == "skipped":
        yield f"{mark}  {check.name:<{width}}  {output.line(check.advice or '')}".rstrip()
        return
    yield f"{mark}  {check.name}"
    if check.outcome == "failed":
        if check.expected is not None:
            yield f"{_INDENT}expected  {output.line(check.expected)}"
        if check.found is not None:
            yield f"{_INDENT}found     {output.line(check.found)}"
        if check.advice:
            yield f"{_INDENT}{output.line(check.advice)}"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Return claims by dotted name, in order, each as one line."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            name = output.line(str(key))
            yield from _flat(f"{prefix}.{name}" if prefix else name, item)
    elif isinstance(value, bool) or value is None:
        yield prefix, {True: "true", False: "false", None: "none"}[value]
    elif isinstance(value, list | tuple):
        words = ", ".join(str(item) for item in value)
        yield prefix, _cut(output.line(words)) or "none"
    else:
        yield prefix, _cut(output.line(str(value)))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
