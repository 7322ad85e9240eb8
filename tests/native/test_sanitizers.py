"""The sanitizers' flags, as ``setup.py`` has them, report faults put into the core.

That a whole sanitizer build does, under the gate's own command and in a worker, too, is in
``test_proofs_fail.py`` (``.ci/long``) and ``tests/trusted/test_sanitized_worker.py``.
"""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import core_build
import pytest

# The programs are built by the tests themselves, with the flags that they need.
pytestmark = pytest.mark.no_asan

USES = Path(__file__).with_name("sanitizer_uses.c")
FAULTS = {
    "a write beyond an allocation": (
        "call/stats.c",
        "(size_t)lanes * (stats->functions + 1)",
        "(size_t)lanes * stats->functions",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a read beyond an allocation": (
        "call/msgpack.c",
        "PYE_REFUSE_IF(len > c->left, 0);",
        "",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a use after free": (
        "call/stats.c",
        "        free(stats->states);\n        free(stats->cells);\n        free(stats);",
        "        free(stats);\n        free(stats->states);\n        free(stats->cells);",
        "AddressSanitizer: heap-use-after-free",
    ),
    "a signed overflow": (
        "call/stats.c",
        "functions < most ? functions : most;",
        "(uint32_t)((int32_t)functions * 65536);",
        "signed integer overflow",
    ),
}


def setup_flags() -> list[str]:
    """Return the flags of a sanitizer build from ``setup.py``, so that these are what is tried."""
    tree = ast.parse((core_build.ROOT / "setup.py").read_text("utf-8"))
    (found,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SAN"
    ]
    return list(found)


def uses(folder: Path, source: Path) -> subprocess.CompletedProcess[str]:
    """Build the program over *source* and run it."""
    flags = setup_flags()
    files = [USES, *(source / "call" / f"{name}.c" for name in ("stats", "msgpack"))]
    try:
        program = core_build.program(
            folder / "uses", files, ["-O1", "-g1", *flags, f"-iquote{source}"], link=flags
        )
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip("the sanitizers' libraries are not installed")
        raise
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    clean["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run([str(program)], capture_output=True, text=True, check=False, env=clean)


def test_the_sanitizers_have_nothing_to_say_of_the_core_as_it_is(tmp_path: Path) -> None:
    done = uses(tmp_path, core_build.CSRC / "src")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sanitizers_report_a_fault_in_the_core(tmp_path: Path, fault: str) -> None:
    file, old, new, report = FAULTS[fault]
    done = uses(tmp_path, core_build.broken(tmp_path, file, old, new))
    assert done.returncode not in {0, *range(40, 44)}, "it ran to its end"
    assert report in done.stderr, done.stderr[-2000:]
    assert Path(file).name in done.stderr  # where
