"""``pyenclave policy sign``: what it prints is taken for what it says, and nothing is guessed."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from pyenclave.cli import main
from pyenclave.services.attestation.uploads import certificate_of, policy_of, read_upload

TEXT = "version=1.0;\nauthorizationrules\n{\n => permit();\n};\nissuancerules\n{\n};\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy-signing")
    now = dt.datetime.now(dt.UTC)
    keys: dict[str, Any] = {
        "ec": ec.generate_private_key(ec.SECP256R1()),
        "rsa": rsa.generate_private_key(65537, 2048),
        "ed": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in keys.items():
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now)
            .not_valid_after(now + dt.timedelta(days=1))
            .sign(key, None if name == "ed" else hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.der").write_bytes(certificate.public_bytes(serialization.Encoding.DER))
    (folder / "policy.txt").write_text(TEXT)
    (folder / "wrong.txt").write_text(TEXT.replace("permit", "premit"))
    return folder


def _by(folder: Path, name: str = "ec") -> list[str]:
    return ["--key", str(folder / f"{name}.pem"), "--certificate", str(folder / f"{name}.crt")]


def test_a_policy_and_its_reset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign = ["policy", "sign", *_by(folder), "--type", "TdxVm"]
    assert main([*sign, str(folder / "policy.txt")]) == 0
    found = read_upload(capsys.readouterr().out.encode())
    assert (found.use, policy_of(found)) == ("policies/set TdxVm", TEXT)
    target = folder / "reset.jwt"
    assert main([*sign, "--reset", "-o", str(target), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "use": "policies/reset TdxVm",
        "file": str(target),
        "upload": target.read_text(),
    }
    found = read_upload(target.read_bytes())
    assert (found.use, policy_of(found)) == ("policies/reset TdxVm", None)


@pytest.mark.parametrize(("verb", "form"), [("add", "crt"), ("add", "der"), ("remove", "crt")])
def test_a_change_of_signers(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str, form: str
) -> None:
    changed = folder / f"rsa.{form}"
    assert main(["policy", "sign", f"--{verb}-signer", str(changed), *_by(folder)]) == 0
    found = read_upload(capsys.readouterr().out.encode())
    assert found.use == f"certificates/{verb}"
    assert certificate_of(found).der == (folder / "rsa.der").read_bytes()
    assert found.signer is not None
    assert found.signer.der == (folder / "ec.der").read_bytes()


def test_a_signer_of_another_kind_of_key_can_be_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be there from before such keys were refused."""
    changed = folder / "ed.crt"
    assert main(["policy", "sign", "--remove-signer", str(changed), *_by(folder)]) == 0
    assert read_upload(capsys.readouterr().out.encode()).use == "certificates/remove"


def test_a_policy_is_signed_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT.replace("\n", "\r\n") + "\r\n"
    (folder / "crlf.txt").write_bytes(text.encode())
    sign = ["policy", "sign", *_by(folder), "--type", "TdxVm"]
    assert main([*sign, str(folder / "crlf.txt")]) == 0
    assert policy_of(read_upload(capsys.readouterr().out.encode())) == text
    (folder / "crlf.txt").write_bytes(b"version\xff")
    assert main([*sign, str(folder / "crlf.txt")]) != 0
    assert "a wrong byte at 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["FOLDER/policy.txt"], "--type TYPE"),
        (["--add-signer", "", "--type", "TdxVm"], "--type TYPE"),
        (["--add-signer", "FOLDER/rsa.crt", "--type", "TdxVm"], "--type TYPE"),
        (["FOLDER/policy.txt", "--type", "Tdx"], "SgxEnclave"),
        (["FOLDER/wrong.txt", "--type", "TdxVm"], "premit"),
        (["FOLDER/policy.txt", "--reset", "--type", "TdxVm"], "not allowed with"),
        (["--add-signer", "FOLDER/rsa.crt", "--remove-signer", "FOLDER/rsa.crt"], "not allowed"),
        (["--type", "TdxVm"], "required"),
        (["--reset", "--type", "TdxVm", "--key", "FOLDER/rsa.pem"], "another key"),
        (["--reset", "--type", "TdxVm", "--key", "FOLDER/rsa.crt"], "cannot be read as a key"),
        (["--reset", "--type", "TdxVm", "--key", "FOLDER/ed.pem"], "RSA or EC"),
        (["--add-signer", "FOLDER/policy.txt"], "certificate"),
        (["--add-signer", "FOLDER/ed.crt"], "RSA or EC key"),
        (["--reset", "--type", "TdxVm", "--algorithm", "RS256"], "ES256"),
    ],
)
def test_what_no_service_would_take_is_not_signed(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    target = folder / "never.jwt"
    given = [flag.replace("FOLDER", str(folder)) for flag in flags]
    assert main(["policy", "sign", *_by(folder), *given, "-o", str(target)]) != 0
    said = capsys.readouterr()
    assert text in said.err
    assert said.out == ""
    assert not target.exists()
