"""``pyenclave top``: what running enclaves use, again and again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from pyenclave._platform.client import PlatformClient
from pyenclave.cli import output, processes
from pyenclave.errors import ArgumentError
from pyenclave.formats.messages import EnclaveInfo

__all__ = ["add_commands"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_FIRST = 0.5  # seconds between the two looks of --once
_CLEAR = "\x1b[H\x1b[2J"


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``top``."""
    top = subparsers.add_parser(
        "top",
        help="show what running enclaves use, until interrupted",
        description="Processor time over the interval, and memory. Memory is PSS, where shared "
        "pages count in part, if this user may read it of a hardened process (root), else RSS.",
    )
    top.add_argument("--once", action="store_true", help="show one table")
    top.add_argument("--interval", type=float, default=2.0, metavar="SECONDS")
    top.set_defaults(function=_top)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a process had used at one moment."""

    when: float
    cpu: float  # seconds
    threads: int
    memory: int  # bytes
    kind: str  # "pss" or "rss"


def use_of(pid: int) -> Use | None:
    """Return what a process uses, or None if it is gone or may not be looked at (hidepid)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        memory, kind = int(fields[21]) * _PAGE, "rss"
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
                for text in file:
                    if text.startswith("Pss:"):
                        memory, kind = int(text.split()[1]) * 1024, "pss"
                        break
        except PermissionError:
            pass  # as it should be: nobody of this user may look into a worker
    except (FileNotFoundError, PermissionError, ProcessLookupError, IndexError, ValueError):
        return None
    return Use(
        when=time.monotonic(),
        cpu=(int(fields[11]) + int(fields[12])) / _TICKS,
        threads=int(fields[17]),
        memory=memory,
        kind=kind,
    )


def _look(client: PlatformClient) -> list[tuple[EnclaveInfo, Use | None]]:
    return [(info, use_of(info.pid)) for info in client.list()]


def _row(info: EnclaveInfo, use: Use | None, before: Use | None) -> dict[str, Any]:
    share = None
    if use is not None and before is not None and use.when > before.when:
        share = round((use.cpu - before.cpu) / (use.when - before.when) * 100, 1)
    return {
        **processes.row(info),
        "cpu_percent": share,
        "cpu_seconds": None if use is None else round(use.cpu, 2),
        "threads": None if use is None else use.threads,
        "memory": None if use is None else use.memory,
        "memory_kind": None if use is None else use.kind,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no enclave is running"
    return output.table(
        [
            (
                str(row["enclave_id"])[:12],
                row["name"],
                row["pid"],
                row["host_pid"],
                processes.mode(row),
                "" if row["cpu_percent"] is None else f"{row['cpu_percent']:.1f} %",
                "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.2f} s",
                "" if row["threads"] is None else row["threads"],
                ""
                if row["memory"] is None
                else f"{row['memory'] / 2**20:.1f} MiB {row['memory_kind']}",
                f"{row['seconds']} s",
            )
            for row in rows
        ],
        header=(
            "ENCLAVE",
            "NAME",
            "PID",
            "HOST",
            "MODE",
            "CPU",
            "TIME",
            "THREADS",
            "MEMORY",
            "AGE",
        ),
    )


def _top(args: argparse.Namespace) -> int:
    if not 0.1 <= args.interval <= 3600:
        raise ArgumentError("an interval is between 0.1 and 3600 seconds", found=args.interval)
    once = args.once or args.json
    client, _ = processes.running()
    if client is None:
        if args.json:
            output.print_json({"enclaves": []})
        else:
            output.say(_table([]))
        return 0
    with client:
        before = {info.enclave_id: use for info, use in _look(client)}
        while True:
            time.sleep(_FIRST if once else args.interval)
            now = _look(client)
            rows = [_row(info, use, before.get(info.enclave_id)) for info, use in now]
            rows.sort(key=lambda row: row["cpu_percent"] or 0.0, reverse=True)
            if args.json:
                output.print_json({"enclaves": rows})
                return 0
            if not args.once and sys.stdout.isatty():
                print(_CLEAR, end="")
            output.say(_table(rows))
            sys.stdout.flush()
            if args.once:
                return 0
            before = {info.enclave_id: use for info, use in now}
