"""``pyenclave logs``: what debug enclaves printed."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence

from pyenclave._platform.debuglog import LogFile, find_logs
from pyenclave._platform.state import State
from pyenclave.cli import output
from pyenclave.errors import ArgumentError

__all__ = ["add_commands"]

_LOOK = 0.1  # seconds between two looks at a log that is followed
_RAISED = "] a trusted function raised:"
_INSIDE = re.compile(r"\s|Traceback ")
_CHAIN = re.compile(r"During handling of |The above exception ")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``logs``."""
    logs = subparsers.add_parser(
        "logs",
        help="show what debug enclaves printed",
        description="Output, log records and tracebacks of debug enclaves, the last "
        "256 KiB each. Without arguments: which logs there are. A production enclave has none.",
    )
    logs.add_argument(
        "enclave", nargs="?", metavar="ENCLAVE", help="identity (or its beginning) or name"
    )
    logs.add_argument(
        "--id", metavar="ID", help="only what has this correlation id (EcallError.id)"
    )
    logs.add_argument("--follow", "-f", action="store_true", help="go on until the enclave ends")
    logs.set_defaults(function=_logs)


def _logs(args: argparse.Namespace) -> int:
    if args.follow and (args.json or args.id):
        raise ArgumentError("--follow goes with neither --json nor --id")
    with State.open(create=False) as state:
        logs = find_logs(state)
        if args.enclave is None and args.id is None:
            if args.follow:
                raise ArgumentError("name the enclave whose log is to be followed")
            return _list(logs, as_json=args.json)
        chosen = [log for log in logs if args.enclave is None or _matches(log, args.enclave)]
        if args.follow and chosen:
            return _follow(state, chosen[0])
        if args.id is None:
            chosen = chosen[:1]  # of one name, the latest
        found = [(log, _lines(state, log, args.id)) for log in chosen]
        if args.id is not None:
            found = [(log, lines) for log, lines in found if lines]
    if args.json:
        output.print_json({"logs": [{**_row(log), "lines": lines} for log, lines in found]})
    else:
        for _, lines in found:
            for text in lines:
                print(output.printable(text))
    if not found:
        wanted = args.enclave or args.id
        text = f"no log of a debug enclave matches {wanted!r}; see 'pyenclave logs'"
        output.note(text)
    return 0 if found else 1


def _matches(log: LogFile, word: str) -> bool:
    return word == log.name or (len(word) >= 4 and log.enclave_id.startswith(word.lower()))


def _row(log: LogFile) -> dict[str, object]:
    return {
        "enclave_id": log.enclave_id,
        "name": log.name,
        "started": log.started,
        "size": log.size,
        "running": log.running,
    }


def _list(logs: Sequence[LogFile], *, as_json: bool) -> int:
    if as_json:
        output.print_json({"logs": [_row(log) for log in logs]})
    elif not logs:
        output.say("no debug enclave has printed anything")
    else:
        rows = [
            (
                log.enclave_id[:12],
                log.name,
                "running" if log.running else "ended",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(log.started)),
                f"{log.size / 1024:.1f} KiB",
            )
            for log in logs
        ]
        output.say(output.table(rows, header=("ENCLAVE", "NAME", "STATE", "STARTED", "SIZE")))
    return 0


def _lines(state: State, log: LogFile, correlation: str | None) -> list[str]:
    lines = log.read(state).decode("utf-8", "backslashreplace").split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines if correlation is None else list(_about(lines, f"[{correlation}]"))


def _about(lines: Sequence[str], mark: str) -> Iterator[str]:
    """Give the lines that have *mark*, and the tracebacks that follow such lines."""
    end = 0
    for number, text in enumerate(lines):
        if number < end or mark in text:
            yield text
        if number >= end and mark in text and text.endswith(_RAISED):
            end = _traceback_end(lines, number + 1)


def _traceback_end(lines: Sequence[str], start: int) -> int:
    """Return the number of the line after a traceback, those that it was caused by included."""
    end = start
    while end < len(lines) and _INSIDE.match(lines[end]):
        end += 1
    end += 1  # the exception itself
    if lines[end : end + 1] == [""] and end + 1 < len(lines) and _CHAIN.match(lines[end + 1]):
        return _traceback_end(lines, end + 3)
    return end


def _follow(state: State, log: LogFile) -> int:
    shown = 0
    while True:
        # Looked at before it is read: what an enclave printed last is not missed.
        same = (item for item in find_logs(state) if item.enclave_id == log.enclave_id)
        now = next(same, None)
        if now is None:
            return 0  # it made room for later ones
        data = now.read(state)
        if len(data) < shown:
            shown = 0  # its older half went
        whole = data.rfind(b"\n") + 1 if now.running else len(data)
        if whole > shown:
            text = data[shown:whole].decode("utf-8", "backslashreplace")
            print(output.printable(text), end="")
            sys.stdout.flush()
            shown = whole
        if not now.running:
            return 0
        time.sleep(_LOOK)
