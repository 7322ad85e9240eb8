"""Line and branch coverage of csrc/, as a table; what is not covered must be explained.

    PYENCLAVE_COVERAGE=1 python setup.py build_ext --inplace
    PYENCLAVE_COVERAGE=1 python -m pytest tests/native tests/calls tests/measurement \\
        tests/host/test_aio.py
    python tests/native/coverage_report.py build [--markdown FILE]

It reads what gcov says of each object file below ``build`` and compares the lines that never ran
with tests/native/uncovered.toml, function by function. The exit status is 1 if one is not explained
there. Rules of CPU variants that the machine cannot run hold on such machines only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
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


def read_rules(path: Path) -> list[Rule]:
    with path.open("rb") as file:
        entries = tomllib.load(file)["explained"]
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
    options = parser.parse_args()
    sources, rules = read_gcov(options.folder), read_rules(EXPLAINED)
    if not any(count for source in sources.values() for count in source.lines.values()):
        print("nothing ran: no coverage build, or no test of it")
        return 2
    rows = table(sources)
    print("\n".join(rows))
    wrong, used = unexplained(sources, rules)
    for rule in rules:
        if rule not in used:
            print(f"note: {rule.pattern}: covered now, or not on this machine")
    if options.markdown:
        write(options.markdown, rows, explanations(sources, rules))
    for line in wrong:
        print(f"not covered and not explained: {line}")
    return bool(wrong)


def write(path: Path, rows: list[str], reasons: list[str]) -> None:
    head = path.read_text().split("<!-- measured -->")[0] if path.exists() else "# Coverage\n\n"
    today = datetime.now(UTC).date()
    body = ["<!-- measured -->", "", f"Measured on {today}.", "", *rows, "", "## Not covered", ""]
    path.write_text("\n".join([head.rstrip("\n"), "", *body, *reasons, ""]))


if __name__ == "__main__":
    sys.exit(main())
