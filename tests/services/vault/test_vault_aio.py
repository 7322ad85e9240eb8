"""Microsoft's asynchronous client, unmodified: every method once."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from azure.keyvault.keys import (
    JsonWebKey,
    KeyReleasePolicy,
    KeyRotationLifetimeAction,
    KeyRotationPolicy,
)
from azure.keyvault.keys.aio import KeyClient
from azure.keyvault.keys.crypto import EncryptionAlgorithm, KeyWrapAlgorithm, SignatureAlgorithm
from azure.keyvault.keys.crypto.aio import CryptographyClient
from vault_parts import POLICY, AsyncCredential, Running, running_vault

QUICK: dict[str, Any] = {"_polling_interval": 0.01}


def options(vault: Running) -> dict[str, Any]:
    return {
        "connection_verify": vault.ca,
        "verify_challenge_resource": False,
        "retry_total": 0,
    }


async def use(vault: Running, client: KeyClient) -> None:
    policy = KeyReleasePolicy(json.dumps(POLICY).encode())
    made = await client.create_ec_key(
        "aio", hardware_protected=True, exportable=True, release_policy=policy
    )
    assert (await client.get_key("aio")).id == made.id
    rsa = await client.create_rsa_key("rsa", size=2048)
    await client.create_key("oct", "oct")
    await client.create_oct_key("oct", size=128)
    jwk = JsonWebKey(kty="oct", k=b"k" * 32, key_ops=["wrapKey", "unwrapKey"])
    shared = await client.import_key("shared", jwk)
    assert (await client.update_key_properties("aio", tags={"a": "b"})).properties.tags
    names = {item.name async for item in client.list_properties_of_keys(max_page_size=1)}
    assert names == {"aio", "rsa", "oct", "shared"}
    assert len([_ async for _ in client.list_properties_of_key_versions("oct")]) == 2
    rotation = await client.update_key_rotation_policy(
        "aio",
        KeyRotationPolicy(),
        expires_in="P90D",
        lifetime_actions=[KeyRotationLifetimeAction("Rotate", time_after_create="P30D")],
    )
    assert rotation.expires_in == "P90D"
    assert (await client.get_key_rotation_policy("aio")).expires_in == "P90D"
    assert (await client.rotate_key("aio")).id != made.id
    assert len(await client.get_random_bytes(9)) == 9
    with pytest.raises(HttpResponseError):
        await client.get_key_attestation("aio")
    blob = await client.backup_key("oct")
    await client.delete_key("oct", **QUICK)
    assert [item.name async for item in client.list_deleted_keys()] == ["oct"]
    assert (await client.get_deleted_key("oct")).name == "oct"
    await client.recover_deleted_key("oct", **QUICK)
    await client.delete_key("oct", **QUICK)
    await client.purge_deleted_key("oct")
    with pytest.raises(ResourceNotFoundError):
        await client.get_key("oct")
    assert (await client.restore_key_backup(blob)).name == "oct"
    with pytest.raises(HttpResponseError):
        await client.release_key("aio", "not.a.token")
    async with client.get_cryptography_client("aio") as crypto:
        digest = hashlib.sha256(b"message").digest()
        signed = await crypto.sign(SignatureAlgorithm.es256, digest)
        assert (await crypto.verify(SignatureAlgorithm.es256, digest, signed.signature)).is_valid
    for key, wrap in ((rsa, KeyWrapAlgorithm.rsa_oaep_256), (shared, KeyWrapAlgorithm.aes_256)):
        async with CryptographyClient(key, AsyncCredential(), **options(vault)) as crypto:  # type: ignore[arg-type]
            wrapped = await crypto.wrap_key(wrap, b"k" * 16)
            assert (await crypto.unwrap_key(wrap, wrapped.encrypted_key)).key == b"k" * 16
    async with CryptographyClient(rsa, AsyncCredential(), **options(vault)) as crypto:  # type: ignore[arg-type]
        sealed = await crypto.encrypt(EncryptionAlgorithm.rsa_oaep_256, b"data")
        opened = await crypto.decrypt(EncryptionAlgorithm.rsa_oaep_256, sealed.ciphertext)
        assert opened.plaintext == b"data"


def test_the_asynchronous_client_does_everything(tmp_path: Path) -> None:
    """As the synchronous one does."""

    async def main(vault: Running) -> None:
        async with KeyClient(vault.url, AsyncCredential(), **options(vault)) as client:  # type: ignore[arg-type]
            await use(vault, client)

    with running_vault(tmp_path) as vault:
        asyncio.run(main(vault))
