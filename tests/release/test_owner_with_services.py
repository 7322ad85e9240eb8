"""The owner's whole path as a new user walks it: real services, commands, an enclave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'services' is not installed")

import pyenclave
from pyenclave import cli
from pyenclave.errors import EcallError
from pyenclave.formats.jose import b64url_encode
from pyenclave.host import Enclave
from pyenclave.vault_client import VaultClient

pytestmark = pytest.mark.long

ENTRY = """
import pyenclave
from pyenclave import trusted


@pyenclave.ecall
def unlock() -> None:
    trusted.unlock()


@pyenclave.ecall
def score(x: int) -> int:
    import algo_of_owner

    return algo_of_owner.score(x)


@pyenclave.ecall
def rows() -> bytes:
    with trusted.open_sealed("rows", key=trusted.release_key(None, "data")) as file:
        return file.read()
"""
MANIFEST = """
[enclave]
name = "owned"
entry = "entry_of_owner.py"
product_id = 7
security_version = 1
debug = true

[seal]
files = ["rows"]

[encrypted]
code = ["algo_of_owner.py"]
key = "{vault}/keys/algo"

[release]
vault = "{vault}"
attestation = "{attestation}"
ca = "{ca}"
"""


def _service(name: str, folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyenclave", "serve", name, "--dev"],
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    with process.stdout as out:
        line = out.readline()
    assert line, (folder / f"{name}.log").read_text()
    return process, json.loads(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder: Path = tmp_path_factory.mktemp("walk")
    running: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENCLAVE_STATE", str(folder / "state"))
        try:
            process, attestation = _service("attestation", folder)
            running.append(process)
            process, vault = _service("vault", folder)
            running.append(process)
            yield _owned(folder, attestation, vault)
        finally:
            for process in running:
                process.terminate()
                process.wait(30)


def _owned(folder: Path, attestation: dict[str, str], vault: dict[str, str]) -> SimpleNamespace:
    """Do what the owner does, command by command."""

    def run(*words: object) -> None:
        assert cli.main([str(word) for word in words]) == 0

    (folder / "entry_of_owner.py").write_text(ENTRY)
    (folder / "algo_of_owner.py").write_text("def score(x):\n    return 41 + x\n")
    (folder / "token").write_text(vault["token"])
    text = MANIFEST.format(vault=vault["url"], attestation=attestation["url"], ca=vault["ca"])
    (folder / "enclave.toml").write_text(text)
    image, policy = folder / "owned.enclave", folder / "policy.json"
    run("keygen", "-o", folder / "signing.pem")
    run("build", folder, "-o", image, "--data-key-file", folder / "algo.key")
    run("sign", image, "--key", folder / "signing.pem")
    software = "--dangerous-allow-software"
    run("policy", "from-image", image, "--authority", attestation["url"], software, "-o", policy)
    with VaultClient(
        vault["url"], vault["token"], ca=vault["ca"], verify_challenge_resource=False
    ) as client:
        written = policy.read_bytes()
        only = ["wrapKey"]
        client.create_key("data", "RSA-HSM", size=2048, operations=only, release_policy=written)
        data_key = b64url_encode((folder / "algo.key").read_bytes())
        client.import_key("algo", {"kty": "oct-HSM", "k": data_key}, release_policy=written)
    rows = os.urandom(300_000)
    (folder / "rows").write_bytes(rows)
    token = ("--ca", vault["ca"], "--token-file", folder / "token")
    run("encrypt", folder / "rows", "--key", f"{vault['url']}/keys/data", *token)
    return SimpleNamespace(
        folder=folder, image=image, rows=rows, attestation=attestation, vault=vault, token=token
    )


def _enclave(place: SimpleNamespace, image: Path, **options: object) -> Enclave:
    handlers = pyenclave.relay(
        vault=place.vault["url"],
        attestation=place.attestation["url"],
        credential=place.vault["token"],
        ca=place.vault["ca"],
        verify_challenge_resource=False,
    )
    lent = pyenclave.lend_files(rows=place.folder / "rows.sealed")
    return Enclave(image, ocalls={**handlers, **lent}, **options)


def test_the_enclave_that_the_policy_names_gets_the_keys(place: SimpleNamespace) -> None:
    with _enclave(place, place.image) as enclave:
        enclave.unlock()
        assert enclave.score(1) == 42
        assert enclave.rows() == place.rows


def test_nobody_else_does(place: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Another build of the same signer, a debug launch, and the vault's own administrator."""
    other = place.folder / "other.enclave"
    (place.folder / "algo_of_owner.py").write_text("def score(x):\n    return 43 + x\n")
    key = str(place.folder / "algo.key")
    build = ["build", str(place.folder), "-o", str(other), "--data-key-file", key]
    assert cli.main(build) == 0
    assert cli.main(["sign", str(other), "--key", str(place.folder / "signing.pem")]) == 0
    for image, debug in ((other, False), (place.image, True)):
        with _enclave(place, image, debug=debug) as enclave:
            for call in (enclave.unlock, enclave.rows):
                with pytest.raises(EcallError) as caught:
                    call()
                assert caught.value.type == "KeyReleaseError"
            with pytest.raises(EcallError):
                enclave.score(1)
    sealed, kid = str(place.folder / "rows.sealed"), f"{place.vault['url']}/keys/data"
    words = ["decrypt", sealed, "-o", str(place.folder / "never"), "--key", kid]
    assert cli.main([*words, *map(str, place.token)]) == 1
    assert "remote_service" in capsys.readouterr().err
    assert not (place.folder / "never").exists()
