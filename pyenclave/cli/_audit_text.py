"""How the audit log looks to people. Whoever wrote a row may be hostile: one row, its lines."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pyenclave.cli import output
from pyenclave.formats.audit_chain import Report

__all__ = ["findings", "judgement", "rfc3339", "timeline", "whole"]

_PREFIX = "Microsoft.KeyVault/vaults/"
_COLOURS = {"allowed": "green", "refused": "red", "failed": "yellow"}
_WIDE = {"action": 32, "resource": 60, "caller": 40}
_FIRST = ("seq", "reference", "at", "decision", "action", "resource", "caller")
_LAST = ("rule", "condition", "expected", "found")


def rfc3339(moment: dt.datetime) -> str:
    """Return *moment* as rows have it, so that text compares as time."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _value(value: object) -> str:
    """Return one line for a member of a row."""
    if isinstance(value, str):
        return output.line(value)
    return output.line(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str))


def _cell(row: dict[str, Any], name: str) -> str:
    found = _value(row.get(name, ""))
    if name == "action":
        found = found.removeprefix(_PREFIX)
    elif name == "at":
        found = found.replace("T", " ")[:23]
    elif name == "caller":
        found = found.rpartition("/")[2]  # without the tenant
    limit = _WIDE.get(name, 40)
    return found if len(found) <= limit else found[: limit - 1] + "…"


def timeline(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield lines: one a decision, and under a refusal what failed."""
    names = ("at", "decision", "action", "resource", "caller", "reference")
    cells = [[_cell(row, name) for name in names] for row in rows]
    if not cells:
        yield "no rows"
        return
    header = ["time (UTC)", *names[1:]]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(names))]
    padded = [cell.ljust(width) for cell, width in zip(header, widths, strict=True)]
    yield output.paint("  ".join(padded).rstrip(), "bold")
    for row, line in zip(rows, cells, strict=True):
        shown = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        shown[1] = output.paint(shown[1], _COLOURS.get(line[1], "yellow"))
        yield "  ".join(shown).rstrip()
        if line[1] != "allowed":
            yield from (f"    {name}: {value}" for name, value in _reason(row))


def _reason(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _LAST:
        if name in row:
            yield name, _value(row[name])


def whole(row: dict[str, Any]) -> Iterator[str]:
    """Yield every member of one row, those of claims and details on lines of their own."""
    rest = sorted(set(row) - {*_FIRST, *_LAST})
    pairs: list[tuple[str, str]] = []
    for name in (*_FIRST, *_LAST, *rest):
        value = row.get(name)
        if isinstance(value, dict) and name in {"claims", "details"}:
            pairs += [(f"{name}.{output.line(k)}", _value(v)) for k, v in sorted(value.items())]
        elif name in row:
            pairs.append((output.line(name), _value(value)))
    width = max(len(name) for name, _ in pairs)
    yield from (f"{name.ljust(width)}  {value}" for name, value in pairs)


def findings(report: Report) -> Iterator[str]:
    """Yield what is wrong with a log."""
    for finding in report.findings:
        yield f"{output.paint(finding.kind, 'red')}: {output.line(finding.message)}"
    if report.more:
        yield f"… and {report.more} more"


def judgement(report: Report, *, pinned: bool) -> Iterator[str]:
    """Yield what verifying gave."""
    yield from findings(report)
    first, last = report.start.seq + 1, report.last
    word = output.paint("intact", "green") if report.intact else output.paint("NOT intact", "red")
    yield (
        f"log {report.start.log.hex()}: {word}, rows {first} to {last}"
        if last >= first
        else (f"log {report.start.log.hex()}: {word}, no rows")
    )
    if report.newest is None:
        yield "no checkpoint holds: whoever owns the database can have written all of it"
        return
    yield f"signed up to row {report.signed} on {report.newest.at}" + (
        f"; rows {report.signed + 1} to {last} are not signed yet" if last > report.signed else ""
    )
    for kid in sorted(report.keys):
        yield f"by the key {kid}" + (
            "" if pinned else ", which the log itself names: pin it with --key"
        )
