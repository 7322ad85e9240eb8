"""``pyenclave verify`` for every vendor's evidence, and ``pyenclave policy explain``."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from pyenclave import cli
from pyenclave.cli.verify import moment

SNP, SNP_AT = "snp-v3-milan-vcek-dstack", "2026-09-15T01:05:04Z"
NITRO, NITRO_AT = "nitro-dstack-user-data", "2025-12-25T16:09:19Z"


@pytest.fixture
def folder(vectors):
    return vectors / "attestation"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(item) for item in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_endorsements_come_from_a_folder(folder, capsys):
    report = folder / SNP / "report.bin"
    options = ("--at", SNP_AT, "--json")
    code, out, _ = run(capsys, "verify", report, "--endorsements", folder / SNP, *options)
    document = json.loads(out)
    assert (code, document["kind"], document["accepted"]) == (0, "sev-snp-report", True)
    code, out, _ = run(capsys, "verify", report, *options)
    document = json.loads(out)
    assert (code, document["genuine"]) == (1, False)
    advice = [c["advice"] for c in document["checks"] if c["outcome"] == "failed"]
    assert any("vek.der" in text for text in advice if text)


def test_the_table_is_readable_and_ends_in_the_verdict(folder, capsys):
    document = folder / NITRO / "attestation-doc.cbor"
    code, out, _ = run(capsys, "verify", document, "--at", NITRO_AT)
    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == "accepted (nitro-document): genuine, not identified, not fresh"
    assert any(line.startswith("pcrs.0 ") for line in lines)
    assert any(line.startswith("passed   chain.root") for line in lines)
    code, out, _ = run(capsys, "verify", document, "--at", "2030-01-01T00:00:00Z")
    assert code == 1
    lines = out.splitlines()
    assert lines[-1].startswith("REFUSED (nitro-document): not genuine")
    assert "chain.validity" in lines[-1]
    place = lines.index("FAILED   chain.validity")
    assert lines[place + 1].startswith("         expected  ")
    assert lines[place + 2].startswith("         found     ")


def test_what_was_in_the_folder_and_means_nothing_is_said(folder, capsys):
    report = folder / SNP / "report.bin"
    _, out, _ = run(capsys, "verify", report, "--endorsements", folder / SNP, "--at", SNP_AT)
    assert "not read: case.json, report.bin" in out


def test_text_in_evidence_cannot_steer_the_terminal_or_forge_lines():
    from datetime import UTC, datetime

    from pyenclave.attestation import AttestationResult, Check
    from pyenclave.attestation.endorsements import Endorsements
    from pyenclave.cli import verify

    hostile = "x\x1b[2J\naccepted (pyenclave): genuine\r\u202e"
    result = AttestationResult(
        kind="pyenclave",
        checks=(
            Check(name="a", outcome="failed", expected=hostile, found=hostile, advice=hostile),
        ),
        claims={hostile: hostile, "list": [hostile], "nested": {"x": {hostile: None}}},
        at=datetime.now(UTC),
    )
    said: list[str] = []
    original = verify.output.say
    verify.output.say = lambda text="": said.append(text)
    try:
        verify._print(result, Endorsements({}, (hostile,)))
    finally:
        verify.output.say = original
    assert len(said) > 8
    for text in said:
        assert not set(text) & set("\x1b\n\r\u202e"), text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--endorsements", "/nonexistent"), "unreadable"),
        (("--endorsements", "huge"), "attestation.collateral"),
        (("--policy", "bad.json"), "usage"),
        (("--root", "bad.json"), "usage"),
        (("--root", "empty"), "usage"),
    ],
)
def test_unreadable_files_are_exit_code_2_with_one_json_error(
    folder, capsys, tmp_path, monkeypatch, arguments, code
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "huge").mkdir()
    with open(tmp_path / "huge" / "crl.der", "wb") as file:
        file.truncate(5 << 20)
    (tmp_path / "empty").touch()
    (tmp_path / "bad.json").write_text('{"mrtd": "00"}')
    document = folder / NITRO / "attestation-doc.cbor"
    exit_code, out, err = run(capsys, "verify", document, *arguments, "--json")
    assert exit_code == 2
    assert json.loads(out)["error"]["code"] == code
    assert err


def test_unknown_evidence_is_unreadable_and_says_what_was_seen(capsys, tmp_path):
    (tmp_path / "x").write_bytes(b"\xffTCG\x80\x18" + bytes(50))
    code, out, _ = run(capsys, "verify", tmp_path / "x", "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["code"] == "attestation.format"
    assert "TPM quote" in error["message"]


def test_a_policy_is_explained(capsys, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(
        f'mrtd = {{ value = "{"5a" * 48}", not_after = 2027-01-01T00:00:00Z }}\n'
        'tcb_statuses = ["UpToDate", "SWHardeningNeeded"]\n'
        'accepted_advisories = ["INTEL-SA-00837"]\n'
    )
    code, out, _ = run(capsys, "policy", "explain", path)
    assert code == 0
    assert "5a5a5a" in out
    assert "INTEL-SA-00837" in out
    code, out, _ = run(capsys, "policy", "explain", path, "--at", "2028-01-01T00:00:00Z", "--json")
    document = json.loads(out)
    assert any("not accepted at this time" in text for text in document["demands"])
    assert document["policy"]["accepted_advisories"] == ["INTEL-SA-00837"]
    code, out, _ = run(capsys, "policy", "--json", "explain", "strict")
    assert json.loads(out)["policy"] == {"accept_any_code": True}


@pytest.mark.parametrize("text", ["{", '{"mrtdd": "00"}', '{"mrtd": "AA"}'])
def test_a_policy_that_is_none_is_wrong_usage(capsys, tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    code, out, _ = run(capsys, "policy", "explain", tmp_path / "p.json", "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "usage"


def test_verifying_needs_no_host_and_no_native_part(folder):
    """A relying party has no Linux and no TEE."""
    script = (
        "import sys\n"
        "sys.modules['pyenclave._core'] = sys.modules['pyenclave._ffi'] = None\n"
        "from pyenclave import cli\n"
        f"code = cli.main(['verify', {str(folder / SNP / 'report.bin')!r}, '--endorsements',"
        f" {str(folder / SNP)!r}, '--at', {SNP_AT!r}, '--json'])\n"
        "bad = [m for m in sys.modules if m.startswith(('pyenclave.host', 'pyenclave._platform',"
        " 'pyenclave._worker', 'pyenclave._native', 'numpy'))]\n"
        "assert not bad, bad\n"
        "sys.exit(code)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    "text", ["2026-07-01T12:00:00Z", "2026-07-01t12:00:00z", "2026-07-01T14:00:00.0+02:00"]
)
def test_times_are_those_of_rfc_3339(text: str) -> None:
    assert moment("--at", text) == datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "now", "2026-07-01T12:00:00", "2026-07-01", "1782907200"])
def test_what_is_no_time_with_a_zone_is_wrong_usage(text: str) -> None:
    with pytest.raises(ValueError, match="--at"):
        moment("--at", text)
