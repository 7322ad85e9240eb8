"""
The forms of Azure's services, as they are published: paths, bodies, answers, names of hosts.

No Azure service is asked: a function answers in the relay's place as theirs would. What is held is
that this side says what they read, and reads what they say (notes on key release, 10.1 to 10.6).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from https_double import Authority
from vault_double import Signer, coded, decoded, material, public_half, wrap

from pyenclave.calls import services
from pyenclave.errors import KeyReleaseError
from pyenclave.formats import jose
from pyenclave.host.relay import relay
from pyenclave.trusted import _release, _release_relay, _state
from pyenclave.trusted._release import release_key

VAULT = "https://contoso.vault.azure.net"
HSM = "https://contoso.managedhsm.azure.net"
MAA = "https://sharedeus.eus.attest.azure.net"
VERSION = "78deebed173b48e48f55abf87ed4cf71"


class Azure:
    """Answers as Key Vault and Azure Attestation are published to."""

    def __init__(self, authority: Authority, transfer: rsa.RSAPrivateKey) -> None:
        self.asked: list[tuple[str, str, str, str, dict[str, Any]]] = []
        self.secret = rsa.generate_private_key(65537, 2048)
        self.authority = authority
        self.names = ("*.vault.azure.net", "vault.azure.net", "*.managedhsm.azure.net")
        self.signing = rsa.generate_private_key(65537, 2048)
        self.token_key = ec.generate_private_key(ec.SECP256R1())
        self.status = 200
        self.error: dict[str, Any] = {}
        self.transfer = transfer

    def __call__(
        self,
        service: str,
        base: str,
        method: str,
        path: str,
        api_version: str,
        body: bytes,
        seconds: float,
    ) -> tuple[int, bytes]:
        said = json.loads(body)
        self.asked.append((base, method, path, api_version, said))
        if service == "attestation":
            return 200, json.dumps({"token": self.token(said)}).encode()
        if self.status != 200:
            return self.status, json.dumps(self.error).encode()
        return 200, json.dumps({"value": self.release(base, path, api_version, said)}).encode()

    def token(self, said: dict[str, Any]) -> str:
        now = int(time.time())
        claims = {
            "exp": now + 28800,
            "iat": now,
            "nbf": now,
            "iss": MAA,
            "jti": "88b4f0eab4e9a0d1a0b7a0d2a1b8a9c6",
            "x-ms-attestation-type": "sgx",
            "x-ms-runtime": json.loads(decoded(said["runtimeData"]["data"])),
            "x-ms-sgx-is-debuggable": False,
            "x-ms-ver": "1.0",
            **({"nonce": said["nonce"]} if "nonce" in said else {}),
        }
        header = {"jku": f"{MAA}/certs"}
        return jose.sign(claims, key=self.token_key, kid="maa", header=header)

    def release(self, base: str, path: str, api_version: str, said: dict[str, Any]) -> str:
        name = path.split("/")[2]
        claims = jose.Jws.from_bytes(said["target"]).claims()
        # As their service chooses: the first RSA key that may encrypt.
        key = next(k for k in claims["x-ms-runtime"]["keys"] if "encrypt" in k["key_ops"])
        n, e = (int.from_bytes(decoded(key[x]), "big") for x in ("n", "e"))
        data = wrap(material(self.secret), rsa.RSAPublicNumbers(e, n).public_key(), said["enc"])
        kid = f"{base}/keys/{name}/{VERSION}"
        wrapped = {
            "schema_version": "1.0",
            "header": {"kid": "TpmEphemeralEncryptionKey", "alg": "dir", "enc": said["enc"]},
            "ciphertext": coded(data),
        }
        answer = {
            "request": {
                "api-version": api_version,
                "enc": said["enc"],
                # What was asked for, with a version only if one was named.
                "kid": base + path.removesuffix("/release").rstrip("/"),
                "nonce": said["nonce"],
            },
            "response": {
                "key": {
                    "key": {
                        **public_half(self.secret),
                        "e": "AAEAAQ",  # as Azure writes it
                        "kid": kid,
                        "key_ops": ["decrypt", "encrypt", "unwrapKey", "wrapKey"],
                        "key_hsm": coded(json.dumps(wrapped).encode()),
                    },
                    "attributes": {
                        "enabled": True,
                        "created": 1700000000,
                        "updated": 1700000000,
                        "recoveryLevel": "Recoverable+Purgeable",
                        "exportable": True,
                    },
                    "release_policy": {
                        "contentType": "application/json; charset=utf-8",
                        "data": coded(b'{"version":"1.0.0","anyOf":[]}'),
                    },
                    "tags": {},
                }
            },
        }
        signer = Signer.under(self.authority, self.names[0], key=self.signing)
        if len(self.names) > 1:
            below = self.authority.intermediate()
            _, leaf = below.leaf(*self.names, key=self.signing)
            from cryptography.hazmat.primitives.serialization import Encoding

            chain = (leaf, below.certificate, self.authority.certificate)
            signer = Signer(self.signing, [one.public_bytes(Encoding.DER) for one in chain])
        return signer.sign(answer)


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    authority = Authority("Web Root")
    transfer = rsa.generate_private_key(65537, 2048)
    return SimpleNamespace(authority=authority, azure=Azure(authority, transfer), transfer=transfer)


@pytest.fixture
def azure(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Azure:
    found: Azure = parts.azure
    found.asked.clear()
    found.status, found.error = 200, {}
    found.names = ("*.vault.azure.net", "vault.azure.net", "*.managedhsm.azure.net")
    runtime = SimpleNamespace(
        secret=bytes(32),
        message_limit=1 << 20,
        release={"ca": parts.authority.pem, "attestation": MAA},
        released=None,
        attest_raw=lambda data: b"evidence" + data,
    )
    link = SimpleNamespace(call=lambda name, args, kwargs: found(*args))
    monkeypatch.setattr(_state, "runtime", runtime)
    monkeypatch.setattr(_state._links, "value", link, raising=False)
    monkeypatch.setattr(_release.rsa, "generate_private_key", lambda e, n: parts.transfer)
    monkeypatch.setattr(_release_relay, "_PAUSE", 0.001)
    return found


def quote(data: bytes) -> bytes:
    return b"\x03\x00\x02\x00" + data


def ask(vault: str = VAULT, **more: Any) -> Any:
    return release_key(vault, "sealing", kind="SgxEnclave", evidence=quote, **more)


@pytest.mark.parametrize(
    "vault", [VAULT, HSM, VAULT + "/", VAULT + ":443", VAULT.upper().replace("HTTPS", "https")]
)
def test_a_key_of_key_vault_and_of_managed_hsm_comes(vault: str, azure: Azure) -> None:
    key = ask(vault)
    assert key.key.private_numbers() == azure.secret.private_numbers()
    assert key.kid.startswith(("https://contoso.vault.azure.net/", "https://contoso.managedhsm."))
    assert key.version == VERSION
    assert key.attributes["recoveryLevel"] == "Recoverable+Purgeable"


def test_what_is_said_is_what_they_read(azure: Azure) -> None:
    ask(nonce="of a relying party", attestation_api_version="2025-06-01")
    (base, method, path, version, said), released = azure.asked
    assert (base, method, path, version) == (MAA, "POST", "/attest/SgxEnclave", "2025-06-01")
    assert set(said) == {"quote", "runtimeData", "nonce"}
    assert said["runtimeData"]["dataType"] == "JSON"
    runtime = json.loads(decoded(said["runtimeData"]["data"]))
    assert runtime["keys"][0]["kty"] == "RSA"
    base, method, path, version, said = released
    assert (base, method, path, version) == (VAULT, "POST", "/keys/sealing//release", "7.4")
    assert set(said) == {"target", "nonce", "enc"}
    assert said["enc"] == "RSA_AES_KEY_WRAP_256"
    ask(version=VERSION, api_version="2025-07-01", algorithm="CKM_RSA_AES_KEY_WRAP")
    assert azure.asked[-1][2:4] == (f"/keys/sealing/{VERSION}/release", "2025-07-01")
    assert azure.asked[-1][4]["enc"] == "CKM_RSA_AES_KEY_WRAP"


@pytest.mark.parametrize(
    "names",
    [
        ("*.azure.net",),
        ("vault.azure.net",),
        ("*.contoso.vault.azure.net",),
        ("contoso.vault.azure.net.evil.example",),
        ("*.net",),
        ("*",),
        ("fabrikam.vault.azure.net",),
    ],
)
def test_another_host_of_the_same_authority_is_refused(
    names: tuple[str, ...], azure: Azure
) -> None:
    azure.names = names
    with pytest.raises(KeyReleaseError) as caught:
        ask(refresh=True)
    assert caught.value.check == "answer.host"


@pytest.mark.parametrize(
    ("status", "code", "inner"),
    [
        (401, "Unauthorized", None),
        (403, "Forbidden", "ForbiddenByPolicy"),
        (403, "Forbidden", "ForbiddenByRbac"),
        (404, "KeyNotFound", None),
        (409, "Conflict", None),
        (429, "Throttled", None),
    ],
)
def test_their_errors_are_read(status: int, code: str, inner: str | None, azure: Azure) -> None:
    azure.status = status
    azure.error = {"error": {"code": code, "message": "AKV10000: no"}}
    if inner:
        azure.error["error"]["innererror"] = {"code": inner}
    with pytest.raises(KeyReleaseError) as caught:
        ask()
    found = caught.value
    assert (found.check, found.status) == ("release.refused", status)
    assert (found.error_code, found.inner) == (code, inner)
    assert found.transient is (status == 429)


def test_a_token_of_azure_attestation_is_passed_on(vectors: Path) -> None:
    """A token that their service made once is a token here; who judges it is the vault."""
    path = vectors / "attestation" / "maa-jwt-azurevm-2023" / "token.jwt"
    token = path.read_text("ascii").strip()
    claims = jose.Jws.from_bytes(token).claims()
    assert claims["iss"].endswith(".attest.azure.net")
    assert _release._judge_token(token, claims["iss"], None) == claims["exp"] - 60
    with pytest.raises(KeyReleaseError, match="another issuer"):
        _release._judge_token(token, "https://evil.example", None)


def test_the_relay_takes_their_addresses() -> None:
    assert list(relay(vault=VAULT, attestation=MAA, credential="t")) == [services.NAME]
