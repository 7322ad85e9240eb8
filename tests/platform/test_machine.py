"""A platform on a confidential VM: its hardware vouches for it, and a relying party walks down."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

import pyenclave
from pyenclave._platform import machine
from pyenclave._platform.root import PlatformRoot
from pyenclave.attestation import AppraisalPolicy, appraise, verify
from pyenclave.errors import AppraisalError
from pyenclave.formats.dcap import TdQuote
from pyenclave.formats.hcl import REPORT_TYPE_TDX
from pyenclave.formats.machine import MachineEvidence
from pyenclave.formats.tdx import td_report_of
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.vtpm import AzureTpm, Swtpm, device_folder

NONCE = bytes(range(32))
ENTRY = """
import pyenclave
from pyenclave import trusted


@pyenclave.ecall
def raw() -> bytes:
    return trusted.attest(bytes(range(64)))
"""


def root() -> PlatformRoot:
    return PlatformRoot(bytearray(b"r" * 32), level="embedded", ephemeral=False)


@pytest.fixture(scope="module")
def swtpm() -> Iterator[Swtpm]:
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed (apt-get install swtpm)")
    with Swtpm() as running:
        yield running


@pytest.fixture
def azure(swtpm: Swtpm, tmp_path: Path) -> Iterator[tuple[Path, AmdChip]]:
    """The devices of an Azure confidential VM, and the chip below it."""
    chip = AmdChip()
    vm = AzureVm(hardware=lambda bound: chip.report(report_data=bound))
    with swtpm.open() as upstream, AzureTpm(upstream, vm) as running:
        yield device_folder(tmp_path / "devices", running.path), chip


def policy(**options: object) -> AppraisalPolicy:
    return AppraisalPolicy.any_code(allow_debug=True, **options)  # type: ignore[arg-type]


def test_where_no_hardware_is_nothing_vouches(tmp_path: Path) -> None:
    platform = root()
    machine.have_vouched(platform, top=str(tmp_path))
    assert (platform.tee, platform.machine) == ("none", b"")


@pytest.mark.parametrize("place", machine.PLACES)
def test_what_only_looks_like_hardware_does_not_vouch(place: str, tmp_path: Path) -> None:
    path = tmp_path / place.lstrip("/")
    path.parent.mkdir(parents=True)
    if place.endswith("report"):
        path.mkdir()
    else:
        path.write_bytes(b"")
    platform = root()
    machine.have_vouched(platform, top=str(tmp_path))
    assert (platform.tee, platform.machine) == ("none", b"")


def test_the_vtpm_of_an_azure_vm_vouches_for_root_and_attestation_key(
    azure: tuple[Path, AmdChip],
) -> None:
    devices, _ = azure
    platform = root()
    machine.have_vouched(platform, top=str(devices))
    assert platform.tee == "sev-snp"
    found = MachineEvidence.from_bytes(platform.machine)
    assert {"tpm-quote.msg", "tpm-quote.sig", "tpm-pcrs.json"} <= set(found.files)


def test_one_verification_walks_from_the_chip_to_an_enclave(
    azure: tuple[Path, AmdChip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, chip = azure
    monkeypatch.setenv("PYENCLAVE_DEVICES", str(devices))
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    (tmp_path / "on_azure.py").write_text(ENTRY)
    with pyenclave.Enclave.from_file(tmp_path / "on_azure.py", quiet=True) as enclave:
        evidence = enclave.attest(nonce=NONCE).to_bytes()
        raw = enclave.call("raw")
        enrolled = pyenclave.local_platform_root().public_bytes(Encoding.DER)
    files = chip.endorsements()
    result = verify(
        evidence, policy=policy(), nonce=NONCE, roots=[enrolled, chip.root], endorsements=files
    )
    assert result.claims["tee"] == "sev-snp"
    assert result.claims["machine"]["kind"] == "azure-hcl-snp"
    assert result.fresh
    # Without the chip's maker nothing of it holds.
    with pytest.raises(AppraisalError) as refused:
        verify(evidence, policy=policy(), nonce=NONCE, roots=[enrolled], endorsements=files)
    assert all(name.startswith("machine.") for name in refused.value.result.refused_by)
    assert refused.value.result.claims["tee"] == "none"
    # Raw evidence has the machine's word, too.
    unbound = appraise(
        raw,
        policy=policy(),
        freshness="not_checked",
        roots=[enrolled, chip.root],
        endorsements=files,
    )
    assert unbound.claims["tee"] == "sev-snp"
    assert unbound.accepted


@pytest.fixture
def azure_tdx(swtpm: Swtpm, tmp_path: Path) -> Iterator[tuple[Path, str, IntelPlatform]]:
    """The devices of an Azure VM over TDX, its metadata service's address, and the processor."""
    intel = IntelPlatform(datetime.now(UTC))
    quotes: dict[bytes, bytes] = {}

    def hardware(bound: bytes) -> bytes:
        quote = intel.td_quote(report_data=bound)
        report = td_report_of(TdQuote.from_bytes(quote).report_body)
        quotes[report] = quote
        return report

    class Metadata(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            quote = quotes[base64.urlsafe_b64decode(body["report"] + "==")]
            self.send_response(200)
            self.end_headers()
            said = base64.urlsafe_b64encode(quote + bytes(20)).decode()
            self.wfile.write(json.dumps({"quote": said}).encode())

        def log_message(self, *_: object) -> None:
            pass

    vm = AzureVm(hardware=hardware, report_type=REPORT_TYPE_TDX)
    with (
        HTTPServer(("127.0.0.1", 0), Metadata) as server,
        swtpm.open() as upstream,
        AzureTpm(upstream, vm) as running,
    ):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        devices = device_folder(tmp_path / "devices", running.path)
        yield devices, f"http://127.0.0.1:{server.server_port}", intel
        server.shutdown()


def test_on_azures_tdx_the_metadata_service_makes_the_quote_that_vouches(
    azure_tdx: tuple[Path, str, IntelPlatform], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, imds, intel = azure_tdx
    monkeypatch.setenv("PYENCLAVE_DEVICES", str(devices))
    monkeypatch.setenv("PYENCLAVE_IMDS", imds)
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    (tmp_path / "on_azure_tdx.py").write_text(ENTRY)
    with pyenclave.Enclave.from_file(tmp_path / "on_azure_tdx.py", quiet=True) as enclave:
        evidence = enclave.attest(nonce=NONCE).to_bytes()
        enrolled = pyenclave.local_platform_root().public_bytes(Encoding.DER)
    result = verify(
        evidence,
        policy=policy(),
        nonce=NONCE,
        roots=[enrolled, intel.root],
        endorsements=intel.endorsements("tdx"),
    )
    assert result.claims["tee"] == "tdx"
    assert result.claims["machine"]["kind"] == "azure-hcl-tdx"


def test_without_the_metadata_service_nothing_vouches_on_azures_tdx(
    azure_tdx: tuple[Path, str, IntelPlatform], capfd: pytest.CaptureFixture[str]
) -> None:
    devices, _, _ = azure_tdx
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    platform = root()
    machine.have_vouched(platform, top=str(devices), imds=f"http://127.0.0.1:{port}")
    assert (platform.tee, platform.machine) == ("none", b"")
    assert "metadata service" in capfd.readouterr().err


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("fusermount3") is None or not Path("/dev/fuse").exists(),
    reason="a FUSE double of configfs needs root and fuse3",
)
@pytest.mark.parametrize("tee", ["snp", "tdx"])
def test_configfs_of_the_kernel_vouches(tee: str, tmp_path: Path) -> None:
    pytest.importorskip("mfusepy")
    place = tmp_path / "sys/kernel/config/tsm"
    place.mkdir(parents=True)
    told = tmp_path / "endorsements"
    command = [sys.executable, "-m", "pyenclave.testing.tsm", str(place), "--tee", tee]
    double = subprocess.Popen([*command, "--endorsements", str(told)])
    try:
        deadline = time.monotonic() + 20
        while not (place / "report").is_dir():
            assert double.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        platform = root()
        machine.have_vouched(platform, top=str(tmp_path))
    finally:
        subprocess.run(["fusermount3", "-u", str(place)], check=False)
        double.wait(10)
    assert platform.tee == {"snp": "sev-snp", "tdx": "tdx"}[tee]
    found = MachineEvidence.from_bytes(platform.machine)
    assert ("vek.der" in found.files) is (tee == "snp")
