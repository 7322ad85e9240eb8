"""
Hours of fuzzing with coverage, one process at a time: ``python tests/fuzz/fuzz_rotate.py``.

Targets take turns of ``--slice`` seconds until ``--seconds`` are over, so that each has had its
share whenever it is stopped. Corpora stay in ``--corpus`` and grow from turn to turn. Targets in C
are built with clang; those in Python (``--python NAME…``) need atheris. Each turn is a line of
``turns.jsonl``; ``--report`` sums them up as a table for docs/fuzzing.md. Idle priority:
``chrt -i 0 nice -n 19 python tests/fuzz/fuzz_rotate.py …``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "native")]
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_EXECUTED = re.compile(r"number_of_executed_units:\s+(\d+)")


def options(seconds: int, length: int, findings: Path, name: str) -> list[str]:
    return [
        f"-max_total_time={seconds}", f"-max_len={length}", "-print_final_stats=1", "-timeout=60",
        "-rss_limit_mb=3072", f"-artifact_prefix={findings}/{name}-",
    ]  # fmt: skip


def build(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Build the targets in C and write their seeds; return what starts each."""
    import fuzz_c_build

    clang = shutil.which("clang")
    if clang is None:
        sys.exit("clang is not installed")
    crypto = fuzz_c_build.kernels(folder / "build" / "crypto", "-O2")
    made = {}
    for name in names:
        if lacks := fuzz_c_build.missing(name):
            print(f"{name}: not on this CPU, which has no {lacks}", flush=True)
            continue
        corpus = folder / name
        corpus.mkdir(exist_ok=True)
        seeds = fuzz_c_build.program(folder / "build" / "seeds", name, crypto)
        subprocess.run([str(seeds), "--seeds", str(corpus)], check=True)
        program = fuzz_c_build.program(folder / "build", name, crypto, clang=clang)
        made[name] = [str(program), *options(0, 4096, folder / "findings", name), str(corpus)]
        print(f"{name}: built", flush=True)
    return made


def turn(name: str, command: list[str], seconds: int) -> tuple[dict[str, Any], str]:
    """Run one target for a while; return a line of the log, and what it printed."""
    told = [
        f"-max_total_time={seconds}" if word.startswith("-max_total_time=") else word
        for word in command
    ]
    began = time.monotonic()
    clean = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(
        told, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace",
        env=clean, check=False,
    )  # fmt: skip
    executed = _EXECUTED.search(done.stderr)
    last = (_COVERAGE.findall(done.stderr) or [("0", "0", "0")])[-1]
    return {
        "target": name,
        "seconds": round(time.monotonic() - began, 1),
        "executions": int(executed[1]) if executed else 0,
        "edges": int(last[0]),
        "features": int(last[1]),
        "corpus": int(last[2]),
        "status": done.returncode,
    }, done.stderr


def report(log: Path) -> None:
    """Print a row for each target: time, executions, coverage at the end, findings."""
    sums: dict[str, dict[str, Any]] = {}
    for line in log.read_text("utf-8").splitlines():
        one = json.loads(line)
        row = sums.setdefault(one["target"], {"seconds": 0.0, "executions": 0, "findings": 0})
        row["seconds"] += one["seconds"]
        row["executions"] += one["executions"]
        row["findings"] += one["status"] != 0
        row.update({key: one[key] for key in ("edges", "features", "corpus") if one["edges"]})
    print("| target | seconds | executions | edges | features | corpus | findings |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in sums.items():
        print(
            f"| {name} | {row['seconds']:.0f} | {row['executions']:,} | {row.get('edges', 0)} "
            f"| {row.get('features', 0)} | {row.get('corpus', 0)} | {row['findings'] or 'none'} |"
        )
    whole = sum(row["executions"] for row in sums.values())
    print(f"\n{sum(row['seconds'] for row in sums.values()):.0f} s, {whole:,} executions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="targets in C; default: all")
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME", help="targets in Python")
    parser.add_argument("--seconds", type=int, default=3600, help="in all")
    parser.add_argument("--slice", type=int, default=60, help="of one turn")
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz_c")
    parser.add_argument("--report", action="store_true", help="sum the turns up and end")
    args = parser.parse_args()
    log = args.corpus / "turns.jsonl"
    if args.report:
        report(log)
        return 0
    (args.corpus / "findings").mkdir(parents=True, exist_ok=True)
    import fuzz_c_build

    commands = build(args.corpus, args.targets or fuzz_c_build.TARGETS)
    for name in args.python:
        words = options(0, 1 << 16, args.corpus / "findings", name)
        commands[name] = [
            sys.executable, str(HERE), "--one", name, "--corpus", str(args.corpus / name), "--",
            *words,
        ]  # fmt: skip
    end, failed = time.monotonic() + args.seconds, False
    while time.monotonic() < end:
        for name, command in commands.items():
            left = int(end - time.monotonic())
            if left <= 0:
                break
            line, said = turn(name, command, min(args.slice, left))
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            if line["status"]:
                failed = True
                print(said[-6000:], flush=True)
    report(log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
