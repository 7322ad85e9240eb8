"""The whole path with our own services: enclave, evidence, token, vault, key inside."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="the services need the extra pyenclave[services]")
pytest.importorskip("uvicorn", reason="the services need the extra pyenclave[services]")

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from https_double import Authority

import pyenclave
from pyenclave.attestation import AppraisalPolicy, azure_render
from pyenclave.calls import services as names
from pyenclave.errors import EcallError, RemoteServiceError
from pyenclave.formats import jose
from pyenclave.formats.jwk import Jwks
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.services import attestation as attestation_service
from pyenclave.services import vault as vault_service
from pyenclave.services.web.development import development
from pyenclave.services.web.run import Server, bound, url_of
from pyenclave.vault_client import AttestationClient, VaultClient, VaultKey

ENTRY = """
import pyenclave
from pyenclave import trusted


@pyenclave.ecall
def opened(name: str, version: str, wrapped: bytes, how: str) -> bytes:
    key = trusted.release_key(None, name, version=version, transfer_bits=2048)
    return key.unwrap(wrapped, how)


@pyenclave.ecall
def version(name: str, refresh: bool) -> str:
    key = trusted.release_key(None, name, refresh=refresh, transfer_bits=2048)
    return key.kty + " " + key.version


@pyenclave.ecall
def point(name: str, server_nonce: bool) -> str:
    key = trusted.release_key(None, name, server_nonce=server_nonce, transfer_bits=2048)
    return hex(key.key.public_key().public_numbers().x)


@pyenclave.ecall
def under(ca: str) -> str:
    return trusted.release_key(None, "rows", ca=ca, transfer_bits=2048).kid
"""

MANIFEST = """
[enclave]
name = "owner"
entry = "owner_of_test.py"
product_id = 7
security_version = 1
debug = true

[release]
vault = "{vault}"
attestation = "{attestation}"
ca = "ca.pem"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Both services in this process, two builds, and keys that only the first may have."""
    folder = tmp_path_factory.mktemp("services")
    state = folder / "state"
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYENCLAVE_STATE", str(state))
        state.mkdir(mode=0o700)
        found = SimpleNamespace(state=state)
        for name, module in (("attestation", attestation_service), ("vault", vault_service)):
            sock = stack.enter_context(contextlib.closing(bound("127.0.0.1", 0)))
            url = url_of(sock, host="127.0.0.1")
            dev = development(name, state, url=url)
            service = module.build(dev.config)
            stack.enter_context(Server(service, sock=sock, tls=dev.config.tls))
            setattr(found, name, url)
            found.dev = dev
        found.ca = Path(str(found.dev.ca.path)).read_text()
        found.token = found.dev.token()
        (folder / "ca.pem").write_text(found.ca)
        manifest = folder / "enclave.toml"
        manifest.write_text(MANIFEST.format(vault=found.vault, attestation=found.attestation))
        signer = keys.keygen()
        for which, source in (("image", ENTRY), ("other", ENTRY + "# another build\n")):
            (folder / "owner_of_test.py").write_text(source)
            setattr(found, which, sign.sign(build.build(manifest), signer))
        code = AppraisalPolicy.from_image(found.image, dangerous_allow_software=True)
        policy = azure_render.release_policy(
            code, tee="pyenclave", authority=found.attestation
        ).to_json()
        found.client = stack.enter_context(
            VaultClient(found.vault, found.token, ca=found.ca, verify_challenge_resource=False)
        )
        options: dict[str, Any] = {"release_policy": policy}
        found.rows = found.client.create_key("rows", "RSA-HSM", size=2048, **options)
        found.oct = found.client.create_key(
            "secret", "oct-HSM", size=256, operations=["wrapKey", "unwrapKey"], **options
        )
        found.ec = found.client.create_key("sign", "EC-HSM", curve="P-256", **options)
        found.policy = policy
        yield found


def relay(place: SimpleNamespace, **more: Any) -> dict[str, Callable[..., Any]]:
    given: dict[str, Any] = {
        "vault": place.vault,
        "attestation": place.attestation,
        "credential": place.token,
        "ca": place.ca,
        "verify_challenge_resource": False,
    }
    return pyenclave.relay(**(given | more))


@pytest.fixture(scope="module")
def enclave(place: SimpleNamespace) -> Iterator[Enclave]:
    with Enclave(place.image, ocalls=relay(place)) as running:
        yield running


def encrypted(key: VaultKey, data: bytes) -> bytes:
    public = key.public_key()
    return public.encrypt(data, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))  # type: ignore[union-attr]


def test_keys_of_every_kind_arrive(enclave: Enclave, place: SimpleNamespace) -> None:
    row = encrypted(place.rows, b"a row")
    assert enclave.opened("rows", "", row, "RSA-OAEP-256") == b"a row"
    _, wrapped = place.client.wrap_key("secret", "A256KW", b"d" * 32, version=place.oct.version)
    assert enclave.opened("secret", "", wrapped, "A256KW") == b"d" * 32
    public = place.ec.public_key()
    assert enclave.point("sign", False) == hex(public.public_numbers().x)


def test_the_clients_and_the_services_agree(place: SimpleNamespace) -> None:
    """Each method once, against what serves Azure's own clients."""
    vault: VaultClient = place.client
    assert vault.get_key("rows") == vault.get_key("rows", place.rows.version) == place.rows
    assert place.rows.release_policy == place.policy
    kid, wrapped = vault.wrap_key("rows", "RSA-OAEP-256", b"d" * 32)
    assert kid == place.rows.kid
    assert (
        vault.unwrap_key("rows", "RSA-OAEP-256", wrapped, version=place.rows.version) == b"d" * 32
    )
    digest = hashlib.sha256(b"said").digest()
    kid, signature = vault.sign("sign", "ES256", digest)
    assert kid == place.ec.kid
    assert jose.verify_signature(place.ec.public_key(), "ES256", signature, b"said")
    made = vault.import_key("brought", {"kty": "oct-HSM", "k": "A" * 43}, tags={"a": "b"})
    assert (made.kty, made.name, dict(made.tags)) == ("oct-HSM", "brought", {"a": "b"})
    with pytest.raises(RemoteServiceError) as caught:
        vault.get_key("absent")
    assert (caught.value.status, caught.value.error_code) == (404, "KeyNotFound")
    with pytest.raises(RemoteServiceError) as caught:
        vault.release("rows", "a.b.c", nonce="n")
    assert caught.value.status in (400, 403)
    assert caught.value.reference
    with AttestationClient(place.attestation, ca=place.ca) as service:
        assert service.openid_configuration()["issuer"] == place.attestation
        assert Jwks.from_bytes(service.certs()).keys
        with pytest.raises(RemoteServiceError) as caught:
            service.attest("PyEnclave", b"no evidence", runtime_data=b"{}")
        assert caught.value.status == 400


def refused(enclave: Enclave, name: str = "rows") -> dict[str, Any]:
    with pytest.raises(EcallError) as caught:
        enclave.version(name, True)
    assert caught.value.type == "KeyReleaseError"
    return caught.value.fields


@pytest.mark.parametrize("which", ["another build", "a debug launch"])
def test_who_is_not_what_the_policy_names_is_refused(which: str, place: SimpleNamespace) -> None:
    image = place.other if which == "another build" else place.image
    debug = which == "a debug launch"
    with Enclave(image, ocalls=relay(place), debug=debug) as other:
        fields = refused(other)
    assert fields["check"] in ("release.refused", "attest.refused")
    if fields["check"] == "release.refused":
        assert (fields["status"], fields["error_code"]) == (403, "Forbidden")
    assert fields["reference"]


def test_an_identity_without_rights_is_refused(place: SimpleNamespace) -> None:
    nobody = place.dev.issuer.token(
        object_id="99999999-9999-9999-9999-999999999999", audience=place.dev.config.audiences[0]
    )
    with Enclave(place.image, ocalls=relay(place, credential=nobody)) as other:
        fields = refused(other)
    assert (fields["check"], fields["status"]) == ("release.refused", 403)


def hostile(
    place: SimpleNamespace, change: Callable[[Callable[..., Any], tuple[Any, ...]], Any]
) -> dict[str, Callable[..., Any]]:
    real = relay(place)[names.NAME]
    return {names.NAME: lambda *args: change(real, args)}


def test_a_transfer_key_of_the_relay_is_not_attested(place: SimpleNamespace) -> None:
    """SKR-05: evidence binds the transfer key, so the service finds another one in its place."""

    def swap(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if args[0] == "attestation":
            body = json.loads(args[5])
            data = body["runtimeData"]["data"]
            body["runtimeData"]["data"] = data[:60] + ("A" if data[60] != "A" else "B") + data[61:]
            args = (*args[:5], json.dumps(body).encode(), args[6])
        return real(*args)

    with Enclave(place.image, ocalls=hostile(place, swap)) as other:
        assert refused(other)["check"] == "attest.refused"


def test_answers_and_tokens_of_before_open_nothing(
    enclave: Enclave, place: SimpleNamespace
) -> None:
    """SKR-09: the relay has seen an earlier release to the same code, and repeats parts of it."""
    said: list[Any] = []
    targets: list[str] = []

    def record(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        answer = real(*args)
        if args[0] == "vault":
            said.append(answer)
            targets.append(json.loads(args[5])["target"])
        return answer

    with Enclave(place.image, ocalls=hostile(place, record)) as first:
        first.version("rows", False)

    def replay(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return said[0] if args[0] == "vault" else real(*args)

    with Enclave(place.image, ocalls=hostile(place, replay)) as second:
        assert refused(second)["check"] == "answer.nonce"

    def old_token(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if args[0] == "vault":
            body = json.loads(args[5]) | {"target": targets[0]}
            args = (*args[:5], json.dumps(body).encode(), args[6])
        return real(*args)

    with Enclave(place.image, ocalls=hostile(place, old_token)) as third:
        assert refused(third)["check"] == "answer.unwrap"


def test_a_key_of_another_name_is_not_taken_for_it(place: SimpleNamespace) -> None:
    def other_key(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return real(*(one.replace("/rows/", "/sign/") if one == args[3] else one for one in args))

    with Enclave(place.image, ocalls=hostile(place, other_key)) as other:
        assert refused(other)["check"] == "answer.kid"


def test_another_authority_vouches_for_nothing(enclave: Enclave) -> None:
    with pytest.raises(EcallError) as caught:
        enclave.under(Authority("Another").pem)
    assert caught.value.fields["check"] == "answer.chain"


def test_after_a_rotation_both_versions_open_their_own(
    enclave: Enclave, place: SimpleNamespace
) -> None:
    place.client.create_key("turning", "RSA-HSM", size=2048, release_policy=place.policy)
    old = place.client.get_key("turning")
    before = encrypted(old, b"before")
    assert enclave.opened("turning", "", before, "RSA-OAEP-256") == b"before"
    place.client.request("POST", "/keys/turning/rotate", {})
    new = place.client.get_key("turning")
    assert new.version != old.version
    assert enclave.version("turning", False) == f"RSA {old.version}"
    assert enclave.version("turning", True) == f"RSA {new.version}"
    assert enclave.opened("turning", "", encrypted(new, b"after"), "RSA-OAEP-256") == b"after"
    assert enclave.opened("turning", old.version, before, "RSA-OAEP-256") == b"before"


def test_a_nonce_of_the_service_is_used_up(place: SimpleNamespace) -> None:
    bodies: list[bytes] = []

    def record(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        bodies.append(args[5])
        return real(*args)

    with Enclave(place.image, ocalls=hostile(place, record)) as other:
        assert other.point("sign", True).startswith("0x")
    attest = json.loads(bodies[1])
    assert attest["nonce"].startswith("pye1.")
    with AttestationClient(place.attestation, ca=place.ca) as client:
        answer = client._session.ask(
            "POST", "/attest/PyEnclave", query={"api-version": "2022-08-01"}, body=bodies[1]
        )
    assert answer.status == 400
    assert b"nonce" in answer.body
