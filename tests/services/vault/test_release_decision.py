"""Whether a key is released: each condition, each claim and each part of the policy, changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pyenclave.formats import jose
from pyenclave.formats import release_decision as decision_module
from pyenclave.formats.jwk import Jwk, Jwks, public_members
from pyenclave.formats.release_decision import Decision, Trace, decide

NOW = 1_800_000_000
AUTHORITY = "https://sharedeus.eus.attest.azure.net"
MRENCLAVE = "ab" * 32
MRSIGNER = "cd" * 32

POLICY: dict[str, Any] = {
    "version": "1.0.0",
    "anyOf": [
        {
            "authority": f"{AUTHORITY}/",
            "allOf": [
                {"claim": "x-ms-attestation-type", "equals": "sgx"},
                {"claim": "x-ms-sgx-is-debuggable", "equals": False},
                {"claim": "x-ms-sgx-mrsigner", "equals": MRSIGNER},
                {"claim": "x-ms-sgx-product-id", "equals": 7},
                {"claim": "x-ms-sgx-svn", "greaterOrEquals": 3},
                {"claim": "x-ms-runtime.nonce", "exists": True},
                {
                    "anyOf": [
                        {"claim": "x-ms-sgx-mrenclave", "equals": MRENCLAVE},
                        {"claim": "x-ms-sgx-mrenclave", "equals": "ef" * 32},
                    ]
                },
            ],
        }
    ],
}


@functools.cache
def transfer_members() -> dict[str, Any]:
    """The public key that an enclave made for the release."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return {**public_members(key.public_key()), "kid": "transfer", "key_ops": ["encrypt"]}


def claims_of(**changes: Any) -> dict[str, Any]:
    """What the authority says."""
    return {
        "iss": AUTHORITY,
        "iat": NOW - 10,
        "nbf": NOW - 10,
        "exp": NOW + 3600,
        "jti": "0123",
        "x-ms-ver": "1.0",
        "x-ms-attestation-type": "sgx",
        "x-ms-sgx-is-debuggable": False,
        "x-ms-sgx-mrenclave": MRENCLAVE,
        "x-ms-sgx-mrsigner": MRSIGNER,
        "x-ms-sgx-product-id": 7,
        "x-ms-sgx-svn": 3,
        "x-ms-runtime": {"keys": [transfer_members()], "nonce": "n"},
        **changes,
    }


@functools.cache
def signer() -> ec.EllipticCurvePrivateKey:
    """The authority's key."""
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def jwks() -> Jwks:
    """What the authority shows of it."""
    document = {"keys": [{"kid": "one", "use": "sig", **public_members(signer().public_key())}]}
    return Jwks.from_bytes(json.dumps(document).encode())


def signed(claims: dict[str, Any], **options: Any) -> str:
    """A token of the authority."""
    return jose.sign(claims, **{"key": signer(), "kid": "one", **options})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key's record, as far as it matters here."""

    enabled: bool = True
    not_before: int | None = None
    expires: int | None = None
    exportable: bool = True
    kty: str = "RSA-HSM"
    release_policy: bytes | None = json.dumps(POLICY).encode()


def judge(
    target: str | None = None,
    *,
    claims: dict[str, Any] | None = None,
    policy: Any = None,
    key: Key | None = None,
    find: Callable[[str, str | None], Jwk | None] | None = None,
    **options: Any,
) -> Decision:
    """Decide with everything right but what is given."""
    key = key or Key()
    if policy is not None:
        key = dataclasses.replace(key, release_policy=json.dumps(policy).encode())
    if target is None:
        target = signed(claims_of() if claims is None else claims)
    found = find or (lambda authority, kid: jwks().find(kid) if authority == AUTHORITY else None)
    return decide(key, target, find=found, **{"now": NOW, **options})


def refused(decision: Decision, name: str) -> None:
    """It is not released, for that reason and no other."""
    assert decision.transfer is None
    assert decision.failed is not None
    assert decision.failed.name == name, decision.failed
    assert decision.failed is decision.steps[-1]


def test_what_is_right_is_released() -> None:
    """All others here differ from this one in one thing."""
    decision = judge()
    assert decision.failed is None
    assert decision.transfer is not None
    members = transfer_members()
    assert jose.b64url_encode(decision.transfer.modulus) == members["n"]
    assert decision.transfer.exponent == 65537
    assert decision.transfer.place == "x-ms-runtime.keys"
    assert decision.claims["x-ms-sgx-mrenclave"] == MRENCLAVE
    assert [step.name for step in decision.steps if not step.holds] == []


# ---- the key -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"enabled": False}, "key.enabled"),
        ({"not_before": NOW + 1}, "key.nbf"),
        ({"expires": NOW}, "key.exp"),
        ({"expires": NOW - 1}, "key.exp"),
        ({"exportable": False}, "key.exportable"),
        ({"kty": "RSA"}, "key.kty"),
        ({"kty": "oct"}, "key.kty"),
        ({"release_policy": None}, "key.policy"),
        ({"release_policy": b""}, "policy.grammar"),
        ({"release_policy": b"{}"}, "policy.grammar"),
    ],
)
def test_a_key_that_may_not_be_used_is_not_released(change: dict[str, Any], name: str) -> None:
    """Before the token is looked at: no word about a token can help it."""
    refused(judge("not a token", key=dataclasses.replace(Key(), **change)), name)


def test_a_keys_own_times_have_no_skew() -> None:
    """They are the vault's own clock."""
    assert judge(key=Key(not_before=NOW, expires=NOW + 1)).transfer is not None


# ---- the token's form and issuer ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b",
        "....",
        "a.b.c",
        '{"payload":"","signatures":[]}',
        "é.é.é",
        "x" * 300_000,
        jose.b64url_encode(b'{"alg":"ES256"}') + ".e30.",
        jose.b64url_encode(b'{"alg":"ES256"}') + "." + jose.b64url_encode(b"[]") + ".",
        jose.b64url_encode(b'{"alg":"ES256","crit":["exp"]}') + ".e30.AA",
        jose.b64url_encode(b'{"alg":"ES256","b64":false}') + ".e30.AA",
        jose.b64url_encode(b'{"alg":"ES256","enc":"A256GCM"}') + ".e30.AA",
        jose.b64url_encode(b'{"alg":"ES256","alg":"none"}') + ".e30.AA",
    ],
)
def test_what_is_no_signed_token_is_refused(text: str) -> None:
    """Parts, alphabets, critical parameters, encrypted tokens (JWT-07, JWT-09, JWT-10)."""
    assert judge(text).failed.name in ("token.format", "token.issuer")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "algorithm",
    ["none", "None", "NONE", "nOnE", "", None, 0, [], "HS256", "hs256", "ES256K", "es256"],
)
def test_no_algorithm_but_three_is_accepted(algorithm: object) -> None:
    """JWT-01, JWT-02: also when the signature part is empty or a MAC under the public key."""
    import hashlib
    import hmac

    pem = (
        signer()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    header = jose.b64url_encode(json.dumps({"alg": algorithm, "kid": "one"}).encode())
    payload = jose.b64url_encode(json.dumps(claims_of()).encode())
    data = f"{header}.{payload}"
    mac = hmac.new(pem, data.encode(), hashlib.sha256).digest()
    for signature in ("", jose.b64url_encode(mac), signed(claims_of()).rpartition(".")[2]):
        refused(judge(f"{data}.{signature}"), "token.format")


@pytest.mark.parametrize("name", ["RS384", "PS512", "ES384", "EdDSA"])
def test_other_signatures_are_refused_though_they_hold(name: str) -> None:
    """Attestation services sign with RS256, PS256 or ES256."""
    key: Any = ed25519.Ed25519PrivateKey.generate()
    if name[0] == "E" and name != "EdDSA":
        key = ec.generate_private_key(ec.SECP384R1())
    elif name != "EdDSA":
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    target = signed(claims_of(), key=key, algorithm=name)
    refused(judge(target), "token.algorithm")


@pytest.mark.parametrize(
    ("issuer", "name"),
    [
        (None, "token.issuer"),
        ("", "token.issuer"),
        (7, "token.issuer"),
        ([AUTHORITY], "token.issuer"),
        ("http://sharedeus.eus.attest.azure.net", "token.issuer"),
        (f"{AUTHORITY}//", "token.issuer"),
        (f"{AUTHORITY}/..", "token.issuer"),
        (f"{AUTHORITY}/%2e", "token.issuer"),
        (f"{AUTHORITY}?x", "token.issuer"),
        (f"{AUTHORITY}#x", "token.issuer"),
        (f"{AUTHORITY} ", "token.issuer"),
        (AUTHORITY.upper(), "token.issuer"),
        ("https://SharedEus.eus.attest.azure.net", "token.issuer"),
        ("https://sharedeus.eus.attest.azure.net@evil.example", "token.issuer"),
        ("https://user@sharedeus.eus.attest.azure.net", "token.issuer"),
        ("https://shаredeus.eus.attest.azure.net", "token.issuer"),  # a Cyrillic a
        (AUTHORITY[:-1], "policy.authority"),
        (f"{AUTHORITY}.evil.example", "policy.authority"),
        (f"{AUTHORITY}:443", "policy.authority"),
        (f"{AUTHORITY}:8443", "policy.authority"),
        (f"{AUTHORITY}/x", "policy.authority"),
        ("https://sharedweu.weu.attest.azure.net", "policy.authority"),
        ("https://xn--shredeus-0za.eus.attest.azure.net", "policy.authority"),
    ],
)
def test_an_issuer_is_the_policys_authority_or_none(issuer: object, name: str) -> None:
    """Compared as a whole, after one slash at the end (SKR-04, JWT-06, JWT-16)."""
    refused(judge(claims=claims_of(iss=issuer)), name)


@pytest.mark.parametrize("slash", ["", "/"])
def test_one_slash_at_the_end_makes_no_difference(slash: str) -> None:
    """In the token as in the policy."""
    assert judge(claims=claims_of(iss=AUTHORITY + slash)).transfer is not None


def test_an_authority_that_is_not_configured_is_refused() -> None:
    """Even if the policy names it, and the token brings its own keys."""
    refused(judge(knows=lambda _authority: False), "authority.known")


@pytest.mark.parametrize(
    "kid", [None, "two", "", "../one", "/etc/passwd", "one\0", "' OR 1=1", "k" * 900]
)
def test_a_key_is_found_by_its_name_or_not_at_all(kid: str | None) -> None:
    """JWT-05. Without a name it is the only key there is."""
    options = {"kid": kid} if kid else {"kid": None}
    decision = judge(signed(claims_of(), **options))
    if not kid:
        assert decision.transfer is not None
    else:
        refused(decision, "token.key")


@pytest.mark.parametrize("member", ["jku", "x5u", "jwk", "x5c"])
def test_keys_that_a_token_brings_are_not_looked_at(member: str) -> None:
    """JWT-04: signed with another key that the header tells all about."""
    other = ec.generate_private_key(ec.SECP256R1())
    value: Any = "https://evil.example/keys"
    if member == "jwk":
        value = public_members(other.public_key())
    if member == "x5c":
        value = ["AAAA"]
    target = signed(claims_of(), key=other, header={member: value})
    refused(judge(target), "token.signature")


def test_a_key_signs_by_its_own_algorithm_only() -> None:
    """JWT-03, JWT-08: the key says what it is for, not the header."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pinned = Jwk.from_json({**public_members(key.public_key()), "kid": "one", "alg": "RS256"})
    good = signed(claims_of(), key=key, algorithm="RS256")
    bad = signed(claims_of(), key=key, algorithm="PS256")
    assert judge(good, find=lambda _a, _k: pinned).transfer is not None
    refused(judge(bad, find=lambda _a, _k: pinned), "token.signature")
    refused(judge(find=lambda _a, _k: pinned), "token.signature")  # ES256


def test_any_changed_byte_of_a_signed_token_is_refused() -> None:
    """Header, payload and signature."""
    target = signed(claims_of())
    for at in range(0, len(target), 7):
        if target[at] == ".":
            continue
        other = "A" if target[at] != "A" else "B"
        decision = judge(target[:at] + other + target[at + 1 :])
        assert decision.transfer is None
        failed = decision.failed
        assert failed is not None
        assert failed.name.startswith(("token.", "policy.authority")), failed


# ---- times -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iat", "nbf", "exp"])
@pytest.mark.parametrize("value", [None, "1800003600", True, False, [], {}, 1.5, "drop"])
def test_times_are_whole_seconds_and_all_there(name: str, value: object) -> None:
    """JWT-06, JWT-14."""
    claims = claims_of(**{name: value})
    if value == "drop":
        del claims[name]
    refused(judge(claims=claims), f"token.{name}.type")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"exp": NOW - 60}, "token.exp"),
        ({"exp": NOW - 3600, "iat": NOW - 7200, "nbf": NOW - 7200}, "token.exp"),
        ({"exp": 0, "iat": 0, "nbf": 0}, "token.exp"),
        ({"exp": -1, "iat": -2, "nbf": -2}, "token.exp"),
        ({"nbf": NOW + 61}, "token.nbf"),
        ({"iat": NOW + 61, "exp": NOW + 7200}, "token.iat"),
        ({"iat": NOW + 50, "exp": NOW + 40}, "token.lifetime"),
        ({"iat": NOW - 8 * 86_400}, "token.lifetime"),
        ({"exp": 1 << 62}, "token.lifetime"),
    ],
)
def test_a_token_is_good_at_its_time_only(change: dict[str, Any], name: str) -> None:
    """With sixty seconds for another clock."""
    refused(judge(claims=claims_of(**change)), name)


def test_the_skew_is_bounded() -> None:
    """Five minutes, whatever is configured."""
    claims = claims_of(exp=NOW - 299, iat=NOW - 900, nbf=NOW - 900)
    assert judge(claims=claims, skew=300).transfer is not None
    refused(judge(claims=claims, skew=0), "token.exp")
    with pytest.raises(ValueError, match="0 to 300"):
        judge(skew=301)


# ---- kinds of tokens that are not for this -----------------------------------------------------


@pytest.mark.parametrize("value", [True, "true", 1, None])
def test_the_outcome_of_a_draft_policy_is_refused(value: object) -> None:
    """Signed or not: whoever asked for the token wrote its policy."""
    refused(judge(claims=claims_of(**{"x-pyenclave-draft": value})), "token.draft")


@pytest.mark.parametrize(
    "change",
    [
        {"submods": {"sgx": {"ear.status": "affirming"}}},
        {"submods": None},
        {"eat_profile": "tag:github.com,2023:veraison/ear"},
        {"eat_profile": 7},
    ],
    ids=str,
)
def test_an_attestation_result_is_not_a_token_of_a_policy(change: dict[str, Any]) -> None:
    """An EAR is signed whether the evidence was good or not."""
    refused(judge(claims=claims_of(**change)), "token.kind")


def test_azures_tokens_of_trust_domains_are_accepted() -> None:
    """They are EATs of Microsoft's profile."""
    profile = "https://aka.ms/maa-eat-profile-tdxvm"
    assert judge(claims=claims_of(eat_profile=profile)).transfer is not None


SILENT: dict[str, Any] = {
    "anyOf": [
        {"authority": AUTHORITY, "allOf": [{"claim": "x-ms-sgx-mrsigner", "equals": MRSIGNER}]}
    ]
}


@pytest.mark.parametrize(
    "change",
    [
        {"x-ms-sgx-is-debuggable": True},
        {"x-ms-sgx-is-debuggable": "false"},
        {"x-ms-sgx-is-debuggable": 0},
        {"x-ms-sgx-is-debuggable": None},
        {"is-debuggable": True},
        {"x-ms-sevsnpvm-is-debuggable": True},
        {"tdx_td_attributes_debug": True},
        {"dbgstat": "enabled"},
        {"x-ms-isolation-tee": {"x-ms-sevsnpvm-is-debuggable": True}},
    ],
    ids=str,
)
def test_a_debug_environment_gets_no_key_by_oversight(change: dict[str, Any]) -> None:
    """A policy that does not name the claim does not allow debug; one that does, decides."""
    refused(judge(claims=claims_of(**change), policy=SILENT), "token.debug")


def test_a_policy_may_release_to_debug_by_name() -> None:
    """Its owner wrote so."""
    policy = copy.deepcopy(SILENT)
    condition = {"claim": "x-ms-sgx-is-debuggable", "equals": True}
    policy["anyOf"][0]["allOf"].append(condition)
    claims = claims_of(**{"x-ms-sgx-is-debuggable": True})
    assert judge(claims=claims, policy=policy).transfer is not None
    refused(judge(policy=policy), "policy.claims")


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


def _put(tree: Any, path: tuple[Any, ...], value: Any, *, drop: bool = False) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for name in path[:-1]:
        node = node[name]
    if drop:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


# What may change without any effect on the decision.
FREE = {("jti",), ("x-ms-ver",), ("x-ms-runtime", "keys", 0, "kid")}


def test_every_place_of_the_token_matters_or_is_known_not_to() -> None:
    """Each member, removed and replaced by each type: only the free ones may still release."""
    whole = claims_of()
    for path in _leaves(whole):
        if not path:
            continue
        others = [_put(whole, path, value) for value in ("x", -5, True, None, [], {})]
        if not isinstance(path[-1], int):
            others.append(_put(whole, path, None, drop=True))
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
            decision = judge(policy=_put(POLICY, path, value))
            assert decision.transfer is None, (path, value)
        if isinstance(path[-1], str):
            decision = judge(policy=_put(POLICY, path, None, drop=True))
            assert decision.transfer is None, path
    assert judge(policy=_put(POLICY, ("version",), None, drop=True)).transfer is not None


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
    policy = _put(POLICY, ("anyOf", 0, "allOf", 1, "equals"), "false")
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


# ---- certificates ------------------------------------------------------------------------------


def test_a_certificate_of_another_service_signs_nothing_here() -> None:
    """JWT-16: where a certificate names an instance, it is the authority."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    def find(common_name: str) -> Jwk:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        start = datetime(2026, 1, 1, tzinfo=UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(signer().public_key())
            .serial_number(5)
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=900))
            .sign(signer(), hashes.SHA256())
        )
        import base64

        der = certificate.public_bytes(serialization.Encoding.DER)
        return Jwk.from_json({"kty": "EC", "kid": "one", "x5c": [base64.b64encode(der).decode()]})

    for other in (
        "https://other.attest.azure.net",
        "https://127.0.0.1:4433",
        f"{AUTHORITY}:444",
        "https://[",
    ):
        refused(judge(find=lambda _a, _k, name=other: find(name)), "token.certificate")  # type: ignore[misc]
    # A service of development comes back on another port, with its key.
    here = "https://127.0.0.1:4433"
    policy = _put(SILENT, ("anyOf", 0, "authority"), here)
    before = find("https://localhost:4455")
    back = judge(claims=claims_of(iss=here), policy=policy, find=lambda _a, _k: before)
    assert back.transfer is not None
    for name in (AUTHORITY, "no address"):
        assert judge(find=lambda _a, _k, name=name: find(name)).transfer is not None  # type: ignore[misc]
