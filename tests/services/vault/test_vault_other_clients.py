"""What clients other than Microsoft's for Python put on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vault_parts import Running, b64, release_policy, running_vault

from pyenclave.errors import ServiceError
from pyenclave.services.vault.records import KeyRecord
from pyenclave.services.web.kit import Answer, Call


class Recorded:
    """Releases nothing, and says which version of which interface was asked for."""

    async def release(self, call: Call, caller: object, record: KeyRecord, **more: Any) -> Answer:
        if call.json() != {"target": "a.b.c"}:
            raise ServiceError("another body", status=400, error_code="BadParameter")
        return Answer({"kid": more["kid"], "asked": call.api_version})


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    releasing = {"releasing": lambda _db, _backend: Recorded()}
    with running_vault(tmp_path_factory.mktemp("others"), **releasing) as running:
        body = {
            "kty": "EC-HSM",
            "attributes": {"exportable": True},
            "release_policy": release_policy(),
        }
        assert running.request("POST", "/keys/model/create", body).status_code == 200
        yield running


@pytest.mark.parametrize("version", ["7.3-preview", "7.3", "7.4"])
@pytest.mark.parametrize("path", ["/keys/model/release", "/keys/model//release"])
def test_the_newest_version_is_released_with_one_slash_or_two(
    vault: Running, path: str, version: str
) -> None:
    """Microsoft's sidecar and guest tools write one slash and ask by 7.3 or its preview."""
    kid = vault.request("GET", "/keys/model").json()["key"]["kid"]
    answer = vault.request("POST", f"{path}?api-version={version}", {"target": "a.b.c"})
    assert answer.json() == {"kid": kid, "asked": version}


def test_a_key_named_like_a_version_is_no_version(vault: Running) -> None:
    """One slash never makes a name of a version, or a version of a name."""
    answer = vault.request("POST", "/keys/release", {"target": "a.b.c"})
    assert answer.status_code == 405


@pytest.mark.parametrize("path", ["/keys/", "/deletedkeys/"])
def test_lists_may_end_with_a_slash_and_their_pages_go_on(vault: Running, path: str) -> None:
    """Clients for .NET list so; the next page is asked for by the link as it is."""
    for name in ("page-a", "page-b", "page-c"):
        assert vault.request("POST", f"/keys/{name}/create", {"kty": "EC"}).status_code == 200
        if path == "/deletedkeys/":
            assert vault.request("DELETE", f"/keys/{name}").status_code == 200
    found: list[str] = []
    link = f"{path}?api-version=7.5&maxresults=2"
    while link:
        page = vault.request("GET", link.removeprefix(vault.url)).json()
        found += [item["kid"].rsplit("/", 1)[1] for item in page["value"]]
        link = page["nextLink"]
    assert [name for name in found if name.startswith("page-")] == ["page-a", "page-b", "page-c"]


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("7f0a4b3e-91c6-11f0-8de9-0242ac120002", True),
        ("{7F0A4B3E-91C6-11F0-8DE9-0242AC120002}", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("two words", False),
        ("a\tb", False),
        ("é", False),
    ],
)
def test_the_name_that_a_client_gave_its_request_comes_back(
    vault: Running, sent: str, echoed: bool
) -> None:
    """Also with a refusal; nothing that does not look like one is repeated."""
    headers = {"x-ms-client-request-id": sent.encode("latin-1")}
    for path in ("/keys/model", "/keys/none", "/nothing"):
        answer = vault.request("GET", path, headers=headers)
        assert answer.headers.get("x-ms-client-request-id") == (sent if echoed else None)
        assert answer.headers["x-ms-request-id"] != sent


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_the_newest_version_is_used_with_one_slash_or_two(vault: Running, slashes: str) -> None:
    """The published template has a version that may be absent or empty."""
    kid = vault.request("GET", "/keys/model").json()["key"]["kid"]
    digest = b64(b"d" * 32)
    body = {"alg": "ES256", "value": digest}
    signed = vault.request("POST", f"/keys/model{slashes}sign", body).json()
    assert signed["kid"] == kid
    body = {"alg": "ES256", "digest": digest, "value": signed["value"]}
    assert vault.request("POST", f"/keys/model{slashes}verify", body).json() == {"value": True}
    path = f"/keys/model{slashes}attestation?api-version=2025-07-01"
    assert vault.request("GET", path).json()["error"]["code"] == "NotSupported"
    for word in ("encrypt", "decrypt", "wrapkey", "unwrapkey"):
        answer = vault.request("POST", f"/keys/model{slashes}{word}", {})
        assert "alg is missing" in answer.json()["error"]["message"]
