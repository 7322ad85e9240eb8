"""
Both ends of a lane as two threads of one process: ThreadSanitizer sees no race between them, and
AddressSanitizer nothing out of bounds while a third thread changes every shared word (BND-03).

test_flipper.py does the latter to a whole enclave, where a call takes a hundred times longer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import core_build
import pytest
import ring_faults

# The programs are built by the tests themselves, with the flags that they need.
pytestmark = pytest.mark.no_asan

OWN = core_build.ROOT / "tests/native/ring_threads.c"
TSAN = ["-O1", "-g1", "-fsanitize=thread", "-Wno-tsan"]  # it warns that it ignores the one fence
ASAN = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv"]


def build(folder: Path, flags: list[str], source: Path | None = None) -> Path:
    """Build the program; *source*: where call/ is other than in the tree."""
    call = (source or core_build.CSRC / "src") / "call"
    files = [call / f"{name}.c" for name in ("lane", "await", "copy", "note", "batch")]
    rest = [file for file in core_build.sources("linux", "base") if file.stem in ("wait", "wipe")]
    own = [*flags, "-Wall", "-Werror", *([f"-iquote{source}"] if source else [])]
    link = [flag for flag in flags if flag.startswith("-fsanitize")]
    try:
        return core_build.program(
            folder / "ring_threads", [OWN, *files, *rest], own, link=[*link, "-lpthread"]
        )
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip("the sanitizers' libraries are not installed")
        raise


def run(program: Path, calls: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    clean["TSAN_OPTIONS"] = "halt_on_error=1 exitcode=66"
    # ThreadSanitizer's shadow does not fit every layout that the kernel draws.
    fixed = [shutil.which("setarch") or "setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(program), str(calls), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)


@pytest.fixture(scope="module")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tsan"), TSAN)


@pytest.fixture(scope="module")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("asan"), ASAN)


def check_no_race(program: Path, calls: int) -> None:
    done = run(program, calls, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    assert f"right {calls} wrong 0" in done.stdout


def test_no_race_between_the_ends(tsan: Path) -> None:
    check_no_race(tsan, 20_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_no_race_between_the_ends_in_two_million_calls(tsan: Path) -> None:
    check_no_race(tsan, 2_000_000)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("frame.h", ring_faults.PUBLISH, ring_faults.PUBLISH.replace("RELEASE", "RELAXED")),
        ("frame.h", "long_at(lane->in, 0), __ATOMIC_ACQUIRE",
         "long_at(lane->in, 0), __ATOMIC_RELAXED"),
    ],
    ids=["no release", "no acquire"],
)  # fmt: skip
def test_the_race_of_a_broken_order_is_reported(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    program = build(tmp_path, TSAN, ring_faults.broken_source(tmp_path, file, old, new))
    done = run(program, 20_000, "1")
    assert done.returncode != 0
    assert "data race" in done.stderr or "FAILED" in done.stdout, done.stderr


def check_flipper(program: Path, calls: int, seed: int) -> dict[str, int]:
    done = run(program, calls, str(seed), "flip")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", done.stdout)}
    print(counts)
    assert counts["right"] > calls // 4, counts
    assert counts["broken"] > 0, counts
    assert counts["flipped"] > calls // 10, counts
    return counts


def test_BND_03_a_flipper_makes_no_end_of_a_lane_crash(asan: Path) -> None:
    check_flipper(asan, 10_000, 1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_BND_03_a_flipper_makes_no_end_of_a_lane_crash_in_a_million_calls(asan: Path) -> None:
    check_flipper(asan, 1_000_000, 2)


def test_the_flipper_finds_a_size_that_is_read_again(tmp_path: Path) -> None:
    """
    The length of what is copied, read once more from shared memory behind the checks.

    In between it yields: where one processor does everything nobody would come there else.
    """
    source = ring_faults.broken_source(
        tmp_path,
        "lane.c",
        "lane->in + lane->in_at, lane->length);",
        "lane->in + lane->in_at, (lane->ops.yield(), *word_at(lane->in, 8)));",
    )
    done = run(build(tmp_path, ASAN, source), 200_000, "1", "flip")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr, done.stdout + done.stderr
