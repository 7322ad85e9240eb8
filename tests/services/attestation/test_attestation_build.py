"""The service as ``serve attestation`` makes it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")

from pyenclave.errors import ConfigurationError, PlatformUnavailableError
from pyenclave.services import attestation
from pyenclave.services.web.config import AUDIENCE
from pyenclave.services.web.development import development
from pyenclave.services.web.run import Server


class _Token(NamedTuple):
    token: str
    expires_on: int


class _Credential:
    def __init__(self, token: str) -> None:
        self.token = token

    def get_token(self, *scopes: str, **options: Any) -> _Token:
        del scopes, options
        return _Token(self.token, int(time.time()) + 600)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path))
    return tmp_path


def test_development_is_whole(state: Path, free_port: Callable[[], int]) -> None:
    attest = pytest.importorskip("azure.security.attestation")
    port = free_port()
    dev = development("attestation", state, url=f"https://127.0.0.1:{port}")
    service = attestation.build(dev.config)
    ca = str(dev.ca.path)
    with (
        Server(service, port=port, tls=dev.config.tls) as server,
        httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=ca)) as client,
    ):
        keys = client.get("/certs").json()["keys"]
        # What relying parties of Azure's tokens pin, unless it is configured otherwise.
        assert {key["alg"] for key in keys} == {"RS256"}
        found = client.get("/.well-known/openid-configuration").json()
        assert found["issuer"] == dev.config.url
        answer = client.get("/policies/SgxEnclave", params={"api-version": "2022-08-01"})
        assert answer.status_code == 401
        assert "authorization=" in answer.headers["www-authenticate"]
        token = dev.issuer.token(object_id="somebody", audience="https://attest.azure.net")
        answer = client.get(
            "/policies/SgxEnclave",
            params={"api-version": "2022-08-01"},
            headers={"authorization": f"Bearer {token}"},
        )
        assert answer.status_code == 403
        assert "Attestation Reader" in answer.json()["error"]["message"]
        with attest.AttestationAdministrationClient(
            server.url, _Credential(dev.token()), connection_verify=ca, retry_total=0
        ) as admin:
            text, _ = admin.get_policy("PyEnclave")
            assert admin.set_policy("PyEnclave", text)[0].policy_resolution == "Updated"


def test_a_vaults_token_is_none_for_this_service_in_production(state: Path) -> None:
    from pyenclave.services.attestation.configured import _audiences

    dev = development("attestation", state, url="https://127.0.0.1:1")
    unnamed = dev.config.replace(dev=False, audiences=(AUDIENCE,))  # the settings' default
    assert _audiences(unnamed) == ("https://attest.azure.net",)
    named = dev.config.replace(dev=False, audiences=("api://own",))
    assert _audiences(named) == ("api://own",)


def test_wrong_settings_stop_the_start(state: Path) -> None:
    dev = development("attestation", state, url="https://127.0.0.1:1")
    config = dev.config.replace(dev=False)
    with pytest.raises(ConfigurationError, match="ear_form"):
        attestation.build(config.replace(ear_form="plain"))
    with pytest.raises(ConfigurationError, match="signing_algorithm"):
        attestation.build(config.replace(signing_algorithm="none"))
    with pytest.raises(OSError, match="missing"):
        attestation.build(config.replace(collateral=str(state / "missing")))


def test_synthetic_machines_can_be_tried_on_a_laptop(
    state: Path,
    tmp_path_factory: pytest.TempPathFactory,
    helpers: Any,
    monkeypatch: pytest.MonkeyPatch,
    free_port: Callable[[], int],
) -> None:
    """Roots and collateral are given; a refusal says in development which rules fired."""
    from datetime import UTC, datetime

    def absent() -> None:
        raise PlatformUnavailableError("no platform runs here")

    monkeypatch.setattr("pyenclave._platform.client.local_platform_root", absent)

    from pyenclave.formats.sgx import Attributes
    from pyenclave.testing.intel import IntelPlatform

    machine = IntelPlatform(datetime.now(UTC))
    folder = tmp_path_factory.mktemp("collateral")
    for name, data in machine.endorsements().items():
        (folder / name).write_bytes(data)
    port = free_port()
    dev = development("attestation", state, url=f"https://127.0.0.1:{port}")
    config = dev.config.replace(platform_roots=(machine.root,), collateral=str(folder))
    context = ssl.create_default_context(cafile=str(dev.ca.path))
    with (
        Server(attestation.build(config), port=port, tls=config.tls) as server,
        httpx.Client(base_url=server.url, verify=context) as client,
    ):
        path = "/attest/SgxEnclave?api-version=2022-08-01"
        body = {"quote": helpers.b64(machine.enclave_quote())}
        assert client.post(path, json=body).status_code == 200
        debug = machine.enclave_quote(attributes=Attributes(flags=0x07, xfrm=0xE7))
        error = client.post(path, json={"quote": helpers.b64(debug)}).json()["error"]
        assert error["code"] == "PolicyEvaluationError"
        assert "no rule permits; rules that fired: none" in error["message"]
