"""Which provider is chosen, and why: below a root folder of our own."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from pyenclave import cli
from pyenclave.errors import ProviderError
from pyenclave.providers import SOFTWARE, obtain, probe
from pyenclave.providers.probe import NAMES
from pyenclave.testing.gramine import GramineFolder
from pyenclave.testing.vtpm import device_folder


def reasons(root: Path, **options) -> dict[str, str]:
    return {item.provider: item.reason for item in probe(root, environ={}, **options).findings}


def test_a_machine_without_hardware_has_the_software_platform_and_says_why(tmp_path):
    found = probe(tmp_path, environ={})
    assert found.chosen == SOFTWARE
    assert found.finding.tee == "none"
    assert [item.provider for item in found.findings] == list(NAMES)
    assert [item.usable for item in found.findings] == [False] * (len(NAMES) - 1) + [True]
    assert all(item.reason for item in found.findings)
    with pytest.raises(ProviderError, match="no hardware") as caught:
        obtain(nonce=b"nonce", root=tmp_path, environ={})
    assert "configfs-tsm" in str(caught.value)


def test_a_plain_folder_is_no_configfs(tmp_path):
    """What an attacker, or a mistake, left there makes no evidence, and nothing stays behind."""
    place = tmp_path / "sys/kernel/config/tsm/report"
    place.mkdir(parents=True)
    assert "no configfs-tsm" in reasons(tmp_path)["tsm"]
    assert list(place.iterdir()) == []


def test_a_tpm_that_is_not_azures_is_named_and_not_taken(swtpm, tmp_path):
    root = device_folder(tmp_path, swtpm.path)
    assert probe(root, environ={}).chosen == SOFTWARE
    assert "without an HCL report" in reasons(root)["azure-vtpm"]


def test_a_tpm_that_does_not_answer_is_named_and_not_taken(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    root = device_folder(tmp_path, str(tmp_path / "sock"))  # nobody listens
    assert "a TPM, but" in reasons(root)["azure-vtpm"]
    listener.close()


def test_gramine_comes_first_and_counts_only_with_quotes(tmp_path):
    GramineFolder(tmp_path / "dev/attestation", lambda data: b"", kind="dcap")
    (tmp_path / "dev/nsm").touch()
    found = probe(tmp_path, environ={})
    assert (found.chosen, found.finding.tee) == ("gramine", "sgx")
    (tmp_path / "dev/attestation/attestation_type").write_text("none")
    found = probe(tmp_path, environ={})
    assert (found.chosen, found.finding.tee) == ("nitro", "nitro")
    assert "'none'" in reasons(tmp_path)["gramine"]


def test_the_raw_devices_come_last_and_a_tdreport_is_no_evidence(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/tdx_guest").touch()
    assert probe(tmp_path, environ={}).chosen == SOFTWARE
    assert "TDREPORT" in reasons(tmp_path)["tdx-guest"]
    (tmp_path / "dev/sev-guest").touch()
    found = probe(tmp_path, environ={})
    assert (found.chosen, found.finding.tee) == ("sev-guest", "sev-snp")
    with pytest.raises(ProviderError):
        obtain(nonce=b"nonce", provider="tdx-guest", root=tmp_path)


def test_a_provider_may_be_named_by_argument_or_environment(tmp_path):
    found = probe(tmp_path, environ={"PYENCLAVE_PROVIDER": "nitro"})
    assert found.chosen == "nitro"
    assert "PYENCLAVE_PROVIDER" in found.finding.reason
    found = probe(tmp_path, provider="tsm", environ={"PYENCLAVE_PROVIDER": "nitro"})
    assert found.chosen == "tsm"
    assert "caller" in found.finding.reason
    for wrong in ({"provider": "sgx"}, {"environ": {"PYENCLAVE_PROVIDER": "x"}}):
        with pytest.raises(ValueError, match="no provider"):
            probe(tmp_path, **wrong)
    with pytest.raises(ValueError, match="belongs to a provider"):
        probe(tmp_path, device="/dev/nsm", environ={})


def test_a_provider_that_was_named_and_is_not_there_is_an_error_and_no_other_is_taken(tmp_path):
    for name in ("gramine", "nitro", "tsm", "azure-vtpm", "sev-guest", "tdx-guest"):
        with pytest.raises(ProviderError):
            obtain(nonce=b"nonce", provider=name, root=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"provider": "nitro", "report_data": bytes(64)},
        {"provider": "tsm", "user_data": b"u"},
    ],
)
def test_what_a_provider_has_no_place_for_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="user"):
        obtain(nonce=b"nonce", root=tmp_path, **options)


def test_the_command_says_which_device_is_missing(tmp_path, capsys):
    output = str(tmp_path / "out")
    arguments = ["evidence", "-o", output, "--root", str(tmp_path), "--json"]
    assert cli.main([*arguments, "--provider", "tsm", "--nonce", "11" * 32]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "attestation.provider"
    assert "configfs" in error["message"]
    assert cli.main([*arguments, "--provider", "tsm"]) == 2  # nothing to bind
    assert cli.main([*arguments, "--user-data", "00"]) == 2  # no hardware
    assert cli.main([*arguments, "--device", "/dev/nsm"]) == 2
    assert not Path(output).exists()
    capsys.readouterr()


def test_what_only_hardware_signs_is_refused_of_the_tool_enclave(capsys):
    """By the provider's name, with the reason behind it."""
    arguments = ["evidence", "--provider", SOFTWARE, "--report-data", "00" * 64, "-o", "x"]
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert f"here the provider is {SOFTWARE}: named by the caller" in errors
