"""The commands ``measure snp|sev-es|sev|tdx|eventlog|eif|diff``, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pyenclave.cli import main

if TYPE_CHECKING:
    from pathlib import Path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["measure", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def cases(vectors: Path, *patterns: str) -> list[tuple[dict[str, Any], Path]]:
    found = []
    for pattern in patterns:
        for path in sorted((vectors / "measurement").glob(f"{pattern}/case.json")):
            found.append((json.loads(path.read_text()), path.parent))
    return found


def sev_arguments(case: dict[str, Any], folder: Path) -> list[object]:
    params = case["params"]
    given: list[object] = ["--firmware", folder / case["files"]["firmware"]["path"]]
    for name in ("vcpus", "vcpu_type", "vmm", "guest_features", "ovmf_hash"):
        if params.get(name) is not None:
            given += [f"--{name.replace('_', '-')}", params[name]]
    for name in ("kernel", "initrd"):
        if params.get(name) is not None:
            path = os.devnull if params[name] == "empty" else folder / params[name]
            given += [f"--{name}", path]
    if params.get("cmdline"):
        given += ["--append", params["cmdline"]]
    return given


def test_every_launch_digest_of_the_vectors(
    vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0
    for case, folder in cases(vectors, "snp-*", "sev-*", "seves-*"):
        firmware = case["files"].get("firmware")
        if firmware is None or not (folder / firmware["path"]).is_file():
            continue
        mode = {"snp": "snp", "seves": "sev-es", "sev": "sev"}[case["params"]["mode"]]
        code, found = run(capsys, mode, *sev_arguments(case, folder))
        if "error" in case["expect"]:
            assert (code, found["error"]["code"]) == (2, "measurement")
        else:
            assert (code, found["kind"]) == (0, case["kind"])
            assert found["launch_digest"] == case["expect"]["launch_digest"], case["id"]
        seen += 1
    assert seen >= 22


def test_every_mrtd_of_the_vectors(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, folder in cases(vectors, "tdx-mrtd-*"):
        if "error" in case["expect"]:
            short = tmp_path / "code.fd"
            whole = folder / case["files"]["firmware_full"]["path"]
            short.write_bytes(whole.read_bytes()[131072:])
            code, found = run(capsys, "tdx", "--firmware", short)
            assert (code, found["error"]["code"]) == (2, "measurement")
            continue
        firmware = folder / case["files"]["firmware"]["path"]
        two_pass = ["--two-pass"] if "two-pass" in case["params"]["page_add_order"] else []
        code, found = run(capsys, "tdx", "--firmware", firmware, *two_pass)
        assert (code, found["kind"]) == (0, "tdx-mrtd")
        for name, wanted in case["expect"].items():
            assert found[name] == wanted, case["id"]


def test_every_event_log_and_image_of_the_vectors(
    vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, folder in cases(vectors, "tdx-rtmr-*", "tpm-pcr-*", "nitro-eif-*"):
        role = next(r for r in ("ccel", "event_log", "event_log_json", "eif") if r in case["files"])
        command = "eif" if role == "eif" else "eventlog"
        code, found = run(capsys, command, folder / case["files"][role]["path"])
        assert (code, found["kind"]) == (0, case["kind"])
        for name, wanted in case["expect"].items():
            if name == "pcrs":
                for bank, registers in wanted.items():
                    assert registers.items() <= found[name][bank].items(), case["id"]
            elif name != "mrtd":  # a quote has it, a log does not
                assert found[name] == wanted, (case["id"], name)


def test_expected_registers_are_compared_and_the_cause_is_named(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vectors / "measurement/tpm-pcr-cos101-amd-sev"
    log = folder / "cos-101-amd-sev.bin"
    code, found = run(capsys, "eventlog", log, "--expect", folder / "case.json")
    assert (code, found["as_expected"], found["causes"]) == (0, True, [])
    wrong = tmp_path / "expected.json"
    wrong.write_text(json.dumps({"pcr7": "00" * 32}))
    code, found = run(capsys, "eventlog", log, "--expect", wrong)
    assert (code, found["as_expected"]) == (1, False)
    assert found["causes"][0]["register"] == "pcr7"
    assert found["causes"][0]["cause"] == "later"  # before the first event
    code, found = run(capsys, "eventlog", log, "--expect", f"sha256:7={'00' * 31}01")
    assert (code, found["causes"][0]["cause"]) == (1, "unknown")
    assert main(["measure", "eventlog", str(log), "--expect", f"pcr7={'00' * 32}"]) == 1
    assert "differs  pcr7 (sha256)" in capsys.readouterr().out


def test_explain_lists_what_was_measured(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = vectors / "measurement"
    firmware = folder / "_common/debian_OVMF.fd"
    common = ["--firmware", firmware, "--vcpus", 2, "--vcpu-type", "EPYC-Milan", "--explain"]
    _, found = run(capsys, "snp", *common)
    assert found["measured"][-1]["digest"] == found["launch_digest"]
    _, found = run(capsys, "sev-es", *common)
    assert [row["name"] for row in found["measured"]] == ["firmware", "processors"]
    _, found = run(capsys, "tdx", "--firmware", firmware, "--explain")
    assert found["measured"][-1]["digest"] == found["mrtd"]
    log = folder / "tdx-rtmr-gcp-cos113-quote/ccel_data.bin"
    _, found = run(capsys, "eventlog", log, "--explain")
    assert len(found["events"]) == 44
    assert {event["digest_of"] for event in found["events"]} <= {
        "data", "variable", "text", "differs", "unknown",
    }  # fmt: skip
    image = folder / "nitro-eif-signed/image.eif"
    _, found = run(capsys, "eif", image, "--explain")
    assert [row["name"] for row in found["measured"]].count("ramdisk") == 2
    for arguments in (["tdx", "--firmware", firmware], ["eventlog", log], ["eif", image]):
        assert main(["measure", *map(str, arguments), "--explain"]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 8


def test_an_image_whose_signature_does_not_hold_gives_1(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zlib

    data = bytearray((vectors / "measurement/nitro-eif-signed/image.eif").read_bytes())
    data[4669] ^= 1  # the command line
    data[544:548] = zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big")
    changed = tmp_path / "changed.eif"
    changed.write_bytes(data)
    code, found = run(capsys, "eif", changed)
    assert (code, found["signature_valid"]) == (1, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["snp", "--firmware", "F"],
        ["snp", "--firmware", "F", "--vcpus", "1"],
        ["snp", "--firmware", "F", "--vcpus", "0", "--vcpu-type", "EPYC"],
        ["snp", "--firmware", "F", "--vcpus", "1", "--vcpu-type", "Naples"],
        ["snp", "--firmware", "F", "--vcpus", "x", "--vcpu-type", "EPYC"],
        ["snp", "--firmware", "F", "--vcpus", "1", "--vcpu-type", "EPYC", "--append", "a"],
        ["snp", "--firmware", "F", "--vcpus", "1", "--vcpu-type", "EPYC", "--vmm", "xen"],
        ["snp", "--firmware", "F", "--vcpus", "1", "--vcpu-type", "EPYC", "--ovmf-hash", "xy"],
        ["snp", "--firmware", "F", "--vcpus", "1", "--vcpu-type", "EPYC", "--svsm", "F"],
        ["snp", "--firmware", "missing", "--vcpus", "1", "--vcpu-type", "EPYC"],
        ["tdx"],
        ["tdx", "--firmware", "F"],
        ["eventlog", "F"],
        ["eventlog", "missing"],
        ["eif", "F"],
        ["diff", "F", "F"],
    ],
)
def test_wrong_usage_and_unreadable_files_give_2(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_bytes(b"\x07" * 4096)
    code, found = run(capsys, *arguments)
    assert (code, list(found)) == (2, ["error"])


def test_diff_names_the_page(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    firmware = vectors / "measurement/_common/debian_OVMF.fd"
    data = bytearray(firmware.read_bytes())
    data[0x20010] ^= 1
    (tmp_path / "b.fd").write_bytes(data)
    code, found = run(capsys, "diff", firmware, tmp_path / "b.fd")
    assert (code, found["same"], len(found["differences"])) == (0, False, 1)
    assert found["differences"][0]["name"].startswith("0xffe20000, 1 page from file offset 0x20000")
    assert run(capsys, "diff", "--exit-code", firmware, tmp_path / "b.fd")[0] == 1
    assert run(capsys, "diff", "--exit-code", firmware, firmware)[0] == 0


def test_measuring_needs_none_of_the_native_extensions(vectors: Path) -> None:
    """A relying party on another system has neither, and gets the same values."""
    folder = vectors / "measurement"
    program = (
        "import sys\n"
        "sys.modules['pyenclave._core'] = sys.modules['pyenclave._ffi'] = None\n"
        "from pyenclave.measurement import eif, replay, sev, tdx\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "print(sev.snp_launch_digest(data, vcpus=2, vcpu_type='EPYC-Turin').hex())\n"
        "print(tdx.mrtd(data).hex())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder / "_common/debian_OVMF.fd")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    digest, mrtd = result.stdout.split()
    (snp,) = cases(vectors, "snp-debian-ovmf-epyc-turin-2v-01-qemu")
    (tdx,) = cases(vectors, "tdx-mrtd-debian-ovmf")
    assert (digest, mrtd) == (snp[0]["expect"]["launch_digest"], tdx[0]["expect"]["mrtd"])


def test_a_small_file_is_measured_without_the_large_libraries(vectors: Path) -> None:
    """They take longer to import than the file to measure."""
    folder = vectors / "measurement"
    program = (
        "import sys\n"
        "from pyenclave.cli import main\n"
        "assert main(['measure', *sys.argv[1:], '--json']) == 0\n"
        "print([name for name in ('numpy', 'cryptography', 'msgspec') if name in sys.modules])\n"
    )
    for arguments in (
        ["tdx", "--firmware", folder / "_common/debian_OVMF.fd"],
        ["eventlog", folder / "tpm-pcr-debian10-gce/debian-10.bin", "--explain"],
        ["eif", folder / "nitro-eif-one-ramdisk/image.eif"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert result.stdout.splitlines()[-1] == "[]", arguments
