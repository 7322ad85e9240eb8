"""A real enclave has a key released: relay, vault double, evidence of the local platform."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from https_double import Authority, Reply
from vault_double import Signer, Vault

import pyenclave
from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.calls import services
from pyenclave.errors import CallTimeoutError, EcallError, ImageError, ManifestError, OcallError
from pyenclave.formats.evidence import Evidence
from pyenclave.formats.image import Image
from pyenclave.host import Enclave
from pyenclave.image import build, keys, sign
from pyenclave.image.inspect import options
from pyenclave.image.manifest import load

ENTRY = """
import hashlib

import pyenclave
from pyenclave import trusted


@pyenclave.ecall
def fetch(name: str, version: str, refresh: bool) -> dict[str, str]:
    key = trusted.release_key(None, name, version=version, refresh=refresh, transfer_bits=2048)
    secret = key.key if key.kty == "oct" else b""
    return {"kid": key.kid, "kty": key.kty, "digest": hashlib.sha256(secret).hexdigest()}


@pyenclave.ecall
def use(name: str, wrapped: bytes) -> bytes:
    return trusted.release_key(None, name, transfer_bits=2048).unwrap(wrapped, "RSA-OAEP-256")


@pyenclave.ecall
def reason(ca: str, timeout: float) -> str:
    try:
        trusted.release_key(None, "oct", ca=ca or None, timeout=timeout, transfer_bits=2048)
    except Exception as error:
        return error.check
    return ""


@pyenclave.ecall
def echo(x: int) -> int:
    return x
"""

MANIFEST = """
[enclave]
name = "released"
entry = "released_of_test.py"
product_id = 7
security_version = 1
debug = true
threads = 2

[release]
vault = "{vault}"
attestation = "{vault}/"
ca = "ca.pem"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A vault, images of two builds that want its keys, and who signed them."""
    folder = tmp_path_factory.mktemp("released")
    authority = Authority()
    vault = Vault(authority, Signer.under(authority, "127.0.0.1"))
    server = vault.start()
    secret = rsa.generate_private_key(65537, 2048)
    vault.put("rsa", secret)
    vault.put("oct", b"k" * 32)
    (folder / "released_of_test.py").write_text(ENTRY)
    (folder / "ca.pem").write_text(authority.pem)
    manifest = folder / "enclave.toml"
    manifest.write_text(MANIFEST.format(vault=vault.url))
    image = sign.sign(build.build(manifest), keys.keygen())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        yield SimpleNamespace(vault=vault, server=server, image=image, secret=secret, folder=folder)
    server.close()


@pytest.fixture
def vault(place: SimpleNamespace) -> Iterator[Vault]:
    """The vault, and its kindness is restored after each test."""
    yield place.vault
    for name in ("judge", "override", "change_claims", "change_cipher", "change_jws"):
        setattr(place.vault, name, getattr(Vault(place.vault.authority, place.vault.signer), name))


def handlers(place: SimpleNamespace) -> dict[str, object]:
    return pyenclave.relay(
        vault=place.vault.url,
        attestation=place.vault.url,
        credential="token",
        ca=place.vault.authority.pem,
        verify_challenge_resource=False,
        timeout=10,
    )


@pytest.fixture(scope="module")
def enclave(place: SimpleNamespace) -> Iterator[Enclave]:
    with Enclave(place.image, ocalls=handlers(place)) as running:
        yield running


def test_a_key_arrives_inside(enclave: Enclave, place: SimpleNamespace, vault: Vault) -> None:
    found = enclave.fetch("oct", "", False)
    assert found["digest"] == hashlib.sha256(b"k" * 32).hexdigest()
    version = vault.keys["oct"][0][0]
    assert found["kid"] == f"{vault.url}/keys/oct/{version}"
    digest = hashes.SHA256()
    scheme = padding.OAEP(padding.MGF1(digest), digest, None)
    wrapped = place.secret.public_key().encrypt(b"a data key", scheme)
    assert enclave.use("rsa", wrapped) == b"a data key"


def test_the_evidence_is_this_enclaves_and_binds_the_transfer_key(
    enclave: Enclave, place: SimpleNamespace, vault: Vault
) -> None:
    seen: list[tuple[bytes, bytes]] = []
    vault.judge = lambda evidence, runtime: seen.append((evidence, runtime))
    with Enclave(place.image, ocalls=handlers(place)) as fresh:
        fresh.fetch("oct", "", True)
    [(evidence, runtime)] = seen
    parsed = Evidence.from_bytes(evidence)
    assert parsed.raw
    policy = AppraisalPolicy.from_image(place.image, dangerous_allow_software=True)
    result = appraise(
        evidence,
        policy=policy,
        report_data=hashlib.sha256(runtime).digest() + bytes(32),
        freshness="not_checked",
        roots=[pyenclave.local_platform_root()],
    )
    assert result.accepted, [check for check in result.checks if check.outcome == "failed"]
    assert result.identified


def test_the_reason_crosses_to_the_host(
    enclave: Enclave, place: SimpleNamespace, vault: Vault
) -> None:
    """A refusal is not opaque: check, status and reference are the host's to see; a key is not."""
    inner = {"code": "ForbiddenByPolicy", "reference": "audit-9"}
    error = {"error": {"code": "Forbidden", "message": "not met", "innererror": inner}}
    vault.override = lambda asked: Reply(error, status=403) if "release" in asked.path else None
    with pytest.raises(EcallError) as caught:
        enclave.fetch("oct", "", True)
    assert caught.value.public
    assert caught.value.fields == {
        "check": "release.refused",
        "status": 403,
        "error_code": "Forbidden",
        "inner": "ForbiddenByPolicy",
        "reference": "audit-9",
        "transient": False,
    }
    assert "not met" in str(caught.value)


def test_another_authority_is_not_the_codes_own(enclave: Enclave) -> None:
    assert enclave.reason(Authority("Another").pem, 20.0) == "answer.chain"


def test_a_relay_that_hangs_holds_its_own_call_alone(place: SimpleNamespace, vault: Vault) -> None:
    """The caller's deadline ends the wait; the other lane of the enclave serves on."""
    free = threading.Event()
    given = handlers(place)
    real = given[services.NAME]

    def hang(*args: object) -> object:
        free.wait(30)
        return real(*args)  # type: ignore[operator]

    with Enclave(place.image, ocalls={services.NAME: hang}) as running:
        begin = time.monotonic()
        with pytest.raises(CallTimeoutError):
            running.options(timeout=0.3).fetch("oct", "", False)
        assert time.monotonic() - begin < 10
        assert running.echo(5) == 5
        free.set()
        assert running.fetch("rsa", "", False)["kty"] == "RSA"


def test_an_enclave_without_a_relay_is_not_launched(place: SimpleNamespace) -> None:
    with pytest.raises(OcallError, match=services.NAME):
        Enclave(place.image).start()


@pytest.mark.long
def test_a_script_asks_for_it_when_it_is_built(place: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "script_of_release.py"
    vault = place.vault
    path.write_text(
        "import pyenclave\nfrom pyenclave import trusted\n\n\n@pyenclave.ecall\n"
        "def fetch(vault: str, ca: str) -> str:\n"
        "    return trusted.release_key(vault, 'oct', attestation=vault, ca=ca).kty\n"
    )
    with Enclave.from_file(path, release=True, ocalls=handlers(place), quiet=True) as running:
        assert running.fetch(vault.url, vault.authority.pem) == "oct"
    with Enclave.from_file(path, quiet=True) as running, pytest.raises(EcallError) as caught:
        running.fetch(vault.url, vault.authority.pem)
    assert caught.value.fields["check"] == "relay.absent"


# -- images -----------------------------------------------------------------------------------


def test_the_image_says_whom_it_trusts_and_what_runs_for_it(place: SimpleNamespace) -> None:
    image = Image.parse(place.image)
    assert image.info.release == {
        "vault": place.vault.url,
        "attestation": place.vault.url,
        "ca": place.vault.authority.pem,
    }
    assert [one["name"] for one in image.info.ocalls] == [services.NAME]
    shown = options(image)
    assert shown["release.vault"] == place.vault.url
    assert "BEGIN CERTIFICATE" in shown["release.ca"]
    names = {module.name for module in image.lock.modules}
    assert "pyenclave.trusted._release" in names
    assert "cryptography.x509" in names


def test_no_network_client_is_on_the_lock_list(place: SimpleNamespace) -> None:
    """The host relays; nothing that speaks TLS or HTTP runs inside."""
    names = {module.name for module in Image.parse(place.image).lock.modules}
    clients = ("ssl", "_ssl", "http", "urllib.request", "ftplib", "asyncio", "httpx", "requests")
    found = [n for n in names for c in clients if n == c or n.startswith(c + ".")]
    assert found == []
    assert not any(name.startswith(("pyenclave._https", "pyenclave.vault")) for name in names)
    assert not any(name.startswith("pyenclave.host") for name in names)


def test_an_image_without_release_is_what_it_was(place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "plain_of_test.py").write_text(
        "import pyenclave\n\n\n@pyenclave.ecall\ndef f() -> int:\n    return 1\n"
    )
    image = Image.parse(build.build(tmp_path / "plain_of_test.py"))
    assert image.info.release is None
    assert b"release" not in image.info.to_bytes()
    assert not any("_release" in module.name for module in image.lock.modules)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('vault = "http://v.example"', "vault"),
        ('vault = "https://u@v.example"', "vault"),
        ("vault = 5", "vault"),
        ('ca = ""', "ca"),
        ('ca = "absent.pem"', r"\[release\] ca"),
        ('ca = "released_of_test.py"', r"\[release\] ca"),
        ('token = "x"', "token"),
    ],
)
def test_a_manifest_that_says_it_wrongly_is_refused(
    line: str, words: str, place: SimpleNamespace
) -> None:
    head = MANIFEST.partition("[release]")[0]
    path = place.folder / "wrong.toml"
    path.write_text(f"{head}[release]\n{line}\n")
    with pytest.raises((ManifestError, ImageError), match=words):
        build.build_manifest(load(path))


def test_the_relays_function_is_not_declared_by_hand(place: SimpleNamespace) -> None:
    path = place.folder / "by_hand.toml"
    own = f'\n[ocalls]\n{services.NAME} = "(x: str) -> str"\n'
    path.write_text(MANIFEST.format(vault=place.vault.url) + own)
    with pytest.raises(ManifestError, match="not declared by hand"):
        build.build_manifest(load(path))
