"""Tokens of this service before the vault's decision: what is released, and what a draft gets."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.formats.jwk import Jwks, public_members
from pyenclave.formats.release_decision import Decision, decide

SGX = "/attest/SgxEnclave"


@pytest.fixture(scope="module")
def runtime() -> bytes:
    """Return runtime data with a transfer key."""
    key = rsa.generate_private_key(65537, 2048).public_key()
    jwk = {**public_members(key), "kid": "transfer", "key_ops": ["encrypt"]}
    return json.dumps({"keys": [jwk]}).encode()


def _decide(site: Any, token: str, **claims: Any) -> Decision:
    """Decide on a key that is for one measurement, attested by *site*."""
    conditions = {"x-ms-sgx-mrenclave": bytes(range(32)).hex(), "x-ms-attestation-type": "sgx"}
    policy = {
        "version": "1.0.0",
        "anyOf": [
            {
                "authority": site.url,
                "allOf": [
                    {"claim": name, "equals": value}
                    for name, value in (conditions | claims).items()
                ],
            }
        ],
    }
    key: Any = SimpleNamespace(
        enabled=True,
        not_before=None,
        expires=None,
        exportable=True,
        kty="RSA-HSM",
        release_policy=json.dumps(policy).encode(),
    )
    keys = Jwks.from_bytes(site.client.get("/certs").content)
    return decide(key, token, find=lambda _, kid: keys.find(kid), now=time.time())


def _token(site: Any, helpers: Any, runtime: bytes, version: str, **members: Any) -> str:
    quote = helpers.b64(site.quote(runtime))
    body = {"quote": quote, "runtimeData": helpers.bound(runtime)} | members
    answer = site.post(SGX, body, query={"api-version": version})
    return str(answer.json()["token"])


@pytest.mark.parametrize("version", ["2020-10-01", "2022-08-01"])
def test_a_key_is_released_for_a_token(
    site: Any, helpers: Any, runtime: bytes, version: str
) -> None:
    decision = _decide(site, _token(site, helpers, runtime, version))
    assert decision.failed is None, decision.failed
    assert decision.transfer is not None


def test_other_code_gets_no_key(site: Any, helpers: Any, runtime: bytes) -> None:
    token = _token(site, helpers, runtime, "2022-08-01")
    decision = _decide(site, token, **{"x-ms-sgx-mrenclave": "00" * 32})
    assert decision.transfer is None


def test_a_draft_gets_no_key(site: Any, helpers: Any, runtime: bytes) -> None:
    text = "version=1.0; authorizationrules { => permit(); }; issuancerules { };"
    draft = _token(site, helpers, runtime, "2022-08-01", draftPolicyForAttestation=text)
    decision = _decide(site, draft)
    assert decision.transfer is None
    assert decision.failed is not None
    assert decision.failed.name.startswith("token.")


def test_an_ear_gets_no_key(site: Any, helpers: Any, runtime: bytes) -> None:
    """Release policies speak of Azure's claims, which an EAR has elsewhere."""
    quote = helpers.b64(site.quote(runtime))
    body = {"quote": quote, "runtimeData": helpers.bound(runtime)}
    token = site.post(SGX, body, query={"format": "ear"}).json()["token"]
    assert _decide(site, token).transfer is None
