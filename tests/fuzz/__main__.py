"""
Fuzzing with coverage (atheris, libFuzzer): ``python tests/fuzz --seconds 3600 [TARGET…]``.

Every target runs in a process of its own: coverage is gathered of pyenclave alone, and what one
breaks ends that one. A finding is kept as a file, and ``--repeat FILE TARGET`` tries it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NOT_RUN = 3
_STAT = re.compile(r"stat::(\w+):\s+(\d+)")
_REARM = 4096  # executions after which the bound of memory follows the corpus of libFuzzer


def vectors() -> Path | None:
    folder = Path(os.environ.get("PYENCLAVE_VECTORS", ROOT.parent / "shared" / "vectors"))
    return folder if folder.is_dir() else None


def prepare() -> None:
    """Find the helpers, and an installed pyenclave before the checkout's."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "attestation"), str(HERE.parent / "native")]
    if importlib.util.find_spec("pyenclave") is None:
        sys.path.insert(0, str(ROOT))


def imported() -> ModuleType:
    prepare()
    import fuzz_targets

    return fuzz_targets


def one(name: str, corpus: Path, arguments: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    prepare()
    with atheris.instrument_imports(include=["pyenclave"]):
        import fuzz_targets
    import fuzz_guard
    import fuzz_mutate
    import fuzz_seeds

    target = fuzz_targets.TARGETS[name]
    seeds = fuzz_seeds.Corpus(vectors()).get(target.seeds)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    own = fuzz_mutate.Mutator(seeds, 0)
    done = 0

    def execute(data: bytes) -> None:
        nonlocal done
        done += 1
        if done % _REARM == 0:
            fuzz_guard.bound_memory()
        fuzz_guard.examine(target, data)

    def mutate(data: bytes, size: int, number: int) -> bytes:
        own.random.seed(number)
        if own.random.random() < 0.5:
            return bytes(atheris.Mutate(data, size))
        return own.mutated(data)[:size]

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], execute, custom_mutator=mutate)
    with fuzz_guard.limits():
        atheris.Fuzz()


def run(name: str, seconds: int, corpus: Path, findings: Path) -> tuple[int, dict[str, int]]:
    """Fuzz one target in a process of its own; return its status and libFuzzer's figures."""
    findings.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(HERE),
        "--one",
        name,
        "--corpus",
        str(corpus),
        "--",
        f"-max_total_time={seconds}",
        f"-max_len={1 << 16}",
        "-timeout=60",  # by the clock; the guard's five seconds are the processor's
        "-rss_limit_mb=3072",
        "-print_final_stats=1",
        "-verbosity=0",
        f"-artifact_prefix={findings}/{name}-",
    ]
    ended = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    figures = {key: int(value) for key, value in _STAT.findall(ended.stderr)}
    if ended.returncode:
        print(ended.stderr[-6000:], file=sys.stderr)
    return ended.returncode, figures


def repeat(name: str, path: Path) -> int:
    """Try one input again and make it shorter."""
    target = imported().TARGETS[name]
    import fuzz_guard

    with fuzz_guard.limits():
        data = fuzz_guard.reduced(target, path.read_bytes())
        print("accepted" if fuzz_guard.examine(target, data) else "refused as documented")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="default: every target")
    parser.add_argument("--seconds", type=int, default=3600, help="for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--one", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="try one input again")
    args = parser.parse_args()
    if args.one:
        one(args.one, args.corpus, args.targets)
        return 0
    if args.repeat:
        return repeat(args.targets[0], args.repeat)
    known = imported().TARGETS
    if args.list:
        print(*known, sep="\n")
        return 0
    unknown = set(args.targets) - set(known)
    if unknown:
        parser.error(f"no target is called {', '.join(sorted(unknown))}")
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return NOT_RUN
    print(
        f"| target | {datetime.now(UTC):%Y-%m-%d} seconds | executions | corpus | MiB | findings |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    failed, began = 0, time.monotonic()

    def fuzz(name: str) -> tuple[str, float, int, dict[str, int]]:
        start = time.monotonic()
        status, figures = run(name, args.seconds, args.corpus / name, args.corpus / "findings")
        return name, time.monotonic() - start, status, figures

    pool = ThreadPoolExecutor(max_workers=args.jobs)
    for ended in as_completed([pool.submit(fuzz, name) for name in args.targets or known]):
        name, spent, status, figures = ended.result()
        failed += status != 0
        print(
            f"| {name} | {spent:.0f}"
            f" | {figures.get('number_of_executed_units', 0):,}"
            f" | {len([*(args.corpus / name).iterdir()])}"
            f" | {figures.get('peak_rss_mb', 0)} | {'see above' if status else 'none'} |",
            flush=True,
        )
    print(f"\n{failed} targets with findings in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
