"""From the owner's commands into an enclave: encrypted files and parts, opened by release."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from https_double import Authority, Reply
from vault_double import Signer, Vault

import pyenclave
from pyenclave import cli
from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.errors import EcallError
from pyenclave.formats import jwk
from pyenclave.host import Enclave
from pyenclave.image import keys, sign
from pyenclave.sealed.envelope_keys import PrivateKey

ENTRY = """
import pyenclave
from pyenclave import trusted
from pyenclave.sealed.envelope_keys import PublicKey, public_of


@pyenclave.ecall
def answer(name: str, kid: str, members: dict[str, str], data: bytes) -> None:
    with trusted.open_sealed(name, "wb", key=PublicKey(kid, public_of(members))) as file:
        file.write(data)


@pyenclave.ecall
def read(name: str, key: str) -> bytes:
    released = trusted.release_key(None, key, transfer_bits=2048)
    with trusted.open_sealed(name, key=released) as file:
        return file.read()


@pyenclave.ecall
def unlock() -> None:
    trusted.unlock()


@pyenclave.ecall
def unlock_wrapped(key: str, wrapped: bytes) -> None:
    trusted.unlock(trusted.release_key(None, key, transfer_bits=2048), wrapped=wrapped)


@pyenclave.ecall
def score(x: int) -> int:
    import algo_of_test

    return algo_of_test.score(x)
"""
MANIFEST = """
[enclave]
name = "owned"
entry = "owned_of_test.py"
product_id = 7
security_version = 1
debug = true

[seal]
files = ["data"]

[encrypted]
code = ["algo_of_test.py"]
key = "{vault}/keys/algo"

[release]
vault = "{vault}"
attestation = "{vault}"
ca = "ca.pem"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A vault with an owner's keys, and the image that is to get them: all by commands."""
    folder: Path = tmp_path_factory.mktemp("owner")
    authority = Authority()
    vault = Vault(authority, Signer.under(authority, "127.0.0.1"))
    server = vault.start()
    secret = rsa.generate_private_key(65537, 2048)
    version = vault.put("model", secret)
    (folder / "owned_of_test.py").write_text(ENTRY)
    (folder / "algo_of_test.py").write_text("def score(x):\n    return 3 * x + 1\n")
    (folder / "ca.pem").write_text(authority.pem)
    (folder / "enclave.toml").write_text(MANIFEST.format(vault=vault.url))
    members = jwk.public_members(secret.public_key())
    kid = f"{vault.url}/keys/model/{version}"
    (folder / "model.json").write_text(json.dumps({**members, "kid": kid}))
    image = folder / "owned.enclave"
    build = ["build", str(folder), "-o", str(image), "--data-key-file", str(folder / "algo.key")]
    assert cli.main(build) == 0
    signed = sign.sign(image.read_bytes(), keys.keygen())
    vault.put("algo", (folder / "algo.key").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        yield SimpleNamespace(vault=vault, image=signed, folder=folder, secret=secret)
    server.close()


def enclave_of(place: SimpleNamespace, **options: object) -> Enclave:
    handlers = pyenclave.relay(
        vault=place.vault.url,
        attestation=place.vault.url,
        credential="token",
        ca=place.vault.authority.pem,
        verify_challenge_resource=False,
        timeout=10,
    )
    lent = pyenclave.lend_files(data=place.folder / "lent")
    return Enclave(place.image, ocalls={**handlers, **lent}, **options)


@pytest.fixture(scope="module")
def enclave(place: SimpleNamespace) -> Iterator[Enclave]:
    (place.folder / "lent").mkdir()
    with enclave_of(place) as running:
        yield running


def test_what_encrypt_made_opens_inside_with_the_released_key(
    enclave: Enclave, place: SimpleNamespace
) -> None:
    """Offline with the public half outside; by release inside; the owner opens it as well."""
    data = os.urandom(2 << 20)
    plain = place.folder / "rows"
    plain.write_bytes(data)
    sealed = place.folder / "lent" / "rows.sealed"
    public = ["--public-key", str(place.folder / "model.json")]
    assert cli.main(["encrypt", str(plain), "-o", str(sealed), *public]) == 0
    assert enclave.read("data/rows.sealed", "model") == data
    whole = sealed.read_bytes()
    for at in (100, 70, 9000, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] ^= 1
        sealed.write_bytes(changed)
        with pytest.raises(EcallError) as caught:
            enclave.read("data/rows.sealed", "model")
        assert caught.value.type == "UnsealError"
    sealed.write_bytes(whole)
    # A key that the vault releases too, and that is another one.
    with pytest.raises(EcallError) as caught:
        enclave.read("data/rows.sealed", "algo")
    assert caught.value.type == "UnsealError"


def test_an_enclave_answers_with_a_file_that_only_the_owner_opens(
    enclave: Enclave, place: SimpleNamespace
) -> None:
    kid = f"https://owner.example/keys/results/{'3' * 32}"
    members = jwk.public_members(place.secret.public_key())
    enclave.answer("data/answer", kid, members, b"the result " * 1000)
    path = place.folder / "lent" / "answer"
    assert b"the result" not in path.read_bytes()
    with pyenclave.open_sealed(path, key=PrivateKey(kid, place.secret)) as file:
        assert file.read() == b"the result " * 1000


def test_code_opens_after_the_vault_released_its_key(place: SimpleNamespace) -> None:
    """An oct key is the data key; an RSA key unwraps what the host hands in."""
    with enclave_of(place) as fresh:
        with pytest.raises(EcallError) as caught:
            fresh.score(2)
        assert caught.value.type == "EnclaveStateError"
        fresh.unlock()
        assert fresh.score(2) == 7
    wrapped = place.folder / "algo.key.sealed"
    public = ["--public-key", str(place.folder / "model.json")]
    assert cli.main(["encrypt", str(place.folder / "algo.key"), *public]) == 0
    with enclave_of(place) as fresh:
        fresh.unlock_wrapped("model", wrapped.read_bytes())
        assert fresh.score(3) == 10


@pytest.mark.parametrize(
    "which",
    [pytest.param("a debug launch", marks=pytest.mark.long), "a vault that has another key"],
)
def test_code_stays_closed_for_who_is_not_meant(which: str, place: SimpleNamespace) -> None:
    vault = place.vault
    policy = AppraisalPolicy.from_image(place.image, dangerous_allow_software=True)
    roots = [pyenclave.local_platform_root()]

    def judge(evidence: bytes, runtime: bytes) -> None:
        result = appraise(evidence, policy=policy, roots=roots, freshness="not_checked")
        if not result.accepted:
            error = {"error": {"code": "PolicyEvaluationError", "message": "refused"}}
            vault.override = lambda asked: Reply(error, status=400)

    before = vault.judge, vault.override, dict(vault.keys)
    vault.judge = judge
    if which == "a vault that has another key":
        vault.keys["algo"] = [("1" * 32, bytes(32))]
    try:
        with enclave_of(place, debug=which == "a debug launch") as other:
            with pytest.raises(EcallError) as caught:
                other.unlock()
            wanted = "KeyReleaseError" if which == "a debug launch" else "UnsealError"
            assert caught.value.type == wanted
            with pytest.raises(EcallError) as caught:
                other.score(2)
            assert caught.value.type == "EnclaveStateError"
    finally:
        vault.judge, vault.override, vault.keys = before
