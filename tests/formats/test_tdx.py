"""TDX structures: sizes, reserved bytes, and what the published ones say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.tdx import BODY_SIZES, TDREPORT_SIZE, TdReport, TdReportBody

BODY = TdReportBody(mr_td=bytes(range(48)))


def test_bodies_of_other_sizes_are_refused() -> None:
    for size in (0, 1, 384, 583, 585, 647, 649, 884, 886, 1024):
        with pytest.raises(EvidenceFormatError, match="size is wrong"):
            TdReportBody.from_bytes(bytes(size))
    for kind, size in BODY_SIZES.items():
        body = TdReportBody.from_bytes((bytes(range(256)) * 4)[:size])
        assert body.body_type == kind
        assert TdReportBody.from_bytes(body.to_bytes()) == body


def test_half_a_body_of_1_5_is_not_written() -> None:
    with pytest.raises(ValueError, match="all fields"):
        dataclasses.replace(BODY, tee_tcb_svn2=bytes(16)).to_bytes()
    with pytest.raises(ValueError, match="all fields"):
        dataclasses.replace(BODY, mr_service_td=bytes(48)).to_bytes()
    with pytest.raises(ValueError, match="not 47"):
        dataclasses.replace(BODY, mr_td=bytes(47)).to_bytes()


def test_att_01_debug_is_bit_0_of_the_attributes() -> None:
    for bit in range(64):
        body = dataclasses.replace(BODY, td_attributes=(1 << bit).to_bytes(8, "little"))
        assert body.debug is (bit == 0)


def _reports(vectors: Path) -> list[bytes]:
    found = []
    for path in sorted((vectors / "attestation").glob("azure-tdx-*/hcl-report.bin")):
        data = path.read_bytes()
        found.append(data[32 : 32 + TDREPORT_SIZE])
    assert len(found) >= 4
    return found


def test_published_reports_of_azure_are_consistent(vectors: Path) -> None:
    for data in _reports(vectors):
        report = TdReport.from_bytes(data)
        assert report.to_bytes() == data
        assert report.consistent
        assert report.body.report_data == report.report_data
        assert report.body.body_type == 3


def test_each_changed_byte_of_a_report_shows(vectors: Path) -> None:
    data = bytearray(_reports(vectors)[0])
    good = TdReport.from_bytes(data)
    for at in range(TDREPORT_SIZE):
        data[at] ^= 1
        try:
            changed = TdReport.from_bytes(data)
        except EvidenceFormatError:
            continue
        finally:
            data[at] ^= 1
        assert changed != good
        covered = 32 <= at < 128 or 256 <= at < 495 or at >= 512
        assert changed.consistent is not covered


def test_reports_of_another_type_or_size_are_refused(vectors: Path) -> None:
    data = _reports(vectors)[0]
    for bad in (b"\0" + data[1:], data[:1] + b"\1" + data[2:], data[:-1], data + b"\0", b""):
        with pytest.raises(EvidenceFormatError):
            TdReport.from_bytes(bad)
