"""Keys are released over the wire: by Microsoft's client, by a consumer written from the notes."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import http.client
import json
import ssl
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from attest_parts import (
    AUTHORITY,
    POLICY,
    POLICY_BYTES,
    asked,
    authorities,
    authority_key,
    terms,
    token,
    transfer_key,
)
from azure.core.exceptions import HttpResponseError
from azure.keyvault.keys import KeyClient, KeyReleasePolicy
from azure.keyvault.keys.aio import KeyClient as AsyncKeyClient
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from release_consumer import consume
from vault_parts import (
    AsyncCredential,
    Credential,
    MemoryBackend,
    Running,
    Table,
    b64,
    running_vault,
    unb64,
)

from pyenclave.errors import CollateralError, ManifestError, ServiceError
from pyenclave.formats import jose
from pyenclave.formats.jwk import public_members
from pyenclave.services.storage import Database, Secrets
from pyenclave.services.vault.backends.base import KeyBackend, KeySpec
from pyenclave.services.vault.backends.enclave import EnclaveBackend
from pyenclave.services.vault.release.answer import AnswerSigner
from pyenclave.services.vault.release.authorities import AuthorityKeys, KnownAuthority
from pyenclave.services.vault.release.build import releases_of
from pyenclave.services.vault.release.relay import hand_in_keys
from pyenclave.services.vault.release.service import Releases
from pyenclave.services.vault.release.tables import PART
from pyenclave.services.web.config import ServiceConfig
from pyenclave.services.web.tls import DevCa

SIGNER_CA = DevCa(None)


@functools.cache
def answer_key() -> Any:
    """What signs answers, with its chain."""
    return SIGNER_CA.leaf(["localhost", "127.0.0.1"], key="rsa")


def releasing(**options: Any) -> Any:
    """What makes the vault's releases."""
    found = options.pop("authorities", None) or authorities()
    key, chain = answer_key()

    def make(db: Database, backend: KeyBackend) -> Releases:
        return Releases(db, backend, found, AnswerSigner(key, chain), **options)

    return make


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory, enclave_state: Path) -> Iterator[Running]:
    """A vault whose keys are in its enclave."""
    folder = tmp_path_factory.mktemp("release")
    options: Any = {
        "backend": EnclaveBackend(enclave_state, terms=terms()),
        "releasing": releasing(),
    }
    with running_vault(folder, **options) as running:
        policy = {"data": b64(json.dumps(POLICY).encode())}
        for name, kty in (("rsa", "RSA-HSM"), ("ec", "EC-HSM"), ("oct", "oct-HSM")):
            body = {"kty": kty, "attributes": {"exportable": True}, "release_policy": policy}
            answer = running.request("POST", f"/keys/{name}/create", body)
            assert answer.status_code == 200, answer.text
        running.request("POST", "/keys/closed/create", {"kty": "EC"})
        yield running


def ask(vault: Running, name: str = "rsa", body: Any = None, **options: Any) -> Any:
    """Send a release request."""
    body = {"target": token()} if body is None else body
    return vault.request("POST", f"/keys/{name}//release", body, **options)


def last(vault: Running) -> dict[str, Any]:
    """The newest row of the audit log."""
    return vault.rows()[-1]


# ---- refusals ----------------------------------------------------------------------------------


def _wrong_targets() -> dict[str, tuple[str, str]]:
    """Ways to be refused, and the condition that the auditor reads."""
    now = int(time.time())
    weak = {"kty": "RSA", "key_ops": ["encrypt"], "n": b64(b"\xff" * 128), "e": "AQAB"}
    good = token()
    other = jose.sign({"iss": AUTHORITY}, key=ec.generate_private_key(ec.SECP256R1()), kid="one")
    return {
        "no token": ("x", "token.format"),
        "unsigned": (good.rpartition(".")[0] + ".", "token.signature"),
        "of another signer": (other, "token.signature"),
        "of another key": (
            jose.sign({"iss": AUTHORITY}, key=authority_key(), kid="2"),
            "token.key",
        ),
        "of another authority": (token(iss="https://other.example"), "policy.authority"),
        "expired": (token(exp=now - 100, iat=now - 200, nbf=now - 200), "token.exp"),
        "of tomorrow": (token(nbf=now + 86_400), "token.nbf"),
        "other signer of the code": (token(**{"x-ms-sgx-mrsigner": "cd" * 32}), "policy.claims"),
        "debug": (token(**{"x-ms-sgx-is-debuggable": True}), "policy.claims"),
        "debug as text": (token(**{"x-ms-sgx-is-debuggable": "True"}), "policy.claims"),
        "draft": (token(**{"x-pyenclave-draft": True}), "token.draft"),
        "no transfer key": (token(**{"x-ms-runtime": {}}), "transfer.key"),
        "weak transfer key": (token(**{"x-ms-runtime": {"keys": [weak]}}), "transfer.modulus"),
    }


def test_whoever_is_refused_learns_nothing_but_a_reference(vault: Running) -> None:
    """SKR-10: one answer for all reasons; the auditor has condition, expected and found."""
    bodies = set()
    for reason, (target, condition) in _wrong_targets().items():
        answer = ask(vault, body={"target": target, "nonce": "n"})
        assert answer.status_code == 403, reason
        error = answer.json()["error"]
        row = last(vault)
        assert row["reference"] == error["reference"]
        assert (row["action"], row["decision"]) == ("keys/release", "refused")
        assert row["condition"] == condition, reason
        assert row["expected"] is not None, reason
        assert (
            row["rule"]
            == f"release policy {hashlib.sha256(json.dumps(POLICY).encode()).hexdigest()}"
        )
        assert row["caller"] == "tenant/admin"
        if condition == "policy.claims":
            assert row["found"]["x-ms-sgx-mrsigner"] == row["claims"]["x-ms-sgx-mrsigner"]
        if condition not in ("token.format",):
            assert row["evidence_digest"] == hashlib.sha256(target.encode()).hexdigest()
        bodies.add(answer.text.replace(error["reference"], "R"))
    assert len(bodies) == 1, bodies
    assert "ForbiddenByPolicy" in bodies.pop()


def test_rights_come_before_everything_else(vault: Running) -> None:
    """SKR-14, SKR-15: nobody without the right learns whether there is a key or a good token."""
    with_right = vault.rights
    assert isinstance(with_right, Table)
    for who, status in (("nobody", 401), ("stranger", 403)):
        answers = [ask(vault, name, who=who) for name in ("rsa", "closed", "absent")]
        answers.append(ask(vault, body={"target": "x"}, who=who))
        answers.append(ask(vault, body=b"not JSON", who=who))
        assert {answer.status_code for answer in answers} == {status}
        texts = {_plain(answer) for answer in answers}
        assert len(texts) == 1, texts


def _plain(answer: Any) -> str:
    reference = answer.json()["error"].get("reference", "-")
    return str(answer.text.replace(reference, "R"))


def test_a_key_that_is_not_exportable_is_not_released(vault: Running) -> None:
    """And the caller, who may release keys, does not learn more than of a bad token."""
    answer = ask(vault, "closed")
    assert answer.status_code == 403
    assert answer.json()["error"]["innererror"]["code"] == "ForbiddenByPolicy"
    assert last(vault)["condition"] == "key.exportable"
    assert ask(vault, "absent").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"target": None},
        {"target": ""},
        {"target": 5},
        {"target": ["x"]},
        {"target": "x" * 300_000},
        {"target": "x", "nonce": 5},
        {"target": "x", "nonce": "n" * 3000},
        {"target": "x", "enc": 5},
        {"target": "x", "enc": []},
        {"target": "x", "enc": ""},
        {"target": "x", "enc": "RSA-OAEP"},
        {"target": "x", "enc": "CKM_RSA_AES_KEY_WRAP"},
        {"target": "x", "policy": {}},
        {"target": "x", "release_policy": {}},
        b'{"target":"x","target":"y"}',
        b"[]",
        b"",
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_request_that_is_none_is_a_bad_request(vault: Running, body: Any) -> None:
    """Types, sizes, duplicates; a policy in the request (SKR-08); SHA-1 where it is not offered."""
    answer = ask(vault, body=body if isinstance(body, bytes) else dict(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "BadParameter"


@pytest.mark.parametrize(
    "path",
    [
        "/keys/rsa/release/",
        "/keys/rsa///release",
        "/keys/../keys/rsa//release",
        "/keys/rsa/%2e%2e/release",
        "/keys/rsa/0123/release",
        "/keys//rsa/release",
        "/keys/rsa//release/",
        "/keys/r%73a%2f/release",
        "/keys/rsa\\/release",
    ],
)
def test_a_path_means_one_key_or_none(vault: Running, path: str) -> None:
    """SKR-11: one slash or two in a request without a version, and no other liberty."""
    address = urlsplit(vault.url)
    context = ssl.create_default_context(cafile=vault.ca)
    connection = http.client.HTTPSConnection(
        address.hostname or "", address.port, context=context, timeout=30
    )
    # Not by a client that would tidy the path.
    headers = {"Authorization": "Bearer admin", "Content-Type": "application/json"}
    connection.request("POST", f"{path}?api-version=7.4", json.dumps({"target": token()}), headers)
    assert connection.getresponse().status in (400, 404, 405)
    connection.close()


def test_an_authority_that_is_away_is_said_so_and_written_down(tmp_path: Path) -> None:
    """503, and a row of a decision that could not be made."""

    async def away(_url: str, _ca: bytes | None) -> bytes:
        raise CollateralError("away")

    keys = AuthorityKeys([KnownAuthority(url=AUTHORITY)], fetch=away)
    with running_vault(tmp_path, releasing=releasing(authorities=keys)) as running:
        _exportable(running)
        answer = ask(running, "k")
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        row = last(running)
        assert (row["decision"], row["condition"]) == ("failed", "authority.reached")
        # A token that the policy does not name makes no request at all.
        assert ask(running, "k", {"target": token(iss="https://other.example")}).status_code == 403


def _exportable(running: Running, name: str = "k") -> None:
    policy = {"data": b64(json.dumps(POLICY).encode())}
    body = {
        "kty": "oct-HSM",
        "attributes": {"exportable": True},
        "release_policy": policy,
    }
    assert running.request("POST", f"/keys/{name}/create", body).status_code == 200


def test_a_token_is_taken_once_where_the_vault_says_so(tmp_path: Path, database_url: str) -> None:
    """SKR-09: by every instance on the database, for each key; another token is another one."""
    first = tmp_path / "first"
    first.mkdir()
    second = tmp_path / "second"
    second.mkdir()
    once = releasing(tokens_once=True)
    secrets = Secrets(tmp_path / "secrets")
    both: Any = {"releasing": once, "url": database_url, "secrets": secrets}
    with running_vault(first, **both) as one, running_vault(second, **both) as two:
        _exportable(one)
        _exportable(one, "other")
        target = token()
        assert ask(one, "k", {"target": target}).status_code == 200
        for instance in (one, two):
            answer = ask(instance, "k", {"target": target})
            assert answer.status_code == 403
            row = last(instance)
            assert (row["condition"], row["decision"]) == ("token.once", "refused")
        assert ask(two, "other", {"target": target}).status_code == 200
        assert ask(two, "k", {"target": token()}).status_code == 200
        unnamed = token(jti=None)
        assert ask(two, "k", {"target": unnamed}).status_code == 200
        assert ask(one, "k", {"target": unnamed}).status_code == 403
        racing = token()
        with ThreadPoolExecutor(6) as pool:
            answers = pool.map(lambda where: ask(where, "k", {"target": racing}), [one, two] * 6)
            assert sorted(answer.status_code for answer in answers) == [200] + [403] * 11


N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # order of P-256


@pytest.mark.parametrize("jti", [None, "x" * 257, 5, "good"])
def test_the_twin_of_a_signature_makes_no_second_token(tmp_path: Path, jti: object) -> None:
    """ECDSA takes s and n - s alike, and anybody turns one into the other."""
    with running_vault(tmp_path, releasing=releasing(tokens_once=True)) as running:
        _exportable(running)
        target = token(jti=jti)
        signed, _, signature = target.rpartition(".")
        raw = unb64(signature)
        twin = raw[:32] + (N - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
        assert ask(running, "k", {"target": target}).status_code == 200
        for again in (f"{signed}.{b64(twin)}", target):
            assert ask(running, "k", {"target": again}).status_code == 403
            assert last(running)["condition"] == "token.once"
        assert ask(running, "k", {"target": token(jti=None, more=1)}).status_code == 200


MEANWHILE: dict[str, tuple[int, str, Any]] = {
    "policy": (409, "the key changed meanwhile", ("PATCH", "", {"release_policy": "other"})),
    "disabled": (
        409,
        "the key changed meanwhile",
        ("PATCH", "", {"attributes": {"enabled": False}}),
    ),
    "expired": (409, "the key changed meanwhile", ("PATCH", "", {"attributes": {"exp": 5}})),
    "deleted": (404, "the key exists", ("DELETE", "", None)),
    "right": (403, "role assignment", None),
    "rotated": (200, "", ("POST", "/rotate", {})),
}


@pytest.mark.parametrize(
    ("what", "once"), [*((what, False) for what in MEANWHILE), ("policy", True)]
)
def test_what_changed_before_a_release_is_written_down_counts(
    tmp_path: Path, what: str, once: bool
) -> None:
    """Policy, state and rights are those of the moment at which the answer leaves."""
    status, condition, change = MEANWHILE[what]
    asked = []

    class Slow(MemoryBackend):
        async def release(self, *args: Any, **options: Any) -> bytes:
            wrapped = await super().release(*args, **options)
            await asyncio.to_thread(meanwhile)
            return wrapped

    def meanwhile() -> None:
        asked.append(what)
        if change is None:
            running.rights.granted.clear()
            return
        method, path, body = change
        if body == {"release_policy": "other"}:
            other = json.loads(json.dumps(POLICY).replace("ab" * 32, "cd" * 32))
            body = {"release_policy": {"data": b64(json.dumps(other).encode())}}
        with running.client() as http:
            answer = http.request(
                method,
                f"/keys/k{path}?api-version=7.4",
                json=body,
                headers={"authorization": "Bearer admin"},
            )
        assert answer.status_code == 200, answer.text

    options: Any = {"backend": Slow(), "releasing": releasing(tokens_once=once)}
    with running_vault(tmp_path, **options) as running:
        _exportable(running)
        action = "Microsoft.KeyVault/vaults/keys/release/action"
        running.rights.granted.add(("reader", action, "/keys/k"))
        answer = ask(running, "k", who="reader")
        assert (answer.status_code, asked) == (status, [what])
        row = last(running)
        assert row.get("condition", "") == condition
        assert row["decision"] == ("allowed" if status == 200 else "refused")
        assert ("value" in answer.json()) is (status == 200)


@pytest.mark.parametrize("what", ["policy", "deleted", "right", "disabled"])
def test_what_changed_before_a_rotation_is_written_down_counts(tmp_path: Path, what: str) -> None:
    """A new version never has a policy that was replaced while its key was made."""
    asked = []

    class Slow(MemoryBackend):
        async def generate(self, *args: Any, **options: Any) -> Any:
            made = await super().generate(*args, **options)
            if self.made > 1:
                await asyncio.to_thread(meanwhile)
            return made

    def meanwhile() -> None:
        asked.append(what)
        if what == "right":
            running.rights.granted.clear()
            return
        other = json.loads(json.dumps(POLICY).replace("ab" * 32, "cd" * 32))
        bodies: dict[str, Any] = {
            "policy": {"release_policy": {"data": b64(json.dumps(other).encode())}},
            "disabled": {"attributes": {"enabled": False}},
        }
        with running.client() as http:
            answer = http.request(
                "PATCH" if what in bodies else "DELETE",
                "/keys/k?api-version=7.4",
                json=bodies.get(what),
                headers={"authorization": "Bearer admin"},
            )
        assert answer.status_code == 200, answer.text

    status = {"policy": 409, "deleted": 409, "right": 403, "disabled": 200}[what]
    with running_vault(tmp_path, backend=Slow()) as running:
        _exportable(running)
        action = "Microsoft.KeyVault/vaults/keys/rotate/action"
        running.rights.granted.add(("reader", action, "/keys/k"))
        answer = running.request("POST", "/keys/k/rotate", who="reader")
        assert (answer.status_code, asked) == (status, [what])
        row = last(running)
        assert row["decision"] == ("allowed" if status == 200 else "refused")
        if what == "policy":
            assert row["condition"] == "the key changed meanwhile"
            versions = running.request("GET", "/keys/k/versions").json()["value"]
            assert len(versions) == 1


def test_what_the_backend_cannot_do_is_written_down(tmp_path: Path) -> None:
    """A lost backend is a 503 for the caller, and a row for the auditor."""

    class Lost(MemoryBackend):
        async def release(self, *_: Any, **__: Any) -> bytes:
            raise ServiceError("lost", status=503, error_code="ServiceUnavailable", retry_after=1)

    with running_vault(tmp_path, releasing=releasing(), backend=Lost()) as running:
        _exportable(running)
        answer = ask(running, "k")
        assert answer.status_code == 503
        row = last(running)
        assert (row["decision"], row["details"]["status"]) == ("failed", 503)
        assert row["reference"] == answer.json()["error"]["reference"]


# ---- what is released --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2048, 3072])
@pytest.mark.parametrize("enc", ["RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384"])
def test_a_consumer_from_the_notes_opens_the_answer(vault: Running, enc: str, bits: int) -> None:
    """Every kind of key, split at the length of the actual transfer key."""
    transfer = transfer_key(bits)
    for name in ("rsa", "ec", "oct"):
        bundle = vault.request("GET", f"/keys/{name}").json()
        kid = bundle["key"]["kid"]
        version = kid.rpartition("/")[2]
        body = {"target": token(transfer=transfer), "nonce": "fresh \u00e9", "enc": enc}
        # What was asked for is repeated as it was asked for, as a recorded answer of Azure's does.
        for path, shown_kid in (
            (f"/keys/{name}/{version}/release", kid),
            (f"/keys/{name}//release", kid.rpartition("/")[0]),
            (f"/keys/{name}/release", kid.rpartition("/")[0]),
        ):
            answer = vault.request("POST", f"{path}?api-version=7.6", body)
            assert answer.status_code == 200
            assert list(answer.json()) == ["value"]
            got = consume(answer.json()["value"], enc=enc, transfer=transfer, root=SIGNER_CA.pem)
            assert got.payload["request"] == {
                "api-version": "7.6",
                "enc": enc,
                "kid": shown_kid,
                "nonce": "fresh \u00e9",
            }
            shown = got.payload["response"]["key"]
            assert shown["key"].pop("key_hsm")
            assert shown == bundle
        if name == "oct":
            assert len(got.material) == 32
        else:
            key: Any = serialization.load_der_private_key(got.material, None)
            members = {**public_members(key.public_key()), "kty": f"{name.upper()}-HSM"}
            assert members.items() <= bundle["key"].items()


def test_the_log_says_which_token_got_which_key(vault: Running) -> None:
    """The key's identity, policy, token and transfer key of an allowed release."""
    target = token()
    assert ask(vault, body={"target": target}).status_code == 200
    row = last(vault)
    claims = json.loads(unb64(target.split(".")[1]))
    assert (row["action"], row["decision"]) == ("keys/release", "allowed")
    assert row["resource"].startswith("/keys/rsa/")
    assert row["token_id"] == claims["jti"]
    assert row["evidence_digest"] == hashlib.sha256(target.encode()).hexdigest()
    assert row["claims"]["x-ms-sgx-mrsigner"] == "ab" * 32
    modulus = transfer_key().public_key().public_numbers().n.to_bytes(256, "big")
    assert row["details"]["transfer_key"] == hashlib.sha256(modulus).hexdigest()
    assert row["details"]["enc"] == "RSA_AES_KEY_WRAP_256"
    assert target not in json.dumps(row)


def test_sha1_is_offered_only_where_the_owner_says_so(tmp_path: Path) -> None:
    """Then it is also the default, as older clients expect."""
    with running_vault(tmp_path, releasing=releasing(allow_sha1=True)) as running:
        _exportable(running)
        for body in ({}, {"enc": "CKM_RSA_AES_KEY_WRAP"}):
            answer = ask(running, "k", {"target": token(), **body})
            got = consume(
                answer.json()["value"],
                enc="CKM_RSA_AES_KEY_WRAP",
                transfer=transfer_key(),
                root=SIGNER_CA.pem,
            )
            assert len(got.material) == 32
            assert "nonce" not in got.payload["request"]


def _client(vault: Running, **options: Any) -> KeyClient:
    return KeyClient(
        vault.url,
        Credential(),  # type: ignore[arg-type]
        connection_verify=vault.ca,
        verify_challenge_resource=False,
        retry_total=0,
        **options,
    )


def test_microsofts_client_releases_a_key(vault: Running) -> None:
    """azure-keyvault-keys, unmodified: create, release, with and without a version."""
    with _client(vault) as client:
        policy = KeyReleasePolicy(json.dumps(POLICY).encode())
        made = client.create_ec_key(
            "microsoft", hardware_protected=True, exportable=True, release_policy=policy
        )
        for options in (
            {},
            {"version": made.properties.version},
            {"algorithm": "RSA_AES_KEY_WRAP_384", "nonce": "abc"},
        ):
            result = client.release_key("microsoft", token(), **options)
            enc = options.get("algorithm", "RSA_AES_KEY_WRAP_256")
            got = consume(result.value, enc=enc, transfer=transfer_key(), root=SIGNER_CA.pem)
            key = serialization.load_der_private_key(got.material, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            x = key.public_key().public_numbers().x.to_bytes(32, "big")
            assert made.key.x == x  # type: ignore[attr-defined]
        with pytest.raises(HttpResponseError) as caught:
            client.release_key("microsoft", token(iss="https://other.example"))
        assert caught.value.status_code == 403


def test_microsofts_asynchronous_client_releases_a_key(vault: Running) -> None:
    """azure-keyvault-keys.aio, unmodified."""

    async def work() -> str:
        async with AsyncKeyClient(
            vault.url,
            AsyncCredential(),  # type: ignore[arg-type]
            connection_verify=vault.ca,
            verify_challenge_resource=False,
            retry_total=0,
        ) as client:
            return (await client.release_key("oct", token())).value  # type: ignore[return-value]

    value = asyncio.run(work())
    got = consume(value, enc="RSA_AES_KEY_WRAP_256", transfer=transfer_key(), root=SIGNER_CA.pem)
    assert len(got.material) == 32


def test_a_released_key_lies_nowhere_at_the_host(
    vault: Running, enclave_state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SKR-12: command lines, environments, files and their modes, the log."""
    caplog.set_level("DEBUG")
    value = ask(vault, "oct").json()["value"]
    material = consume(
        value, enc="RSA_AES_KEY_WRAP_256", transfer=transfer_key(), root=SIGNER_CA.pem
    ).material
    forms = (material, material.hex().encode(), base64.b64encode(material), b64(material).encode())
    places: list[tuple[str, bytes]] = [("log", caplog.text.encode())]
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                places.append((f"{process}/{name}", (process / name).read_bytes()))
            except OSError:
                continue  # another user's, or gone
    folder = Path(vault.ca).parent
    for path in (*folder.rglob("*"), *enclave_state.rglob("*")):
        if path.is_file():
            places.append((str(path), path.read_bytes()))
            if path.name != "ca.pem":
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert len(places) > 10
    for place, data in places:
        assert not any(form in data for form in forms), place


def test_a_changed_row_has_no_key(vault: Running) -> None:
    """Even if the row's seal were forged: the private half is bound to policy and name (SKR-08)."""
    backend = vault.backend
    assert isinstance(backend, EnclaveBackend)
    from pyenclave.services.vault.records import context_of

    spec: dict[str, Any] = {"exportable": True, "release_policy": POLICY_BYTES, "immutable": False}
    wanted = context_of("k", "0" * 32, "oct-HSM", **spec)
    other = context_of("k", "0" * 32, "oct-HSM", **{**spec, "release_policy": POLICY_BYTES + b" "})

    async def work() -> None:
        mine = EnclaveBackend(backend._state_dir, terms=terms())
        try:
            made = await mine.generate(KeySpec(kty="oct-HSM"), wanted)
            pinned = authorities()._held[AUTHORITY].authority

            async def ask(context: bytes, policy: bytes) -> bool:
                request = asked(policy=policy)
                verdict = await mine.decide_release(made.wrapped, context, request, final=False)
                if verdict.needed:
                    await hand_in_keys(mine, pinned, verdict.needed)
                    verdict = await mine.decide_release(made.wrapped, context, request, final=True)
                return bool(verdict.ciphertext)

            assert await ask(wanted, POLICY_BYTES)
            for policy in (POLICY_BYTES, POLICY_BYTES + b" "):
                with pytest.raises(ServiceError, match="does not belong to its record"):
                    await ask(other, policy)
            with pytest.raises(ServiceError, match="does not belong to the key's record"):
                await ask(wanted, POLICY_BYTES + b" ")
        finally:
            await mine.close()

    asyncio.run(work())


def test_the_configuration_makes_the_releases(tmp_path: Path) -> None:
    """Development signs under its own authority, production under its TLS certificate."""
    ca = DevCa(None)
    plain = ServiceConfig(state_dir=str(tmp_path), database="sqlite://")
    backend = MemoryBackend()
    with Database.open(parts=[PART]) as db:
        dev = releases_of(plain.replace(dev=True, ca=ca, release_tokens_once=True), db, backend)
        assert dev._signer.algorithm == "RS256"
        assert {"localhost", "127.0.0.1", "::1"} <= set(dev._signer.names)
        assert dev._authorities.knows("https://127.0.0.1:4433")
        assert dev._once
        production = releases_of(plain.replace(tls=ca.server(["vault.example"])), db, backend)
        assert production._signer.names == ("vault.example",)
        assert not production._authorities.knows("https://127.0.0.1:4433")
        with pytest.raises(ManifestError, match="needs a certificate"):
            releases_of(plain, db, backend)
        # Development's authority alone is no development (SKR-13).
        with pytest.raises(ManifestError):
            releases_of(plain.replace(ca=ca), db, backend)


def test_the_table_of_tokens_is_a_part_of_its_own() -> None:
    """So that a vault without releases has none."""
    assert PART.name == "vault-release"
