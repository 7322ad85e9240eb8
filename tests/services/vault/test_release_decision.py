"""Whether a key is released: the key, the token, its times, its kind and who signed it."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from decision_parts import (
    AUTHORITY,
    MRENCLAVE,
    NOW,
    SILENT,
    Key,
    claims_of,
    judge,
    put,
    refused,
    signed,
    signer,
    transfer_members,
)

from pyenclave.formats import jose
from pyenclave.formats.jwk import Jwk, public_members


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
    policy = put(SILENT, ("anyOf", 0, "authority"), here)
    before = find("https://localhost:4455")
    back = judge(claims=claims_of(iss=here), policy=policy, find=lambda _a, _k: before)
    assert back.transfer is not None
    for name in (AUTHORITY, "no address"):
        assert judge(find=lambda _a, _k, name=name: find(name)).transfer is not None  # type: ignore[misc]
