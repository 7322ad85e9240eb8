"""Azure's vTPM: a software TPM with the large NV index, the two-second timer, whole evidence."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pyenclave import cli
from pyenclave.attestation import AppraisalPolicy, appraise, verify
from pyenclave.errors import BindingError, ProviderError, TpmError
from pyenclave.formats.dcap import TdQuote
from pyenclave.formats.hcl import REPORT_TYPE_TDX, HclReport
from pyenclave.formats.tdx import td_report_of
from pyenclave.providers import azure_imds, azure_vtpm, obtain
from pyenclave.providers.azure_imds import quote_td_report
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.vtpm import AzureTpm, Swtpm, device_folder
from pyenclave.tpm import Tpm

NONCE = bytes(range(1, 33))
STRICT = AppraisalPolicy.strict()


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip("milan")


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(datetime.now(UTC))


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def snp_vm(swtpm: Swtpm, chip: AmdChip, clock: Clock) -> Iterator[AzureTpm]:
    """A VM over an AMD processor."""
    vm = AzureVm(hardware=lambda data: chip.report(report_data=data))
    with swtpm.open() as upstream, AzureTpm(upstream, vm, clock=clock) as running:
        yield running


class Quoter:
    """An Intel platform whose TDREPORTs can be quoted."""

    def __init__(self, platform: IntelPlatform) -> None:
        self.platform = platform
        self.quotes: dict[bytes, bytes] = {}

    def hardware(self, data: bytes) -> bytes:
        quote = self.platform.td_quote(report_data=data)
        report = td_report_of(TdQuote.from_bytes(quote).report_body)
        self.quotes[report] = quote
        return report

    def __call__(self, report: bytes) -> bytes:
        return self.quotes[report] + bytes(70)


@pytest.fixture
def tdx_vm(
    swtpm: Swtpm, platform: IntelPlatform, clock: Clock
) -> Iterator[tuple[AzureTpm, Quoter]]:
    """A VM over an Intel platform, and what quotes its TDREPORTs."""
    quoter = Quoter(platform)
    vm = AzureVm(hardware=quoter.hardware, report_type=REPORT_TYPE_TDX)
    with swtpm.open() as upstream, AzureTpm(upstream, vm, clock=clock) as running:
        yield running, quoter


def evidence(vm: AzureTpm, clock: Clock, **options):
    with Tpm.open(vm.path) as tpm:
        return azure_vtpm.evidence(
            tpm, **({"nonce": NONCE, "sleep": clock.sleep, "event_log": None} | options)
        )


# ---- what cannot be had -----------------------------------------------------------------------


def test_a_tpm_without_an_hcl_report_is_not_azures(tpm):
    with pytest.raises(ProviderError, match="no Azure confidential VM"):
        azure_vtpm.evidence(tpm, nonce=NONCE, event_log=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"nonce": b"n" * 65}, "64 bytes"), ({"nonce": b""}, "binds nothing")],
)
def test_impossible_arguments_are_refused_before_anything_is_written(tpm, options, words):
    with pytest.raises(ValueError, match=words):
        azure_vtpm.evidence(tpm, event_log=None, **options)


@pytest.mark.parametrize("index", [0, 4, 8, 12, 16, 24, 1216, 1220, 1224, 1228, 1232, 1236, 2590])
def test_an_hcl_report_that_is_damaged_is_refused(swtpm, chip, clock, index):
    """Every header field, the claims, and what follows them."""
    vm = AzureVm(hardware=lambda data: chip.report(report_data=data))
    data = bytearray(vm.hcl_report().ljust(2600, b"\0"))
    data[index] ^= 0x40
    with (
        swtpm.open() as upstream,
        AzureTpm(upstream, vm, recorded=bytes(data)) as running,
        pytest.raises(ProviderError),
    ):
        evidence(running, clock)


def test_a_tpm_that_refuses_is_a_provider_error_with_its_words(snp_vm, clock):
    class Refusing(Tpm):
        def nv_write(self, *_, **__):
            raise TpmError("the TPM refuses: TPM_RC_NV_LOCKED: the NV index is locked (0x148)")

    with Tpm.open(snp_vm.path) as good, pytest.raises(ProviderError, match="TPM_RC_NV_LOCKED"):
        azure_vtpm.evidence(Refusing(good._transport), nonce=NONCE, event_log=None)


# ---- the two-second timer ---------------------------------------------------------------------


def test_the_old_report_is_waited_out_within_its_two_seconds(snp_vm, clock):
    first = evidence(snp_vm, clock, nonce=b"first nonce")
    assert snp_vm.reports == 1
    made = evidence(snp_vm, clock)
    assert snp_vm.reports == 2
    assert made.user_data == NONCE.ljust(64, b"\0") != first.user_data
    assert 2.0 <= sum(clock.waits) < 3.0


def test_a_report_that_stays_old_ends_in_an_error_after_a_bounded_wait(snp_vm, clock):
    evidence(snp_vm, clock, nonce=b"first nonce")
    waits: list[float] = []
    with pytest.raises(BindingError, match="other user data") as caught:
        evidence(snp_vm, clock, sleep=waits.append)  # the double's clock stands still
    assert 4.0 <= sum(waits) < 10
    assert caught.value.found == b"first nonce".ljust(64, b"\0").hex()


def test_the_same_user_data_again_needs_no_new_report(snp_vm, clock):
    evidence(snp_vm, clock)
    made = evidence(snp_vm, clock)
    assert snp_vm.reports == 1
    assert made.nonce == NONCE
    assert clock.waits == []


def test_user_data_of_any_length_is_bound_and_an_index_of_another_size_made_anew(snp_vm, clock):
    with Tpm.open(snp_vm.path) as tpm:
        if tpm.nv_exists(azure_vtpm.NV_USER_DATA):
            tpm.nv_undefine(azure_vtpm.NV_USER_DATA)
        tpm.nv_define(azure_vtpm.NV_USER_DATA, 16)
    made = evidence(snp_vm, clock, user_data=b"u" * 1000)
    assert len(made.user_data or b"") == 64
    assert evidence(snp_vm, clock, user_data=b"short").user_data == b"short".ljust(64, b"\0")


def test_a_report_of_two_halves_is_read_again(swtpm, chip, clock):
    """It is read in pieces; somebody else's read may replace it in between."""
    vm = AzureVm(hardware=lambda data: chip.report(report_data=data))
    with swtpm.open() as upstream, AzureTpm(upstream, vm, clock=clock) as running:
        torn = [2]
        usual = running._report

        def report() -> bytes:
            blob = usual()
            if torn[0]:
                torn[0] -= 1
                running._made_at = None
                # First a claim is another, then the sizes contradict each other.
                place = 1500 if torn[0] else 1232  # in the attestation key; the claims' size
                other = b"A" if blob[place] != ord("A") else b"B"
                running._blob = blob[:place] + other + blob[place + 1 :]
                return blob
            return usual()

        running._report = report
        made = evidence(running, clock)
        assert HclReport.from_bytes(made.evidence).expected_report_data == made.report_data
        assert torn == [0]


def test_a_report_that_binds_no_claims_is_refused_whatever_they_say(
    swtpm, clock, recording, tmp_path
):
    """A public recording whose claims are not those that its hardware signed."""
    taken = recording("neg-azure-snp-ms-clientlib-unbound")
    vm = AzureVm(hardware=lambda data: b"")
    with swtpm.open() as upstream, AzureTpm(upstream, vm, recorded=taken.evidence) as running:
        for fresh_report in (True, False):
            with pytest.raises(BindingError, match="does not bind the runtime claims"):
                evidence(running, clock, fresh_report=fresh_report)


def test_pcrs_that_were_extended_before_the_quote_are_read_again(snp_vm, clock):
    class Extended(Tpm):
        """Somebody extends a PCR between reading and quoting, so often."""

        times = 2

        def pcr_read(self, pcrs):
            found = {bank: dict(values) for bank, values in super().pcr_read(pcrs).items()}
            if self.times:
                self.times -= 1
                found["sha256"][7] = bytes(32 - 1) + b"\1"
            return found

    with Tpm.open(snp_vm.path) as good:
        options = {"nonce": NONCE, "event_log": None, "sleep": clock.sleep}
        made = azure_vtpm.evidence(Extended(good._transport), **options)
        values = json.loads(made.endorsements["tpm-pcrs.json"])["sha256"]
        assert values["7"] != "00" * 31 + "01"
        always = Extended(good._transport)
        always.times = 1 << 30
        with pytest.raises(ProviderError, match="not those that were quoted"):
            azure_vtpm.evidence(always, **options)


# ---- produce, verify --------------------------------------------------------------------------


def test_snp_evidence_is_accepted_with_our_nonce_and_user_data(snp_vm, chip, clock):
    made = evidence(snp_vm, clock, user_data=b"what else")
    assert made.kind == "azure-hcl-snp"
    result = verify(
        made.evidence,
        policy=STRICT,
        nonce=NONCE,
        user_data=b"what else",
        report_data=made.report_data,
        endorsements={**made.endorsements, **chip.endorsements()},
        roots=[chip.root],
    )
    assert result.fresh
    assert len(result.claims["vtpm_quote"]["pcrs_sha256"]) == 24


def test_tdx_evidence_is_accepted_once_its_td_quote_is_there(tdx_vm, platform, clock):
    running, quoter = tdx_vm
    for td_quote, failing in ((quoter, []), (None, ["td.quote"])):
        made = evidence(running, clock, td_quote=td_quote)
        result = appraise(
            made.evidence,
            policy=STRICT,
            nonce=NONCE,
            endorsements={**made.endorsements, **platform.endorsements("tdx")},
            roots=[platform.root],
        )
        assert [check.name for check in result.checks if check.outcome == "failed"] == failing
        assert result.fresh is (not failing)


def test_the_attestation_keys_certificate_and_the_event_log_go_along(snp_vm, clock, tmp_path):
    (tmp_path / "log").write_bytes(b"an event log")
    with Tpm.open(snp_vm.path) as tpm:
        tpm.nv_define(azure_vtpm.NV_AK_CERTIFICATE, 16)
        try:
            made = azure_vtpm.evidence(
                tpm, nonce=NONCE, event_log=tmp_path / "log", sleep=clock.sleep
            )
            assert "ak-cert-nv.der" not in made.endorsements  # never written
            tpm.nv_write(azure_vtpm.NV_AK_CERTIFICATE, b"certificate" + bytes(5))
            made = azure_vtpm.evidence(
                tpm, nonce=NONCE, event_log=tmp_path / "log", sleep=clock.sleep
            )
        finally:
            tpm.nv_undefine(azure_vtpm.NV_AK_CERTIFICATE)
    assert made.endorsements["ak-cert-nv.der"] == b"certificate" + bytes(5)
    assert made.endorsements["tpm-eventlog.bin"] == b"an event log"


@pytest.mark.parametrize("name", ["azure-snp-coco-genoa", "azure-tdx-flashbots-ak-cert"])
def test_a_recorded_report_fails_at_the_binding_and_nowhere_before(
    swtpm, chip, clock, recording, name
):
    """The report of a real VM: genuine, but its user data and its attestation key are not ours."""
    taken = recording(name)
    vm = AzureVm(hardware=lambda data: b"")
    with swtpm.open() as upstream, AzureTpm(upstream, vm, recorded=taken.evidence) as running:
        with pytest.raises(BindingError, match="other user data") as caught:
            evidence(running, clock)
        # Relying on the vTPM's quote instead, it is the key in the report that is another's.
        quoted = evidence(running, clock, fresh_report=False)
    made = caught.value.evidence
    assert made is not None
    assert taken.failing(made.evidence, freshness="not_checked") == []
    assert taken.failing(made.evidence, nonce=NONCE) == ["nonce"]
    files = {p.name: p.read_bytes() for p in taken.folder.iterdir() if p.suffix != ".json"}
    files.pop("hcl-report.bin")
    known = {
        n: d for n, d in files.items() if n in ("vek.der", "ask.pem", "ark.pem", "td-quote.bin")
    }
    result = appraise(
        quoted.evidence,
        policy=AppraisalPolicy.permissive(),
        nonce=NONCE,
        endorsements={**known, **quoted.endorsements},
        at=taken.at,
    )
    failed = [check.name for check in result.checks if check.outcome == "failed"]
    assert failed == ["quote.signature"]


# ---- other clients, and the command -----------------------------------------------------------


def test_tpm2_tools_read_the_large_index_as_we_do(snp_vm, tmp_path):
    """With an HMAC session, too: tpm2-tools' way of giving an empty password."""
    if shutil.which("tpm2_nvread") is None:
        pytest.skip("tpm2-tools are not installed")
    with Tpm.open(snp_vm.path) as tpm:
        ours = tpm.nv_read(azure_vtpm.NV_REPORT)
    # The tools' swtpm transport also wants a control socket, which has nothing to do here.
    done = subprocess.run(
        ["tpm2_nvread", "-C", "o", f"{azure_vtpm.NV_REPORT:#x}"],
        env={**os.environ, "TPM2TOOLS_TCTI": f"cmd:{_pipe(tmp_path, snp_vm.path)}"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    if done.returncode and b"Could not load tcti" in done.stderr:
        pytest.skip("tpm2-tools were built without the transport of commands")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ours


def _pipe(folder: Path, path: str) -> str:
    """Return a program that carries standard input and output to a socket."""
    script = folder / "carry.py"
    script.write_text(
        "import os, socket, sys, threading\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "def up():\n"
        "    while d := os.read(0, 4096): s.sendall(d)\n"
        "    s.shutdown(socket.SHUT_WR)\n"
        "threading.Thread(target=up, daemon=True).start()\n"
        "while d := s.recv(4096): os.write(1, d)\n"
    )
    import sys

    return f"{sys.executable} {script} {path}"


@pytest.fixture
def imds(tdx_vm) -> Iterator[HTTPServer]:
    """Azure's metadata service, as far as it quotes TDREPORTs."""
    _, quoter = tdx_vm

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            busy = self.server.busy.pop(0) if self.server.busy else 200
            good = self.path == "/acc/tdquote" and self.headers["Metadata"] == "true"
            report = base64.urlsafe_b64decode(body["report"] + "==")
            quote = base64.urlsafe_b64encode(quoter(report)).decode()
            data = self.server.answer or json.dumps({"quote": quote}).encode()
            self.send_response(busy if good else 400)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.busy = None, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_command_makes_evidence_that_verify_accepts(
    tdx_vm, platform, imds, tmp_path, capsys, monkeypatch
):
    """Below a root folder the socket stands for /dev/tpmrm0; the metadata service quotes."""
    running, _ = tdx_vm
    running._clock = lambda: 1e9 + running.reports * 10  # a new report at each read
    root = device_folder(tmp_path / "root", running.path)
    output, beside = str(tmp_path / "hcl"), tmp_path / "beside"
    url = f"http://127.0.0.1:{imds.server_port}"
    arguments = ["evidence", "--nonce", NONCE.hex(), "-o", output, "--root", str(root)]
    assert cli.main([*arguments, "--imds", url, "--endorsements", str(beside), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["kind"], made["provider"]) == ("azure-hcl-tdx", "azure-vtpm")
    assert "Azure" in made["reason"]
    assert "td-quote.bin" in made["files"]
    for name, data in platform.endorsements("tdx").items():
        (beside / name).write_bytes(data)
    (tmp_path / "root.pem").write_bytes(platform.root)
    judged = ["verify", output, "--endorsements", str(beside), "--root", str(tmp_path / "root.pem")]
    assert cli.main([*judged, "--nonce", NONCE.hex(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fresh"] is True
    assert cli.main([*judged, "--nonce", "ff" * 32, "--json"]) == 1
    capsys.readouterr()
    for user_data, code in ((NONCE, 0), (b"other", 1)):  # the report has the nonce, too
        assert cli.main([*judged, "--user-data", user_data.hex(), "--json"]) == code
    capsys.readouterr()
    # Nothing is replaced, unless it is said.
    assert cli.main([*arguments, "--json"]) == 2
    assert cli.main([*arguments, "--force", "--report-data", "00" * 64, "--json"]) == 2
    assert "user_data" in capsys.readouterr().out


@pytest.fixture
def td_report(tdx_vm) -> bytes:
    running, _ = tdx_vm
    with Tpm.open(running.path) as tpm:
        return azure_vtpm.read_report(tpm).hardware_report


def test_an_answer_of_the_metadata_service_that_is_no_quote_is_refused(tdx_vm, td_report, imds):
    _, quoter = tdx_vm
    ask = partial(quote_td_report, base=f"http://127.0.0.1:{imds.server_port}")
    assert ask(td_report) == quoter(td_report)
    for answer in (b" ", b"[]", b'{"quote": 1}', b'{"quote": "$$"}', b"{" * 99, b"x" * 65537):
        imds.answer = answer
        with pytest.raises(ProviderError):
            ask(td_report)
    with pytest.raises(ValueError, match="1024 bytes"):
        ask(b"short")


@pytest.mark.parametrize("base", ["https://a", "http://", "a", "http://u@a", "http://a?b"])
def test_only_an_address_over_plain_http_can_be_the_metadata_services(base):
    with pytest.raises(ValueError, match="not the address"):
        quote_td_report(bytes(1024), base=base)


def test_the_metadata_service_is_asked_again_while_it_is_busy(tdx_vm, td_report, imds, monkeypatch):
    _, quoter = tdx_vm
    pauses = []
    monkeypatch.setattr(azure_imds.time, "sleep", pauses.append)
    imds.busy = [429, 503]
    url = f"http://127.0.0.1:{imds.server_port}"
    assert quote_td_report(td_report, base=url) == quoter(td_report)
    assert len(pauses) == 2
    imds.busy = [400]
    with pytest.raises(ProviderError, match="status 400"):
        quote_td_report(td_report, base=url)
    imds.busy = [429] * 5
    with pytest.raises(ProviderError, match="status 429"):
        quote_td_report(td_report, base=url, timeout=0.4)


@pytest.mark.parametrize("words", [b"", b"HTTP/1.1 200 OK\r\n", b"nonsense\r\n\r\n"])
def test_a_metadata_service_that_never_finishes_is_given_up(words):
    """It is there and takes the request; the whole attempt ends at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def dribble() -> None:
            peer, _ = server.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(words)
                while True:
                    peer.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=dribble, daemon=True).start()
        with pytest.raises(ProviderError, match="no quote"):
            quote_td_report(
                bytes(1024), base=f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.5
            )


def test_obtain_finds_the_vtpm_by_itself_and_by_name(snp_vm, tmp_path):
    snp_vm._clock = lambda: 1e9 + snp_vm.reports * 10
    root = device_folder(tmp_path, snp_vm.path)
    assert obtain(nonce=NONCE, root=root, environ={}).provider == "azure-vtpm"
    named = obtain(nonce=NONCE, provider="azure-vtpm", device=snp_vm.path, root=tmp_path)
    assert named.kind == "azure-hcl-snp"
