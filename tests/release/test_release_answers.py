"""`trusted.release_key` before a hostile relay and a hostile vault: what it refuses."""

from __future__ import annotations

import base64
import datetime as dt
import json
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from https_double import Authority
from released_inside import refused
from vault_double import Signer, Vault, coded, decoded, public_half, wrap

from pyenclave.calls import services
from pyenclave.errors import (
    KeyReleaseError,
)
from pyenclave.trusted import _release_answer
from pyenclave.trusted._release import release_key


def test_another_root_is_refused(inside: SimpleNamespace, vault: Vault, signers: Any) -> None:
    vault.signer = signers.other_root
    assert refused().check == "answer.chain"


def test_a_root_of_the_same_name_is_refused(
    inside: SimpleNamespace, vault: Vault, signers: Any
) -> None:
    vault.signer = signers.same_name
    assert refused().check == "answer.chain"


def test_a_certificate_for_another_host_is_refused(
    inside: SimpleNamespace, vault: Vault, signers: Any
) -> None:
    vault.signer = signers.other_host
    assert refused().check == "answer.host"


@pytest.mark.parametrize("which", ["late", "early"])
def test_dates_are_judged_unless_that_is_given_up(
    which: str, inside: SimpleNamespace, vault: Vault, signers: Any
) -> None:
    vault.signer = getattr(signers, which)
    assert refused().check == "answer.dates"
    days = dt.timedelta(days=-5 if which == "late" else 5)
    if which == "early":  # its authority is valid then, too
        assert release_key(None, "oct", at=dt.datetime.now(dt.UTC) + days).kty == "oct"
        assert release_key(None, "ec", dangerous_ignore_dates=True).kty == "EC"


@pytest.mark.parametrize("relaxed", ["at", "dangerous_ignore_dates"])
def test_a_key_under_relaxed_dates_is_nobody_elses(
    relaxed: str, inside: SimpleNamespace, vault: Vault, signers: Any
) -> None:
    """Neither kept for a strict caller, nor a strict caller's given to this one."""
    vault.signer = signers.early
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(days=5)
    options = {relaxed: moment if relaxed == "at" else True}
    first = release_key(None, "oct", **options)
    assert refused("oct").check == "answer.dates"
    release_key(None, "oct", **options, refresh=True)
    assert refused("oct").check == "answer.dates"
    first.other(first.version)
    assert refused("oct", version=first.version).check == "answer.dates"
    vault.signer = signers.good
    strict = release_key(None, "oct")
    assert release_key(None, "oct", **options) is not strict
    assert release_key(None, "oct") is strict


def test_a_certificate_that_is_not_a_servers_is_refused(
    inside: SimpleNamespace, vault: Vault, signers: Any
) -> None:
    vault.signer = signers.client
    assert refused().check == "answer.chain"


def test_a_missing_link_of_the_chain_is_refused(inside: SimpleNamespace, vault: Vault) -> None:
    vault.signer = Signer(vault.signer.key, vault.signer.chain[:1])
    assert refused().check == "answer.chain"


def test_a_leaf_cannot_sign_for_others(
    inside: SimpleNamespace, vault: Vault, signers: Any, authority: Authority
) -> None:
    """Somebody with a certificate of a trusted authority makes one for the vault's name."""
    below = authority.intermediate()
    mallory_key, mallory = below.leaf("mallory.example")
    fake = Authority.__new__(Authority)
    fake.key, fake.certificate, fake.now = mallory_key, mallory, authority.now
    key, leaf = fake.leaf("127.0.0.1")
    from cryptography.hazmat.primitives.serialization import Encoding

    chain = [one.public_bytes(Encoding.DER) for one in (leaf, mallory, below.certificate)]
    vault.signer = Signer(key, chain)
    assert refused().check == "answer.chain"


def test_a_changed_answer_is_refused(inside: SimpleNamespace, vault: Vault) -> None:
    def change(token: str) -> str:
        head, body, signature = token.split(".")
        claims = json.loads(decoded(body))
        claims["response"]["key"]["attributes"]["exp"] = 9
        return f"{head}.{coded(json.dumps(claims).encode())}.{signature}"

    vault.change_jws = change
    assert refused().check == "answer.signature"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: "",
        lambda t: t[:-20],
        lambda t: t[: len(t) // 2],
        lambda t: t + ".",
        lambda t: t.replace(".", ".."),
        lambda t: t + "=",
        lambda t: " " + t,
        lambda t: t.split(".")[0] + ".." + t.split(".")[2],
        lambda t: "A" * 600_000,
        lambda t: t + "A" * 500_000,
    ],
)
def test_a_cut_or_swollen_answer_is_refused(
    change: Any, inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_jws = change
    assert refused().check in ("answer.form", "answer.signature", "service.silent")


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "RS1", "", None, 5])
def test_another_algorithm_of_signature_is_refused(
    alg: object, inside: SimpleNamespace, vault: Vault
) -> None:
    def change(token: str) -> str:
        head, body, signature = token.split(".")
        header = json.loads(decoded(head))
        header["alg"] = alg
        return f"{coded(json.dumps(header).encode())}.{body}.{signature}"

    vault.change_jws = change
    assert refused().check == "answer.form"


def test_the_algorithm_must_belong_to_the_certificates_key(
    inside: SimpleNamespace, vault: Vault
) -> None:
    def change(token: str) -> str:
        head, body, signature = token.split(".")
        header = json.loads(decoded(head))
        header["alg"] = "PS256"
        return f"{coded(json.dumps(header).encode())}.{body}.{signature}"

    vault.change_jws = change
    assert refused().check == "answer.signature"


def test_a_key_in_the_header_is_not_believed(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    """JWT-04: jwk, jku and x5u say nothing; the certificates do."""

    def sign(claims: dict[str, Any], **_: Any) -> str:
        from pyenclave.formats import jose, jwk

        x5c = [base64.b64encode(one).decode() for one in vault.signer.chain]
        header = {
            "x5c": x5c,
            "jwk": jwk.public_members(secrets.other.public_key()),
            "jku": "https://evil.example/",
        }
        return jose.sign(claims, key=secrets.other, algorithm="RS256", header=header)

    vault.signer = SimpleNamespace(sign=sign, chain=vault.signer.chain)  # type: ignore[assignment]
    assert refused().check == "answer.signature"


@pytest.mark.parametrize(
    "x5c",
    [[], "x", ["!"], ["AAAA"], [base64.b64encode(bytes(40)).decode()], None, ["AA=="] * 11, [5]],
)
def test_certificates_that_are_none_are_refused(
    x5c: object, inside: SimpleNamespace, vault: Vault
) -> None:
    real = vault.signer
    vault.signer = SimpleNamespace(sign=lambda claims: real.sign(claims, x5c=x5c))  # type: ignore[assignment]
    assert refused().check in ("answer.form", "answer.chain")


def set_at(path: str, value: object) -> Any:
    def change(claims: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for name in parents:
            claims = claims[name]
        if value is None:
            del claims[last]
        else:
            claims[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        ("request/nonce", "another", "answer.nonce"),
        ("request/nonce", "", "answer.nonce"),
        ("request/nonce", None, "answer.nonce"),
        ("request/nonce", 5, "answer.form"),
        ("request/enc", "CKM_RSA_AES_KEY_WRAP", "answer.enc"),
        ("request/enc", "RSA_AES_KEY_WRAP_384", "answer.enc"),
        ("request/enc", "", "answer.enc"),
        ("request/enc", None, "answer.form"),
        ("request/kid", "https://127.0.0.1/keys/rsa", "answer.kid"),
        ("request/kid", "nonsense", "answer.kid"),
        ("request/kid", "", "answer.kid"),
        ("request/kid", None, "answer.form"),
        ("request", None, "answer.form"),
        ("request", [], "answer.form"),
        ("response/key/key/kid", "https://evil.example/keys/rsa/00", "answer.kid"),
        ("response/key/key/kid", None, "answer.form"),
        ("response/key/key/kty", "oct-HSM", "answer.key"),
        ("response/key/key/kty", "EC-HSM", "answer.key"),
        ("response/key/key/kty", "RSA-HSM-HSM", "answer.key"),
        ("response/key/key/n", "AQAB", "answer.key"),
        ("response/key/key/n", "!", "answer.form"),
        ("response/key/key/e", "Aw", "answer.key"),
        ("response/key/key/e", None, "answer.key"),
        ("response/key/key/key_hsm", None, "answer.form"),
        ("response/key/key/key_hsm", "e30", "answer.form"),
        ("response/key/key/key_hsm", "W10", "answer.form"),
        ("response/key/key/key_hsm", "!", "answer.form"),
        ("response/key", None, "answer.form"),
        ("response/key/attributes", {"enabled": False}, "answer.expired"),
        ("response/key/attributes", {"exp": 1000}, "answer.expired"),
        ("response/key/attributes", {"nbf": 1 << 40}, "answer.expired"),
    ],
)
def test_every_word_of_an_answer_is_judged(
    path: str, value: object, check: str, inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_claims = set_at(path, value)
    assert refused().check == check


def test_an_answer_about_another_key_is_refused(inside: SimpleNamespace, vault: Vault) -> None:
    def other(claims: dict[str, Any]) -> None:
        claims["request"]["kid"] = claims["request"]["kid"].replace("/rsa/", "/rsb/")

    vault.change_claims = other
    assert refused().check == "answer.kid"

    def versions(claims: dict[str, Any]) -> None:
        claims["response"]["key"]["key"]["kid"] = f"{vault.url}/keys/rsa/{'0' * 32}"

    vault.change_claims = versions
    assert refused().check == "answer.kid"

    def none(claims: dict[str, Any]) -> None:
        claims["request"]["kid"] = claims["response"]["key"]["key"]["kid"] = f"{vault.url}/keys/rsa"

    vault.change_claims = none
    assert refused().check == "answer.kid"


def test_another_version_than_was_asked_for_is_refused(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    old = vault.keys["rsa"][0][0]
    new = vault.put("rsa", secrets.other)
    real = inside.host.handlers[services.NAME]

    def swap(*args: Any) -> Any:
        changed = [one.replace(old, new) if isinstance(one, str) else one for one in args]
        return real(*changed)

    inside.host.handlers[services.NAME] = swap
    assert refused("rsa", version=old).check == "answer.kid"


def test_an_unversioned_request_may_be_repeated_unversioned(
    inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_claims = set_at("request/kid", f"{vault.url}/keys/rsa")
    assert release_key(None, "rsa").version == vault.keys["rsa"][0][0]


def test_a_vault_that_repeats_no_nonce_is_read_only_where_that_was_said(
    inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_claims = set_at("request/nonce", None)
    assert release_key(None, "rsa", require_nonce=False).kty == "RSA"
    vault.change_claims = set_at("request/nonce", "of before")
    assert refused("ec", require_nonce=False).check == "answer.nonce"


def test_an_answer_of_before_is_refused(inside: SimpleNamespace, vault: Vault) -> None:
    """SKR-09: the relay answers with what the vault said the last time."""
    real = inside.host.handlers[services.NAME]
    said: list[Any] = []

    def record(*args: Any) -> Any:
        answer = real(*args)
        if args[0] == "vault":
            said.append(answer)
        return answer

    inside.host.handlers[services.NAME] = record
    release_key(None, "rsa")
    inside.host.handlers[services.NAME] = lambda *args: (
        said[0] if args[0] == "vault" else real(*args)
    )
    assert refused("rsa", refresh=True).check == "answer.nonce"


def test_a_transfer_key_of_the_relay_opens_nothing(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    """SKR-05: a relay has a token of its own, and the vault wraps to the key in that."""
    real = inside.host.handlers[services.NAME]

    def swap(*args: Any) -> Any:
        if args[0] == "attestation":
            body = json.loads(args[5])
            runtime = json.loads(decoded(body["runtimeData"]["data"]))
            numbers = secrets.other.public_key().public_numbers()
            runtime["keys"][0]["n"] = coded(numbers.n.to_bytes(256, "big"))
            body["runtimeData"]["data"] = coded(json.dumps(runtime).encode())
            args = (*args[:5], json.dumps(body).encode(), args[6])
        return real(*args)

    inside.host.handlers[services.NAME] = swap
    assert refused().check == "answer.unwrap"


def test_a_substituted_key_is_refused(
    inside: SimpleNamespace, vault: Vault, secrets: SimpleNamespace
) -> None:
    vault.change_claims = lambda claims: claims["response"]["key"]["key"].update(
        {k: v for k, v in public_half(secrets.other).items() if k in "ne"}
    )
    assert refused().check == "answer.key"


@pytest.mark.parametrize("member", ["x", "y", "crv"])
def test_another_elliptic_half_is_refused(
    member: str, inside: SimpleNamespace, vault: Vault
) -> None:
    other = public_half(ec.generate_private_key(ec.SECP384R1()))
    other["crv"] = "P-256"
    vault.change_claims = set_at(f"response/key/key/{member}", other[member])
    assert refused("ec").check == "answer.key"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:-1],
        lambda d: d[:-8],
        lambda d: d + bytes(8),
        lambda d: d[:256],
        lambda d: d[:255],
        lambda d: b"\0",
        lambda d: bytes([d[0] ^ 1]) + d[1:],
        lambda d: d[:-1] + bytes([d[-1] ^ 1]),
        lambda d: d[:256] + bytes([d[256] ^ 1]) + d[257:],
        lambda d: bytes(len(d)),
    ],
)
def test_SKR_07_a_wrap_that_was_changed_is_refused_with_one_error(
    change: Any, inside: SimpleNamespace, vault: Vault
) -> None:
    vault.change_cipher = change
    error = refused()
    assert error.check == "answer.unwrap"
    assert str(error) == str(refused())


def test_the_key_under_oaep_has_32_bytes(secrets: SimpleNamespace) -> None:
    public = secrets.transfer.public_key()
    for size in (16, 24):
        data = wrap(b"x" * 32, public, "RSA_AES_KEY_WRAP_256", kek=bytes(size))
        with pytest.raises(KeyReleaseError) as caught:
            _release_answer._unwrap(data, secrets.transfer, "RSA_AES_KEY_WRAP_256")
        assert caught.value.check == "answer.unwrap"
    data = wrap(b"x" * 32, public, "RSA_AES_KEY_WRAP_256", kek=bytes(32))
    opened = _release_answer._unwrap(data, secrets.transfer, "RSA_AES_KEY_WRAP_256")
    assert opened == b"x" * 32
    with pytest.raises(KeyReleaseError):
        _release_answer._unwrap(data, secrets.transfer, "RSA_AES_KEY_WRAP_384")


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 33, 65])
def test_an_oct_key_has_a_size_of_one(count: int, inside: SimpleNamespace, vault: Vault) -> None:
    vault.put("odd", b"k" * count)
    assert refused("odd").check == "answer.key"
