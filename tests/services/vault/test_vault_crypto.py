"""Every algorithm, done by the vault and checked by Microsoft's local code and our own."""

from __future__ import annotations

import hashlib
import hmac
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from azure.keyvault.keys import JsonWebKey, KeyClient, KeyVaultKey
from azure.keyvault.keys.crypto import (
    CryptographyClient,
    EncryptionAlgorithm,
    KeyWrapAlgorithm,
    SignatureAlgorithm,
)
from cryptography.hazmat.primitives import keywrap
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from vault_parts import Credential, MemoryBackend, Running, b64, running_vault, unb64

ACTION = "Microsoft.KeyVault/vaults/keys/"
RSA_CIPHERS = ["RSA-OAEP-256", "RSA-OAEP", "RSA1_5"]


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    backend = MemoryBackend()
    backend.rsa = [rsa.generate_private_key(public_exponent=65537, key_size=2048)]
    folder = tmp_path_factory.mktemp("crypto")
    with running_vault(folder, backend=backend, allow_sha1=True) as running:
        # One who may use keys and not read them: his client has nothing to compute with.
        for word in ("encrypt", "decrypt", "wrap", "unwrap", "sign", "verify"):
            running.rights.granted.add(("reader", f"{ACTION}{word}/action", "/"))
        yield running


@pytest.fixture(scope="module")
def keys(vault: Running) -> Iterator[KeyClient]:
    with KeyClient(
        vault.url,
        Credential(),  # type: ignore[arg-type]
        connection_verify=vault.ca,
        verify_challenge_resource=False,
        retry_total=0,
    ) as client:
        yield client


def remote(vault: Running, key: KeyVaultKey) -> CryptographyClient:
    """Return a client that must ask the vault for everything."""
    return CryptographyClient(
        key.id,
        Credential("reader"),  # type: ignore[arg-type]
        connection_verify=vault.ca,
        verify_challenge_resource=False,
        retry_total=0,
    )


def local(key: KeyVaultKey) -> CryptographyClient:
    """Return a client that computes with the public half by itself."""
    return CryptographyClient.from_jwk(key.key)


@pytest.fixture(scope="module")
def rsa_key(keys: KeyClient) -> KeyVaultKey:
    return keys.create_rsa_key("rsa", size=2048)


@pytest.mark.parametrize("name", RSA_CIPHERS)
def test_rsa_encrypts_and_wraps(vault: Running, rsa_key: KeyVaultKey, name: str) -> None:
    """Here and there, in both directions."""
    there, here = remote(vault, rsa_key), local(rsa_key)
    cipher, wrap = EncryptionAlgorithm(name), KeyWrapAlgorithm(name)
    for encrypt in (there.encrypt, here.encrypt):
        assert there.decrypt(cipher, encrypt(cipher, b"data").ciphertext).plaintext == b"data"
    for wrap_key in (there.wrap_key, here.wrap_key):
        wrapped = wrap_key(wrap, b"k" * 32).encrypted_key
        assert there.unwrap_key(wrap, wrapped).key == b"k" * 32
    if name != "RSA1_5":
        # Of RSA1_5 a wrong padding gives random bytes, so that it tells nothing.
        with pytest.raises(HttpResponseError) as caught:
            there.decrypt(cipher, b"\x01" * 256)
        assert caught.value.status_code == 400
    with pytest.raises(HttpResponseError) as caught:
        there.encrypt(cipher, b"d" * 250)
    assert caught.value.status_code == 400


@pytest.mark.parametrize("name", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])
def test_rsa_signs(vault: Running, rsa_key: KeyVaultKey, name: str) -> None:
    """And says no to another digest, another signature, and one of another size."""
    there, here = remote(vault, rsa_key), local(rsa_key)
    algorithm = SignatureAlgorithm(name)
    digest = hashlib.new(f"sha{name[2:]}", b"message").digest()
    other = hashlib.new(f"sha{name[2:]}", b"another").digest()
    signature = there.sign(algorithm, digest).signature
    assert here.verify(algorithm, digest, signature).is_valid
    assert there.verify(algorithm, digest, signature).is_valid
    assert not there.verify(algorithm, other, signature).is_valid
    assert not there.verify(algorithm, digest, bytes(256)).is_valid
    assert not there.verify(algorithm, digest, signature[:-1]).is_valid


@pytest.mark.parametrize(
    ("name", "curve", "size"),
    [
        ("ES256", "P-256", 64),
        ("ES384", "P-384", 96),
        ("ES512", "P-521", 132),
        ("ES256K", "P-256K", 64),
    ],
)
def test_curves_sign(vault: Running, keys: KeyClient, name: str, curve: str, size: int) -> None:
    """As r and s side by side."""
    key = keys.create_ec_key("curve", curve=curve)
    there, here = remote(vault, key), local(key)
    algorithm = SignatureAlgorithm(name)
    digest = hashlib.new(f"sha{name[2:5]}", b"message").digest()
    signature = there.sign(algorithm, digest).signature
    assert len(signature) == size
    assert here.verify(algorithm, digest, signature).is_valid
    assert there.verify(algorithm, digest, signature).is_valid
    assert not there.verify(algorithm, bytes(len(digest)), signature).is_valid
    assert not there.verify(algorithm, digest, bytes(size)).is_valid
    assert not there.verify(algorithm, digest, signature + b"x").is_valid


@pytest.fixture(scope="module", params=[128, 192, 256])
def shared(keys: KeyClient, request: pytest.FixtureRequest) -> tuple[KeyVaultKey, bytes]:
    """A symmetric key of every size that this test knows, too."""
    secret = os.urandom(request.param // 8)
    ops = ["encrypt", "decrypt", "wrapKey", "unwrapKey", "sign", "verify"]
    jwk = JsonWebKey(kty="oct-HSM", k=secret, key_ops=ops)
    return keys.import_key(f"shared-{request.param}", jwk), secret


def test_gcm_takes_its_nonce_from_the_vault(
    vault: Running, shared: tuple[KeyVaultKey, bytes]
) -> None:
    """And authenticates what goes with it."""
    key, secret = shared
    there = remote(vault, key)
    algorithm = EncryptionAlgorithm(f"A{len(secret) * 8}GCM")
    for aad in (None, b"with it"):
        sealed = there.encrypt(algorithm, b"data", additional_authenticated_data=aad)
        assert sealed.iv is not None
        assert sealed.tag is not None
        whole = sealed.ciphertext + sealed.tag
        assert AESGCM(secret).decrypt(sealed.iv, whole, aad) == b"data"
        opened = there.decrypt(
            algorithm,
            sealed.ciphertext,
            iv=sealed.iv,
            authentication_tag=sealed.tag,
            additional_authenticated_data=aad,
        )
        assert opened.plaintext == b"data"
        with pytest.raises(HttpResponseError) as caught:
            there.decrypt(algorithm, sealed.ciphertext, iv=sealed.iv, authentication_tag=bytes(16))
        assert caught.value.status_code == 400
    assert there.encrypt(algorithm, b"data").iv != there.encrypt(algorithm, b"data").iv


def test_cbc_with_and_without_padding(vault: Running, shared: tuple[KeyVaultKey, bytes]) -> None:
    """Microsoft's local code reads the padded one."""
    key, secret = shared
    there = remote(vault, key)
    bits = len(secret) * 8
    here = CryptographyClient.from_jwk(
        {"kty": "oct", "k": secret, "key_ops": ["encrypt", "decrypt"], "kid": key.id}
    )
    iv = os.urandom(16)
    padded = EncryptionAlgorithm(f"A{bits}CBCPAD")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in (b"", b"data", b"d" * 16):
            sealed = there.encrypt(padded, data, iv=iv).ciphertext
            assert sealed == here.encrypt(padded, data, iv=iv).ciphertext
            assert there.decrypt(padded, sealed, iv=iv).plaintext == data
        bare = EncryptionAlgorithm(f"A{bits}CBC")
        sealed = there.encrypt(bare, b"d" * 32, iv=iv).ciphertext
        cipher = Cipher(algorithms.AES(secret), modes.CBC(iv)).encryptor()
        assert sealed == cipher.update(b"d" * 32) + cipher.finalize()
        assert there.decrypt(bare, sealed, iv=iv).plaintext == b"d" * 32


@pytest.mark.parametrize("kind", ["KW", "CKM_AES_KEY_WRAP", "CKM_AES_KEY_WRAP_PAD"])
def test_keys_wrap_keys(vault: Running, shared: tuple[KeyVaultKey, bytes], kind: str) -> None:
    """RFC 3394 and RFC 5649."""
    key, secret = shared
    there = remote(vault, key)
    algorithm = KeyWrapAlgorithm(f"A{len(secret) * 8}KW" if kind == "KW" else kind)
    data = b"k" * (20 if kind.endswith("PAD") else 24)
    wrapped = there.wrap_key(algorithm, data).encrypted_key
    if kind.endswith("PAD"):
        assert keywrap.aes_key_unwrap_with_padding(secret, wrapped) == data
    else:
        assert keywrap.aes_key_unwrap(secret, wrapped) == data
    assert there.unwrap_key(algorithm, wrapped).key == data
    with pytest.raises(HttpResponseError) as caught:
        there.unwrap_key(algorithm, bytes(len(wrapped)))
    assert caught.value.status_code == 400


@pytest.mark.parametrize("name", ["HS256", "HS384", "HS512"])
def test_macs(vault: Running, shared: tuple[KeyVaultKey, bytes], name: str) -> None:
    """HMAC, as later versions of the interface have it."""
    key, secret = shared
    there = remote(vault, key)
    algorithm = SignatureAlgorithm(name)
    made = there.sign(algorithm, b"message").signature
    assert made == hmac.digest(secret, b"message", f"sha{name[2:]}")
    assert there.verify(algorithm, b"message", made).is_valid
    assert not there.verify(algorithm, b"massage", made).is_valid
    assert not there.verify(algorithm, b"message", made[:-1]).is_valid


def test_the_answer_names_the_version_that_was_used(vault: Running, rsa_key: KeyVaultKey) -> None:
    """Also where the request names none."""
    body = {"alg": "RS256", "value": b64(bytes(32))}
    answer = vault.request("POST", "/keys/rsa//sign", body)
    assert answer.json()["kid"] == rsa_key.id
    assert len(unb64(answer.json()["value"])) == 256


def status(vault: Running, path: str, body: dict[str, Any]) -> tuple[int, str]:
    answer = vault.request("POST", path, body)
    if answer.status_code == 200:
        return 200, ""
    error = answer.json()["error"]
    return answer.status_code, error.get("innererror", {}).get("code", "")


def test_a_key_is_used_as_its_operations_and_times_allow(vault: Running, keys: KeyClient) -> None:
    """What was sealed can be opened after the end, as in Azure; nothing while it is disabled."""
    key = keys.create_rsa_key("limits", key_operations=["encrypt", "decrypt"])
    seal = {"alg": "RSA-OAEP-256", "value": b64(b"data")}
    sealed = vault.request("POST", "/keys/limits//encrypt", seal).json()["value"]
    unseal = {"alg": "RSA-OAEP-256", "value": sealed}
    wrap = status(vault, "/keys/limits//wrapkey", seal)
    assert wrap == (403, "KeyOperationForbidden")
    path = f"/keys/limits/{key.properties.version}"
    for attributes, inner in (
        ({"nbf": 4_000_000_000, "exp": 4_100_000_000}, "KeyNotYetValid"),
        ({"nbf": 1, "exp": 2}, "KeyExpired"),
    ):
        assert vault.request("PATCH", path, {"attributes": attributes}).status_code == 200
        assert status(vault, path + "/encrypt", seal) == (403, inner)
        assert status(vault, path + "/decrypt", unseal) == (200, "")
    vault.request("PATCH", path, {"attributes": {"enabled": False}})
    assert status(vault, path + "/decrypt", unseal) == (403, "KeyDisabled")
    row = vault.rows()[-1]
    assert (row["decision"], row["condition"], row["expected"]) == ("refused", "enabled", True)


def test_every_use_is_in_the_audit_log_also_one_that_failed(
    vault: Running, rsa_key: KeyVaultKey
) -> None:
    """A wrong ciphertext is an attempt on the key."""
    body = {"alg": "RSA-OAEP-256", "value": b64(bytes(256))}
    answer = vault.request("POST", "/keys/rsa//decrypt", body)
    assert answer.status_code == 400
    allowed, failed = vault.rows()[-2:]
    assert (allowed["decision"], failed["decision"]) == ("allowed", "failed")
    assert failed["action"] == "keys/decrypt"
    assert failed["resource"] == f"/keys/rsa/{rsa_key.properties.version}"
    assert failed["details"]["alg"] == "RSA-OAEP-256"
    assert answer.json()["error"]["reference"] == failed["reference"]


def test_sha1_and_rsa1_5_are_off_unless_they_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """400 by default."""
    with running_vault(tmp_path_factory.mktemp("strict")) as vault:
        vault.request("POST", "/keys/rsa/create", {"kty": "RSA"})
        for name, wanted in (("RSA-OAEP", 400), ("RSA1_5", 400), ("RSA-OAEP-256", 200)):
            body = {"alg": name, "value": b64(b"data")}
            for word in ("encrypt", "wrapkey"):
                assert status(vault, f"/keys/rsa//{word}", body)[0] == wanted
