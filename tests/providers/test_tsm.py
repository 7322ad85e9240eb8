"""configfs-tsm: every errno, the generation race, what a hostile host gives, and whole evidence."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave import cli
from pyenclave.attestation import AppraisalPolicy, verify
from pyenclave.errors import BindingError, EvidenceFormatError, ProviderError, ReportRaceError
from pyenclave.providers import tsm
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.tsm import Tsm
from pyenclave.testing.tsm import main as tsm_double

NOW = datetime.now(UTC)
NONCE = bytes(range(1, 33))
DATA = bytes(range(64))
QUOTE = "tdx-v4-gcp-cos113-uptodate"


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip("genoa")


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(NOW)


class Waits(list):
    """Counts how long was waited, without waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def blob(data: bytes) -> bytes:
    """1,184 bytes that say what they bind, and are signed by nobody."""
    return bytes(0x50) + data + bytes(1184 - 0x50 - 64)


def ask(model: Tsm, **options):
    return tsm.report(DATA, files=model, sleep=Waits(), **options)


# ---- errno by errno (notes 1.2) ---------------------------------------------------------------

FINAL = [
    ("mkdir", "", errno.ENXIO, "no TSM provider is registered"),
    ("mkdir", "", errno.EACCES, "only root"),
    ("mkdir", "", errno.EPERM, "only root"),
    ("mkdir", "", errno.ENOENT, "no such folder"),
    ("mkdir", "", errno.EROFS, "read-only"),
    ("write", "privlevel", errno.EINVAL, "privilege level lies between"),
    ("write", "inblob", errno.EFBIG, "64 bytes"),
    ("write", "service_provider", errno.ENOENT, "no such option"),
    ("read", "outblob", errno.EINVAL, "firmware refuses"),
    ("read", "auxblob", errno.EINVAL, "firmware refuses"),
    ("read", "outblob", errno.EFBIG, "larger than the kernel's interface"),
    ("read", "outblob", errno.ENXIO, "provider is gone"),
    ("read", "outblob", errno.ENOTTY, "until the guest is restarted"),
    ("read", "outblob", errno.EIO, "hypervisor failed"),
    ("read", "outblob", errno.ENOMEM, "does not fit"),
    ("read", "generation", errno.EACCES, "no permission"),
    ("read", "outblob", errno.EPROTO, "Protocol error"),
]
AGAIN = [
    ("mkdir", "", errno.EEXIST),
    ("write", "inblob", errno.EBUSY),
    ("read", "outblob", errno.EAGAIN),
    ("read", "auxblob", errno.EBUSY),
    ("read", "outblob", errno.EBUSY),
    ("read", "outblob", errno.ETIMEDOUT),
]


def failing(step: str, attribute: str, number: int, times: int = 1 << 30):
    """Return a hook that fails one step so often, and the count of tries."""
    tries = []

    def hook(what: str, name: str) -> None:
        if (what, name) == (step, attribute):
            tries.append(what)
            if len(tries) <= times:
                raise OSError(number, os.strerror(number))

    return hook, tries


@pytest.mark.parametrize(("step", "attribute", "number", "words"), FINAL)
def test_an_errno_that_stays_is_one_attempt_and_says_what_to_do(step, attribute, number, words):
    hook, tries = failing(step, attribute, number)
    model = Tsm(blob, hook=hook)
    with pytest.raises(ProviderError, match=words) as caught:
        ask(model, privlevel=1, service_provider="svsm")
    assert errno.errorcode[number] in str(caught.value)
    assert len(tries) == 1
    assert model.entries == ()


@pytest.mark.parametrize(("step", "attribute", "number"), AGAIN)
def test_an_errno_that_passes_is_tried_again_with_pauses_that_grow(step, attribute, number):
    hook, tries = failing(step, attribute, number, times=2)
    model, waits = Tsm(blob, hook=hook), Waits()
    made = tsm.report(DATA, files=model, sleep=waits)
    assert made.outblob == blob(DATA)
    assert len(tries) == 3
    assert len(waits) == 2
    assert waits[1] > waits[0]
    assert model.entries == ()


@pytest.mark.parametrize(("step", "attribute", "number"), AGAIN)
def test_an_errno_that_never_passes_ends_after_the_last_attempt(step, attribute, number):
    hook, tries = failing(step, attribute, number)
    model = Tsm(blob, hook=hook)
    with pytest.raises(ProviderError, match=errno.errorcode[number]):
        ask(model, attempts=3)
    assert len(tries) == 3
    assert model.entries == ()


def test_a_throttled_host_is_not_asked_beyond_the_timeout():
    now = [0.0]
    hook, tries = failing("read", "outblob", errno.ETIMEDOUT)

    def slow(what: str, name: str) -> None:
        now[0] += 60 * ((what, name) == ("read", "outblob"))
        hook(what, name)

    with pytest.raises(ProviderError, match="ETIMEDOUT"):
        ask(Tsm(blob, hook=slow), timeout=100, clock=lambda: now[0])
    assert len(tries) == 2


def test_an_interrupted_call_goes_on_at_once_and_not_for_ever():
    hook, tries = failing("read", "outblob", errno.EINTR, times=5)
    waits = Waits()
    assert tsm.report(DATA, files=Tsm(blob, hook=hook), sleep=waits).outblob == blob(DATA)
    assert waits == []
    hook, tries = failing("read", "outblob", errno.EINTR)
    model = Tsm(blob, hook=hook)
    with pytest.raises(ProviderError, match="again and again"):
        ask(model)
    assert len(tries) < 1000
    assert model.entries == ()


# ---- the generation race ----------------------------------------------------------------------


def racing(model: Tsm, times: int):
    """Let somebody else write into our entry, before the blobs are read."""
    left = [times]

    def hook(what: str, name: str) -> None:
        if (what, name) == ("read", "auxblob") and left[0] > 0:
            left[0] -= 1
            model.store(model.entries[0], "inblob", bytes(64))

    model.hook = hook


def test_a_report_that_may_answer_somebody_else_is_thrown_away():
    model = Tsm(blob)
    racing(model, 2)
    made = ask(model)
    assert made.outblob == blob(DATA)
    assert made.generation == 1
    assert model.entries == ()


def test_a_generation_that_changes_for_ever_ends_in_a_race_error():
    """SVC-10: the loop is bounded, and the error is of its own type."""
    model = Tsm(blob)
    racing(model, 1 << 30)
    waits = Waits()
    with pytest.raises(ReportRaceError, match="generation 1"):
        tsm.report(DATA, files=model, sleep=waits)
    assert len(waits) == tsm.ATTEMPTS - 1
    assert model.entries == ()


def test_certificates_of_another_generation_are_never_paired_with_a_report():
    """A write between the two reads is found, wherever it falls."""
    for step in (("read", "outblob"), ("read", "provider"), ("write", "inblob")):
        model = Tsm(blob)

        def hook(what: str, name: str, step=step, model=model) -> None:
            if (what, name) == step:
                model.store(model.entries[0], "inblob", bytes(64))

        model.hook = hook
        with pytest.raises(ReportRaceError):
            ask(model, attempts=2)


def test_a_write_that_was_lost_is_found_too():
    """Errors of a commit at close are told nobody: the generation tells."""

    class Losing(Tsm):
        def write(self, path: str, data: bytes) -> None:
            pass

        def content(self, name: str, attribute: str) -> bytes:
            blobs = {"outblob": blob(DATA), "auxblob": b""}
            return blobs[attribute] if attribute in blobs else super().content(name, attribute)

    with pytest.raises(ReportRaceError, match="generation 1"):
        ask(Losing(blob))


@pytest.mark.parametrize("text", [b"", b"-1", b"1e3", b"0x10", b"9" * 30, b"\xff\xfe"])
def test_a_generation_that_is_no_number_is_refused(text):
    class Odd(Tsm):
        def content(self, name: str, attribute: str) -> bytes:
            return text if attribute == "generation" else super().content(name, attribute)

    model = Odd(blob)
    with pytest.raises(ProviderError, match="generation is no number"):
        ask(model)
    assert model.entries == ()


# ---- what comes back --------------------------------------------------------------------------


def test_an_empty_report_is_a_failure():
    """Older TDX drivers copy nothing and say success."""
    model = Tsm(lambda data: b"", provider="tdx_guest")
    with pytest.raises(ProviderError, match="empty"):
        ask(model)
    assert model.entries == ()


def test_a_tdx_quote_beyond_8_kib_is_unsupported_and_no_parse_error(platform):
    model = Tsm(lambda data: platform.td_quote(report_data=data).ljust(8193, b"x"))
    model.provider = "tdx_guest"
    with pytest.raises(ProviderError, match="unsupported"):
        tsm.evidence(nonce=NONCE, files=model, sleep=Waits())


def test_zeros_behind_a_quote_are_cut_and_other_bytes_are_refused(platform):
    quote = platform.td_quote(report_data=NONCE.ljust(64, b"\0"))
    padded = Tsm(lambda data: quote + bytes(70), provider="tdx_guest")
    assert tsm.evidence(nonce=NONCE, files=padded).evidence == quote
    other = Tsm(lambda data: quote + bytes(69) + b"x", provider="tdx_guest")
    with pytest.raises(ProviderError, match="bytes follow the end"):
        tsm.evidence(nonce=NONCE, files=other)


@pytest.mark.parametrize("cut", [0, 1, 4, 47, 600, 1183])
def test_a_report_that_is_cut_off_is_refused(chip, platform, cut):
    for model in (Tsm.snp(chip), Tsm.tdx(platform, padding=0)):
        whole = model.quote
        model.quote = lambda data, whole=whole: whole(data)[:cut]
        with pytest.raises(ProviderError):
            tsm.evidence(nonce=NONCE, files=model)


def test_a_blob_without_end_is_refused():
    model = Tsm(lambda data: bytes(2 << 20))
    with pytest.raises(ProviderError, match="too long"):
        ask(model)


@given(st.binary(max_size=300))
def test_a_hostile_certificate_table_is_read_or_refused(table):
    """The host writes it."""
    try:
        tsm.table_files(table, blob(DATA))
    except EvidenceFormatError:
        return


def test_an_unknown_provider_is_named():
    with pytest.raises(ProviderError, match="xen_guest"):
        tsm.evidence(nonce=NONCE, files=Provided("xen_guest"))


class Provided(Tsm):
    def __init__(self, name: str) -> None:
        super().__init__(blob)
        self.name = name

    def content(self, name: str, attribute: str) -> bytes:
        return self.name.encode() if attribute == "provider" else super().content(name, attribute)


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_report_data_of_another_size_never_reaches_the_kernel(size):
    model = Tsm(blob)
    with pytest.raises(ValueError, match="exactly 64 bytes"):
        tsm.report(bytes(size), files=model)
    assert model.made == 0


@pytest.mark.parametrize(
    ("nonce", "words"), [(b"", "binds nothing"), (bytes(32), "binds nothing"), (b"n" * 65, "hash")]
)
def test_a_nonce_that_cannot_be_bound_is_refused(nonce, words):
    with pytest.raises(ValueError, match=words):
        tsm.evidence(nonce=nonce, files=Tsm(blob))


def test_options_count_as_writes(chip):
    made = ask(Tsm(blob, floor=1), privlevel=2, service_provider="svsm", service_guid="0" * 36)
    assert made.generation == 4


def test_a_privilege_level_below_the_floor_is_refused():
    with pytest.raises(ProviderError, match="privlevel_floor"):
        ask(Tsm(blob, floor=2), privlevel=1)
    with pytest.raises(ValueError, match="0 to 3"):
        ask(Tsm(blob), privlevel=4)


def test_threads_have_entries_of_their_own(chip):
    model = Tsm.snp(chip)
    found = {}

    def work(number: int) -> None:
        data = bytes([number + 1]) * 64
        found[number] = tsm.evidence(report_data=data, files=model).report_data == data

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


# ---- produce, verify --------------------------------------------------------------------------


def test_snp_evidence_with_the_hosts_certificates_is_accepted_with_our_nonce(chip):
    made = tsm.evidence(nonce=NONCE, files=Tsm.snp(chip))
    assert made.kind == "sev-snp-report"
    assert set(made.endorsements) == {"vek.der", "ask.pem", "ark.pem"}
    result = verify(
        made.evidence,
        policy=AppraisalPolicy.strict(),
        nonce=NONCE,
        report_data=made.report_data,
        endorsements=made.endorsements,
        roots=[chip.root],
    )
    assert result.fresh


def test_a_vlek_is_taken_for_a_report_that_a_vlek_signed():
    cloud = AmdChip("milan", signer="vlek")
    made = tsm.evidence(nonce=NONCE, files=Tsm.snp(cloud))
    assert made.endorsements["vek.der"] == cloud.vek
    assert verify(
        made.evidence,
        policy=AppraisalPolicy.strict(),
        nonce=NONCE,
        endorsements=made.endorsements,
        roots=[cloud.root],
    ).fresh


def test_tdx_evidence_is_accepted_with_our_report_data(platform):
    made = tsm.evidence(report_data=DATA, files=Tsm.tdx(platform))
    assert verify(
        made.evidence,
        policy=AppraisalPolicy.strict(),
        nonce=NONCE,
        report_data=DATA,
        endorsements=platform.endorsements("tdx"),
        roots=[platform.root],
    ).fresh


@pytest.mark.parametrize(
    ("name", "provider"), [("snp-v3-genoa-vcek-veraison", "sev_guest"), (QUOTE, "tdx_guest")]
)
def test_recorded_hardware_evidence_fails_at_the_binding_and_nowhere_before(
    recording, name, provider
):
    """The same path, real reports: all is in order but that they are not ours."""
    taken = recording(name)
    model = Tsm(lambda data: taken.evidence, provider=provider)
    with pytest.raises(BindingError, match="binds other report data") as caught:
        tsm.evidence(nonce=NONCE, files=model)
    made = caught.value.evidence
    assert made is not None
    assert taken.failing(made.evidence, freshness="not_checked") == []
    assert taken.failing(made.evidence, nonce=NONCE) == ["nonce"]
    wanted = {"nonce": NONCE, "report_data": NONCE.ljust(64, b"\0")}
    assert set(taken.failing(made.evidence, **wanted)) == {"report_data", "nonce"}


def test_evidence_is_written_as_verify_reads_it_and_replaces_nothing(chip, tmp_path):
    made = tsm.evidence(nonce=NONCE, files=Tsm.snp(chip))
    path = made.write(tmp_path / "folder")
    assert path.read_bytes() == made.evidence == made.to_bytes()
    assert sorted(os.listdir(path.parent)) == ["ark.pem", "ask.pem", "report.bin", "vek.der"]
    with pytest.raises(FileExistsError):
        made.write(tmp_path / "folder")
    assert verify(
        path.read_bytes(),
        policy=AppraisalPolicy.strict(),
        nonce=NONCE,
        endorsements=path.parent,
        roots=[chip.root],
    ).accepted
    assert replace(made, kind="arm-cca-token").file_name == "evidence.bin"


# ---- a file system of the kernel's shape ------------------------------------------------------


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """A FUSE double below root/sys/kernel/config/tsm, with a synthetic TDX platform behind it."""
    pytest.importorskip("mfusepy", reason="mfusepy is not installed")
    if os.getuid() != 0 or not os.access("/dev/fuse", os.W_OK) or not shutil.which("fusermount3"):
        pytest.skip("mounting needs root, /dev/fuse and fuse3")
    top = tmp_path_factory.mktemp("tsm")
    place = top / "root/sys/kernel/config/tsm"
    place.mkdir(parents=True)
    command = [sys.executable, "-m", "pyenclave.testing.tsm", str(place), "--tee", "tdx"]
    process = subprocess.Popen(
        [*command, "--endorsements", str(top / "endorsements")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 20
    while not (place / "report").is_dir():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.skip(f"FUSE cannot mount here: {process.communicate()[1][-300:]!r}")
        time.sleep(0.01)
    yield top
    subprocess.run(["fusermount3", "-u", str(place)], check=False)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stderr.close()


def test_the_double_behaves_as_the_kernel_does(mounted):
    """What the provider relies on, through real system calls."""
    report = mounted / "root/sys/kernel/config/tsm/report"
    entry = report / "mine"
    entry.mkdir()
    assert sorted(os.listdir(entry)) == ["generation", "inblob", "outblob", "provider"]
    with pytest.raises(OSError, match="Invalid argument"):
        (entry / "outblob").read_bytes()
    fd = os.open(entry / "inblob", os.O_WRONLY)
    with pytest.raises(OSError, match="too large"):
        os.write(fd, bytes(65))
    os.close(fd)
    tsm.OS_FILES.write(str(entry / "inblob"), DATA)
    assert (entry / "generation").read_text() == "1\n"
    first = tsm.OS_FILES.read(str(entry / "outblob"), 1 << 20)
    assert first == tsm.OS_FILES.read(str(entry / "outblob"), 1 << 20)
    with pytest.raises(PermissionError):
        os.open(entry / "outblob", os.O_RDWR)
    entry.rmdir()
    assert os.listdir(report) == []


def test_the_command_makes_evidence_that_verify_accepts(mounted, tmp_path, capsys):
    """`evidence` finds the provider below a root folder; `verify` accepts what it made."""
    output = str(tmp_path / "quote.bin")
    root = ("--root", str(mounted / "root"))
    assert cli.main(["evidence", "--nonce", NONCE.hex(), "-o", output, *root, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["kind"], made["provider"]) == ("tdx-quote", "configfs-tsm (tdx_guest)")
    assert "tdx_guest" in made["reason"]
    beside = mounted / "endorsements"
    judged = ["verify", output, "--endorsements", str(beside), "--root", str(beside / "root.pem")]
    assert cli.main([*judged, "--nonce", NONCE.hex(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fresh"] is True
    assert cli.main([*judged, "--nonce", "ff" * 32, "--json"]) == 1
    capsys.readouterr()
    assert os.listdir(mounted / "root/sys/kernel/config/tsm/report") == []


def test_without_fuse_the_double_says_what_to_install(tmp_path, monkeypatch, capsys):
    """One line and code 2, not a traceback; and nothing is written."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        tsm_double([str(tmp_path), "--endorsements", str(tmp_path / "files")])
    assert caught.value.code == 2
    assert "pip install mfusepy" in capsys.readouterr().err
    assert not (tmp_path / "files").exists()
