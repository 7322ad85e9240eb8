"""``pyenclave verify``: exit codes, one JSON object, and nothing taken from the evidence."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from pyenclave import cli
from pyenclave._platform.keys import attributes, cpu_svn
from pyenclave._platform.quote import Quoter
from pyenclave._platform.root import PLATFORM_SVN, PlatformRoot
from pyenclave.formats.evidence import Evidence, bound_report_data
from pyenclave.formats.record import ProtectionRecord
from pyenclave.formats.sgx import ReportBody
from pyenclave.sealed.provision import RuntimeKey

NONCE = bytes(range(32))


@pytest.fixture
def files(tmp_path):
    """Evidence of a platform, its root, and another root."""
    root = PlatformRoot(bytearray(b"1" * 32), level="embedded", ephemeral=False)
    other = PlatformRoot(bytearray(b"2" * 32), level="embedded", ephemeral=False)
    fields = {
        "level": "embedded",
        "tee": "none",
        "platform_svn": PLATFORM_SVN,
        "ephemeral": False,
        "debug": False,
        "jit": False,
        "enclave_id": "ab" * 16,
        "bits": {},
    }
    unsigned = ProtectionRecord(**fields)
    record = ProtectionRecord(**fields, signature=root.sign(unsigned.signed_bytes())).to_bytes()
    body = ReportBody(
        cpu_svn=cpu_svn(),
        attributes=attributes(debug=False),
        mrenclave=b"\x11" * 32,
        mrsigner=b"\x22" * 32,
        config_id=hashlib.sha256(record).digest() + bytes(32),
    )
    key = RuntimeKey().public
    data = bound_report_data(nonce=NONCE, runtime_key=key, user_data=b"")
    evidence = Evidence(
        quote=Quoter(root).quote(body, data),
        record=record,
        runtime_key=key,
        user_data=b"",
        nonce=NONCE,
    )
    (tmp_path / "evidence").write_bytes(evidence.to_bytes())
    (tmp_path / "root.pem").write_bytes(root.chain.root.public_bytes(Encoding.PEM))
    (tmp_path / "root.der").write_bytes(root.chain.root.public_bytes(Encoding.DER))
    (tmp_path / "other.pem").write_bytes(other.chain.root.public_bytes(Encoding.PEM))
    (tmp_path / "report_data").write_text(data.hex())
    return tmp_path


def verify(files, capsys, *options: str, name: str = "evidence") -> tuple[int, dict]:
    at = ("--at", "2026-07-01T12:00:00Z") if "--at" not in options else ()
    code = cli.main(["verify", str(files / name), *at, *options, "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0])


def failed(document: dict) -> list[str]:
    return [check["name"] for check in document["checks"] if check["outcome"] == "failed"]


def test_without_a_root_nothing_is_genuine(files, capsys):
    code, document = verify(files, capsys, "--policy", "permissive")
    assert code == 1
    assert document["genuine"] is False
    assert failed(document) == ["chain.root"]


def test_another_root_is_refused(files, capsys):
    code, document = verify(files, capsys, "--root", str(files / "other.pem"))
    assert code == 1
    assert "chain.root" in failed(document)


def test_the_strict_default_refuses_a_software_platform_that_is_genuine(files, capsys):
    code, document = verify(files, capsys, "--root", str(files / "root.pem"))
    assert code == 1
    assert document["genuine"] is True
    assert failed(document) == ["platform.software"]


@pytest.mark.parametrize("root", ["root.pem", "root.der"])
def test_permissive_accepts_and_lists_what_was_not_compared(files, capsys, root):
    code, document = verify(files, capsys, "--root", str(files / root), "--policy", "permissive")
    assert code == 0
    assert (document["accepted"], document["identified"], document["fresh"]) == (True, False, False)
    nonce = next(check for check in document["checks"] if check["name"] == "nonce")
    assert nonce["outcome"] == "skipped"
    assert nonce["advice"]


def test_a_policy_file_nonce_and_report_data_make_it_identified_and_fresh(files, capsys):
    (files / "policy.json").write_text(
        json.dumps({"mrenclave": "11" * 32, "dangerous_allow_software": True})
    )
    code, document = verify(
        files,
        capsys,
        *("--root", str(files / "root.pem"), "--policy", str(files / "policy.json")),
        *("--nonce", NONCE.hex(), "--report-data", (files / "report_data").read_text()),
    )
    assert code == 0
    assert document["identified"] is True
    assert document["fresh"] is True


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (("--nonce", "00" * 32), "nonce"),
        (("--report-data", "00" * 64), "report_data"),
        (("--at", "2019-01-01T00:00:00Z"), "chain.validity"),
    ],
)
def test_each_option_is_compared(files, capsys, options, check):
    code, document = verify(
        files, capsys, "--root", str(files / "root.pem"), "--policy", "permissive", *options
    )
    assert code == 1
    assert failed(document) == [check]


@pytest.mark.parametrize(
    "options",
    [
        ("--nonce", "xyz"),
        ("--nonce", "00"),
        ("--report-data", "00"),
        ("--at", "yesterday"),
        ("--at", "2026-07-01T12:00:00"),
        ("--policy", "/nonexistent/policy.json"),
        ("--root", "/nonexistent/root.pem"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_one_error_object(files, capsys, options):
    code, document = verify(files, capsys, *options)
    assert code == 2
    assert set(document) == {"error"}
    assert document["error"]["message"]


def test_a_root_or_policy_that_is_none_is_exit_code_2(files, capsys):
    (files / "junk").write_bytes(b"junk")
    for option in ("--root", "--policy"):
        assert verify(files, capsys, option, str(files / "junk"))[0] == 2


def test_what_is_no_evidence_is_unreadable(files, capsys):
    code, document = verify(files, capsys, name="root.pem")
    assert code == 2
    assert document["error"]["code"] == "attestation.format"
    assert verify(files, capsys, name="missing")[0] == 2


def test_changed_evidence_is_refused(files, capsys):
    data = bytearray((files / "evidence").read_bytes())
    data[700] ^= 1
    (files / "changed").write_bytes(data)
    options = ("--root", str(files / "root.pem"), "--policy", "permissive")
    code, document = verify(files, capsys, *options, name="changed")
    assert code == 1
    assert document["genuine"] is False


def test_for_people_the_verdict_is_the_last_line(files, capsys):
    at = datetime(2026, 7, 1, tzinfo=UTC).isoformat()
    arguments = ["verify", str(files / "evidence"), "--at", at]
    assert cli.main([*arguments, "--root", str(files / "root.pem")]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("REFUSED (pyenclave): genuine")
    assert "platform.software" in text
