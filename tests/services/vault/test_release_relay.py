"""Keys of attestation services go into a real enclave: over TLS that the host only carries."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from attest_parts import AUTHORITY, POLICY_BYTES, asked, authority_key, jwks_of, opened, token
from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.errors import CollateralError, ConfigurationError, ServiceError
from pyenclave.formats.image import Image
from pyenclave.formats.jwk import Jwks, public_members
from pyenclave.formats.key_context import KeyContext
from pyenclave.formats.release_terms import Anchor, ReleaseTerms, key_digest
from pyenclave.services.vault.backends._image import enclave_image
from pyenclave.services.vault.backends.base import KeyMaterial, KeySpec
from pyenclave.services.vault.backends.enclave import EnclaveBackend
from pyenclave.services.vault.release.authorities import AuthorityKeys, KnownAuthority
from pyenclave.services.vault.release.relay import hand_in_keys, key_set
from pyenclave.services.web.call import Answer, Call
from pyenclave.services.web.kit import Service
from pyenclave.services.web.run import Server
from pyenclave.services.web.tls import DevCa

CA, OTHER = DevCa(None), DevCa(None)


class Attesting:
    """An attestation service on this machine."""

    def __init__(self) -> None:
        self.body = jwks_of(authority_key())
        self.asked = 0
        service = Service("attestation", api_versions=())
        service.route("GET", "/certs", self._certs, anonymous=True)
        self.server = Server(service.app, tls=CA.server())

    async def _certs(self, _call: Call) -> Answer:
        self.asked += 1
        return Answer(self.body)


@pytest.fixture(scope="module")
def attesting() -> Iterator[Attesting]:
    """It runs."""
    service = Attesting()
    with service.server:
        yield service


def policy_of(url: str) -> bytes:
    """What the tests ask, of a service at this address."""
    document = json.loads(POLICY_BYTES)
    document["anyOf"][0]["authority"] = url
    return json.dumps(document).encode()


@contextlib.asynccontextmanager
async def enclave(state: Path, terms: ReleaseTerms) -> AsyncIterator[EnclaveBackend]:
    """The vault's, with keys bound to these terms."""
    backend = EnclaveBackend(state, terms=terms)
    try:
        yield backend
    finally:
        await backend.close()


class Vault:
    """What the vault does with a request for one key."""

    def __init__(self, backend: EnclaveBackend, authorities: AuthorityKeys, url: str) -> None:
        self.backend, self.authorities, self.url = backend, authorities, url
        self.policy = policy_of(url)
        self.context = KeyContext(
            name="k",
            version="0" * 32,
            kty="oct-HSM",
            exportable=True,
            policy_hash=hashlib.sha256(self.policy).digest(),
        ).to_bytes()
        self.key: KeyMaterial | None = None

    async def release(self, **changes: Any) -> tuple[str, bytes]:
        """Ask, with the keys of the service if they are needed."""
        if self.key is None:
            self.key = await self.backend.generate(KeySpec(kty="oct-HSM"), self.context)
        request = asked(policy=self.policy, target=token(iss=self.url, **changes))
        ask = self.backend.decide_release
        verdict = await ask(self.key.wrapped, self.context, request, final=False)
        if verdict.needed:
            needed = verdict.needed
            await self.authorities.supply(
                self.url,
                lambda known: hand_in_keys(self.backend, known, needed),
                missing=verdict.missing,
            )
            verdict = await ask(self.key.wrapped, self.context, request, final=True)
        assert verdict.outcome is not None
        failed = verdict.outcome.failed
        return "" if failed is None else failed.name, verdict.ciphertext


def test_only_what_the_keys_terms_name_gives_keys(
    attesting: Attesting, enclave_state: Path
) -> None:
    """The right root, and then another one by a host that changed its configuration."""
    url = attesting.server.url

    async def work() -> None:
        right = AuthorityKeys([KnownAuthority(url=url, ca_pem=CA.pem)])
        wrong = AuthorityKeys([KnownAuthority(url=url, ca_pem=OTHER.pem)])
        async with enclave(enclave_state, right.terms()) as backend:
            mine = Vault(backend, right, url)
            other = Vault(backend, wrong, url)
            other.key = await backend.generate(KeySpec(kty="oct-HSM"), other.context)
            # A host that names another root is not heard; the terms have the right one.
            assert await other.release() == ("authority.reached", b"")
            before = attesting.asked
            failed, ciphertext = await mine.release()
            assert failed == ""
            assert len(opened(ciphertext)) == 32
            for _ in range(3):
                assert (await mine.release())[0] == ""
            assert attesting.asked == before + 1, "the keys are kept"
            assert (await mine.release(key=authority_key(), kid="new"))[0] == "token.key"
            assert attesting.asked == before + 1, "one fetch an interval"
        async with enclave(enclave_state, wrong.terms()) as backend:
            # And the reverse: a key that is bound to a root that the service does not have.
            assert await Vault(backend, wrong, url).release() == ("authority.reached", b"")
            assert await Vault(backend, right, url).release() == ("authority.reached", b"")

    asyncio.run(work())


def test_what_is_no_key_set_and_who_is_not_there(attesting: Attesting, enclave_state: Path) -> None:
    """Each is an error that the vault writes to its log."""
    url = attesting.server.url
    keys = AuthorityKeys([KnownAuthority(url=url, ca_pem=CA.pem)])
    anchor = keys.terms().anchor(url)
    assert anchor is not None

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def work() -> None:
        async with enclave(enclave_state, keys.terms()) as backend:
            known = KnownAuthority(url=url, ca_pem=CA.pem)
            for body in (b"{}", b"x" * 600_000):
                attesting.body = body
                with pytest.raises(ServiceError, match="the attestation service"):
                    await hand_in_keys(backend, known, anchor.to_bytes())
            attesting.body = jwks_of(authority_key())
            nobody = await asyncio.start_server(silent, "127.0.0.1", 0)
            port = nobody.sockets[0].getsockname()[1]
            async with nobody:
                gone = KnownAuthority(url=f"https://127.0.0.1:{port}", ca_pem=CA.pem)
                with pytest.raises((ServiceError, CollateralError, OSError)):
                    await hand_in_keys(backend, gone, anchor.to_bytes())
            with pytest.raises(OSError, match="onnect"):
                await hand_in_keys(backend, gone, anchor.to_bytes())
            stranger = KnownAuthority(url=url, ca_pem=OTHER.pem)
            with pytest.raises(ServiceError, match="none of the given roots"):
                await hand_in_keys(backend, stranger, anchor.to_bytes())
            # The system's authorities are those that the image has.
            system = Anchor(url=url, kind="system").to_bytes()
            image = Image.parse(enclave_image(enclave_state))
            with contextlib.ExitStack() as expected:
                if "files/authorities.pem" not in image.files:
                    expected.enter_context(pytest.raises(ServiceError, match="no authorities"))
                _, hello = await backend.authority_connect(system, [])
                assert hello.startswith(b"\x16\x03")
                known = KnownAuthority(url=url)
                with pytest.raises(ServiceError, match="certificate verify failed"):
                    await hand_in_keys(backend, known, system)

    asyncio.run(work())


def test_supplies_are_counted_after_a_failure_and_shared_by_who_waits() -> None:
    """A new enclave has its keys at once; a service that is away is asked every ten seconds."""
    now = [100.0]
    keys = AuthorityKeys([KnownAuthority(url=AUTHORITY)], clock=lambda: now[0])
    calls: list[str] = []
    fails = [True]

    async def hand_in(known: KnownAuthority) -> None:
        calls.append(known.url)
        await asyncio.sleep(0)
        if fails[0]:
            raise CollateralError("away")

    async def flood(*, missing: bool, url: str = AUTHORITY) -> int:
        calls.clear()
        await asyncio.gather(*(keys.supply(url, hand_in, missing=missing) for _ in range(50)))
        return len(calls)

    async def work() -> None:
        assert await flood(missing=True) == 1
        now[0] += 9
        assert await flood(missing=True) == 0
        now[0] += 2
        fails[0] = False
        assert await flood(missing=True) == 1
        now[0] += 1
        assert await flood(missing=False) == 0
        assert await flood(missing=True) == 1  # an enclave that was launched anew
        assert await flood(missing=True, url="https://evil.example") == 0

    asyncio.run(work())


def test_a_key_that_is_bound_to_what_is_over_keeps_no_other_from_its_authority() -> None:
    """Who asks for it again and again asks for nobody else: one authority, two ways to know it."""
    now = [100.0]
    keys = AuthorityKeys([KnownAuthority(url=AUTHORITY)], clock=lambda: now[0])
    calls: list[bytes] = []

    async def ask(anchor: bytes) -> None:
        async def hand_in(known: KnownAuthority) -> None:
            await asyncio.sleep(0)
            calls.append(anchor)
            if anchor == b"over":
                raise CollateralError("certificate verify failed")

        await keys.supply(AUTHORITY, hand_in, missing=True, anchor=anchor)

    async def work() -> None:
        await asyncio.gather(ask(b"over"), ask(b"now"))
        assert sorted(calls) == [b"now", b"over"]
        await ask(b"over")
        assert len(calls) == 2  # once an interval
        await ask(b"now")
        assert calls[2:] == [b"now"]
        for number in range(1000):
            await ask(b"%d" % number)
        assert len(keys._handed) == 256

    asyncio.run(work())


def test_terms_say_how_each_authority_is_known() -> None:
    """Pinned keys, a pinned root, the system's; in development any service of this machine."""
    jwks = Jwks.from_bytes(jwks_of(authority_key()))
    known = [
        KnownAuthority(url=AUTHORITY, jwks=jwks, ca_pem=b"not looked at"),
        KnownAuthority(url=f"{AUTHORITY}:1", ca_pem=CA.pem + OTHER.pem),
        KnownAuthority(url=f"{AUTHORITY}:2"),
    ]
    found = AuthorityKeys(known, loopback_ca=CA.pem).terms(strict=True, skew=5)
    roots = [
        hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca.pem.decode())).digest() for ca in (CA, OTHER)
    ]
    assert [item.kind for item in found.authorities] == ["keys", "roots", "system"]
    assert found.authorities[0].digests == (key_digest(jwks.keys[0]),)
    assert found.authorities[1].digests == tuple(sorted(roots))
    assert (found.loopback, found.strict, found.skew) == ((roots[0],), True, 5)
    for pem in (b"", b"x", CA.pem * 2):
        keys = AuthorityKeys([KnownAuthority(url=AUTHORITY, ca_pem=pem)])
        if pem == CA.pem * 2:
            assert len(keys.terms().authorities[0].digests) == 1
            continue
        with pytest.raises(ConfigurationError, match="authorities"):
            keys.terms()
    with pytest.raises(ConfigurationError, match="authorities"):
        AuthorityKeys([KnownAuthority(url=AUTHORITY, jwks=Jwks(keys=()))]).terms()


def test_a_configured_key_set_is_handed_in_as_it_was_read() -> None:
    """What judging depends on survives: names, algorithms, certificates."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    members = public_members(key.public_key())
    (_, chain) = CA.leaf()
    leaf, *_ = chain
    from base64 import b64encode

    from cryptography import x509

    certified = x509.load_der_x509_certificate(leaf).public_key()
    listed = [
        {**members},
        {**members, "kid": "a", "alg": "PS256"},
        {**public_members(certified), "kid": "b", "x5c": [b64encode(leaf).decode()]},  # type: ignore[arg-type]
    ]
    first = Jwks.from_bytes(json.dumps({"keys": listed}).encode())
    again = Jwks.from_bytes(key_set(first))
    assert [key_digest(item) for item in again.keys] == [key_digest(item) for item in first.keys]
    assert [item.algorithms for item in again.keys] == [item.algorithms for item in first.keys]
    assert again.keys[2].x5c[0].der == leaf


def test_an_image_stays_usable_when_its_signing_key_is_taken_away(tmp_path: Path) -> None:
    """So that who owns the state directory later cannot sign another enclave."""
    tmp_path.chmod(0o700)
    image = enclave_image(tmp_path)
    key = tmp_path / "vault-signing-key.pem"
    away = tmp_path.parent / f"{tmp_path.name}-key.pem"
    key.rename(away)
    assert enclave_image(tmp_path) == image
    from pyenclave.errors import PlatformUnavailableError

    with pytest.raises(PlatformUnavailableError, match="signs it is not here"):
        enclave_image(tmp_path, rebuild=True)
    assert not key.exists()
    away.rename(key)
    assert enclave_image(tmp_path) == image
