"""The host's relay: what it lets an enclave ask, and what it adds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from https_double import Asked, Authority, Reply, Server

from pyenclave.calls import services
from pyenclave.host.relay import relay

CHALLENGE = 'Bearer authorization="https://login.example/t", resource="https://vault.azure.net"'


def handler(server: Server, authority: Authority, **more: Any) -> Any:
    given: dict[str, Any] = {
        "vault": server.url,
        "attestation": server.url,
        "credential": "secret-token",
        "ca": authority.pem,
        "verify_challenge_resource": False,
        "timeout": 3,
        "attempts": 1,
    }
    found = relay(**(given | more))
    assert list(found) == [services.NAME]
    return found[services.NAME]


def ask(call: Any, server: Server, **changes: Any) -> tuple[int, bytes]:
    values = {
        "service": "vault",
        "base": server.url,
        "method": "POST",
        "path": "/keys/a//release",
        "api_version": "7.4",
        "body": b"{}",
        "seconds": 3.0,
    } | changes
    status, body = call(*values.values())
    return status, body


def test_the_vault_gets_the_hosts_token_and_the_attestation_service_does_not(
    server: Server, authority: Authority
) -> None:
    def answer(asked: Asked) -> Reply:
        if "authorization" not in asked.headers and "release" in asked.path:
            return Reply(status=401, headers={"WWW-Authenticate": CHALLENGE})
        return Reply({"value": "x"})

    server.answer = answer
    call = handler(server, authority)
    assert ask(call, server) == (200, b'{"value": "x"}')
    assert ask(call, server, service="attestation", path="/attest/PyEnclave")[0] == 200
    tokens = [asked.headers.get("authorization") for asked in server.asked]
    assert tokens == [None, "Bearer secret-token", None]
    assert server.asked[1].query == "api-version=7.4"


@pytest.mark.parametrize(
    "changes",
    [
        {"service": "other"},
        {"service": ""},
        {"base": "https://evil.example"},
        {"base": "https://127.0.0.1"},
        {"base": "http://127.0.0.1"},
        {"base": ""},
        {"method": "DELETE"},
        {"method": "PUT"},
        {"method": "GET"},
        {"path": "/keys/a/create"},
        {"path": "/keys/a//wrapkey"},
        {"path": "/keys/a/v/sign"},
        {"path": "/keys/../release"},
        {"path": "/keys/a/../b/release"},
        {"path": "/keys/a%2f/v/release"},
        {"path": "/keys/a//release?x=y"},
        {"path": "/keys/a//release#x"},
        {"path": "/keys/a//release\r\nX: y"},
        {"path": "/secrets/a/v"},
        {"path": "keys/a//release"},
        {"path": ""},
        {"path": "/attest/PyEnclave"},
        {"path": "/keys/ä//release"},
        {"api_version": "7.4&x=y"},
        {"api_version": ""},
        {"api_version": "7.4\r\n"},
        {"body": b"x" * (services.MAX_BODY + 1)},
        {"service": "attestation", "path": "/policies/SgxEnclave"},
        {"service": "attestation", "path": "/certificates:add"},
        {"service": "attestation", "method": "GET", "path": "/certs"},
        {"service": "attestation", "path": "/attest/../policies"},
    ],
    ids=repr,
)
def test_an_enclave_reaches_two_services_and_little_of_them(
    changes: dict[str, Any], server: Server, authority: Authority
) -> None:
    server.answer = lambda _: Reply({"value": "x"})
    with pytest.raises(PermissionError):
        ask(handler(server, authority), server, **changes)
    assert server.asked == []


def test_a_public_half_may_be_read(server: Server, authority: Authority) -> None:
    server.answer = lambda _: Reply({})
    call = handler(server, authority)
    assert ask(call, server, method="GET", path="/keys/a/", body=b"")[0] == 200
    assert ask(call, server, method="GET", path="/keys/a/0123", body=b"")[0] == 200
    assert [asked.body for asked in server.asked] == [b"", b""]


def test_a_relay_for_one_service_reaches_no_other(server: Server, authority: Authority) -> None:
    call = handler(server, authority, attestation=None)
    with pytest.raises(PermissionError, match="no such service"):
        ask(call, server, service="attestation", path="/attest/PyEnclave")


@pytest.mark.parametrize(
    "reply",
    [
        Reply(silent=True),
        Reply(b"x" * (services.MAX_BODY + 1)),
        Reply(b"{}", length=1 << 40),
        Reply(b"", status=302, headers={"Location": "https://evil.example"}),
        Reply(b"{", length=10),
    ],
    ids=["silence", "too long", "too long by its word", "a redirect", "cut"],
)
def test_no_usable_answer_is_status_zero_with_a_reason(
    reply: Reply, server: Server, authority: Authority
) -> None:
    server.answer = lambda _: reply
    status, body = ask(handler(server, authority, credential=None), server, seconds=0.4)
    assert status == 0
    said = json.loads(body)["error"]
    assert said["code"] in ("NoAnswer", "BadAnswer")
    assert said["message"]
    assert "secret-token" not in body.decode()


def test_refusals_pass_as_they_are(server: Server, authority: Authority) -> None:
    body = {"error": {"code": "Forbidden"}}
    server.answer = lambda _: Reply(body, status=403)
    status, found = ask(handler(server, authority, credential=None), server)
    assert (status, json.loads(found)) == (403, body)


def test_an_enclave_cannot_hold_a_connection_for_ever(server: Server, authority: Authority) -> None:
    server.answer = lambda _: Reply({})
    call = handler(server, authority, credential=None)
    for seconds in (1e9, -1.0, 0.0, float("nan"), float("inf")):
        assert ask(call, server, seconds=seconds)[0] == 200


def test_a_relay_needs_an_address(authority: Authority) -> None:
    with pytest.raises(ValueError, match="name the vault"):
        relay()
    for bad in ("http://v", "v.example", "https://"):
        with pytest.raises(ValueError, match="expected https"):
            relay(vault=bad)
    with pytest.raises(ValueError, match="ca"):
        relay(vault="https://v.example", ca="/nonexistent.pem")
