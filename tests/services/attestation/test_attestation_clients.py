"""Clients that others wrote talk to the service unmodified."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import time
from typing import Any, NamedTuple

import pytest

POLICY = """version=1.0;
authorizationrules
{
  [type=="x-ms-sgx-is-debuggable", value==false] => permit();
};
issuancerules
{
  c:[type=="x-ms-sgx-mrsigner"] => issue(type="signed-by", value=c.value);
};
"""


class _AccessToken(NamedTuple):
    token: str
    expires_on: int


class _Credential:
    """Any token: who it is, the service's authenticator says."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_token(self, *scopes: str, **options: Any) -> _AccessToken:
        assert scopes == ("https://attest.azure.net/.default",)
        return _AccessToken(self.name, int(time.time()) + 3600)


def _signing(name: str) -> tuple[str, str]:
    """Return a PEM key and a self-signed PEM certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=2))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture(scope="module")
def azure(site: Any) -> Any:
    attestation = pytest.importorskip("azure.security.attestation")
    client = attestation.AttestationClient(
        site.url, _Credential("anybody"), connection_verify=str(site.ca), retry_total=0
    )
    with client:
        yield client


def _admin(site: Any, name: str = "admin", **options: Any) -> Any:
    attestation = pytest.importorskip("azure.security.attestation")
    return attestation.AttestationAdministrationClient(
        site.url, _Credential(name), connection_verify=str(site.ca), retry_total=0, **options
    )


def test_azures_client_attests_an_enclave(site: Any, azure: Any) -> None:
    runtime = b'{"keys":[]}'
    result, token = azure.attest_sgx_enclave(
        site.quote(runtime, isv_prod_id=7, isv_svn=3),
        runtime_json=runtime,
        validate_issuer=True,
        issuer=site.url,
    )
    assert result.issuer == site.url
    assert result.version == "1.0"
    assert result.verifier_type == "sgx"
    assert result.is_debuggable is False
    assert (result.product_id, result.svn) == (7, 3)
    assert result.mr_enclave == bytes(range(32)).hex()
    assert result.runtime_claims == {"keys": []}
    assert result.enclave_held_data is None
    assert set(result.sgx_collateral) >= {"qeidhash", "quotehash", "tcbinfohash"}
    assert token.algorithm == "RS256"


def test_azures_client_attests_an_open_enclave_report(site: Any, azure: Any) -> None:
    data = b"held by the enclave"
    quote = site.quote(data)
    report = (
        (1).to_bytes(4, "little") + (2).to_bytes(4, "little") + len(quote).to_bytes(8, "little")
    )
    result, _ = azure.attest_open_enclave(report + quote, runtime_data=data)
    assert result.enclave_held_data == data
    assert result.runtime_claims is None


def test_azures_client_gets_an_unsecured_token_for_a_draft(site: Any, azure: Any) -> None:
    _, token = azure.attest_sgx_enclave(site.quote(), draft_policy=POLICY)
    assert token.algorithm == "none"


def test_azures_client_is_told_why(site: Any, azure: Any) -> None:
    from azure.core.exceptions import HttpResponseError

    with pytest.raises(HttpResponseError) as caught:
        azure.attest_sgx_enclave(site.quote(b"one"), runtime_data=b"another")
    assert caught.value.status_code == 400
    assert caught.value.model.error.code == "AttestationFailed"
    assert "binding.runtimeData" in caught.value.model.error.message


def test_azures_client_reads_metadata(site: Any, azure: Any) -> None:
    found = azure.get_open_id_metadata()
    assert found["issuer"] == site.url
    assert found["jwks_uri"] == f"{site.url}/certs"
    assert len(azure.get_signing_certificates()) == 2


def test_azures_client_manages_policies(site: Any) -> None:
    from azure.security.attestation import AttestationPolicyToken

    with _admin(site) as client:
        before, _ = client.get_policy("TdxVm")
        assert before.startswith("version=1.0;")
        result, _ = client.set_policy("TdxVm", before + "\n")
        assert result.policy_resolution == "Updated"
        expected = AttestationPolicyToken(before + "\n").to_jwt_string()
        assert result.policy_token_hash == hashlib.sha256(expected.encode()).digest()
        assert client.get_policy("TdxVm")[0] == before + "\n"
        result, _ = client.reset_policy("TdxVm")
        assert result.policy_resolution == "Removed"
        assert client.get_policy("TdxVm")[0] == before
        assert client.get_policy_management_certificates()[0] == []


def test_azures_client_signs_policies(site: Any) -> None:
    key, certificate = _signing("policy")
    with _admin(site, signing_key=key, signing_certificate=certificate) as client:
        result, _ = client.set_policy("OpenEnclave", POLICY)
        assert result.policy_signer.certificates[0].strip() == certificate.strip()
        assert client.get_policy("OpenEnclave")[0] == POLICY
        client.reset_policy("OpenEnclave")


def test_azures_client_manages_the_signers_of_an_isolated_instance(make_site: Any) -> None:
    from azure.core.exceptions import HttpResponseError

    key, certificate = _signing("first")
    other_key, other = _signing("second")
    site = make_site(signers=(certificate.encode(),))
    with _admin(site) as client, pytest.raises(HttpResponseError, match="isolated"):
        client.set_policy("SgxEnclave", POLICY)
    with (
        _admin(site, signing_key=other_key, signing_certificate=other) as client,
        pytest.raises(HttpResponseError, match="isolated"),
    ):
        client.add_policy_management_certificate(other)
    with _admin(site, signing_key=key, signing_certificate=certificate) as client:
        assert len(client.get_policy_management_certificates()[0]) == 1
        client.set_policy("SgxEnclave", POLICY)
        added, _ = client.add_policy_management_certificate(other)
        assert added.certificate_resolution == "IsPresent"
        assert len(client.get_policy_management_certificates()[0]) == 2
        # The client signs the same to add and to remove, and that is taken once.
        with pytest.raises(HttpResponseError, match="used before"):
            client.remove_policy_management_certificate(other)
    with _admin(site, signing_key=other_key, signing_certificate=other) as client:
        removed, _ = client.remove_policy_management_certificate(other)
        assert removed.certificate_resolution == "IsAbsent"
        assert removed.certificate_thumbprint == added.certificate_thumbprint
    with (
        _admin(site, signing_key=key, signing_certificate=certificate) as client,
        pytest.raises(HttpResponseError, match="last policy signer"),
    ):
        client.remove_policy_management_certificate(certificate)
    found = site.claims("/attest/SgxEnclave", {"quote": base64.b64encode(site.quote()).decode()})
    assert found["signed-by"] == bytes(range(32, 64)).hex()
    assert found["x-ms-policy"] == {"signed-by": found["signed-by"]}
    assert found["x-ms-policy-signer"]["kty"] == "RSA"


@pytest.mark.parametrize("version", ["2020-10-01", "2025-06-01"])
def test_pyjwt_and_joserfc_verify_by_the_key_set(site: Any, helpers: Any, version: str) -> None:
    jwt = pytest.importorskip("jwt")
    joserfc = pytest.importorskip("joserfc.jwt")
    from cryptography import x509
    from joserfc.jwk import KeySet

    answer = site.post(
        "/attest/SgxEnclave",
        {"quote": helpers.b64(site.quote()), "nonce": "abc"},
        query={"api-version": version},
    )
    token = answer.json()["token"]
    keys = site.client.get("/certs").json()
    found = jwt.decode(
        token,
        jwt.PyJWKSet.from_dict(keys)[jwt.get_unverified_header(token)["kid"]],
        algorithms=["RS256", "ES256"],
        issuer=site.url,
        options={"require": ["exp", "iat", "nbf", "iss", "jti"]},
    )
    again = joserfc.decode(token, KeySet.import_key_set(keys), algorithms=["RS256", "ES256"])
    assert again.claims == found
    assert found["nonce"] == "abc"
    assert set(again.header) == {"alg", "jku", "kid", "typ"}
    assert again.header["alg"] == ("RS256" if version == "2020-10-01" else "ES256")
    (key,) = (item for item in keys["keys"] if item["kid"] == again.header["kid"])
    certificate = x509.load_der_x509_certificate(base64.b64decode(key["x5c"][0]))
    assert certificate.subject.rfc4514_string() == f"CN={site.url}"


def test_pyjwts_client_fetches_the_key_set_by_discovery(site: Any, helpers: Any) -> None:
    jwt = pytest.importorskip("jwt")
    import ssl

    place = site.client.get("/.well-known/openid-configuration").json()["jwks_uri"]
    client = jwt.PyJWKClient(place, ssl_context=ssl.create_default_context(cafile=str(site.ca)))
    token = site.post("/attest/SgxEnclave", {"quote": helpers.b64(site.quote())}).json()["token"]
    key = client.get_signing_key_from_jwt(token)
    assert jwt.decode(token, key, algorithms=["ES256"], issuer=site.url)["tee"] == "sgx"
    assert json.dumps(keys := site.client.get("/certs").json())
    assert all("d" not in item for item in keys["keys"])
