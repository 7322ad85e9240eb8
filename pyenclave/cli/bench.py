"""``pyenclave bench``: the benchmarks, each against what people would use instead."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
from pathlib import Path
from typing import Any

from pyenclave import __version__
from pyenclave._files import read_file
from pyenclave.benchmarks import kept, registry
from pyenclave.benchmarks.goals import judge
from pyenclave.benchmarks.kept import Change, Run
from pyenclave.benchmarks.plot import amount, cores_of, svg
from pyenclave.benchmarks.rows import Row
from pyenclave.cli import output
from pyenclave.cli._targets import check_target
from pyenclave.image.build import write_image

__all__ = ["add_commands"]

_EPILOG = """\
examples:
  pyenclave bench 'seal_*' open_page             a few rows
  pyenclave bench --json > today.json            all of them, kept
  pyenclave bench --plot today.svg               and drawn, for any browser
  pyenclave bench --from today.json --plot x.svg what was kept, drawn without measuring
  pyenclave bench --compare then.json            measure, then say what changed since
  pyenclave bench --compare then.json today.json compare two kept runs
  pyenclave bench seal_page --compare then.json  one row; rows come before --compare

docs/benchmarks.md says what each row measures and does not say. Exit code 1: a row failed."""


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench``."""
    bench = subparsers.add_parser(
        "bench",
        help="measure against the usual alternatives",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("names", nargs="*", metavar="NAME", help="rows or patterns (default: all)")
    bench.add_argument("--only", metavar="NAME,…", default="", help="the same, in one word")
    bench.add_argument("--list", action="store_true", help="name the rows and end")
    bench.add_argument("--from", dest="kept", metavar="RUN.json", help="a kept run, not a new one")
    bench.add_argument("--plot", metavar="FILE.svg", help="draw the ratios")
    bench.add_argument(
        "--compare",
        nargs="+",
        metavar=("OLD.json", "NEW.json"),
        help="say what changed since OLD (without NEW: until now); rows come before it",
    )
    bench.set_defaults(function=_bench)


def _load(path: str) -> Run:
    return kept.read(read_file(path, limit=kept.MAX_SIZE), path)


def _picture(path: str | None) -> Path | None:
    """Return where the picture goes; what cannot work is refused before hours of measuring."""
    if path is None:
        return None
    target = Path(path)
    if target.suffix != ".svg":
        raise ValueError(f"--plot: the picture is an SVG, name it so: {target.stem or 'bench'}.svg")
    return check_target(target)


def _bench(args: argparse.Namespace) -> int:
    patterns = [*args.names, *filter(None, args.only.split(","))]
    chosen = registry.select(patterns)
    if args.list:
        if args.json:
            output.print_json({"names": chosen})
        else:
            output.say("\n".join(chosen))
        return 0
    picture = _picture(args.plot)
    files: list[str] = args.compare or []
    if len(files) > 2:
        raise ValueError("--compare takes one kept run, or two; rows come before --compare")
    if len(files) == 2 and not os.path.exists(files[1]):
        raise FileNotFoundError(2, "no such kept run (rows come before --compare)", files[1])
    if len(files) == 2 and args.kept is not None:
        raise ValueError("--compare OLD NEW and --from name two runs of today; give one")
    then = _load(files[0]) if files else None
    source = files[1] if len(files) == 2 else args.kept
    run = _load(source) if source is not None else _measured(chosen, quiet=args.json)
    if source is not None and patterns:
        _check_there(patterns, *([then, run] if then else [run]))
        run = run._replace(results=[row for row in run.results if _base(row) in chosen])
    if picture:
        write_image(picture, svg(run, then=then).encode())
    changes = kept.compare(then, run) if then else []
    if then and patterns:
        changes = [change for change in changes if change.name.partition("/")[0] in chosen]
    failed = any("error" in row for row in run.results)
    if args.json:
        document: dict[str, Any] = {**run._asdict(), "results": list(run.results)}
        if then:
            document["changes"] = [change._asdict() for change in changes]
        output.print_json(document)
    elif then:
        _print_changes(changes, then, run)
    else:
        _print(run)
    if picture and not args.json:
        output.say(f"drawn: {picture}")
    return 1 if failed else 0


def _base(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def _check_there(patterns: list[str], *runs: Run) -> None:
    """Refuse patterns that name no row of kept *runs*: an empty table would look like an answer."""
    there = {_base(row) for run in runs for row in run.results}
    gone = [pattern for pattern in patterns if there.isdisjoint(registry.select([pattern]))]
    if gone:
        where = "this run" if len(runs) == 1 else "either run"
        raise ValueError(f"not in {where}: {', '.join(gone)}")


def _measured(chosen: list[str], *, quiet: bool) -> Run:
    progress = output.Progress(quiet=quiet and not sys.stderr.isatty())
    results: list[Row] = []
    for _, rows in registry.run(chosen, progress=progress.step):
        results.extend(rows)
    progress.done()
    when = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%MZ")
    return Run(registry.machine(), results, when, __version__)


# ---- tables --------------------------------------------------------------------------------------


def _times(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}x" if value >= 100 else f"{value:.2f}x"


def _spread(row: Row) -> str:
    """Return the half width of the middle half of the rounds, in per cent of the value."""
    if "spread" not in row:
        return ""
    low, high = row["spread"]
    return f" ±{(high - low) / 2 / row['value']:.0%}"


def _measured_row(row: Row, *, wide: bool, in_c: bool, cycles: bool) -> list[str]:
    verdict = judge(row, wide=wide)
    goal, told = "", ""
    if verdict:
        goal = f"{verdict.goal:.3g}x"
        if verdict.met is None:
            told = "goal of another class"
        else:
            told = output.paint("met", "green") if verdict.met else output.paint("below", "yellow")
    cells = [
        row["name"] + cores_of(row),
        f"{amount(row['value'])} {row['unit']}{_spread(row)}",
    ]
    if in_c:
        cells.append(f"{amount(row['native'])} {row['unit']}" if "native" in row else "")
    if cycles:
        cells.append(f"{row['cycles']:,.0f}" if "cycles" in row else "")
    return [
        *cells,
        row["peer"],
        f"{amount(row['peer_value'])} {row['unit']}",
        _times(row["ratio"]),
        goal,
        told,
    ]


def _machine(run: Run) -> str:
    """Name what was measured on, as far as the run tells."""
    cpu, cores, kernels = (run.machine.get(key) for key in ("cpu", "cores", "kernels"))
    used = (
        ", ".join(f"{key} {kernels[key]}" for key in kernels) if isinstance(kernels, dict) else ""
    )
    if cpu is None and cores is None and not used:
        return "machine not told"
    named = "CPU not told" if cpu is None else cpu
    counted = "cores not told" if cores is None else f"{cores} cores"
    return f"{named}, {counted}; {used or 'kernels not told'}"


def _note(row: Row) -> str:
    """Return what is said of a row below the table; runs may keep the bits without the note."""
    note = str(row.get("note", ""))
    if "bits" in row:
        bits = f"probed bits {json.dumps(row['bits'])}"
        if bits not in note:
            return f"{note}; {bits}" if note else bits
    return note


def _print(run: Run) -> None:
    machine = run.machine
    told = [_machine(run)]
    if run.when:
        told.append(f"pyenclave {run.version}, {run.when}")
    for text in told:
        output.say(output.line(text))
    measured = [row for row in run.results if "ratio" in row]
    in_c = any("native" in row for row in measured)
    cycles = any("cycles" in row for row in measured)
    header = ["NAME", "OURS", *(["IN C"] if in_c else []), *(["CYCLES"] if cycles else [])]
    header += ["AGAINST", "THEIRS", "RATIO", "GOAL", ""]
    cells = [
        [
            cell if cell.startswith("\x1b") else output.line(cell)
            for cell in _measured_row(row, wide=run.wide, in_c=in_c, cycles=cycles)
        ]
        for row in measured
    ]
    if cells:
        output.say(output.table(cells, header=header))
    if machine.get("cycles") is False:
        output.say("cycles: absent, perf_event_open counts none on this machine")
    for row in run.results:
        if "error" in row:
            failed = output.paint("failed", "red")
            output.say(f"{output.line(row['name'])}: {failed}: {output.line(row['error'])}")
        elif row.get("absent"):
            names = output.line(", ".join(row["absent"]))
            kind = "peer absent" if "ratio" in row else "not measured; absent"
            output.say(f"{output.line(row['name'])}: {kind}: {names}")
        if note := _note(row):
            output.say(output.line(f"{row['name']}: {note}"))
    if lines := [row["line"] for row in run.results if "line" in row]:
        between = f"{min(lines):.0f} to {max(lines):.0f}" if len(lines) > 1 else f"{lines[0]:.0f}"
        output.say(f"a cache line went to the other core and back in {between} ns")


def _print_changes(changes: list[Change], then: Run, now: Run) -> None:
    cpus = [run.machine.get("cpu") for run in (then, now)]
    if cpus[0] != cpus[1]:
        output.say(output.line(f"the machines differ: then {cpus[0]}, now {cpus[1]}"))
    rows = []
    for change in changes:
        told = ""
        if change.then is None:
            told = "new" if change.now is not None else "measured in neither"
        elif change.now is None:
            told = "not measured now"
        elif change.moved is None:
            told = "no spread was kept"
        elif change.moved:
            better = (change.factor or 0) > 1
            told = output.paint("faster", "green") if better else output.paint("slower", "yellow")
        factor = f"{change.factor - 1:+.1%}" if change.factor else ""
        rows.append(
            (output.line(change.name), _times(change.then), _times(change.now), factor, told)
        )
    output.say(output.table(rows, header=("NAME", "THEN", "NOW", "CHANGE", "")))
    output.say("faster, slower: the middle half of the rounds then and now lie apart")
    for row in now.results:
        if "error" in row:
            output.say(output.line(f"{row['name']}: failed: {row['error']}"))
