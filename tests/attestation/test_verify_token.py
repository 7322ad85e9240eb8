"""Hostile tokens: what a token says of its own key, issuer and time is not believed (JWT)."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_token import (
    AT,
    EAR_KEY,
    FORGED,
    GONE,
    ISSUER,
    MRENCLAVE,
    NONCE,
    NOW,
    ear_claims,
    judge,
    keys_of,
    maa_claims,
    make_certificate,
    token,
    without,
)

from pyenclave.attestation import AppraisalPolicy
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose
from pyenclave.formats.jose import b64url_encode
from pyenclave.formats.jwk import public_members


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def test_a_token_of_a_given_key_is_accepted_and_fresh() -> None:
    result = judge(token(ear_claims()))
    assert result.refused_by == ()
    assert result.accepted
    assert result.fresh
    assert result.claims["key_source"] == "given"


@pytest.mark.parametrize("name", ["none", "None", "NONE", "HS256", ""])
def test_jwt_01_a_token_without_a_signature_is_refused(name: str) -> None:
    for signature in ("", "AA"):
        parts = [json.dumps({"alg": name, "kid": "one"}), json.dumps(ear_claims())]
        text = ".".join([*(b64url_encode(part.encode()) for part in parts), signature])
        result = judge(text.encode())
        assert "token.format" in result.refused_by
        assert not result.genuine


def test_jwt_03_the_algorithm_of_the_given_key_counts(rsa_key: rsa.RSAPrivateKey) -> None:
    for algorithm in ("RS256", "PS256"):
        data = token(ear_claims(), key=rsa_key, algorithm=algorithm)
        assert judge(data, endorsements=keys_of(rsa_key)).genuine
        narrowed = judge(data, endorsements=keys_of(rsa_key, alg="RS512"))
        assert narrowed.refused_by == ("token.signature",)
    assert judge(token(ear_claims(), key=rsa_key)).refused_by == ("token.signature",)


def forged_headers() -> dict[str, dict[str, Any]]:
    certificate = make_certificate("forged", FORGED)
    encoded = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
    return {
        "jwk": {"jwk": public_members(FORGED.public_key())},
        "jku": {"jku": "https://evil.example/certs"},
        "x5u": {"x5u": "https://evil.example/chain.pem"},
        "x5c": {"x5c": [encoded]},
        "jwk with x5c": {"jwk": {**public_members(FORGED.public_key()), "x5c": [encoded]}},
    }


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "jwk with x5c"])
@pytest.mark.parametrize("given", [True, False])
def test_jwt_04_a_key_that_the_token_brings_is_not_believed(
    name: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched either: no socket can be made."""

    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    header = forged_headers()[name]
    endorsements = keys_of() if given else {}
    unknown = judge(token(ear_claims(), FORGED, kid="two", **header), endorsements=endorsements)
    assert {"key.trust", "token.signature"} <= set(unknown.refused_by)
    assert not unknown.genuine
    # Nor if it takes the name of a given key.
    taken = judge(token(ear_claims(), FORGED, kid="one", **header), endorsements=endorsements)
    assert "token.signature" in taken.refused_by
    assert not taken.genuine


def test_jwt_04_certificates_count_under_a_root_that_is_given() -> None:
    root_key, leaf_key = FORGED, EAR_KEY
    root = make_certificate("root", root_key, ca=True)
    leaf = make_certificate("leaf", leaf_key, issuer="root", signer=root_key)
    chain = [
        base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
        for certificate in (leaf, root)
    ]
    other = make_certificate("root", ec.derive_private_key(9, ec.SECP256R1()), ca=True)
    for x5c in (chain, chain[:1]):
        data = token(ear_claims(), leaf_key, kid=None, x5c=x5c)
        roots = [root.public_bytes(Encoding.DER)]
        result = judge(data, endorsements={}, roots=roots)
        assert result.accepted, result.refused_by
        # A root of the same name, none at all, and one among the endorsements do not.
        wrong = judge(data, endorsements={}, roots=[other.public_bytes(Encoding.DER)])
        assert not wrong.genuine
        assert {"chain.root", "chain.signatures"} & set(wrong.refused_by)
        assert "key.trust" in judge(data, endorsements={}).refused_by
        pem = root.public_bytes(Encoding.PEM)
        assert not judge(data, endorsements={"ark.pem": pem}).genuine
        late = judge(data, endorsements={}, roots=roots, at=AT + timedelta(days=2))
        assert "chain.validity" in late.refused_by


def test_jwt_04_an_issuer_that_is_no_ca_signs_no_certificate() -> None:
    root = make_certificate("root", FORGED, ca=False)
    leaf = make_certificate("leaf", EAR_KEY, issuer="root", signer=FORGED)
    x5c = [base64.b64encode(c.public_bytes(Encoding.DER)).decode() for c in (leaf, root)]
    data = token(ear_claims(), EAR_KEY, kid=None, x5c=x5c)
    result = judge(data, endorsements={}, roots=[root.public_bytes(Encoding.DER)])
    assert {"chain.constraints", "chain.key_usage"} <= set(result.refused_by)


def test_jwt_05_a_kid_finds_keys_by_equality_only() -> None:
    for kid in ("two", "on", "one ", "ONE", "../one", "one\0", "o" * 1000, None):
        result = judge(token(ear_claims(), kid=kid), endorsements=two_keys())
        assert "key.trust" in result.refused_by
    assert not judge(token(ear_claims(), kid="other"), endorsements=two_keys()).genuine


def two_keys() -> dict[str, bytes]:
    members = [
        {"kid": "one", **public_members(EAR_KEY.public_key())},
        {"kid": "other", **public_members(FORGED.public_key())},
    ]
    return {"jwks.json": json.dumps({"keys": members}).encode()}


TIMES: dict[str, tuple[dict[str, Any], bool]] = {
    "valid": ({}, True),
    "expired within the leeway": ({"exp": NOW - 59}, True),
    "expired": ({"exp": NOW - 60}, False),
    "not yet valid, within the leeway": ({"nbf": NOW + 60, "exp": NOW + 300}, True),
    "not yet valid": ({"nbf": NOW + 61}, False),
    "issued in the future": ({"iat": NOW + 61}, False),
    "a text": ({"exp": str(NOW + 300)}, False),
    "a fraction": ({"exp": NOW + 300.5}, False),
    "true": ({"exp": True}, False),
    "null": ({"exp": None}, False),
    "a list": ({"nbf": [NOW]}, False),
    "negative": ({"nbf": -1}, False),
    "beyond the calendar": ({"exp": 1 << 62}, False),
    "exp before nbf": ({"nbf": NOW + 30, "exp": NOW - 30}, False),
}


@pytest.mark.parametrize("name", TIMES)
def test_jwt_06_times_are_whole_numbers_and_hold(name: str) -> None:
    changes, holds = TIMES[name]
    result = judge(token(ear_claims(**changes)))
    assert result.genuine is holds
    assert ("token.times" in result.refused_by) is not holds


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
def test_jwt_06_azure_tokens_have_all_their_times(name: str, rsa_key: rsa.RSAPrivateKey) -> None:
    data = token(maa_claims(**{name: GONE}), rsa_key, algorithm="RS256")
    assert judge(data, endorsements=keys_of(rsa_key)).refused_by == ("token.times",)


@pytest.mark.parametrize(
    ("audience", "accepted"),
    [
        ("me", True),
        (["you", "me"], True),
        ("mer", False),
        ("m", False),
        (["m", "e"], False),
        ([], False),
        (["mer"], False),
        ({"me": 1}, False),
        (GONE, False),
        (None, False),
        ([["me"]], False),
    ],
)
def test_jwt_06_the_audience_is_compared_whole(audience: Any, accepted: bool) -> None:
    result = judge(token(ear_claims(aud=audience)), policy=AppraisalPolicy.any_code(audience="me"))
    assert result.accepted is accepted
    assert result.refused_by == (() if accepted else ("audience",))


@pytest.mark.parametrize(
    "issuer",
    [
        GONE,
        None,
        "",
        "https://verifier.example/",
        "https://verifier.exampl",
        ["https://verifier.example"],
    ],
)
def test_jwt_06_the_issuer_is_compared_whole(issuer: Any) -> None:
    policy = AppraisalPolicy.any_code(issuers=("https://verifier.example",))
    assert judge(token(ear_claims()), policy=policy).accepted
    result = judge(token(ear_claims(iss=issuer)), policy=policy)
    assert result.refused_by == ("issuer",)


def test_jwt_07_critical_parameters_are_refused() -> None:
    result = judge(token(ear_claims(), crit=["exp"], exp=1))
    assert "token.format" in result.refused_by


def test_jwt_08_a_key_set_with_a_secret_or_malformed_refuses() -> None:
    for endorsements in (
        keys_of(d="AQ"),
        {"jwks.json": b"{}"},
        {"jwks.json": b'{"keys":[],"keys":[]}'},
    ):
        result = judge(token(ear_claims()), endorsements=endorsements)
        assert "keys.format" in result.refused_by
        assert not result.genuine
    for members in ({"use": "enc"}, {"key_ops": ["sign"]}, {"alg": "ES384"}):
        result = judge(token(ear_claims()), endorsements=keys_of(**members))
        assert "key.trust" in result.refused_by


def test_jwt_09_other_serialisations_and_encrypted_tokens_are_no_evidence() -> None:
    parts = token(ear_claims()).decode().split(".")
    general = {
        "payload": parts[1],
        "signatures": [{"protected": parts[0], "signature": parts[2]}] * 2,
    }
    for data in (json.dumps(general).encode(), ".".join([*parts, "AA", "AA"]).encode()):
        with pytest.raises(EvidenceFormatError):
            judge(data)


def test_jwt_10_another_encoding_of_the_same_bytes_is_refused() -> None:
    text = token(ear_claims()).decode()
    head, payload, signature = text.split(".")
    last = signature[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    stray = alphabet[alphabet.index(last) ^ 1]
    for changed in (
        f"{head}.{payload}.{signature}==",
        f"{head}=.{payload}.{signature}",
        f"{head}.{payload}.{signature[:-1]}{stray}",
    ):
        try:
            result = judge(changed.encode())
        except EvidenceFormatError:
            continue
        assert not result.genuine
    assert judge(f"\n{text}\n".encode()).genuine


def test_jwt_14_doubled_claims_are_refused() -> None:
    body = json.dumps(ear_claims())[:-1] + ',"exp":9999999999}'
    head = b64url_encode(json.dumps({"alg": "ES256", "kid": "one"}).encode())
    data = f"{head}.{b64url_encode(body.encode())}"
    signature = jose._ecdsa.sign(EAR_KEY, "ES256", data.encode())
    with pytest.raises(EvidenceFormatError, match="twice"):
        judge(f"{data}.{b64url_encode(signature)}".encode())


@pytest.mark.parametrize("value", ["false", "False", 0, None, [], "", True, "true"])
def test_jwt_14_debug_is_denied_by_false_itself_only(
    value: Any, rsa_key: rsa.RSAPrivateKey
) -> None:
    claims = maa_claims(**{"x-ms-sgx-is-debuggable": value})
    data = token(claims, rsa_key, algorithm="RS256")
    result = judge(data, endorsements=keys_of(rsa_key))
    assert result.genuine
    assert result.refused_by == ("debug",)
    nested = maa_claims(
        **{
            "x-ms-attestation-type": "azurevm",
            "x-ms-sgx-is-debuggable": GONE,
            "x-ms-isolation-tee": {
                "x-ms-attestation-type": "sevsnpvm",
                "x-ms-compliance-status": "azure-compliant-cvm",
                "x-ms-sevsnpvm-is-debuggable": value,
            },
        }
    )
    data = token(nested, rsa_key, algorithm="RS256")
    assert judge(data, endorsements=keys_of(rsa_key)).refused_by == ("debug",)


@pytest.mark.parametrize(
    ("status", "accepted"),
    [
        ("azure-compliant-cvm", True),
        ("azure-compliant-uvm", True),
        ("azure-signed-uvm", False),
        ("", False),
        (None, True),  # JSON's null: the token has none
        (["azure-compliant-uvm"], False),
    ],
)
def test_azures_verdict_on_a_machine_or_container_group_counts(
    status: Any, accepted: bool, rsa_key: rsa.RSAPrivateKey
) -> None:
    claims = maa_claims(
        **{
            "x-ms-attestation-type": "sevsnpvm",
            "x-ms-sevsnpvm-is-debuggable": False,
            "x-ms-compliance-status": status,
        }
    )
    result = judge(token(claims, rsa_key, algorithm="RS256"), endorsements=keys_of(rsa_key))
    assert result.genuine
    assert result.refused_by == (() if accepted else ("compliance",))


def test_jwt_06_times_at_both_ends_of_the_calendar_are_compared() -> None:
    last = 253402300799  # 9999-12-31T23:59:59Z
    assert judge(token(ear_claims(exp=last, nbf=0, iat=0))).accepted
    for changes in ({"exp": last + 1}, {"iat": last}, {"nbf": last}):
        assert judge(token(ear_claims(**changes))).refused_by == ("token.times",)
    policy = AppraisalPolicy.any_code(max_age=3600)
    found = judge(token(ear_claims(iat=last)), policy=policy).refused_by
    assert found == ("token.times",)
    for at in (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)):
        result = judge(token(ear_claims(exp=last, nbf=0, iat=0)), at=at)
        assert result.genuine is (at.year == 9999), result.refused_by
    leeway = timedelta(seconds=60)
    moment = datetime.fromtimestamp(NOW + 300, UTC)
    for at, holds in ((moment + leeway, False), (moment + leeway - timedelta(seconds=1), True)):
        assert judge(token(ear_claims()), at=at).genuine is holds


@pytest.mark.parametrize(
    ("issuer", "genuine"),
    [
        (ISSUER, True),
        (f"{ISSUER}/", True),
        (f"{ISSUER}//", False),
        ("https://.attest.azure.net", False),
        ("https://attest.azure.net", False),
        (f"{ISSUER}:443", False),
        (f"{ISSUER}.evil.example", False),
        (f"https://evil.example/{ISSUER}", False),
        (ISSUER.replace("https", "http"), False),
        ("https://[", False),
        ([ISSUER], False),
        (None, False),
    ],
)
def test_jwt_06_the_issuer_is_a_name_under_azures_domain(
    issuer: Any, genuine: bool, rsa_key: rsa.RSAPrivateKey
) -> None:
    data = token(maa_claims(iss=issuer), rsa_key, algorithm="RS256")
    result = judge(data, endorsements=keys_of(rsa_key))
    assert result.genuine is genuine
    assert result.refused_by == (() if genuine else ("token.issuer",))


def test_white_space_and_a_nul_around_a_token_are_no_matter() -> None:
    data = token(ear_claims())
    for around in (data + b"\0", b"\n " + data + b"\r\n", data + b"\n\0"):
        assert judge(around).accepted
    with pytest.raises(EvidenceFormatError):
        judge(data + b"\0\0")


@pytest.mark.parametrize("form", ["ear.status", "ear_status"])
def test_a_result_without_its_profile_is_one_and_refused(form: str) -> None:
    claims = ear_claims(eat_profile=GONE, submods={"cpu0": {form: "affirming"}})
    result = judge(token(claims))
    assert result.kind == "attestation-result-jwt"
    assert result.refused_by == ("ear.format", "ear.status")


@pytest.mark.parametrize("value", ["enabled", "Disabled", 0, True, None, "disabled "])
def test_att_01_a_debug_status_that_is_not_off_is_refused(value: Any) -> None:
    assert judge(token(ear_claims(dbgstat=value))).refused_by == ("debug",)
    assert judge(token(ear_claims(dbgstat="disabled-permanently"))).accepted


def test_azure_tokens_are_accepted_by_measurement(rsa_key: rsa.RSAPrivateKey) -> None:
    data = token(maa_claims(), rsa_key, algorithm="RS256", jku=f"{ISSUER}/certs")
    policy = AppraisalPolicy(mrenclave=MRENCLAVE, product_id=1, min_security_version=3)
    result = judge(data, endorsements=keys_of(rsa_key), policy=policy)
    assert result.refused_by == ()
    assert result.identified
    for changes, check in (
        ({"x-ms-sgx-mrenclave": "22" * 32}, "code.mrenclave"),
        ({"x-ms-sgx-mrenclave": GONE}, "code.mrenclave"),
        ({"x-ms-sgx-mrenclave": MRENCLAVE.hex()[:-2]}, "code.mrenclave"),
        ({"x-ms-sgx-product-id": 2}, "code.product_id"),
        ({"x-ms-sgx-product-id": True}, "code.product_id"),
        ({"x-ms-sgx-product-id": "1"}, "code.product_id"),
        ({"x-ms-sgx-svn": 2}, "code.min_security_version"),
        ({"x-ms-sgx-svn": GONE}, "code.min_security_version"),
    ):
        data = token(maa_claims(**changes), rsa_key, algorithm="RS256")
        result = judge(data, endorsements=keys_of(rsa_key), policy=policy)
        assert result.refused_by == (check,)
        assert not result.identified


@pytest.mark.parametrize(
    ("claims", "header"),
    [
        ({"iss": "https://shared.eus.attest.azure.net.evil.example"}, {}),
        ({"iss": "http://shared.eus.attest.azure.net"}, {}),
        ({"iss": "https://evil.example/shared.eus.attest.azure.net"}, {}),
        ({"iss": "https://a@shared.eus.attest.azure.net"}, {}),
        ({"iss": "https://evilattest.azure.net"}, {}),
        ({"iss": "https://shared.eus.attest.azure.net:8443"}, {}),
        ({"iss": 5}, {}),
        ({}, {"jku": "https://evil.example/certs"}),
        ({}, {"jku": f"{ISSUER}/certs/../x"}),
        ({}, {"jku": f"{ISSUER}.evil.example/certs"}),
    ],
)
def test_jwt_16_an_azure_token_is_of_an_instance_of_azure(
    claims: dict[str, Any], header: dict[str, Any], rsa_key: rsa.RSAPrivateKey
) -> None:
    data = token(maa_claims(**claims), rsa_key, algorithm="RS256", **header)
    result = judge(data, endorsements=keys_of(rsa_key))
    assert result.refused_by == ("token.issuer",)
    assert not result.genuine


def test_jwt_16_a_certificate_that_names_an_instance_signs_for_no_other(
    rsa_key: rsa.RSAPrivateKey,
) -> None:
    for name, genuine in ((ISSUER, True), ("https://other.eus.attest.azure.net", False)):
        certificate = make_certificate(name, rsa_key)
        x5c = [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()]
        keys = {"keys": [{"kid": "one", "kty": "RSA", "x5c": x5c}]}
        data = token(maa_claims(), rsa_key, algorithm="RS256")
        result = judge(data, endorsements={"jwks.json": json.dumps(keys).encode()})
        assert result.genuine is genuine
        assert result.refused_by == (() if genuine else ("key.issuer",))


def test_an_azure_token_with_another_algorithm_is_refused(rsa_key: rsa.RSAPrivateKey) -> None:
    for key, algorithm in ((rsa_key, "PS256"), (rsa_key, "RS512"), (EAR_KEY, "ES256")):
        data = token(maa_claims(), key, algorithm=algorithm)
        result = judge(data, endorsements=keys_of(key))
        assert "token.algorithm" in result.refused_by
        assert "token.signature" in result.refused_by


# ---- attestation results ----------------------------------------------------------------------


def appraisal(status: Any, vector: Any, *, underscored: bool = False) -> dict[str, Any]:
    mark = "_" if underscored else "."
    vector_name = "ear_trustworthiness_vector" if underscored else "ear.trustworthiness-vector"
    return without({f"ear{mark}status": status, vector_name: vector})


@pytest.mark.parametrize("underscored", [True, False])
@pytest.mark.parametrize(
    ("status", "vector", "refused"),
    [
        ("affirming", {"hardware": 2}, ()),
        (2, {"hardware": 2}, ()),
        ("affirming", GONE, ()),
        ("warning", {"hardware": 32}, ("ear.status",)),
        ("contraindicated", {"hardware": 96}, ("ear.status",)),
        ("none", {}, ("ear.status",)),
        ("contraindicated", {"hardware": 2}, ("ear.status",)),
        ("affirming", {"hardware": 32}, ("ear.format", "ear.status")),
        ("affirming", {"hardware": 97}, ("ear.format", "ear.status")),
        ("affirming", {"hardware": -97}, ("ear.format", "ear.status")),
        ("warning", {"hardware": 96}, ("ear.format", "ear.status")),
        ("Affirming", {}, ("ear.format", "ear.status")),
        (3, {}, ("ear.format", "ear.status")),
        (True, {}, ("ear.format", "ear.status")),
        (GONE, {"hardware": 2}, ("ear.format", "ear.status")),
        ("affirming", {"hardware": "2"}, ("ear.format", "ear.status")),
        ("affirming", {"hardware": True}, ("ear.format", "ear.status")),
        ("affirming", {"hardware": 128}, ("ear.format", "ear.status")),
        ("affirming", [2], ("ear.format", "ear.status")),
    ],
)
def test_a_status_is_no_better_than_the_worst_claim(
    status: Any, vector: Any, refused: tuple[str, ...], underscored: bool
) -> None:
    good = appraisal("affirming", {"hardware": 2}, underscored=underscored)
    bad = appraisal(status, vector, underscored=underscored)
    result = judge(token(ear_claims(submods={"cpu0": good, "gpu0": bad})))
    assert result.refused_by == refused
    assert result.genuine is ("ear.format" not in refused)


@pytest.mark.parametrize(
    "changes",
    [
        {"submods": {}},
        {"submods": GONE},
        {"submods": []},
        {"submods": {"cpu0": None}},
        {"iat": GONE},
        {"submods": {"cpu0": {"ear.status": "affirming", "ear_status": "affirming"}}},
    ],
)
def test_a_result_without_appraisals_is_none(changes: dict[str, Any]) -> None:
    result = judge(token(ear_claims(**changes)))
    assert "ear.format" in result.refused_by
    assert not result.genuine


@pytest.mark.parametrize(
    "text",
    [
        NONCE.hex(),
        b64url_encode(NONCE),
        base64.b64encode(NONCE).decode(),
        ["x" * 8, NONCE.hex()],
    ],
)
def test_att_13_a_nonce_is_found_in_the_forms_that_issuers_write(text: Any) -> None:
    assert judge(token(ear_claims(eat_nonce=text))).fresh


@pytest.mark.parametrize(
    "text", [GONE, "", None, NONCE.hex()[:-2], NONCE.hex() + "00", NONCE.hex().upper(), 5, []]
)
def test_att_13_another_nonce_is_refused(text: Any) -> None:
    result = judge(token(ear_claims(eat_nonce=text)))
    assert result.refused_by == ("nonce",)
    assert not result.fresh


def test_a_path_with_two_readings_is_no_answer() -> None:
    policy = AppraisalPolicy(claims={"a.b": "x"})
    assert judge(token(ear_claims(**{"a.b": "x"})), policy=policy).accepted
    assert judge(token(ear_claims(a={"b": "x"})), policy=policy).accepted
    both = judge(token(ear_claims(**{"a.b": "x", "a": {"b": "x"}})), policy=policy)
    assert both.refused_by == ("code.claims",)
    for value in ("X", ["x"], {"x": 1}, None):
        result = judge(token(ear_claims(a={"b": value})), policy=policy)
        assert result.refused_by == ("code.claims",)


def test_user_data_and_report_data_are_not_ignored() -> None:
    data = token(ear_claims())
    assert judge(data, user_data=b"x").refused_by == ("user_data",)
    assert judge(data, report_data=bytes(64)).refused_by == ("report_data",)


def test_hashes_of_keys_say_nothing_about_trust() -> None:
    """A kid that is the thumbprint of the embedded key is still only a name."""
    members = public_members(FORGED.public_key())
    kid = b64url_encode(hashlib.sha256(json.dumps(members).encode()).digest())
    result = judge(token(ear_claims(), FORGED, kid=kid, jwk=members))
    assert "key.trust" in result.refused_by
