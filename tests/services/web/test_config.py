"""Settings: a strict file in production, and development that nobody slips into."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from pyenclave.errors import ConfigurationError, ManifestError
from pyenclave.image.manifest import load as load_manifest
from pyenclave.services.identity.issuer import ADMINISTRATOR, TENANT
from pyenclave.services.web.config import ServiceConfig, load
from pyenclave.services.web.development import development
from pyenclave.services.web.limits import Limits, expected
from pyenclave.services.web.tls import DevCa

GOOD = """
[service]
url = "https://vault.example.org"
host = "0.0.0.0"
port = 8443
state_dir = "state"
database = "postgresql+psycopg://vault@db/vault"
administrators = ["11111111-2222-3333-4444-555555555555/alice"]

[tls]
certificate = "tls.pem"
key = "tls.key"

[challenge]
authorization = "https://login.microsoftonline.com/11111111-2222-3333-4444-555555555555"
resource = "https://vault.azure.net"

[[issuers]]
entra_tenant = "11111111-2222-3333-4444-555555555555"
clients = ["app-1"]

[[issuers]]
issuer = "https://idp.example.org/realms/x"
subject = "sub"
algorithms = ["ES256"]
require_nbf = false

[[authorities]]
url = "https://attest.example.org"
jwks = "attest.json"

[limits]
rate = 100
body = 65536
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a certificate and its key."""
    key, chain = DevCa(None).leaf(["vault.example.org"])
    pem = "".join(
        f"-----BEGIN CERTIFICATE-----\n{_lines(der)}-----END CERTIFICATE-----\n" for der in chain
    )
    (tmp_path / "tls.pem").write_text(pem)
    (tmp_path / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (tmp_path / "attest.json").write_text('{"keys": []}')
    return tmp_path


def _lines(der: bytes) -> str:
    import base64

    return base64.encodebytes(der).decode()


def read(folder: Path, text: str = GOOD) -> ServiceConfig:
    (folder / "service.toml").write_text(text)
    return load(folder / "service.toml")


def test_a_whole_configuration_is_read(folder: Path) -> None:
    """Paths are relative to the file; Entra ID means both versions of its tokens."""
    config = read(folder)
    assert not config.dev
    assert config.ca is None
    assert config.state_dir == str(folder / "state")
    assert [issuer.version for issuer in config.issuers] == ["2.0", "1.0", None]
    assert config.issuers[0].clients == frozenset({"app-1"})
    assert config.issuers[2].subject == "sub"
    assert config.authorities[0].jwks_file == str(folder / "attest.json")
    assert (config.limits.rate, config.limits.body, config.limits.header) == (100.0, 65536, 32768)
    assert config.challenge is not None
    assert not any(issuer.dangerous_any_loopback for issuer in config.issuers)


def test_every_documented_setting_of_an_attestation_service_is_taken(folder: Path) -> None:
    """What the page on it lists stands in a file, and arrives."""
    page = Path(__file__).parents[3] / "docs" / "attestation-service.md"
    table = page.read_text("utf-8").partition("## Configuration")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z_0-9]+)` \|", table, re.MULTILINE))
    ca = DevCa(None).pem.decode()
    (folder / "root.pem").write_text(ca)
    values: dict[str, tuple[str, Any]] = {
        "platform_roots": ('["root.pem"]', (ca.encode(),)),
        "policy_signers": ('["root.pem"]', (ca.encode(),)),
        "collateral": ('"intel"', "intel"),
        "signing_algorithm": ('"RS256"', "RS256"),
        "ear_form": ('"underscored"', "underscored"),
        "require_signed_use": ("true", True),
        "attest_identity": ("true", True),
        "open_drafts": ("true", True),
        "dangerous_allow_software": ("true", True),
        "audiences": ('["api://x"]', ("api://x",)),
    }
    assert documented == set(values)
    lines = "".join(f"{name} = {text}\n" for name, (text, _) in values.items())
    config = read(folder, GOOD.replace("port = 8443\n", "port = 8443\n" + lines))
    assert {name: getattr(config, name) for name in values} == {
        name: value for name, (_, value) in values.items()
    }


REFUSED = {
    "no TLS": ("[tls]\ncertificate", "[tls]\n#", "certificate is missing"),
    "no key": ('key = "tls.key"', "", "key is missing"),
    "no url": ('url = "https://vault.example.org"', "", "url is missing"),
    "plain url": ('"https://vault.example.org"', '"http://vault.example.org"', "url"),
    "no state directory": ('state_dir = "state"', "", "state_dir is missing"),
    "no database": ('database = "postgresql+psycopg://vault@db/vault"', "", "database is missing"),
    "unknown key": ("port = 8443", "port = 8443\nprot = 1", "unknown key 'prot'"),
    "dev by configuration": ("port = 8443", "port = 8443\ndev = true", "unknown key 'dev'"),
    "unknown before missing": ('url = "https://vault', 'ulr = "https://vault', "key 'ulr'"),
    "a tenant's name": ('entra_tenant = "11111111-', 'entra_tenant = "example-', "GUID"),
    "an administrator of no tenant": (
        "11111111-2222-3333-4444-555555555555/alice",
        "alice",
        "admin",
    ),
    "our page's administrator": ("555555555555/alice", "555555555555/OBJECT_ID", "administrators"),
    "our page's tenant": ("com/11111111-2222-3333-4444-555555555555", "com/TENANT", "challenge"),
    "unknown table": ("[limits]", "[limitz]", "limitz"),
    "text as number": ("port = 8443", 'port = "8443"', "port"),
    "true as number": ("port = 8443", "port = true", "port"),
    "port out of range": ("port = 8443", "port = 70000", "port"),
    "weak algorithm": ('["ES256"]', '["HS256"]', "algorithms"),
    "plain issuer": ("https://idp.example.org", "http://idp.example.org", "https"),
    "danger by configuration": (
        "require_nbf = false",
        "dangerous_any_loopback = true",
        "dangerous_any_loopback",
    ),
    "an issuer of any tenant": ('subject = "sub"', "", "tenants"),
    "a tenant of two issuers": (
        'subject = "sub"',
        'tenants = ["11111111-2222-3333-4444-555555555555"]',
        "share the tenant",
    ),
    "unknown subject": ('subject = "sub"', 'subject = "email"', "subject"),
    "negative limit": ("rate = 100", "rate = -1", "rate"),
    "twice the same": ("port = 8443", "port = 8443\nport = 8444", "TOML"),
    "quotes in a header": (
        'resource = "https://vault.azure.net"',
        "resource = 'https://\"x'",
        "header",
    ),
}


@pytest.mark.parametrize(("old", "new", "named"), REFUSED.values(), ids=REFUSED)
def test_half_a_configuration_is_refused_by_name(
    folder: Path, old: str, new: str, named: str
) -> None:
    """SKR-13: nothing that is missing or misspelt is filled in with something weaker."""
    assert old in GOOD
    with pytest.raises(ManifestError, match=named):
        read(folder, GOOD.replace(old, new, 1))


def test_entra_id_names_people_by_guids_and_a_root_is_a_certificate(folder: Path) -> None:
    """Where all issuers are Entra ID nobody is called alice; and the code is not an image's."""
    before, _, rest = GOOD.partition('[[issuers]]\nissuer = "https://idp')
    entra = before + "[[authorities]]" + rest.partition("[[authorities]]")[2]
    with pytest.raises(ConfigurationError, match="both GUIDs") as caught:
        read(folder, entra)
    assert caught.value.code == "configuration"
    read(folder, entra.replace("/alice", "/22222222-2222-3333-4444-555555555555"))
    rooted = GOOD.replace("port = 8443", 'port = 8443\nplatform_roots = ["attest.json"]')
    with pytest.raises(ConfigurationError, match="is no root"):
        read(folder, rooted)


def test_without_an_issuer_nothing_starts(folder: Path) -> None:
    """Nobody could be let in, and everybody is not the alternative."""
    before, _, rest = GOOD.partition("[[issuers]]")
    with pytest.raises(ManifestError, match="no issuer"):
        read(folder, before + "[[authorities]]" + rest.partition("[[authorities]]")[2])


def test_development_is_of_this_machine_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No environment variable makes a configuration one of development."""
    for name in ("PYENCLAVE_DEV", "DEV", "PYENCLAVE_ENV"):
        monkeypatch.setenv(name, "1")
    values: dict[str, Any] = {"state_dir": str(tmp_path), "database": "sqlite://"}
    assert not ServiceConfig(**values).dev
    assert ServiceConfig(**values).issuers == ()
    for url in ("https://192.0.2.1:1", "https://0.0.0.0:1", "https://[::]:1", "https://x.org:1"):
        with pytest.raises(ValueError, match=r"machine|does not appear"):
            development("vault", tmp_path, url=url)
    first = development("vault", tmp_path, url="https://127.0.0.1:1")
    second = development("attestation", tmp_path, url="https://[::1]:2")
    assert first.config.dev
    assert first.ca.pem == second.ca.pem
    assert first.config.issuers == second.config.issuers
    assert first.config.administrators == (f"{TENANT}/{ADMINISTRATOR}",)
    assert "attestation.db" in second.config.database
    assert first.config.audiences[0] == second.config.audiences[0]
    assert "https://attest.azure.net" in second.config.audiences
    assert "https://attest.azure.net" not in first.config.audiences
    asked = [made.config.challenge for made in (first, second)]
    assert [found.resource for found in asked if found is not None] == [
        "https://vault.azure.net",
        "https://attest.azure.net",  # what Azure's clients of attestation ask tokens for
    ]


HOSTILE = {
    "nan": "nan",
    "a number of 400 digits": "9" * 400,
    "a number that cannot be shown": "0x" + "f" * 5000,
    "text with a NUL": '"\\u0000"',
    "two lines": '"a\\nb"',
    "a list": "[1, {}]",
    "a table": "{a = 1}",
    "a date": "2020-01-01",
}
KEYS = [
    *[("limits", key) for key in ("rate", "burst", "body", "idle_seconds", "json_depth")],
    *[("service", key) for key in ("port", "retention_days", "allow_sha1", "audiences")],
    *[("challenge", key) for key in ("authorization", "resource")],
    *[("tls", key) for key in ("certificate", "key")],
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(("table", "key"), KEYS)
def test_a_hostile_value_is_one_error_that_names_it(
    folder: Path, table: str, key: str, value: str
) -> None:
    text = re.sub(rf"(?m)^{key} = .*\n", "", GOOD)
    text = text.replace(f"[{table}]\n", f"[{table}]\n{key} = {HOSTILE[value]}\n")
    with pytest.raises((ConfigurationError, OSError)) as caught:
        read(folder, text)
    if isinstance(caught.value, OSError):  # a name of no file
        assert table == "tls"
        assert "a\nb" in str(caught.value.filename)
    elif table != "tls" or "null" not in str(caught.value):  # a path with a NUL has no name
        assert f"[{table}]" in str(caught.value) or key in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "9" * 5000, "1 # \x00"])
def test_what_breaks_the_reader_of_toml_is_one_error(folder: Path, value: str) -> None:
    text = GOOD.replace("port = 8443", f"port = {value}")
    with pytest.raises(ConfigurationError, match=r"service\.toml is not TOML"):
        read(folder, text)
    (folder / "enclave.toml").write_text(text)
    with pytest.raises(ManifestError, match=r"enclave\.toml: is not TOML"):
        load_manifest(folder)


def test_a_number_that_cannot_be_shown_is_named_in_a_manifest(folder: Path) -> None:
    needed = "name = 'x'\nentry = 'x.py'\nproduct_id = 1\nsecurity_version = 1\n"
    text = f"[enclave]\n{needed}threads = 0x{'f' * 5000}\n"
    (folder / "enclave.toml").write_text(text)
    with pytest.raises(ManifestError, match=r"threads.*found int too large"):
        load_manifest(folder)


def test_a_key_twice_is_named(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="overwrite"):
        read(folder, GOOD.replace("port = 8443", "port = 8443\nport = 8444"))


NUMBERS = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "-1",
    "-0.5",
    "0",
    "0.0",
    "5e-324",
    "1e308",
    "1e18",
    "2" * 18,
]


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("key", [item.name for item in dataclasses.fields(Limits)])
def test_a_limit_that_is_none_is_refused_by_its_name(folder: Path, key: str, value: str) -> None:
    text = re.sub(rf"(?m)^{key} = .*\n", "", GOOD).replace("[limits]", f"[limits]\n{key} = {value}")
    with pytest.raises(ConfigurationError, match=rf"\[limits\] {key}; expected .*; found "):
        read(folder, text)


@pytest.mark.parametrize("key", [item.name for item in dataclasses.fields(Limits)])
def test_every_limit_can_be_set(folder: Path, key: str) -> None:
    """The least and the most that it may be, and nothing beyond."""
    low, high = (number.strip() for number in _range(key))
    for value in (low, high):
        text = re.sub(rf"(?m)^{key} = .*\n", "", GOOD)
        config = read(folder, text.replace("[limits]", f"[limits]\n{key} = {value}"))
        assert getattr(config.limits, key) == float(value)
    for value in (float(low) / 2, float(high) * 2):
        with pytest.raises(ValueError, match=f"the limit {key} is a number from"):
            Limits(**{key: value})


def _range(key: str) -> tuple[str, str]:
    low, _, high = expected(key).removeprefix("a number from ").partition(" to ")
    return low.replace(",", ""), high.replace(",", "")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "6", "91", "7.0", "2" * 18])
def test_days_that_a_vault_cannot_keep_keys_are_refused_when_settings_load(
    folder: Path, value: str
) -> None:
    text = GOOD.replace("port = 8443", f"port = 8443\nretention_days = {value}")
    with pytest.raises(ConfigurationError, match=r"retention_days; expected .*; found "):
        read(folder, text)


@pytest.mark.parametrize("value", ["7", "90"])
def test_days_that_a_vault_can_keep_keys(folder: Path, value: str) -> None:
    text = GOOD.replace("port = 8443", f"port = 8443\nretention_days = {value}")
    assert read(folder, text).retention_days == int(value)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "65536", "443.0"])
def test_ports_that_there_are_not(folder: Path, value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\[service\] port; expected .*; found "):
        read(folder, GOOD.replace("port = 8443", f"port = {value}"))


MANIFEST_NUMBERS = [
    *[("enclave", key) for key in ("product_id", "security_version", "threads")],
    *[("memory", key) for key in ("sealed", "message", "shared")],
    ("runtime", "blas_threads"),
]


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "-1", "1.0", "1e308", "9" * 30, '"9 TiB "']
)
@pytest.mark.parametrize(("table", "key"), MANIFEST_NUMBERS)
def test_a_number_of_a_manifest_that_cannot_be_is_refused_by_its_name(
    folder: Path, table: str, key: str, value: str
) -> None:
    values = {"name": "'x'", "entry": "'x.py'", "product_id": "1", "security_version": "1"}
    if table == "enclave":
        values[key] = value
    text = "[enclave]\n" + "".join(f"{name} = {text}\n" for name, text in values.items())
    if table != "enclave":
        text += f"[{table}]\n{key} = {value}\n"
    (folder / "x.py").write_text("")
    (folder / "enclave.toml").write_text(text)
    with pytest.raises(ManifestError, match=rf"\[{table}\] {key}.*expected .*found"):
        load_manifest(folder)
