"""The vault as its configuration describes it: the issuer, roles and the enclave together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from azure.core.credentials import AccessToken
from azure.core.exceptions import HttpResponseError
from azure.keyvault.keys import KeyClient
from azure.keyvault.keys.crypto import SignatureAlgorithm
from vault_parts import b64

from pyenclave.errors import ConfigurationError
from pyenclave.services.vault import build
from pyenclave.services.web.development import Development, development
from pyenclave.services.web.limits import Limits
from pyenclave.services.web.run import Server


class Place:
    """A development vault and where it is."""

    def __init__(self, dev: Development, url: str, ca: Path) -> None:
        self.dev = dev
        self.url = url
        self.ca = ca

    def client(self, principal: str | None = None) -> KeyClient:
        dev = self.dev

        class Credential:
            def get_token(self, *scopes: str, **options: Any) -> AccessToken:
                token = dev.token() if principal is None else dev.issuer.token(object_id=principal)
                return AccessToken(token, int(time.time()) + 3600)

        return KeyClient(
            self.url,
            Credential(),  # type: ignore[arg-type]
            connection_verify=str(self.ca),
            verify_challenge_resource=False,
            retry_total=0,
        )

    def send(self, method: str, path: str, body: Any) -> httpx.Response:
        return httpx.request(
            method,
            f"{self.url}{path}?api-version=7.4",
            json=body,
            headers={"authorization": f"Bearer {self.dev.token()}"},
            verify=ssl.create_default_context(cafile=str(self.ca)),
            timeout=110,
        )

    def post(self, path: str, body: Any) -> dict[str, Any]:
        answer = self.send("POST", path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]


@contextlib.contextmanager
def serving(state: Path, folder: Path) -> Iterator[Place]:
    """Build a vault from development's settings and serve it."""
    listening = Server(None, dangerous_no_tls=True)
    port = int(listening.listen().rpartition(":")[2])
    assert listening._socket is not None
    listening._socket.close()
    database = f"sqlite:///{folder / 'vault.db'}"
    dev = development("vault", state, url=f"https://127.0.0.1:{port}", database=database)
    # The machine that runs this may be slow to build and launch the enclave.
    config = dev.config.replace(limits=Limits(total_seconds=110))
    with Server(build(config), port=port, tls=config.tls) as server:
        ca = folder / "ca.pem"
        ca.write_bytes(dev.ca.pem)
        yield Place(dev, server.url, ca)


def test_a_vault_with_its_enclave_keeps_keys_over_a_restart(
    enclave_state: Path, tmp_path: Path
) -> None:
    """Made, used and wrapped inside; read back by the next process's objects."""
    digest = hashlib.sha256(b"message").digest()
    with serving(enclave_state, tmp_path) as place, place.client() as client:
        made = client.create_ec_key("signing", hardware_protected=True)
        signed = client.get_cryptography_client("signing").sign(SignatureAlgorithm.es256, digest)
        client.create_oct_key("wrapping", hardware_protected=True)
        wrap = {"alg": "A256KW", "value": b64(b"k" * 32)}
        wrapped = place.post("/keys/wrapping//wrapkey", wrap)["value"]
        blob = client.backup_key("signing")
        assert len(client.get_random_bytes(20)) == 20
    with serving(enclave_state, tmp_path) as place, place.client() as client:
        assert client.get_key("signing").properties.version == made.properties.version
        again = client.get_cryptography_client("signing")
        assert again.verify(SignatureAlgorithm.es256, digest, signed.signature).is_valid
        unwrap = {"alg": "A256KW", "value": wrapped}
        assert place.post("/keys/wrapping//unwrapkey", unwrap)["value"] == b64(b"k" * 32)
        client.begin_delete_key("signing", _polling_interval=0).wait()
        client.purge_deleted_key("signing")
        client.restore_key_backup(blob)
        assert client.get_cryptography_client("signing").sign(SignatureAlgorithm.es256, digest)


def test_roles_decide_who_does_what(enclave_state: Path, tmp_path: Path) -> None:
    """Nothing without one; a role at a key is a role at that key."""
    with serving(enclave_state, tmp_path) as place, place.client() as admin:
        admin.create_oct_key("mine")
        admin.create_oct_key("other")
        somebody = "11111111-1111-4111-8111-111111111111"
        user = "12338af0-0e69-4776-bea7-57ae8d297424"
        with place.client(somebody) as client:
            with pytest.raises(HttpResponseError) as caught:
                client.get_key("mine")
            assert caught.value.status_code == 403
            path = "/keys/mine/providers/Microsoft.Authorization/roleAssignments"
            assign(place, f"{path}/22222222-2222-4222-8222-222222222222", somebody, user)
            assert client.get_key("mine").name == "mine"
            for refused in (
                lambda: client.get_key("other"),
                lambda: client.get_key("nothing"),
                lambda: client.create_oct_key("mine"),
                lambda: client.begin_delete_key("mine"),
                lambda: list(client.list_properties_of_keys()),
            ):
                with pytest.raises(HttpResponseError) as caught:
                    refused()
                assert caught.value.status_code == 403


def assign(place: Place, path: str, principal: str, role: str) -> None:
    """Give somebody a role over the interface of role assignments."""
    definition = f"Microsoft.KeyVault/providers/Microsoft.Authorization/roleDefinitions/{role}"
    body = {"properties": {"principalId": principal, "roleDefinitionId": definition}}
    answer = place.send("PUT", path, body)
    assert answer.status_code in (200, 201), answer.text


def test_development_describes_itself_and_an_unknown_backend_is_refused(
    enclave_state: Path, tmp_path: Path
) -> None:
    """``/openapi.json`` without a token; a backend that is not understood opens nothing."""
    with serving(enclave_state, tmp_path) as place:
        context = ssl.create_default_context(cafile=str(place.ca))
        answer = httpx.get(f"{place.url}/openapi.json", verify=context)
        assert answer.status_code == 200
        assert "/keys/{name}/create" in json.loads(answer.content)["paths"]
        with pytest.raises(ConfigurationError, match="no such key backend"):
            build(place.dev.config.replace(backend="drawer"))
