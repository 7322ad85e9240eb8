"""Azure Attestation policies: the grammar, its limits, and what each rule means."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.attestation.azure_policy import (
    Claim,
    evaluate,
    policy_hash,
    read_policy,
    types_of,
)
from pyenclave.attestation.azure_policy.claims import Value
from pyenclave.errors import AttestationError

S = "AttestationService"


def text(authorization: str = "=> permit();", issuance: str = "", version: str = "1.2") -> str:
    return (
        f"version={version};\nauthorizationrules {{ {authorization} }};\n"
        f"issuancerules {{ {issuance} }};"
    )


def claims(**values: Value) -> list[Claim]:
    return [Claim(name.replace("_", "-"), value, S) for name, value in values.items()]


def issued(issuance: str, *incoming: Claim) -> list[tuple[str, Value]]:
    outcome = evaluate(read_policy(text(issuance=issuance)), incoming)
    assert outcome.permitted, outcome.reason
    return [(claim.type, claim.value) for claim in outcome.issued]


def refusal(issuance: str, *incoming: Claim) -> str:
    outcome = evaluate(read_policy(text(issuance=issuance)), incoming)
    assert not outcome.permitted
    assert not outcome.issued
    return outcome.reason


# ---- what is not the language -----------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "version=1.0;",
        "version=1.3; authorizationrules { => permit(); }; issuancerules { };",
        "version=01.0; authorizationrules { => permit(); }; issuancerules { };",
        "version=1; authorizationrules { => permit(); }; issuancerules { };",
        "Version=1.0; authorizationrules { => permit(); }; issuancerules { };",
        "version=1.0; issuancerules { }; authorizationrules { => permit(); };",
        "version=1.0; authorizationrules { => permit(); }; issuancerules { }",
        "version=1.0; authorizationrules { => permit(); }; issuancerules { }; x",
        "version=1.0; configurationrules { }; authorizationrules { }; issuancerules { };",
        text('c:[type="x"] => permit();'),
        text('[type=="x"] => permit()'),
        text('[type=="x"] permit();'),
        text("[] => permit();"),
        text('[type=="x",] => permit();'),
        text('[kind=="x"] => permit();'),
        text("[type==1] => permit();"),
        text("[type==true] => permit();"),
        text('[type<"x"] => permit();'),
        text('[issuer>="x"] => permit();'),
        text('[value<"x"] => permit();'),
        text("[value>=true] => permit();"),
        text('[type=="x"] && => permit();'),
        text('[type=="x"] || [type=="y"] => permit();'),
        text("=> permit(1);"),
        text("=> allow();"),
        text('=> issue(type="x", value=1);'),
        text('=> issueproperty(type="omit_x5c", value=true);'),
        text(issuance="=> permit();"),
        text(issuance="=> deny();"),
        text(issuance='=> issue(type="x");'),
        text(issuance="=> issue(value=1);"),
        text(issuance='=> issue(type="x", value=1, type="y");'),
        text(issuance='=> issue(type="", value=1);'),
        text(issuance="=> issue(type=1, value=1);"),
        text(issuance='=> issue(type="x", value=1, issuer="y");'),
        text(issuance="=> issue(claim=c);"),
        text(issuance='=> issue(type="x", value=c.value);'),
        text(issuance='c:[type=="x"] => issue(type="x", value=d.value);'),
        text(issuance='c:[type=="x"] => issue(type="x", value=c.name);'),
        text(issuance='c:[type=="x"] && c:[type=="y"] => issue(claim=c);'),
        text(issuance='[value==c.value] && c:[type=="y"] => issue(claim=c);'),
        text(issuance='!c:[type=="x"] => issue(claim=c);'),
        text(issuance='=> issue(type="x", value=NegateBol(true));'),
        text(issuance='=> issue(type="x", value=NegateBool());'),
        text(issuance='=> issue(type="x", value=NegateBool(true, true));'),
        text(issuance='=> issue(type="x", value=ContainsOnlyValue(100));'),
        text(issuance='=> issue(type="x", value=NegateBool(true);'),
        text(issuance='=> issue(type="x", value=9223372036854775808);'),
        text(issuance='=> issue(type="x", value=' + "9" * 5000 + ");"),
        text(issuance='=> issue(type="x", value="a\nb");'),
        text(issuance='=> issue(type="x", value="a\\n");'),
        text(issuance='=> issue(type="x", value="a);'),
        text(issuance="=> issue(type=\u201cx\u201d, value=1);"),
        text('![type=="x"] => permit();', version="1.1"),
        text(issuance='=> issue(type="x", value=NegateBool(true));', version="1.0"),
        text('c:[type=="x"] => permit();') + "\0",
    ],
)
def test_what_is_not_the_grammar_is_refused_with_its_place(wrong: str) -> None:
    with pytest.raises(AttestationError, match=r"line \d+, column \d+"):
        read_policy(wrong)


def test_an_error_names_line_column_expected_and_found() -> None:
    with pytest.raises(AttestationError) as caught:
        read_policy('version=1.0;\nauthorizationrules {\n  c:[type="x"] => permit();\n};')
    assert "line 3, column 10" in str(caught.value)
    assert caught.value.found == "="
    assert "==" in str(caught.value.expected)


def test_hostile_sizes_end_soon() -> None:
    with pytest.raises(AttestationError, match="too long"):
        read_policy(" " * ((1 << 20) + 1))
    deep = "NegateBool(" * 5000 + "true" + ")" * 5000
    with pytest.raises(AttestationError):
        read_policy(text(issuance=f'=> issue(type="x", value={deep});'))
    with pytest.raises(AttestationError):
        read_policy(text("=> permit();" * 2000))
    with pytest.raises(AttestationError):
        read_policy(text('[type=="x"]' + ' && [type=="x"]' * 100 + "=> permit();"))


def test_claims_cannot_multiply_without_end() -> None:
    doubling = 'c:[type=="x"] => add(type="x", value=c.value);' * 40
    assert "too many claims" in refusal(doubling, Claim("x", 1, S), Claim("x", 2, S))


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(wrong: str) -> None:
    with pytest.raises(AttestationError):
        read_policy(wrong)


@given(st.data())
def test_no_change_of_a_policy_breaks_the_reader(data: st.DataObject) -> None:
    good = text('c:[type=="x", value==1] => permit();', 'c:[type=="x"] => issue(claim=c);')
    at = data.draw(st.integers(0, len(good) - 1))
    piece = data.draw(
        st.sampled_from(["", '"', ";", "c", "[", "=>", "1", "//", "!", "\\", "\u00e9"])
    )
    with contextlib.suppress(AttestationError):
        read_policy(good[:at] + piece + good[at + 1 :])


# ---- authorization ----------------------------------------------------------------------------


def test_without_a_matching_permit_nothing_is_issued() -> None:
    for rules in ("", '[type=="x"] => permit();', '=> add(type="x", value=1);'):
        outcome = evaluate(read_policy(text(rules, '=> issue(type="y", value=1);')), [])
        assert not outcome.permitted
        assert outcome.reason == "no rule permits"
        assert not outcome.issued


@pytest.mark.parametrize("order", ["=> permit(); => deny();", "=> deny(); => permit();"])
def test_a_matching_deny_refuses_wherever_it_stands(order: str) -> None:
    assert not evaluate(read_policy(text(order)), []).permitted


def test_the_documented_sample_holds() -> None:
    policy = read_policy(
        text(
            '[type=="x-ms-sgx-is-debuggable", value==false] && [type=="m", value=="ab"] '
            "=> permit();"
        )
    )
    good = [Claim("x-ms-sgx-is-debuggable", False, S), Claim("m", "ab", S)]
    assert evaluate(policy, good).permitted
    for bad in (
        [Claim("x-ms-sgx-is-debuggable", True, S), good[1]],
        [Claim("x-ms-sgx-is-debuggable", "false", S), good[1]],
        [Claim("x-ms-sgx-is-debuggable", 0, S), good[1]],
        [good[0], Claim("m", "AB", S)],
        good[:1],
        [],
    ):
        assert not evaluate(policy, bad).permitted


def test_a_claim_of_the_attester_is_not_the_services() -> None:
    policy = read_policy(text('[type=="x", value==1, issuer=="AttestationService"] => permit();'))
    assert evaluate(policy, [Claim("x", 1, S)]).permitted
    assert not evaluate(policy, [Claim("x", 1)]).permitted
    with pytest.raises(ValueError, match="AttestationPolicy"):
        evaluate(policy, [Claim("x", 1, "AttestationPolicy")])


def test_added_claims_are_seen_by_later_rules_only() -> None:
    late = '[type=="a"] => permit(); => add(type="a", value=1);'
    early = '=> add(type="a", value=1); [type=="a", issuer=="AttestationPolicy"] => permit();'
    assert not evaluate(read_policy(text(late)), []).permitted
    assert evaluate(read_policy(text(early)), []).permitted


@given(st.integers(-9, 9), st.integers(-9, 9))
def test_integers_compare_as_integers(have: int, wanted: int) -> None:
    for sign, holds in (
        ("==", have == wanted),
        ("!=", have != wanted),
        ("<", have < wanted),
        ("<=", have <= wanted),
        (">", have > wanted),
        (">=", have >= wanted),
    ):
        policy = read_policy(text(f'[type=="x", value{sign}{wanted}] => permit();'))
        assert evaluate(policy, claims(x=have)).permitted is holds


def test_values_of_two_types_are_never_equal_nor_ordered() -> None:
    for have in ("1", True, "true"):
        policy = read_policy(text('[type=="x", value==1] => permit();'))
        assert not evaluate(policy, claims(x=have)).permitted
        policy = read_policy(text('[type=="x", value<=1] => permit();'))
        assert not evaluate(policy, claims(x=have)).permitted


def test_a_condition_may_refer_to_what_an_earlier_one_found() -> None:
    policy = read_policy(
        text(
            'a:[type=="os", issuer=="CustomClaim"] && '
            'b:[type=="os", issuer=="AttestationService", value==a.value] => permit();',
            'a:[type=="os", issuer=="CustomClaim"] && '
            'b:[type=="os", issuer=="AttestationService", value==a.value] => issue(claim=b);',
        )
    )
    outcome = evaluate(policy, [Claim("os", "x"), Claim("os", "x", S), Claim("os", "y", S)])
    assert outcome.permitted
    assert outcome.issued == (Claim("os", "x", S),)
    assert not evaluate(policy, [Claim("os", "z"), Claim("os", "x", S)]).permitted


def test_not_looks_for_absence() -> None:
    policy = read_policy(text('![type=="x", value==1] => permit();'))
    assert evaluate(policy, claims(x=2)).permitted
    assert not evaluate(policy, claims(x=1, y=2)).permitted


# ---- issuance ---------------------------------------------------------------------------------


def test_issue_names_new_claims_and_whole_ones() -> None:
    assert issued(
        'c:[type=="a"] => issue(type="b", value=c.value); c:[type=="a"] => issue(claim=c);'
        '=> issue(type="n", value=-5, valueType="Integer"); => issue(type="s", value="q\\"\\\\");',
        Claim("a", "v", S),
    ) == [("b", "v"), ("a", "v"), ("n", -5), ("s", 'q"\\')]


def test_value_type_must_be_the_type_of_the_value() -> None:
    assert "valueType" in refusal('=> issue(type="n", value=5, valueType="String");')


def test_properties_of_the_token_are_known_and_bounded() -> None:
    policy = read_policy(
        text(
            issuance='=> issueproperty(type="report_validity_in_minutes", value=60);'
            '=> issueproperty(type="omit_x5c", value=true);'
        )
    )
    outcome = evaluate(policy, [])
    assert outcome.properties == {"report_validity_in_minutes": 60, "omit_x5c": True}
    assert not outcome.issued
    for wrong in ("0", "525601", "true", '"60"'):
        refusal(f'=> issueproperty(type="report_validity_in_minutes", value={wrong});')
    assert "no such property" in refusal('=> issueproperty(type="other", value=1);')


def test_configuration_rules_set_properties_of_the_engine() -> None:
    policy = read_policy(
        'version=1.1; configurationrules { => issueproperty(type="required_pcr_mask", value=15); '
        '=> issueproperty(type="require_valid_aik_cert", value=false); }; '
        "authorizationrules { => permit(); }; issuancerules { };"
    )
    outcome = evaluate(policy, [])
    assert outcome.configuration == {"required_pcr_mask": 15, "require_valid_aik_cert": False}


def test_comments_and_white_space_mean_nothing() -> None:
    assert evaluate(read_policy(text("// who => deny();\n => permit(); // all\n")), []).permitted


# ---- functions --------------------------------------------------------------------------------


def test_functions_do_what_is_documented() -> None:
    pytest.importorskip("jmespath")
    assert issued('=> issue(type="r", value=JmesPath("{\\"foo\\": \\"bar\\"}", "foo"));') == [
        ("r", '"bar"')
    ]
    assert issued(
        'a:[type=="j"] && b:[type=="q"] => issue(type="r", value=JmesPath(a.value, b.value));',
        Claim("j", '{"values": [0,1,2,3,4]}', S),
        Claim("q", "values[2]", S),
    ) == [("r", "2")]
    for json_text, value in (("100", 100), ("true", True), ('"abc"', "abc")):
        assert issued(
            'c:[type=="j"] => issue(type="r", value=JsonToClaimValue(c.value));',
            Claim("j", json_text, S),
        ) == [("r", value)]
    assert issued(
        'c:[type=="j"] => issue(type="r", value=JsonToClaimValue(c.value));',
        Claim("j", '[0, "abc", true, null]', S),
    ) == [("r", 0), ("r", "abc"), ("r", True)]
    assert (
        issued(
            'c:[type=="j"] => issue(type="r", value=JsonToClaimValue(c.value));',
            Claim("j", "null", S),
        )
        == []
    )
    assert issued('=> issue(type="r", value=AppendString("abc", "xyz"));') == [("r", "abcxyz")]
    assert issued('=> issue(type="r", value=NegateBool(true));') == [("r", False)]


@pytest.mark.parametrize(
    "call",
    [
        'JmesPath("", "a")',
        'JmesPath("{", "a")',
        'JmesPath("{}", "")',
        'JmesPath("{}", "[")',
        'JmesPath("{}", "nosuch(@)")',
        'JmesPath("{\\"a\\":1,\\"a\\":2}", "a")',
        "JmesPath(1, 2)",
        'JsonToClaimValue("1.5")',
        'JsonToClaimValue("{}")',
        'JsonToClaimValue("[[1]]")',
        'JsonToClaimValue("nothing")',
        "NegateBool(1)",
        'NegateBool("true")',
        'AppendString("a", 1)',
    ],
)
def test_an_error_in_a_function_refuses_the_evidence(call: str) -> None:
    assert "failed" in refusal(f'=> issue(type="r", value={call});')


@given(st.lists(st.sampled_from([1, True, "1"])), st.lists(st.sampled_from([1, True, "1"])))
def test_sets_are_sets_of_typed_values(left: list[Value], right: list[Value]) -> None:
    incoming = [Claim("l", v, S) for v in left] + [Claim("r", v, S) for v in right]
    found = issued(
        'a:[type=="l"] && b:[type=="r"] => issue(type="s", value=IsSubsetOf(a.value, b.value));'
        'a:[type=="l"] => issue(type="o", value=ContainsOnlyValue(a.value, true));',
        *incoming,
    )
    typed_left = {(type(v), v) for v in left}
    expected: list[tuple[str, Value]] = []
    if left and right:
        expected.append(("s", typed_left <= {(type(v), v) for v in right}))
    if left:
        expected.append(("o", typed_left == {(bool, True)}))
    assert [(t, type(v), v) for t, v in found] == [(t, type(v), v) for t, v in expected]


def test_what_is_read_only_may_be_compared_but_not_issued() -> None:
    pcrs = Claim("pcrs", '{"PCRs":[{"Index":0,"Digests":{"SHA1":"KCk6Ow"}}]}', S, read_only=True)
    assert "read-only" in refusal('c:[type=="pcrs"] => issue(claim=c);', pcrs)
    pytest.importorskip("jmespath")
    made = 'c:[type=="pcrs"] => issue(type="r", value=JmesPath(c.value, "PCRs[0].Index"));'
    assert "read-only" in refusal(made, pcrs)
    matches = (
        'c:[type=="pcrs", issuer=="AttestationService"] && c1:[type=="want", '
        "value==JsonToClaimValue(JmesPath(c.value, "
        '"PCRs[? Index == `0`].Digests.SHA1 | @[0] == `\\"KCk6Ow\\"`"))] => issue(claim=c1);'
    )
    assert issued(matches, pcrs, Claim("want", True, S)) == [("want", True)]


def test_the_documented_secure_boot_rules_work() -> None:
    pytest.importorskip("jmespath")
    rules = """
    c:[type == "events", issuer=="AttestationService"] => add(type = "efiConfigVariables",
      value = JmesPath(c.value, "Events[?EventTypeString == 'EV_EFI_VARIABLE_DRIVER_CONFIG' &&
      ProcessedData.VariableGuid == '8BE4DF61-93CA-11D2-AA0D-00E098032B8C']"));
    c:[type=="efiConfigVariables", issuer=="AttestationPolicy"]=> issue(type = "secureBootEnabled",
      value = JsonToClaimValue(JmesPath(c.value, "[?ProcessedData.UnicodeName == 'SecureBoot'] |
      length(@) == `1` && @[0].ProcessedData.VariableData == 'AQ'")));
    ![type=="secureBootEnabled", issuer=="AttestationPolicy"] =>
      issue(type="secureBootEnabled", value=false);
    """.replace("\n      ", " ")

    def events(data: str) -> Claim:
        return Claim(
            "events",
            '{"Events":[{"EventTypeString":"EV_EFI_VARIABLE_DRIVER_CONFIG","ProcessedData":'
            '{"VariableGuid":"8BE4DF61-93CA-11D2-AA0D-00E098032B8C","UnicodeName":"SecureBoot",'
            f'"VariableData":"{data}"}}}}]}}',
            S,
        )

    assert issued(rules, events("AQ")) == [("secureBootEnabled", True)]
    assert issued(rules, events("AA")) == [("secureBootEnabled", False)]
    assert issued(rules) == [("secureBootEnabled", False)]


def test_the_hash_of_a_policy_is_that_of_its_encoded_text() -> None:
    import base64
    import hashlib

    policy = text()
    inner = base64.urlsafe_b64encode(policy.encode()).decode().rstrip("=")
    digest = hashlib.sha256(inner.encode()).digest()
    assert policy_hash(policy) == base64.urlsafe_b64encode(digest).decode().rstrip("=")


# ---- which rules fired ------------------------------------------------------------------------


def test_the_trace_names_every_rule_that_fired_with_its_place() -> None:
    policy = read_policy(
        "version=1.0;\nauthorizationrules\n{\n"
        '  [type=="a", value==1] => add(type="m", value=true);\n'
        '  [type=="b"] => deny(); [type=="m"] => permit();\n'
        "};\nissuancerules\n{\n"
        '    [type=="m"] => issue(type="x", value=1);\n'
        '    => issueproperty(type="omit_x5c", value=true);\n};'
    )
    outcome = evaluate(policy, claims(a=1))
    assert [str(fired) for fired in outcome.trace] == [
        "authorization 4:3 add",
        "authorization 5:26 permit",
        "issuance 9:5 issue",
        "issuance 10:5 issueproperty",
    ]
    assert outcome.decided == outcome.trace[1]


def test_a_refusal_has_its_trace_too() -> None:
    denied = evaluate(read_policy(text("=> permit(); => deny();")), [])
    assert [fired.action for fired in denied.trace] == ["permit", "deny"]
    assert denied.decided == denied.trace[1]
    nothing = evaluate(read_policy(text('[type=="x"] => permit();')), [])
    assert (nothing.trace, nothing.decided) == ((), None)
    failed = evaluate(read_policy(text(issuance='=> issueproperty(type="no", value=1);')), [])
    assert not failed.permitted
    assert [fired.section for fired in failed.trace] == ["authorization", "issuance"]


def test_the_types_that_a_policy_can_look_at_are_all_it_needs() -> None:
    rules = '[type=="a", value==1] && ![value=="x", type=="b"] => permit();'
    assert types_of(read_policy(text(rules))) == {"a", "b"}
    for any_type in ("[value==1] => permit();", '[type!="a"] => permit();'):
        assert types_of(read_policy(text(any_type))) is None
    bound = 'c:[type=="a"] && [type==c.value] => permit();'
    assert types_of(read_policy(text(bound))) is None
    assert types_of(read_policy(text())) == frozenset()
