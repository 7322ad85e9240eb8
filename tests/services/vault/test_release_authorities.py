"""The keys of attestation services: who is asked, how often, and what is believed."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.errors import AttestationError, CollateralError, EvidenceFormatError, ServiceError
from pyenclave.formats.jwk import Jwk, public_members
from pyenclave.services.vault.release.authorities import (
    MAX_SIZE,
    AuthorityKeys,
    KnownAuthority,
)
from pyenclave.services.web.call import Answer, Call
from pyenclave.services.web.config import Authority
from pyenclave.services.web.kit import Service
from pyenclave.services.web.run import Server
from pyenclave.services.web.tls import DevCa

URL = "https://attest.example"


@functools.cache
def members() -> dict[str, Any]:
    """A public key."""
    return public_members(ec.generate_private_key(ec.SECP256R1()).public_key())


def jwks(*names: str) -> bytes:
    """A key set with these names."""
    return json.dumps({"keys": [{**members(), "kid": name} for name in names]}).encode()


class Web:
    """Answers fetches, counts them, and can be slow or broken."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers: Sequence[bytes | Exception] = answers
        self.asked: list[tuple[str, bytes | None]] = []
        self.now = 1000.0

    async def fetch(self, url: str, ca_pem: bytes | None) -> bytes:
        self.asked.append((url, ca_pem))
        await asyncio.sleep(0)
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def keys(self, **options: Any) -> AuthorityKeys:
        known = [KnownAuthority(url=URL, ca_pem=b"pinned")]
        return AuthorityKeys(known, fetch=self.fetch, clock=lambda: self.now, **options)


def find(keys: AuthorityKeys, kid: str | None, url: str = URL) -> Jwk | None:
    """Ask for a key."""
    return asyncio.run(keys.find(url, kid))


def test_a_flood_of_unknown_keys_makes_one_fetch_an_interval() -> None:
    """JWT-12: a thousand tokens, at once and one after the other."""
    web = Web(jwks("one"))
    keys = web.keys()

    async def flood() -> list[Jwk | None]:
        return await asyncio.gather(*(keys.find(URL, f"k{number}") for number in range(500)))

    assert set(asyncio.run(flood())) == {None}
    for number in range(500):
        assert find(keys, f"n{number}") is None
    assert len(web.asked) == 1
    web.now += 9.9
    assert find(keys, "x") is None
    assert len(web.asked) == 1
    web.now += 0.2
    assert find(keys, "x") is None
    assert len(web.asked) == 2


def test_nobody_is_asked_but_the_configured_address() -> None:
    """With the pinned authority of its certificate; an unknown issuer makes no request."""
    web = Web(jwks("one"))
    keys = web.keys()
    assert find(keys, "one") is not None
    for other in ("https://evil.example", f"{URL}/", f"{URL}:443", "https://127.0.0.1:9", ""):
        assert find(keys, "one", other) is None
        assert not keys.knows(other)
    assert web.asked == [(f"{URL}/certs", b"pinned")]


def test_a_withdrawn_key_is_gone_with_the_next_fetch() -> None:
    """The set is replaced as a whole, and asked for again after ten minutes."""
    web = Web(jwks("old"), jwks("new"))
    keys = web.keys()
    assert find(keys, "old") is not None
    web.now += 599
    assert find(keys, "old") is not None
    web.now += 2
    assert find(keys, "old") is None
    assert find(keys, "new") is not None
    assert len(web.asked) == 2


def test_a_new_key_is_found_at_once() -> None:
    """A rotation of the authority's keys is no outage."""
    web = Web(jwks("old"), jwks("old", "new"))
    keys = web.keys()
    assert find(keys, "old") is not None
    web.now += 11
    assert find(keys, "new") is not None


def test_an_authority_that_is_away_is_no_refusal_but_old_keys_end() -> None:
    """Six hours; then the vault says that it cannot judge."""
    web = Web(jwks("one"), CollateralError("away"))
    keys = web.keys()
    assert find(keys, "one") is not None
    web.now += 5 * 3600
    assert find(keys, "one") is not None
    web.now += 3601
    with pytest.raises(ServiceError) as caught:
        find(keys, "one")
    assert (caught.value.status, caught.value.error_code) == (503, "ServiceUnavailable")
    never = Web(CollateralError("away"))
    with pytest.raises(ServiceError):
        find(never.keys(), "one")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"keys":{}}',
        b'{"keys":[],"keys":[]}',
        jwks("one", "one"),
        jwks(*(str(number) for number in range(65))),
        json.dumps({"keys": [{**members(), "kid": "one", "d": "AA"}]}).encode(),
    ],
    ids=lambda body: body[:20],
)
def test_a_key_set_that_is_wrong_is_refused_whole(body: bytes) -> None:
    """Malformed, ambiguous, too many, a private key (JWT-08)."""
    keys = Web(body).keys()
    with pytest.raises(ServiceError):
        find(keys, "one")


def test_configured_keys_are_never_fetched(tmp_path: Path) -> None:
    """For authorities that the vault cannot reach."""
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks("one"))
    keys = AuthorityKeys.configured([Authority(url=f"{URL}/", jwks_file=str(path))])
    assert find(keys, "one") is not None
    assert find(keys, "two") is None
    path.write_bytes(b"{}")
    with pytest.raises(EvidenceFormatError):
        AuthorityKeys.configured([Authority(url=URL, jwks_file=str(path))])
    with pytest.raises(AttestationError):
        AuthorityKeys.configured([Authority(url="http://attest.example")])


def test_only_in_development_is_an_unnamed_authority_believed() -> None:
    """SKR-13: on this machine, under development's own certificate authority; few are kept."""
    web = Web(jwks("one"))
    assert find(web.keys(), "one", "https://127.0.0.1:4433") is None
    keys = web.keys(loopback_ca=b"development")
    for url in ("https://localhost:1", "https://127.0.0.1:2", "https://[::1]:3"):
        assert find(keys, "one", url) is not None
    for url in ("https://127.0.0.1.evil.example", "https://10.0.0.1", "https://localhost.evil"):
        assert find(keys, "one", url) is None
    assert {ca for _, ca in web.asked} == {b"development"}
    for port in range(100, 200):
        find(keys, "one", f"https://127.0.0.1:{port}")
    assert len(keys._loopback) <= 32


def test_over_tls_only_the_pinned_authority_counts() -> None:
    """A real server: its own authority, another one, none; too large; not there."""
    ca, other = DevCa(None), DevCa(None)
    answers = {"body": jwks("one")}
    service = Service("attestation", api_versions=())

    async def certs(_call: Call) -> Answer:
        return Answer(answers["body"])

    service.route("GET", "/certs", certs, anonymous=True)
    with Server(service.app, tls=ca.server()) as server:

        def ask(pem: bytes | None, loopback: bytes | None = None) -> Jwk | None:
            known = [] if loopback else [KnownAuthority(url=server.url, ca_pem=pem)]
            return find(AuthorityKeys(known, loopback_ca=loopback), "one", server.url)

        assert ask(ca.pem) is not None
        assert ask(None, loopback=ca.pem) is not None
        for wrong in (other.pem, None):
            with pytest.raises(ServiceError):
                ask(wrong)
        with pytest.raises(ServiceError):
            ask(None, loopback=other.pem)
        answers["body"] = base64.b64encode(bytes(MAX_SIZE))
        with pytest.raises(ServiceError):
            ask(ca.pem)
