"""
Print the core cycles of the hot loops as a table: the least that a core needs, ours, and the share.

The core is compiled as the package's is (``tests/native/core_build.py``) and ``cycles.c`` counts.
Floors are those of a core with two 512-bit or three 256-bit ports, one of them for products, and
one 512-bit or two 256-bit AES rounds a cycle (Sapphire Rapids, Ice Lake); others have others.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FLAGS: Final = ("-O3", "-fPIC", "-fstack-protector-strong", "-fcf-protection")
COLUMNS: Final = ("seal page", "open page", "seal, of 64", "open, of 64", "64 bytes")
# The least cycles a page, and what they are.
FLOORS: Final = {
    ("aes-256-gcm", "vaes512"): (832, "64 vectors of 13 AES rounds"),
    ("aes-256-gcm", "vaes256"): (1024, "24 operations a vector, three ports"),
    ("aes-128-gcm", "vaes512"): (592, "18.5 operations a vector, two ports"),
    ("aes-128-gcm", "vaes256"): (853, "20 operations a vector, three ports"),
    ("mrenclave", "one"): (10368, "81 blocks of 32 times 4, the latency of two rounds"),
    ("mrenclave", "avx512_of_16"): (3970, "64 blocks of 53, 17 shared ones of 34, schedules"),
    ("mrenclave", "sha-ni_of_16"): (3490, "64 blocks of 46, 17 shared ones of 32 (Zen 4)"),
    ("sha384", "avx512"): (4389, "33 blocks of 1064 for eight pages"),
}


def measure() -> list[list[str]]:
    """Compile and run ``cycles.c``; return its lines as words."""
    sys.path.insert(0, str(ROOT / "tests/native"))
    import core_build

    with tempfile.TemporaryDirectory() as folder:
        files = core_build.sources("base", "crypto", "page", "measure")
        program = core_build.program(
            Path(folder, "cycles"), [ROOT / "bench/cycles.c", *files], FLAGS
        )
        done = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def main() -> int:
    """Print the table in Markdown."""
    (_, how), *lines = measure()
    print(f"Cycles {how}.\n" if how == "counted" else "Cycles by a chain of multiplications.\n")
    print("| what | code | " + " | ".join(COLUMNS) + " | floor | share | the floor is |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 3))
    for kind, code, *cycles in lines:
        floor, why = FLOORS.get((kind, code), (0, ""))
        ours = float(cycles[2] if len(cycles) > 2 else cycles[0])
        shown = cycles if len(cycles) > 1 else ["", "", cycles[0], "", ""]
        share = f"{floor / ours:.0%}" if floor else ""
        print(f"| {kind} | {code} | {' | '.join(shown)} | {floor or ''} | {share} | {why} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
