"""Whether a key is released: each condition, each claim and each part of the policy, changed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from decision_parts import (
    AUTHORITY,
    MRENCLAVE,
    NOW,
    POLICY,
    SILENT,
    Key,
    claims_of,
    judge,
    jwks,
    put,
    refused,
    signed,
    transfer_members,
)

from pyenclave.formats import jose
from pyenclave.formats import release_decision as decision_module
from pyenclave.formats.jwk import Jwk, public_members
from pyenclave.formats.release_decision import Trace

# ---- the claims, each changed ------------------------------------------------------------------


JUDGED = (
    "x-ms-attestation-type",
    "x-ms-sgx-is-debuggable",
    "x-ms-sgx-mrenclave",
    "x-ms-sgx-mrsigner",
    "x-ms-sgx-product-id",
    "x-ms-sgx-svn",
)
WRONG: tuple[Any, ...] = ("", "other", True, 0, 1, 2, -1, 1.5, None, [], {}, [MRENCLAVE])


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("strict", [False, True])
def test_each_claim_that_the_policy_names_is_judged(name: str, strict: bool) -> None:
    """Removed, of every other type, and of another value; the auditor sees expected and found."""
    others = [value for value in WRONG if not (value == claims_of()[name] and value is not None)]
    for value in others:
        if name == "x-ms-sgx-is-debuggable" and value == 0 and type(value) is int:
            continue  # compared below: 0 is not false
        decision = judge(claims=claims_of(**{name: value}), strict=strict)
        refused(decision, "policy.claims")
        failed = decision.failed
        assert failed is not None
        assert any(name in reason for reason in failed.expected)
        assert failed.found[name] == value
        assert type(failed.found[name]) is type(value)
    claims = claims_of()
    del claims[name]
    decision = judge(claims=claims, strict=strict)
    refused(decision, "policy.claims")
    assert decision.failed is not None
    assert decision.failed.found[name] == "(absent or ambiguous)"


def test_zero_is_not_false_and_one_is_not_true() -> None:
    """SKR-01: exact types."""
    for value in (0, 0.0, "", None):
        refused(judge(claims=claims_of(**{"x-ms-sgx-is-debuggable": value})), "policy.claims")
    refused(judge(claims=claims_of(**{"x-ms-sgx-product-id": "7"})), "policy.claims")
    refused(judge(claims=claims_of(**{"x-ms-sgx-svn": "3"})), "policy.claims")


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    yield path
    for name, value in items:
        yield from _leaves(value, (*path, name))


# What may change without any effect on the decision.
FREE = {("jti",), ("x-ms-ver",), ("x-ms-runtime", "keys", 0, "kid")}


def test_every_place_of_the_token_matters_or_is_known_not_to() -> None:
    """Each member, removed and replaced by each type: only the free ones may still release."""
    whole = claims_of()
    for path in _leaves(whole):
        if not path:
            continue
        others = [put(whole, path, value) for value in ("x", -5, True, None, [], {})]
        if not isinstance(path[-1], int):
            others.append(put(whole, path, None, drop=True))
        for claims in others:
            decision = judge(claims=claims)
            if path in FREE or (path == ("nbf",) and claims.get("nbf") == -5):
                assert decision.transfer is not None, path
            elif path == ("x-ms-runtime", "nonce"):
                assert (decision.transfer is not None) == ("nonce" in claims["x-ms-runtime"])
            elif path[-1] in ("n", "e") and decision.transfer is not None:
                pytest.fail(f"{path}: {claims['x-ms-runtime']}")
            else:
                assert decision.transfer is None, (path, claims)


# The branch of the anyOf that is not taken: it may be any other condition.
_OTHER = ("anyOf", 0, "allOf", 6, "anyOf", 1)
ALTERNATIVE = {(*_OTHER, "claim"), (*_OTHER, "equals")}


# ---- the policy, each part changed -------------------------------------------------------------


def test_every_part_of_the_policy_matters() -> None:
    """Each value, name, operator and list: changed it refuses the token, or is no policy."""
    for path in _leaves(POLICY):
        if not path or path == ("version",):
            continue
        if path in ALTERNATIVE:
            continue
        for value in ("x", 1e308, None, [], {}):
            decision = judge(policy=put(POLICY, path, value))
            assert decision.transfer is None, (path, value)
        if isinstance(path[-1], str):
            decision = judge(policy=put(POLICY, path, None, drop=True))
            assert decision.transfer is None, path
    assert judge(policy=put(POLICY, ("version",), None, drop=True)).transfer is not None


@pytest.mark.parametrize(
    "policy",
    [
        {"anyOf": []},
        {"anyOf": [{"authority": AUTHORITY}]},
        {"anyOf": [{"authority": AUTHORITY, "allOf": []}]},
        {"anyOf": [{"authority": AUTHORITY, "anyOf": []}]},
        {"anyOf": [{"authority": AUTHORITY, "allOf": [{}]}]},
        {"anyOf": [{"authority": AUTHORITY, "allOf": [{"claim": "jti"}]}]},
        {"anyOf": [{"authority": AUTHORITY, "allOf": [{"claim": "jti", "like": "0"}]}]},
        {"anyOf": [{"authority": AUTHORITY, "allOf": [{"claim": "jti", "equals": None}]}]},
        {"anyOf": [{"authority": AUTHORITY, "allOf": [{"claim": "jti", "exists": 1}]}]},
        {"anyOf": [{"authority": AUTHORITY, "allof": [{"claim": "jti", "exists": True}]}]},
        {"anyOf": [{"allOf": [{"claim": "jti", "exists": True}]}]},
        {"allOf": [{"authority": AUTHORITY, "allOf": [{"claim": "jti", "exists": True}]}]},
        {"version": "2.0.0", **{name: POLICY[name] for name in ("anyOf",)}},
        {**POLICY, "comment": "x"},
    ],
    ids=str,
)
def test_what_the_grammar_does_not_know_refuses_the_whole(policy: dict[str, Any]) -> None:
    """SKR-03: empty lists, unknown operators and members."""
    refused(judge(policy=policy), "policy.grammar")


@pytest.mark.parametrize("operator", ["notEquals", "equals", "less", "greater", "lessOrEquals"])
def test_a_missing_claim_is_no_match_whatever_the_operator(operator: str) -> None:
    """SKR-02: also for notEquals."""
    condition = {"claim": "x-ms-absent.member", operator: 5}
    policy = {"anyOf": [{"authority": AUTHORITY, "allOf": [condition]}]}
    refused(judge(policy=policy), "policy.claims")


def test_two_readings_of_a_dotted_name_are_none() -> None:
    """SKR-02: a member with a dot in its name beside a nested one."""
    policy = {"anyOf": [{"authority": AUTHORITY, "allOf": [{"claim": "a.b", "equals": 1}]}]}
    assert judge(claims=claims_of(a={"b": 1}), policy=policy).transfer is not None
    assert judge(claims=claims_of(**{"a.b": 1}), policy=policy).transfer is not None
    both = claims_of(**{"a": {"b": 2}, "a.b": 1})
    refused(judge(claims=both, policy=policy), "policy.claims")


def test_strings_stand_for_booleans_unless_it_is_strict() -> None:
    """The vendor's own samples have them; a strict vault refuses such a policy."""
    policy = put(POLICY, ("anyOf", 0, "allOf", 1, "equals"), "false")
    assert judge(policy=policy).transfer is not None
    refused(judge(policy=policy, strict=True), "policy.grammar")


# ---- the transfer key --------------------------------------------------------------------------


def _with_key(**changes: Any) -> dict[str, Any]:
    members = {**transfer_members(), **changes}
    members = {name: value for name, value in members.items() if value is not ...}
    return claims_of(**{"x-ms-runtime": {"keys": [members], "nonce": "n"}})


def _modulus(bits: int, last: int = 1) -> str:
    number = ((1 << bits) - 2) | last
    return jose.b64url_encode(number.to_bytes((bits + 7) // 8, "big"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kty": "EC"}, "transfer.key"),
        ({"kty": "rsa"}, "transfer.key"),
        ({"kty": ...}, "transfer.key"),
        ({"key_ops": ["verify"]}, "transfer.key"),
        ({"key_ops": "decrypt"}, "transfer.key"),
        ({"key_ops": "encrypted"}, "transfer.key"),
        ({"key_ops": ["en", "crypt"]}, "transfer.key"),
        ({"key_ops": ...}, "transfer.key"),
        ({"key_ops": ..., "use": "sig"}, "transfer.key"),
        ({"key_ops": {"encrypt": True}}, "transfer.key"),
        ({"d": "AQAB"}, "transfer.public"),
        ({"p": "AQAB"}, "transfer.public"),
        ({"n": ...}, "transfer.form"),
        ({"n": 5}, "transfer.form"),
        ({"n": "AA=="}, "transfer.form"),
        ({"n": "+/+/"}, "transfer.form"),
        ({"n": jose.b64url_encode(b"\0" + bytes([255]) * 256)}, "transfer.form"),
        ({"n": _modulus(1024)}, "transfer.modulus"),
        ({"n": _modulus(2047)}, "transfer.modulus"),
        ({"n": _modulus(2048, last=0)}, "transfer.modulus"),
        ({"n": _modulus(16384)}, "transfer.modulus"),
        ({"e": ""}, "transfer.form"),
        ({"e": ...}, "transfer.form"),
        ({"e": "AAEAAQ"}, "transfer.form"),
        ({"e": "AQ"}, "transfer.exponent"),
        ({"e": "Aw"}, "transfer.exponent"),
        ({"e": "EQ"}, "transfer.exponent"),
        ({"e": "AQAC"}, "transfer.exponent"),
        ({"e": jose.b64url_encode(b"\x01" + bytes(8) + b"\x01")}, "transfer.exponent"),
    ],
    ids=str,
)
def test_a_transfer_key_is_strong_and_meant_for_it(change: dict[str, Any], name: str) -> None:
    """SKR-05, SKR-06: out of the verified token, at least 2,048 bits, e from 65,537."""
    refused(judge(claims=_with_key(**change)), name)


@pytest.mark.parametrize(
    "runtime",
    [None, [], "x", {}, {"keys": None}, {"keys": {}}, {"keys": []}, {"keys": ["x", None, 5]}],
    ids=str,
)
def test_without_a_transfer_key_nothing_is_released(runtime: object) -> None:
    """Also if the policy is content with everything else."""
    refused(judge(claims=claims_of(**{"x-ms-runtime": runtime}), policy=SILENT), "transfer.key")


@pytest.mark.parametrize(
    "change",
    [
        {"key_ops": "encrypt"},
        {"key_ops": ["encrypt", "wrapKey"]},
        {"key_ops": ..., "use": "enc"},
        {"key_ops": ..., "key_use": "enc"},
    ],
    ids=str,
)
def test_every_way_to_say_encrypt_is_understood(change: dict[str, Any]) -> None:
    """Public clients write text, the paravisor a list."""
    assert judge(claims=_with_key(**change)).transfer is not None


def test_the_first_key_counts_even_if_the_next_is_better() -> None:
    """No choice is left to whoever made the list."""
    weak = {**transfer_members(), "n": _modulus(1024)}
    claims = claims_of(**{"x-ms-runtime": {"keys": [weak, transfer_members()], "nonce": "n"}})
    refused(judge(claims=claims), "transfer.modulus")
    many = claims_of(**{"x-ms-runtime": {"keys": [{}] * 17, "nonce": "n"}})
    refused(judge(claims=many), "transfer.count")


def test_a_guests_key_stands_before_the_paravisors(vectors: Path) -> None:
    """Azure's own sample: a confidential VM under Microsoft's public policy."""
    folder = vectors / "attestation" / "akv-release-policy-azure-datadisk"
    claims = json.loads((folder / "claims.json").read_text())
    policy = json.loads((folder / "policy.json").read_text())
    at = claims["iat"] + 60

    def find(_authority: str, kid: str | None) -> Jwk | None:
        return jwks().find(kid)

    # Its authority is not one of the policy's.
    refused(judge(claims=claims, policy=policy, find=find, now=at), "policy.authority")
    claims["iss"] = "https://sharedeus.eus.attest.azure.net"
    decision = judge(claims=claims, policy=policy, find=find, now=at)
    assert decision.transfer is not None
    assert decision.transfer.kid == "TpmEphemeralEncryptionKey"
    del claims["x-ms-runtime"]
    decision = judge(claims=claims, policy=policy, find=find, now=at)
    assert decision.transfer is not None
    assert decision.transfer.place == "x-ms-isolation-tee.x-ms-runtime.keys"
    for name, value in (
        ("x-ms-attestation-type", "vbs"),
        ("x-ms-compliance-status", "azure-non-compliant-cvm"),
    ):
        other = copy.deepcopy(claims)
        other["x-ms-isolation-tee"][name] = value
        refused(judge(claims=other, policy=policy, find=find, now=at), "policy.claims")


# ---- the conditions themselves -----------------------------------------------------------------


_SECOND = {"token.algorithm": "token.signature", "policy.authority": "policy.claims"}


def _p384() -> dict[str, Any]:
    key = ec.generate_private_key(ec.SECP384R1())
    jwk = Jwk.from_json({**public_members(key.public_key()), "kid": "one"})
    return {"target": signed(claims_of(), key=key), "find": lambda _a, _k: jwk}


_ONE_BAD_THING: dict[str, Callable[[], Any]] = {
    "key.enabled": lambda: {"key": Key(enabled=False)},
    "key.nbf": lambda: {"key": Key(not_before=NOW + 1)},
    "key.exp": lambda: {"key": Key(expires=NOW)},
    "key.exportable": lambda: {"key": Key(exportable=False)},
    "key.kty": lambda: {"key": Key(kty="RSA")},
    "policy.authority": lambda: {
        "claims": claims_of(iss="https://other.example"),
        "find": lambda _a, kid: jwks().find(kid),
    },
    "authority.known": lambda: {"knows": lambda _authority: False},
    "token.algorithm": _p384,
    "token.signature": lambda: {
        "target": signed(claims_of(), key=ec.generate_private_key(ec.SECP256R1()))
    },
    "token.exp": lambda: {"claims": claims_of(exp=NOW - 60, iat=NOW - 90, nbf=NOW - 90)},
    "token.nbf": lambda: {"claims": claims_of(nbf=NOW + 61)},
    "token.iat": lambda: {"claims": claims_of(iat=NOW + 61)},
    "token.lifetime": lambda: {"claims": claims_of(exp=1 << 40)},
    "token.draft": lambda: {"claims": claims_of(**{"x-pyenclave-draft": True})},
    "token.evidence_time": lambda: {
        "claims": claims_of(**{"x-pyenclave-evidence-time": "2024-01-01T00:00:00+00:00"})
    },
    "token.kind": lambda: {"claims": claims_of(submods={})},
    "token.debug": lambda: {"claims": claims_of(**{"is-debuggable": True})},
    "policy.claims": lambda: {"claims": claims_of(**{"x-ms-sgx-svn": 2})},
    "transfer.count": lambda: {
        "claims": claims_of(
            **{"x-ms-runtime": {"keys": [transfer_members()] + [{}] * 16, "nonce": "n"}}
        )
    },
    "transfer.public": lambda: {"claims": _with_key(d="AQAB")},
    "transfer.modulus": lambda: {"claims": _with_key(n=_modulus(1024))},
    "transfer.exponent": lambda: {"claims": _with_key(e="Aw")},
}
# What stands behind a check of form, or gives the value that the next one needs.
_OF_FORM = {
    "key.policy",
    "policy.grammar",
    "token.format",
    "token.issuer",
    "token.key",
    "token.certificate",
    "token.exp.type",
    "token.nbf.type",
    "token.iat.type",
    "transfer.key",
    "transfer.form",
}


@pytest.mark.parametrize("name", sorted(_ONE_BAD_THING))
def test_without_its_condition_each_bad_thing_would_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No condition is a shadow of another one; two have a second line behind them."""
    refused(judge(**_ONE_BAD_THING[name]()), name)
    need = Trace.need

    def all_but_one(self: Trace, step: str, holds: bool, **options: Any) -> None:
        need(self, step, holds or step == name, **options)

    monkeypatch.setattr(Trace, "need", all_but_one)
    decision = judge(**_ONE_BAD_THING[name]())
    if name in _SECOND:
        refused(decision, _SECOND[name])
    else:
        assert decision.transfer is not None, decision.failed


def test_every_condition_is_tried() -> None:
    """Those that the code has are those that are tried here."""
    source = Path(decision_module.__file__).read_text(encoding="utf-8")
    called = set(re.findall(r"trace\.(?:need|failed)\(\s*f?\"([^\"]+)\"", source))
    called |= {f"token.{name}.type" for name in ("exp", "nbf", "iat")}
    called -= {"token.{name}.type"}
    assert called == set(_ONE_BAD_THING) | _OF_FORM
