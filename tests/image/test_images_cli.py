"""The commands of images, as a shell sees them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, utils

from pyenclave.cli import main
from pyenclave.image import keys


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def image(built: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "x.enclave"
    path.write_bytes(built)
    return path


def test_a_changed_image_is_refused(capsys: pytest.CaptureFixture[str], image: Path) -> None:
    data = bytearray(image.read_bytes())
    data[5000] ^= 1
    image.write_bytes(data)
    code, found = run(capsys, "inspect", str(image))
    assert code == 1
    assert found["error"]["code"] == "image"  # type: ignore[index]
    assert "checksum" in found["error"]["message"]  # type: ignore[index]


def test_wrong_usage_is_two(
    capsys: pytest.CaptureFixture[str], image: Path, tmp_path: Path
) -> None:
    for arguments in (
        ["sign", str(image)],
        ["sign", str(image), "--key", "a", "--digest-out", "b"],
        ["sign", str(image), "--signature", "a"],
        ["inspect", str(tmp_path / "absent")],
        ["build", str(tmp_path)],
    ):
        code, found = run(capsys, *arguments)
        assert code == 2, arguments
        assert found["error"]["message"]  # type: ignore[index]


def test_what_is_no_signing_key_is_said_to_be_none(
    capsys: pytest.CaptureFixture[str], image: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "enclave.toml"
    wrong.write_text("[enclave]\n")
    code, found = run(capsys, "sign", str(image), "--key", str(wrong))
    assert code == 1
    assert "a private key in PEM form" in found["error"]["message"]  # type: ignore[index]
    assert "pyenclave keygen" in found["error"]["message"]  # type: ignore[index]


def test_a_key_is_made_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    code, found = run(capsys, "keygen", "-o", str(path))
    assert code == 0
    modulus = keys.load_private(path.read_bytes()).public_key().public_numbers().n
    assert found["mrsigner"] == hashlib.sha256(modulus.to_bytes(384, "little")).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    code, found = run(capsys, "keygen", "-o", str(path))
    assert code == 2
    assert "no key is overwritten" in found["error"]["message"]  # type: ignore[index]
    assert path.read_bytes() == before


def test_build_sign_inspect_diff(
    capsys: pytest.CaptureFixture[str], project: Path, built: bytes, tmp_path: Path, key: bytes
) -> None:
    out, signed, pem = (tmp_path / name for name in ("a.enclave", "b.enclave", "key.pem"))
    pem.write_bytes(key)
    code, found = run(
        capsys, "build", str(project), "-o", str(out), "--write-lock", str(tmp_path / "lock")
    )
    assert code == 0
    assert out.read_bytes() == built
    assert found["functions"] == ["score"]
    code, again = run(
        capsys, "build", str(project), "-o", str(signed), "--lock", str(tmp_path / "lock")
    )
    assert again["mrenclave"] == found["mrenclave"]
    code, identity = run(capsys, "sign", str(out), "--key", str(pem), "-o", str(signed))
    assert code == 0
    assert identity["mrenclave"] == found["mrenclave"]
    code, described = run(capsys, "inspect", str(signed))
    assert (code, described["mrsigner"]) == (0, identity["mrsigner"])
    code, difference = run(capsys, "diff", str(out), str(signed))
    assert code == 0
    assert difference["same_measurement"] is True
    assert difference["same"] is False
    assert run(capsys, "diff", str(out), str(out))[1]["differences"] == []
    # Only the signature differs: not what is measured.
    assert run(capsys, "diff", "--exit-code", str(out), str(signed))[0] == 0


def test_diff_tells_by_its_exit_code_if_it_is_asked_to(
    capsys: pytest.CaptureFixture[str], project: Path, tmp_path: Path
) -> None:
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    assert run(capsys, "build", str(project), "-o", one)[0] == 0
    other = tmp_path / "other"
    shutil.copytree(project, other)
    manifest = other / "enclave.toml"
    manifest.write_text(manifest.read_text().replace("threads = 2", "threads = 3"))
    assert run(capsys, "build", str(other), "-o", two)[0] == 0
    code, found = run(capsys, "diff", one, two)
    assert (code, found["same_measurement"]) == (0, False)
    assert run(capsys, "diff", "--exit-code", one, two)[0] == 1


def test_two_step_signing_by_files_equals_one_step(
    capsys: pytest.CaptureFixture[str],
    image: Path,
    tmp_path: Path,
    key: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pem, public, digest, signature = (tmp_path / n for n in ("k", "p", "d", "s"))
    pem.write_bytes(key)
    public.write_bytes(keys.public_pem(key))
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(capsys, "sign", str(image), "--key", str(pem), "-o", str(one))[0] == 0
    assert run(capsys, "sign", str(image), "--digest-out", str(digest))[0] == 0
    signature.write_bytes(
        keys.load_private(key).sign(
            digest.read_bytes(), padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())
        )
    )
    second = ["sign", str(image), "--signature", str(signature), "--public-key", str(public)]
    assert run(capsys, *second, "-o", str(two))[0] == 0
    assert one.read_bytes() == two.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert run(capsys, *second, "-o", str(two))[0] == 1
    for wrong in ("yesterday", "-1", "nan", "1e9", "9" * 12, "9" * 5000):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        code, result = run(capsys, *second, "-o", str(two))
        assert code == 2
        assert "SOURCE_DATE_EPOCH" in str(result)


def test_an_encrypted_key_signs_with_its_passphrase(
    capsys: pytest.CaptureFixture[str], image: Path, tmp_path: Path
) -> None:
    secret, pem = tmp_path / "secret", tmp_path / "key.pem"
    secret.write_text("correct horse\n")
    assert run(capsys, "keygen", "-o", str(pem), "--passphrase-file", str(secret))[0] == 0
    assert b"ENCRYPTED" in pem.read_bytes()
    assert run(capsys, "sign", str(image), "--key", str(pem))[0] == 1
    sign = ["sign", str(image), "--key", str(pem), "--passphrase-file", str(secret)]
    assert run(capsys, *sign)[0] == 0


def test_people_read_the_same_facts(
    capsys: pytest.CaptureFixture[str], image: Path, project: Path, tmp_path: Path
) -> None:
    assert main(["inspect", str(image)]) == 0
    text = capsys.readouterr().out
    for word in ("MRENCLAVE", "trusted base", "numpy", "entry/score.py", "R-X REG", "score"):
        assert word in text
    assert main(["inspect", str(image), "--modules"]) == 0
    assert "numpy.linalg" in capsys.readouterr().out
    shutil.copytree(project, tmp_path / "p")
    manifest = tmp_path / "p/enclave.toml"
    manifest.write_text(manifest.read_text().replace("threads = 2", "threads = 3"))
    assert main(["build", str(tmp_path / "p"), "-o", str(tmp_path / "y")]) == 0
    capsys.readouterr()
    assert main(["diff", str(image), str(tmp_path / "y")]) == 0
    text = capsys.readouterr().out
    assert "different measurements" in text
    assert "enclave.threads: 2 → 3" in text
