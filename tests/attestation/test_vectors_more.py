"""Every vector of Arm CCA, NVIDIA, release policies and decoded tokens comes out as expected."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.errors import EvidenceFormatError

KINDS = {"arm-cca-token": 2, "nvidia-gpu-report": 1, "akv-release-policy": 2, "maa-claims": 1}
NOT_CLAIMS = {"verdict", "strict_policy", "reason", "note"}
FREE = {"policy": AppraisalPolicy.strict(), "freshness": "not_checked"}


def judged(folder: Path, **changes: Any) -> tuple[dict[str, Any], AttestationResult]:
    case = json.loads((folder / "case.json").read_bytes())
    data = (folder / next(iter(case["files"].values()))).read_bytes()
    at = case["verify_at"]
    options = FREE | {
        "at": datetime.fromisoformat(at) if at else datetime(2026, 7, 1, tzinfo=UTC),
        "endorsements": folder,
    }
    return case, appraise(data, **(options | changes))


def folders(vectors: Path, kind: str) -> list[Path]:
    return [
        path.parent
        for path in sorted(vectors.glob("attestation/*/case.json"))
        if json.loads(path.read_bytes())["kind"] == kind
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_these_vectors_comes_out_as_expected(vectors: Path, kind: str) -> None:
    found = folders(vectors, kind)
    assert len(found) >= KINDS[kind]
    for folder in found:
        case, result = judged(folder)
        expect = case["expect"]
        assert result.kind == kind
        assert result.genuine is (expect["verdict"] == "valid"), (folder.name, result.refused_by)
        assert result.accepted is result.genuine
        assert not result.identified
        assert not result.fresh
        assert result.claims, folder.name
        for name, value in expect.items():
            if name not in NOT_CLAIMS:
                assert result.claims[name] == value, (folder.name, name)
        json.dumps(result.to_json())


@pytest.mark.parametrize("kind", ["akv-release-policy", "maa-claims"])
def test_what_is_only_parsed_says_that_nothing_is_signed(vectors: Path, kind: str) -> None:
    for folder in folders(vectors, kind):
        for policy in (AppraisalPolicy.strict(), AppraisalPolicy.permissive()):
            _, result = judged(folder, policy=policy)
            assert result.refused_by == (f"{kind[-6:]}.signature",)
            assert not result.genuine
            assert not result.accepted


def test_a_cca_token_without_the_platform_key_is_refused_by_its_signature_alone(
    vectors: Path,
) -> None:
    for folder in folders(vectors, "arm-cca-token"):
        _, result = judged(folder, endorsements=None, policy=AppraisalPolicy.permissive())
        assert result.refused_by == ("platform.signature",)
        assert result.claims["platform_signature_ok"] is None


def test_a_gpu_report_without_certificates_is_not_genuine(vectors: Path) -> None:
    (folder,) = folders(vectors, "nvidia-gpu-report")
    _, result = judged(folder, endorsements=None, policy=AppraisalPolicy.permissive())
    assert result.refused_by == ("chain.format",)
    chain = (folder / "cert-chain.pem").read_bytes()
    _, result = judged(folder, endorsements={"cert-chain.pem": chain})
    assert result.genuine
    end = chain.rindex(b"-----BEGIN")
    _, result = judged(folder, endorsements={"cert-chain.pem": chain[:end]})
    assert result.genuine, "the pinned root completes the chain"


def test_the_nonces_of_the_vectors_make_them_fresh(vectors: Path) -> None:
    for kind, name in (("nvidia-gpu-report", "nonce"), ("arm-cca-token", "challenge")):
        folder = folders(vectors, kind)[0]
        case, _ = judged(folder)
        nonce = bytes.fromhex(case["expect"][name])
        options = {"freshness": "required", "nonce": nonce}
        assert judged(folder, **options)[1].fresh
        options["nonce"] = nonce[:-1] + bytes((nonce[-1] ^ 1,))
        _, result = judged(folder, **options)
        assert result.refused_by == ("nonce",)


def _flips(data: bytes) -> list[bytes]:
    flipped = []
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        flipped.append(bytes(changed))
    return flipped


@pytest.mark.parametrize("kind", ["arm-cca-token", "nvidia-gpu-report"])
def test_att_02_no_byte_of_the_vectors_can_be_flipped(vectors: Path, kind: str) -> None:
    """Each byte counts: signed, or part of a structure that has one form."""
    folder = folders(vectors, kind)[0]
    case, result = judged(folder)
    assert result.genuine
    data = (folder / next(iter(case["files"].values()))).read_bytes()
    endorsements = {
        name: (folder / name).read_bytes()
        for name in ("cpak-pub.json", "cert-chain.pem")
        if (folder / name).exists()
    }
    at = case["verify_at"]
    at = datetime.fromisoformat(at) if at else datetime(2026, 7, 1, tzinfo=UTC)
    for changed in _flips(data):
        try:
            result = appraise(changed, **FREE, at=at, endorsements=endorsements)
        except EvidenceFormatError:
            continue
        assert result.kind == kind
        assert not result.genuine
