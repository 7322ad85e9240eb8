"""Whoever writes a policy decides what it costs: the budget of an evaluation."""

from __future__ import annotations

import pytest

from pyenclave.attestation.azure_policy import Claim, evaluate, read_policy

_CLAIM = Claim("s", "{}", "AttestationService")


def _run(rules: str) -> tuple[bool, str]:
    text = f"version=1.2;\nconfigurationrules{{}};\nauthorizationrules{{\n{rules}\n=> permit();}};"
    outcome = evaluate(read_policy(text + "issuancerules{};"), [_CLAIM])
    return outcome.permitted, outcome.reason


def _query(query: str, document: str = "c.value") -> str:
    return f'c:[type=="s"] => add(type="q", value=JmesPath({document},"{query}"));'


@pytest.mark.parametrize(
    "query",
    [
        "|".join(["[@,@]"] * 60),
        "|".join(["[@,@][]"] * 60),
        "|".join(["[@,@]"] * 60) + "|to_string(@)",
        "|".join(["{a:@,b:@}"] * 60),
        "|".join(["[@,@]"] * 60) + "|[@==@,@]",
        "to_number('" + "9" * 3800 + "')|" + "|".join(["[@,@]"] * 16),
    ],
)
def test_a_query_that_doubles_is_refused_by_its_line(query: str) -> None:
    pytest.importorskip("jmespath")
    permitted, reason = _run(_query(query))
    assert not permitted
    assert "line 4 failed: JmesPath: the query " in reason
    assert " too m" in reason


def test_a_joined_text_is_counted_before_it_is_made() -> None:
    pytest.importorskip("jmespath")
    items = ",".join(["''"] * 900)
    steps = "|".join([f"join(@,[{items}])"] * 3)
    permitted, reason = _run(_query("to_string(@)|" + steps, "c.value"))
    assert not permitted
    assert "JmesPath" in reason


def test_small_queries_are_answered() -> None:
    pytest.importorskip("jmespath")
    assert _run(_query("[@,@]|[@,@]|length(@)"))[0]


def test_strings_that_double_are_refused() -> None:
    rules = ['c:[type=="s"] => add(type="a0", value=AppendString(c.value,"xy"));']
    rules += [
        f'c:[type=="a{n}"] => add(type="a{n + 1}", value=AppendString(c.value,c.value));'
        for n in range(24)
    ]
    permitted, reason = _run("\n".join(rules))
    assert not permitted
    assert "the policy makes too much" in reason


def test_claims_that_share_a_long_string_are_counted_each() -> None:
    rules = ['c:[type=="s"] => add(type="a0", value=AppendString(c.value,"xy"));']
    rules += [
        f'c:[type=="a{n}"] => add(type="a{n + 1}", value=AppendString(c.value,c.value));'
        for n in range(14)
    ]
    rules += [f'c:[type=="a14"] => add(type="b{n}", value=c.value);' for n in range(90)]
    assert "the policy makes too much" in _run("\n".join(rules))[1]


def test_comparisons_of_many_with_many_are_refused() -> None:
    def add(name: str, first: int) -> str:
        numbers = ",".join(str(n) for n in range(first, first + 2030))
        return f'=> add(type="{name}", value=JsonToClaimValue("[{numbers}]"));'

    rules = [add("n", 0), add("m", 5000)]
    rules.append('c:[type=="n"] && d:[type!="z", value!=c.value] => add(type="zz", value=1);')
    permitted, reason = _run("\n".join(rules))
    assert not permitted
    assert "line 6 failed: the policy compares too much" in reason
