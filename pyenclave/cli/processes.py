"""``pyenclave ps`` and ``pyenclave kill``: running enclaves of this user's platform."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from pyenclave._platform.client import PlatformClient
from pyenclave.cli import output
from pyenclave.errors import ArgumentError, PlatformUnavailableError
from pyenclave.formats.messages import EnclaveInfo

__all__ = ["add_commands", "matches", "mode", "row", "running"]


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``ps`` and ``kill``."""
    ps = subparsers.add_parser("ps", help="list running enclaves")
    ps.set_defaults(function=_ps)
    kill = subparsers.add_parser("kill", help="end running enclaves")
    kill.add_argument("enclave", nargs="*", help="identity (or its beginning), name or pid")
    kill.add_argument("--all", action="store_true", help="end all of them")
    kill.set_defaults(function=_kill)


def running() -> tuple[PlatformClient | None, tuple[EnclaveInfo, ...]]:
    """Return a connection to the platform and its enclaves; None: no platform runs."""
    try:
        client = PlatformClient.connect(start=False)
    except PlatformUnavailableError:
        return None, ()  # no platform runs, so no enclave does
    return client, client.list()


def row(info: EnclaveInfo) -> dict[str, object]:
    """Return what is told of one enclave."""
    return {
        "enclave_id": info.enclave_id.hex(),
        "name": info.name,
        "pid": info.pid,
        "host_pid": info.host_pid,
        "debug": info.debug,
        "debugger": info.debugger,
        "mrenclave": info.mrenclave.hex(),
        "seconds": round(max(0.0, time.time() - info.started), 1),
    }


def mode(row: Mapping[str, object]) -> str:
    """Return how an enclave runs, for people."""
    if not row["debug"]:
        return "production"
    return f"debug, {row['debugger']}" if row["debugger"] else "debug"


def _ps(args: argparse.Namespace) -> int:
    client, enclaves = running()
    if client is not None:
        client.close()
    rows = [row(info) for info in enclaves]
    if args.json:
        output.print_json({"enclaves": rows})
        return 0
    if not rows:
        output.say("no enclave is running")
        return 0
    output.say(
        output.table(
            [
                (
                    str(row["enclave_id"])[:12],
                    row["name"],
                    row["pid"],
                    row["host_pid"],
                    mode(row),
                    f"{row['seconds']} s",
                    str(row["mrenclave"])[:16],
                )
                for row in rows
            ],
            header=("ENCLAVE", "NAME", "PID", "HOST", "MODE", "AGE", "MRENCLAVE"),
        )
    )
    return 0


def matches(info: EnclaveInfo, word: str) -> bool:
    """Whether *word* is an enclave's name, pid, identity or at least four digits of that."""
    whole = word in (info.name, str(info.pid), info.enclave_id.hex())
    return whole or (len(word) >= 4 and info.enclave_id.hex().startswith(word.lower()))


def _kill(args: argparse.Namespace) -> int:
    if not args.enclave and not args.all:
        raise ArgumentError("name an enclave to end, or give --all")
    client, enclaves = running()
    killed: list[EnclaveInfo] = []
    missing = [w for w in args.enclave if not any(matches(info, w) for info in enclaves)]
    if client is not None:
        for info in enclaves:
            if args.all or any(matches(info, word) for word in args.enclave):
                client.kill(info.enclave_id)
                killed.append(info)
        client.close()
    if args.json:
        output.print_json({"killed": [i.enclave_id.hex() for i in killed], "missing": missing})
    else:
        for info in killed:
            output.say(f"ended {info.name} ({info.enclave_id.hex()[:12]}, pid {info.pid})")
        for word in missing:
            output.say(f"no running enclave matches {word!r}")
        if args.all and not killed:
            output.say("no enclave is running")
    return 1 if missing else 0
