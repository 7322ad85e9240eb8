"""``pyenclave serve``: the ready line, the end, and what it refuses to start."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pyenclave.cli import main
from pyenclave.cli._ports import kept
from pyenclave.cli._serve_options import _OPTIONS
from pyenclave.errors import PlatformUnavailableError
from pyenclave.services.identity.issuer import ADMINISTRATOR, MANAGED_IDENTITY, DevIssuer
from pyenclave.services.web.run import bound
from pyenclave.services.web.tls import DevCa

_HSM = "pkcs11:token=t?module-path="


@contextlib.contextmanager
def served(state: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a service; give the process and its ready line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyenclave", "serve", *arguments],
        env=os.environ | {"PYENCLAVE_STATE": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate(timeout=20)
            raise AssertionError(errors)
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def test_identity_serves_tokens_until_it_is_told_to_end(tmp_path: Path) -> None:
    """One JSON line, its url answers under its ca, SIGTERM ends it with 0."""
    with served(tmp_path / "state", "identity", "--dev") as (process, ready):
        assert {"url", "ca", "token", "client_id", "client_secret", "managed_identity"} <= set(
            ready
        )
        assert ready["managed_identity_object_id"] == MANAGED_IDENTITY
        context = ssl.create_default_context(cafile=ready["ca"])
        url = f"{ready['url']}/{ready['tenant']}/v2.0/.well-known/openid-configuration"
        assert httpx.get(url, verify=context).json()["issuer"].startswith(ready["url"])
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in errors


def bearer(ready: dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {ready['token']}"}


def test_vault_and_attestation_trust_each_other_without_configuration(tmp_path: Path) -> None:
    """One authority, one issuer: what one printed opens the other, and nothing else does."""
    state = tmp_path / "state"
    with (
        served(state, "vault", "--dev", "--allow-sha1") as (vault, first),
        served(state, "attestation", "--dev") as (attestation, second),
    ):
        assert first["ca"] == second["ca"]
        context = ssl.create_default_context(cafile=first["ca"])
        keys = f"{first['url']}/keys?api-version=7.4"
        policies = f"{second['url']}/policies/SgxEnclave?api-version=2022-08-01"
        with httpx.Client(verify=context, timeout=60) as client:
            assert client.get(keys, headers=bearer(second)).status_code == 200
            assert client.get(policies, headers=bearer(first)).status_code == 200
            # As the command line says; the key is not there, the algorithm is not off.
            sha1 = f"{first['url']}/keys/none/{'0' * 32}/encrypt?api-version=7.4"
            asked = {"alg": "RSA-OAEP", "value": "AAAA"}
            assert client.post(sha1, json=asked, headers=bearer(first)).status_code == 404
            stranger = {"token": DevIssuer(None).token()}
            for url in (keys, policies):
                assert client.get(url).status_code == 401
                assert client.get(url, headers=bearer(stranger)).status_code == 401
        for process in (vault, attestation):
            process.send_signal(signal.SIGTERM)
        for process in (vault, attestation):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0
            assert "Traceback" not in errors


@pytest.mark.long
def test_keys_outlive_the_service(tmp_path: Path) -> None:
    """SIGTERM, SIGKILL, and the same key, under a token from before."""
    state = tmp_path / "state"
    with served(state, "vault", "--dev") as (vault, ready):
        context = ssl.create_default_context(cafile=ready["ca"])
        with httpx.Client(verify=context, timeout=60, headers=bearer(ready)) as client:
            url = f"{ready['url']}/keys/k/create?api-version=7.4"
            kid = client.post(url, json={"kty": "EC"}).json()["key"]["kid"]
        vault.kill()
    with served(state, "vault", "--dev") as (vault, again):
        url = f"{again['url']}/keys/k?api-version=7.4"
        found = httpx.get(url, verify=context, headers=bearer(ready)).json()["key"]["kid"]
        assert found.rpartition("/")[2] == kid.rpartition("/")[2]
        vault.send_signal(signal.SIGTERM)
        vault.communicate(timeout=60)
        assert vault.returncode == 0


def test_production_is_served_from_its_file(tmp_path: Path) -> None:
    """Pinned issuer, own certificate, the configuration's administrator; nobody of development."""
    issuer, authority = DevIssuer(None, url="https://login.example.org"), DevCa(None)
    tls = authority.server()
    (tmp_path / "tls.pem").write_bytes(tls.chain)
    (tmp_path / "tls.key").write_bytes(tls.key)
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "issuer.json").write_bytes(issuer.jwks)
    with contextlib.closing(bound("127.0.0.1")) as sock:
        port = sock.getsockname()[1]
    (tmp_path / "service.toml").write_text(
        f"""
[service]
url = "https://vault.example.org"
port = {port}
state_dir = "state"
database = "sqlite:///{tmp_path}/vault.db"
administrators = ["{issuer.tenant}/{ADMINISTRATOR}"]

[tls]
certificate = "tls.pem"
key = "tls.key"

[challenge]
authorization = "https://login.example.org/{issuer.tenant}"
resource = "https://vault.azure.net"

[[issuers]]
issuer = "{issuer.issuer}"
jwks = "issuer.json"
tenants = ["{issuer.tenant}"]

[[authorities]]
url = "https://attest.example.org"
"""
    )
    (tmp_path / "state").mkdir(mode=0o700)
    with served(tmp_path / "state", "vault", "--config", str(tmp_path / "service.toml")) as (
        process,
        ready,
    ):
        assert ready == {"url": "https://vault.example.org"}
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        url = f"https://127.0.0.1:{port}/keys?api-version=7.4"
        with httpx.Client(verify=context, timeout=60) as client:
            first = client.get(url)
            assert first.status_code == 401
            assert "https://login.example.org" in first.headers["www-authenticate"]
            good = issuer.token()
            assert client.get(url, headers=bearer({"token": good})).status_code == 200
            local = DevIssuer(None, url="https://127.0.0.1:1")
            local._key = issuer._key
            for wrong in (
                issuer.token(audience="https://graph.example.org"),
                issuer.token(extra={"iss": "https://127.0.0.1:1/x/v2.0"}),
                local.token(),
                DevIssuer(None, url="https://login.example.org").token(),
            ):
                assert client.get(url, headers=bearer({"token": wrong})).status_code == 401
            nobody = issuer.token(object_id="somebody")
            assert client.get(url, headers=bearer({"token": nobody})).status_code == 403
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["vault"], "--config"),
        (["vault", "--dev", "--config", "x"], "either"),
        (["vault", "--dev", "--host", "0.0.0.0"], "this machine only"),
        (["vault", "--dev", "--host", "example.org"], "this machine only"),
        (["vault", "--dev", "--port", "70000"], "65,535"),
        (["vault", "--config", "nowhere.toml", "--port", "0"], "1 to 65,535"),
        (["identity", "--config", "x"], "serve identity has no --config"),
        (["identity"], "development only"),
        (["vault", "--dev", "--root", "x"], "--root; that is for serve attestation"),
        (["attestation", "--dev", "--root", "/nonexistent"], "nonexistent"),
        (["vault", "--config", "/nonexistent"], "nonexistent"),
        (["attestation", "--dev", "--root", __file__], "test_serve_command.py is no root"),
        (["attestation", "--dev", "--allow-sha1"], "--allow-sha1; that is for serve vault"),
        (["attestation", "--dev", "--backend", "enclave"], "has no --backend"),
        (["identity", "--dev", "--database", "sqlite://"], "serve attestation, vault"),
        (["vault", "--dev", "--time", "2024-01-01T00:00:00Z"], "--time; that is for serve attest"),
        (["attestation", "--config", __file__, "--time", "2024-01-01T00:00:00Z"], "--time is for"),
        (["attestation", "--dev", "--time", "yesterday"], "is not a time"),
        (["attestation", "--dev", "--time", "2024-01-01T00:00:00"], "has no zone"),
        (["vault", "--dev", "--backend", "foo"], "no such key backend: 'foo'"),
        (["vault", "--dev", "--backend", "pkcs11:token=foo"], "module-path and pin-source missing"),
        (["vault", "--dev", "--backend", f"{_HSM}/none.so&pin-source=/x"], "[configuration]"),
        (["vault", "--dev", "--database", "sqlite:////nonexist/foo.db"], "folder /nonexist"),
    ],
)
def test_what_must_not_start_does_not(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SKR-13: no weaker service starts in the place of the one that was asked for."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYENCLAVE_DEV", "1")
    assert main(["serve", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_signed_use_without_signers_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found out only while a service starts is no traceback either."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    tls = DevCa(None).server()
    (tmp_path / "tls.pem").write_bytes(tls.chain)
    (tmp_path / "tls.key").write_bytes(tls.key)
    (tmp_path / "issuer.json").write_bytes(DevIssuer(None).jwks)
    (tmp_path / "service.toml").write_text(
        f"""
[service]
url = "https://attest.example.org"
port = 1
state_dir = "state"
database = "sqlite:///{tmp_path}/attestation.db"
require_signed_use = true

[tls]
certificate = "tls.pem"
key = "tls.key"

[challenge]
authorization = "https://login.example.org/tenant-1"
resource = "https://attest.azure.net"

[[issuers]]
issuer = "https://login.example.org/v2.0"
jwks = "issuer.json"
tenants = ["tenant-1"]
"""
    )
    with contextlib.closing(bound("127.0.0.1")) as sock:
        port = str(sock.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "pyenclave",
        "serve",
        "attestation",
        "--port",
        port,
        "--config",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "service.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "require_signed_use without policy signers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("service", "own"),
    [
        ("attestation", "dev config host port database root collateral time"),
        ("vault", "dev config host port database backend tokens-once allow-sha1"),
        ("identity", "dev host port"),
        ("platform", "warm"),
    ],
)
def test_each_service_has_its_own_help(
    service: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its options and no other's; what it has not is refused by its name."""
    with pytest.raises(SystemExit) as caught:
        main(["serve", service, "--help"])
    assert caught.value.code == 0
    shown = set(re.findall(r"^  --([a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown == set(own.split())
    for option, owners, form in _OPTIONS:
        if service in owners:
            continue
        value = [] if form.get("action") == "store_true" else ["x"]
        assert main(["serve", service, option, *value]) == 2
        assert f"serve {service} has no {option}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what to do about it."""
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    with contextlib.closing(bound("127.0.0.1")) as sock:
        port = sock.getsockname()[1]
        assert main(["serve", "vault", "--dev", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} is in use; another --port" in capsys.readouterr().err


def test_a_development_service_keeps_its_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over restarts; while somebody else has it, another one and a line that says so."""
    first = kept("127.0.0.1", tmp_path, "vault")
    port = first.getsockname()[1]
    with contextlib.closing(first):
        other = kept("127.0.0.1", tmp_path, "vault")
        taken = other.getsockname()[1]
        other.close()
        assert taken != port
        told = capsys.readouterr().err
        assert f"port {port}, where it was before, is in use; it is now {taken}" in told
        assert told.count("\n") == 1
    for _ in range(3):
        with contextlib.closing(kept("127.0.0.1", tmp_path, "vault")) as again:
            assert again.getsockname()[1] == port
    with contextlib.closing(kept("127.0.0.1", tmp_path, "attestation")) as another:
        assert another.getsockname()[1] != port
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "x", "80", "65536", "-1", "1e4", "123456"])
def test_a_file_that_has_no_port_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "dev").mkdir()
    file = tmp_path / "dev" / "vault.port"
    file.touch(mode=0o600)
    file.write_text(text)
    with pytest.raises(PlatformUnavailableError, match=r"vault\.port has no port"):
        kept("127.0.0.1", tmp_path, "vault")
    file.chmod(0o644)
    with pytest.raises(PlatformUnavailableError, match="others"):
        kept("127.0.0.1", tmp_path, "vault")


def test_recorded_evidence_is_judged_as_of_its_time_in_development(tmp_path: Path) -> None:
    """Loud at the start, in the line for programs, and the same port for the next start."""
    state = tmp_path / "state"
    urls = []
    for arguments in ((), ("--time", "2024-07-01T12:00:00Z")):
        with served(state, "attestation", "--dev", *arguments) as (process, ready):
            urls.append(ready["url"])
            context = ssl.create_default_context(cafile=ready["ca"])
            answers = [
                httpx.request(method, f"{ready['url']}/health", verify=context)
                for method in ("GET", "HEAD")
            ]
            assert [answer.status_code for answer in answers] == [200, 200]
            described = httpx.get(f"{ready['url']}/openapi.json", verify=context).json()
            assert "/attest/SgxEnclave" in described["paths"]
            policy = httpx.get(
                f"{ready['url']}/policies/SgxEnclave?api-version=2022-08-01",
                headers=bearer(ready),
                verify=context,
            ).json()["token"]
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        claims = json.loads(base64.urlsafe_b64decode(policy.split(".")[1] + "=="))
        if arguments:
            assert ready["time"] == "2024-07-01T12:00:00+00:00"
            assert "WARNING: evidence is judged as of 2024-07-01T12:00:00+00:00" in errors
            assert claims["x-pyenclave-evidence-time"] == ready["time"]
        else:
            assert "time" not in ready
            assert "WARNING" not in errors
            assert "x-pyenclave-evidence-time" not in claims
    assert urls[0] == urls[1]


def test_a_missing_extra_is_named_in_one_line() -> None:
    """Not a traceback: what to install. And no other command needs it."""
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'sqlalchemy', 'uvicorn', 'httptools'}:\n"
        "            raise ModuleNotFoundError(f'no {name}', name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from pyenclave.cli import main\n"
        "assert main(['inspect', '/nonexistent']) == 2\n"
        "sys.exit(main(['serve', 'identity', '--dev']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert 'pip install "pyenclave[services]"' in last
    assert "Traceback" not in done.stderr
