"""Every Nitro document of the vectors comes out as written beside it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise

NOT_CLAIMS = {"verdict", "strict_policy", "reason", "note"}


def cases(vectors: Path) -> list[Path]:
    folders = sorted(vectors.glob("attestation/*nitro*"))
    assert len(folders) >= 7
    return folders


def judged(folder: Path, **changes: Any) -> tuple[dict[str, Any], AttestationResult]:
    case = json.loads((folder / "case.json").read_bytes())
    options: dict[str, Any] = {
        "policy": AppraisalPolicy.strict(),
        "freshness": "not_checked",
        "at": datetime.fromisoformat(case["verify_at"]),
    }
    data = (folder / case["files"]["document"]).read_bytes()
    return case, appraise(data, **(options | changes))


def test_each_document_of_the_vectors_comes_out_as_expected(vectors: Path) -> None:
    for folder in cases(vectors):
        case, result = judged(folder)
        expect = case["expect"]
        genuine = expect["verdict"] == "valid"
        assert result.kind == case["kind"]
        assert result.genuine is genuine, (folder.name, result.refused_by)
        assert result.accepted is (genuine and expect["strict_policy"] == "accept"), folder.name
        for name, value in expect.items():
            if name not in NOT_CLAIMS:
                assert result.claims[name] == value, (folder.name, name)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("neg-nitro-custom-root-0", "chain.root"),
        ("neg-nitro-expired", "chain.validity"),
        ("neg-nitro-tampered-signature", "document.signature"),
    ],
)
def test_each_negative_is_refused_by_its_own_check(vectors: Path, name: str, check: str) -> None:
    _, result = judged(vectors / "attestation" / name)
    assert check in result.refused_by


def test_debug_documents_are_genuine_and_accepted_only_where_debug_is_allowed(
    vectors: Path,
) -> None:
    folder = vectors / "attestation" / "nitro-evervault-debug"
    _, result = judged(folder)
    assert result.genuine
    assert result.refused_by == ("debug",)
    _, result = judged(folder, policy=AppraisalPolicy.permissive())
    assert result.accepted
