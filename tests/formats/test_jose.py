"""Tokens and keys: what a token says of itself is never believed (JWT-01 to JWT-11)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import string
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose
from pyenclave.formats.jose import Jws, b64url_decode, b64url_encode
from pyenclave.formats.jwk import Jwk, Jwks, public_members

P256 = ec.derive_private_key(7, ec.SECP256R1())
P384 = ec.derive_private_key(7, ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
ALL = jose.ALGORITHMS


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def raw(header: Any, payload: bytes = b"{}", signature: bytes = b"x") -> str:
    """Return a token with any header at all."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return ".".join(b64url_encode(part) for part in (head, payload, signature))


@pytest.mark.parametrize(
    "name",
    ["none", "None", "NONE", "nOnE", "", "HS256", "HS512", "RS256 ", "rs256", "ES256K", "dir"],
)
def test_jwt_01_02_unsigned_and_shared_key_tokens_are_refused(name: str) -> None:
    with pytest.raises(EvidenceFormatError, match="algorithm"):
        Jws.from_bytes(raw({"alg": name}))


@pytest.mark.parametrize("value", [None, 1, True, ["RS256"], {"RS256": 1}])
def test_jwt_01_an_algorithm_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(EvidenceFormatError, match="algorithm"):
        Jws.from_bytes(raw({"alg": value}))
    with pytest.raises(EvidenceFormatError, match="algorithm"):
        Jws.from_bytes(raw({}))


def test_jwt_02_a_mac_made_with_the_public_key_is_no_signature() -> None:
    public = P256.public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        json.dumps(public_members(public)).encode(),
    ):
        for algorithm in ("HS256", "ES256"):
            data = raw({"alg": algorithm}).rpartition(".")[0]
            tag = hmac.digest(secret, data.encode(), hashlib.sha256)
            token = f"{data}.{b64url_encode(tag)}"
            if algorithm == "HS256":
                with pytest.raises(EvidenceFormatError):
                    Jws.from_bytes(token)
            else:
                assert not Jws.from_bytes(token).verify(public, allowed=ALL | {"HS256"})


def test_jwt_03_the_algorithm_belongs_to_the_key(rsa_key: rsa.RSAPrivateKey) -> None:
    keys = {
        "PS256": rsa_key,
        "ES256": P256,
        "ES384": P384,
        "EdDSA": ED,
    }
    for name, key in keys.items():
        token = Jws.from_bytes(jose.sign({"a": 1}, key=key, algorithm=name))
        for other, reader in keys.items():
            assert token.verify(reader.public_key(), allowed=ALL) is (name == other)
        assert not token.verify(key.public_key(), allowed=ALL - {name})
        assert not token.verify(key.public_key(), allowed=())
        assert not token.verify(b"a secret", allowed=ALL)


def test_jwt_03_a_signature_of_another_scheme_of_the_same_key_is_none(
    rsa_key: rsa.RSAPrivateKey,
) -> None:
    head, payload, signature = jose.sign({}, key=rsa_key, algorithm="RS256").split(".")
    forged = json.loads(b64url_decode(head)) | {"alg": "PS256"}
    text = f"{b64url_encode(json.dumps(forged).encode())}.{payload}.{signature}"
    assert not Jws.from_bytes(text).verify(rsa_key.public_key(), allowed=ALL)


def test_jwt_07_critical_parameters_are_refused() -> None:
    for value in (["exp"], [], ["b64"], "x", None):
        with pytest.raises(EvidenceFormatError, match="critical"):
            Jws.from_bytes(raw({"alg": "ES256", "crit": value}))


@pytest.mark.parametrize("name", ["zip", "enc", "p2c", "p2s", "epk", "b64"])
def test_jwt_09_11_parameters_of_encrypted_tokens_are_refused(name: str) -> None:
    with pytest.raises(EvidenceFormatError, match="another kind"):
        Jws.from_bytes(raw({"alg": "ES256", name: "DEF"}))


@pytest.mark.parametrize(
    "text",
    ["", "a", "a.b", "a.b.c.d", "a.b.c.d.e", '{"payload":"e30","signatures":[]}', "..", "e30..e30"],
)
def test_jwt_09_other_serialisations_are_refused(text: str) -> None:
    with pytest.raises(EvidenceFormatError):
        Jws.from_bytes(text)


def test_a_token_inside_a_token_is_no_object() -> None:
    inner = jose.sign({"a": 1}, key=P256)
    token = Jws.from_bytes(raw({"alg": "ES256", "cty": "JWT"}, inner.encode()))
    with pytest.raises(EvidenceFormatError):
        token.claims()


@pytest.mark.parametrize(
    "text",
    [
        "YQ==",
        "YQ=",
        "Y Q",
        "YQ\n",
        " YQ",
        "Y+8",
        "Y/8",
        "YR",
        "YWJ",
        "A",
        "YQ\0",
        "ＹＱ",
        "YQ.",
        "é",
        'YQ"',
        'YWJj"',
        '"YWJj',
        "YW\\u004a",
        "YWJj\\n",
        "YWJ\\",
        'YWJj","',
        "YWJj=",
        "====",
        "A" * 5001,
        "A" * 4999 + "B=",
        "A" * 4998 + "+-",
    ],
)
def test_jwt_10_base64url_has_one_form(text: str) -> None:
    with pytest.raises(EvidenceFormatError):
        b64url_decode(text)


@pytest.mark.parametrize("text", ["YQ", "YQ=", "YR==", "YQ==\n", " YQ==", "YQ-=", "Y===", "é==="])
def test_jwt_10_the_base64_of_certificates_has_one_form(text: str) -> None:
    with pytest.raises(EvidenceFormatError):
        jose.b64_decode(text)
    assert jose.b64_decode("YQ==") == b"a"


@given(st.binary(max_size=100))
def test_bytes_have_one_base64url_form(data: bytes) -> None:
    assert b64url_decode(b64url_encode(data)) == data
    assert jose.b64_decode(base64.b64encode(data).decode()) == data


def _by_the_letter(text: str) -> bytes | None:
    """Return what RFC 4648, 5 says of *text*, bit by bit; None where it says nothing."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    if len(text) % 4 == 1 or any(letter not in alphabet for letter in text):
        return None
    bits = "".join(f"{alphabet.index(letter):06b}" for letter in text)
    whole = len(bits) // 8 * 8
    if "1" in bits[whole:]:
        return None
    return bytes(int(bits[at : at + 8], 2) for at in range(0, whole, 8))


@given(st.text('AQgwYZaz09-_+/="\\u4 \n\0,é', max_size=9))
def test_base64url_is_read_as_the_standard_has_it_and_in_no_other_way(text: str) -> None:
    try:
        found = b64url_decode(text)
    except EvidenceFormatError:
        found = None
    assert found == _by_the_letter(text)


@given(st.text(string.ascii_letters + string.digits + "-_=", max_size=8))
def test_text_is_the_base64url_of_what_it_decodes_to_or_is_refused(text: str) -> None:
    try:
        data = b64url_decode(text)
    except EvidenceFormatError:
        return
    assert b64url_encode(data) == text


@pytest.mark.parametrize("key", [P256, P384, ED, ec.derive_private_key(7, ec.SECP521R1())])
def test_each_change_of_a_token_breaks_it(key: Any) -> None:
    text = jose.sign({"a": 1}, key=key)
    public = key.public_key()
    assert Jws.from_bytes(text).verify(public, allowed=ALL)
    for place, character in enumerate(text):
        other = "B" if character != "B" else "C"
        changed = text[:place] + other + text[place + 1 :]
        try:
            assert not Jws.from_bytes(changed).verify(public, allowed=ALL)
        except EvidenceFormatError:
            continue


def test_signatures_of_the_wrong_width_or_range_are_refused() -> None:
    text = jose.sign({"a": 1}, key=P256)
    token = Jws.from_bytes(text)
    head = text.rpartition(".")[0]
    order = int("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
    r, s = token.signature[:32], token.signature[32:]
    high = order.to_bytes(32, "big")
    for forged in (
        b"",
        r,
        r + s + b"\0",
        b"\0" + r + s,
        bytes(64),
        r + high,
        high + s,
        bytes(32) + s,
    ):
        assert not Jws.from_bytes(f"{head}.{b64url_encode(forged)}").verify(
            P256.public_key(), allowed=ALL
        )


def test_a_header_with_a_doubled_name_is_refused() -> None:
    with pytest.raises(EvidenceFormatError, match="twice"):
        Jws.from_bytes(raw(b'{"alg":"ES256","alg":"none"}'))
    with pytest.raises(EvidenceFormatError, match="twice"):
        Jws.from_bytes(raw({"alg": "ES256"}, b'{"iss":"a","iss":"b"}')).claims()


def test_sizes_are_capped() -> None:
    with pytest.raises(EvidenceFormatError, match="too large"):
        Jws.from_bytes("a" * (jose.MAX_TOKEN + 1))
    with pytest.raises(EvidenceFormatError, match="kid"):
        Jws.from_bytes(raw({"alg": "ES256", "kid": "a" * 10_000}))


# ---- keys -------------------------------------------------------------------------------------


def members(key: Any = P256, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = public_members(key.public_key())
    return {name: value for name, value in (found | changes).items() if value is not None}


def key_set(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def test_jwt_08_keys_for_another_use_or_algorithm_do_not_verify() -> None:
    for changes in (
        {"use": "enc"},
        {"use": 1},
        {"key_ops": ["encrypt"]},
        {"key_ops": []},
        {"key_ops": "verify"},
        {"alg": "ES384"},
        {"alg": "HS256"},
        {"alg": "none"},
        {"alg": None, "kty": "oct"},
        {"crv": "secp256k1"},
        {"kty": "RSA1"},
    ):
        with pytest.raises(EvidenceFormatError):
            Jwk.from_json(members(**changes))
    assert Jwk.from_json(members(use="sig", key_ops=["verify"], alg="ES256")).key == (
        P256.public_key()
    )


@pytest.mark.parametrize("name", ["d", "p", "q", "dp", "dq", "qi", "oth", "k"])
def test_jwt_08_a_set_with_a_secret_key_is_refused_whole(name: str) -> None:
    with pytest.raises(EvidenceFormatError, match="secret"):
        Jwks.from_bytes(key_set(members(kid="good"), members(kid="bad", **{name: "AQ"})))


def test_jwt_08_weak_rsa_keys_do_not_verify(rsa_key: rsa.RSAPrivateKey) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    found = Jwks.from_bytes(key_set(members(weak, kid="weak"), members(rsa_key, kid="good")))
    assert [key.kid for key in found.keys] == ["good"]
    assert found.ignored == (("weak", "RSA of 1024 bits"),)
    assert not jose.algorithms_of(weak.public_key())
    with pytest.raises(EvidenceFormatError):
        Jwk.from_json(members(rsa_key, e="AQ"))
    with pytest.raises(EvidenceFormatError):
        Jwk.from_json(members(rsa_key, n="AA" + public_members(rsa_key.public_key())["n"]))


def test_points_that_are_not_on_the_curve_are_refused() -> None:
    good = members()
    for changes in (
        {"x": good["y"]},
        {"x": b64url_encode(bytes(32)), "y": b64url_encode(bytes(32))},
        {"x": b64url_encode(b"\0" + b64url_decode(good["x"]))},
        {"x": None},
        {"y": None},
        {"x": 5},
    ):
        with pytest.raises(EvidenceFormatError):
            Jwk.from_json(members(**changes))


@pytest.mark.parametrize("kid", ["../../etc/passwd", "/etc/passwd", "a\0b", "http://x/", "' OR 1"])
def test_jwt_05_a_kid_is_only_compared(kid: str) -> None:
    """It opens no file and no connection; the conftest of a relying party has neither."""
    found = Jwks.from_bytes(key_set(members(kid="other")))
    assert found.find(kid) is None
    assert Jwks.from_bytes(key_set(members(kid=kid))).find(kid) is not None


def test_jwt_05_a_kid_selects_no_key_of_another_type() -> None:
    token = Jws.from_bytes(jose.sign({}, key=P256, kid="a"))
    found = Jwks.from_bytes(key_set(members(P384, kid="a"), members(P256, kid="b")))
    key = found.find(token.kid)
    assert key is not None
    assert not key.verify(token, allowed=ALL)


def test_two_keys_of_one_name_are_refused_and_no_name_means_the_only_key() -> None:
    with pytest.raises(EvidenceFormatError, match="one name"):
        Jwks.from_bytes(key_set(members(kid="a"), members(P384, kid="a")))
    assert Jwks.from_bytes(key_set(members(kid="a"))).find(None) is not None
    assert Jwks.from_bytes(key_set(members(kid="a"), members(P384))).find(None) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[1]}', b"null"])
def test_malformed_sets_are_refused(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        Jwks.from_bytes(data)


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(EvidenceFormatError):
        Jwks.from_bytes(key_set(*[members(kid=str(number)) for number in range(65)]))


def test_a_key_and_its_certificate_agree(vectors: Path) -> None:
    folder = vectors / "attestation" / "maa-signing-certs-with-sgx-quote"
    data = json.loads((folder / "certs.json").read_bytes())
    keys = Jwks.from_bytes(json.dumps(data).encode())
    assert [len(key.x5c) for key in keys.keys] == [3, 3, 3, 3]
    # The key that carries a quote has 1,024 bits only: attested, and still too weak to believe.
    assert [kid for kid, _ in keys.ignored] == [data["keys"][0]["kid"]]
    data["keys"][1] |= public_members(keys.keys[1].key)
    with pytest.raises(EvidenceFormatError, match="another key"):
        Jwks.from_bytes(json.dumps(data).encode())
    data["keys"][1] = {"kty": "EC", "kid": "x", "x5c": data["keys"][0]["x5c"]}
    with pytest.raises(EvidenceFormatError, match="another kind"):
        Jwks.from_bytes(json.dumps(data).encode())


def test_signing_with_a_key_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not belong"):
        jose.sign({}, key=P256, algorithm="ES384")
    with pytest.raises(ValueError, match="does not belong"):
        jose.sign({}, key=ec.generate_private_key(ec.SECP256K1()))


# RFC 7515, A.3: an ES256 token whose bytes are given.
RFC_TOKEN = (
    "eyJhbGciOiJFUzI1NiJ9"
    ".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
    ".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
RFC_KEY = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


def test_the_token_of_rfc_7515_verifies() -> None:
    token = Jws.from_bytes(RFC_TOKEN)
    assert Jwk.from_json(RFC_KEY).verify(token, allowed=ALL)
    assert token.claims()["iss"] == "joe"
