"""
Print what the steps of sealed memory cost, each alone, as a table: where a fault's time goes.

``paging_steps.c`` is compiled with the core (``tests/native/core_build.py``) and measures each step
on frames like a heap's; below them are the faults of a real heap, by the loop of the benchmark's
rows. What those take beyond the steps is the pager's own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]
FLAGS: Final = ("-O3", "-fPIC", "-fstack-protector-strong", "-fcf-protection")
SMALL: Final = 64 << 20


def steps() -> list[tuple[str, ...]]:
    """
    Compile and run ``paging_steps.c``.

    Returns:
        Each step and its ns a page: with no memory locked, with the view, with the alias.

    """
    sys.path.insert(0, str(ROOT / "tests/native"))
    import core_build

    with tempfile.TemporaryDirectory() as folder:
        files = core_build.sources("base", "crypto", "page")
        program = core_build.program(
            Path(folder, "steps"), [ROOT / "bench/paging_steps.c", *files], FLAGS
        )
        columns = [_column(program, *locked) for locked in ((), ("view",), ("alias",))]
    return [(name, *(column.get(name, "") for column in columns)) for name in columns[0]]


def _column(program: Path, *locked: str) -> dict[str, str]:
    done = subprocess.run([program, *locked], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 77 and not locked:
        sys.exit("this kernel gives no userfaultfd of that kind")
    if done.returncode != 77:  # else so much may not be locked
        done.check_returncode()
    return dict(line.split("\t") for line in done.stdout.splitlines())


def faults() -> list[tuple[str, ...]]:
    """Return the quickest round's median of faults of a heap, in order and anywhere."""
    sys.path.insert(0, str(ROOT))
    from pyenclave.benchmarks import paging
    from pyenclave.benchmarks.paging_peers import PAGE

    pages = SMALL // PAGE
    found: list[tuple[str, ...]] = []
    for name, order in (("in order", np.arange(pages)), ("anywhere", paging.shuffled(pages))):
        times = paging.touched(order.astype(np.uint32), rounds=15)[""]
        found.append((f"a fault of a heap, {name}: median", f"{min(times.middle):.0f}"))
        found.append((f"a fault of a heap, {name}: 99th percentile", f"{min(times.late):.0f}"))
    return found


def main() -> int:
    """Print the table in Markdown."""
    print("| step | ns a page | view locked | alias locked |\n|---|---|---|---|")
    for name, *ns in [*steps(), *faults()]:
        print(f"| {name} | {' | '.join([*ns, '', ''][:3])} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
