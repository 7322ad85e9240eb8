"""Release policies and decoded tokens: read whole, told, and never genuine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from negatives_akv_release_policy import AUTHORITY, CONDITION, judge, policy
from negatives_maa_claims import CLAIMS, HEADER

from pyenclave.attestation import AppraisalPolicy, kind_of
from pyenclave.errors import EvidenceFormatError

GOOD = {"iss": AUTHORITY, "x-ms-attestation-type": "sevsnpvm"}


def importing(*groups: Any, endpoint: Any = "mine.attest.azure.net", **key: Any) -> bytes:
    key = {"kid": "name", "authority": {"endpoint": endpoint}} | key
    return json.dumps({"key": key, "claims": list(groups or [[CONDITION]])}).encode()


def tried(data: bytes, claims: dict[str, Any]) -> Any:
    return judge(data, endorsements={"claims.json": json.dumps(claims).encode()})


def decisions(result: Any) -> tuple[bool, bool]:
    found = result.claims
    return (
        found["decision_with_token_issuer"],
        found["decision_if_issuer_were_first_authority"],
    )


@pytest.mark.parametrize("data", [policy(), importing(), CLAIMS, HEADER + CLAIMS])
def test_what_nobody_signed_is_never_genuine(data: bytes) -> None:
    for wanted in (
        AppraisalPolicy.permissive(),
        AppraisalPolicy.strict(),
        AppraisalPolicy.any_code(allow_debug=True, dangerous_allow_software=True),
    ):
        result = judge(data, policy=wanted)
        assert not result.genuine
        assert not result.accepted
        (check,) = (item for item in result.checks if item.name.endswith(".signature"))
        assert check.outcome == "failed"
        assert "nothing is signed" in (check.found or "")
        assert check.advice


@pytest.mark.parametrize("data", [policy(), importing()])
def test_a_policy_decides_by_claims_that_are_given(data: bytes) -> None:
    result = tried(data, GOOD)
    assert decisions(result) == (True, True)
    assert result.claims["token_issuer"] == AUTHORITY
    assert decisions(tried(data, GOOD | {"iss": AUTHORITY + "/"})) == (True, True)
    assert decisions(tried(data, GOOD | {"iss": "https://other.example"})) == (False, True)
    assert decisions(tried(data, GOOD | {"iss": "no address"})) == (False, True)
    assert decisions(tried(data, GOOD | {"iss": 5})) == (False, True)
    result = tried(data, {"iss": AUTHORITY})
    assert decisions(result) == (False, False)
    assert result.claims["reasons"]
    assert not result.genuine


def test_without_claims_no_decision_is_told() -> None:
    result = judge(policy())
    assert result.claims["authorities"] == [AUTHORITY]
    assert "decision_with_token_issuer" not in result.claims


@pytest.mark.parametrize("claims", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"{} {} {}"])
def test_damaged_claims_are_refused_and_decide_nothing(claims: bytes) -> None:
    result = judge(policy(), endorsements={"claims.json": claims})
    assert "claims.format" in result.refused_by
    assert "decision_with_token_issuer" not in result.claims
    assert result.claims["authorities"] == [AUTHORITY]


def test_an_import_configuration_holds_if_one_list_holds_whole() -> None:
    other = {"claim": "x-ms-sevsnpvm-vmpl", "equals": "0"}
    both = importing([CONDITION, other])
    either = importing([CONDITION], [other])
    assert decisions(tried(both, GOOD)) == (False, False)
    assert decisions(tried(either, GOOD)) == (True, True)
    assert decisions(tried(both, GOOD | {"x-ms-sevsnpvm-vmpl": 0})) == (True, True)


def test_an_endpoint_that_is_no_address_releases_nothing_to_an_issuer() -> None:
    for endpoint in ("<maa-endpoint>", "", "http://x", "a b", "https://x/../y", None):
        result = tried(importing(endpoint=endpoint), GOOD)
        assert "policy.format" not in result.refused_by, endpoint
        assert not decisions(result)[0], endpoint


@pytest.mark.parametrize(
    "data",
    [
        b'{"anyOf": []}',
        b'{"anyOf": {}}',
        b'{"version": "2", "anyOf": []}',
        policy({"claim": "a", "is": 1}),
        policy(authority="http://x"),
        importing([{"claim": "a", "is": 1}]),
        importing([{"claim": "a"}]),
        importing([]),
        importing({"a": 1}),
        importing([[CONDITION]]),
        importing(endpoint=5),
        b'{"key": {}, "claims": {}}',
        b'{"key": {}, "claims": []}',
        b'{"key": [], "claims": [5]}',
    ],
)
def test_a_policy_beyond_the_grammar_is_refused_and_told_nothing_of(data: bytes) -> None:
    assert kind_of(data) == "akv-release-policy"
    result = judge(data)
    assert "policy.format" in result.refused_by
    assert "authorities" not in result.claims


def test_secrets_of_an_import_configuration_are_not_told(vectors: Path) -> None:
    secret = "a bearer token"
    data = importing(
        akv={"bearer_token": secret}, key_ops=[secret], authority={"endpoint": "x", "key": secret}
    )
    assert secret not in json.dumps(judge(data).to_json())
    folder = vectors / "attestation/akv-import-key-config-aci"
    result = judge((folder / "importkeyconfig.json").read_bytes())
    assert "bearer" not in json.dumps(result.to_json())
    assert result.claims["authorities"] == ["<maa-endpoint>"]
    assert len(result.claims["conditions"][0]) == 4


def test_a_decoded_token_is_told_with_and_without_header() -> None:
    result = judge(HEADER + CLAIMS)
    assert result.kind == "maa-claims"
    assert result.claims["alg"] == "RS256"
    assert result.claims["claims"]["x-ms-attestation-type"] == "sgx"
    assert result.claims["signature_ok"] is None
    bare = judge(CLAIMS)
    assert bare.claims["header"] is None
    assert bare.claims["issuer"] == AUTHORITY


@pytest.mark.parametrize(
    "data", [HEADER + CLAIMS + b"{}", HEADER + b"{}", CLAIMS + HEADER, HEADER + b"[]"]
)
def test_other_texts_are_no_decoded_token_of_azures(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        kind_of(data)
