"""Every case of the vectors with AMD's hardware or Azure's paravisor in it, exactly."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.attestation.endorsements import KNOWN_NAMES
from pyenclave.errors import EvidenceFormatError

EVIDENCE = {
    "sev-snp-report": "report.bin",
    "sev-snp-vek-cert": "vek.der",
    "azure-hcl-snp": "hcl-report.bin",
    "azure-hcl-tdx": "hcl-report.bin",
}
# What is said about the case, not by the evidence.
ABOUT = {"verdict", "strict_policy", "note", "reason"}


def cases(vectors: Path) -> list[Path]:
    found = []
    for path in sorted(vectors.glob("attestation/*/case.json")):
        if json.loads(path.read_text())["kind"] in EVIDENCE:
            found.append(path.parent)
    return found


def appraised(folder: Path, case: dict[str, Any], **options: Any) -> AttestationResult:
    at = case["verify_at"]
    moment = datetime(2025, 1, 1, tzinfo=UTC) if at is None else datetime.fromisoformat(at)
    values: dict[str, Any] = {
        "policy": AppraisalPolicy.strict(),
        "freshness": "not_checked",
        "endorsements": folder,
        "at": moment,
    }
    return appraise((folder / EVIDENCE[case["kind"]]).read_bytes(), **(values | options))


def test_every_case_has_exactly_the_expected_verdict_and_claims(vectors: Path) -> None:
    folders = cases(vectors)
    assert len(folders) >= 28
    for folder in folders:
        case = json.loads((folder / "case.json").read_text())
        expect = case["expect"]
        result = appraised(folder, case)
        refused = (folder.name, [check for check in result.checks if not check.holds])
        assert result.kind == case["kind"]
        assert result.genuine is (expect["verdict"] == "valid"), refused
        if "strict_policy" in expect:
            assert result.accepted is (expect["strict_policy"] == "accept"), refused
        for name, value in expect.items():
            if name not in ABOUT:
                assert result.claims.get(name, "absent") == value, (folder.name, name)
        assert not result.identified
        assert not result.fresh


def test_results_are_json(vectors: Path) -> None:
    for folder in cases(vectors):
        case = json.loads((folder / "case.json").read_text())
        json.dumps(appraised(folder, case).to_json())


def test_no_case_is_genuine_at_another_time(vectors: Path) -> None:
    for folder in cases(vectors):
        case = json.loads((folder / "case.json").read_text())
        for year in (2015, 2060):
            moment = datetime(year, 1, 1, tzinfo=UTC)
            assert not appraised(folder, case, at=moment).genuine, folder.name


def surviving(folder: Path, file: str) -> set[int]:
    """Return the offsets of *file* whose lowest bit can be changed and all is still genuine."""
    case = json.loads((folder / "case.json").read_text())
    main = EVIDENCE[case["kind"]]
    files = {name: (folder / name).read_bytes() for name in case["files"].values()}
    files = {name: data for name, data in files.items() if name in KNOWN_NAMES or name == main}
    at = datetime.fromisoformat(case["verify_at"])
    data, found = files[file], set()
    for offset in range(len(data)):
        given = files | {file: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]}
        evidence = given.pop(main)
        try:
            result = appraise(
                evidence,
                policy=AppraisalPolicy.strict(),
                freshness="not_checked",
                endorsements=given,
                at=at,
            )
        except EvidenceFormatError:
            continue  # no kind of evidence any more
        if result.genuine:
            found.add(offset)
    return found


# Case, file, and the offsets that nothing covers, with the reason.
COVERED = [
    ("snp-v5-turin-vcek-ms-tee-av", "report.bin", set()),
    ("snp-v3-milan-vlek-aws-us-east-2", "report.bin", set()),
    ("snp-v3-milan-vlek-aws-us-east-2", "vek.der", set()),
    ("snp-turin-vcek-only-virtee", "vek.der", set()),
    # White space at the end of PEM is no part of it.
    ("snp-turin-vcek-only-virtee", "ask.pem", {-1}),
    ("azure-snp-coco-genoa", "hcl-report.bin", set()),
    ("azure-snp-coco-genoa", "runtime-data.json", set()),
    ("azure-snp-coco-genoa", "tpm-quote.msg", set()),
    ("azure-snp-coco-genoa", "tpm-quote.sig", set()),
    ("azure-snp-coco-genoa", "tpm-pcrs.json", set()),
    # Version of REPORTTYPE, CPUSVN and MAC of the TDREPORT: the TD quote has none of them, and
    # only the machine itself could check them.
    (
        "azure-tdx-coco-v1",
        "hcl-report.bin",
        {32 + 2, *range(32 + 16, 32 + 32), *range(32 + 224, 32 + 256)},
    ),
]


@pytest.mark.parametrize(("name", "file", "uncovered"), COVERED)
def test_each_byte_is_refused_or_named_as_not_covered(
    vectors: Path, name: str, file: str, uncovered: set[int]
) -> None:
    folder = vectors / "attestation" / name
    size = (folder / file).stat().st_size
    assert surviving(folder, file) == {offset % size for offset in uncovered}
