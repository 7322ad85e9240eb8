"""Key-release policies: catalogue entries SKR-01 to SKR-04, the vendor's samples, properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import AttestationError
from pyenclave.formats.release_policy import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    ReleasePolicy,
    normal_authority,
)

URL = "https://shared.eus.attest.azure.net"


def policy(
    *conditions: Any, kind: str = "allOf", url: str = URL, strict: bool = False
) -> ReleasePolicy:
    text = {"version": "1.0.0", "anyOf": [{"authority": url, kind: list(conditions)}]}
    return ReleasePolicy.from_json(json.dumps(text), strict=strict)


def released(condition: dict[str, Any], claims: dict[str, Any], *, strict: bool = False) -> bool:
    return policy(condition, strict=strict).evaluate(URL, claims).released


# ---- hostile input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"anyOf":[]}',
        '{"anyOf":{}}',
        '{"version":"1.0.1","anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1}]}]}',
        '{"version":1,"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1}]}]}',
        '{"x":1,"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1}]}]}',
        '{"anyof":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1}]}]}',
        '{"anyOf":[{"anyOf":[{"claim":"x","equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a"}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[]}]}',
        '{"anyOf":[{"authority":7,"anyOf":[{"claim":"x","equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1}],"allOf":[{"claim":"x","equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x"}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","Equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1,"exists":true}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":1,"y":2}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":null}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":[1]}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":{}}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","exists":"true"}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","less":"abc"}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","less":true}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"","equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"a..b","equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","condition":"equals","value":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","claim":"y","equals":1}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":["x"]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"anyOf":[]}]}]}',
        '{"anyOf":[{"authority":"https://a","anyOf":[{"claim":"x","equals":NaN}]}]}',
    ],
)
def test_skr_03_what_the_grammar_does_not_know_is_refused_when_it_is_read(text: str) -> None:
    with pytest.raises(AttestationError):
        ReleasePolicy.from_json(text)


def test_skr_03_depth_and_number_of_conditions_are_bounded() -> None:
    def nested(depth: int) -> dict[str, Any]:
        condition: dict[str, Any] = {"claim": "x", "equals": 1}
        for _ in range(depth):
            condition = {"allOf": [condition]}
        return condition

    assert policy(nested(MAX_DEPTH - 1)).evaluate(URL, {"x": 1}).released
    with pytest.raises(AttestationError, match="deep"):
        policy(nested(MAX_DEPTH))
    one = {"claim": "x", "equals": 1}
    policy(*[one] * MAX_CONDITIONS)
    with pytest.raises(AttestationError, match="conditions"):
        policy(*[one] * (MAX_CONDITIONS + 1))
    with pytest.raises(AttestationError):
        ReleasePolicy.from_json('{"anyOf":[' + " " * (64 << 10) + "]}")


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example",
        "a.example",
        "https://",
        "https://user@a.example",
        "https://A.example",
        "https://a.example//",
        "https://a.example/?x",
        "https://a.example/#f",
        "https://a.example/%2e",
        "https://a.example/../b",
        "https://a.example/./b",
        "https://a.example\\b",
        "https://a.example:99999",
        "https://a.example:",
        "https://a.example:0",
        "https://\u0430.example",
        " https://a.example",
        "https://a.example\n",
        "",
    ],
)
def test_skr_04_an_authority_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(AttestationError):
        normal_authority(url)


def test_skr_04_authorities_are_compared_exactly_but_for_one_slash() -> None:
    subject = policy({"claim": "x", "equals": 1}, url=URL + "/")
    assert subject.evaluate(URL, {"x": 1}).released
    assert subject.evaluate(URL + "/", {"x": 1}).released
    for other in (URL + ".evil.example", URL[:-1], URL + ":443", URL + "/a"):
        decision = subject.evaluate(other, {"x": 1})
        assert not decision.released
        assert "no authority" in decision.reasons[0]


# ---- SKR-01: types ----------------------------------------------------------------------------

_VALUES: list[Any] = [True, False, 0, 1, 1.5, "true", "false", "1", "0", "1.5", "x", ""]


@pytest.mark.parametrize("wanted", _VALUES)
@pytest.mark.parametrize("claim", [*_VALUES, None, [], {}, [1]])
def test_skr_01_only_exact_type_and_value_match(wanted: Any, claim: Any) -> None:
    coerced = wanted
    if isinstance(claim, bool) and wanted in ("true", "false"):
        coerced = wanted == "true"
    elif type(claim) is int and wanted in ("0", "1"):
        coerced = int(wanted)
    comparable = (type(coerced) is type(claim)) or {type(coerced), type(claim)} == {int, float}
    assert released({"claim": "c", "equals": wanted}, {"c": claim}) is (
        comparable and coerced == claim
    )
    assert released({"claim": "c", "notEquals": wanted}, {"c": claim}) is (
        comparable and coerced != claim
    )
    if wanted in ("true", "false", "0", "1"):
        with pytest.raises(AttestationError, match="stands for"):
            policy({"claim": "c", "equals": wanted}, strict=True)
    else:
        exact = type(wanted) is type(claim) or {type(wanted), type(claim)} == {int, float}
        assert released({"claim": "c", "equals": wanted}, {"c": claim}, strict=True) is (
            exact and wanted == claim
        )


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_numbers_are_ordered_as_numbers(claim: int, wanted: int) -> None:
    claims = {"c": claim}
    assert released({"claim": "c", "less": wanted}, claims) is (claim < wanted)
    assert released({"claim": "c", "lessOrEquals": wanted}, claims) is (claim <= wanted)
    assert released({"claim": "c", "greater": wanted}, claims) is (claim > wanted)
    assert released({"claim": "c", "greaterOrEquals": str(wanted)}, claims) is (claim >= wanted)


@pytest.mark.parametrize("claim", ["5", True, None, [5], {"a": 5}])
def test_what_is_no_number_is_not_ordered(claim: Any) -> None:
    for operator in ("less", "lessOrEquals", "greater", "greaterOrEquals"):
        assert not released({"claim": "c", operator: 3}, {"c": claim})
        assert not released({"claim": "c", operator: 9}, {"c": claim})


# ---- SKR-02: paths ----------------------------------------------------------------------------


def test_skr_02_dots_may_separate_members_or_belong_to_a_name() -> None:
    condition = {"claim": "a.b", "equals": 1}
    assert released(condition, {"a": {"b": 1}})
    assert released(condition, {"a.b": 1})
    assert not released(condition, {"a.b": 1, "a": {"b": 1}}), "two claims fit: neither counts"
    assert not released(condition, {"a": {"b": 2}, "a.b": 1})
    assert not released(condition, {"a": [{"b": 1}]})
    assert not released(condition, {"a": "b"})


def test_skr_02_a_missing_claim_never_matches() -> None:
    for operator in ("equals", "notEquals", "less", "greater"):
        assert not released({"claim": "a.b", operator: 1}, {})
    assert released({"claim": "a", "exists": False}, {})
    assert not released({"claim": "a", "exists": True}, {})
    assert released({"claim": "a", "exists": True}, {"a": {}})


# ---- meaning ----------------------------------------------------------------------------------


def test_groups_nest_and_the_reasons_name_what_did_not_hold() -> None:
    subject = policy(
        {"anyOf": [{"claim": "t", "equals": "sevsnpvm"}, {"claim": "t", "equals": "tdxvm"}]},
        {"claim": "ok", "equals": True},
    )
    assert subject.evaluate(URL, {"t": "tdxvm", "ok": True}).released
    decision = subject.evaluate(URL, {"t": "sgx", "ok": False})
    assert not decision.released
    assert len(decision.reasons) == 2
    assert "tdxvm" in decision.reasons[0]
    assert decision.reasons[1] == "ok equals true"


def test_any_entry_of_an_authority_may_release() -> None:
    one = {"authority": URL, "allOf": [{"claim": "x", "equals": 1}]}
    two = {"authority": URL, "allOf": [{"claim": "x", "equals": 2}]}
    subject = ReleasePolicy.from_json(json.dumps({"anyOf": [one, two]}))
    assert [subject.evaluate(URL, {"x": n}).released for n in (1, 2, 3)] == [True, True, False]


_claims = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0, 1, "x", True]), max_size=3)
_leaf = st.builds(
    lambda name, op, value: {"claim": name, op: value},
    st.sampled_from("abc"),
    st.sampled_from(["equals", "notEquals"]),
    st.sampled_from([0, 1, "x", True]),
)
_tree = st.recursive(
    _leaf,
    lambda inner: st.builds(
        lambda kind, items: {kind: items},
        st.sampled_from(["anyOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=10,
)


def _reference(node: dict[str, Any], claims: dict[str, Any]) -> bool:
    if "anyOf" in node:
        return any(_reference(item, claims) for item in node["anyOf"])
    if "allOf" in node:
        return all(_reference(item, claims) for item in node["allOf"])
    if node["claim"] not in claims:
        return False
    claim = claims[node["claim"]]
    operator, value = next((k, v) for k, v in node.items() if k != "claim")
    if type(claim) is not type(value):
        return False
    return (claim == value) is (operator == "equals")


@given(_tree, _claims)
def test_evaluation_agrees_with_a_plain_reference(
    node: dict[str, Any], claims: dict[str, Any]
) -> None:
    subject = policy(node)
    assert subject.evaluate(URL, claims).released is _reference(node, claims)
    assert ReleasePolicy.from_json(subject.to_json()) == subject


# ---- the vendor's own -------------------------------------------------------------------------


def test_the_vendors_sample_decides_as_expected(vectors: Path) -> None:
    folder = vectors / "attestation" / "akv-release-policy-azure-datadisk"
    expect = json.loads((folder / "case.json").read_text())["expect"]
    subject = ReleasePolicy.from_json((folder / "policy.json").read_bytes())
    assert [item.url for item in subject.authorities] == expect["authorities"]
    claims = json.loads((folder / "claims.json").read_text())
    assert claims["iss"] == expect["token_issuer"]
    assert subject.evaluate(claims["iss"], claims).released is expect["decision_with_token_issuer"]
    first = subject.evaluate(expect["authorities"][0], claims).released
    assert first is expect["decision_if_issuer_were_first_authority"]


def test_strings_stand_for_booleans_as_in_the_vendors_container_sample(vectors: Path) -> None:
    folder = vectors / "attestation" / "akv-import-key-config-aci"
    config = json.loads((folder / "importkeyconfig.json").read_text())
    subject = policy(*config["claims"][0])
    claims = {
        "x-ms-sevsnpvm-hostdata": "<hash-digest-of-the-security-policy>",
        "x-ms-compliance-status": "azure-compliant-uvm",
        "x-ms-sevsnpvm-is-debuggable": False,
        "x-ms-sevsnpvm-vmpl": 0,
    }
    assert subject.evaluate(URL, claims).released
    for name, wrong in (("x-ms-sevsnpvm-is-debuggable", True), ("x-ms-sevsnpvm-vmpl", 1)):
        assert not subject.evaluate(URL, claims | {name: wrong}).released


def test_a_policy_reads_as_one_line() -> None:
    """For reviewers and the audit log: authorities, conditions, groups in parentheses."""
    either = {"anyOf": [{"claim": "b", "less": 3}, {"claim": "c", "exists": True}]}
    one = policy({"claim": "a", "equals": "x\n"}, either)
    assert str(one) == f'{URL}: a equals "x\\n" and (b less 3 or c exists true)'
    two = ReleasePolicy(authorities=one.authorities * 2)
    assert str(two) == f"{one}; or {one}"
