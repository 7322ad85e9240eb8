"""Turns of fuzzing: what a turn leaves in the log, and what the log says in the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fuzz_rotate
import pytest

TOLD = """
import sys
print("#9 NEW cov: 7 ft: 8 corp: 2/9b", file=sys.stderr)
print("#99 DONE   cov: 70 ft: 80 corp: 20/90b lim: 4096", file=sys.stderr)
print("stat::number_of_executed_units: 1234", file=sys.stderr)
sys.exit(0 if sys.argv[1] == "-max_total_time=5" else 77)
"""


def told(*arguments: str) -> list[str]:
    return [sys.executable, "-c", TOLD, *arguments]


def test_a_turn_has_its_seconds_and_its_last_figures() -> None:
    line, _ = fuzz_rotate.turn("one", told("-max_total_time=0"), 5)
    del line["seconds"]
    assert line == {
        "target": "one",
        "executions": 1234,
        "edges": 70,
        "features": 80,
        "corpus": 20,
        "status": 0,
    }


def test_a_turn_that_ends_in_a_finding_says_so() -> None:
    line, said = fuzz_rotate.turn("one", told("-max_total_time=0"), 6)
    assert line["status"] == 77
    assert "DONE" in said


def test_the_report_sums_turns_up_and_names_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(target: str, executions: int, edges: int, status: int = 0) -> str:
        figures = {"seconds": 20.0, "executions": executions, "edges": edges, "features": edges}
        return json.dumps({"target": target, "corpus": 3, "status": status, **figures}) + "\n"

    log = tmp_path / "turns.jsonl"
    log.write_text(line("a", 1000, 5) + line("b", 10, 6) + line("a", 500, 9) + line("b", 1, 0, 1))
    fuzz_rotate.report(log)
    out = capsys.readouterr().out
    assert "| a | 40 | 1,500 | 9 | 9 | 3 | none |" in out
    assert "| b | 40 | 11 | 6 | 6 | 3 | 1 |" in out
    assert "80 s, 1,511 executions" in out


def test_nothing_is_begun_when_only_a_report_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text("")
    script = Path(fuzz_rotate.__file__)
    command = [sys.executable, str(script), "--corpus", str(tmp_path), "--report"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 s, 0 executions" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["turns.jsonl"]
