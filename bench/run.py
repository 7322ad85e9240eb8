"""Run the benchmarks and keep the figures, or compare two kept runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def compare(old: Path, new: Path) -> None:
    """Print each row's ratio then and now."""
    before = {row["name"]: row for row in json.loads(old.read_text())["results"]}
    for row in json.loads(new.read_text())["results"]:
        then = before.get(row["name"])
        was = f"{then['ratio']:8.2f}x" if then else "     new"
        print(
            f"{row['name']:<36} {was} -> {row['ratio']:8.2f}x   {row['value']:,.1f} {row['unit']}"
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("-o", "--output", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    if args.compare:
        compare(*args.compare)
        return 0
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "bench", "--json"], stdout=subprocess.PIPE, check=True
    )
    args.output.write_bytes(done.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
