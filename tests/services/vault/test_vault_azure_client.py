"""Microsoft's own client, unmodified, against the vault: every method of KeyClient."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any

import pytest
from azure.core.exceptions import (
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.keyvault.keys import (
    ApiVersion,
    JsonWebKey,
    KeyClient,
    KeyReleasePolicy,
    KeyRotationLifetimeAction,
    KeyRotationPolicy,
    KeyRotationPolicyAction,
)
from cryptography.hazmat.primitives.asymmetric import rsa
from vault_parts import POLICY, Credential, MemoryBackend, Running, rsa_jwk, running_vault, unb64

SOON = {"_polling_interval": 0}


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    backend = MemoryBackend()
    backend.rsa = [rsa.generate_private_key(public_exponent=65537, key_size=2048)]
    with running_vault(tmp_path_factory.mktemp("azure"), backend=backend) as running:
        yield running


def client_of(vault: Running, who: str = "admin", **options: Any) -> KeyClient:
    return KeyClient(
        vault.url,
        Credential(who),  # type: ignore[arg-type]
        connection_verify=vault.ca,
        verify_challenge_resource=False,
        retry_total=0,
        **options,
    )


@pytest.fixture(scope="module")
def client(vault: Running) -> Iterator[KeyClient]:
    with client_of(vault) as found:
        yield found


def policy(**options: Any) -> KeyReleasePolicy:
    return KeyReleasePolicy(json.dumps(POLICY).encode(), **options)


def test_a_key_is_created_with_all_that_a_caller_may_say(client: KeyClient) -> None:
    """And read back, by name and by version."""
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    end = dt.datetime(2126, 1, 1, tzinfo=dt.UTC)
    made = client.create_rsa_key(
        "all",
        size=2048,
        hardware_protected=True,
        key_operations=["wrapKey", "unwrapKey"],
        enabled=True,
        tags={"owner": "bank"},
        not_before=start,
        expires_on=end,
        exportable=True,
        release_policy=policy(),
    )
    read = client.get_key("all", made.properties.version)
    newest = client.get_key("all")
    for key in (made, read, newest):
        assert key.id == made.id
        assert key.key_type == "RSA-HSM"
        assert key.key_operations == ["wrapKey", "unwrapKey"]
        assert key.key.n == made.key.n
        assert key.properties.enabled is True
        assert key.properties.not_before == start
        assert key.properties.expires_on == end
        assert key.properties.tags == {"owner": "bank"}
        assert key.properties.exportable is True
        assert key.properties.recoverable_days == 90
        assert key.properties.recovery_level == "Recoverable+Purgeable"
        assert key.properties.created_on is not None
        found = key.properties.release_policy
        assert found is not None
        assert json.loads(found.encoded_policy) == POLICY
        assert found.immutable is False


@pytest.mark.parametrize(
    ("kind", "curve"), [("EC", None), ("EC", "P-384"), ("EC-HSM", "P-521"), ("EC", "P-256K")]
)
def test_curves_are_made_with_their_own_coordinates(
    client: KeyClient, kind: str, curve: str | None
) -> None:
    """P-256 where none is named."""
    key = client.create_ec_key("curve", curve=curve, hardware_protected=kind == "EC-HSM")
    assert key.key_type == kind
    assert key.key.crv == (curve or "P-256")
    assert len(key.key.x) == {"P-384": 48, "P-521": 66}.get(curve or "", 32)
    assert key.key_operations == ["sign", "verify"]


@pytest.mark.parametrize("size", [None, 128, 192, 256])
def test_a_symmetric_key_shows_nothing_of_itself(client: KeyClient, size: int | None) -> None:
    """Neither k nor anything like it."""
    key = client.create_oct_key("shared", size=size, hardware_protected=True)
    assert key.key_type == "oct-HSM"
    assert key.key.k is None


def test_a_second_create_makes_another_version(client: KeyClient) -> None:
    """The first stays; the newest answers without a version."""
    first = client.create_ec_key("twice")
    second = client.create_key("twice", "EC")
    assert first.properties.version != second.properties.version
    assert client.get_key("twice").id == second.id
    assert client.get_key("twice", first.properties.version).id == first.id


def test_an_imported_key_is_that_key(client: KeyClient) -> None:
    """As a software and as a hardware key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    jwk = {name: value if name == "kty" else unb64(value) for name, value in rsa_jwk(key).items()}
    soft = client.import_key("imported", JsonWebKey(**jwk))
    assert soft.key_type == "RSA"
    assert int.from_bytes(soft.key.n, "big") == key.public_key().public_numbers().n
    hard = client.import_key(
        "imported",
        JsonWebKey(**jwk),
        hardware_protected=True,
        exportable=True,
        release_policy=policy(),
        tags={"a": "b"},
        enabled=False,
    )
    assert hard.key_type == "RSA-HSM"
    assert hard.properties.exportable is True
    assert hard.properties.enabled is False
    assert hard.key.d is None


def test_properties_change_one_by_one(client: KeyClient) -> None:
    """What is not named stays."""
    made = client.create_ec_key("changing", tags={"a": "1"})
    end = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
    client.update_key_properties("changing", enabled=False)
    client.update_key_properties("changing", made.properties.version, expires_on=end)
    changed = client.update_key_properties("changing", key_operations=["verify"])
    assert changed.id == made.id
    assert changed.properties.enabled is False
    assert changed.properties.expires_on == end
    assert changed.properties.tags == {"a": "1"}
    assert changed.key_operations == ["verify"]
    emptied = client.update_key_properties("changing", tags={})
    assert not emptied.properties.tags


def test_a_mutable_policy_changes_and_an_immutable_one_never(client: KeyClient) -> None:
    """AKV.SKR.1020; the same policy again is no change."""
    client.create_ec_key(
        "policed", hardware_protected=True, exportable=True, release_policy=policy()
    )
    other = json.dumps(POLICY | {"version": "1.0.0"}, indent=1).encode()
    changed = client.update_key_properties("policed", release_policy=KeyReleasePolicy(other))
    assert changed.properties.release_policy is not None
    assert changed.properties.release_policy.encoded_policy == other
    client.update_key_properties("policed", release_policy=policy(immutable=True))
    with pytest.raises(HttpResponseError, match=r"AKV\.SKR\.1020") as caught:
        client.update_key_properties("policed", release_policy=KeyReleasePolicy(other))
    assert caught.value.status_code == 400
    again = client.update_key_properties("policed", release_policy=policy())
    assert again.properties.release_policy is not None
    assert again.properties.release_policy.immutable is True
    assert json.loads(again.properties.release_policy.encoded_policy) == POLICY


def test_a_key_that_is_not_exportable_gets_no_policy_and_the_reverse(client: KeyClient) -> None:
    """AKV.SKR.1004 and 1005, as Azure numbers them."""
    with pytest.raises(HttpResponseError, match=r"AKV\.SKR\.1004"):
        client.create_rsa_key("skr", hardware_protected=True, exportable=True)
    client.create_ec_key("skr", hardware_protected=True)
    with pytest.raises(HttpResponseError, match=r"AKV\.SKR\.1005"):
        client.update_key_properties("skr", release_policy=policy())


def test_a_further_version_of_an_exportable_key_has_the_policy_of_the_one_before(
    client: KeyClient,
) -> None:
    """Azure wants a policy with the first version only."""
    options: dict[str, Any] = {"hardware_protected": True, "exportable": True}
    client.create_ec_key("heir", release_policy=policy(immutable=True), **options)
    second = client.create_ec_key("heir", **options)
    found = second.properties.release_policy
    assert found is not None
    assert json.loads(found.encoded_policy) == POLICY
    assert found.immutable is True


def test_lists_come_in_pages_and_whole(client: KeyClient) -> None:
    """Keys, versions, deleted keys; identifiers of keys have no version."""
    names = {f"listed-{number:02}" for number in range(7)}
    for name in names:
        client.create_oct_key(name)
    for _ in range(5):
        client.create_oct_key("listed-00")
    for size in (None, 1, 3):
        listed = list(client.list_properties_of_keys(max_page_size=size))
        assert len({item.name for item in listed}) == len(listed)
        assert names <= {item.name for item in listed}
        assert all(item.version is None for item in listed)
        versions = list(client.list_properties_of_key_versions("listed-00", max_page_size=size))
        assert len({item.version for item in versions}) == 6
    assert list(client.list_properties_of_key_versions("no-such-key")) == []
    for name in names:
        client.begin_delete_key(name, **SOON).wait()
    deleted = {item.name: item for item in client.list_deleted_keys(max_page_size=2)}
    assert names <= set(deleted)
    assert deleted["listed-00"].recovery_id.endswith("/deletedkeys/listed-00")
    assert not names & {item.name for item in client.list_properties_of_keys()}


def test_a_deleted_key_comes_back_with_all_its_versions(client: KeyClient) -> None:
    """Until then its name is taken, and nobody can use it."""
    first = client.create_ec_key("mortal")
    second = client.create_ec_key("mortal")
    poller = client.begin_delete_key("mortal", **SOON)
    poller.wait()
    gone = poller.result()
    assert gone.id == second.id
    assert gone.scheduled_purge_date is not None
    assert gone.deleted_date is not None
    assert (gone.scheduled_purge_date - gone.deleted_date).days == 90
    with pytest.raises(ResourceNotFoundError):
        client.get_key("mortal")
    with pytest.raises(ResourceNotFoundError):
        client.get_key("mortal", first.properties.version)
    with pytest.raises(ResourceExistsError) as caught:
        client.create_ec_key("mortal")
    inner = caught.value.response.json()["error"]["innererror"]["code"]  # type: ignore[union-attr]
    assert inner == "ObjectIsDeletedButRecoverable"
    with pytest.raises(ResourceNotFoundError):
        client.begin_delete_key("mortal")
    assert client.get_deleted_key("mortal").id == second.id
    recovered = client.begin_recover_deleted_key("mortal", **SOON)
    recovered.wait()
    assert recovered.result().id == second.id
    assert client.get_key("mortal", first.properties.version).id == first.id
    with pytest.raises(ResourceNotFoundError):
        client.get_deleted_key("mortal")
    with pytest.raises(ResourceNotFoundError):
        client.begin_recover_deleted_key("mortal")


def test_a_purged_key_is_gone_and_its_backup_brings_it_back(client: KeyClient) -> None:
    """With every version, its policy of rotation, and only where the name is free."""
    first = client.create_ec_key("backed", tags={"n": "1"})
    second = client.create_ec_key("backed", tags={"n": "2"})
    rotation = KeyRotationPolicy(expires_in="P90D")
    client.update_key_rotation_policy("backed", rotation)
    blob = client.backup_key("backed")
    with pytest.raises(ResourceExistsError):
        client.restore_key_backup(blob)
    client.begin_delete_key("backed", **SOON).wait()
    with pytest.raises(ResourceExistsError):
        client.restore_key_backup(blob)
    client.purge_deleted_key("backed")
    for read in (client.get_key, client.get_deleted_key, client.purge_deleted_key):
        with pytest.raises(ResourceNotFoundError):
            read("backed")
    restored = client.restore_key_backup(blob)
    assert restored.id == second.id
    assert restored.properties.tags == {"n": "2"}
    assert client.get_key("backed", first.properties.version).properties.tags == {"n": "1"}
    assert client.get_key_rotation_policy("backed").expires_in == "P90D"
    crypto = client.get_cryptography_client("backed")
    signature = crypto.sign("ES256", b"d" * 32).signature  # type: ignore[arg-type]
    assert crypto.verify("ES256", b"d" * 32, signature).is_valid  # type: ignore[arg-type]


def test_a_changed_backup_is_refused(client: KeyClient) -> None:
    """Every part of it is authenticated."""
    client.create_oct_key("blob")
    blob = client.backup_key("blob")
    client.begin_delete_key("blob", **SOON).wait()
    client.purge_deleted_key("blob")
    for at in (0, 9, 20, len(blob) // 2, len(blob) - 1):
        changed = bytearray(blob)
        changed[at] ^= 1
        with pytest.raises(HttpResponseError) as caught:
            client.restore_key_backup(bytes(changed))
        assert caught.value.status_code == 400
    for wrong in (blob[:-1], blob + b"x", b"x"):
        with pytest.raises(HttpResponseError):
            client.restore_key_backup(wrong)
    assert client.restore_key_backup(blob).name == "blob"


def test_a_backup_of_another_vault_is_refused(
    client: KeyClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its secrets are others."""
    client.create_oct_key("stranger")
    blob = client.backup_key("stranger")
    with running_vault(tmp_path_factory.mktemp("other")) as other, client_of(other) as there:
        with pytest.raises(HttpResponseError, match="another vault"):
            there.restore_key_backup(blob)
        assert list(there.list_properties_of_keys()) == []


def test_random_bytes_are_as_many_as_asked_for(client: KeyClient) -> None:
    """1 to 128."""
    for count in (1, 16, 128):
        assert len(client.get_random_bytes(count)) == count
    assert client.get_random_bytes(32) != client.get_random_bytes(32)
    with pytest.raises(HttpResponseError):
        client.get_random_bytes(129)


def test_a_rotated_key_is_like_the_one_before(client: KeyClient) -> None:
    """With a life of its policy's length, and a public half of its own."""
    made = client.create_ec_key(
        "turning",
        curve="P-384",
        hardware_protected=True,
        exportable=True,
        release_policy=policy(immutable=True),
        tags={"a": "b"},
        key_operations=["sign"],
    )
    shown = client.update_key_rotation_policy(
        "turning",
        KeyRotationPolicy(),
        expires_in="P2M",
        lifetime_actions=[
            KeyRotationLifetimeAction(KeyRotationPolicyAction.rotate, time_after_create="P30D"),
            KeyRotationLifetimeAction(KeyRotationPolicyAction.notify, time_before_expiry="P7D"),
        ],
    )
    assert shown.id is not None
    assert shown.id.endswith("/keys/turning/rotationpolicy")
    assert shown.expires_in == "P2M"
    assert shown.created_on is not None
    read = client.get_key_rotation_policy("turning")
    assert [
        (action.action, action.time_after_create, action.time_before_expiry)
        for action in read.lifetime_actions
    ] == [("Rotate", "P30D", None), ("Notify", None, "P7D")]
    turned = client.rotate_key("turning")
    assert turned.properties.version != made.properties.version
    assert client.get_key("turning").id == turned.id
    assert turned.key.x != made.key.x
    assert (turned.key.crv, turned.key_type, turned.key_operations) == ("P-384", "EC-HSM", ["sign"])
    assert turned.properties.tags == {"a": "b"}
    assert turned.properties.release_policy is not None
    assert turned.properties.release_policy.immutable is True
    assert turned.properties.expires_on is not None
    assert turned.properties.created_on is not None
    assert 59 <= (turned.properties.expires_on - turned.properties.created_on).days <= 62


def test_a_key_without_a_rotation_policy_has_azures_default(client: KeyClient) -> None:
    """A notice thirty days before the end."""
    client.create_oct_key("plain")
    found = client.get_key_rotation_policy("plain")
    assert [(a.action, a.time_before_expiry) for a in found.lifetime_actions] == [
        ("Notify", "P30D")
    ]
    with pytest.raises(ResourceNotFoundError):
        client.get_key_rotation_policy("no-such-key")


def test_every_version_of_the_interface_that_the_client_has_from_7_3_on_works(
    vault: Running,
) -> None:
    """Older ones are told that they are not supported."""
    for version in ApiVersion:
        with client_of(vault, api_version=version) as client:
            if version.value in ("2016-10-01", "7.0", "7.1", "7.2"):
                with pytest.raises(HttpResponseError) as caught:
                    client.get_key("all")
                assert caught.value.status_code == 400
            else:
                assert client.create_ec_key("versions").name == "versions"


def test_a_caller_without_rights_gets_forbidden_by_rbac(vault: Running) -> None:
    """And the code that Azure's tools look for."""
    with client_of(vault, "stranger") as client:
        with pytest.raises(HttpResponseError) as caught:
            client.get_key("all")
        error = caught.value
        assert error.status_code == 403
        assert error.error is not None
        assert error.error.code == "Forbidden"


def test_a_key_that_is_not_there_is_azures_key_not_found(client: KeyClient) -> None:
    """404 with its code."""
    with pytest.raises(ResourceNotFoundError) as caught:
        client.get_key("nothing-here")
    assert caught.value.error is not None
    assert caught.value.error.code == "KeyNotFound"


def test_the_attestation_of_a_key_says_what_the_backend_has(client: KeyClient) -> None:
    """A backend in memory attests nothing, and says so."""
    client.create_ec_key("attested")
    with pytest.raises(HttpResponseError) as caught:
        client.get_key_attestation("attested")
    assert caught.value.status_code == 400
