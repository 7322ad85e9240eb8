"""Let each check of the core pass, one after the other: some test must notice (docs/proofs.md).

    python tests/native/mutants.py [--only WORD] [--verbose] [TEST ...]

builds the core's test build, runs the tests once to learn which checks fire in which test, and then
runs for each check the tests in which it fired, with that check switched off. All of it happens in
forks of one process in which the tests are collected already. A check that no test needs must be
explained in ``mutants_explained.toml``; an explanation that is not needed fails too.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXPLAINED = HERE / "mutants_explained.toml"
# What has no checks of the core in it, or takes long and has nothing that others have not.
LEFT_OUT = {
    "test_aarch64.py": "builds programs of its own",
    "test_coverage_report.py": "builds programs of its own",
    "test_csrc_readme.py": "reads sources",
    "test_lengths.py": "every length of what checks nothing",
    "test_mutants.py": "reads sources",
    "test_ring_explored.py": "builds programs of its own",
    "test_ring_threads.py": "builds programs of its own",
    "test_pager_model.py": "builds programs of its own",
    "test_proofs_fail.py": "builds programs of its own",
    "test_sanitizers.py": "builds programs of its own",
    "test_seccomp_aarch64.py": "builds programs of its own",
    "test_seccomp_program.py": "builds programs of its own",
    "test_secrets.py": "builds programs of its own",
    "test_page_shared_memory.py": "many seconds of chance",
    "test_flipper.py": "many seconds of chance",
    "test_sha2.py": "hashes check nothing",
}
SECONDS_A_CHECK = 25.0  # of tests; who is not noticed by then counts as not noticed
# Files that only some CPUs run: their checks may stay unreached on others.
NEEDS = {"crypto/p256_ifma.c": "ifma", "linux/protect.c": "pku"}
ENDS = ("killed", "crashed", "hung", "survived", "not reached", "not on this CPU")
NOTICED = {"killed", "crashed", "hung"}


@dataclass
class Learnt:
    """What the run without any mutant tells."""

    seconds: dict[int, float] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    covering: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


def explained() -> dict[str, dict[str, str]]:
    """Return the explained checks by their names."""
    with EXPLAINED.open("rb") as file:
        rows = tomllib.load(file).get("check", [])
    return {row["name"]: row for row in rows}


class Mutants:
    """A pytest plugin whose loop runs the collected tests once for each mutant, in forks."""

    def __init__(self, package: Path, options: argparse.Namespace) -> None:
        from mutants_checks import built_checks
        from proof_build import LIBRARY
        from proof_state import FILE, State

        self.checks = built_checks(package / "pyenclave" / LIBRARY)
        self.state_files = os.environ[FILE]
        self.state = State(os.environ[FILE])
        self.options = options
        self.items: list[Any] = []
        self.bad = False
        self.ended = False  # whether the last fork ended by itself
        self.status = 1

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.bad = self.bad or bool(report.failed)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.path.name not in LEFT_OUT]

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = session.items
        start = time.monotonic()
        learnt = self.learn()
        self.say(f"{len(self.items)} tests ran in {time.monotonic() - start:.0f} s")
        if learnt.failed:
            for index in learnt.failed[:20]:
                self.say(f"fails without any mutant: {self.items[index].nodeid}")
            return True
        self.judge(self.kill_all(learnt), learnt)
        self.say(f"{time.monotonic() - start:.0f} s in all")
        return True

    def say(self, text: str) -> None:
        os.write(self.options.report, f"{text}\n".encode())

    # ---- in forks ----

    def silence(self) -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        reporter = self.items[0].config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = open(nothing, "w", encoding="utf-8")  # noqa: SIM115 - until _exit
        os.setsid()

    def fork(self, indexes: list[int], mutant: int) -> tuple[int, int]:
        """Run the tests at *indexes* in a fork; return its pid and what it writes to."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
            return pid, reader
        os.close(reader)
        code = 70
        try:
            self.silence()
            self.run(indexes, mutant, writer)
            code = 0
        finally:
            os._exit(code)

    def run(self, indexes: list[int], mutant: int, writer: int) -> None:
        self.state.take_fired()
        if mutant:
            self.state.mutate(mutant)
        for index, after in zip(indexes, [*indexes[1:], None], strict=True):
            item = self.items[index]
            self.bad = False
            begin = time.monotonic()
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=None if after is None else self.items[after]
            )
            line = [index, self.bad, time.monotonic() - begin, self.state.take_fired()]
            os.write(writer, json.dumps(line).encode() + b"\n")
            if mutant and self.bad:
                return

    def lines(self, pid: int, reader: int, seconds: float) -> Iterator[list[Any]]:
        """Yield what the fork writes until it ends, or until its time is over."""
        end = time.monotonic() + seconds
        rest = b""
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
            data = os.read(reader, 65536) if ready else b""
            self.ended = bool(ready)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            yield from map(json.loads, whole)
        os.close(reader)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    # ---- the two passes ----

    def learn(self) -> Learnt:
        learnt = Learnt()
        every = list(range(len(self.items)))
        pid, reader = self.fork(every, 0)
        seen = set()
        for index, bad, seconds, fired in self.lines(pid, reader, 300 * self.options.patience):
            seen.add(index)
            learnt.seconds[index] = seconds
            if bad:
                learnt.failed.append(index)
            for number in fired:
                learnt.covering[number].append(index)
        learnt.failed += [index for index in every if index not in seen]
        return learnt

    def kill_all(self, learnt: Learnt) -> dict[int, str]:
        """Return for each check how it ended, one of ENDS."""
        from pyenclave._native import cpu_features

        missing = {file for file, feature in NEEDS.items() if feature not in cpu_features()}
        ends = {}
        for number, check in sorted(self.checks.items()):
            if self.options.only and self.options.only not in check.name:
                continue
            tests = sorted(learnt.covering.get(number, []), key=learnt.seconds.__getitem__)
            begin = time.monotonic()
            ends[number] = self.kill(number, tests, learnt) if tests else "not reached"
            if not tests and check.name.partition(" ")[0] in missing:
                ends[number] = "not on this CPU"
            if self.options.verbose:
                spent = time.monotonic() - begin
                self.say(
                    f"{number:4} {ends[number]:12} {len(tests):5} tests {spent:5.1f} s {check.name}"
                )
        return ends

    def kill(self, number: int, tests: list[int], learnt: Learnt) -> str:
        spent = 0.0
        chosen = []
        for index in tests:
            spent += learnt.seconds[index]
            if spent > SECONDS_A_CHECK * self.options.patience and chosen:
                break
            chosen.append(index)
        pid, reader = self.fork(chosen, number)
        seen = 0
        killed = False
        for _, bad, _, _ in self.lines(pid, reader, (3 * spent + 3) * self.options.patience):
            seen += 1
            killed = killed or bad
        self.state.mutate(0)
        if killed:
            return "killed"
        if seen == len(chosen):
            return "survived"
        # A test that never ended noticed too, if the machine was not only slow: where a survivor is
        # expected, this does not count as noticed.
        return "crashed" if self.ended else "hung"

    def judge(self, ends: dict[int, str], learnt: Learnt) -> None:
        known = explained()
        faults = []
        for number, end in ends.items():
            row = known.pop(self.checks[number].name, None)
            name = f"{number} {self.checks[number].name}"
            if end in {"killed", "crashed"} and row is not None:
                faults.append(f"explained, but a test notices: {name}")
            elif end not in {*NOTICED, "not on this CPU"} and row is None:
                faults.append(f"{end}: {name} ({len(learnt.covering.get(number, []))} tests)")
        if not self.options.only:
            faults += [f"explained, but there is no such check: {name}" for name in known]
        for fault in faults:
            self.say(fault)
        count = [(list(ends.values()).count(end), end) for end in ENDS]
        told = ", ".join(f"{number} {end}" for number, end in count if number)
        self.say(f"{len(ends)} checks: {told}")
        self.status = 1 if faults else 0


def main() -> int:
    """Build, then start again in a process that imports the test build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", type=Path)
    parser.add_argument("--build", type=Path, help="a folder to build in, kept")
    parser.add_argument("--only", default="", help="only checks whose name has this in it")
    parser.add_argument("--verbose", action="store_true", help="one line a check")
    parser.add_argument(
        "--patience", type=int, default=1, help="by what to multiply each limit of time"
    )
    options = parser.parse_args()
    if "PYE_PROOF_STATE" in os.environ:
        return run(options)
    sys.path.insert(0, str(HERE))
    from proof_build import build
    from proof_state import SIZE

    with tempfile.TemporaryDirectory(prefix="pyenclave-mutants.") as folder:
        os.chmod(folder, 0o755)  # tests become other users
        home = build((options.build or Path(folder) / "build").resolve())
        state = Path(folder) / "state"
        state.write_bytes(bytes(SIZE))
        state.chmod(0o666)
        environment = os.environ | {
            "PYE_PROOF_STATE": str(state),
            "PYTHONPATH": str(home),
            "PYTHONSAFEPATH": "1",
            "PYE_PROOF_HOME": str(home),
        }
        tests = [str(test.resolve()) for test in options.tests]
        arguments = [f"--only={options.only}", f"--patience={options.patience}",
                     *(["--verbose"] if options.verbose else []), *tests]  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        return subprocess.run(command, env=environment, check=False).returncode


def run(options: argparse.Namespace) -> int:
    """Collect the tests and hand them to the plugin."""
    sys.path.append(str(HERE))
    import pytest

    home = Path(os.environ["PYE_PROOF_HOME"])
    os.chdir(home)
    options.report = os.dup(1)
    plugin = Mutants(home, options)
    tests = list(map(str, options.tests)) or [str(ROOT / "tests" / "native")]
    arguments = [
        "-q",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        f"--timeout={60 * options.patience}",
        "--hypothesis-seed=0",
    ]
    code = pytest.main(
        [*arguments, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *tests],
        plugins=[plugin],
    )
    return plugin.status or int(code not in {0, 5})


if __name__ == "__main__":
    sys.exit(main())
