"""``coverage_report.py`` fails on what did not run, or was not taken, and has no explanation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import core_build
import pytest

pytestmark = pytest.mark.no_asan  # it builds a program of its own

SOURCE = """int answer(int question);

int answer(int question)
{
    if (question > 0 && question < 10) {
        return 1;
    }
    if (question < -100) {
        question = 2;
        return question;
    }
    return 3;
}
"""
USE = """int answer(int question);

int main(void)
{
    return answer(5) == 1 && answer(-5) == 3 ? 0 : 1;
}
"""
LINE = '[[explained]]\nwhere = ["base/answer.c:answer"]\nmost = 2\nreason = "too small"\n'
WAYS = '[[way]]\nwhere = ["base/answer.c:*"]\nline = "question"\nmost = 2\nreason = "too small"\n'


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A core of one function, of which two lines and two ways of branches do not run."""
    folder = tmp_path_factory.mktemp("measured")
    source = folder / "csrc" / "src" / "base" / "answer.c"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    use = folder / "use.c"
    use.write_text(USE)
    flags = ["-O0", "--coverage"]
    program = core_build.program(
        folder / "build" / "use",
        [use, source],
        flags,
        link=["--coverage"],
        cc=core_build.compiler("gcc"),
    )
    subprocess.run([str(program)], check=True)
    return folder


def report(folder: Path, explained: str) -> subprocess.CompletedProcess[str]:
    reasons = folder / "explained.toml"
    reasons.write_text(explained)
    script = Path(__file__).with_name("coverage_report.py")
    command = [sys.executable, str(script), str(folder / "build"), "--explained", str(reasons),
               "--csrc", str(folder / "csrc")]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_is_explained_passes(measured: Path) -> None:
    done = report(measured, LINE + WAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not explained" not in done.stdout
    assert "| src/base/answer.c | 7 | 71.4 % |" in done.stdout


def test_a_line_that_nothing_explains_fails(measured: Path) -> None:
    done = report(measured, WAYS)
    assert done.returncode == 1
    assert "not covered and not explained: base/answer.c:answer lines 9, 10" in done.stdout


def test_more_lines_than_were_explained_fail(measured: Path) -> None:
    done = report(measured, LINE.replace("most = 2", "most = 1") + WAYS)
    assert done.returncode == 1
    assert "not covered and not explained: base/answer.c:answer" in done.stdout


@pytest.mark.parametrize(
    "rule",
    ["", WAYS.replace("base/", "call/"), WAYS.replace('"question"', '"answer"'),
     WAYS.replace("most = 2", "most = 1")],
    ids=["no rule", "another file", "other lines", "too many"],
)  # fmt: skip
def test_a_way_that_nothing_explains_fails(measured: Path, rule: str) -> None:
    done = report(measured, LINE + rule)
    assert done.returncode == 1
    assert "not taken and not explained: base/answer.c:answer line 8" in done.stdout


def test_a_build_of_which_nothing_ran_is_no_coverage(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    done = report(tmp_path, LINE + WAYS)
    assert done.returncode == 2
    assert "nothing ran" in done.stdout
