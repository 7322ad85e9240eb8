"""A software TPM for the tests of this folder, and recordings of real hardware."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.testing.vtpm import Swtpm, make_ak
from pyenclave.tpm import Tpm


@pytest.fixture(scope="session")
def swtpm() -> Iterator[Swtpm]:
    """A software TPM with an attestation key; it serves one client at a time."""
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed (apt-get install swtpm)")
    with Swtpm() as running:
        with running.open() as tpm:
            make_ak(tpm)
        yield running


@pytest.fixture
def tpm(swtpm: Swtpm) -> Iterator[Tpm]:
    """A client of it."""
    with swtpm.open() as client:
        yield client


class Recording:
    """Evidence of real hardware, from the vectors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        case = json.loads((folder / "case.json").read_text("utf-8"))
        self.at = datetime.fromisoformat(case["verify_at"]) if case["verify_at"] else None
        names = ("quote", "report", "document", "hcl_report")
        self.evidence = (
            folder / next(case["files"][n] for n in names if n in case["files"])
        ).read_bytes()

    def failing(self, evidence: bytes, **arguments: Any) -> list[str]:
        """Return the checks that fail; all of them, at the time of the recording."""
        result = appraise(
            evidence,
            policy=AppraisalPolicy.permissive(),
            endorsements=self.folder,
            at=self.at,
            **arguments,
        )
        return [check.name for check in result.checks if check.outcome == "failed"]


@pytest.fixture
def recording(vectors: Path) -> Callable[[str], Recording]:
    """Find a recording by its folder's name."""
    return lambda name: Recording(vectors / "attestation" / name)
