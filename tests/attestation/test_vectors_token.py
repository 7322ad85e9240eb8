"""Every token of the vectors comes out as written beside it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise

KINDS = {
    "maa-jwt",
    "google-confidential-space-jwt",
    "attestation-result-jwt",
    "x5c-jwt",
}
NOT_CLAIMS = {"verdict", "strict_policy", "reason", "note"}


def cases(vectors: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in sorted(vectors.glob("attestation/*/case.json")):
        case = json.loads(path.read_bytes())
        if case["kind"] in KINDS:
            found.append((path.parent, case))
    assert len(found) >= 7
    return found


def judged(folder: Path, case: dict[str, Any], **changes: Any) -> AttestationResult:
    options: dict[str, Any] = {
        "policy": AppraisalPolicy.strict(),
        "freshness": "not_checked",
        "at": datetime.fromisoformat(case["verify_at"]),
    }
    return appraise((folder / case["files"]["token"]).read_bytes(), **(options | changes))


def test_each_token_of_the_vectors_comes_out_as_expected(vectors: Path) -> None:
    for folder, case in cases(vectors):
        result = judged(folder, case)
        expect = case["expect"]
        assert result.kind == case["kind"]
        assert result.genuine is (expect["verdict"] == "valid"), (folder.name, result.refused_by)
        assert not result.accepted or result.genuine
        for name, value in expect.items():
            if name not in NOT_CLAIMS:
                assert result.claims[name] == value, (folder.name, name)


def test_what_cannot_be_verified_is_refused_for_that_reason_only(vectors: Path) -> None:
    for folder, case in cases(vectors):
        if case["expect"]["verdict"] != "unverifiable":
            continue
        result = judged(folder, case, policy=AppraisalPolicy.permissive())
        evidence = {check.name for check in result.checks if not check.holds}
        assert evidence == {"key.trust", "token.signature"}, folder.name


def test_jwt_04_an_embedded_key_counts_once_the_relying_party_gives_it(vectors: Path) -> None:
    """The same token, its key now in the relying party's own key set."""
    for name in ("ear-veraison-ear-2022", "ear-veraison-ear", "ear-tng-ear", "ear-coco-as-docs"):
        folder = vectors / "attestation" / name
        case = json.loads((folder / "case.json").read_bytes())
        first = judged(folder, case)
        key = dict(first.claims["header"].get("jwk") or first.claims["claims"]["jwk"])
        key.pop("x5c", None)
        keys = json.dumps({"keys": [key]}).encode()
        result = judged(folder, case, endorsements={"jwks.json": keys})
        assert result.genuine, (name, result.refused_by)
        assert result.accepted is (name != "ear-coco-as-docs"), (name, result.refused_by)


def test_the_google_token_holds_for_its_hour_only(vectors: Path) -> None:
    folder = vectors / "attestation" / "gcp-confidential-space-readme-2025-08"
    case = json.loads((folder / "case.json").read_bytes())
    result = judged(folder, case)
    assert result.accepted
    for moment in (datetime(2025, 8, 11, 11, tzinfo=UTC), datetime(2025, 8, 12, tzinfo=UTC)):
        assert "token.times" in judged(folder, case, at=moment).refused_by


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"issuers": ("https://confidentialcomputing.googleapis.com.evil.example",)}, "issuer"),
        ({"issuers": ("https://confidentialcomputing.googleapis.co",)}, "issuer"),
        ({"audience": "z0838147593860499674"}, "audience"),
        ({"claims": {"hwmodel": "GCP_AMD_SEV"}}, "code.claims"),
        ({"claims": {"secboot": 1}}, "code.claims"),
        ({"claims": {"submods.gce.zone": "us-west1-c"}}, "code.claims"),
        ({"claims": {"submods.gce.nothing": ""}}, "code.claims"),
        ({"mrenclave": b"\1" * 32}, "code.mrenclave"),
        ({"launch_digest": b"\1" * 48}, "code.launch_digest"),
        ({"pcrs": {0: b"\1" * 48}}, "code.pcrs"),
        ({"max_age": 60}, "token.age"),
    ],
)
def test_jwt_06_16_what_the_policy_demands_of_a_genuine_token(
    vectors: Path, options: dict[str, Any], check: str
) -> None:
    folder = vectors / "attestation" / "gcp-confidential-space-readme-2025-08"
    case = json.loads((folder / "case.json").read_bytes())
    named = {"mrenclave", "launch_digest", "pcrs", "claims"} & options.keys()
    policy = AppraisalPolicy(**options) if named else AppraisalPolicy.any_code(**options)
    result = judged(folder, case, policy=policy)
    assert result.genuine
    assert result.refused_by == (check,)
    assert not result.accepted


def test_what_the_google_token_says_can_be_demanded(vectors: Path) -> None:
    folder = vectors / "attestation" / "gcp-confidential-space-readme-2025-08"
    case = json.loads((folder / "case.json").read_bytes())
    claims = case["expect"]["claims"]
    policy = AppraisalPolicy(
        issuers=(claims["iss"],),
        audience=claims["aud"],
        claims={
            "hwmodel": ("GCP_AMD_SEV", "GCP_INTEL_TDX"),
            "secboot": True,
            "submods.container.image_digest": claims["submods"]["container"]["image_digest"],
        },
        max_age=3600,
    )
    nonce = bytes.fromhex(claims["eat_nonce"])
    result = judged(folder, case, policy=policy, nonce=nonce, freshness="required")
    assert result.accepted, result.refused_by
    assert result.fresh
    assert result.identified
    stale = judged(folder, case, nonce=nonce[:-1] + b"\0", freshness="required")
    assert stale.refused_by == ("nonce",)


def test_att_22_each_byte_of_a_token_counts(vectors: Path) -> None:
    folder = vectors / "attestation" / "gcp-confidential-space-readme-2025-08"
    case = json.loads((folder / "case.json").read_bytes())
    data = (folder / case["files"]["token"]).read_bytes()
    options: dict[str, Any] = {
        "policy": AppraisalPolicy.permissive(),
        "freshness": "not_checked",
        "at": datetime.fromisoformat(case["verify_at"]),
    }
    from pyenclave.errors import EvidenceFormatError

    # Certificates fill most of the header: every byte around them, every seventh within.
    signed = data.index(b".")
    places = [*range(0, signed, 7), *range(signed - 200, len(data), 3), len(data) - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] = ord("B") if changed[place] != ord("B") else ord("C")
        try:
            result = appraise(bytes(changed), **options)
        except EvidenceFormatError:
            continue
        assert not result.genuine, place
