"""
Run the whole suite on every core: ``python tests``.

Each folder of tests is a run of pytest of its own, as many at a time as there are processors (two
at most need be there). What a run prints comes out whole when it ends, the longest begin first.
Arguments are given to each run: ``python tests -x --durations=10``.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The longest first, so that none is left alone at the end; the others follow by name.
_LONG = (
    "faults",
    "host",
    "services",
    "cli",
    "native",
    ".",  # the files beside the folders
    "platform",
    "attestation",
    "calls",
    "worker",
    "image",
    "demo",
    "fuzz",
    "load",
    "attack",
    "sealed",
    "release",
    "examples",
    "trusted",
    "testing",
)
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)\b")
_NOTHING = 5  # pytest's exit code when it selected no test
_MAX_RUNS = 4
# Then the installed package is what is tried, not the checkout's sources.
_INSTALLED = importlib.util.find_spec("pyenclave") is not None


class Suite:
    """The runs that are left, and what the others gave."""

    def __init__(self, arguments: list[str], used: str) -> None:
        self.arguments = arguments
        self.used = used  # folder of the fixture of this name
        self.waiting: queue.SimpleQueue[list[Path]] = queue.SimpleQueue()
        for paths in _parts():
            self.waiting.put(paths)
        self.lock = threading.Lock()
        self.counts: dict[str, int] = {}
        self.bad: list[str] = []
        self.codes: set[int] = set()
        self.ends: list[float] = []  # when each of the runs side by side had nothing left to do

    def work(self) -> None:
        """Do one run after the other until none is left."""
        while True:
            try:
                paths = self.waiting.get_nowait()
            except queue.Empty:
                self.ends.append(time.monotonic())
                return
            self._run(paths)

    def _run(self, paths: list[Path]) -> None:
        # In one that they share, each run that begins closes the parents of what tests of another
        # have just opened to another user.
        with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
                    *("--basetemp", str(Path(folder, "b"))),
                    *self.arguments,
                    *(str(path.relative_to(HERE.parent)) for path in paths),
                ],
                cwd=HERE.parent,
                env={
                    **os.environ,
                    **({"PYTHONSAFEPATH": "1"} if _INSTALLED else {}),
                    "PYENCLAVE_TESTS_USED": self.used,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        lines = done.stdout.rstrip().splitlines() or [""]
        with self.lock:
            print(done.stdout, end="", flush=True)
            self.codes.add(done.returncode)
            self.bad += [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
            if done.returncode > 1 and done.returncode != _NOTHING:
                self.bad.append(f"ERROR {paths[0]}: pytest ended with {done.returncode}")
            for number, what in _COUNT.findall(lines[-1]):
                name = what.rstrip("s") if what.startswith(("error", "warning")) else what
                self.counts[name] = self.counts.get(name, 0) + int(number)


def _parts() -> list[list[Path]]:
    """Return the folders of tests, and the files beside them as one part."""
    parts = {
        path.name: [path]
        for path in HERE.iterdir()
        if path.is_dir() and next(path.rglob("test_*.py"), None)
    }
    parts["."] = sorted(HERE.glob("test_*.py"))
    rank = {name: place for place, name in enumerate(_LONG)}
    return [parts[name] for name in sorted(parts, key=lambda name: (rank.get(name, 99), name))]


def main() -> int:
    """Run everything; 0 if all tests passed."""
    start = time.monotonic()
    runs = min(len(os.sched_getaffinity(0)), _MAX_RUNS)
    with tempfile.TemporaryDirectory(prefix="pyenclave-tests-") as used:
        suite = Suite(sys.argv[1:], used)
        threads = [threading.Thread(target=suite.work) for _ in range(runs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    failed = bool(suite.codes - {0, _NOTHING}) or not suite.counts.get("passed")
    for line in suite.bad:
        print(line)
    ends = ", ".join(f"{end - start:.0f} s" for end in suite.ends)
    print(f"nothing was left to begin after {ends}")
    order = ("failed", "error", "passed", "skipped", "deselected", "xfailed", "xpassed")
    told = ", ".join(f"{suite.counts[name]} {name}" for name in order if suite.counts.get(name))
    print(f"==== {told or 'nothing ran'} in {time.monotonic() - start:.2f}s ====")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
