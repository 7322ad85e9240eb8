"""
The proofs that need a build of their own, seen to fail: faults are put into a copy of the tree, and
the gate's own commands must report them (docs/proofs.md).

Smaller ones are beside their proofs: ``test_sanitizers.py``, ``test_coverage_report.py``,
``test_ring_explored.py``, ``test_ring_threads.py``, ``test_secrets.py`` and, in ``tests/fuzz``,
``test_fuzz_c.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import core_build
import pytest

pytestmark = [pytest.mark.long, pytest.mark.no_asan, pytest.mark.timeout(3600)]

FREE = "free(stats->states);\n        free(stats->cells);\n        free(stats);"
NATIVE = "    *out_len = len;\n    return PYE_OK;"


def copied(folder: Path) -> Path:
    """Copy what builds and is tested."""
    tree = folder / "tree"
    nothing = shutil.ignore_patterns("*.so", "__pycache__", "*.pyc", "build")
    for name in ("csrc", "pyenclave", "tests"):
        shutil.copytree(core_build.ROOT / name, tree / name, ignore=nothing)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(core_build.ROOT / name, tree / name)
    return tree


def command(tree: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy; nothing of the installed package is found."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=mine | more, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


# ---- a sanitizer build of the whole, the gate's command, and a worker ----


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sanitizer build with faults that only some tests reach."""
    tree = copied(tmp_path_factory.mktemp("sanitized"))
    source = tree / "csrc" / "src"
    core_build.plant(
        source / "call" / "stats.c",
        FREE,
        "free(stats);\n        free(stats->states);\n        free(stats->cells);",
    )
    core_build.plant(
        source / "call" / "batch.c",
        "    const uint64_t left = batch->count - batch->place;",
        "    volatile int32_t most = INT32_MAX;\n    most += (int32_t)batch->count;\n"
        "    const uint64_t left = batch->count - batch->place;",
    )
    core_build.plant(source / "call" / "msgpack.c", "PYE_REFUSE_IF(len > c->left, 0);", "")
    # Reached in a worker, by a call of five bytes that begins with f.
    core_build.plant(
        source / "call" / "native.c",
        ("#include <string.h>", NATIVE),
        (
            "#include <stdlib.h>\n#include <string.h>",
            "    *out_len = len;\n    uint8_t *kept = malloc(16);\n"
            "    if (kept != NULL && in_len == 5 && in[0] == 'f') {\n"
            "        memset(kept, 7, 16);\n        free(kept);\n"
            "        out[0] = *(volatile uint8_t *)kept;\n        return PYE_OK;\n    }\n"
            "    free(kept);\n    return PYE_OK;",
        ),
    )
    built = command(tree, "setup.py", "-q", "build_ext", "--inplace", PYENCLAVE_SANITIZE="1")
    assert built.returncode == 0, built.stderr[-3000:]
    return tree


def in_sanitized(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests as .ci/run does."""
    library = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return command(
        tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "--timeout=300",
        "-m", "not no_asan and not long", *tests,
        LD_PRELOAD=library, ASAN_OPTIONS="detect_leaks=0", PYTHONMALLOC="malloc",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("test", "report"),
    [
        ("tests/native/test_stats.py", "AddressSanitizer: heap-use-after-free"),
        ("tests/native/test_seldom.py::test_gathering_what_is_empty_or_taken_already",
         "signed integer overflow"),
        # In memory that Python owns: PYTHONMALLOC=malloc shows it, and nothing else does.
        ("tests/native/test_seldom.py::test_what_is_cut_or_no_time_is_no_messagepack",
         "AddressSanitizer: heap-buffer-overflow"),
    ],
    ids=["use after free", "overflow", "beyond Python's memory"],
)  # fmt: skip
def test_the_gate_s_command_reports_a_fault_in_the_core(
    sanitized: Path, test: str, report: str
) -> None:
    done = in_sanitized(sanitized, test)
    assert done.returncode != 0, done.stdout
    assert report in done.stdout + done.stderr


WORKER = """
import pytest
from pyenclave import _core
from pyenclave.benchmarks.calls import _native_image
from pyenclave.errors import EnclaveLostError
from pyenclave.host import Enclave


def test_a_call_that_reaches_a_fault(tmp_path):
    (tmp_path / "image").mkdir()
    assert _core.SANITIZED
    with Enclave(_native_image(tmp_path / "image"), state=tmp_path / "state") as enclave:
        assert enclave.bump(b"hello")
        with pytest.raises(EnclaveLostError):
            enclave.bump(b"fault")
        raise RuntimeError("the worker was lost")
"""


def test_a_fault_of_the_core_ends_a_worker(sanitized: Path) -> None:
    (sanitized / "tests" / "test_reaches.py").write_text(WORKER)
    done = in_sanitized(sanitized, "tests/test_reaches.py")
    assert done.returncode != 0
    assert "the worker was lost" in done.stdout, done.stdout[-3000:]


# ---- the mutation runner, and everything failing once ----


def mutants(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command(tree, "tests/native/mutants.py", *arguments)


def test_a_check_that_no_test_needs_fails_the_mutation_runner(tmp_path: Path) -> None:
    """One that fires, though the next line refuses the same, and one that is never reached."""
    tree = copied(tmp_path)
    path = tree / "csrc" / "src" / "call" / "stats.c"
    old = "    PYE_REFUSE_IF(lanes == 0 ||"
    more = (
        "    PYE_REFUSE_IF(lanes > PYE_LANE_MAX_LANES, PYE_E_ARGUMENT);\n"
        "    PYE_REFUSE_IF(functions == 77777777, PYE_E_ARGUMENT);\n"
    )
    core_build.plant(path, old, more + old)
    tests = [str(tree / "tests/native" / f"test_{name}.py") for name in ("stats", "failing_once")]
    done = mutants(tree, "--only", "call/stats.c pye_stats_new", *tests)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for end, check in (
        ("survived: ", "pye_stats_new: lanes > PYE_LANE_MAX_LANES, PYE_E_ARGUMENT"),
        ("not reached: ", "pye_stats_new: functions == 77777777, PYE_E_ARGUMENT"),
    ):
        assert any(line.startswith(end) and check in line for line in lines), done.stdout
    # Nothing else is complained of.
    assert sum(line.startswith(("survived", "not reached", "explained")) for line in lines) == 2


def test_a_leak_and_a_failure_that_nobody_looks_at_fail_everything_failing_once(
    tmp_path: Path,
) -> None:
    tree = copied(tmp_path)
    source = tree / "csrc" / "src" / "linux"
    core_build.plant(
        source / "watch.c", "        (void)close(watch->event_fd);\n        errno", "errno"
    )
    core_build.plant(
        source / "secmem.c",
        "PYE_REFUSE_IF(madvise(data, size, MADV_DONTDUMP) != 0, pye_os_status(errno));",
        "(void)madvise(data, size, MADV_DONTDUMP);",
    )
    done = mutants(tree, str(tree / "tests" / "native" / "test_failing_once.py"))
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {
        line.rpartition("::")[2]
        for line in done.stdout.splitlines()
        if line.startswith("fails without any mutant")
    }
    print(done.stdout)
    assert failed == {
        "test_a_watch_begins_or_not_and_never_in_part",
        "test_ordinary_pages_stand_in_for_secret_ones_or_fail_whole",
    }
