"""``pyenclave policy from-image``: what is released is what the flags say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyenclave.attestation.azure_policy import Claim, evaluate, read_policy
from pyenclave.attestation.azure_render import azure_claims
from pyenclave.cli import main
from pyenclave.formats.image import Image
from pyenclave.formats.release_policy import ReleasePolicy
from pyenclave.image import build, keys, sign
from pyenclave.image.manifest import Manifest
from pyenclave.measurement.image import verify_image

URL = "https://attest.example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy-of-image")
    (folder / "small.py").write_text(
        "from pyenclave import trusted\n\n\n@trusted.ecall\ndef f(x: int) -> int:\n    return x\n"
    )
    manifest = Manifest(name="small", entry=folder / "small.py", product_id=7, security_version=3)
    unsigned = build.build_manifest(manifest)
    (folder / "unsigned.enclave").write_bytes(unsigned)
    (folder / "small.enclave").write_bytes(sign.sign(unsigned, keys.keygen()))
    return folder


def _claims(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the service says of the image on a platform in a TEE; *changes* are claims of ours."""
    identity = verify_image(Image.parse((folder / "small.enclave").read_bytes()))
    ours = {
        "mrenclave": identity.mrenclave.hex(),
        "mrsigner": identity.mrsigner.hex(),
        "isv_prod_id": 7,
        "isv_svn": 3,
        "debug": False,
        "level": "embedded",
        "tee": "sev-snp",
    }
    return dict(azure_claims(ours | changes, tee="pyenclave"))


def _release(folder: Path, *flags: str) -> ReleasePolicy:
    path = folder / "policy.json"
    command = ["policy", "from-image", str(folder / "small.enclave"), "-o", str(path)]
    assert main([*command, "--authority", URL, *flags]) == 0
    # As a vault reads it, strictly: nothing in it needs the interop mode.
    return ReleasePolicy.from_json(path.read_bytes(), strict=True)


_OTHERS: dict[str, dict[str, Any]] = {
    "other code": {"mrenclave": "ab" * 32},
    "other signer": {"mrsigner": "ab" * 32},
    "other product": {"isv_prod_id": 8},
    "older": {"isv_svn": 2},
    "debug": {"debug": True},
    "software": {"tee": "none"},
    "unknown tee": {"tee": "sev-es"},
    "as text": {"isv_svn": "3"},
    "debug as text": {"debug": "false"},
    "without level": {"level": None},
    "later build": {"mrenclave": "ab" * 32, "isv_svn": 4},
    "as a service": {"level": "service"},
}


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        ((), {"without level", "as a service"}),
        (("--measurement",), {"without level", "as a service"}),
        (("--signer",), {"without level", "as a service", "other code", "later build"}),
        (
            ("--signer", "--min-version", "1"),
            {"without level", "as a service", "other code", "later build", "older"},
        ),
        (("--signer", "--min-version", "4"), {"later build"}),
        (("--min-level", "service"), {"as a service"}),
        (
            ("--dangerous-allow-software",),
            {"without level", "as a service", "software", "unknown tee"},
        ),
        (
            ("--dangerous-allow-debug",),
            {"without level", "as a service", "debug", "debug as text"},
        ),
    ],
)
def test_what_the_policy_releases_to_is_what_the_flags_say(
    folder: Path, flags: tuple[str, ...], accepted: set[str]
) -> None:
    policy = _release(folder, *flags)
    released = {
        name
        for name, changes in _OTHERS.items()
        if policy.evaluate(URL, _claims(folder, **changes)).released
    }
    assert released == accepted
    itself = policy.evaluate(URL, _claims(folder)).released
    assert itself is (not {"4", "service"} & set(flags))
    assert not policy.evaluate("https://attest.example.org", _claims(folder)).released
    sgx = _claims(folder) | {"x-ms-attestation-type": "sgx"}
    assert not policy.evaluate(URL, sgx).released
    for name in _claims(folder):
        without = {n: v for n, v in _claims(folder).items() if n != name}
        named = any(name in str(c) for c in policy.authorities[0].condition.conditions)
        assert policy.evaluate(URL, without).released is (itself and not named)


def test_the_policy_is_written_exactly_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = verify_image(Image.parse((folder / "small.enclave").read_bytes()))
    command = ["policy", "from-image", str(folder / "small.enclave"), "--authority", URL]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {
        "version": "1.0.0",
        "anyOf": [
            {
                "authority": URL,
                "allOf": [
                    {"claim": "x-ms-attestation-type", "equals": "pyenclave"},
                    {
                        "anyOf": [
                            {"claim": "x-pyenclave-tee", "equals": "sev-snp"},
                            {"claim": "x-pyenclave-tee", "equals": "tdx"},
                            {"claim": "x-pyenclave-tee", "equals": "sgx"},
                        ]
                    },
                    {"claim": "x-ms-sgx-is-debuggable", "equals": False},
                    {"claim": "x-ms-sgx-mrenclave", "equals": identity.mrenclave.hex()},
                    {"claim": "x-ms-sgx-mrsigner", "equals": identity.mrsigner.hex()},
                    {"claim": "x-ms-sgx-product-id", "equals": 7},
                    {"claim": "x-ms-sgx-svn", "greaterOrEquals": 3},
                ],
            }
        ],
    }
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["form"], said["file"]) == ("release", None)
    assert ReleasePolicy.from_json(said["policy"]).authorities[0].url == URL


def test_the_services_own_policy_means_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(folder / "small.enclave")
    assert main(["policy", "from-image", image, "--azure-attestation-policy"]) == 0
    text = read_policy(capsys.readouterr().out)
    release = _release(folder)
    for changes in ({}, *_OTHERS.values()):
        claims = _claims(folder, **changes)
        incoming = [Claim(n, v, "AttestationService") for n, v in claims.items()]
        released = release.evaluate(URL, claims).released
        assert evaluate(text, incoming).permitted is released, changes


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--authority", "http://attest.example"),
        ("--authority", "https://user@attest.example"),
        ("--authority", URL, "--azure-attestation-policy"),
        ("--authority", URL, "--min-version", "1"),
        ("--authority", URL, "--signer", "--min-version", "70000"),
        ("--authority", URL, "--signer", "--measurement"),
    ],
)
def test_what_contradicts_itself_is_a_wrong_use(folder: Path, flags: tuple[str, ...]) -> None:
    target = folder / "never.json"
    image = str(folder / "small.enclave")
    assert main(["policy", "from-image", image, "-o", str(target), *flags]) == 2
    assert not target.exists()


def test_an_image_that_no_production_launch_takes_gets_no_policy_that_nobody_meets(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(folder / "unsigned.enclave")
    assert main(["policy", "from-image", image, "--authority", URL]) == 2
    assert "not signed" in capsys.readouterr().err
    dangerous = ["policy", "from-image", image, "--authority", URL, "--dangerous-allow-debug"]
    assert main(dangerous) == 0
    assert "mrsigner" not in capsys.readouterr().out
    assert main([*dangerous, "--signer"]) == 2


def test_a_changed_image_gets_no_policy(folder: Path) -> None:
    data = bytearray((folder / "small.enclave").read_bytes())
    data[5000] ^= 1
    (folder / "changed.enclave").write_bytes(data)
    image = str(folder / "changed.enclave")
    assert main(["policy", "from-image", image, "--authority", URL]) == 1
