"""Gramine's files, Nitro's module and the raw guest devices: doubles, hostile answers, evidence."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.attestation import AppraisalPolicy, verify
from pyenclave.errors import BindingError, ProviderError
from pyenclave.formats import cbor
from pyenclave.formats.tdx import td_report_of
from pyenclave.providers import gramine, nitro, sev_guest
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.gramine import GramineFolder
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.nitro import NitroHost
from pyenclave.testing.nsm import Nsm
from pyenclave.testing.tsm import Tsm

NOW = datetime.now(UTC)
NONCE = bytes(range(1, 33))
DATA = bytes(range(64))
STRICT = AppraisalPolicy.strict()


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(NOW)


@pytest.fixture(scope="module")
def host() -> NitroHost:
    return NitroHost(NOW)


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip("genoa")


# ---- Gramine ----------------------------------------------------------------------------------


def test_what_is_no_gramine_enclave_says_so(tmp_path):
    with pytest.raises(ProviderError, match="no Gramine enclave"):
        gramine.evidence(nonce=NONCE, directory=str(tmp_path))


@pytest.mark.parametrize("kind", ["none", "epid", "", "dcap2"])
def test_an_enclave_without_dcap_quotes_is_named(tmp_path, kind):
    GramineFolder(tmp_path / "a", lambda data: b"", kind="none")
    (tmp_path / "a/attestation_type").write_text(kind)
    with pytest.raises(ProviderError, match=r"sgx\.remote_attestation"):
        gramine.evidence(nonce=NONCE, directory=str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("quote", "words"),
    [(b"", "cannot be read|can be read"), (b"x" * 8193, "too long"), (b"\3\0\2\0", "can be read")],
)
def test_a_quote_that_is_none_is_refused(tmp_path, quote, words):
    with GramineFolder(tmp_path / "a", lambda data: quote), pytest.raises(ProviderError) as caught:
        gramine.evidence(nonce=NONCE, directory=str(tmp_path / "a"))
    assert any(word in str(caught.value) for word in words.split("|"))


def test_a_failure_of_the_layer_below_says_where_to_look(tmp_path):
    if os.getuid() == 0:
        os.mkdir(tmp_path / "attestation_type")  # root is denied nothing, but this is no file
        with pytest.raises(ProviderError, match="directory"):
            gramine.attestation_type(str(tmp_path))
        return
    (tmp_path / "attestation_type").write_text("dcap")
    (tmp_path / "attestation_type").chmod(0)
    with pytest.raises(ProviderError, match="aesmd"):
        gramine.attestation_type(str(tmp_path))


def test_a_gramine_quote_is_accepted_with_our_nonce(tmp_path, platform):
    with GramineFolder.sgx(tmp_path / "a", platform) as folder:
        for nonce in (NONCE, b"another nonce"):
            made = gramine.evidence(nonce=nonce, directory=str(folder.folder))
            assert made.kind == "sgx-quote"
            assert verify(
                made.evidence,
                policy=STRICT,
                nonce=nonce,
                endorsements=platform.endorsements(),
                roots=[platform.root],
            ).fresh


def test_threads_of_one_enclave_get_the_quote_that_each_asked_for(tmp_path, platform, monkeypatch):
    """The files are the whole process's: without the lock quotes would be mixed up."""
    found = []
    usual, both = gramine._write, threading.Barrier(2)

    def slowly(directory: str, name: str, data: bytes) -> None:
        usual(directory, name, data)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.1)  # for the other's write, which must not come

    monkeypatch.setattr(gramine, "_write", slowly)
    with GramineFolder.sgx(tmp_path / "a", platform) as folder:

        def work(number: int) -> None:
            data = bytes([number + 1]) * 64
            made = gramine.evidence(report_data=data, directory=str(folder.folder))
            found.append(made.report_data == data)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 2


def test_a_recorded_sgx_quote_fails_at_the_binding_and_nowhere_before(tmp_path, recording):
    taken = recording("sgx-v3-oe-release-outofdate")
    place = str(tmp_path / "a")
    with GramineFolder(place, lambda data: taken.evidence), pytest.raises(BindingError) as caught:
        gramine.evidence(nonce=NONCE, directory=place)
    made = caught.value.evidence
    assert made is not None
    assert taken.failing(made.evidence, freshness="not_checked") == []
    assert taken.failing(made.evidence, nonce=NONCE) == ["nonce"]


def test_reports_and_keys_have_their_sizes(tmp_path):
    GramineFolder(tmp_path / "a", lambda data: b"", kind="none")
    place = str(tmp_path / "a")
    assert len(gramine.report(DATA, directory=place)) == 432
    assert (tmp_path / "a/target_info").read_bytes() == bytes(range(256)) * 2
    assert (tmp_path / "a/user_report_data").read_bytes() == DATA
    assert gramine.key(directory=place) == bytes(range(16))
    with pytest.raises(ValueError, match="512"):
        gramine.report(DATA, target_info=b"short", directory=place)
    with pytest.raises(ValueError, match="name of a key"):
        gramine.key("../report", directory=place)
    (tmp_path / "a/keys/unset").write_bytes(b"")
    with pytest.raises(ProviderError, match="another size"):
        gramine.key("unset", directory=place)


# ---- Nitro ------------------------------------------------------------------------------------


def test_what_is_no_nitro_enclave_says_so(tmp_path):
    with pytest.raises(ProviderError, match="no Nitro enclave"):
        nitro.evidence(nonce=NONCE, device=str(tmp_path / "nsm"))
    (tmp_path / "nsm").touch()
    with pytest.raises(ProviderError, match="no security module"):
        nitro.evidence(nonce=NONCE, device=str(tmp_path / "nsm"))


@pytest.mark.parametrize(
    "name",
    [
        "InvalidArgument",
        "InvalidIndex",
        "InvalidResponse",
        "ReadOnlyIndex",
        "InvalidOperation",
        "BufferTooSmall",
        "InputTooLarge",
        "InternalError",
        "SomethingNew",
    ],
)
def test_each_error_of_the_module_is_named(host, name):
    with pytest.raises(ProviderError, match=name):
        nitro.evidence(nonce=NONCE, ioctl=Nsm(host, answer=lambda asked: {"Error": name}).ioctl)


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.EACCES, errno.ENOTTY, errno.EIO])
def test_each_errno_of_the_device_is_told(number):
    def refuse(fd: int, request: int, message: bytearray) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ProviderError, match=os.strerror(number)):
        nitro.evidence(nonce=NONCE, ioctl=refuse)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        b"\xa1",
        [],
        "Attestation",
        {},
        {"Attestation": b"x"},
        {"Attestation": {"document": "text"}},
        {"Attestation": {"document": b""}},
        {"Attestation": {"document": b"\x84\x40\xa0\x40\x40"}},
        {"Attestation": {"document": b"x"}, "more": 1},
        {"GetRandom": {"random": b"x"}},
    ],
)
def test_an_answer_that_is_no_document_is_refused(host, answer):
    double = Nsm(host, answer=lambda asked: answer)
    with pytest.raises(ProviderError):
        nitro.evidence(nonce=NONCE, ioctl=double.ioctl)


@given(st.binary(max_size=200))
def test_whatever_the_module_answers_is_a_value_or_a_typed_error(data):
    double = Nsm(None, answer=lambda asked: data)  # type: ignore[arg-type]
    with pytest.raises(ProviderError):
        nitro.evidence(nonce=NONCE, ioctl=double.ioctl)


@pytest.mark.parametrize("change", [(2, 0), (3, 0), (3, 0x3001), (3, 1 << 63)])
def test_a_driver_that_moves_the_answer_is_refused(host, change):
    """Addresses stay ours and lengths in our buffer."""
    double = Nsm(host)

    def bent(fd: int, number: int, message: bytearray) -> int:
        double.ioctl(fd, number, message)
        fields = list(struct.unpack("@QQQQ", message))
        fields[change[0]] = change[1]
        message[:] = struct.pack("@QQQQ", *fields)
        return 0

    with pytest.raises(ProviderError, match="length is wrong"):
        nitro.evidence(nonce=NONCE, ioctl=bent)


def test_a_document_with_other_fields_is_refused(host):
    other = host.document(nonce=b"other", user_data=b"u")
    double = Nsm(host, answer=lambda asked: {"Attestation": {"document": other}})
    for fields in ({"nonce": b"other"}, {"nonce": NONCE, "user_data": b"u"}):
        with pytest.raises(BindingError):
            nitro.evidence(ioctl=double.ioctl, **fields)


def test_fields_have_limits_and_something_is_bound(host):
    with pytest.raises(ValueError, match="1024"):
        nitro.evidence(nonce=bytes(1025), ioctl=Nsm(host).ioctl)
    with pytest.raises(ValueError, match="binds nothing"):
        nitro.evidence(ioctl=Nsm(host).ioctl)


def test_a_nitro_document_is_accepted_with_our_nonce(host):
    double = Nsm(host)
    made = nitro.evidence(nonce=NONCE, user_data=b"user", public_key=b"key", ioctl=double.ioctl)
    assert double.requests == [
        {"Attestation": {"user_data": b"user", "nonce": NONCE, "public_key": b"key"}}
    ]
    assert made.report_data is None
    assert verify(
        made.evidence, policy=STRICT, nonce=NONCE, user_data=b"user", roots=[host.root]
    ).fresh


def test_the_request_is_written_as_the_driver_reads_it(host):
    """A map with one member, null for what is absent: byte by byte."""
    seen = []

    def look(fd: int, number: int, message: bytearray) -> int:
        address, size, *_ = struct.unpack("@QQQQ", message)
        seen.append((number, ctypes.string_at(address, size)))
        return Nsm(host).ioctl(fd, number, message)

    nitro.evidence(nonce=b"n", ioctl=look)
    body = b"\xa1\x6bAttestation\xa3"
    number, data = seen[0]
    assert number == 0xC0200A00
    assert data.startswith(body)
    assert cbor.loads(data, form="definite")["Attestation"]["user_data"] is None


def test_pcrs_and_random_bytes_are_read(host):
    ioctl = Nsm(host).ioctl
    assert nitro.describe_pcr(0, ioctl=ioctl) == (True, b"\1" * 48)
    assert len(nitro.random(ioctl=ioctl)) == 256
    with pytest.raises(ProviderError, match="no such PCR"):
        nitro.describe_pcr(99, ioctl=ioctl)


def test_a_recorded_document_fails_at_the_binding_and_nowhere_before(host, recording):
    taken = recording("nitro-evervault")
    double = Nsm(host, answer=lambda asked: {"Attestation": {"document": taken.evidence}})
    with pytest.raises(BindingError, match="another nonce") as caught:
        nitro.evidence(nonce=NONCE, ioctl=double.ioctl)
    made = caught.value.evidence
    assert made is not None
    assert taken.failing(made.evidence, freshness="not_checked") == []
    assert taken.failing(made.evidence, nonce=NONCE) == ["nonce"]


# ---- /dev/sev-guest and /dev/tdx_guest --------------------------------------------------------


class SevGuest:
    """The ioctl of the SEV-SNP guest driver, with a synthetic chip behind it."""

    def __init__(self, chip: AmdChip, **odd: int) -> None:
        self.chip = chip
        self.table = Tsm.snp(chip).table.ljust(8192, b"\0")
        self.odd = odd
        self.calls = 0

    def __call__(self, fd: int, number: int, message: bytearray) -> int:
        assert number == 0xC0205302
        assert len(message) == 32
        self.calls += 1
        version, asked, answer, _, _ = struct.unpack("@B7xQQII", message)
        assert version == 1
        if "errno" in self.odd:
            message[24:32] = struct.pack("@II", 0xFF, 0)
            raise OSError(self.odd["errno"], os.strerror(self.odd["errno"]))
        data, vmpl, table, room = struct.unpack("@64sI28xQI4x", ctypes.string_at(asked, 112))
        if room < len(self.table):
            wanted = self.odd.get("wanted", len(self.table) if self.calls < 9 else 0)
            ctypes.memmove(asked + 104, struct.pack("@I", wanted), 4)
            message[24:32] = struct.pack("@II", 0, 1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        report = self.chip.report(report_data=data, vmpl=vmpl)
        head = struct.pack("<II24x", self.odd.get("status", 0), self.odd.get("size", 1184))
        ctypes.memmove(answer, head + report, len(head) + len(report))
        ctypes.memmove(table, self.table, len(self.table))
        return 0


def test_a_report_of_the_device_is_accepted_with_our_nonce(chip):
    driver = SevGuest(chip)
    made = sev_guest.evidence(nonce=NONCE, ioctl=driver)
    assert driver.calls == 2  # once to learn how large the certificates are
    assert verify(
        made.evidence,
        policy=STRICT,
        nonce=NONCE,
        endorsements=made.endorsements,
        roots=[chip.root],
    ).fresh


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"status": 0x16}, "status 0x16"),
        ({"size": 1183}, "1183 bytes"),
        ({"errno": errno.ENOTTY}, "until the guest is restarted"),
        ({"errno": errno.EIO}, "firmware not reached"),
        ({"wanted": 4097}, "hypervisor status 1"),
        ({"wanted": 1 << 20}, "hypervisor status 1"),
        ({"wanted": 4096}, "hypervisor status 1"),
    ],
)
def test_what_the_firmware_or_the_host_refuses_is_told_and_ends(chip, odd, words):
    driver = SevGuest(chip, **odd)
    with pytest.raises(ProviderError, match=words):
        sev_guest.evidence(nonce=NONCE, ioctl=driver)
    assert driver.calls <= 3


def test_a_certificate_table_that_grows_for_ever_ends(chip):
    driver = SevGuest(chip)

    def growing(fd: int, number: int, message: bytearray) -> int:
        driver.table = bytes(min(4096 * (driver.calls + 2), 16384))
        return driver(fd, number, message)

    with pytest.raises(ProviderError, match="grows"):
        sev_guest.evidence(nonce=NONCE, ioctl=growing)


def test_a_report_of_another_request_is_refused(chip):
    other = SevGuest(chip)
    other.table = bytes(4096)
    other.chip = type("Stale", (), {"report": lambda self, **_: chip.report(report_data=DATA)})()
    with pytest.raises(BindingError):
        sev_guest.evidence(nonce=NONCE, ioctl=other)


def test_a_tdreport_binds_what_was_asked(platform):
    from pyenclave.formats.dcap import TdQuote

    def driver(fd: int, number: int, message: bytearray) -> int:
        assert number == 0xC4405401
        assert len(message) == 1088
        body = TdQuote.from_bytes(platform.td_quote(report_data=bytes(message[:64]))).report_body
        message[64:] = td_report_of(body)
        return 0

    assert len(sev_guest.td_report(DATA, ioctl=driver)) == 1024

    def stale(fd: int, number: int, message: bytearray) -> int:
        mine = bytearray(NONCE * 2 + bytes(1024))
        driver(fd, number, mine)
        message[64:] = mine[64:]
        return 0

    with pytest.raises(BindingError):
        sev_guest.td_report(DATA, ioctl=stale)
    with pytest.raises(ProviderError, match="read"):
        sev_guest.td_report(DATA, ioctl=lambda fd, number, message: 0)


def test_a_device_that_is_not_there_says_so(tmp_path):
    for call in (
        lambda: sev_guest.evidence(nonce=NONCE, device=str(tmp_path / "sev-guest")),
        lambda: sev_guest.td_report(DATA, device=str(tmp_path / "tdx_guest")),
    ):
        with pytest.raises(ProviderError, match="no such device"):
            call()
