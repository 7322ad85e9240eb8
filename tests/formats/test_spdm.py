"""SPDM measurements of GPUs: hostile reports first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from issuer_nvidia import DIGEST, FIRMWARE, NONCE, certificate, device_identity, report

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der, spdm
from pyenclave.formats.spdm import GpuReport, Measurement
from pyenclave.formats.x509 import Certificate

REPORT = report()
RESPONSE = 37
RECORD = RESPONSE + 8
BLOCK = 4 + 3 + 48
OPAQUE = RECORD + 2 * BLOCK + 32


def put(at: int, value: bytes) -> bytes:
    return REPORT[:at] + value + REPORT[at + len(value) :]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "version of the request"),
        (put(0, b"\x12"), "0x11"),
        (put(1, b"\xe1"), "0xe0"),
        (put(2, b"\0"), "signed response"),
        (put(36, b"\1"), "slot"),
        (put(RESPONSE, b"\x10"), "0x11"),
        (put(RESPONSE + 1, b"\x7f"), "0x60"),
        (put(RESPONSE + 3, b"\1"), "slot"),
        (put(RESPONSE + 4, b"\1"), "bytes follow"),
        (put(RESPONSE + 4, b"\3"), "does not fit"),
        (put(RESPONSE + 4, b"\0"), "bytes follow"),
        (put(RESPONSE + 5, b"\xff\xff\xff"), "does not fit"),
        (put(RECORD, b"\0"), "1 to 254"),
        (put(RECORD, b"\xff"), "1 to 254"),
        (put(RECORD, b"\2"), "each once"),
        (put(RECORD + 1, b"\2"), "DMTF"),
        (put(RECORD + 2, b"\x32\0"), "does not fit"),
        (put(RECORD + 5, b"\x2f\0"), "bytes follow"),
        (put(RECORD + 5, b"\x31\0"), "does not fit"),
        (put(OPAQUE, b"\xff\xff"), "at most 1024"),
        (put(OPAQUE, b"\0\0"), "bytes follow"),
        (put(OPAQUE + 2, b"\6\0"), "each field once"),
        (put(OPAQUE + 4, b"\xff\0"), "does not fit"),
        (REPORT[:-1], "signature"),
        (REPORT + b"\1", "bytes follow"),
        (REPORT + b"\0\1", "bytes follow"),
        (bytes(spdm.MAX_SIZE + 1), "at most"),
    ],
)
def test_a_report_with_one_thing_wrong_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(EvidenceFormatError, match="SPDM") as caught:
        GpuReport.from_bytes(data)
    assert says in f"{caught.value.message} {caught.value.expected}"


def test_the_nul_at_the_end_of_a_file_is_no_matter() -> None:
    assert GpuReport.from_bytes(REPORT + b"\0") == GpuReport.from_bytes(REPORT)


def test_a_report_cut_off_anywhere_is_refused() -> None:
    for size in range(len(REPORT)):
        with pytest.raises(EvidenceFormatError):
            GpuReport.from_bytes(REPORT[:size])


def test_a_report_without_measurements_is_refused() -> None:
    with pytest.raises(EvidenceFormatError, match="measurements"):
        GpuReport.from_bytes(report(measurements={}))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for head in (b"", REPORT[:RESPONSE], REPORT[:RECORD]):
        with pytest.raises(EvidenceFormatError):
            GpuReport.from_bytes(head + data)


def test_everything_but_the_signature_is_signed() -> None:
    read = GpuReport.from_bytes(REPORT)
    assert read.signed + read.signature == REPORT
    assert len(read.signature) == spdm.SIGNATURE_SIZE


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.integers(1, 254),
        st.builds(
            Measurement, st.integers(0, 127), st.booleans(), st.binary(min_size=0, max_size=64)
        ),
        min_size=1,
        max_size=8,
    ),
    st.dictionaries(st.integers(0, 0xFFFF), st.binary(max_size=60), max_size=8),
    st.integers(0, 255),
    st.integers(0, 15),
)
def test_a_report_is_read_as_it_was_written(
    measurements: Any, fields: Any, operation: int, slot: int
) -> None:
    unsigned = GpuReport.unsigned_bytes(
        nonce=NONCE,
        measurements=measurements,
        fields=fields,
        operation=operation,
        slot=slot,
        response_nonce=b"\7" * 32,
    )
    read = GpuReport.from_bytes(unsigned + bytes(96))
    assert read.signed == unsigned
    assert (read.measurements, read.fields) == (measurements, fields)
    assert (read.operation, read.slot, read.nonce) == (operation, slot, NONCE)
    assert read.response_nonce == b"\7" * 32
    assert all(isinstance(value, str) for value in read.named_fields().values())


def test_fields_are_told_as_the_vendor_writes_them() -> None:
    found = GpuReport.from_bytes(REPORT).named_fields()
    assert found == {
        "driver_version": "570.00",
        "vbios_version": "96.00.9F.00.01",
        "fwid": FIRMWARE.hex(),
    }
    odd = GpuReport.from_bytes(report(fields={3: b"5\xff", 6: b"\1", 999: b"\2"})).named_fields()
    assert odd == {"driver_version": "5\\xff", "vbios_version": "01", "field_999": "02"}


def test_the_real_report_is_read_whole(vectors: Path) -> None:
    folder = vectors / "attestation" / "nvidia-hopper-report"
    read = GpuReport.from_bytes((folder / "report.bin").read_bytes())
    assert sorted(read.measurements) == list(range(1, 65))
    assert all(len(item.value) == 48 for item in read.measurements.values())
    names = read.named_fields()
    assert names["driver_version"] == "550.90.07"
    assert names["vbios_version"] == "96.00.9F.00.01"
    leaf = Certificate.from_pem_chain((folder / "cert-chain.pem").read_bytes())[0]
    assert spdm.fwid_of(leaf) == read.fields[spdm.FWID]
    assert (spdm.device_of(leaf) or "").startswith("NVIDIA:GH100:")


# ---- the leaf ---------------------------------------------------------------------------------


def leaf(**changes: Any) -> Certificate:
    return Certificate.from_der(certificate("leaf", **changes).public_bytes(Encoding.DER))


def test_the_leaf_names_firmware_and_device() -> None:
    assert spdm.fwid_of(leaf()) == FIRMWARE
    assert spdm.device_of(leaf()) == "NVIDIA:GH100:0123"
    ca = Certificate.from_der(certificate("brom").public_bytes(Encoding.DER))
    assert spdm.fwid_of(ca) is None
    assert spdm.device_of(ca) is None
    assert spdm.fwid_of(leaf(identity=der.encode_sequence(b"\x80\x01x"))) is None


@pytest.mark.parametrize(
    "identity",
    [
        b"",
        b"\x30\x00\x00",
        device_identity(DIGEST) + b"\0",
        device_identity(DIGEST)[:-1],
        device_identity(DIGEST, version=2),
        der.encode_sequence(der.encode_integer(1)),
    ],
)
def test_a_malformed_identity_is_refused(identity: bytes) -> None:
    with pytest.raises(EvidenceFormatError, match="device identity"):
        spdm.fwid_of(leaf(identity=identity))
