"""Line and branch coverage of csrc/, as a table; what is not covered must be explained.

    PYENCLAVE_COVERAGE=1 python setup.py build_ext --inplace
    PYENCLAVE_COVERAGE=1 python -m pytest tests/native tests/calls tests/measurement \\
        tests/host/test_aio.py tests/host/test_aio_ends.py
    python tests/native/coverage_report.py build [--markdown FILE]

It reads what gcov says of each object file below ``build`` and compares the lines that never ran,
and the ways of branches that were never taken in lines that did, with tests/native/uncovered.toml.
The exit status is 1 if one is not explained there. Rules of CPU variants that the machine cannot
run hold on such machines only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = Path(__file__).with_name("uncovered.toml")


@dataclass
class Source:
    """One file of csrc: how often each line ran, each way of each branch, and whose line it is."""

    lines: dict[int, int] = field(default_factory=dict)
    branches: dict[tuple[int, int], int] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)

    def place(self, functions: Iterable[dict[str, Any]]) -> None:
        """Name the lines of functions, for gcov names none of a line that was inlined."""
        for function in functions:
            for line in range(function["start_line"], function["end_line"] + 1):
                self.owners[line] = function["name"]

    def untaken(self) -> dict[str, list[int]]:
        """Return the lines that ran and have ways that were not taken, once a way, by function."""
        found: dict[str, list[int]] = defaultdict(list)
        for (line, _), count in sorted(self.branches.items()):
            if count == 0 and self.lines[line]:
                found[self.owners.get(line, "?")].append(line)
        return found

    def uncovered(self) -> dict[str, list[int]]:
        """Return the lines that never ran, by function."""
        found: dict[str, list[int]] = defaultdict(list)
        for line, count in sorted(self.lines.items()):
            if count == 0:
                found[self.owners.get(line, "?")].append(line)
        return found


@dataclass(frozen=True)
class Rule:
    """Why lines of some functions do not run: a pattern of "file:function", and how many may."""

    pattern: str
    reason: str
    most: int  # lines a function; 0: any number
    without: str  # holds only on a CPU that lacks this flag of /proc/cpuinfo


@dataclass(frozen=True)
class WayRule:
    """Why ways of branches are not taken: where, in which lines, and how many a function."""

    pattern: str
    line: re.Pattern[str]
    reason: str
    most: int  # ways a function; 0: any number


def read_gcov(folder: Path) -> dict[str, Source]:
    """Ask gcov of every object file below *folder*."""
    sources: dict[str, Source] = defaultdict(Source)
    for notes in sorted(folder.rglob("*.gcno")):
        command = ["gcov", "--json-format", "--stdout", "-b", str(notes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        for document in done.stdout.splitlines():
            for entry in json.loads(document)["files"]:
                _, found, name = entry["file"].rpartition("csrc/")
                if found:
                    add(sources[name], entry["lines"])
                    sources[name].place(entry["functions"])
    return dict(sorted(sources.items()))


def add(source: Source, lines: Iterable[dict[str, Any]]) -> None:
    for line in lines:
        number = line["line_number"]
        source.lines[number] = source.lines.get(number, 0) + line["count"]
        for index, branch in enumerate(line["branches"]):
            at = number, index
            source.branches[at] = source.branches.get(at, 0) + branch["count"]


def cpu_features() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().split())


def read_entries(path: Path, kind: str) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        return list(tomllib.load(file).get(kind, []))


def read_ways(path: Path) -> list[WayRule]:
    return [
        WayRule(pattern, re.compile(entry.get("line", "")), entry["reason"], entry.get("most", 0))
        for entry in read_entries(path, "way")
        for pattern in entry["where"]
    ]


def read_rules(path: Path) -> list[Rule]:
    entries = read_entries(path, "explained")
    return [
        Rule(pattern, entry["reason"], entry.get("most", 0), entry.get("without", ""))
        for entry in entries
        for pattern in entry["where"]
        if entry.get("without", "") not in cpu_features()
    ]


def unexplained(sources: dict[str, Source], rules: list[Rule]) -> tuple[list[str], set[Rule]]:
    """Return what no rule explains, a line each, and the rules that explained something."""
    wrong, used = [], set()
    for name, source in sources.items():
        for function, lines in source.uncovered().items():
            where = f"{name.removeprefix('src/')}:{function}"
            fitting = [
                rule
                for rule in rules
                if fnmatch.fnmatchcase(where, rule.pattern)
                and (rule.most == 0 or len(lines) <= rule.most)
            ]
            used.update(fitting[:1])
            if not fitting:
                wrong.append(f"{where} lines {', '.join(map(str, lines))}")
    return wrong, used


def explain_ways(
    sources: dict[str, Source], rules: list[WayRule], csrc: Path
) -> tuple[dict[WayRule, list[str]], list[str]]:
    """Return which functions each rule speaks for, a name a way, and the ways without a rule."""
    told: dict[WayRule, list[str]] = defaultdict(list)
    wrong = []
    for name, source in sources.items():
        untaken = source.untaken()
        text = (csrc / name).read_text("utf-8").splitlines() if untaken else []
        for function, lines in untaken.items():
            where = f"{name.removeprefix('src/')}:{function}"
            fitting = [rule for rule in rules if fnmatch.fnmatchcase(where, rule.pattern)]
            used: dict[WayRule, int] = defaultdict(int)
            for line in lines:
                for rule in fitting:
                    if rule.line.search(text[line - 1]) and not 0 < rule.most <= used[rule]:
                        used[rule] += 1
                        told[rule].append(where)
                        break
                else:
                    wrong.append(f"{where} line {line}: {text[line - 1].strip()}")
    return told, wrong


def told_ways(told: dict[WayRule, list[str]]) -> list[str]:
    """Return the reasons, each with the number of ways and the files it speaks for."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for rule, places in told.items():
        by_reason[rule.reason] += places
    lines = []
    for reason, places in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        files = sorted({place.partition(":")[0] for place in places})
        lines.append(f"| {len(places)} | {reason} | {', '.join(f'`{file}`' for file in files)} |")
    return lines


def percent(done: int, of: int) -> str:
    return f"{100 * done / of:.1f} %" if of else "-"


def table(sources: dict[str, Source]) -> list[str]:
    rows = ["| file | lines | covered | branches | taken |", "|---|---:|---:|---:|---:|"]
    total = [0, 0, 0, 0]
    for name, source in sources.items():
        counts = [
            len(source.lines),
            sum(map(bool, source.lines.values())),
            len(source.branches),
            sum(map(bool, source.branches.values())),
        ]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        rows.append(row(name, counts))
    return [*rows, row("**all**", total)]


def row(name: str, counts: list[int]) -> str:
    lines, run, branches, taken = counts
    return f"| {name} | {lines} | {percent(run, lines)} | {branches} | {percent(taken, branches)} |"


def explanations(sources: dict[str, Source], rules: list[Rule]) -> list[str]:
    """Return the reasons, each with the functions and the number of lines it speaks for."""
    by_reason: dict[str, list[str]] = {}
    for name, source in sources.items():
        for function, lines in source.uncovered().items():
            where = f"{name.removeprefix('src/')}:{function}"
            for rule in rules:
                fits = rule.most == 0 or len(lines) <= rule.most
                if fits and fnmatch.fnmatchcase(where, rule.pattern):
                    by_reason.setdefault(rule.reason, []).append(f"`{where}` ({len(lines)})")
                    break
    return [f"- {reason}: {', '.join(names)}" for reason, names in sorted(by_reason.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where the object files are")
    parser.add_argument("--markdown", type=Path, help="write the table here, too")
    parser.add_argument("--explained", type=Path, default=EXPLAINED, help="reasons other than ours")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="the sources, if not ours")
    options = parser.parse_args()
    sources, rules = read_gcov(options.folder), read_rules(options.explained)
    if not any(count for source in sources.values() for count in source.lines.values()):
        print("nothing ran: no coverage build, or no test of it")
        return 2
    rows = table(sources)
    print("\n".join(rows))
    wrong, used = unexplained(sources, rules)
    ways, untold = explain_ways(sources, read_ways(options.explained), options.csrc)
    for rule in rules:
        if rule not in used:
            print(f"note: {rule.pattern}: covered now, or not on this machine")
    if options.markdown:
        write(options.markdown, rows, explanations(sources, rules), told_ways(ways))
    for line in wrong:
        print(f"not covered and not explained: {line}")
    for line in untold:
        print(f"not taken and not explained: {line}")
    return bool(wrong or untold)


def write(path: Path, rows: list[str], reasons: list[str], ways: list[str]) -> None:
    head = path.read_text().split("<!-- measured -->")[0] if path.exists() else "# Coverage\n\n"
    today = datetime.now(UTC).date()
    body = ["<!-- measured -->", "", f"Measured on {today}.", "", *rows, "", "## Not covered", ""]
    more = ["", "## Ways not taken", "", "| ways | why | files |", "|---:|---|---|", *ways]
    path.write_text("\n".join([head.rstrip("\n"), "", *body, *reasons, *more, ""]))


if __name__ == "__main__":
    sys.exit(main())
