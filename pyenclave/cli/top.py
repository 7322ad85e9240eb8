"""``pyenclave top``: what running enclaves use, again and again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from pyenclave._platform.client import PlatformClient
from pyenclave._platform.traffic import WRAP
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
        description="Processor time over the interval, round trips through the ring a second (a "
        "short call is one, a packed batch too), and memory. Memory is PSS, where shared "
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at an enclave showed."""

    when: float
    info: EnclaveInfo
    use: Use | None


def _look(client: PlatformClient) -> dict[bytes, Look]:
    infos = client.list()
    when = time.monotonic()
    return {info.enclave_id: Look(when=when, info=info, use=use_of(info.pid)) for info in infos}


def trips_per_second(before: Look, now: Look) -> float | None:
    """Return the rate of round trips between two looks, None where it is not known."""
    first, last = before.info.round_trips, now.info.round_trips
    if first < 0 or last < 0 or now.when <= before.when:
        return None
    return round((last - first) % WRAP / (now.when - before.when), 1)


def _row(look: Look, before: Look | None) -> dict[str, Any]:
    use, earlier = look.use, None if before is None else before.use
    share = None
    if use is not None and earlier is not None and use.when > earlier.when:
        share = round((use.cpu - earlier.cpu) / (use.when - earlier.when) * 100, 1)
    return {
        **processes.row(look.info),
        "cpu_percent": share,
        "round_trips_per_second": None if before is None else trips_per_second(before, look),
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
                "" if row["round_trips_per_second"] is None else row["round_trips_per_second"],
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
            "TRIPS/S",
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
        before = _look(client)
        while True:
            time.sleep(_FIRST if once else args.interval)
            now = _look(client)
            rows = [_row(look, before.get(enclave_id)) for enclave_id, look in now.items()]
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
            before = now
