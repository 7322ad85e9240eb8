"""A vault of one day, and this thread as an enclave before it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from https_double import Authority, Server
from released_inside import Host, Inside
from vault_double import Signer, Vault

from pyenclave.host.relay import relay
from pyenclave.trusted import _release, _release_relay, _state


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    """Who answers as the test says."""
    found = Server(authority)
    yield found
    found.close()


@pytest.fixture(scope="module")
def secrets() -> SimpleNamespace:
    return SimpleNamespace(
        rsa=rsa.generate_private_key(65537, 2048),
        other=rsa.generate_private_key(65537, 2048),
        ec=ec.generate_private_key(ec.SECP384R1()),
        oct=b"0123456789abcdef0123456789abcdef",
        transfer=rsa.generate_private_key(65537, 2048),
    )


@pytest.fixture(scope="module")
def signers(authority: Authority) -> SimpleNamespace:
    host = "127.0.0.1"
    key = rsa.generate_private_key(65537, 2048)
    return SimpleNamespace(
        good=Signer.under(authority, host, key=key),
        other_root=Signer.under(Authority("Another"), host, key=key),
        same_name=Signer.under(Authority(), host, key=key),
        other_host=Signer.under(authority, "evil.example", key=key),
        late=Signer.under(authority, host, key=key, days=(-20, -2)),
        early=Signer.under(authority, host, key=key, days=(2, 20)),
        client=Signer.under(authority, host, key=key, usage=ExtendedKeyUsageOID.CLIENT_AUTH),
        elliptic=Signer.under(authority, host),
    )


@pytest.fixture(scope="module")
def vault_server(authority: Authority, signers: SimpleNamespace) -> Iterator[Server]:
    vault = Vault(authority, signers.good)
    running = vault.start()
    yield running
    running.close()


@pytest.fixture
def vault(
    vault_server: Server,
    authority: Authority,
    signers: SimpleNamespace,
    secrets: SimpleNamespace,
) -> Vault:
    """The vault as it was on its first day."""
    fresh = Vault(authority, signers.good)
    fresh.url = vault_server.url
    vault_server.answer = fresh.answer
    vault_server.asked.clear()
    for name in ("rsa", "ec", "oct"):
        fresh.put(name, getattr(secrets, name))
    return fresh


@pytest.fixture
def inside(
    vault: Vault, authority: Authority, secrets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """This thread is an enclave's, with a relay to the vault and one transfer key."""
    runtime = Inside()
    runtime.release = {"vault": vault.url, "attestation": vault.url, "ca": authority.pem}
    monkeypatch.setattr(_state, "runtime", runtime)
    handlers = relay(
        vault=vault.url,
        attestation=vault.url,
        credential="t",
        ca=authority.pem,
        verify_challenge_resource=False,
        timeout=5,
        attempts=1,
    )
    host = Host(handlers)
    monkeypatch.setattr(_state, "_entered", False)
    monkeypatch.setattr(_state._links, "value", host, raising=False)
    made: list[int] = []

    def generate(exponent: int, size: int) -> rsa.RSAPrivateKey:
        made.append(size)
        return secrets.transfer  # type: ignore[no-any-return]

    monkeypatch.setattr(_release.rsa, "generate_private_key", generate)
    monkeypatch.setattr(_release_relay, "_PAUSE", 0.001)
    yield SimpleNamespace(runtime=runtime, host=host, made=made)
    if runtime.released is not None:
        runtime.released.close()
